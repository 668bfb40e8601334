"""Histories that the data has as columns of lists: taken apart, checked against each other, and cut to the newest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import members
from mtcl_torchrec.data.columns import column_of, shown, split_bag
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, Feature, Schema


@dataclass(frozen=True)
class Listed:
    """The values of N lists, one list after the other.

    Args:
        values: of all lists.
        lengths: (N,) int64.
    """

    values: pd.Series
    lengths: np.ndarray

    @cached_property
    def owner(self) -> np.ndarray:
        """The list that each value belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def newest(self, most: int) -> Listed:
        """The last so many values of each list.

        Example:
            >>> cut = Listed(pd.Series([1, 2, 3, 4]), np.array([3, 0, 1])).newest(2)
            >>> cut.values.tolist(), cut.lengths.tolist()
            ([2, 3, 4], [2, 0, 1])
        """
        if len(self.lengths) == 0 or self.lengths.max() <= most:
            return self
        lengths = np.minimum(self.lengths, most)
        kept = members(torch.from_numpy(self.lengths.cumsum() - lengths), torch.from_numpy(lengths)).numpy()
        return Listed(self.values.iloc[kept].reset_index(drop=True), lengths)


def listed_histories(rows: Rows, schema: Schema) -> dict[str, Listed]:
    """The values of every history and companion of a schema.

    A missing list is an empty one; a missing value within a list stays there, as an unknown one.

    Raises:
        DataError: a column is missing, or a companion's list is not as long as the history's in its row.
    """
    lists = {f.name: Listed(*split_bag(f, column_of(rows, f.rows_from))) for f in schema.history_features}
    for feature in schema.history_features:
        if feature.beside in lists:
            own, main = lists[feature.name].lengths, lists[feature.beside].lengths
            if (own != main).any():
                at = int(np.argmax(own != main))
                raise DataError(
                    f"{rows.locate(at)}: {feature.rows_from} holds {own[at]} values beside {main[at]} of "
                    f"{feature.beside!r}; a companion says one thing of each event"
                )
    return lists


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


def age_rows(feature: Feature, listed: Listed, rows: Rows, size: int) -> np.ndarray:
    """Rows of a table for the ages that a column has.

    Raises:
        DataError: one is no number, infinite, or negative: the event would lie in the row's future.
    """
    seconds = pd.to_numeric(listed.values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    missing = listed.values.isna().to_numpy(dtype=bool)
    wrong = ~missing & ~((seconds >= 0) & np.isfinite(seconds))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(
            f"{rows.locate(int(listed.owner[at]))}: {feature.rows_from} = {shown(listed.values, at)}; an age is the "
            "seconds from an event to the row, a number of at least 0"
        )
    return log_buckets(seconds, size)
