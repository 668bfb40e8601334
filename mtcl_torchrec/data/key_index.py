"""The distinct values of a key, numbered, so that what is counted for each is a row of an array."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from mtcl_torchrec.schema import DataError


class KeyIndex:
    """Numbers the K distinct values of one key (one or several columns) that the training split has.

    Args:
        columns: of the key.
        levels: the distinct values of each column.
        combined: (K,) int64, sorted: the code of each value of the key, which counts its place among the levels in
            mixed radix.

    Example:
        >>> log = pd.DataFrame({"user": ["a", "a", "b"], "tag": [7, 9, 7]})
        >>> index = KeyIndex.fit(["user", "tag"], log)
        >>> index.lookup(pd.DataFrame({"user": ["b", "a", "b"], "tag": [7, 9, 9]})).tolist()
        [2, 1, -1]
    """

    def __init__(self, columns: Sequence[str], levels: list[pd.Index], combined: np.ndarray) -> None:
        self.columns, self.levels, self.combined = list(columns), levels, combined

    @classmethod
    def fit(cls, columns: Sequence[str], frame: pd.DataFrame) -> KeyIndex:
        """The index of the rows of the training split; rows in which a part of the key is missing have none.

        Raises:
            DataError: a column that is no key, or more combinations than an int64 can tell apart.
        """
        for column in columns:
            if pd.api.types.infer_dtype(frame[column], skipna=True).startswith("mixed"):
                raise DataError(f"statistics.keys: column {column!r} must hold one kind of single values")
        levels = [pd.Index(frame[c].dropna().unique()) for c in columns]
        if math.prod(map(len, levels)) > np.iinfo(np.int64).max:
            raise DataError(f"statistics.keys: {' × '.join(columns)} has too many combinations")
        index = cls(columns, levels, np.empty(0, np.int64))
        index.combined = np.unique(index.part(frame, columns))
        index.combined = index.combined[index.combined >= 0]
        return index

    def part(self, frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
        """What some of the columns add to the code of each row's key (N,) int64; -1 where a value is unknown."""
        code = np.zeros(len(frame), np.int64)
        known = np.ones(len(frame), bool)
        step = 1
        for column, level in reversed(list(zip(self.columns, self.levels, strict=True))):
            if column in columns:
                here = level.get_indexer(pd.Index(frame[column]))
                known &= here >= 0
                code += here * step
            step *= len(level)
        return np.where(known, code, -1)

    def find(self, code: np.ndarray) -> np.ndarray:
        """(N,) number of the key of each code, -1 where training has never seen it.

        Args:
            code: (N,) int64, the sum of all columns' parts, or a negative number.
        """
        if not len(self.combined):
            return np.full(len(code), -1)
        at = np.searchsorted(self.combined, code)
        at[at == len(self.combined)] = 0
        return np.where(self.combined[at] == code, at, -1)  # a negative code is none of them

    def lookup(self, frame: pd.DataFrame) -> np.ndarray:
        """(N,) number of each row's key, -1 where training has never seen it."""
        return self.find(self.part(frame, self.columns))

    def frame(self) -> pd.DataFrame:
        """One row for each key: its columns' values, in numbering order."""
        rest, parts = self.combined.copy(), {}
        for column, level in reversed(list(zip(self.columns, self.levels, strict=True))):
            parts[column] = level.take(rest % len(level))
            rest //= len(level)
        return pd.DataFrame({c: parts[c] for c in self.columns})
