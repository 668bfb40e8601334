"""How much of what is knowable in a synthetic world a run knows."""

import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from rich.console import Console
from scipy.stats import t as student
from sklearn.metrics import log_loss, roc_auc_score
from test_benchmarks import script
from test_synthetic import logit
from test_world_dials import HARD

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.world_windows import world_of
from mtcl_torchrec.data.worlds import ready_world, world_run
from mtcl_torchrec.evaluation.knowable import expected_auc, knowable, knowable_score, print_knowable
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable, predictions_table
from mtcl_torchrec.evaluation.ranking import value_at_k
from mtcl_torchrec.schema import Schema, Task
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.oracle import knowable_of, true_predictions, true_worth
from mtcl_torchrec.training.run import train_run

# ---------------------------------------------------------------- what is knowable


def over_all_labels(true, statistic):
    """Σ over every way that the labels might come out of its probability times a statistic of them."""
    total = 0.0
    for labels in itertools.product((0, 1), repeat=len(true)):
        y = np.array(labels)
        total = total + np.prod(np.where(y, true, 1 - true)) * statistic(y)
    return total


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=2, max_size=7))
def test_the_expected_auc_is_that_over_all_labels(rows):
    true, scores = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])

    def pairs(y):
        up, down = scores[y == 1], scores[y == 0]
        right = (up[:, None] > down).sum() + 0.5 * (up[:, None] == down).sum()
        return np.array([right, len(up) * len(down)], float)

    right, possible = over_all_labels(true, pairs)
    found = expected_auc(true, scores)
    if possible > 1e-6:
        assert found == pytest.approx(right / possible, abs=1e-6)
        assert found <= expected_auc(true, true) + 1e-9


def test_the_expected_auc_is_the_mean_of_that_of_drawn_labels():
    draw = np.random.default_rng(0)
    true = draw.beta(1, 3, 4_000)
    scores = true + draw.normal(0, 0.2, 4_000)
    drawn = [roc_auc_score(draw.random(4_000) < true, scores) for _ in range(60)]
    assert abs(np.mean(drawn) - expected_auc(true, scores)) < 4.5 * np.std(drawn) / math.sqrt(60)


def test_shares_are_those_of_expected_metrics():
    draw = np.random.default_rng(1)
    true, predicted = draw.random(6), draw.random(6)
    y = np.array([0, 1, 1, 0, 1, 0.0])
    found = knowable(Task.binary("click"), y, predicted, true)
    loss = over_all_labels(true, lambda y: np.array([log_loss(y, p, labels=[0, 1]) for p in (predicted, true)]))
    base = -(true.mean() * math.log(true.mean()) + (1 - true.mean()) * math.log(1 - true.mean()))
    assert found["regret"] == pytest.approx(loss[0] - loss[1])
    assert found["nats"] == pytest.approx(base - loss[0])
    assert found["oracle_nats"] == pytest.approx(base - loss[1])
    assert found["share"] == pytest.approx((found["auc"] - 0.5) / (expected_auc(true, true) - 0.5))
    assert found["auc_of_labels"] == pytest.approx(roc_auc_score(y, predicted))
    assert found["oracle_auc_of_labels"] == pytest.approx(roc_auc_score(y, true))
    # A binary task and the same as two classes know the same.
    both = knowable(Task.multiclass("c", 2), y, np.stack([1 - predicted, predicted], 1), np.stack([1 - true, true], 1))
    assert both["nats"] == pytest.approx(found["nats"])
    assert both["share"] == pytest.approx(found["nats"] / found["oracle_nats"])
    missing = knowable(Task.binary("click"), np.r_[y, np.nan], np.r_[predicted, 0.9], np.r_[true, 0.1])
    assert missing == found


def test_edges_of_what_is_knowable():
    y, p = np.array([0.0, 1, 1, 0]), np.array([0.2, 0.4, 0.9, 0.1])
    of_constant = knowable(Task.binary("click"), y, p, np.full(4, 0.3))
    assert math.isnan(of_constant["share"])
    assert knowable(Task.binary("click"), y * np.nan, p, p) == {"count": 0.0}
    assert knowable(Task.binary("click"), y, p, p)["regret"] == pytest.approx(0, abs=1e-12)
    assert knowable(Task.binary("click"), y, 1 - p, p)["share"] == pytest.approx(-1)
    value = Task.regression("minutes")
    assert knowable(value, y, p, p)["share"] == 1
    assert knowable(value, y, np.full(4, p.mean()), p)["share"] == pytest.approx(0)
    off = knowable(value, y, p + 0.1, p)
    assert (off["regret"], off["share"]) == (pytest.approx(0.01), pytest.approx(1 - 0.01 / p.var()))


