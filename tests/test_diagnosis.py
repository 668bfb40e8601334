"""What a training says about its tasks: the numbers against hand computations, and the sentences about them."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console
from test_distributed import optimizers, rows, train_module

from mtcl_torchrec import PLE, MMoE, SharedBottom
from mtcl_torchrec.config import LossWeightingConfig, parse_run
from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.modules.balance.gate_use import gate_sums
from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.balance.weighting import DWA
from mtcl_torchrec.training.balance import Balance, GateUse, GradientAgreement, LossWeights, _gate_names, read_step
from mtcl_torchrec.training.diagnosis import MOST_LINES, diagnose
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.loop import build_pipeline, parallelise, train_module_of
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

# ---------------------------------------------------------------- sentences


def weights(clamped=0.0, **mean):
    return LossWeights("FAMO", mean, dict.fromkeys(mean, 0.0) | ({next(iter(mean)): clamped} if clamped else {}))


def agreement(cosine, conflicting, *, cut="trunk", weights=(1.0, 1.0), clamped=0.0, degenerate=0.0):
    def matrix(diagonal, other):
        return [[diagonal, other], [other, diagonal]]

    of = dict(zip(("like", "click"), weights, strict=True))
    return GradientAgreement(
        cut, ["like", "click"], matrix(1.0, cosine), matrix(0.0, conflicting), of, 100, clamped, degenerate
    )


def gates(*rows, level=1, entropy=0.5, names=("click", "like", "comment", "shared")):
    return [GateUse(level, name, list(row), entropy) for name, row in zip(names, rows, strict=False)]


PLE_LIKE = ([0.5, None, None, 0.5], [None, 0.4, None, 0.6], [None, None, 0.93, 0.07])
LINES = [
    (Balance(), "nothing to look at"),
    (Balance(loss_weights=weights(click=1.0, like=1.9)), "nothing stands out in the weights of the losses"),
    (
        Balance(gradients=[agreement(-0.04, 0.5)], gates=gates([0.5, 0.5], [0.6, 0.4])),
        "nothing stands out in the use of experts and the tasks' gradients",
    ),
    (
        Balance(gradients=[agreement(-0.02, 0.93)]),
        "like and click pull apart in 93% of steps (mean cosine of late −0.02)",
    ),
    (
        Balance(gradients=[agreement(-0.12, 0.41)]),
        "like and click pull apart in 41% of steps (mean cosine of late −0.12)",
    ),
    (Balance(gradients=[agreement(-0.01, 0.98)]), "nothing stands out in the tasks' gradients"),
    (
        Balance(gates=gates([0.5, 0.5], [0.5, 0.5], entropy=0.99)),
        "the gates mix all experts evenly: so few steps may not teach them to choose",
    ),
    (  # one rule for all gates of a level: what they do on average
        Balance(readings=85, gates=gates([0.25] * 4, entropy=0.974) + gates([0.25] * 4, entropy=0.971)),
        "the gates mix all experts evenly: one larger expert may do as well",
    ),
    (
        Balance(readings=50, gates=gates([0.25] * 4, entropy=0.98) + gates([0.25] * 4, entropy=0.95)),
        "nothing stands out in the use of experts",
    ),
    (Balance(gradients=[agreement(None, None)]), "nothing stands out in the tasks' gradients"),
    (
        Balance(gradients=[agreement(0.5, 0.0), agreement(-0.3, 0.8, cut="embeddings")]),
        "like and click pull apart at the embeddings in 80% of steps (mean cosine of late −0.30)",
    ),
    (
        Balance(gradients=[agreement(0.1, 0.3, weights=(3.0, 1.0))]),
        "gradient surgery gives like 3.0 times the weight of click",
    ),
    (Balance(gradients=[agreement(0.1, 0.3, clamped=0.12)]), "the gradients' weights were clamped in 12% of steps"),
    (
        Balance(gradients=[agreement(0.1, 0.3, degenerate=0.2)]),
        "in 20% of steps the gradients were none, not finite or without a solution, and just added up",
    ),
    (Balance(loss_weights=weights(click=1.0, report=2.7)), "FAMO gives report 2.7 times the weight of click"),
    (Balance(loss_weights=weights(click=0.01, report=1.0)), "FAMO gives report 100 times the weight of click"),
    (
        Balance(loss_weights=weights(clamped=0.12, click=1.0, report=1.5)),
        "the weights of FAMO were held in their range: click in 12% of its steps",
    ),
    (
        Balance(gates=gates([0.6, 0.39, 0.01], [0.5, 0.48, 0.02])),
        "expert 2 is unused: no gate gives it more than 0.02",
    ),
    (
        Balance(gates=gates([0.97, 0.0, 0.01, 0.02], [0.88, 0.09, 0.015, 0.015], level=2)),
        "experts 2 and 3 are unused: no gate gives any of them more than 0.02",
    ),
    (Balance(gates=gates(*PLE_LIKE)), "task comment leans on its own expert (0.93): it shares little"),
    (Balance(gates=gates([0.95, 0.05], [0.5, 0.5])), "task click uses expert 0 alone (0.95)"),
    (
        Balance(readings=50, gates=gates([0.5, 0.5], [0.5, 0.5], entropy=0.99)),
        "the gates mix all experts evenly: one larger expert may do as well",
    ),
    (
        Balance(gates=gates([0.5, 0.5], [0.5, 0.5]) + gates([1.0, 0.0], [0.7, 0.3], level=2)),
        "task click uses expert 0 of level 2 alone (1.00)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("balance", "line"), LINES, ids=[line for _, line in LINES])
def test_each_thing_has_its_sentence(balance, line):
    assert diagnose(balance)[0] == line


def auc(value, count=10000.0, rate=0.3):
    return {"auc": value, "count": count, "base_rate": rate}


NOTHING = "nothing stands out in the tasks' validation metrics"
METRICS = [
    ([{"like": auc(0.7)}], 1, "nothing stands out in the tasks' validation metrics"),
    ([{"like": auc(0.504)}], 1, "like is predicted no better than by chance (validation AUC 0.504)"),
    ([{"like": {"r2": -0.2, "count": 90.0}}], 1, "like is predicted no better than by its mean (validation R² −0.20)"),
    (
        [{"like": {"ne": 1.1, "count": 90.0}}],
        1,
        "like is predicted no better than by its base rates (validation NE 1.10)",
    ),
    (
        [{"click": auc(0.7), "like": auc(0.504), "buy": auc(0.48)}],
        1,
        "like and buy are predicted no better than by chance (validation AUC 0.480 to 0.504)",
    ),
    (
        [{"stars": {"r2": -0.2, "count": 90.0}, "age": {"r2": -0.2, "count": 90.0}}],
        1,
        "stars and age are predicted no better than by their means (validation R² −0.20)",
    ),
    (
        [{"like": auc(0.75)}, {"like": auc(0.7)}],
        2,
        "like was better in epoch 1 (AUC 0.750) than in the kept epoch 2 (0.700): it overfits since; "
        "training.task_patience stops such a task",
    ),
    (
        [{"like": {"ne": 0.9}}, {"like": {"ne": 0.8}}],
        1,
        "like was better in epoch 2 (NE 0.800) than in the kept epoch 1 (0.900): it still learns when the rest is done",
    ),
    ([{"like": auc(0.75, 100.0)}, {"like": auc(0.7, 100.0)}], 2, "nothing stands out in the tasks' validation metrics"),
    ([{"like": auc(0.705)}, {"like": auc(0.7)}], 2, "nothing stands out in the tasks' validation metrics"),
    ([{"like": {"auc": None, "count": 0.0}}], 1, "validation cannot judge like (no label)"),
    ([{"like": auc(None)}, {"like": auc(0.7)}], 2, "nothing stands out in the tasks' validation metrics"),
]


METRICS += [
    (
        [{"buy": auc(0.6) | {"ne": 1.07}}],
        1,
        "buy is predicted worse than by its base rate, however ranked (validation NE 1.07)"
        "; `calibration:` mends levels",
    ),
    (
        [{"buy": auc(0.6) | {"calibration": 1.88}, "like": auc(0.6) | {"calibration": 2.99}}],
        1,
        "buy and like are predicted 1.88 to 2.99 times as often as they came in validation"
        "; `calibration:` mends levels",
    ),
    ([{"buy": auc(0.6) | {"calibration": 0.5}}], 1,
     "buy is predicted 0.50 times as often as it came in validation; `calibration:` mends levels"),
    ([{"buy": auc(0.6, 90.0) | {"calibration": 1.5}}], 1, NOTHING),  # 27 events: chance
    ([{"buy": auc(0.6) | {"calibration": 1.1, "ne": 0.99}}], 1, NOTHING),
    (
        [{"next": {"ne": 0.958}}, {"next": {"ne": 0.962}}, {"next": {"ne": 0.963}}],
        3,
        "next has become worse in every epoch since epoch 1 (validation NE 0.958, now 0.963)",
    ),
    ([{"next": {"ne": 0.958}}, {"next": {"ne": 0.964}}, {"next": {"ne": 0.963}}], 3, NOTHING),
    ([{"next": {"ne": 0.958}}, {"next": {"ne": 0.963}}], 2, NOTHING),
]  # fmt: skip


RISING = [{"click": auc(v), "next": {"ne": 1.5 - v}, "noise": auc(0.52 - v / 100)} for v in (0.6, 0.64, 0.66, 0.67)]
METRICS += [
    (
        RISING, 4,
        "training ended while 2 tasks were still getting better (since epoch 2: click AUC +0.030, next NE −0.030)"
        ": more epochs may pay",
    ),
    (RISING[:3] + RISING[2:3], 4, NOTHING),  # not after every epoch
    ([{"click": auc(v)} for v in (0.6, 0.67, 0.671, 0.672)], 4, NOTHING),  # too little
    ([{"click": auc(v, 200.0)} for v in (0.6, 0.67, 0.68, 0.69)], 4, NOTHING),  # of so few rows, by chance
    (RISING[:1], 1, NOTHING),  # nothing to tell it from
]  # fmt: skip


@pytest.mark.parametrize(("epochs", "best", "line"), METRICS)
def test_validation_metrics_are_looked_at(epochs, best, line):
    assert diagnose(Balance(), epochs, best) == [line]


def test_levels_that_calibration_mends_after_training_are_no_finding():
    kept = [{"buy": auc(0.6) | {"calibration": 2.0, "ne": 1.2}}]
    assert diagnose(Balance(), kept, 1, calibrated=["buy"]) == [NOTHING]
    assert len(diagnose(Balance(), kept, 1)) == 2


def test_a_score_that_popularity_outranks_is_told():
    kept = [{"click": auc(0.6), "share": auc(0.6), "rare": auc(0.6, 90.0), "next": {"ne": 0.9}}]
    popular = {
        "click": {"metric": "gauc", "difference": -0.015, "fused_is": "worse"},
        "share": {"metric": "gauc", "difference": -0.02, "fused_is": "too close to call"},
        "rare": {"metric": "auc", "difference": -0.2, "fused_is": "too few events (3)"},
    }
    line = "click: popularity ranks better than the fused score (by 0.015 GAUC on validation)"
    assert diagnose(Balance(), kept, 1, popular=popular) == [line]
    assert diagnose(Balance(), kept, 1, popular={"share": popular["share"]}) == [NOTHING]


def test_the_most_important_comes_first_and_eight_lines_are_enough():
    balance = Balance(
        loss_weights=weights(clamped=0.3, click=1.0, report=9.0),
        gradients=[agreement(-0.2, 0.6, cut=str(cut), weights=(9.0, 1.0), degenerate=0.1) for cut in range(4)],
        gates=gates([0.99, 0.0, 0.01], [0.9, 0.05, 0.05]),
    )
    lines = diagnose(balance)
    assert len(lines) == MOST_LINES
    assert all("without a solution" in line for line in lines[:4])
    assert "held in their range" in lines[4]
    assert "pull apart" in lines[5]
    assert lines[-1] == "and 9 lesser things (metrics.json, balance)"


def test_many_weak_tasks_are_one_line_and_leave_room_for_the_rest():
    weak = {f"task{n}": {**auc(0.5), "count": 10_000.0} for n in range(12)}
    lines = diagnose(Balance(gradients=[agreement(-0.2, 0.6)]), [weak], 1)
    assert len(lines) == 2
    assert lines[0].startswith("task0, task1, task2")
    assert "pull apart" in lines[1]


def test_many_pairs_that_pull_apart_are_three_lines_and_a_list():
    names = ["a", "b", "c", "d"]
    cosine = [[1.0 if i == j else -0.1 * (i + j) for j in range(4)] for i in range(4)]
    share = [[0.0 if i == j else 0.5 for j in range(4)] for i in range(4)]
    seen = GradientAgreement("trunk", names, cosine, share, dict.fromkeys(names, 1.0), 100, 0.0, 0.0)
    lines = diagnose(Balance(gradients=[seen]))
    assert [line.split(" pull")[0] for line in lines[:2]] == ["c and d", "b and d"]
    assert len(lines) == 4
    assert lines[3].startswith("other tasks that pull apart: ")
    assert "a and b" in lines[3]


def test_a_task_of_few_events_is_not_called_unlearnt():
    few = {"report": {"auc": 0.385, "count": 2400.0, "base_rate": 0.004}}
    assert diagnose(Balance(), [few], 1) == ["validation cannot judge report (10 events)"]
    many = {"report": {"auc": 0.5, "count": 240000.0, "base_rate": 0.004}}
    assert diagnose(Balance(), [many], 1) == ["report is predicted no better than by chance (validation AUC 0.500)"]


def test_every_task_that_cannot_be_judged_is_named_and_is_in_no_other_finding():
    kept = {
        "late": {"auc": math.nan, "count": 6196.0, "base_rate": 0.0, "calibration": math.nan, "ne": math.nan},
        "always": {"auc": None, "count": 6196.0, "base_rate": 1.0},
        "flagged": {"auc": 0.99, "count": 6196.0, "base_rate": 15 / 6196, "ne": 1.3, "calibration": 4.0},
        "subscribed": {"auc": 0.4, "count": 6196.0, "base_rate": 20 / 6196},  # as many as a judgement takes
        "once": {"auc": 0.3, "count": 300.0, "base_rate": 299 / 300},
        "minutes": {"r2": None, "count": 900.0, "base_rate": 3.0},
        "next": {"ne": None, "count": 0.0},
        "stars": {"r2": -1.0, "count": 19.0},
    }
    assert diagnose(Balance(), [kept], 1) == [
        "subscribed is predicted no better than by chance (validation AUC 0.400)",
        "validation cannot judge late (no event), always (no row without it), flagged (15 events), "
        "once (1 row without it), minutes (one label throughout), next (no label) and stars (19 labels)",
    ]
    # What cannot be judged in the kept epoch is not said to have been better in another.
    assert "was better" not in " ".join(diagnose(Balance(), [kept | {"once": auc(0.9)}, kept], 2))


def test_what_is_in_doubt_comes_before_all_else():
    lines = diagnose(Balance(gradients=[agreement(-0.2, 0.6, degenerate=0.9)]), [], 0, doubts=["b", "a"])
    assert lines[:2] == ["b", "a"]
    assert len(lines) == 4


# ---------------------------------------------------------------- numbers


def by_hand(level):
    """Mean weights and entropies of the gates, row by row."""
    num_gates, num_experts = level.hidden.shape
    total, entropy, count = np.zeros((num_gates, num_experts)), np.zeros(num_gates), np.zeros(num_gates)
    for mix in level.mixes:
        for g, gate in enumerate(mix.gates):
            for row in mix.weights[g].detach().double().numpy():
                count[gate] += 1
                total[gate, mix.experts] += row
                positive = row[row > 0]
                sees = int((~level.hidden[gate]).sum())
                entropy[gate] -= (positive * np.log(positive)).sum() / np.log(sees)
    return total / count[:, None], entropy / count


def test_the_use_of_experts_is_that_of_a_loop_over_rows():
    torch.manual_seed(0)
    trunk = PLE(shared_experts=2, task_experts=1, expert_layers=[6], levels=2, gate_dropout=0.3)
    trunk.build(5, 3)
    trunk(torch.randn(7, 5) * 5, [0, 1, 2])
    trunk(torch.randn(4, 5), [1])  # a task that may see other inputs goes alone
    for level in trunk.levels:
        sums, (mean, entropy) = gate_sums(level), by_hand(level)
        seen = ~level.hidden
        torch.testing.assert_close((sums.weights / sums.rows[:, None])[seen], torch.tensor(mean)[seen])
        assert torch.isnan(sums.weights[~seen]).all()
        torch.testing.assert_close(sums.entropy / sums.rows, torch.tensor(entropy), rtol=1e-5, atol=1e-6)
        assert ((sums.entropy / sums.rows) <= 1 + 1e-6).all()
        torch.testing.assert_close(torch.nansum(sums.weights, 1), sums.rows, rtol=1e-5, atol=1e-5)


def test_a_level_without_a_choice_has_no_use_to_tell():
    trunk = SharedBottom([4])
    trunk.build(3, 2)
    trunk(torch.randn(2, 3), [0, 1])
    assert gate_sums(trunk.levels[0]) is None


def test_an_expert_that_a_gate_never_takes_is_found():
    trunk = MMoE(3, [4])
    trunk.build(3, 2)
    trunk.levels[0].gate_weight.data.zero_()
    trunk.levels[0].gate_weight.data[:, 1] = -100.0
    trunk(torch.rand(50, 3) + 0.1, [0, 1])
    sums = gate_sums(trunk.levels[0])
    use = [GateUse(1, t, (sums.weights[g] / 50).tolist(), float(sums.entropy[g]) / 50) for g, t in enumerate("ab")]
    assert diagnose(Balance(gates=use))[0] == "expert 1 is unused: no gate gives it more than 0.00"


def some_statistics():
    part = SimpleNamespace(
        name="trunk",
        cosine=[[1.0, -0.5, 0.1], [-0.5, 1.0, math.nan], [0.1, math.nan, 1.0]],
        conflicts=[[0.0, 0.6, 0.1], [0.6, 0.0, math.nan], [0.1, math.nan, 0.0]],
        weights=[1.0, 2.0, math.nan],
        clamped=10,
        degenerate=0,
    )
    return SimpleNamespace(tasks=("click", "rare", "seconds"), steps=50, parts=(part,))


def read_a_step():
    """Two readings of training with gates, a loss weighting and something that speaks of gradients."""
    with ranks("cpu") as where:
        plain = train_module(trunk="ple")
        module = MTCLTrain(plain.model, loss_weighting=DWA(3, window=1), gradient_surgery=GradientSurgery("measure"))
        module.surgery.statistics = some_statistics
        model, optimizer = parallelise(module, where, optimizers("sgd"), seed=3)
        pipe = build_pipeline(model, optimizer, where.device)
        model.train()
        of_rank = {"rank": where.rank, "world_size": where.world_size}
        batches = iterate(rows(), global_batches(90, 8 // where.world_size, **of_rank))
        balance, hands, told = Balance(), [], []
        for step in range(3):
            loss, *_ = pipe.progress(batches)
            told.append(read_step(train_module_of(model), loss, where, balance, overdue=where.first and step == 1))
            hands.append([by_hand(level) for level in module.model.tower.expert_levels()])
        pipe.detach()
        del pipe, model, optimizer
        return balance, hands, told


def test_readings_are_those_of_the_global_batch_on_every_rank():
    ((one, hands, told),) = run_ranks(read_a_step, 1)
    two = run_ranks(read_a_step, 2)
    assert one.readings == 3
    for level in (1, 2):
        of_level = [use for use in one.gates if use.level == level]
        # click, rare, seconds and, but for the last level, what they share.
        assert [use.gate for use in of_level] == ["click", "rare", "seconds", "shared"][: len(of_level)]
        assert len(of_level) == 5 - level
        mean = np.mean([hand[level - 1][0] for hand in hands], 0)
        entropy = np.mean([hand[level - 1][1] for hand in hands], 0)
        for use, expected, e in zip(of_level, mean, entropy, strict=True):
            assert [0.0 if w is None else w for w in use.weights] == pytest.approx(expected.tolist(), abs=1e-6)
            assert use.entropy == pytest.approx(e, abs=1e-6)
    assert [use.weights[0] is None for use in one.gates if use.gate == "rare"] == [True, True]
    (seen,) = one.gradients
    assert (seen.cosine[1], seen.conflicting[1]) == ([-0.5, 1.0, None], [0.6, 0.0, None])
    assert (seen.steps, seen.clamped, seen.degenerate) == (50, 0.2, 0.0)
    assert one.scalars()["cosine_trunk/click-rare"] == -0.5
    assert "cosine_trunk/rare-seconds" not in one.scalars()
    assert seen.weights == {"click": 1.0, "rare": 2.0, "seconds": None}
    assert one.loss_weights.method == "DWA"
    assert two[0][0] == two[1][0]
    for balance, _, told_there in two:
        assert balance.scalars() == pytest.approx(one.scalars(), abs=1e-4)
        for (losses, overdue), (expected, expected_overdue) in zip(told_there, told, strict=True):
            assert losses == pytest.approx(expected, abs=1e-4)
            assert overdue == expected_overdue
    assert [overdue for _, overdue in told] == [False, True, False]
    history = TrainingHistory(balance=one)
    assert TrainingHistory.from_json(json.loads(json.dumps(history.to_json()))) == history


def test_an_expert_that_is_added_beside_its_gate_is_not_idle():
    uses = gates([0.0, 0.5, 0.5], [0.0, 0.6, 0.4])
    assert diagnose(Balance(gates=uses))[0].startswith("expert 0 is unused")
    uses[1].native = [0]
    assert "unused" not in diagnose(Balance(gates=uses))[0]


def test_gates_that_are_not_the_tasks_have_names_of_their_own():
    trunk = MMoE(2, [4])
    trunk.build(3, 2)
    assert _gate_names(trunk.levels[0], ["a", "b"]) == ["a", "b"]
    assert _gate_names(trunk.levels[0], ["a"]) == ["a", "shared"]
    assert _gate_names(trunk.levels[0], ["a", "b", "c"]) == ["gate 0", "gate 1"]
    trunk.levels[0].gate_names = ["buyers", "viewers"]
    assert _gate_names(trunk.levels[0], ["a", "b"]) == ["buyers", "viewers"]


def test_a_reading_in_a_skipped_batch_keeps_what_is_known():
    balance = Balance(readings=20, gates=gates([0.5, 0.5]))
    balance._meet([])
    assert balance.gates[0].weights == [0.5, 0.5]
    balance._meet(gates([1.0, 0.0]))
    assert balance.gates[0].weights == pytest.approx([0.55, 0.45])
    balance._meet(gates([0.2, 0.3, 0.5]))  # another model
    assert balance.gates[0].weights == [0.2, 0.3, 0.5]


def test_a_run_says_it_writes_it_and_shows_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shop.log(400).to_parquet(tmp_path / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("epochs: 4", "epochs: 1, log_every: 4"), folder=tmp_path)
    run.balance.weighting = LossWeightingConfig(kind="geometric_mean")
    said = io.StringIO()
    result = train_run(run, tmp_path / "run", device="cpu", console=Console(file=said, width=200))
    assert "diagnosis:\n  - " + result.diagnosis[0] in said.getvalue()
    stored = json.loads((tmp_path / "run/metrics.json").read_text())
    assert stored["diagnosis"] == result.diagnosis
    assert "balance" not in stored["history"]
    assert stored["balance"]["loss_weights"]["method"] == "the geometric mean"
    assert [use["gate"] for use in stored["balance"]["gates"]] == ["click", "buy", "taste", "stars"]
    steps = result.history.best_step
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    expected = {*range(4, steps + 1, 4), steps}
    for tag in ("loss/click", "loss_weight/taste", "gate/level1/buy/expert2", "gate_entropy/level1/stars"):
        assert {e.step for e in events.Scalars(tag)} == expected, tag
    last = events.Scalars("gate/level1/buy/expert2")[-1].value
    assert last == pytest.approx(stored["balance"]["gates"][1]["weights"][2], abs=1e-6)


def test_a_metric_that_is_not_defined_is_no_finding():
    undefined, fine = {"a": {"auc": math.nan}}, {"a": {"auc": 0.7, "count": 50.0, "base_rate": 0.5}}
    for epochs in ([undefined], [undefined, fine], [fine, undefined]):
        assert diagnose(Balance(), epochs, len(epochs)) == ["nothing stands out in the tasks' validation metrics"]
