"""The dials of synthetic worlds that make logs hard, and how much of what is knowable a run knows."""

import io
import itertools
import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from rich.console import Console
from sklearn.metrics import log_loss, roc_auc_score
from test_benchmarks import script
from test_synthetic import LIVELY, logit

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.outcomes import Outcome
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.synthetic import MAX_ROWS, World
from mtcl_torchrec.data.synthetic_files import write_items, write_parquet
from mtcl_torchrec.data.synthetic_truth import TITLE_WORDS, TOPIC_WORDS, TOPICS, draw_rows
from mtcl_torchrec.data.titles import vocabulary
from mtcl_torchrec.data.world_windows import world_of, world_split
from mtcl_torchrec.data.worlds import ready_world, world_run
from mtcl_torchrec.evaluation.knowable import expected_auc, knowable, knowable_score, print_knowable
from mtcl_torchrec.schema import ConfigError, DataError, Schema, Task
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.oracle import knowable_of, true_predictions
from mtcl_torchrec.training.run import train_run

N = 100_000
HARD = {"text": 0.6, "position_bias": 0.8, "positions": 7, "delay": 3.0}
WORLDS = {name: ready_world(name, **LIVELY, **HARD) for name in ("shop", "video")}


# ---------------------------------------------------------------- rows with the dials on


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(list(WORLDS)),
    st.lists(st.integers(0, 60_000) | st.integers(0, MAX_ROWS - 1), min_size=1, max_size=40),
    st.integers(1, 40),
    st.integers(0, 2),
    st.randoms(),
)
def test_order_and_chunks_change_no_row_with_the_dials_on(name, indices, size, rank, random):
    world, index = WORLDS[name], np.array(indices)
    as_of = world.time_of(int(index.max()) + random.choice([0, 100, 10**6]))
    whole, truth = world.rows(index, as_of=as_of), world.oracle(index, joint=True)
    parts = [world.rows(index[i : i + size], as_of=as_of) for i in range(0, len(index), size)]
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole, check_exact=True)
    mine = index[rank::3]  # as one of three ranks would cut them
    pd.testing.assert_frame_equal(world.rows(mine, as_of=as_of), whole[rank::3].reset_index(drop=True))
    order = np.array(random.sample(range(len(index)), len(index)))
    for task, p in world.oracle(index[order], joint=True).items():
        np.testing.assert_array_equal(p, truth[task][order])


@pytest.mark.parametrize("name", WORLDS)
def test_the_truth_follows_from_what_stands_in_a_row(name):
    world, index = WORLDS[name], np.arange(40_000, 41_000)
    frame = world.rows(index)
    for joint, position in ((False, None), (True, None), (False, 3)):
        of_rows = world.oracle_of(frame[list(world.oracle_columns)], joint=joint, position=position)
        for task, p in world.oracle(index, joint=joint, position=position).items():
            np.testing.assert_array_equal(of_rows[task], p)
    assert world.is_of(frame)
    assert not ready_world(name, seed=1, **LIVELY, **HARD).is_of(frame)
    assert not world.is_of(frame.drop(columns="place"))
    assert not world.is_of(frame.assign(hour=99))


def test_each_dial_leaves_the_rest_of_the_rows_alone():
    plain = ready_world("shop", **LIVELY).rows(np.arange(5_000))
    seen = ready_world("shop", **LIVELY, position_bias=1.0).rows(np.arange(5_000))
    late = ready_world("shop", **LIVELY, delay=1.0).rows(np.arange(5_000))
    untold = ready_world("shop", **LIVELY, text=0.5).rows(np.arange(5_000))
    pd.testing.assert_frame_equal(late[list(plain)], plain)
    labels = ["click", "cart", "buy"]
    pd.testing.assert_frame_equal(seen[list(plain)].drop(columns=labels), plain.drop(columns=labels))
    known = seen["click"].notna()
    assert (seen["click"][known] <= plain["click"][known]).all()  # what is not looked at is not clicked on
    others = ["user_id", "product_id", "category", "price", "hour", "time"]
    pd.testing.assert_frame_equal(untold[others], plain[others])