def test_the_score_is_judged_by_what_its_lists_bring():
    draw = np.random.default_rng(2)
    request = np.r_[np.repeat([0.0, 1, 2], 8), np.nan, np.nan, 3, 3]
    true, score, worth = draw.random(28), draw.random(28), draw.random(28)
    found = knowable_score(request, score, true, users=np.where(request == 1, 0, request), worth=worth)
    lists = {k: [[], [], [], []] for k in (1, 5)}
    for r in (0, 1, 2, 3):
        w, s, t = worth[request == r], score[request == r], true[request == r]
        for k in (1, 5):
            if len(w) > k:
                best = (*(w[np.argsort(-by)[:k]].sum() for by in (s, w, t)), k * w.mean())
                for values, value in zip(lists[k], best, strict=True):
                    values.append(value)
    for k, of in lists.items():
        mine, best, rule, random = map(np.array, of)
        assert found[f"requests@{k}"] == len(mine)
        assert found[f"regret@{k}"] == pytest.approx((best - mine).mean())
        assert found[f"share@{k}"] == pytest.approx((mine - random).mean() / (best - random).mean())
        assert found[f"rule_share@{k}"] == pytest.approx((rule - random).mean() / (best - random).mean())
    assert found["requests@10"] == 0
    assert "regret@10" not in found
    mean = [np.mean([(true[np.argsort(-s)][:k] - true.mean()).sum() for k in range(1, 29)]) for s in (score, true)]
    assert found["share"] == pytest.approx(mean[0] / mean[1])
    assert set(knowable_score(request, score, true)) == {"share", "requests@1", "requests@5", "requests@10"}
    perfect = knowable_score(request, 5 * true - 1, true, worth=2 * true)
    assert (perfect["share"], perfect["share@1"], perfect["regret@5"]) == (1, 1, 0)
    assert knowable_score(request, np.zeros(28), true, worth=true)["share@5"] == pytest.approx(0)


def drawn_rewards(world, oracle, values, draw):
    """(N,) what happens to rows once, by probabilities given the event before."""
    happened, reward = {}, np.zeros(len(next(iter(oracle.values()))))
    for outcome in world.outcomes:
        if outcome.kind == "event":
            happened[outcome.name] = draw.random(len(reward)) < oracle[outcome.name]
            if outcome.after:
                happened[outcome.name] &= happened[outcome.after]
            reward += values.get(outcome.name, 0.0) * happened[outcome.name]
        elif outcome.name in values:
            reward += values[outcome.name] * oracle[outcome.name] * happened.get(outcome.after, 1.0)
    return reward


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("shop", {"click": 1, "cart": 2, "buy": 4}),
        ("courses", {"enrol": 1, "rating": 0.5}),
        ("social", {"hide": -20, "like": 1}),
    ],
)
def test_the_oracles_value_at_k_is_the_mean_of_the_labels_that_might_be_drawn(name, values):
    world, draw = ready_world(name, num_users=60, num_items=90, horizon=1_500), np.random.default_rng(4)
    frame = world.rows(np.arange(1_500))
    tasks = tuple(
        task.model_copy(update={"num_classes": 17}) if task.kind == "multiclass" else task
        for task in world.schema().tasks
    )
    labels = {f"label.{task.name}": frame[task.name].to_numpy(float) for task in tasks}
    table = PredictionsTable(pd.DataFrame({"user": frame["user_id"], **labels}), tasks, values=values)
    worth = true_worth(world, table, frame)
    request, oracle = table.requests.astype(int), world.oracle(np.arange(1_500))
    score = draw.random(1_500) + oracle[next(iter(values))]
    found = knowable_score(table.requests, score, score, worth=worth)
    more = np.bincount(request) > 5
    rewards = [drawn_rewards(world, oracle, values, draw) for _ in range(300)]
    for what, by in (("value@5", score), ("oracle@5", worth), ("random@5", np.zeros(1_500))):
        brought = [value_at_k(request, by, reward, 5)[more].mean() for reward in rewards]
        assert found[what] == pytest.approx(np.mean(brought), abs=4 * np.std(brought) / np.sqrt(300))
    best = value_at_k(request, worth, worth, 5)
    assert all(
        (best >= value_at_k(request, other, worth, 5) - 1e-9).all()
        for other in (score, *oracle.values())
        if other.ndim == 1
    )
    # What no world draws is worth nobody knows what.
    renamed = replace(table, tasks=tuple(t.model_copy(update={"label": "time"}) for t in tasks))
    assert true_worth(world, renamed, frame) is None
    assert true_worth(world, replace(table, values={}), frame) is None


