"""What the user does next, as a label: from the same split alone, so that no label of one tells of another.

A content task that predicts the category of the row's own item can read the answer off the item.  One that predicts the
category of the item that the user turns to *next*, or clicks next, cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mtcl_torchrec.config import NextLabelConfig
from mtcl_torchrec.data.columns import canonical, ids_of
from mtcl_torchrec.data.histories import events_before, moments, positive
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, Schema


def next_label(rows: Rows, config: NextLabelConfig, *, by: str, time: str) -> pd.Series:
    """(N,) the value that `config.of` has in the next row of the same user, missing where there is none.

    The next row is that of the first later moment at which one of `config.where` is above 0, and of several rows of
    that moment the first.  Rows of the row's own moment are not later.  A row without a user or a time has no next one.

    Args:
        rows: of one split.
        by: the user column.
        time: the time column.

    Raises:
        DataError: a column is missing or does not hold what it should.

    Example:
        >>> log = pd.DataFrame({"user": [1, 1, 1, 2], "t": [1, 2, 3, 1], "tag": [*"abcd"], "click": [1, 0, 1, 1]})
        >>> config = NextLabelConfig(column="next_tag", of="tag", where=["click"])
        >>> next_label(Rows(log), config, by="user", time="t").tolist()
        ['c', 'c', nan, nan]
    """
    when, known, _ = moments(rows, time)
    group = np.where(known, pd.factorize(ids_of(rows, by))[0], -1)
    counts = group >= 0
    if config.where:
        counts &= np.logical_or.reduce([positive(rows, column, "next_labels") for column in config.where])
    order = np.flatnonzero(counts)
    order = order[np.lexsort((when[order], group[order]))]
    starts = np.r_[0, np.bincount(group[order], minlength=group.max(initial=-1) + 1).cumsum()]
    _, at = events_before(starts, when[order], group, when, same_moment=True)
    there = (group >= 0) & (at < starts[group + 1])
    found = np.full(len(rows), -1)
    found[there] = order[at[there]]
    values = canonical(ids_of(rows, config.of))
    if values.dtype.kind in "iu" and isinstance(values.dtype, np.dtype):
        values = values.astype("UInt64" if values.dtype.kind == "u" else "Int64")  # which can be missing
    return pd.Series(values.array.take(found, allow_fill=True), index=rows.frame.index)


def returns_within(user: np.ndarray, time: np.ndarray, window: float) -> np.ndarray:
    """1.0 where the user's next row comes within `window`, 0.0 where not, NaN where the data ends too early to tell.

    Only the rows given are looked at: call it once per split and no label knows of another split.

    Args:
        user: (N,) keys; the rows of one user are one sequence.  A missing user's label is NaN.
        time: (N,) in any order, in the unit of `window`.

    Raises:
        DataError: a time is missing.

    Example:
        >>> returns_within(np.array([7, 7, 7, 8]), np.array([0, 5, 100, 0]), window=10)
        array([ 1.,  0., nan,  0.])
    """
    codes = pd.factorize(user)[0]
    time = np.asarray(time)
    # Small or unsigned integers would overflow in a difference.
    time = time.astype(np.int64 if time.dtype.kind in "biu" else np.float64)
    if np.isnan(time).any():
        raise DataError(f"row {int(np.argmax(np.isnan(time)))}: the time is missing")
    order = np.lexsort((time, codes))
    u, t = codes[order], time[order]
    gap = np.full(len(t), np.inf)
    if len(t) > 1:
        gap[:-1] = np.where(u[1:] == u[:-1], t[1:] - t[:-1], np.inf)
    label = (gap <= window).astype(np.float64)
    if len(t):
        label[(label == 0) & (t + window > t.max())] = np.nan
    label[u < 0] = np.nan
    result = np.empty(len(t))
    result[order] = label
    return result


def with_next_labels(rows: Rows, blocks: Sequence[NextLabelConfig], schema: Schema) -> Rows:
    """The rows of one split with the labels that are not there yet.

    Raises:
        DataError: a column is missing or does not hold what it should.
    """
    missing = [block for block in blocks if block.column not in rows.frame]
    prepared = next((block.column for block in missing if block.prepared), None)
    if prepared is not None:
        raise DataError(f"{rows.name}: no column {prepared!r}, which was prepared")
    labels = {b.column: next_label(rows, b, by=b.by or str(schema.user), time=str(schema.time)) for b in missing}
    return rows.with_frame(rows.frame.assign(**labels)) if labels else rows
