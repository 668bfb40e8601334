"""Twins of single tasks: the rows that they share with the run, the tasks that are asked for."""

import numpy as np
import pytest
import shop
from rich.console import Console

from mtcl_torchrec.baselines import Budget, read_entries, run_baselines
from mtcl_torchrec.baselines import networks as baseline_networks
from mtcl_torchrec.baselines.rows import load_data
from mtcl_torchrec.cli.twins import twin_tasks
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.schema import ConfigError
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
