"""Histories from a log: what each row sees, and that it never sees the future."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.config import HistoryConfig
from mtcl_torchrec.data.histories import History
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, Feature, Schema, Task

MOST = 3


def schema_of(**item):
    def beside(name, **more):
        return Feature(name=name, group="user", kind="history", beside="seen", embedding_dim=4, **more)

    return Schema(
        features=[
            Feature(name="user", group="user", embedding_dim=4),
            Feature(name="item", group="item", embedding_dim=4, **item),
            Feature(name="seen", group="user", kind="history", of="item", max_length=MOST),
            beside("kinds", encoding="index", vocabulary_size=3),
            beside("tags"),
            beside("ages", encoding="log_bucket"),
        ],
        tasks=[Task.binary("click")],
        user="user",
        item="item",
        time="t",
    )


CONFIG = HistoryConfig(feature="seen", where=["click", "like"], beside={"kinds": ["like", "click"], "tags": "tag"})
COLUMNS = ("seen", "kinds", "tags", "ages")


def lists_of(earlier):
    return {column: part.lists(0, len(part)).to_pylist() for column, part in earlier.items()}


def naive(events, rows, *, most=MOST):
    """What each of `rows` sees of `events`, by a loop; both are tuples (user, t, item, click, like, tag)."""
    found = {column: [] for column in COLUMNS}
    for user, now, *_ in rows:
        past = [
            (t, item, like, tag)
            for other, t, item, click, like, tag in events
            if None not in (user, now, other, t, item) and other == user and t < now and (click == 1 or like == 1)
        ]
        past = sorted(past, key=lambda e: e[0])[-most:]  # stable: of one moment, in the order of the rows
        found["seen"].append([item for _, item, _, _ in past])
        found["kinds"].append([1 if like == 1 else 2 for _, _, like, _ in past])
        found["tags"].append([tag for *_, tag in past])
        found["ages"].append([now - t for t, *_ in past])
    return found


def tuples(frame):
    return list(frame[["user", "t", "item", "click", "like", "tag"]].itertuples(index=False, name=None))


def maybe(values):
    return st.one_of(values, st.none())


ROW = st.tuples(
    maybe(st.integers(1, 3)), maybe(st.integers(0, 6)), maybe(st.sampled_from("abc")), st.sampled_from([0, 1, None]),
    st.sampled_from([0, 1]), maybe(st.sampled_from(["x", "y"])),
)  # fmt: skip


def frame_of(rows):
    frame = pd.DataFrame(rows, columns=["user", "t", "item", "click", "like", "tag"])
    return frame.astype({"user": "Int64", "t": "Int64", "click": "Int64", "item": object, "tag": object})


@settings(max_examples=40, deadline=None)
@given(train=st.lists(ROW, min_size=1, max_size=14), later=st.lists(ROW, max_size=4))
def test_histories_are_those_of_a_loop(train, later):
    history = History(CONFIG, schema_of())
    assert lists_of(history.fit(Rows(frame_of(train)))) == naive(train, train)
    assert lists_of(history.before(Rows(frame_of(later)))) == naive(train, later)


def random_rows(draw, n):
    def some(values):
        return [None if draw.random() < 0.1 else v for v in draw.choice(values, n).tolist()]

    columns = some([1, 2, 3]), some(range(7)), some(list("abc")), some([0, 1]), some([0, 1]), some(["x", "y"])
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_what_happens_at_a_rows_time_or_later_changes_nothing_of_it(seed):
    draw = np.random.default_rng(seed)
    rows, others, at = random_rows(draw, 30), random_rows(draw, 30), int(draw.integers(0, 7))
    changed = [
        # The row stays whose it is and when it was; all that it says may change.
        row if row[1] is None or row[1] < at else (*row[:2], *other[2:])
        for row, other in zip(rows, others, strict=True)
    ]
    before, after = (lists_of(History(CONFIG, schema_of()).fit(Rows(frame_of(r)))) for r in (rows, changed))
    early = [i for i, row in enumerate(rows) if row[1] is None or row[1] <= at]
    for column in COLUMNS:
        assert [before[column][i] for i in early] == [after[column][i] for i in early]
    more = [*rows, *((user, at, *rest) for user, _, *rest in others)]
    after = lists_of(History(CONFIG, schema_of()).fit(Rows(frame_of(more))))
    for column in COLUMNS:
        assert [before[column][i] for i in early] == [after[column][i] for i in early]


def log(n=400, seed=0):
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user": draw.integers(1, 12, n),
            "t": np.sort(draw.integers(0, 200, n)),
            "item": [f"p{i}" for i in draw.integers(0, 30, n)],
            "click": draw.integers(0, 2, n),
            "like": draw.integers(0, 2, n),
            "tag": [f"g{i}" for i in draw.integers(0, 5, n)],
        }
    )


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (lambda t: t.astype(float), None),
        (lambda t: t * 1000, "ms"),
        (lambda t: pd.to_datetime(t, unit="s"), None),
        (lambda t: pd.to_datetime(t, unit="s", utc=True), None),
        (lambda t: pd.to_datetime(t, unit="s").astype(str), None),
    ],
)
def test_ages_are_seconds_whatever_the_time_is_written_in(times, unit):
    plain = log()
    other = plain.assign(t=times(plain["t"]))
    one = lists_of(History(CONFIG, schema_of()).fit(Rows(plain)))
    assert lists_of(History(CONFIG.model_copy(update={"time_unit": unit}), schema_of()).fit(Rows(other))) == one


@pytest.mark.parametrize("wrong", [np.inf, -np.inf])
def test_a_time_without_end_is_refused(wrong):
    frame = log(4).assign(t=[1.0, 2.0, wrong, 3.0])
    with pytest.raises(DataError, match="row 2: time 't' is infinite"):
        History(CONFIG, schema_of()).fit(Rows(frame))


def test_missing_timestamps_lose_no_nanosecond():
    start = pd.Timestamp("2024-05-01").value
    frame = log(3).assign(user=1, click=1, t=pd.to_datetime([start + 1, start + 2, None]))
    seen = lists_of(History(CONFIG, schema_of()).fit(Rows(frame)))["seen"]
    assert seen == [[], [frame["item"][0]], []]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"t": pd.to_datetime(["2024-01-01"] * 3)}, "holds timestamps, and numbers in the training split"),
        ({"t": ["2024-01-01", "2024-01-02", None]}, "holds timestamps, and numbers in the training split"),
    ],
)
def test_times_of_another_kind_than_in_training_are_refused(change, part):
    history = History(CONFIG, schema_of())
    history.fit(Rows(log()))
    with pytest.raises(DataError, match=part):
        history.before(Rows(log(3).assign(**change)))


@pytest.mark.parametrize(
    ("factor", "unit", "doubted"),
    [(1, None, False), (1000, None, True), (1000, "ms", False), (10**9, None, True)],
)
def test_seconds_beyond_2100_are_doubted(factor, unit, doubted):
    history = History(CONFIG.model_copy(update={"time_unit": unit}), schema_of())
    history.fit(Rows(log(5).assign(t=lambda frame: (1_742_000_000 + frame["t"]) * factor)))
    said = history.doubtful_unit()
    assert ("say histories.time_unit: ms" in said) == doubted == bool(said)


def test_a_time_unit_is_for_numbers_and_events_are_numbers():
    history = History(CONFIG.model_copy(update={"time_unit": "ms"}), schema_of())
    with pytest.raises(DataError, match="time_unit is for numbers"):
        history.fit(Rows(log(3).assign(t=pd.to_datetime(["2024-01-01"] * 3))))
    with pytest.raises(DataError, match=r"row 0: click = 'yes' is no number \(histories\)"):
        History(CONFIG, schema_of()).fit(Rows(log(3).assign(click=["yes", "no", "no"])))


# ---------------------------------------------------------------------- encoded


def batch_lists(rows, feature):
    jagged = rows.batch(torch.arange(len(rows))).sparse_features[feature]
    return [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]


def test_encoded_spans_hold_what_the_lists_would(tmp_path):
    train, later = log(300), log(80, seed=1).assign(t=250)
    preprocessor = Preprocessor(schema_of(), (), [CONFIG])
    built = preprocessor.fit(Rows(train))
    assert set(preprocessor.columns()) == {"user", "t", "item", "click", "like", "tag"}
    assert set(preprocessor.columns(statistics=False)) == {"user", "t", "item", "click"}
    for rows, got in ((train, built), (later, preprocessor.encode(Rows(later)))):
        lists = naive(tuples(train), tuples(rows))
        given = preprocessor.encoder.encode(Rows(rows.assign(**{c: pd.Series(v) for c, v in lists.items()})))
        for feature in COLUMNS:
            assert batch_lists(got, feature) == batch_lists(given, feature)
            some = torch.tensor([7, 3, 3])
            assert torch.equal(got.batch(some).sparse_features.values(), given.batch(some).sparse_features.values())
            assert torch.equal(got.slice(5, 9).batch().sparse_features.values(),
                               given.slice(5, 9).batch().sparse_features.values())  # fmt: skip
    preprocessor.save(tmp_path)
    again = Preprocessor.load(tmp_path, schema_of(), (), [CONFIG])
    one, other = (p.encode(Rows(later)) for p in (preprocessor, again))
    for feature in COLUMNS:
        assert batch_lists(one, feature) == batch_lists(other, feature)


def test_a_companion_beyond_its_table_names_the_row_of_the_event():
    schema = schema_of()
    tags = schema.features[4].model_copy(update={"encoding": "index", "vocabulary_size": 5})
    schema = schema.model_copy(update={"features": (*schema.features[:4], tags, schema.features[5])})
    frame = log(20).assign(tag=[1] * 17 + [9] * 3, click=1)
    with pytest.raises(DataError, match=r"x.parquet, row 17: tags = 9 lies outside its table of 5 rows"):
        Preprocessor(schema, (), [CONFIG]).fit(Rows(frame, ("x.parquet",), (0,)))


def test_no_event_at_all_and_no_time_at_all():
    quiet, timeless = log(5).assign(click=0, like=0), log(5).assign(t=None)
    for frame in (quiet, timeless):
        history = History(CONFIG, schema_of())
        assert lists_of(history.fit(Rows(frame))) == {c: [[]] * 5 for c in COLUMNS}
        assert lists_of(history.before(Rows(log(3)))) == {c: [[]] * 3 for c in COLUMNS}


def test_rows_without_a_time_column_come_after_the_log():
    history = History(CONFIG, schema_of())
    frame = log(60)
    history.fit(Rows(frame))
    rows = frame[["user"]].drop_duplicates()
    asked = [(user, frame["t"].max() + 0.5, *[None] * 4) for user in rows["user"]]
    wanted = naive(tuples(frame), asked)
    wanted["ages"] = [[int(age) for age in ages] for ages in wanted["ages"]]  # half a second more than to the end
    assert lists_of(history.before(Rows(rows))) == wanted
