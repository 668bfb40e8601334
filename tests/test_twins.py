"""Twins of single tasks: the rows that they share with the run, the tasks that are asked for."""

import json

import numpy as np
import pytest
import shop
import torch
from rich.console import Console

from mtcl_torchrec.baselines import Budget, read_entries, run_baselines
from mtcl_torchrec.baselines import networks as baseline_networks
from mtcl_torchrec.baselines.rows import load_data
from mtcl_torchrec.cli.twins import twin_tasks
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.build import build_loss_weighting, build_model
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import load_data as training_data
from mtcl_torchrec.training.sharding import ranks

CHAINED = shop.RUN.replace(
    "{name: buy, kind: binary, mask: click, weight: 0.5}", "{name: buy, kind: binary, after: click}"
).replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256")


def silent(line):
    """Say nothing."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    shop.log(1200).to_parquet(folder / "log.parquet", index=False)
    return parse_run(CHAINED, folder=folder)


@pytest.mark.parametrize("name", ["buy", "taste"])
def test_rows_that_are_shared_train_the_same_twin_as_rows_that_are_read_anew(run, tmp_path, monkeypatch, name):
    data = load_data(run, max_rows=10**6, seed=0, say=silent)
    task = next(task for task in data.tasks if task.name == name)
    alone = baseline_networks.single_task(run, task)

    def predicted():
        return baseline_networks.fit_network(
            alone, data, [task], baseline_networks.USUAL, folder=tmp_path, device="cpu"
        )["test"][name]

    shared = predicted()
    assert baseline_networks.data_for(alone, data) is not None
    monkeypatch.setattr(baseline_networks, "data_for", lambda run, data: None)
    np.testing.assert_array_equal(shared, predicted())
    assert shared.std() > 0


def test_data_that_is_read_beforehand_trains_the_same_run(run, tmp_path):
    def reached(place, data):
        return train_run(run, place, device="cpu", console=Console(quiet=True), data=data).evaluations["test"].tasks

    with ranks("cpu") as where:
        data = training_data(run, where, say=silent)
    assert reached(tmp_path / "shared", data) == reached(tmp_path / "anew", None)


def test_only_the_tasks_that_are_asked_for(run, tmp_path):
    options = {"only": ["logistic_regression"], "budget": Budget(1), "say": silent}
    with pytest.raises(ConfigError, match=r"no task 'buyy' \(did you mean 'buy'\?\); there are click, buy"):
        run_baselines(run, tmp_path, tasks=["buyy"], **options)
    run_baselines(run, tmp_path, tasks=["click"], **options)
    before = read_entries(tmp_path)["logistic_regression"]
    assert set(before["metrics"]["test"]["tasks"]) == {"click"}
    assert before["trials"] == 1
    run_baselines(run, tmp_path, tasks=["click"], **options)
    assert read_entries(tmp_path)["logistic_regression"] == before
    run_baselines(run, tmp_path, **options)
    assert set(read_entries(tmp_path)["logistic_regression"]["metrics"]["test"]["tasks"]) >= {"click", "buy"}
    run_baselines(run, tmp_path, tasks=["click"], **options | {"only": ["popularity"]})
    whole = read_entries(tmp_path)["popularity"]["metrics"]["test"]["tasks"]
    assert set(whole) == {task.name for task in run.data_schema.tasks}  # its fused score is one to be held against


def test_twins_are_of_the_events_that_are_watched_and_weigh_most(run):
    weighs = {task.name for task in run.data_schema.tasks if task.kind == "binary"}
    assert set(twin_tasks(run)) == weighs
    watching = run.model_copy(update={"training": run.training.model_copy(update={"watch": ["click"]})})
    assert twin_tasks(watching) == ["click"]


# ---------------------------------------------------------------------- as strongly regularised as the run

# Two tasks that are one: with equal towers, what they ask of shared weights differs by their weights alone.
TASKS = """  tasks:
    - {name: click, kind: binary, weight: 1.5}
    - {name: again, kind: binary, label: click, weight: 3}
