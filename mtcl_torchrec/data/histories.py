"""Histories from a raw log: what each user met before each row, in order of time, built without a copy for each row.

A row sees events with a *strictly earlier* time alone: never itself, never one of the same moment, never a later one.
As with the statistics, the events are those of the training split, for later rows too (validation, test, serving):
what a user does in the validation split is in no history until a run is trained on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mtcl_torchrec.config import HistoryConfig
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.columns import column_of, ids_of, numbers
from mtcl_torchrec.data.earlier import Ages, Earlier, decoded
from mtcl_torchrec.data.key_index import KeyIndex
from mtcl_torchrec.data.source import Rows, time_values, to_pandas
from mtcl_torchrec.schema import DataError, Feature, Schema

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
YEAR_2100 = 4_102_444_800  # in seconds since 1970
CHUNK = 1 << 20  # rows whose place among the events is looked for at once


def events_before(
    starts: np.ndarray,
    times: np.ndarray,
    group: np.ndarray,
    when: np.ndarray | None,
    *,
    same_moment: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Where the events that come before each row begin and end, among the events of its group.

    Args:
        starts: (G + 1,) int64, the first event of each group.
        times: (E,) ascending within each group.
        group: (N,) int64, -1 for a row of no group.
        when: (N,) the time of each row; None: after all events.
        same_moment: whether those of a row's own moment are among them.

    Returns:
        Begins and ends, (N,) int64 each; of a row without a group they are equal.

    Example:
        >>> events_before(np.array([0, 3]), np.array([1, 5, 5]), np.array([0, 0, -1]), np.array([5, 6, 6]))
        (array([0, 0, 0]), array([1, 3, 0]))
    """
    begin = np.where(group < 0, 0, starts[group])
    low, high = begin.copy(), np.where(group < 0, 0, starts[group + 1])
    if when is None:
        return begin, high
    for at in range(0, len(group), CHUNK):
        _bisect(times, low[at : at + CHUNK], high[at : at + CHUNK], when[at : at + CHUNK], same_moment)
    return begin, low


def _bisect(times: np.ndarray, low: np.ndarray, high: np.ndarray, when: np.ndarray, same_moment: bool) -> None:
    """In place: `low` becomes the first place below `high` whose time is not before `when`, or not at it either."""
    is_before = np.less_equal if same_moment else np.less
    while True:
        left = np.flatnonzero(low < high)
        if not len(left):
            return
        middle = (low[left] + high[left]) // 2
        before = is_before(times[middle], when[left])
        low[left[before]] = middle[before] + 1
        high[left[~before]] = middle[~before]


@dataclass(frozen=True)
class _Events:
    """E events, those of a key one after the other in order of time.

    Args:
        index: of the keys.
        starts: (K + 1,) the first event of each key.
        times: (E,).
        end: time of the last row of the log.
        timestamps: whether times are timestamps, in nanoseconds.
        codes, values: column -> (E,) int32 which of its different values each event has, -1 where it has none.
        owner: (E,) which row each was.
    """

    index: KeyIndex
    starts: np.ndarray
    times: np.ndarray
    end: int | float
    timestamps: bool
    codes: dict[str, np.ndarray]
    values: dict[str, pd.Series]
    owner: np.ndarray


