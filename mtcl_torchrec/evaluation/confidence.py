"""How sure a number is, as it is said: one meaning of ±, and when nothing can be sure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

SURE = 1.96  # standard errors on either side of a 95 % interval
FEWEST = 20  # events, and rows without: of fewer, standard errors are too small, and nothing is sure
PLUS_MINUS = "± is half of a 95 % interval, over users"
TOO_FEW = "too few events"


def too_little(labels: np.ndarray, clusters: np.ndarray) -> str:
    """Why a metric of an event cannot be sure, in a few words; empty where it can.

    Args:
        labels: (N,) 0 or 1, NaN where missing.
        clusters: (N,) whose rows are drawn together, such as the user's.

    Example:
        >>> too_little(np.array([1.0, 0.0, 0.0]), np.array([0, 1, 2]))
        'too few events (1)'
        >>> too_little(np.tile([1.0, 0.0], 50), np.zeros(100))
        'a single user'
    """
    known = ~np.isnan(labels)
    events, others = int((labels[known] > 0).sum()), int((labels[known] <= 0).sum())
    if events < FEWEST:
        return f"{TOO_FEW} ({events:,})"
    if others < FEWEST:
        return f"too few rows without the event ({others:,})"
    return "a single user" if len(np.unique(clusters[known])) < 2 else ""


def too_few_to_judge(metrics: Mapping[str, float | None]) -> str:
    """Why a task cannot be judged by its metrics on a split, in a few words, from how many labels they are of; empty
    where it can.  The same bounds as `too_little`.

    Args:
        metrics: as of `mtcl_torchrec.evaluation.metrics.task_metrics`; None and NaN alike are what is not defined.

    Example:
        >>> too_few_to_judge({"auc": 0.7, "count": 6196.0, "base_rate": 15 / 6196})
        '15 events'
        >>> too_few_to_judge({"auc": 0.7, "count": 6196.0, "base_rate": 0.3}), too_few_to_judge({"count": 0.0})
        ('', 'no label')
    """
    count = metrics.get("count")
    if count is None:
        return ""
    if count == 0:
        return "no label"
    if "auc" in metrics and "r2" not in metrics:  # of a binary task
        events = round(count * (metrics.get("base_rate") or 0.0))
        others = round(count) - events
        if events < FEWEST:
            return _number(events, "event", "no event")
        return "" if others >= FEWEST else _number(others, "row without it", "no row without it", "rows without it")
    if count < FEWEST:
        return _number(round(count), "label", "no label")
    known = [value for name in ("r2", "ne") if (value := metrics.get(name)) is not None and math.isfinite(value)]
    return "" if known else "one label throughout"


def _number(count: int, one: str, none: str, several: str = "") -> str:
    if count == 0:
        return none
    return f"1 {one}" if count == 1 else f"{count} {several or f'{one}s'}"


def clipped(low: float, high: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """An interval that does not pass the metric's own bounds.

    Example:
        >>> clipped(0.9, 1.02, (0.0, 1.0))
        (0.9, 1.0)
    """
    return max(low, bounds[0]), min(high, bounds[1])


def plain_number(value: float | None, digits: int = 4) -> str:
    """A number; a dash where it is not defined, and no −0.

    Example:
        >>> plain_number(0.12345), plain_number(None), plain_number(-1e-9, 2)
        ('0.1235', '–', '0.00')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:z,.{digits}f}".replace("-", "−")


def plus_minus(
    value: float | None, half: float | None, digits: int = 4, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> str:
    """A number and half of its 95 % interval; where that would pass the metric's bounds, the interval's ends.

    Args:
        half: of the interval; None or NaN where it is not known.

    Example:
        >>> plus_minus(0.7, 0.0196), plus_minus(0.99, 0.03, 2, (0.0, 1.0)), plus_minus(-1e-9, 1e-9)
        ('0.7000 ± 0.0196', '0.99 (0.96 to 1.00)', '0.0000 ± <0.0001')
    """
    said = plain_number(value, digits)
    if value is None or half is None or not math.isfinite(value) or not math.isfinite(half) or half == 0:
        return said
    if value - half < bounds[0] or value + half > bounds[1]:
        low, high = clipped(value - half, value + half, bounds)
        return f"{said} ({plain_number(low, digits)} to {plain_number(high, digits)})"
    smallest = 10.0**-digits
    return f"{said} ± " + (plain_number(half, digits) if half >= smallest / 2 else f"<{smallest:.{digits}f}")
