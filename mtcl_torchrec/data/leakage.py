"""How well the values of a single column tell an event: what tells it almost by itself is often known only afterwards
(Kaufman et al., Leakage in data mining, TKDD 2012)."""

from __future__ import annotations

import numpy as np
import pandas as pd

ALMOST = 0.95  # AUC from which on a column tells an event almost by itself
FEWEST = 10  # events, and rows without, in each half: of fewer, even a high AUC may be chance
MOST_ROWS = 50_000  # that are looked at
_BINS, _ROWS_A_BIN = 200, 20  # of numbers
_BLOCKS = 20  # of neighbouring events, or of rows without, that stay in one half
_SMOOTHING = 2.0  # rows at the base rate that are added to those of a value


def some_rows(count: int, most: int = MOST_ROWS) -> np.ndarray:
    """(n,) int64 positions of at most so many rows, spread evenly.

    Example:
        >>> some_rows(10, 4).tolist(), some_rows(3).tolist()
        ([0, 3, 6, 9], [0, 1, 2])
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def codes_of_numbers(values: np.ndarray) -> np.ndarray:
    """(N,) int64: the bin of each number, with equally many rows in each as far as ties let it; few distinct numbers
    have a bin each, what is missing (NaN) too.

    Example:
        >>> codes_of_numbers(np.array([0.5, 7.0, np.nan, 0.5])).tolist()
        [1, 2, 0, 1]
    """
    missing = np.isnan(values)
    known = values[~missing]
    codes = np.zeros(len(values), np.int64)
    edges = np.unique(known)
    bins = min(_BINS, len(known) // _ROWS_A_BIN)
    if len(edges) > _BINS:
        edges = np.unique(np.quantile(known, np.arange(1, max(bins, 2)) / max(bins, 2)))
    codes[~missing] = 1 + np.searchsorted(edges, known)  # a number that is an edge stands below it, with no larger one
    return codes


def codes_of_column(column: pd.Series, separator: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """A column's values as numbers from 0, and how many each row has; None where each has one.

    Args:
        column: numbers, anything that has a text, or lists of it.
        separator: between the parts of texts that are lists.

    Example:
        >>> codes, lengths = codes_of_column(pd.Series(["a|b", "b", None]), "|")
        >>> codes.tolist(), lengths.tolist()
        ([0, 1, 1], [2, 1, 0])
    """
    if separator is not None:
        column = column.map(lambda text: text.split(separator), na_action="ignore")
    lists = column.map(lambda value: hasattr(value, "__len__") and not isinstance(value, str))
    if lists.any():
        parts = [list(value) if has else [] for value, has in zip(column, lists, strict=True)]
        flat = pd.Series([str(part) for of_row in parts for part in of_row], dtype=object)
        return pd.factorize(flat)[0].astype(np.int64), np.array([len(of_row) for of_row in parts], np.int64)
    if pd.api.types.is_float_dtype(column) or (pd.api.types.is_numeric_dtype(column) and column.nunique() > 1000):
        return codes_of_numbers(column.to_numpy(dtype=np.float64, na_value=np.nan)), None
    return pd.factorize(column, use_na_sentinel=False)[0].astype(np.int64), None


def above_median(values: np.ndarray) -> np.ndarray:
    """(N,) 1 where a number is above the median (where none is, at it), 0 where not, NaN where it is missing.

    Example:
        >>> above_median(np.array([3.0, 1.0, np.nan, 2.0])).tolist()
        [1.0, 0.0, nan, 0.0]
    """
    known = ~np.isnan(values)
    if not known.any():
        return values
    median = np.median(values[known])
    above = values > median if (values[known] > median).any() else values >= median
    return np.where(known, above, np.nan)


def auc_alone(event: np.ndarray, codes: np.ndarray, lengths: np.ndarray | None = None) -> float:
    """The AUC of telling an event by one column: each half of the rows by what its values meant in the other half.

    A value stands for its smoothed log-odds, a list for the sum of those of its values (naive Bayes).

    Args:
        event: (N,) 0 or 1, NaN where not known.
        codes: values as integers from 0, row after row.
        lengths: (N,) values of each row; None where each has one.

    Returns:
        NaN where a half has too few events, or too few rows without.

    Example:
        >>> event = np.tile([0.0, 1.0, 0.0], 100)
        >>> auc_alone(event, np.tile([5, 2, 5], 100)), auc_alone(event, np.zeros(300, np.int64))
        (1.0, 0.5)
    """
    rows = np.arange(len(event)) if lengths is None else np.repeat(np.arange(len(event)), lengths)
    half = np.full(len(event), -1)
    # In blocks: the rows of one request would else be in both halves, and its id would tell what is one to them.
    for value in (0, 1):
        those = np.flatnonzero(event == value)
        half[those] = np.arange(len(those)) * _blocks(len(those)) // max(len(those), 1) % 2
    found = []
    for learn in (0, 1):
        judged = event[half == 1 - learn]
        if min(judged.sum(), len(judged) - judged.sum()) < FEWEST:
            return float("nan")
        here = half[rows] == learn
        rate, size = event[half == learn].mean(), int(codes.max(initial=-1)) + 1
        seen = np.bincount(codes[here], minlength=size)
        came = np.bincount(codes[here], event[rows[here]], minlength=size)
        share = (came + _SMOOTHING * rate) / (seen + _SMOOTHING)
        odds = np.log(share / (1 - share)) - np.log(rate / (1 - rate))
        score = np.bincount(rows, odds[codes], minlength=len(event)).round(9)  # sums of equal parts are equal
        ranks, events = pd.Series(score[half == 1 - learn]).rank().to_numpy(), judged.sum()
        pairs = events * (len(judged) - events)
        found.append(float((ranks[judged > 0].sum() - events * (events + 1) / 2) / pairs))  # Mann and Whitney's U
    return sum(found) / 2


def _blocks(count: int) -> int:
    """How many blocks of at least `FEWEST` there are, so that twice as many are enough for both halves."""
    return min(_BLOCKS, max(2, count // FEWEST))