class History:
    """One history and its companions, built from the log.

    Args:
        config: what an event is.
        schema: declares the history, its companions, and the id feature whose values it lists.

    Example:
        >>> from mtcl_torchrec.schema import Task
        >>> schema = Schema(
        ...     features=[
        ...         Feature(name="item", group="item"),
        ...         Feature(name="clicked", group="user", kind="history", of="item"),
        ...         Feature(name="age", group="user", kind="history", beside="clicked", encoding="log_bucket"),
        ...     ],
        ...     tasks=[Task.binary("click")], user="user", time="t",
        ... )
        >>> log = pd.DataFrame({"user": [1, 1, 1], "t": [0, 60, 60], "item": ["a", "b", "c"], "click": [1, 1, 0]})
        >>> history = History(HistoryConfig(feature="clicked", where=["click"]), schema)
        >>> seen = history.fit(Rows(log))
        >>> seen["clicked"].lists(0, 3).to_pylist(), seen["age"].lists(0, 3).to_pylist()
        ([[], ['a'], ['a']], [[], [60], [60]])
        >>> history.before(Rows(pd.DataFrame({"user": [1, 2]})))["clicked"].lists(0, 2).to_pylist()
        [['a', 'b'], []]
    """

    def __init__(self, config: HistoryConfig, schema: Schema) -> None:
        features = {f.name: f for f in schema.features}
        self.config, self.feature, self._schema = config, features[config.feature], schema
        by, time = config.by or schema.user, schema.time
        assert by is not None
        assert time is not None
        self.by, self.time, self.item = by, time, features[str(self.feature.of)].rows_from
        companions = schema.companions(self.feature.name)
        self.ages: list[Feature] = [f for f in companions if f.encoding == "log_bucket"]
        self._from: dict[str, str | list[str]] = {self.feature.rows_from: self.item}
        self._from |= {f.rows_from: config.beside[f.name] for f in companions if f not in self.ages}
        self._events: _Events | None = None

    def columns(self) -> list[str]:
        """The columns that are built."""
        return [*self._from, *(f.rows_from for f in self.ages)]

    def needs(self, *, events: bool = True) -> list[str]:
        """The columns that must be read.

        Args:
            events: True for rows that become events, False for rows that only see them.
        """
        if not events:
            return [self.by, self.time]
        sources = [[source] if isinstance(source, str) else source for source in self._from.values()]
        return list(dict.fromkeys([self.by, self.time, *self.config.where, *(c for s in sources for c in s)]))

    @property
    def _known(self) -> _Events:
        if self._events is None:
            raise RuntimeError("fit the training split first")
        return self._events

    @property
    def _per_second(self) -> int:
        return PER_SECOND["ns" if self._known.timestamps else self.config.time_unit or "s"]

    def doubtful_unit(self) -> str:
        """A line, where ages follow from numbers that are no seconds of this century; else empty."""
        if not self.ages or self._known.timestamps or self.config.time_unit is not None or self._known.end <= YEAR_2100:
            return ""
        return (
            f"histories of {self.feature.name!r}: {self.time} = {self._known.end:,} is taken as seconds, which lies "
            "beyond the year 2100: say histories.time_unit: ms (or us, ns)"
        )

    # ------------------------------------------------------------------ learning from the training split

    def fit(self, rows: Rows) -> dict[str, Earlier]:
        """Take the events of the training split, and what each of its rows sees of them.

        A row is an event where its key, its item and its time are known and one of `where` is above 0.  Events of one
        moment stay in the order of the rows.

        Raises:
            DataError: a column is missing, or does not hold what it should.
        """
        index = KeyIndex.fit([self.by], rows.frame)
        when, known, timestamps = self._times(rows)
        group = np.where(known, index.lookup(rows.frame), -1)
        columns = {column: self._coded(rows, source) for column, source in self._from.items()}
        is_event = (group >= 0) & (columns[self.feature.rows_from][0] >= 0)
        if self.config.where:
            is_event &= np.logical_or.reduce([positive(rows, column) for column in self.config.where])
        order = np.flatnonzero(is_event)
        order = order[np.lexsort((when[order], group[order]))]
        self._events = _Events(
            index=index,
            starts=np.r_[0, np.bincount(group[order], minlength=len(index.combined)).cumsum()],
            times=when[order],
            end=when[known].max().item() if known.any() else 0,
            timestamps=timestamps,
            codes={column: codes[order] for column, (codes, _) in columns.items()},
            values={column: values for column, (_, values) in columns.items()},
            owner=order,
        )
        return self._seen_by(group, when, order)

    def _coded(self, rows: Rows, source: str | list[str]) -> tuple[np.ndarray, pd.Series]:
        """Which of its different values each row has, (N,) int32, -1 for none, and these values."""
        if isinstance(source, str):
            codes, values = pd.factorize(ids_of(rows, source))
            return codes.astype(np.int32), pd.Series(values)
        kinds = np.zeros(len(rows), np.int32)
        for number, column in reversed(list(enumerate(source, start=1))):
            kinds[positive(rows, column)] = number
        return kinds, pd.Series(np.arange(len(source) + 1))

    def _times(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, bool]:
        """See `moments`."""
        when, known, timestamps = moments(rows, self.time)
        if timestamps and self.config.time_unit is not None:
            raise DataError(f"{rows.name}: column {self.time!r} holds timestamps: histories.time_unit is for numbers")
        if self._events is not None and known.any() and timestamps != self._events.timestamps:
            one, other = ("timestamps", "numbers") if timestamps else ("numbers", "timestamps")
            raise DataError(f"{rows.name}: column {self.time!r} holds {one}, and {other} in the training split")
        return when, known, timestamps

    # ------------------------------------------------------------------ what rows see

    def before(self, rows: Rows) -> dict[str, Earlier]:
        """What rows of any split see of the events of the training split.

        Args:
            rows: with the key, and the time; without a time column they come after all events, and ages end where the
                log does.
        """
        group = self._known.index.lookup(rows.frame)
        if self.time not in rows.frame:
            return self._seen_by(group, None, None)
        when, known, _ = self._times(rows)
        return self._seen_by(np.where(known, group, -1), when, None)

    def _seen_by(self, group: np.ndarray, when: np.ndarray | None, owner: np.ndarray | None) -> dict[str, Earlier]:
        events = self._known
        begin, end = events_before(events.starts, events.times, group, when)
        lengths = np.minimum(end - begin, self.feature.max_length)
        starts, lengths = end - lengths, lengths.astype(np.int32)
        seen = {c: Earlier(starts, lengths, codes, events.values[c], owner) for c, codes in events.codes.items()}
        now = np.full(len(group), events.end) if when is None else when
        ages = Ages(events.times, now, self._per_second)
        return seen | {f.rows_from: Earlier(starts, lengths, ages=ages) for f in self.ages}

    def complete(self, catalogue: Catalogue, log: Rows) -> None:
        """Give the users of a catalogue their lists as of the end of a log, in place.

        Ages are in seconds before the log's last row, whose time becomes the context's usual one.

        Args:
            log: with the columns of `needs`; its rows may be more than the training split.
        """
        whole = History(self.config, self._schema)
        whole.fit(log)
        for column, earlier in whole.before(Rows(catalogue.users[[self.by]])).items():
            catalogue.users[column] = earlier.lists(0, len(catalogue.users), exact=True).to_pandas()
        if self.ages:
            catalogue.end = (
                str(pd.Timestamp(whole._known.end, tz="UTC")) if whole._known.timestamps else whole._known.end
            )
            catalogue.context.setdefault(self.time, catalogue.end)

    def seconds_after(self, end: Any, when: Any) -> float:
        """From the end of a log to a time, both as a catalogue's context has them.

        Raises:
            DataError: `when` is no time of the log's kind.
        """
        try:
            if self._known.timestamps:
                return (pd.to_datetime(when, utc=True) - pd.to_datetime(end, utc=True)).total_seconds()
            seconds = (float(when) - end) / self._per_second
        except (ValueError, TypeError) as error:
            raise DataError(f"context {self.time} = {when!r} is no time ({error})") from None
        if not np.isfinite(seconds):
            raise DataError(f"context {self.time} = {when!r} is no time")
        return seconds

    # ------------------------------------------------------------------ stored with the model

    def save(self, folder: Path) -> None:
        """Write the newest events of each key as Parquet, and what describes them as JSON.

        What is read back knows no older ones: a row from the middle of the training split would see less.
        """
        folder.mkdir(parents=True, exist_ok=True)
        events = self._known
        kept = _newest(events.starts, self.feature.max_length)
        group = np.repeat(np.arange(len(events.starts) - 1), np.diff(events.starts))[kept]
        columns = {"key": pa.array(events.index.frame()[self.by].iloc[group], from_pandas=True)}
        columns["time"] = pa.array(events.times[kept])
        columns |= {f"event:{c}": decoded(events.values[c], codes[kept]) for c, codes in events.codes.items()}
        pq.write_table(pa.table(columns), folder / "events.parquet")
        about = {"end": events.end, "timestamps": events.timestamps, "columns": list(events.codes)}
        (folder / "history.json").write_text(json.dumps(about, indent=1))

    def load(self, folder: Path) -> History:
        """Read what `save` wrote."""
        about = json.loads((folder / "history.json").read_text())
        table = to_pandas(pq.read_table(folder / "events.parquet"))
        of_key = table[["key"]].rename(columns={"key": self.by})
        index = KeyIndex.fit([self.by], of_key)
        group = index.lookup(of_key)
        order = np.lexsort((np.arange(len(table)), group))
        coded = {c: self._coded(Rows(table), f"event:{c}") for c in about["columns"]}
        self._events = _Events(
            index=index,
            starts=np.r_[0, np.bincount(group, minlength=len(index.combined)).cumsum()],
            times=table["time"].to_numpy()[order],
            end=about["end"],
            timestamps=about["timestamps"],
            codes={column: codes[order] for column, (codes, _) in coded.items()},
            values={column: values for column, (_, values) in coded.items()},
            owner=order,
        )
        return self


def moments(rows: Rows, column: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """(N,) the rows' times, (N,) bool where they are known, and whether they are timestamps, in nanoseconds."""
    values = column_of(rows, column)
    known = values.notna().to_numpy(dtype=bool)
    there = time_values(rows.frame if known.all() else rows.frame[known], column, rows)
    when = np.zeros(len(values), there.dtype)
    when[known] = there
    return when, known, not pd.api.types.is_numeric_dtype(values) and bool(known.any())


def positive(rows: Rows, column: str, what: str = "histories") -> np.ndarray:
    """(N,) bool: where a column of numbers is above 0; a missing one is not."""
    return np.nan_to_num(numbers(rows, column, what)) > 0


def _newest(starts: np.ndarray, most: int) -> np.ndarray:
    """Which events are among the last so many of their key."""
    left = np.repeat(starts[1:], np.diff(starts)) - np.arange(starts[-1])
    return np.flatnonzero(left <= most)
