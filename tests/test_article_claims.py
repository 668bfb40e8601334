"""The comparison with what articles promise: its matrix factorisation, and what is measured anew."""

import argparse
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from test_benchmarks import script

from mtcl_torchrec.baselines.rows import BaselineRows
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.evaluation.metrics import auc
from mtcl_torchrec.schema import Task

TASK = Task.binary("liked")
USERS, ITEMS = 150, 80


def rows_of(users, items, labels):
    return BaselineRows(
        np.empty((len(users), 0), np.float32), {}, {}, labels[:, None].astype(np.float32), None, users, items
    )


@pytest.fixture(scope="module")
def world():
    """Ratings of known truth: biases, and two directions of taste that no bias tells of."""
    draw = np.random.default_rng(0)
    p, q = draw.normal(size=(USERS, 2)) * 1.5, draw.normal(size=(ITEMS, 2))
    b_user, b_item = draw.normal(size=USERS) * 0.5, draw.normal(size=ITEMS) * 0.5

    def split(rows):
        users, items = draw.integers(0, USERS, rows), draw.integers(0, ITEMS, rows)
        logit = (p[users] * q[items]).sum(1) + b_user[users] + b_item[items] - 0.5
        labels = (draw.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
        labels[::50] = np.nan
        return rows_of(users, items, labels), logit, b_user[users] + b_item[items]

    (train, *_), (val, *_), (test, logit, biases) = split(8000), split(1000), split(1000)
    data = SimpleNamespace(
        train=train, held_out={"val": val, "test": test}, num_users=USERS, num_items=ITEMS, column=lambda task: 0
    )
    return data, logit, biases


@pytest.fixture(scope="module")
def found(world):
    return script("factorisation").factorised(world[0], TASK, trials=3, seed=1)


def test_factorisation_finds_the_taste_that_no_bias_tells_of(world, found):
    data, logit, biases = world
    labels = data.held_out["test"].labels[:, 0]
    best, without, reached = (auc(labels, of) for of in (logit, biases, found.predictions["test"]["liked"]))
    assert without < best - 0.1
    assert reached > without + 0.6 * (best - without)
    known = ~np.isnan(labels)
    assert found.predictions["test"]["liked"][known].mean() == pytest.approx(labels[known].mean(), abs=0.05)


def test_its_trials_are_the_usual_setting_and_others_and_the_best_on_validation_is_kept(world, found):
    factorisation = script("factorisation")
    assert found.trials[0].settings == factorisation.USUAL
    assert len({json.dumps(trial.settings) for trial in found.trials}) == 3
    assert found.quality == max(trial.quality for trial in found.trials)
    labels = world[0].held_out["val"].labels[:, 0]
    assert found.quality == auc(labels, found.predictions["val"]["liked"])


def test_who_is_new_has_no_factors_and_no_bias(world):
    data, *_ = world
    factorisation = script("factorisation")
    model = factorisation.Factorisation(USERS, ITEMS, 4, 0.3, torch.Generator().manual_seed(0))
    nobody, somebody = torch.tensor([-1, -1]), torch.tensor([0, 5])
    np.testing.assert_allclose(model.probabilities(nobody, nobody), 0.3, rtol=1e-6)
    np.testing.assert_allclose(model.probabilities(nobody, somebody), 0.3, rtol=1e-6)  # before the biases are learnt
    assert not np.allclose(model.probabilities(somebody, somebody), 0.3)
    new = SimpleNamespace(**vars(data) | {"held_out": {**data.held_out, "test": rows_of(
        np.full(4, -1), np.arange(4), np.array([1.0, 0, 1, 0]))}})  # fmt: skip
    fitted = factorisation.fit(new, TASK, factorisation.USUAL)["test"]["liked"]
    assert len(set(fitted.round(6))) > 1  # their items still speak


def test_training_that_diverges_is_a_trial_that_failed(world):
    factorisation = script("factorisation")
    with pytest.raises(FloatingPointError, match="epoch 1: the loss is not finite"):
        factorisation.fit(world[0], TASK, {**factorisation.USUAL, "l2_user": math.inf})


# ---------------------------------------------------------------------- the table


def test_the_networks_penalty_on_embeddings_is_as_large_beside_one_loss_as_it_was_beside_all():
    claims = script("article_claims")
    run = parse_run(yaml.safe_dump(claims.MOVIELENS))
    total = sum(task.weight for task in run.data_schema.tasks)
    alone = claims.alone(run, "liked")
    assert [task.name for task in alone.data_schema.tasks] == ["liked"]
    # As much loss beside the same penalty.
    assert alone.data_schema.tasks[0].weight == pytest.approx(total)
    assert alone.training.regularisers == run.training.regularisers
    assert {name: alone.optimizers.dense.model_dump()[name] for name in ("lr", "weight_decay")} == {
        "lr": 0.004, "weight_decay": 0.3,
    }  # fmt: skip
    assert run.data_schema.tasks[0].weight == 1.0  # the run itself is as it was


def arguments(out, seeds=(0, 1)):
    return argparse.Namespace(
        data="movielens", folder=None, seeds=list(seeds), trials=2, worth=None, k=5, out=out, small=True
    )


def test_what_a_line_has_is_kept_and_what_it_lacks_is_measured(tmp_path, monkeypatch, capsys):
    claims, columns, asked = script("article_claims"), script("article_claims_tables").COLUMNS, []

    def measured(run, data, systems, folder, seed, options):
        asked.append((seed, tuple(systems)))
        return {name: dict.fromkeys([*columns, "majority"], 0.6 + 0.1 * seed) for name in systems}

    monkeypatch.setattr(claims, "configured", lambda *of, **options: None)
    monkeypatch.setattr(claims, "load_data", lambda *of, **options: "rows")
    monkeypatch.setattr(claims, "measured", measured)
    out = tmp_path / "r.jsonl"
    other = {**vars(arguments(out)), "trials": 8, "seed": 0, "seconds": 1, "systems": {"one task": {"auc": 0.1}}}
    out.write_text(json.dumps({k: v for k, v in other.items() if k not in ("folder", "seeds", "out")}) + "\n")
    claims.measure_missing(arguments(out, [0]))
    assert asked == [(0, claims.SYSTEMS)]
    before, line = out.read_text().splitlines()
    assert json.loads(before)["trials"] == 8  # of other settings: left alone
    without = json.loads(line)
    kept = without["systems"].pop("matrix factorisation")
    out.write_text("\n".join([before, json.dumps(without)]))
    results = claims.measure_missing(arguments(out))
    assert asked[1:] == [(0, ("matrix factorisation",)), (1, claims.SYSTEMS)]
    assert results[0]["systems"]["matrix factorisation"] == kept
    assert list(results[0]["systems"]) == list(claims.SYSTEMS)
    assert [json.loads(of)["seed"] for of in out.read_text().splitlines()] == [0, 0, 1]
    claims.shown(claims.of_systems(claims.read(out)), claims.tables, claims.draw, markdown=True, picture=None)
    said = capsys.readouterr().out
    assert "| matrix factorisation | 0.650 ± 0.071 |" in said
    assert "| several tasks: gain over matrix factorisation | +0.0% ± 0.0% |" in said


def test_a_factorisation_of_each_event_is_fused_as_the_networks_tasks_are():
    claims, draw = script("article_claims"), np.random.default_rng(0)
    rows, parts = {}, {}
    for split in claims.SPLITS:
        users = np.repeat(np.arange(60.0), 12)
        chances = {task: draw.random(len(users)) * most for task, most in (("click", 0.6), ("like", 0.2))}
        labels = {task: (draw.random(len(users)) < of).astype(float) for task, of in chances.items()}
        users[::40] = np.nan  # somebody unknown
        rows[split] = SimpleNamespace(users=users, labels=labels.__getitem__)
        parts[split] = chances
    scores = claims.fused_parts(rows, parts, {"click": 1.0, "like": 3.0})
    # Of true chances the values are the best weights, but for their scale.
    best = parts["test"]["click"] + 3.0 * parts["test"]["like"]
    assert np.corrcoef(scores["test"], best)[0, 1] > 0.98
    assert ((scores["test"] >= 0) & (scores["test"] <= 1)).all()