def test_titles_explain_their_share_of_a_vector():
    """Words to topics, counts of topics to vectors: a least-squares reader explains exactly the dial's share."""
    known = vocabulary(TOPICS, TOPIC_WORDS)
    topic_of = {word: topic for topic, words in enumerate(known) for word in words}
    for share in (0.3, 1.0):
        world = ready_world("shop", text=share, num_items=4_000)
        items = world.items(np.arange(1, 4_001))
        words = items["title"].str.split(" ")
        assert set(words.map(len)) == {TITLE_WORDS}
        counts = np.zeros((len(items), TOPICS))
        for row, title in enumerate(words):
            for word in title:
                if topic_of[word] < TOPICS:
                    counts[row, topic_of[word]] += 1
        rows = np.arange(30_000)
        draw = draw_rows(world, rows, rows)
        _, first = np.unique(draw.item, return_index=True)
        vectors = np.stack(draw.items, 1)[first].astype(float)
        counts = counts[draw.item[first] - 1]
        assert vectors.var(0).mean() == pytest.approx(1, abs=0.12)
        weights = np.linalg.lstsq(counts, vectors, rcond=None)[0]
        explained = 1 - ((vectors - counts @ weights) ** 2).sum() / (vectors**2).sum()
        assert explained == pytest.approx(share, abs=1e-5 if share == 1 else 0.07)
    shown = world.rows(np.arange(200))
    both = shown.merge(items[["product_id", "title"]], on="product_id")
    assert (both["title_x"] == both["title_y"]).all()
    with pytest.raises(DataError, match="items are numbered from 1 to 4,000"):
        world.items(np.array([0]))


def test_positions_follow_the_position_based_model():
    world = ready_world("shop", position_bias=1.3, positions=4)
    rows, truth = world.rows(np.arange(N)), world.oracle(np.arange(N))
    first = world.oracle(np.arange(N), position=1)
    place = rows["position"].to_numpy()
    assert np.bincount(place)[1:].tolist() == pytest.approx([N / 4] * 4, rel=0.03)
    np.testing.assert_allclose(truth["click"], first["click"] * place**-1.3, rtol=1e-6)
    np.testing.assert_array_equal(first["click"], ready_world("shop").oracle(np.arange(N))["click"])
    for task in ("cart", "buy", "return"):
        np.testing.assert_array_equal(truth[task], first[task])
    joint = world.oracle(np.arange(N), joint=True)
    np.testing.assert_allclose(joint["cart"], truth["click"] * truth["cart"], rtol=1e-12)
    for k in (1, 2, 3, 4):
        at = place == k
        error = rows["click"][at] - truth["click"][at]
        assert abs(error.mean()) < 4.5 * error.std() / math.sqrt(at.sum())
    with pytest.raises(DataError, match="positions 1 to 4"):
        world.oracle(np.arange(3), position=5)
    feature = next(f for f in world.schema().features if f.name == "position")
    assert (feature.group, feature.vocabulary_size) == (("context",), 5)


def test_nothing_happens_to_what_is_not_looked_at():
    stars, amount = Outcome(name="stars", kind="stars", mean=3), Outcome(name="minutes", kind="amount", mean=2)
    world = World(outcomes=(Outcome(name="like"), stars, amount), position_bias=5.0, positions=2)
    rows = world.rows(np.arange(20_000))
    truth, looked = world.oracle(np.arange(20_000)), rows["stars"].notna()
    assert looked[rows["position"] == 1].all()
    assert looked[rows["position"] == 2].mean() == pytest.approx(2**-5, abs=0.01)
    assert (rows.loc[~looked, ["like", "minutes"]] == 0).all(axis=None)
    assert (rows.loc[looked, "minutes"] > 0).all()
    second = rows["position"] == 2
    assert rows.loc[second, "minutes"].mean() == pytest.approx(truth["minutes"][second].mean(), rel=0.2)


