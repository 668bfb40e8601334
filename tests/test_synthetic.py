"""Synthetic worlds: rows depend on their index alone, the oracle tells the truth, the dials do what they say."""

import hashlib
import io
import math
import multiprocessing
import tracemalloc
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import roc_auc_score

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.counter_random import Stream, below, bits, latents, scatter, stream, uniform, zipf_ranks
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.outcomes import Outcome
from mtcl_torchrec.data.source import Rows, read_rows
from mtcl_torchrec.data.synthetic import MAX_ROWS, World
from mtcl_torchrec.data.synthetic_files import write_parquet
from mtcl_torchrec.data.worlds import READY_WORLDS, ready_world, world_run
from mtcl_torchrec.schema import ConfigError, DataError, Schema
from mtcl_torchrec.training.run import train_run

N = 200_000


def logit(p):
    return np.log(p) - np.log1p(-p)


def digest(frame):
    return hashlib.sha256(pd.util.hash_pandas_object(frame.astype({"tags": str})).to_numpy().tobytes()).hexdigest()


# ---------------------------------------------------------------- numbers from counters


def test_the_mixer_is_splitmix64():
    golden = np.uint64(0x9E3779B97F4A7C15)
    first = bits(Stream(golden, golden), np.arange(3))
    assert [hex(x) for x in first.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_numbers_are_uniform_and_streams_have_nothing_to_do_with_each_other():
    n = np.arange(N)
    a, b, c = uniform(stream(0, "a"), n), uniform(stream(0, "b"), n), uniform(stream(1, "a"), n)
    for u in (a, b, c):
        assert np.abs(np.histogram(u, 20, (0, 1))[0] - N / 20).max() < 5 * math.sqrt(N / 20)
    vectors = np.stack([a, b, c, np.roll(a, 1), *latents(0, "v", n, 6)])
    assert np.abs(np.corrcoef(vectors) - np.eye(len(vectors))).max() < 5 / math.sqrt(N)
    np.testing.assert_allclose([x.var() for x in vectors[4:]], 1, atol=0.02)
    assert np.bincount(below(stream(0, "a"), n, 7)).tolist() == pytest.approx([N / 7] * 7, rel=0.03)


@given(st.integers(1, 600), st.integers(0, 10**6))
def test_scatter_is_one_to_one(n, offset):
    assert sorted(scatter(np.arange(n), n, offset % n).tolist()) == list(range(n))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.7])
def test_ranks_follow_the_law_that_the_docstring_gives(exponent):
    size = 50
    counts = np.bincount(zipf_ranks(uniform(stream(3, "r"), np.arange(N)), size, exponent), minlength=size + 1)[1:]
    # ∫ x⁻ˢ over k ± ½, by the midpoint rule on a fine grid
    grid = (np.arange(size)[:, None] + 0.5) + (np.arange(1000)[None, :] + 0.5) / 1000
    p = (grid**-exponent).mean(1)
    p /= p.sum()
    assert (np.abs(counts - N * p) < 5 * np.sqrt(N * p)).all()


# ---------------------------------------------------------------- a row is a function of its index

LIVELY = {
    "missing": 0.2,
    "cold_items": 0.3,
    "cold_after": 0.4,
    "horizon": 50_000,
    "num_users": 5_000,
    "num_items": 3_000,
}
WORLDS = {name: ready_world(name, **LIVELY) for name in READY_WORLDS}


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(READY_WORLDS),
    st.lists(st.integers(0, 60_000) | st.integers(0, MAX_ROWS - 1), min_size=1, max_size=60),
    st.integers(1, 60),
    st.randoms(),
)
def test_order_and_chunks_change_no_row(name, indices, size, random):
    world, index = WORLDS[name], np.array(indices)
    whole, truth = world.rows(index), world.oracle(index)
    parts = [index[i : i + size] for i in range(0, len(index), size)]
    pd.testing.assert_frame_equal(pd.concat(map(world.rows, parts), ignore_index=True), whole, check_exact=True)
    order = np.array(random.sample(range(len(index)), len(index)))
    pd.testing.assert_frame_equal(world.rows(index[order]), whole.iloc[order].reset_index(drop=True), check_exact=True)
    for task, p in world.oracle(index[order]).items():
        np.testing.assert_array_equal(p, truth[task][order])


