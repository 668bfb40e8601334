"""The search for a baseline's settings, and the runs that its networks are trained with."""

import math

import numpy as np
import pytest
import shop

from mtcl_torchrec.baselines import BASELINES, networks
from mtcl_torchrec.baselines.search import candidates, search
from mtcl_torchrec.config import parse_run

CHAINED = (
    shop.RUN.replace("{name: buy, kind: binary, mask: click, weight: 0.5}", "{name: buy, kind: binary, after: click}")
)  # fmt: skip


def test_the_search_begins_with_the_usual_setting_and_keeps_to_its_seconds():
    now = [0.0]

    def attempt(setting):
        now[0] += 10
        return {"val": {}}, -((setting["c"] - 3) ** 2)

    tried = candidates({"c": 9}, {"c": [1, 2, 3, 4, 9]}, 5, seed=0)
    assert tried[0] == {"c": 9}
    assert len(tried) == len({t["c"] for t in tried}) == 5
    found = search(tried, attempt, until=35, clock=lambda: now[0])
    assert len(found.trials) == 3  # a fourth would end at 40
    assert found.settings == max(tried[:3], key=lambda t: -((t["c"] - 3) ** 2))
    now[0] = 0
    assert search(tried, attempt, clock=lambda: now[0]).settings == {"c": 3}
    assert len(search(tried, attempt, until=-1, clock=lambda: now[0]).trials) == 1


@pytest.mark.parametrize("name", list(BASELINES))
def test_the_trials_of_a_small_search_are_the_first_of_a_large_one(name):
    usual, space = BASELINES[name].usual, BASELINES[name].space
    many = candidates(usual, space, 60, seed=3)
    for trials in (1, 2, 3, 8, 20, 40):
        assert candidates(usual, space, trials, seed=3) == many[:trials]
    lists = [values for values in space.values() if isinstance(values, list)]
    size = math.prod(map(len, lists)) if len(lists) == len(space) else math.inf
    size += any(usual[of] not in values for of, values in space.items() if isinstance(values, list))
    assert len(many) == min(60, size)
    assert all(setting not in many[:i] for i, setting in enumerate(many))


def test_a_trial_that_diverges_is_counted_and_lost():
    def attempt(setting):
        if setting["c"] != 2:
            raise FloatingPointError("diverged")
        return {"val": {"t": np.zeros(1)}}, 0.5

    found = search([{"c": 1}, {"c": 2}, {"c": 3}], attempt)
    assert (found.settings, len(found.trials)) == ({"c": 2}, 3)
    assert [math.isnan(trial.quality) for trial in found.trials] == [True, False, True]
    with pytest.raises(FloatingPointError, match="diverged"):
        search([{"c": 1}, {"c": 3}], attempt)


# ---------------------------------------------------------------------- what the networks are trained with


def changed(text, run=CHAINED):
    for before, after in text:
        assert before in run
        run = run.replace(before, after)
    return parse_run(run)


def test_a_twin_is_the_run_with_one_task():
    run = changed([("fusion: {", "calibration: {click: platt}\nbalance: {surgery: {kind: cagrad}}\nfusion: {")])
    twin = networks.single_task(run, run.data_schema.tasks[2])
    assert [t.name for t in twin.data_schema.tasks] == ["taste"]
    assert (twin.fusion, twin.calibration, twin.balance.surgery.kind) == (None, None, "none")
    assert twin.data_schema.features == run.data_schema.features
    assert (twin.model, twin.optimizers, twin.statistics) == (run.model, run.optimizers, run.statistics)
    assert twin.training.watch == []  # its one task decides, where it has events enough
    assert twin.training.epochs == run.training.epochs


def test_the_twin_of_a_chain_learns_from_its_own_label_alone():
    run = changed([("after: click}", "after: click, chain: {kind: escm2_ips, joint_weight: 2}}")])
    twin = networks.single_task(run, run.data_schema.tasks[1])
    weights = {t.name: t.weight for t in twin.data_schema.tasks}
    assert weights == {"buy": 3.2, "click": 0.0}
    assert twin.data_schema.tasks[0].chain.kind == "esmm"
    assert twin.training.watch == ["buy"]


def test_twins_of_trunks_that_name_tasks_and_their_tables():
    trunk = "trunk: {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}"
    cross = ("\n  cross_layers: 1", "")
    home = changed([(trunk, "trunk: {kind: home, expert_layers: [16], groups: [[click, buy], [taste, stars]]}"), cross])
    assert networks.single_task(home, home.data_schema.tasks[2]).model.trunk.groups == [["taste"]]
    own = ("lr: 0.1}", 'lr: 0.1, lr_of: {user_id: 0.1, "user_id@click": 0.2, "user_id@stars": 0.3}}')
    stem = changed([(trunk, "trunk: {kind: stem, expert_layers: [16]}"), cross, own])
    twin = networks.single_task(stem, stem.data_schema.tasks[3])
    assert twin.optimizers.tables.lr_of == {"user_id": 0.1, "user_id@stars": 0.3}
    dot = changed([("{name: click, kind: binary}", "{name: click, kind: binary, head: dot}")])
    alone = networks.single_task(dot, dot.data_schema.tasks[0])
    assert not any(task.in_trunk for task in alone.data_schema.tasks)


def test_unweighted_adds_up_the_losses_of_the_tasks_that_train():
    run = changed(
        [("weight: 0.2}", "weight: 0}"), ("name: click, kind: binary}", "name: click, kind: binary, weight: 4}")]
    )
    plain = networks.unweighted(run)
    assert {t.name: t.weight for t in plain.data_schema.tasks} == {"click": 2, "buy": 2, "taste": 2, "stars": 0}
    run.balance.weighting.kind = "famo"
    assert networks.unweighted(run).balance.weighting.kind == "sum"
    assert plain.data_schema.tasks[1].after == "click"
    faster = networks._with_settings(plain, {"tables_lr": 2.0, "dense_lr": 0.5})
    assert (faster.optimizers.tables.lr, faster.optimizers.dense.lr) == (0.2, 0.005)
