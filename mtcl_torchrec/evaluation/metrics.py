"""Final metrics of predictions: scikit-learn's where it has them, grouped AUC here."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score

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
    return float(roc_auc_score(labels, scores))


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
    frame = pd.DataFrame({"group": groups, "label": labels, "score": scores}).dropna(subset="group")
    frame["rank"] = frame.groupby("group")["score"].rank()
    frame["positive_rank"] = frame["rank"] * frame["label"]
    by_group = frame.groupby("group")
    rows = by_group.size().to_numpy(dtype=np.float64)
    positives = by_group["label"].sum().to_numpy(dtype=np.float64)
    negatives = rows - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return float("nan")
    u = by_group["positive_rank"].sum().to_numpy() - positives * (positives + 1) / 2
    return float(np.average((u / np.where(both, positives * negatives, 1))[both], weights=rows[both]))


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
