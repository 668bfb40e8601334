"""The label of what comes next: from later rows of the same user and split, and from nothing else."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shop import RUN, log

from mtcl_torchrec.config import NextLabelConfig, dump_run, load_run, parse_run
from mtcl_torchrec.data.next_labels import next_label, returns_within
from mtcl_torchrec.data.prepare import prepare_files
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.splits import load_splits
from mtcl_torchrec.schema import ConfigError, DataError

NAN = float("nan")
CONFIG = NextLabelConfig(column="next", of="tag", where=["click"])
ROW = st.tuples(
    st.one_of(st.integers(1, 3), st.none()), st.one_of(st.integers(0, 5), st.none()),
    st.one_of(st.integers(2**60, 2**60 + 3), st.none()), st.sampled_from([0, 1, None]),
)  # fmt: skip


def frame_of(rows):
    columns = zip(("user", "t", "tag", "click"), zip(*rows, strict=True), strict=True)
    return pd.DataFrame({name: pd.array(list(values), dtype="Int64") for name, values in columns})


def naive(rows):
    found = []
    for user, now, *_ in rows:
        later = [
            (t, tag)
            for other, t, tag, click in rows
            if None not in (user, now, other, t) and other == user and t > now and click == 1
        ]
        found.append(min(later, key=lambda e: e[0])[1] if later else None)  # of one moment, the first row
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=25))
def test_the_label_is_that_of_a_loop(rows):
    found = next_label(Rows(frame_of(rows)), CONFIG, by="user", time="t")
    assert [None if pd.isna(x) else x for x in found] == naive(rows)


WITH = RUN.replace(
    "- {name: taste, kind: multiclass, label: genre, item_class: genre, mask: click, inputs: [user, context]}",
    "- {name: taste, kind: multiclass, label: next_genre, item_class: genre, inputs: [user, context]}",
).replace("\nmodel:", "\nnext_labels: {column: next_genre, of: genre, where: click}\nmodel:")


def run_in(folder, text=WITH):
    log(600).to_parquet(folder / "log.parquet")
    (folder / "run.yaml").write_text(text)
    return load_run(folder / "run.yaml")


def split_of(run):
    preprocessor = Preprocessor(run.data_schema, run.statistics, run.histories, run.next_labels)
    return preprocessor, load_splits(run, preprocessor, say=lambda _: None)


def test_each_split_has_labels_of_its_own_rows_alone(tmp_path):
    run = run_in(tmp_path)
    preprocessor, splits = split_of(run)
    frame = log(600)
    starts = [splits.raw[name].frame["time"].min() for name in ("val", "test")]
    parts = np.searchsorted(starts, frame["time"], side="right")
    classes = [None, "crime", "drama", "poetry", "travel"]
    encoded = [splits.train.rows, splits.encoded["val"], splits.encoded["test"]]
    lasting = 0
    for number, rows in enumerate(encoded):
        own = frame[parts == number]
        tuples = list(own[["user_id", "time", "genre", "click"]].itertuples(index=False, name=None))
        got = [None if np.isnan(x) else classes[int(x)] for x in rows.labels[:, 2].tolist()]
        assert got == naive(tuples)
        lasting += got.count(None)
    assert lasting >= 3 * 30  # the end of almost every user's log, in each split
    # Nothing that the later splits hold changes a label of the training split.
    changed = frame.assign(genre=frame["genre"].where(parts == 0, "drama"), click=frame["click"].where(parts == 0, 1))
    changed.to_parquet(tmp_path / "log.parquet")
    _, again = split_of(run)
    assert np.array_equal(again.train.rows.labels[:, 2], splits.train.rows.labels[:, 2], equal_nan=True)
    # Other rows that are evaluated have labels among themselves.
    rows = preprocessor.encode(Rows(log(40, seed=3)[preprocessor.columns(statistics=False)]))
    assert np.isfinite(rows.labels[:, 2]).any()
    assert preprocessor.encode(Rows(log(5).drop(columns="click")), with_labels=False).labels.isnan().all()


def test_prepared_labels_are_the_same(tmp_path):
    run = run_in(tmp_path)
    _, direct = split_of(run)
    prepare_files(run, tmp_path / "p", lambda _: None)
    ready = load_run(tmp_path / "p" / "run.yaml")
    assert ready.next_labels[0].prepared
    _, prepared = split_of(ready)
    assert np.array_equal(direct.train.rows.labels, prepared.train.rows.labels, equal_nan=True)
    ready.data.stream = True
    _, streamed = split_of(ready)
    assert streamed.train.rows_per_epoch == len(direct.train.rows)
    ready.next_labels[0].prepared, ready.statistics = False, []
    with pytest.raises(ConfigError, match="next_labels cannot be found in a stream: run `mtcl prepare` first"):
        split_of(ready)


def test_yaml_reads_back_and_refuses_what_does_not_fit():
    run = parse_run(WITH)
    assert parse_run(dump_run(run)).next_labels == run.next_labels
    for old, new, part in (
        ("column: next_genre,", "column: next_gnre,", "no task has the label 'next_gnre' (did you mean 'next_genre'?)"),
        ("of: genre,", "of: next_genre,", "would be the label of its own row"),
        ("- {name: genre, ", "- {name: x, group: item, column: next_genre}\n    - {name: genre, ", "feature 'x' reads"),
        ("where: click}", "wher: click}", "unknown key 'next_labels.0.wher'"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_run(WITH.replace(old, new, 1))
        assert part in str(caught.value)


def test_a_prepared_label_that_is_not_there_and_a_missing_column_are_named(tmp_path):
    with pytest.raises(DataError, match="no column 'tag'"):
        next_label(Rows(frame_of([(1, 1, 1, 1)]).drop(columns="tag")), CONFIG, by="user", time="t")
    run = run_in(tmp_path)
    run.next_labels[0].prepared = True
    with pytest.raises(DataError, match="no column 'next_genre'"):
        split_of(run)


# ---------------------------------------------------------------- returns_within


def returns_reference(user, time, window):
    """By the sequence of each user and the last moment of the data."""
    label = []
    for i in range(len(user)):
        after = [
            (time[j], j) for j in range(len(user))
            if user[j] == user[i] and (time[j], j) > (time[i], i)
        ]  # fmt: skip
        if after and min(after)[0] - time[i] <= window:
            label.append(1.0)
        else:
            label.append(NAN if time[i] + window > max(time) else 0.0)
    return label


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(-40, 40)), min_size=1, max_size=20),
    window=st.integers(0, 30),
)
def test_returns_equal_a_loop_over_each_users_rows(rows, window):
    user, time = (np.array(c) for c in zip(*rows, strict=True))
    np.testing.assert_array_equal(returns_within(user, time, window), returns_reference(user, time, window))


def test_a_return_is_unknown_only_where_the_data_ends_inside_the_window():
    # All times before 0: the end of the data is the last row and not 0.
    got = returns_within(np.array(["a", "b", "b"]), np.array([-100, -90, -95]), window=10)
    np.testing.assert_array_equal(got, [0.0, NAN, 1.0])


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.float32])
def test_returns_do_not_overflow_in_small_kinds(kind):
    time = np.array([0, 120, 125]) if kind != np.int8 else np.array([-120, 100, 125])
    user = np.array([1, 1, 2])
    got = returns_within(user, time.astype(kind), window=60)
    np.testing.assert_array_equal(got, [0.0, NAN, NAN])


def test_each_split_is_labelled_by_itself():
    user, time = np.array([1, 1]), np.array([0, 5])
    both = returns_within(user, time, window=3)
    alone = returns_within(user[:1], time[:1], window=3)
    np.testing.assert_array_equal(both, [0.0, NAN])
    np.testing.assert_array_equal(alone, [NAN])


def test_a_missing_user_has_no_return_a_missing_time_is_refused_and_no_rows_are_fine():
    user = np.array(["a", None, None, "a"], dtype=object)
    got = returns_within(user, np.array([0, 1, 2, 50]), window=5)
    np.testing.assert_array_equal(got, [0.0, NAN, NAN, NAN])
    with pytest.raises(DataError, match="row 1: the time is missing"):
        returns_within(np.array([1, 1]), np.array([0.0, NAN]), window=5)
    assert returns_within(np.array([]), np.array([]), window=5).shape == (0,)
