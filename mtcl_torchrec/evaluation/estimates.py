"""How sure a metric is without drawing anything: standard errors over users by what each user adds, and those of
differences on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mtcl_torchrec.evaluation.metrics import as_float64, log_losses
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranking import auc_by_request


@dataclass(frozen=True)
class Estimate:
    """A metric and what each cluster of rows adds to its error.

    Args:
        value: the metric; NaN where it is not defined.
        influence: (C,) of each cluster (user), summing to about 0: the metric's change where it is weighed up.
    """

    value: float
    influence: np.ndarray = field(repr=False)

    @property
    def error(self) -> float:
        """Standard error, clustered: rows of one user may be as alike as they please."""
        return _error(self.influence)

    def minus(self, other: Estimate, *, paired: bool = True) -> tuple[float, float]:
        """The difference and its standard error.

        Args:
            paired: both are of the same rows, in one order.
        """
        if paired:
            return self.value - other.value, _error(self.influence - other.influence)
        return self.value - other.value, math.hypot(self.error, other.error)


def _error(influence: np.ndarray) -> float:
    count = len(influence)
    if count < 2 or not np.isfinite(influence).all():
        return math.nan
    return float(np.sqrt(count / (count - 1) * (influence**2).sum()))


def clusters_of(users: np.ndarray | None, rows: int) -> np.ndarray:
    """(N,) int64 cluster of each row: its user; a row of no known user, and without users each row, is alone.

    Example:
        >>> clusters_of(np.array(["a", None, "a", None], dtype=object), 4)
        array([0, 1, 0, 2])
    """
    if users is None:
        return np.arange(rows)
    codes = pd.factorize(np.asarray(users))[0].astype(np.int64)
    lone = np.flatnonzero(codes < 0)
    codes[lone] = codes.max(initial=-1) + 1 + np.arange(len(lone))
    return codes


def auc_estimate(labels: np.ndarray, scores: np.ndarray, clusters: np.ndarray, count: int | None = None) -> Estimate:
    """AUC with the error of clustered rows (Obuchowski, *Nonparametric analysis of clustered ROC curve data*, 1997;
    with each row alone: DeLong, DeLong and Clarke-Pearson, 1988).

    Args:
        labels: (N,) 0 or 1, NaN where missing.
        scores: (N,); ties count half.
        clusters: (N,) from `clusters_of`.
        count: C, how many clusters there are; by default the largest and one.

    Example:
        >>> e = auc_estimate(np.array([0.0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9]), np.arange(4))
        >>> e.value, round(e.error, 4)
        (0.75, 0.2887)
    """
    count = int(clusters.max(initial=-1)) + 1 if count is None else count
    known = ~np.isnan(labels)
    y, s, c = labels[known] > 0, scores[known].astype(np.float64), clusters[known]
    positives, negatives = int(y.sum()), int((~y).sum())
    if not positives or not negatives:
        return Estimate(math.nan, np.full(count, math.nan))
    ranks, beaten = _ranks(s), np.empty(len(y))
    beaten[y] = (ranks[y] - _ranks(s[y])) / negatives
    beaten[~y] = 1 - (ranks[~y] - _ranks(s[~y])) / positives
    value = float(beaten[y].mean())
    influence = (beaten - value) / np.where(y, positives, negatives)
    return Estimate(value, np.bincount(c, influence, count))


def _ranks(values: np.ndarray) -> np.ndarray:
    return pd.Series(values).rank().to_numpy()  # ties share their mean


def gauc_estimate(labels: np.ndarray, scores: np.ndarray, clusters: np.ndarray, count: int | None = None) -> Estimate:
    """GAUC, the mean AUC within clusters weighted by their rows, with the error of a ratio of sums over them.

    Args:
        labels, scores, clusters, count: as of `auc_estimate`; clusters of one class say nothing and are left out.
    """
    count = int(clusters.max(initial=-1)) + 1 if count is None else count
    aucs, rows = auc_by_request(clusters.astype(np.int64), scores, labels)
    both = np.flatnonzero(~np.isnan(aucs))
    if not len(both):
        return Estimate(math.nan, np.full(count, math.nan))
    value = float(np.average(aucs[both], weights=rows[both]))
    influence = np.zeros(count)
    influence[both] = rows[both] * (aucs[both] - value) / rows[both].sum()
    return Estimate(value, influence)


def chance_error(count: float, base_rate: float) -> float:
    """Standard error of an AUC from its numbers of rows alone, as of an AUC of ½ (Mann and Whitney, 1947).

    Example:
        >>> round(chance_error(1000, 0.5), 4)
        0.0183
    """
    positives = count * base_rate
    negatives = count - positives
    return math.sqrt((count + 1) / (12 * positives * negatives)) if positives > 0 and negatives > 0 else math.nan


def ratio_estimate(
    above: np.ndarray, below: np.ndarray, clusters: np.ndarray, count: int | None = None, *, less_than_one: bool = False
) -> Estimate:
    """A ratio of sums over rows, Σ above / Σ below, or 1 less it, with the error of clustered rows (delta method).

    Args:
        above, below: (N,), NaN where a row does not count.
        clusters, count: as of `auc_estimate`.

    Example:
        >>> e = ratio_estimate(np.array([1.0, 2, 3]), np.ones(3), np.arange(3))
        >>> e.value, round(e.error, 4)
        (2.0, 0.5774)
    """
    count = int(clusters.max(initial=-1)) + 1 if count is None else count
    known = ~(np.isnan(above) | np.isnan(below))
    a, b, c = above[known].astype(np.float64), below[known].astype(np.float64), clusters[known]
    total = float(b.sum())
    if total == 0:
        return Estimate(math.nan, np.full(count, math.nan))
    ratio = float(a.sum()) / total
    influence = np.bincount(c, a - ratio * b, count) / total
    return Estimate(1 - ratio, -influence) if less_than_one else Estimate(ratio, influence)


def task_estimates(
    table: PredictionsTable, name: str, clusters: np.ndarray, count: int | None = None
) -> dict[str, Estimate]:
    """What a task is judged by first, each with its error.

    Args:
        name: of a task, or a conditional prediction, that there are predictions of.
        clusters, count: as of `auc_estimate`, for the rows of the table.

    Returns:
        binary: auc, gauc (where users are known), ne, calibration.  multiclass: ne, top1.  regression: r2, mae,
            calibration.  Nothing without labels.
    """
    kind, y, p = table.task(name).kind, table.labels(name), table.predicted(name)
    known = ~np.isnan(y)
    if not known.any():
        return {}
    count = int(clusters.max(initial=-1)) + 1 if count is None else count
    y, p, c = y[known], as_float64(p[known]), clusters[known]
    if kind == "regression":
        r2 = ratio_estimate((p - y) ** 2, (y - y.mean()) ** 2, c, count, less_than_one=True)
        mae = ratio_estimate(np.abs(p - y), np.ones(len(y)), c, count)
        return {"r2": r2, "mae": mae, "calibration": ratio_estimate(p, y, c, count)}
    if kind == "multiclass":
        classes = y.astype(np.int64)
        own = p[np.arange(len(p)), classes]
        shares = np.bincount(classes, minlength=p.shape[1]) / len(y)
        hits = ((p >= own[:, None]).sum(1) <= 1).astype(np.float64)
        return {"ne": ratio_estimate(log_losses(y, p), -np.log(shares[classes]), c, count),
                "top1": ratio_estimate(hits, np.ones(len(y)), c, count)}  # fmt: skip
    tiny = np.finfo(np.float64).eps
    base = float(np.clip(y.mean(), tiny, 1 - tiny))
    found = {
        "auc": auc_estimate(y, p, c, count),
        # The entropy of the base rate is the mean of -log of what it gives to what happened.
        "ne": ratio_estimate(log_losses(y, p), -np.log(np.where(y > 0, base, 1 - base)), c, count),
        "calibration": ratio_estimate(p, y, c, count),
    }
    if table.users is not None and not np.isnan(table.users).all():
        of_users = np.where(np.isnan(table.users[known]), np.nan, y)
        found["gauc"] = gauc_estimate(of_users, p, c, count)
    return found
