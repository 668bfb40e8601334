"""Vocabularies: which values have a row of their own in an embedding table, and which row a value has."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from mtcl_torchrec.data.columns import as_integers, as_text

# An index builds its hash table at the first look-up, and pandas does not promise that several threads may do so.
_first_lookup = threading.Lock()


class ValueCounts:
    """How often each value stands in a column: counted in parts that can be merged, in the memory of its values.

    Example:
        >>> counts = ValueCounts()
        >>> counts.add(pd.Series(["b", "a", "b", None]))
        >>> counts.add(pd.Series(["a", "b"]))
        >>> values, numbers = counts.total()
        >>> dict(zip(values, numbers.tolist()))
        {'b': 3, 'a': 2}
    """

    def __init__(self) -> None:
        self._parts: list[tuple[pd.Series, np.ndarray]] = []
        self._settled = 0  # values in the first part when it was last put together

    def add(self, values: pd.Series) -> None:
        """Count the values that are not missing."""
        counts = values.dropna().value_counts(sort=False)
        self._append(pd.Series(counts.index), counts.to_numpy(dtype=np.int64))

    def merge(self, other: ValueCounts) -> None:
        """Count what `other` counted, too."""
        for values, counts in other._parts:
            self._append(values, counts)

    def _append(self, values: pd.Series, counts: np.ndarray) -> None:
        if len(values):
            self._parts.append((values, counts))
        # Put together whenever there is as much new as old: each value is moved a few times in all.
        if sum(len(part) for part, _ in self._parts[1:]) > self._settled:
            self._parts = [_together(self._parts)]
            self._settled = len(self._parts[0][0])

    def total(self) -> tuple[pd.Series, np.ndarray]:
        """Each value once, in no order, and its count, int64."""
        if len(self._parts) != 1:
            self._parts = [_together(self._parts)]
        return self._parts[0]


def _together(parts: Sequence[tuple[pd.Series, np.ndarray]]) -> tuple[pd.Series, np.ndarray]:
    """Several counts as one.  Numbers and texts together become texts."""
    parts = [part for part in parts if len(part[0])]
    if not parts:
        return pd.Series([], dtype=object), np.zeros(0, np.int64)
    values = _of_one_kind([part for part, _ in parts])
    codes, once = pd.factorize(values)
    counts = np.zeros(len(once), np.int64)
    np.add.at(counts, codes, np.concatenate([part for _, part in parts]))
    return pd.Series(once), counts


def _of_one_kind(parts: Sequence[pd.Series]) -> pd.Series:
    if len({pd.api.types.is_numeric_dtype(part) for part in parts}) > 1:
        parts = [as_text(part) for part in parts]
    values = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    return as_text(values) if pd.api.types.infer_dtype(values, skipna=True).startswith("mixed") else values


def build_vocabulary(counts: Collection[ValueCounts], min_count: int) -> pd.Index:
    """The values that occur at least `min_count` times in all columns together, sorted."""
    values, numbers = _together([part.total() for part in counts])
    return _sorted(pd.Index(values[numbers >= min_count]))


def grow_vocabulary(old: pd.Index, counts: Collection[ValueCounts], min_count: int) -> pd.Index:
    """`old` with the new values that occur at least `min_count` times after it, sorted among themselves.

    Where one has numbers and the other texts, all become texts: a number finds its text again.

    Example:
        >>> counts = ValueCounts()
        >>> counts.add(pd.Series(["z", "b", "a"]))
        >>> grow_vocabulary(pd.Index(["b", "c"]), [counts], 1).tolist()
        ['b', 'c', 'a', 'z']
    """
    new = build_vocabulary(counts, min_count)
    if old.empty or new.empty:
        return new if old.empty else old
    if pd.api.types.is_numeric_dtype(old) != pd.api.types.is_numeric_dtype(new):
        old, new = (pd.Index(as_text(pd.Series(part)).astype(object)) for part in (old, new))
    return old.append(_sorted(new[old.get_indexer(new) < 0]))


def _sorted(values: pd.Index) -> pd.Index:
    if values.empty:
        return values
    if pd.api.types.is_integer_dtype(values):
        plain = np.sort(values.to_numpy(dtype=np.uint64 if values.dtype.kind == "u" else np.int64))
        return pd.Index(plain.astype(np.int64) if plain[-1] < 2**63 else plain)
    return pd.Index(sorted(values))


def table_rows(vocabulary: pd.Index, values: pd.Series) -> np.ndarray:
    """(N,) int64: the row of each value, counted from 1; 0 where it is missing or unknown.

    Args:
        values: text or numbers, whichever the vocabulary has: "12" finds 12, and 12 finds "12".

    Example:
        >>> table_rows(pd.Index([7, 12]), pd.Series(["12", "x", None])).tolist()
        [2, 0, 0]
    """
    found, missing = _like(values, vocabulary), None
    # In the very dtype of the vocabulary wherever that loses nothing: for any other, pandas builds a new hash table.
    whole = as_integers(found) if vocabulary.dtype == np.int64 else None
    if whole is not None:
        missing = found.isna().to_numpy(dtype=bool) if found.hasnans else None
        found = pd.Series(whole)
    elif found.dtype != vocabulary.dtype and _is_text(vocabulary):
        found = found.astype(vocabulary.dtype)
    wanted = pd.Index(found)
    with _first_lookup:
        vocabulary.get_indexer(vocabulary[:1])
    rows = vocabulary.get_indexer(wanted).astype(np.int64) + 1
    return rows if missing is None else np.where(missing, 0, rows)


def _like(values: pd.Series, vocabulary: pd.Index) -> pd.Series:
    """Values in the vocabulary's kind."""
    if pd.api.types.is_numeric_dtype(vocabulary.dtype):
        if pd.api.types.is_numeric_dtype(values):
            return values
        # Without the missing ones: beside them large integers would become inexact floats.
        present = pd.to_numeric(values[values.notna()], errors="coerce")
        return present.convert_dtypes().reindex(values.index)
    return as_text(values) if _is_text(vocabulary) else values


def _is_text(vocabulary: pd.Index) -> bool:
    return len(vocabulary) > 0 and isinstance(vocabulary[0], str)