def test_the_size_of_a_chunk_changes_no_row():
    world = WORLDS["shop"]
    whole = world.rows(np.arange(40_000))
    for size in (1_999, 16_385):
        chunks = pd.concat(list(world.chunks(39_000, start=1_000, size=size)), ignore_index=True)
        pd.testing.assert_frame_equal(chunks, whole.iloc[1_000:].reset_index(drop=True), check_exact=True)


def test_a_world_stays_the_same_from_version_to_version():
    """Where this fails, every log and benchmark made from a seed has changed: say so in the change log."""
    frame = ready_world("shop", seed=7, cold_items=0.2, cold_after=0.5).rows(np.arange(0, 1_000_000, 5_000))
    whole = frame.drop(columns=["price", *(o.name for o in WORLDS["shop"].outcomes)])
    assert digest(whole)[:16] == "cc56bb6e0ce02bb3"


@pytest.mark.full
def test_another_process_computes_the_same_rows():
    world = ready_world("shop", seed=5, **LIVELY)
    index = np.arange(7, 30_000, 3)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        assert digest(other.submit(world.rows, index).result()) == digest(world.rows(index))


def test_another_seed_is_another_world():
    a, b = (ready_world("shop", seed=s).rows(np.arange(5_000)) for s in (0, 1))
    for column in ("user_id", "product_id", "segment", "category", "price", "device"):
        assert abs(np.corrcoef(a[column], b[column])[0, 1]) < 0.08
        assert (a[column] != b[column]).mean() > 0.3


def test_indices_that_are_none_are_refused():
    world = WORLDS["shop"]
    assert len(world.rows(np.arange(0))) == 0
    assert world.rows(np.arange(0)).dtypes.equals(world.rows(np.arange(3)).dtypes)
    for wrong in (np.array([-1]), np.array([MAX_ROWS]), np.array([0.5]), np.zeros((2, 2), int)):
        with pytest.raises(DataError, match="row indices"):
            world.rows(wrong)


# ---------------------------------------------------------------- the oracle is right


@pytest.fixture(scope="module", params=READY_WORLDS)
def sample(request):
    world = ready_world(request.param, horizon=N, num_users=20_000, num_items=20_000)
    index = np.arange(N)
    return world, world.rows(index), world.oracle(index)


def test_means_come_out_as_asked(sample):
    world, rows, truth = sample
    for outcome in world.outcomes:
        if outcome.kind == "content":
            continue
        label = rows[outcome.name].dropna()
        # of the labels, and of the fixed sample of 2¹⁷ rows that the intercepts were solved on
        of_sample = truth[outcome.name].std() / math.sqrt(2**17 * len(label) / N)
        tolerance = 4.5 * math.hypot(label.std() / math.sqrt(len(label)), of_sample)
        assert abs(label.mean() - outcome.mean) < tolerance, outcome.name
        assert tolerance < 0.1 * outcome.mean


def test_labels_happen_as_often_as_the_oracle_says(sample):
    world, rows, truth = sample
    for outcome in world.outcomes:
        label, p = rows[outcome.name].to_numpy(float), truth[outcome.name]
        if outcome.kind == "content":
            np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
            assert p[:, 0].max() == 0
            chosen = p[np.arange(N), label.astype(int)]
            # The chosen class's probability is Σ p² on average, and each class is chosen as often as it says.
            assert abs(chosen.mean() - (p**2).sum(1).mean()) < 4.5 * chosen.std() / math.sqrt(N)
            counts = np.bincount(label.astype(int), minlength=p.shape[1])
            assert (np.abs(counts - p.sum(0)) <= 4.5 * np.sqrt((p * (1 - p)).sum(0))).all()
            continue
        present = ~np.isnan(label)
        label, p = label[present], p[present]
        for part in np.array_split(np.argsort(p), 10):
            error = label[part] - p[part]
            assert abs(error.mean()) < 4.5 * error.std() / math.sqrt(len(part)), outcome.name
        if outcome.kind == "stars":
            assert set(label) <= {1, 2, 3, 4, 5}
        if outcome.kind == "amount":
            assert label.min() >= 0
            assert np.corrcoef(label, p)[0, 1] > 0.4