def test_events_arrive_after_exponential_delays_along_the_chain():
    world = ready_world("shop", delay=2.0, horizon=N, days=20)
    plain, rows = ready_world("shop", horizon=N, days=20).rows(np.arange(N)), world.rows(np.arange(N))
    day = 86_400
    for name, mean in (("click", 0.02), ("cart", 0.02 + 0.2), ("buy", 0.02 + 0.2 + 2), ("return", 2)):
        np.testing.assert_array_equal(rows[name], plain[name])
        delay = rows[f"{name}_delay"]
        np.testing.assert_array_equal(delay.notna(), rows[name] == 1)
        found = delay.dropna() / day
        assert abs(found.mean() - mean) < 4.5 * found.std() / math.sqrt(len(found))
    bought = rows[rows["buy"] == 1]
    assert (bought["click_delay"] <= bought["cart_delay"]).all()
    assert (bought["cart_delay"] <= bought["buy_delay"]).all()
    # The log as of a moment: the share that has arrived is the closed form's, whatever the row's age.
    until = world.rows_by(world.moment(10))
    assert (until, world.rows_by(world.moment(0))) == (N // 2 + 1, 1)
    then = world.rows(np.arange(until), as_of=world.moment(10))
    came = rows[:until]["return"] == 1
    age = (world.moment(10) - then["time"][came]) / day
    arrived, expected = then["return"][came], 1 - np.exp(-age / 2)
    assert abs((arrived - expected).mean()) < 4.5 * math.sqrt((expected * (1 - expected)).sum()) / came.sum()
    assert (then["return"] <= rows[:until]["return"]).all()
    assert then["buy"][then["cart"] != 1].isna().all()
    late = then["return_delay"].isna() & came
    assert late.any()
    assert ((then["time"] + rows[:until]["return_delay"])[late] > world.moment(10)).all()
    with pytest.raises(DataError, match="row 50,001 comes after the moment"):
        world.rows(np.arange(until + 1), as_of=world.moment(10))


def test_a_run_learns_from_the_log_as_it_was_when_val_ended():
    dials = {"delay": 5, "num_users": 50, "num_items": 50}
    raw = yaml.safe_load(world_run("health", rows=3_000, val_rows=500, test_rows=500, **dials))
    config = parse_run(yaml.safe_dump(raw)).data.synthetic
    world = world_of(config)
    val, test = world_split(config, "val").frame, world_split(config, "test").frame
    as_of = world.time_of(3_499)
    pd.testing.assert_frame_equal(val, world.rows(np.arange(3_000, 3_500), as_of=as_of))
    pd.testing.assert_frame_equal(test, world.rows(np.arange(3_500, 4_000)))
    assert val["return"].mean() < 0.6 * test["return"].mean()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positions": 5}, "positions belong to a position_bias above 0"),
        ({"text": 1.2}, "text: .*less than or equal to 1"),
        ({"delay": -1}, "delay: .*greater than or equal to 0"),
        ({"text": 0.5, "item": "title"}, "column 'title' is declared twice"),
        ({"position_bia": 1}, "no dial 'position_bia' \\(did you mean 'position_bias'"),
    ],
)
def test_dials_that_are_wrong_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ready_world("shop", **wrong)