def test_the_error_of_a_share_is_the_spread_of_shares():
    draw = np.random.default_rng(3)

    def one():
        request = np.repeat(np.arange(300.0), 6)
        true = draw.random(1_800)
        return knowable_score(request, true + draw.normal(0, 0.3, 1_800), true, worth=true)

    found = [one() for _ in range(80)]
    for k in (1, 5):
        spread = np.std([f[f"share@{k}"] for f in found])
        half = student(299).ppf(0.975) * spread  # 300 requests, each of more than k rows
        assert np.mean([f[f"share@{k} half"] for f in found]) == pytest.approx(half, rel=0.3)


# ---------------------------------------------------------------- runs

DIALS = {"num_users": 40, "num_items": 50, "seed": 2, "signal": 2.5, "rates": {"click": 0.5}}


def run_of(name="shop", *, hard=True, tasks=None, **dials):
    dials = DIALS | (HARD | {"delay": 0.3} if hard else {}) | dials
    raw = yaml.safe_load(world_run(name, rows=4_000, val_rows=600, test_rows=600, factors=False, **dials))
    raw["model"] = {"trunk": {"kind": "shared_bottom", "expert_layers": [16]}, "tower_layers": [8]}
    raw["optimizers"] = {"tables": {"lr": 0.1}, "dense": {"lr": 0.01}}
    raw["training"] = {"epochs": 1, "batch_size": 100, "warmup_steps": 5}
    for task in raw["schema"]["tasks"]:
        task.update((tasks or {}).get(task["name"], {}))
        if "after" in task:
            del task["mask"]
    return parse_run(yaml.safe_dump(raw))


def trained(folder):
    return train_run(run_of(), folder, device="cpu", console=Console(file=io.StringIO())).evaluations


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knowable") / "run"
    return folder, run_ranks(trained, 2, folder)


def test_two_ranks_train_on_the_dials_and_know_their_share(two_ranks):
    folder, (one, other) = two_ranks
    assert one["test"].knowable == other["test"].knowable
    written = json.loads((folder / "metrics.json").read_text())
    known = written["evaluations"]["test"]["knowable"]
    assert set(known) == {"click", "cart", "buy", "next_category", "return", "score"}
    assert all(0 < known[task]["share"] < 1 for task in ("click", "return"))
    assert known["score"]["requests@5"] > 20
    assert known["score"]["regret@5"] > 0
    # The same from the predictions that were kept, and the index of the rows.
    kept = pd.read_parquet(folder / "predictions" / "test.parquet")
    world = world_of(run_of().data.synthetic)
    truth = world.oracle(np.arange(4_600, 5_200))
    direct = expected_auc(truth["click"], kept["p.click"].to_numpy()) - 0.5
    assert known["click"]["share"] == pytest.approx(direct / (expected_auc(truth["click"], truth["click"]) - 0.5))
    weights = {"click": 1.0, "cart": 2.0, "buy": 4.0}
    own = truth["next_category"][np.arange(600), world.rows(np.arange(4_600, 5_200))["category"]]
    true = (sum(w * truth[t] for t, w in weights.items()) + 0.5 * own) / 7.5
    joint = world.oracle(np.arange(4_600, 5_200), joint=True)
    worth = sum(w * joint[t] for t, w in weights.items())
    users = kept["user"].to_numpy(float)
    expected = knowable_score(users, kept["score"].to_numpy(), true, users, worth=worth)
    assert known["score"] == pytest.approx(expected, abs=1e-5)


def test_other_rows_of_the_world_are_judged_too_and_strangers_are_not(two_ranks):
    folder, _ = two_ranks
    run = FinishedRun.load(folder)
    world = world_of(run.config.data.synthetic)

    def judged(frame):
        raw = run.preprocessor.conform(Rows(frame))
        rows = run.preprocessor.encode(raw)
        oracle = {n: p.astype("float32") for n, p in true_predictions(world, run.config.data_schema, run.model.tasks,
                                                                      world.rows(index)).items()}  # fmt: skip
        table = predictions_table(run.model.tasks, oracle, rows.labels.numpy(), keys={})
        return knowable_of(run.config, run.model, raw, rows, table)

    index = np.arange(9_000, 9_500)
    found = judged(world.rows(index))
    assert [known["share"] for known in found.values()] == pytest.approx([1.0] * 5, abs=1e-4)
    assert judged(ready_world("shop", **DIALS | HARD | {"seed": 3}).rows(index)) == {}
    shown, a = Console(file=io.StringIO(), width=100), np.arange(20.0)
    print_knowable(found | {"score": knowable_score(*[np.zeros(20), a, a], worth=a)}, shown)
    text = shown.file.getvalue()
    assert "100.0 % ± 0.0" in text or "100.0 % ± nan" in text
    assert all(task in text for task in ("click", "next_category", "value@10"))