def test_nothing_ranks_better_than_the_oracle(sample):
    world, rows, truth = sample
    random = np.random.default_rng(0)
    for outcome in world.outcomes:
        if outcome.kind != "event":
            continue
        present = rows[outcome.name].notna().to_numpy()
        label, z = rows[outcome.name][present], logit(truth[outcome.name][present])
        best, worse, worst = (roc_auc_score(label, z + s * random.normal(size=len(z))) for s in (0, 1, 4))
        assert best > 0.72
        assert best > worse > worst > 0.5


def test_a_child_has_a_label_exactly_where_its_parent_is_one(sample):
    world, rows, truth = sample
    joint = world.oracle(np.arange(1000), joint=True)
    for outcome in world.outcomes:
        if outcome.after is None:
            assert rows[outcome.name].notna().all()
            continue
        np.testing.assert_array_equal(rows[outcome.name].notna(), rows[outcome.after] == 1)
        task = next(t for t in world.schema().tasks if t.name == outcome.name)
        assert task.mask == outcome.after
        if outcome.kind == "event":
            expected = truth[outcome.name][:1000] * joint[outcome.after]
            np.testing.assert_allclose(joint[outcome.name], expected, rtol=1e-6)


def test_tasks_of_content_and_context_know_no_item():
    """One user, one moment: whatever the item, the probabilities are the same; those of behaviour are not."""
    world = ready_world("shop", num_users=1, num_items=500, context=0.0)
    rows, truth = world.rows(np.arange(500)), world.oracle(np.arange(500))
    assert len(np.unique(truth["next_category"], axis=0)) == 1
    assert len(np.unique(truth["click"])) > 100
    same = rows.groupby(["hour", "device", "place"])["user_id"].transform("size").to_numpy() > 1
    by_moment = pd.Series(truth["return"]).groupby([rows["hour"], rows["device"], rows["place"]]).nunique()
    assert same.sum() > 100
    assert (by_moment == 1).all()


# ---------------------------------------------------------------- dials


def test_rates_and_imbalance_set_the_means():
    world = ready_world("courses", rates={"enrol": 0.4, "rating": 3.0}, imbalance=4)
    assert [o.mean for o in world.outcomes if o.kind != "content"] == pytest.approx([0.1, 0.075, 3.0, 0.3])
    rows = world.rows(np.arange(N))
    assert rows["enrol"].mean() == pytest.approx(0.1, rel=0.04)
    assert rows["finish"].mean() == pytest.approx(0.075, rel=0.12)


def test_each_task_misses_its_share_of_labels():
    world = ready_world("shop", missing=0.3)
    rows, full = world.rows(np.arange(N)), ready_world("shop").rows(np.arange(N))
    for task in ("click", "next_category", "return"):
        assert rows[task].isna().mean() == pytest.approx(0.3, abs=0.005)
        there = rows[task].notna()
        np.testing.assert_array_equal(rows[task][there], full[task][there])
    clicked = rows["click"] == 1
    assert rows.loc[clicked, "cart"].isna().mean() == pytest.approx(0.3, abs=0.01)
    assert rows.loc[~clicked, "cart"].isna().all()
    assert abs(np.corrcoef(rows["click"].isna(), rows["return"].isna())[0, 1]) < 0.01


def test_tastes_correlate_as_the_dials_say():
    def correlation(a, b, **dials):
        truth = ready_world("social", **dials).oracle(np.arange(20_000))
        return np.corrcoef(logit(truth[a]), logit(truth[b]))[0, 1]

    for rho in (0.0, 0.4, 0.9):
        assert correlation("like", "share", correlation=rho) == pytest.approx(rho, abs=0.1)
    for conflict, expected in ((0.0, 0.8), (0.5, 0.0), (1.0, -0.8)):
        assert correlation("like", "hide", correlation=0.8, conflict=conflict) == pytest.approx(expected, abs=0.1)


