"""Final metrics of predictions: scikit-learn's where it has them; AUC of all rows and within groups here."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss

from mtcl_torchrec.schema import Task

Metrics = dict[str, float]


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; NaN where only one class is there.

    Example:
        >>> auc(np.array([0, 1, 1]), np.array([0.1, 0.4, 0.3]))
        1.0
    """
    if len(labels) == 0 or labels.min() == labels.max():
        return float("nan")
    return float(_areas(labels, scores, np.zeros(len(labels)))[0][0])


def gauc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float:
    """AUC within each group, averaged with the group's number of rows as weight (Zhou et al., KDD 2018, eq. 7).

    Groups of one class say nothing and are left out.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) any order-preserving score; ties count half.
        groups: (N,) keys, such as the user; rows whose group is missing (NaN) are left out.

    Returns:
        The weighted mean, NaN where no group has both classes.

    Example:
        >>> gauc(np.array([0, 1, 1, 0, 1]), np.array([0.1, 0.2, 0.1, 0.9, 0.8]), np.array([1, 1, 2, 3, 3]))
        0.5
    """
    known = ~pd.isna(groups)
    areas, rows = _areas(labels[known], scores[known], groups[known])
    both = ~np.isnan(areas)
    return float(np.average(areas[both], weights=rows[both])) if both.any() else float("nan")


def _areas(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G,) AUC of each group, by the sum of the positives' ranks; NaN where it has one class; and (G,) its rows.

    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    groups = pd.factorize(groups)[0]
    order = np.lexsort((scores, groups))
    positive, score, group = labels[order].astype(np.float64), scores[order], groups[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))  # row of each group
    same = (group[1:] == group[:-1]) & (score[1:] == score[:-1])
    ties = np.flatnonzero(np.r_[True, ~same][: len(order)])  # row where each block of equal scores starts
    size = np.diff(ties, append=len(order))
    rank = np.repeat(ties + (size + 1) / 2, size) - first[group]  # of equal scores the mean, from 1 within the group
    rows = np.diff(first, append=len(order)).astype(np.float64)
    if not len(first):
        return rows, rows
    positives = np.add.reduceat(positive, first)
    above = np.add.reduceat(rank * positive, first) - positives * (positives + 1) / 2
    with np.errstate(invalid="ignore"):
        return above / (positives * (rows - positives)), rows


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def task_metrics(task: Task, labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None = None) -> Metrics:
    """Metrics of one task over the rows whose label is present.

    Args:
        labels: (N,) float, NaN where missing or masked out.
        predicted: (N,) probability or value, or (N, C) class probabilities.
        groups: (N,) for GAUC.

    Returns:
        binary: auc, gauc, log_loss, ne (log-loss over that of always predicting the base rate), calibration (Σ
            predicted /
        Σ labels), base_rate.  multiclass: log_loss, ne, top1, top5, base_rate (share of the most frequent class).
        regression: mse, mae, base_rate (mean label), r2.  Always: count.
    """
    present = ~np.isnan(labels)
    y, p = labels[present], predicted[present].astype(np.float64)
    metrics: Metrics = {"count": float(len(y))}
    if len(y) == 0:
        return metrics
    if task.kind == "binary":
        base = float(y.mean())
        loss = float(log_loss(y, p, labels=[0, 1]))
        metrics |= {
            "auc": auc(y, p),
            "gauc": float("nan") if groups is None else gauc(y, p, groups[present]),
            "log_loss": loss,
            "ne": loss / _entropy(np.array([base, 1 - base])) if 0 < base < 1 else float("nan"),
            "calibration": float(p.sum() / y.sum()) if y.sum() else float("nan"),
            "base_rate": base,
        }
    elif task.kind == "multiclass":
        classes = y.astype(np.int64)
        shares = np.bincount(classes, minlength=p.shape[1]) / len(y)
        loss = float(log_loss(classes, p / p.sum(1, keepdims=True), labels=np.arange(p.shape[1])))
        own = p[np.arange(len(p)), classes]
        # Ties rank behind: a constant prediction is no hit.
        rank = (p >= own[:, None]).sum(1)
        metrics |= {
            "log_loss": loss,
            "ne": loss / entropy if (entropy := _entropy(shares)) > 0 else float("nan"),
            "top1": float((rank <= 1).mean()),
            "top5": float((rank <= 5).mean()),
            "base_rate": float(shares.max()),
        }
    else:
        error = p - y
        variance = float(y.var())
        metrics |= {
            "mse": float((error**2).mean()),
            "mae": float(np.abs(error).mean()),
            "r2": 1 - float((error**2).mean()) / variance if variance > 0 else float("nan"),
            "base_rate": float(y.mean()),
        }
    return metrics


def task_quality(task: Task, metrics: Metrics) -> float:
    """What one task is judged by, the higher the better: AUC, 1 - NE of a multiclass task, R² of a regression.

    NaN where that is not defined.

    Example:
        >>> task_quality(Task.multiclass("taste", 3), {"ne": 0.75})
        0.25
    """
    if task.kind == "binary":
        return metrics.get("auc", np.nan)
    return 1 - metrics.get("ne", np.nan) if task.kind == "multiclass" else metrics.get("r2", np.nan)


def mean_auc(tasks: list[Task] | tuple[Task, ...], metrics: dict[str, Metrics]) -> float:
    """What early stopping watches: the mean AUC of the binary tasks, or, where there is none, the mean of 1 − NE and
    R².

    Tasks whose metric is not defined on this data are left out.
    """
    watched = [t for t in tasks if t.kind == "binary"] or tasks
    values = [task_quality(t, metrics[t.name]) for t in watched]
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")
