"""What an item usually gets: the one popularity that rankings are held against."""

from __future__ import annotations

import pandas as pd

SMOOTHING = 20.0  # rows of the mean rate that each item is given besides its own


def smoothed_rates(events: pd.Series, rows: pd.Series, smoothing: float = SMOOTHING) -> pd.Series:
    """Item -> the share of its rows in which the event happened, of these rows and `smoothing` rows of the mean rate.

    A share, not a count: how often an item was shown says less of whether it is liked.

    Args:
        events: item -> rows with the event.
        rows: item -> all rows whose label is known.

    Example:
        >>> events, rows = pd.Series({"a": 9.0, "b": 1.0}), pd.Series({"a": 90.0, "b": 1.0})
        >>> smoothed_rates(events, rows, smoothing=1).round(3).tolist()
        [0.1, 0.555]
    """
    rows = rows.reindex(events.index).fillna(0.0)
    return (events + smoothing * mean_rate(events, rows)) / (rows + smoothing)


def mean_rate(events: pd.Series, rows: pd.Series) -> float:
    """Of all items: what one of which nothing is known gets.

    Example:
        >>> mean_rate(pd.Series([1.0, 0.0]), pd.Series([3.0, 1.0]))
        0.25
    """
    total = float(rows.sum())
    return float(events.sum()) / total if total else 0.0