def test_signal_and_context_decide_what_matters():
    def truth(**dials):
        return ready_world("video", num_users=1, num_items=2, **dials).oracle(np.arange(2000))

    assert np.unique(truth(context=0.0)["like"]).size == 2
    assert np.unique(truth(context=0.5)["like"]).size > 20
    assert np.unique(truth(signal=0.0)["return"]).size == 1
    spread = [logit(ready_world("shop", signal=s).oracle(np.arange(9000))["click"]).std() for s in (0.5, 1.0, 2.0)]
    np.testing.assert_allclose(spread, [0.5, 1.0, 2.0], rtol=0.15)


def test_popularity_falls_along_the_zipf_law():
    rows = ready_world("shop", item_exponent=1.2, user_exponent=0.7, num_users=1000, num_items=10**7).rows(np.arange(N))
    for column, exponent in (("product_id", 1.2), ("user_id", 0.7)):
        counts = np.sort(rows[column].value_counts().to_numpy())[::-1]
        rank = np.arange(5, 60)
        slope = np.polyfit(np.log(rank + 1), np.log(counts[rank]), 1)[0]
        assert slope == pytest.approx(-exponent, abs=0.08)
        # Popular ids lie all over the table, not at its start.
        top = rows[column].value_counts().head(200).index.to_numpy() / rows[column].max()
        assert 0.4 < top.mean() < 0.6


def test_cold_items_come_late_only():
    world = ready_world("video", cold_items=0.2, cold_after=0.75, horizon=40_000, num_items=1_000)
    rows = world.rows(np.arange(50_000))
    cold = (rows["video_id"] > 1_000 - world.num_cold).to_numpy()
    assert world.num_cold == 200
    assert not cold[: world.cold_from].any()
    assert cold[world.cold_from : world.cold_from + 20].any()
    assert cold[world.cold_from :].mean() == pytest.approx(0.2, abs=0.015)
    assert rows["video_id"][cold].nunique() > 150
    # They differ in nothing else: the oracle holds for them, too.
    p = world.oracle(np.arange(50_000))["finish"]
    assert rows["finish"][cold].mean() == pytest.approx(p[cold].mean(), abs=0.03)
    assert not (ready_world("video", num_items=1_000).rows(np.arange(N))["video_id"].nunique() < 990)


def test_time_grows_and_hours_are_those_of_places():
    world = ready_world("shop", horizon=30_000, days=10)
    rows = world.rows(np.arange(30_000))
    assert rows["time"].is_monotonic_increasing
    assert rows["time"].iloc[-1] - rows["time"].iloc[0] == pytest.approx(10 * 86_400, abs=60)
    assert set(rows["hour"]) == set(range(1, 25))
    one_place = rows[rows["place"] == 2]
    utc = one_place["time"] // 3600 % 24
    assert ((one_place["hour"] - utc) % 24).nunique() == 1
    at_places = rows.groupby(["user_id", "place"]).size().groupby("user_id").agg(["max", "sum"])
    often = at_places[at_places["sum"] > 5]
    assert often["max"].sum() / often["sum"].sum() > 0.8


def test_what_a_row_says_of_its_user_and_item_is_theirs():
    rows = ready_world("health", num_users=50, num_items=40).rows(np.arange(4000))
    assert (rows.groupby("user_id")["segment"].nunique() == 1).all()
    for column in ("specialty", "wait_days", "conditions"):
        assert (rows.groupby("service_id")[column].nunique() == 1).all()
    assert rows["conditions"].map(len).nunique() > 2
    truth = ready_world("health").oracle(np.arange(20_000))["book"]
    wait = np.log(ready_world("health").rows(np.arange(20_000))["wait_days"] + 0.01)
    assert np.corrcoef(wait, logit(truth))[0, 1] < -0.15


