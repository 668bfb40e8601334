"""Histories that the data has as columns of lists: taken apart, checked against each other, and cut to the newest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.columns import column_of, shown, split_bag
from mtcl_torchrec.data.earlier import Earlier, log_buckets
from mtcl_torchrec.data.jagged import members
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


def listed_histories(rows: Rows, schema: Schema) -> dict[str, Listed | Earlier]:
    """The values of every history and companion of a schema, cut to the newest.

    A missing list is an empty one; a missing value within a list stays there, as an unknown one.

    Raises:
        DataError: a column is missing, or a companion's list is not as long as the history's in its row.
    """
    lists = {f.name: _lists(f, rows) for f in schema.history_features}
    for feature in schema.history_features:
        if feature.beside in lists:
            own, main = lists[feature.name].lengths, lists[feature.beside].lengths
            if (own != main).any():
                at = int(np.argmax(own != main))
                raise DataError(
                    f"{rows.locate(at)}: {feature.rows_from} holds {own[at]} values beside {main[at]} of "
                    f"{feature.beside!r}; a companion says one thing of each event"
                )
    return {f.name: lists[f.name].newest(f.max_length) for f in schema.history_features}


def _lists(feature: Feature, rows: Rows) -> Listed | Earlier:
    built = rows.earlier.get(feature.rows_from)
    return Listed(*split_bag(feature, column_of(rows, feature.rows_from))) if built is None else built


def listed_values(feature: Feature, rows: Rows) -> pd.Series:
    """The values of all lists of a bag or history, or of a built history those of all its events."""
    built = rows.earlier.get(feature.rows_from)
    return split_bag(feature, column_of(rows, feature.rows_from))[0] if built is None else built.events()


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
