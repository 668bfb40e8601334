"""What one pass over the training split learns: value counts, means and spreads, which labels there are.

The pass may see the rows in any number of parts, on any number of ranks; the parts are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch.distributed as dist

from mtcl_torchrec.data.columns import canonical, column_of, dense_values, ids_of
from mtcl_torchrec.data.labels import label_of, unmasked
from mtcl_torchrec.data.list_histories import listed_values
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.stream import in_order
from mtcl_torchrec.data.vocabulary import ValueCounts
from mtcl_torchrec.schema import DataError, Feature, Schema, Task

# What is learnt from: the part of the split that a window holds.
P_contra = TypeVar("P_contra", contravariant=True)
P_co = TypeVar("P_co", covariant=True)


class Summary(Protocol[P_contra]):
    """What is learnt part by part, and merged."""

    @property
    def complete(self) -> bool:
        """Whether more parts could teach nothing."""

    def add(self, part: P_contra, /) -> None:
        """Learn from a part."""

    def merge(self, other: Any, /) -> None:
        """Learn what `other`, of the same kind, learnt from other parts."""


class Parts(Protocol[P_co]):
    """Windows of a split and how they are read, such as `mtcl_torchrec.data.parquet.ParquetFiles`."""

    def windows(self) -> Sequence[Any]:
        """All windows, the same on every rank."""

    def read(self, window: Any, /) -> P_co:
        """A window's part.  Called on several threads."""


S = TypeVar("S", bound=Summary[Any])


@dataclass
class Moments:
    """Mean and variance of the values that are present; merged after Chan, Golub and LeVeque (1983).

    Example:
        >>> parts = Moments.of(np.array([1.0, 2.0])).merge(Moments.of(np.array([6.0, np.nan])))
        >>> parts.count, parts.missing, parts.mean, round(parts.scale()[1] ** 2, 6)
        (3, 1, 3.0, 4.666667)
    """

    count: int = 0
    missing: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of the values in (N,) float64; NaN is missing."""
        missing = int(np.count_nonzero(np.isnan(values)))
        if missing == len(values):
            return cls(missing=missing)
        return cls(len(values) - missing, missing, float(np.nanmean(values)), float(np.nanvar(values)))

    def merge(self, other: Moments) -> Moments:
        """Of the values of both."""
        count, missing = self.count + other.count, self.missing + other.missing
        if not self.count or not other.count:
            some = self if self.count else other
            return Moments(count, missing, some.mean, some.variance)
        share, apart = other.count / count, other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * apart * apart
        return Moments(count, missing, self.mean + share * apart, variance)

    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation; a constant has no spread, whatever its rounding error, and gets 1."""
        std = float(np.sqrt(self.variance))
        rounding = self.count * np.finfo(np.float64).eps * abs(self.mean)
        return self.mean, std if std > max(rounding, np.finfo(np.float64).tiny) else 1.0


