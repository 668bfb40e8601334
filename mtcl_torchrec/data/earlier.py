"""What rows have seen before, as spans of events that all rows share, so that N rows of up to M events need no N · M
values; before anything is encoded.

The events of each user lie one after the other in order of time.  What a row has seen before is then where its part of
them starts and how long it is; its values are put together when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa


def log_buckets(seconds: np.ndarray, size: int) -> np.ndarray:
    """(M,) int64: ⌊log₂(1 + s)⌋ + 1 of each age s, at most ``size - 1``; 0 where it is missing.

    Args:
        seconds: (M,) at least 0, or NaN.  Only whole seconds count, so that a bucket begins at exactly 2ᵏ - 1.
        size: rows of the table.

    Example:
        >>> log_buckets(np.array([0.0, 0.9, 1.0, 6.99, 7.0, 1e12, np.nan]), 34).tolist()
        [1, 1, 2, 3, 4, 33, 0]
    """
    exponent = np.frexp(np.floor(seconds) + 1.0)[1]  # of x = m · 2ᵉ with m in [1/2, 1): ⌊log₂ x⌋ = e - 1, exactly
    return np.where(np.isnan(seconds), 0, np.minimum(exponent, size - 1)).astype(np.int64)


@dataclass(frozen=True)
class Earlier:
    """One column of lists: what N rows see of E events.

    Args:
        starts: (N,) int64, the first event that a row sees.
        lengths: (N,) int32, how many.
        codes: (E,) int32, which of `values` an event has, -1 where it has none; or None, where the list is of ages.
        values: the different values.
        owner: (E,) the row that an event was, for messages; None where it is not among these rows.
        ages: the times from which ages follow.
    """

    starts: np.ndarray
    lengths: np.ndarray
    codes: np.ndarray | None = None
    values: pd.Series | None = None
    owner: np.ndarray | None = None
    ages: Ages | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, rows: np.ndarray) -> Earlier:
        """Some rows, by number or mask."""
        ages = None if self.ages is None else replace(self.ages, now=self.ages.now[rows])
        return replace(self, starts=self.starts[rows], lengths=self.lengths[rows], ages=ages, owner=None)

    def newest(self, most: int) -> Earlier:
        """The last so many events of each row."""
        cut = np.maximum(self.lengths - most, 0)
        return replace(self, starts=self.starts + cut, lengths=self.lengths - cut) if cut.any() else self

    def events(self) -> pd.Series:
        """The value of every event that has one."""
        assert self.values is not None
        return self.values.iloc[self.coded[self.coded >= 0]]

    def first_owner(self) -> np.ndarray:
        """(V,) the row that each of `values` stands in first, 0 where that is not known."""
        assert self.values is not None
        first = np.zeros(len(self.values), np.int64)
        if self.owner is not None:
            there = np.flatnonzero(self.coded >= 0)[::-1]
            first[self.coded[there]] = self.owner[there]
        return first

    @property
    def coded(self) -> np.ndarray:
        """`codes`, of a list that is not of ages."""
        assert self.codes is not None
        return self.codes

    def lists(self, start: int, stop: int, *, exact: bool = False) -> pa.ListArray:
        """The rows from `start` to `stop` (not included) as Arrow lists; ages in whole seconds, or exact."""
        lengths = self.lengths[start:stop].astype(np.int64)
        ends = lengths.cumsum()
        at = np.repeat(self.starts[start:stop] - (ends - lengths), lengths) + np.arange(lengths.sum())
        offsets = pa.array(np.r_[0, ends].astype(np.int32))
        if self.ages is not None:
            rows = np.repeat(np.arange(start, stop), lengths)
            ages = self.ages.seconds(rows, at) if exact else self.ages.whole_seconds(rows, at).astype(np.int64)
            return pa.ListArray.from_arrays(offsets, pa.array(ages))
        assert self.values is not None
        return pa.ListArray.from_arrays(offsets, decoded(self.values, self.coded[at]))

    def in_parts(self, rows: int) -> Iterator[pa.ListArray]:
        """All rows as `lists`, so many at once."""
        for start in range(0, len(self), rows):
            yield self.lists(start, min(start + rows, len(self)))


def decoded(values: pd.Series, codes: np.ndarray) -> pa.Array:
    """(M,) the value of each code, null for -1."""
    return pa.array(values, from_pandas=True).take(pa.array(codes, mask=codes < 0))


@dataclass(frozen=True)
class Ages:
    """How long before a row an event was.

    Args:
        times: (E,) int64 or float64.
        now: (N,) the time of each row.
        per_second: how much of it a second is.
    """

    times: np.ndarray
    now: np.ndarray
    per_second: int

    def seconds(self, rows: np.ndarray, events: np.ndarray) -> np.ndarray:
        """(M,) float64: from each of M events to the row that sees it."""
        return (self.now[rows] - self.times[events]) / self.per_second

    def whole_seconds(self, rows: np.ndarray, events: np.ndarray) -> np.ndarray:
        """(M,) float64: from each of M events to the row that sees it, rounded down."""
        return np.floor_divide(self.now[rows] - self.times[events], self.per_second).astype(np.float64)