"""
EQUAL = shop.RUN.split("  tasks:")[0] + TASKS + "statistics:" + shop.RUN.split("statistics:")[1].split("fusion:")[0]
EQUAL = EQUAL.replace(
    "kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1", "kind: shared_bottom, expert_layers: [16]"
)


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal")
    shop.log(600).to_parquet(folder / "log.parquet", index=False)
    run = parse_run(EQUAL, folder=folder)
    return run, load_data(run, max_rows=10**6, seed=0, say=silent)


def gradients(run, data, weighting=None):
    """Of one batch's whole loss, and of its penalties alone, by shared parameter."""
    found = []
    for penalised in (True, False):
        model = build_model(
            run.model, data.preprocessor.redeclared(run.data_schema).encoder, None, table_device="cpu", seed=0
        )
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "tower.towers" in name:  # (T, ...)
                parameter.data.copy_(torch.randn_like(parameter[0]))
            elif "embedding" in name or "heads" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        given = run.training.regularisers.model_dump() if penalised else None
        train = MTCLTrain(model, regularisers=given, loss_weighting=weighting)
        rows = baseline_networks.data_for(run, data).splits.train.rows
        loss, _ = train(rows.batch(torch.arange(64)))
        loss.backward()
        shared = {n: p.grad for n, p in model.named_parameters() if "towers" not in n and "heads" not in n}
        found.append(shared)
    whole, of_tasks = found
    return whole, {name: whole[name] - of_tasks[name] for name in whole}


@pytest.mark.parametrize(
    "penalties", ["l2_embedding: 0.3", "l2_embedding: {user_id: 0.3, genre: 0.1}", "l2_dense: 0.05", "l2_embedding: 0"]
)
def test_penalties_pull_as_hard_beside_a_twins_loss_as_beside_the_runs(equal, penalties):
    run, data = equal
    text = EQUAL.replace("patience: 0}", f"patience: 0, regularisers: {{{penalties}}}}}")
    run = parse_run(text).model_copy(update={"data": run.data})
    expected, of_penalties = gradients(run, data)
    assert any(of.abs().max() > 0 for of in of_penalties.values()) == (penalties != "l2_embedding: 0")
    for other in (baseline_networks.single_task(run, run.data_schema.tasks[0]), baseline_networks.unweighted(run)):
        assert other.training.regularisers == run.training.regularisers
        found, _ = gradients(other, data)
        for name, of in found.items():
            torch.testing.assert_close(of, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["dwa", "tchebycheff", "famo", "geometric_mean", "uncertainty", "imtl_l"])
def test_a_twin_weighs_what_a_loss_weighting_gives_to_equal_losses(equal, kind):
    _, data = equal
    # The smoothed maximum tells tasks of other weights apart, by how large their losses are.
    text = EQUAL.replace("weight: 3}", "weight: 1.5}") if kind == "tchebycheff" else EQUAL
    weighed = parse_run(text + f"balance: {{weighting: {{kind: {kind}}}}}\n")
    expected, _ = gradients(weighed, data, build_loss_weighting(weighed.balance.weighting, 2))
    found, _ = gradients(baseline_networks.single_task(weighed, weighed.data_schema.tasks[0]), data)
    for name, of in found.items():
        torch.testing.assert_close(of, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_that_is_trained_says_what_its_losses_weighed(equal, tmp_path):
    run, _ = equal
    run = run.model_copy(deep=True)
    run.balance.weighting.kind = "uncertainty"
    assert baseline_networks.total_weight(run) == baseline_networks.total_weight(run, tmp_path) == 2.25  # ½ each
    mean = {"click": 0.8, "again": 0.5}
    about = {"balance": {"loss_weights": {"method": "x", "mean": mean, "clamped": {}}}}
    (tmp_path / "metrics.json").write_text(json.dumps(about))
    assert baseline_networks.total_weight(run, tmp_path) == pytest.approx(0.8 * 1.5 + 0.5 * 3)