class SplitSummary:
    """What a `FeatureEncoder` learns from the training split.

    Args:
        schema: features and tasks.
        dense: the dense features whose scale is to be learnt; the default is all of them.

    Example:
        >>> import pandas as pd
        >>> schema = Schema(features=[Feature(name="city", group="user")], tasks=[Task.binary("click")])
        >>> summary = SplitSummary(schema)
        >>> summary.columns(), summary.complete
        (['city', 'click'], False)
        >>> summary.add(Rows(pd.DataFrame({"city": ["Rome"], "click": [None]})))
        >>> summary.check("x.parquet")
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.DataError: x.parquet: label column 'click' holds no value at all
    """

    def __init__(self, schema: Schema, dense: Sequence[Feature] | None = None) -> None:
        # A history lists values of an id feature, which has them all.
        self._sparse = [f for f in schema.sparse_features if f.learns_values and f.of is None]
        self._dense = list(schema.dense_features if dense is None else dense)
        self._tasks = schema.tasks
        self.counts = {f.name: ValueCounts() for f in self._sparse}
        self.dense = {f.name: Moments() for f in self._dense}
        self.labels = {t.name: Moments() for t in self._tasks}

    def columns(self) -> list[str]:
        """The columns that `add` reads."""
        columns = [f.rows_from for f in (*self._sparse, *self._dense)]
        columns += [c for t in self._tasks for c in (t.label_column, t.mask) if c]
        return list(dict.fromkeys(columns))

    @property
    def complete(self) -> bool:
        """Whether more rows could teach nothing: only labels were looked for, and all are there."""
        regression = any(t.kind == "regression" for t in self._tasks)
        return not self._sparse and not self._dense and not regression and all(m.count for m in self.labels.values())

    def add(self, rows: Rows) -> None:
        """Learn from some rows of the split.

        Raises:
            DataError: a column is missing or does not hold what the schema says.
        """
        for feature in self._sparse:
            if feature.kind in ("bag", "history"):
                values = listed_values(feature, rows)
            else:
                values = ids_of(rows, feature.rows_from)
            self.counts[feature.name].add(values)
        for feature in self._dense:
            self.dense[feature.name] = self.dense[feature.name].merge(Moments.of(dense_values(feature, rows)))
        for task in self._tasks:
            self.labels[task.name] = self.labels[task.name].merge(_label_moments(rows, task))

    def merge(self, other: SplitSummary) -> None:
        """Learn what `other` learnt from other rows of the split."""
        for name, counts in other.counts.items():
            self.counts[name].merge(counts)
        self.dense = {name: moments.merge(other.dense[name]) for name, moments in self.dense.items()}
        self.labels = {name: moments.merge(other.labels[name]) for name, moments in self.labels.items()}

    def check(self, name: str) -> None:
        """Make sure that each dense column and each label has a value somewhere.

        Args:
            name: of the split, for the message.

        Raises:
            DataError: one has none.
        """
        for feature in self._dense:
            if not self.dense[feature.name].count:
                raise DataError(f"{name}: dense column {feature.rows_from!r} holds no value at all")
        for task in self._tasks:
            if not self.labels[task.name].count:
                where = f" where {task.mask!r} is true" if task.mask else " at all"
                raise DataError(f"{name}: label column {task.label_column!r} holds no value{where}")


def _label_moments(rows: Rows, task: Task) -> Moments:
    if task.item_class is None:
        return Moments.of(label_of(rows, task))
    present = canonical(column_of(rows, task.label_column)).notna().to_numpy(dtype=bool) & unmasked(rows, task)
    return Moments(int(present.sum()), int((~present).sum()))


def summarise(summary: S, source: Parts[Any], workers: int = 1, progress: Callable[[float], None] | None = None) -> S:
    """Learn from all rows of a source; each rank of the process group reads its part, and all get the whole.

    Args:
        summary: of no rows yet.
        source: of what the summary learns from.
        workers: threads that read ahead.
        progress: called with the share of this rank's part that is read.

    Raises:
        DataError: what a rank found wrong, on every rank, so that none is left waiting.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    windows = source.windows()[rank::world_size]
    reads = (partial(source.read, window) for window in windows)
    wrong: DataError | None = None
    try:
        with closing(in_order(reads, workers)) as parts:
            for done, part in enumerate(parts, start=1):
                summary.add(part)
                if progress is not None:
                    progress(done / len(windows))
                if summary.complete:
                    break
                del part
    except DataError as error:
        wrong = error
    if world_size > 1:
        return _merged_over_ranks(summary, wrong)
    if wrong is not None:
        raise wrong
    return summary


def _merged_over_ranks(summary: S, wrong: DataError | None) -> S:
    whole: S | None = None
    for rank in range(dist.get_world_size()):  # one after the other: no rank ever holds more than two of them
        mine = (summary, None if wrong is None else str(wrong)) if rank == dist.get_rank() else None
        box: list[Any] = [mine]
        dist.broadcast_object_list(box, src=rank)
        part, error = box[0]
        if error is not None:
            raise DataError(error)
        if whole is None:
            whole = part
        else:
            whole.merge(part)
    assert whole is not None
    return whole