@pytest.mark.parametrize("ids", [30_000_000, 10**10])
def test_huge_vocabularies_need_no_memory(ids):
    world = ready_world("shop", num_users=ids, num_items=ids, cold_items=0.1, horizon=10**12)
    tracemalloc.start()
    rows = world.rows(np.arange(950 * 10**9, 950 * 10**9 + 20_000))
    truth = world.oracle(np.arange(100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
    assert rows["user_id"].max() > 0.99 * ids
    assert rows["user_id"].between(1, ids).all()
    assert rows["product_id"].between(1, ids).all()
    assert (rows["product_id"] > 0.9 * ids).mean() == pytest.approx(0.1, abs=0.01)
    assert rows["user_id"].nunique() > 19_900
    assert rows["click"].mean() == pytest.approx(0.2, abs=0.02)
    assert truth["buy"].shape == (100,)
    assert world.schema().features[0].vocabulary_size == ids + 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_user": 3}, "no dial 'num_user' \\(did you mean 'num_users'"),
        ({"num_users": 0}, "num_users: .*greater than or equal to 1 \\(given: 0\\)"),
        ({"rates": {"clik": 0.1}}, "rates: no task 'clik' with a mean \\(did you mean 'click'"),
        ({"rates": {"click": 1.5}}, "click: the mean of an event lies between 0 and 1"),
        ({"imbalance": 0.5}, "imbalance is at least 1"),
        ({"conflict": float("nan")}, "conflict: .*finite"),
        ({"user": "segment"}, "column 'segment' is declared twice"),
    ],
)
def test_dials_that_are_wrong_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ready_world("shop", **wrong)


def test_worlds_of_ones_own_are_checked():
    click, buy = Outcome(name="click"), Outcome(name="buy", after="click")
    assert World(outcomes=(click, buy)).rows(np.arange(9)).shape == (9, 12)
    assert World(outcomes=(Outcome(name="next", kind="content"),)).oracle(np.arange(9))["next"].shape == (9, 17)
    with pytest.raises(ValueError, match="'after' names no event declared before it"):
        World(outcomes=(buy, click))
    with pytest.raises(ValueError, match="latent_dim must be above the number of tasks"):
        World(outcomes=tuple(Outcome(name=f"t{i}") for i in range(8)))
    with pytest.raises(ValueError, match="one content task at most"):
        World(outcomes=(Outcome(name="a", kind="content"), Outcome(name="b", kind="content")))


# ---------------------------------------------------------------- files


def test_a_file_holds_the_rows(tmp_path):
    world = ready_world("social", missing=0.1, **{k: v for k, v in LIVELY.items() if k != "missing"})
    written = []
    write_parquet(world, tmp_path / "a.parquet", 2_500, start=100, row_group_size=1_000, progress=written.append)
    assert written == [1_000, 2_000, 2_500]
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [1_000, 1_000, 500]
    read = read_rows([str(tmp_path / "a.parquet")]).frame
    read["hashtags"] = read["hashtags"].map(tuple)
    pd.testing.assert_frame_equal(read, world.rows(np.arange(100, 2_600)), check_exact=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_writing_that_breaks_off_leaves_the_file_before(tmp_path):
    world = WORLDS["shop"]
    write_parquet(world, tmp_path / "a.parquet", 100)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parquet(world, tmp_path / "a.parquet", 500, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == 100
    with pytest.raises(DataError, match="no such folder"):
        write_parquet(world, tmp_path / "b" / "a.parquet", 500)
    with pytest.raises(DataError, match="at least 1"):
        write_parquet(world, tmp_path / "a.parquet", 0)


def test_writing_more_rows_needs_no_more_memory(tmp_path):
    def peak(rows):
        tracemalloc.start()
        write_parquet(WORLDS["shop"], tmp_path / "a.parquet", rows, row_group_size=4_096)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(5_000)
    assert peak(60_000) < 1.2 * peak(12_000)


# ---------------------------------------------------------------- a run on each


@pytest.mark.parametrize("name", READY_WORLDS)
def test_the_yaml_says_what_the_world_has(name):
    raw = yaml.safe_load(world_run(name, rows=900, seed=3, rates={"return": 0.2}, num_items=77))
    dials = raw["data"]["synthetic"]
    assert dials.pop("world") == name
    assert (dials.pop("rows"), dials.pop("val_rows"), dials.pop("test_rows")) == (900, 90, 90)
    world = ready_world(name, **dials)
    assert (world.seed, world.num_items) == (3, 77)
    declared, own = Schema.model_validate(raw["schema"]), world.schema()  # but for how it is learnt
    alike = {"embedding_dim": 16}
    assert [f.model_copy(update=alike) for f in declared.features] == [f.model_copy(update=alike) for f in own.features]
    alike = {"head": "tower", "weight": 1.0, "mask": None, "after": None}
    assert [t.model_copy(update=alike) for t in declared.tasks] == [t.model_copy(update=alike) for t in own.tasks]
    alone = yaml.safe_load(world_run(name, rows=900, seed=3, rates={"return": 0.2}, num_items=77, factors=False))
    assert Schema.model_validate(alone["schema"]) == own
    assert (declared.user, declared.item, declared.time) == (own.user, own.item, own.time)
    for task, outcome in zip(declared.tasks, world.outcomes, strict=True):  # a label weighs the same wherever it is
        chained = outcome.kind == "event"
        assert (task.after, task.mask) == ((outcome.after, None) if chained else (None, outcome.after))
        parents, after = 1.0, None if chained else outcome.after
        while after:
            parent = next(o for o in world.outcomes if o.name == after)
            parents, after = parents * parent.mean, parent.after
        assert task.weight == pytest.approx(parents * (0.5 if task.kind == "regression" else 1), rel=1e-2)
    assert raw["fusion"]["weights"] == world.fusion_weights()
    raw["data"] = {"train": "train.parquet", "val": "val.parquet"}
    run = parse_run(yaml.safe_dump(raw))
    assert run.data_schema == declared
    kinds = [(t.kind, t.inputs) for t in run.data_schema.tasks]
    assert ("multiclass", ("user", "context")) in kinds
    assert ("binary", ("user", "context")) in kinds
    if name == "social":
        assert run.fusion.weights["hide"] < 0


TRAINED = {"shop": "click", "social": "like", "video": "finish", "courses": "enrol", "health": "view"}


@pytest.mark.parametrize("name", READY_WORLDS)
def test_each_world_trains(name, tmp_path):
    main = TRAINED[name]
    dials = {"num_users": 60, "num_items": 80, "seed": 1, "signal": 2.5, "rates": {main: 0.4}}
    sizes = {"train": 8_000, "val": 2_000, "test": 1_000}
    raw = yaml.safe_load(world_run(name, rows=8_000, val_rows=2_000, test_rows=1_000, **dials))
    world = ready_world(name, horizon=11_000, **dials)
    start = 0
    for split, rows in sizes.items():
        write_parquet(world, tmp_path / f"{split}.parquet", rows, start=start)
        start += rows
    encoder = FeatureEncoder(world.schema()).fit(Rows(world.rows(np.arange(500))))
    encoded = encoder.encode(Rows(world.rows(np.arange(8_000, 8_100))))
    assert len(encoded) == 100
    raw["data"] = {split: f"{split}.parquet" for split in sizes}
    raw["model"] = {"trunk": {"kind": "shared_bottom", "expert_layers": [32]}, "tower_layers": [16]}
    raw["optimizers"] = {"tables": {"lr": 0.1}, "dense": {"lr": 0.01}}
    raw["training"] = {"epochs": 2, "batch_size": 200, "warmup_steps": 5}
    run = parse_run(yaml.safe_dump(raw), folder=tmp_path)
    metrics = (
        train_run(run, tmp_path / "run", device="cpu", console=Console(file=io.StringIO())).evaluations["val"].tasks
    )
    val = np.arange(8_000, 10_000)
    best = roc_auc_score(world.rows(val)[main], world.oracle(val)[main])
    assert 0.65 < metrics[main]["auc"] < best + 0.01
    assert metrics["return"]["auc"] > 0.6
    content = next(t for t in metrics if t.startswith("next_"))
    assert metrics[content]["ne"] < 1