def test_files_hold_rows_as_of_a_moment_and_items(tmp_path):
    world = WORLDS["shop"]
    as_of = world.time_of(400)
    write_parquet(world, tmp_path / "a.parquet", 400, as_of=as_of, row_group_size=150)
    read = pq.read_table(tmp_path / "a.parquet").to_pandas()
    read["tags"] = read["tags"].map(tuple)
    pd.testing.assert_frame_equal(read, world.rows(np.arange(400), as_of=as_of), check_exact=True)
    small = ready_world("social", num_items=300, text=0.5)
    write_items(small, tmp_path / "items.parquet", row_group_size=70)
    items = pq.read_table(tmp_path / "items.parquet").to_pandas()
    items["hashtags"] = items["hashtags"].map(tuple)
    pd.testing.assert_frame_equal(items, small.items(np.arange(1, 301)))


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
    true, score = draw.random(28), draw.random(28)
    found = knowable_score(request, score, true, users=np.where(request == 1, 0, request))
    lists = {k: [[], [], []] for k in (1, 5)}
    for r in (0, 1, 2, 3):
        t, s = true[request == r], score[request == r]
        for k in (1, 5):
            if len(t) > k:
                best = (t[np.argsort(-s)[:k]].sum(), np.sort(t)[::-1][:k].sum(), k * t.mean())
                for values, value in zip(lists[k], best, strict=True):
                    values.append(value)
    for k, of in lists.items():
        mine, best, random = map(np.array, of)
        assert found[f"requests@{k}"] == len(mine)
        assert found[f"regret@{k}"] == pytest.approx((best - mine).mean())
        assert found[f"share@{k}"] == pytest.approx((mine - random).mean() / (best - random).mean())
    assert found["requests@10"] == 0
    assert "regret@10" not in found
    mean = [np.mean([(true[np.argsort(-s)][:k] - true.mean()).sum() for k in range(1, 29)]) for s in (score, true)]
    assert found["share"] == pytest.approx(mean[0] / mean[1])
    perfect = knowable_score(request, 5 * true - 1, true)
    assert (perfect["share"], perfect["share@1"], perfect["regret@5"]) == (1, 1, 0)
    assert knowable_score(request, np.zeros(28), true)["share@5"] == pytest.approx(0)


def test_the_error_of_a_share_is_the_spread_of_shares():
    draw = np.random.default_rng(3)

    def one():
        request = np.repeat(np.arange(300.0), 6)
        true = draw.random(1_800)
        return knowable_score(request, true + draw.normal(0, 0.3, 1_800), true)

    found = [one() for _ in range(80)]
    for k in (1, 5):
        spread = np.std([f[f"share@{k}"] for f in found])
        assert np.mean([f[f"share@{k} error"] for f in found]) == pytest.approx(spread, rel=0.3)


# ---------------------------------------------------------------- runs

DIALS = {"num_users": 40, "num_items": 50, "seed": 2, "signal": 2.5, "rates": {"click": 0.5}}


def run_of(name="shop", *, hard=True, tasks=None, **dials):
    dials = DIALS | (HARD | {"delay": 0.3} if hard else {}) | dials
    raw = yaml.safe_load(world_run(name, rows=4_000, val_rows=600, test_rows=600, **dials))
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
    assert set(written["knowable"]) == {"val", "test"}
    assert "knowable" not in written["evaluations"]["test"]
    known = written["knowable"]["test"]
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
    expected = knowable_score(
        kept["user"].to_numpy(float), kept["score"].to_numpy(), true, kept["user"].to_numpy(float)
    )
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
        return knowable_of(run.config, run.model, raw, rows, oracle)

    index = np.arange(9_000, 9_500)
    found = judged(world.rows(index))
    assert [known["share"] for known in found.values()] == pytest.approx([1.0] * 5, abs=1e-4)
    assert judged(ready_world("shop", **DIALS | HARD | {"seed": 3}).rows(index)) is None
    shown = Console(file=io.StringIO(), width=100)
    print_knowable(found | {"score": knowable_score(np.zeros(20), np.arange(20.0), np.arange(20.0))}, shown)
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
        moved_z = np.stack(bench.rules._logits(world, moved)) - np.stack(bench.rules._logits(world, rows.draw))
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
    assert set(line["share"]) == {"click", "cart", "buy", "next_category", "return", "score"}
    capsys.readouterr()
    benchmark.main(["--show", str(out)])
    assert "1: shop, 600 rows, 30 × 30 position_bias=1 dim=8" in capsys.readouterr().out
