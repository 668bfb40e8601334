"""What a single column tells of an event, and what `mtcl init` does about a column that tells it all."""

import numpy as np
import pandas as pd
import pytest
import shop
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.draft import draft_run
from mtcl_torchrec.data.leakage import ALMOST, auc_alone, codes_of_column, codes_of_numbers, some_rows
from mtcl_torchrec.data.synthetic_files import write_parquet
from mtcl_torchrec.data.worlds import ready_world
from mtcl_torchrec.schema import DataError


def by_hand(event, lists):
    """The same, one row and one half after the other."""
    rows = [i for i, value in enumerate(event) if not np.isnan(value)]
    half = {}
    for kind in (0, 1):
        those = [row for row in rows if event[row] == kind]
        blocks = min(20, max(2, len(those) // 10))
        half |= {row: (place * blocks // len(those)) % 2 for place, row in enumerate(those)}
    found = []
    for learn in (0, 1):
        mean = np.mean([event[row] for row in rows if half[row] == learn])
        seen = [(value, event[row]) for row in rows if half[row] == learn for value in lists[row]]

        def odds(value, mean=mean, seen=seen):
            came = [event for of, event in seen if of == value]
            share = (sum(came) + 2 * mean) / (len(came) + 2)
            return np.log(share / (1 - share)) - np.log(mean / (1 - mean))

        known = {value: odds(value) for row in rows for value in lists[row]}
        judged = [row for row in rows if half[row] != learn]
        scores = np.round([sum(known[value] for value in lists[row]) for row in judged], 9)
        found.append(roc_auc_score([event[row] for row in judged], scores))
    return np.mean(found)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_auc_of_a_loop_over_rows(seed):
    draw = np.random.default_rng(seed)
    event = np.where(draw.random(400) < 0.2, np.nan, draw.random(400) < 0.4)
    lists = [list(draw.integers(0, 9, draw.integers(0, 4))) for _ in event]
    codes = np.array([value for of in lists for value in of], np.int64)
    lengths = np.array([len(of) for of in lists])
    assert auc_alone(event, codes, lengths) == pytest.approx(by_hand(event, lists), abs=1e-12)
    single = draw.integers(0, 5, 400)
    assert auc_alone(event, single) == pytest.approx(by_hand(event, [[value] for value in single]), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.5))
def test_what_says_the_event_tells_it_and_what_does_not_does_not(seed, rate):
    draw = np.random.default_rng(seed)
    event = (draw.random(4000) < rate).astype(float)
    numbers = draw.normal(size=4000) + 20 * event
    assert auc_alone(event, codes_of_numbers(numbers)) > 0.97
    assert auc_alone(event, codes_of_numbers(-numbers)) > 0.97
    assert auc_alone(event, codes_of_numbers(np.where(event == 1, np.nan, draw.normal(size=4000)))) > 0.97
    noise = draw.integers(0, 50, 4000)
    assert abs(auc_alone(event, noise) - 0.5) < 0.2
    assert abs(auc_alone(event, np.arange(4000)) - 0.5) < 0.2  # a value of its own in each row tells nothing


def test_too_few_events_tell_nothing():
    event = np.zeros(1000)
    event[::50] = 1  # 20 events, 10 in each half
    assert auc_alone(event, event.astype(np.int64)) == 1.0
    event[0] = 0
    assert np.isnan(auc_alone(event, event.astype(np.int64)))
    assert np.isnan(auc_alone(1 - event, event.astype(np.int64)))
    assert np.isnan(auc_alone(np.full(9, np.nan), np.zeros(9, np.int64)))


def test_the_id_of_a_visit_does_not_tell_what_the_whole_visit_did():
    event = np.repeat(np.random.default_rng(0).integers(0, 2, 500), 8).astype(float)
    assert abs(auc_alone(event, np.repeat(np.arange(500), 8)) - 0.5) < 0.1


def test_columns_of_every_kind_become_numbers():
    codes, lengths = codes_of_column(pd.Series([["a", "b"], None, ["b"]]))
    assert (codes.tolist(), lengths.tolist()) == ([0, 1, 1], [2, 0, 1])
    codes, lengths = codes_of_column(pd.Series(["x", None, "x"]))
    assert (codes.tolist(), lengths) == ([0, 1, 0], None)
    codes, _ = codes_of_column(pd.Series([3, None, 5], dtype="Int64"))
    assert len(set(codes)) == 3
    many = codes_of_numbers(np.random.default_rng(0).normal(size=9000))
    assert np.bincount(many).max() <= 9000 // 200 + 1
    assert len(some_rows(10**6, 500)) == 500


def log():
    """A shop's log with a column that is known afterwards: why the page was left."""
    frame = shop.log(3000).drop(columns=["stars", "topics"])
    draw = np.random.default_rng(1)
    why = np.where(frame["buy"] == 1, "paid", draw.choice(["closed", "back", "lost"], len(frame)))
    return frame.assign(left_by=why, pages=draw.integers(1, 9, len(frame)) + 9 * frame["click"])


def drafted(frame, tmp_path, **given):
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    text = draft_run([str(tmp_path / "log.parquet")], **given)
    parse_run(text)
    return [feature["name"] for feature in yaml.safe_load(text)["schema"]["features"]], text


def test_init_leaves_out_what_tells_a_label_by_itself(tmp_path):
    features, text = drafted(log(), tmp_path)
    assert not {"left_by", "pages"} & set(features)
    assert {"user_id", "product_id", "genre", "price", "hour"} <= set(features)
    told = [line for line in text.splitlines() if "almost by itself" in line]
    assert len(told) == 2
    assert told[0].startswith("    # - {name: left_by, group: context, kind: id")
    assert told[0].endswith("# tells buy almost by itself (AUC 1.00): known only afterwards?")
    assert "pages" in told[1]
    assert "tells click almost by itself (AUC 1.00)" in told[1]
    assert "almost by itself" not in drafted(log().drop(columns=["left_by", "pages"]), tmp_path)[1]
    # Of a label that is not asked for, nothing is said.
    assert "left_by" in drafted(log().drop(columns="pages"), tmp_path, labels=["click"])[0]


def test_lists_and_texts_of_parts_are_looked_at(tmp_path):
    frame, draw = log().drop(columns=["left_by", "pages"]), np.random.default_rng(2)
    steps = [[*draw.choice(["seen", "zoomed", "read"], 2), *["cart"] * int(buy)] for buy in frame["buy"]]
    for column in (steps, ["|".join(parts) for parts in steps]):
        features, text = drafted(frame.assign(steps=column), tmp_path)
        assert "steps" not in features
        assert "# tells buy almost by itself" in text


def test_a_log_of_which_nothing_is_left_says_why(tmp_path):
    frame = log()[["left_by", "buy"]].assign(left_by=lambda f: f["left_by"].where(f["buy"] == 1, "closed"))
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    with pytest.raises(DataError, match=r"no input column beside the labels and what tells them by itself \(left_by\)"):
        draft_run([str(tmp_path / "log.parquet")])


@pytest.mark.parametrize("name", ["shop", "social", "video", "courses", "health"])
def test_no_column_of_a_world_is_taken_for_a_leak(name, tmp_path):
    write_parquet(ready_world(name, num_users=500, num_items=300, seed=0), tmp_path / "log.parquet", 20_000)
    assert "almost by itself" not in draft_run([str(tmp_path / "log.parquet")])
    assert ALMOST == 0.95
