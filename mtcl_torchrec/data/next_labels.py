"""What the user turns to next, as a label: from the same split alone, so that no label of one tells of another.

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
