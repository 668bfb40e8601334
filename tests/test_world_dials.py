"""Dials of synthetic worlds that make logs hard: titles, position bias, events that arrive late."""

import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy.stats import kstest
from test_synthetic import LIVELY

from mtcl_torchrec.config import SyntheticConfig, parse_run
from mtcl_torchrec.data.outcomes import Outcome
from mtcl_torchrec.data.synthetic import MAX_ROWS, World
from mtcl_torchrec.data.synthetic_files import write_items, write_parquet
from mtcl_torchrec.data.synthetic_truth import TITLE_WORDS, TOPIC_WORDS, TOPICS, draw_rows
from mtcl_torchrec.data.titles import vocabulary
from mtcl_torchrec.data.world_windows import world_of, world_split
from mtcl_torchrec.data.worlds import ready_world, world_run
from mtcl_torchrec.schema import ConfigError, DataError

N = 100_000
HARD = {"text": 0.6, "position_bias": 0.8, "positions": 7, "delay": 3.0, "delay_spread": 1.2}
WORLDS = {name: ready_world(name, **LIVELY, **HARD) for name in ("shop", "video")}


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


def test_delays_with_a_spread_are_log_normal():
    plain, rows = (ready_world("shop", delay=2.0, **dials).rows(np.arange(N)) for dials in ({}, {"delay_spread": 1.2}))
    for name, mean in (("click", 0.02), ("return", 2)):
        np.testing.assert_array_equal(rows[name], plain[name])
        logs = np.log(rows[f"{name}_delay"].dropna().astype(float) / 86_400)
        # Of mean μ: the logarithm is normal around log μ - σ²/2.
        assert kstest((logs - np.log(mean) + 1.2**2 / 2) / 1.2, "norm").pvalue > 1e-4
    assert (rows["buy_delay"] > rows["cart_delay"])[rows["buy"] == 1].all()


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
        ({"delay_spread": 1}, "delay_spread belongs to a delay above 0"),
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


def test_a_dial_has_one_range_and_one_default_in_yaml_and_in_python():
    """A YAML is checked before the world is made, by bounds of its own."""
    in_yaml = SyntheticConfig.model_json_schema()["properties"]
    in_python = TypeAdapter(World).json_schema()["properties"]
    shared = set(in_yaml) & set(in_python) - {"conflict"}  # each ready world has its own default
    assert len(shared) == len(in_yaml) - len(
        {"world", "rows", "val_rows", "test_rows", "rates", "imbalance", "conflict"}
    )
    assert {dial: in_yaml[dial] for dial in shared} == {dial: in_python[dial] for dial in shared}
    number, _ = in_yaml["conflict"]["anyOf"]
    assert (number["minimum"], number["maximum"]) == (
        in_python["conflict"]["minimum"],
        in_python["conflict"]["maximum"],
    )
