"""Curves as few points: ROC, precision and recall, and reliability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

MOST_POINTS = 120  # of a curve: more is not seen
BINS = 12  # of a reliability diagram


def _known(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    known = ~np.isnan(labels) & np.isfinite(scores)
    y, s = labels[known] > 0, scores[known]
    return (y, s) if y.any() and not y.all() else None


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a curve, evenly along its length, the ends among them.

    Args:
        x, y: (N,).

    Example:
        >>> x, y = thinned(np.linspace(0, 1, 1001), np.zeros(1001), most=3)
        >>> x.tolist()
        [0.0, 0.5, 1.0]
    """
    if len(x) <= most:
        return x, y
    along = np.r_[0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))]
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)))
    return x[kept], y[kept]


def roc_points(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates, thinned; None where only one class is there.

    Args:
        labels: (N,) 0 or 1, NaN where missing.
        scores: (N,).
    """
    if (found := _known(labels, scores)) is None:
        return None
    false_rate, true_rate, _ = roc_curve(*found)
    return thinned(false_rate, true_rate)


def precision_recall_points(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Recall and precision, thinned; None where only one class is there.

    The first rows say little of precision: points of fewer than ten events are left out, where there are that many.
    """
    if (found := _known(labels, scores)) is None:
        return None
    precision, recall, _ = precision_recall_curve(*found)
    events = recall * found[0].sum()
    kept = events >= min(10, 0.2 * found[0].sum())
    return thinned(recall[kept][::-1], precision[kept][::-1])


def point_at(labels: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[float, float, float] | None:
    """False positive rate, recall and precision of what lies at or above a threshold; None where one is not defined.

    Example:
        >>> point_at(np.array([0.0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9]), 0.5)
        (0.5, 0.5, 0.5)
    """
    if (found := _known(labels, scores)) is None:
        return None
    y, taken = found[0], found[1] >= threshold
    if not taken.any():
        return None
    return float(taken[~y].mean()), float(taken[y].mean()), float(y[taken].mean())


@dataclass(frozen=True)
class Reliability:
    """What was predicted and what happened, by bins that hold equally many rows.

    Args:
        predicted, happened, error: (K,) means, and the standard error of what happened.
    """

    predicted: np.ndarray
    happened: np.ndarray
    error: np.ndarray


def reliability(labels: np.ndarray, predicted: np.ndarray, bins: int = BINS) -> Reliability | None:
    """Bins of equal mass; rows of one prediction are never cut apart.

    Args:
        labels: (N,) NaN where missing.
        predicted: (N,), or (N, C) class probabilities: the most probable class and whether it was the right one.

    Returns:
        None where no label is present.

    Example:
        >>> r = reliability(np.array([0.0, 1, 1, 1]), np.array([0.2, 0.2, 0.8, 0.8]), bins=2)
        >>> r.predicted.tolist(), r.happened.tolist()
        ([0.2, 0.8], [0.5, 1.0])
    """
    if predicted.ndim == 2:
        right = np.where(np.isnan(labels), np.nan, (predicted.argmax(1) == labels).astype(float))
        labels, predicted = right, predicted.max(1)
    known = ~np.isnan(labels) & np.isfinite(predicted)
    y, p = labels[known].astype(np.float64), predicted[known].astype(np.float64)
    if not len(y):
        return None
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins))
    number = np.unique(np.searchsorted(edges, p, side="right"), return_inverse=True)[1]
    rows = np.bincount(number)
    happened = np.bincount(number, y) / rows
    spread = np.maximum(np.bincount(number, y**2) / rows - happened**2, 0)
    return Reliability(np.bincount(number, p) / rows, happened, np.sqrt(spread / rows))