def test_the_truth_is_that_of_what_each_task_predicts():
    after = {"cart": {"after": "click"}, "buy": {"after": "cart"}}
    run = run_of(hard=False, tasks=after)
    world, index = world_of(run.data.synthetic), np.arange(500)
    frame, schema = world.rows(index), run.data_schema
    tasks = tuple(t.model_copy(update={"num_classes": 17}) if t.kind == "multiclass" else t for t in schema.tasks)
    true = true_predictions(world, schema, tasks, frame)
    joint, given = world.oracle(index, joint=True), world.oracle(index)
    np.testing.assert_allclose(true["buy"], joint["buy"])
    np.testing.assert_array_equal(true["buy|cart"], given["buy"])
    np.testing.assert_array_equal(true["next_category"], given["next_category"])
    # A label the world does not draw, a parent it has not, classes in another order: nothing is claimed.
    strange = (Task.binary("click"), Task.binary("buy", after="click"), Task.binary("loved"))
    assert list(true_predictions(world, Schema(features=schema.features, tasks=strange), strange, frame)) == ["click"]
    other = Task(name="next_category", kind="multiclass", num_classes=17, item_class="category")
    features = tuple(
        f.model_copy(update={"encoding": "vocabulary"}) if f.name == "category" else f for f in schema.features
    )
    assert not true_predictions(world, Schema(features=features, tasks=(other,)), (other,), frame)


# ---------------------------------------------------------------- benchmarks


@pytest.mark.full
def test_the_observer_of_the_limits_knows_more_from_more_rows():
    limits = script("knowable_limits").limits
    world = ready_world("shop", num_users=300, num_items=200, horizon=30_000)
    few, many = (limits(world, rows, np.arange(25_000, 30_000), 250) for rows in (1_000, 20_000))
    for task in ("click", "return"):
        assert 0.3 < few[task]["both"] <= min(few[task]["user"], few[task]["item"]) + 0.02
        assert few[task]["user"] + 0.05 < many[task]["user"] <= 1 + 1e-9
    assert few["return"]["item"] == pytest.approx(1)


def test_the_observers_logits_are_linear_in_what_is_not_known():
    """True unknowns times their slopes, on top of the rest, are the true logits: for either side."""
    bench = script("knowable_limits")
    world = ready_world("courses", num_users=50, num_items=60)
    rows = bench.read(world, np.arange(200))
    p = world.oracle(np.arange(200))["enrol"]
    np.testing.assert_allclose(rows.z[0], logit(p), rtol=1e-4, atol=1e-5)
    for name, ids in (("user", rows.draw.user), ("item", rows.draw.item)):
        side = bench.side_of(world, name, ids)
        x = bench.slopes(world, rows.draw, name)
        off = side.true * 0
        off[:, 3] = 0.25
        vectors = [v.copy() for v in (rows.draw.users if name == "user" else rows.draw.items)]
        vectors[3] = vectors[3] + np.float32(0.25 * bench.HALF)
        moved = rows.draw._replace(**{"users" if name == "user" else "items": vectors})
        moved_z = np.stack(bench.rules.logits_of(world, moved)) - np.stack(bench.rules.logits_of(world, rows.draw))
        events = [t for t, o in enumerate(bench.scored(world)) if o.kind == "event"]
        np.testing.assert_allclose((x * off).sum(2)[events], moved_z[events], atol=1e-5)


def test_the_benchmark_trains_and_shows(tmp_path, capsys):
    benchmark = script("knowable")
    out = tmp_path / "k.jsonl"
    small = ["--rows", "600", "--held-out", "300", "--users", "30", "--items", "30", "--dial", "position_bias=1"]
    sets = [
        "--set",
        "training={epochs: 1, batch_size: 100}",
        "--set",
        "model.trunk={kind: shared_bottom}",
        "--dim",
        "8",
    ]
    benchmark.main([*small, *sets, "--device", "cpu", "--out", str(out)])
    line = json.loads(out.read_text())
    assert set(line["share"]) == {"click", "cart", "cart|click", "buy", "buy|cart", "next_category", "return", "score"}
    capsys.readouterr()
    benchmark.main(["--show", str(out)])
    assert "1: shop, 600 rows, 30 × 30 position_bias=1 dim=8" in capsys.readouterr().out
