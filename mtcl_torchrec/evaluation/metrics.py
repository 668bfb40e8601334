"""Metrics of a task's predictions: scikit-learn's where it has them; AUC by ranks, of all rows and within groups, and
XAUC here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

from mtcl_torchrec.evaluation.pairs import pairs_in_order
from mtcl_torchrec.evaluation.ranking import auc_by_request, auc_of
from mtcl_torchrec.schema import Task

Metrics = dict[str, float]
BINS = 15  # of the expected calibration errors


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; NaN where only one class is there.

    Example:
        >>> auc(np.array([0, 1, 1]), np.array([0.1, 0.4, 0.3]))
        1.0
    """
    if len(labels) == 0 or labels.min() == labels.max():
        return float("nan")
    return auc_of(_numbers(scores), labels)


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
    codes = pd.factorize(groups[known])[0]
    areas, rows = auc_by_request(codes, _numbers(scores)[known], labels[known])
    both = ~np.isnan(areas)
    return float(np.average(areas[both], weights=rows[both])) if both.any() else float("nan")


def _numbers(scores: np.ndarray) -> np.ndarray:
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    return scores


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


def xauc(labels: np.ndarray, predicted: np.ndarray) -> float:
    """The share of pairs of rows with different labels that are predicted in the right order; equal predictions count
    half (Zhan et al., KDD 2022): (1 + Somers' D) / 2, in O(n log n).

    Args:
        labels, predicted: (N,) numbers.

    Returns:
        NaN where all labels are equal.

    Example:
        >>> xauc(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.3, 0.2])).__round__(4)
        0.6667
    """
    right, pairs = pairs_in_order(labels, predicted)
    return float(right.sum() / pairs.sum()) if pairs.any() else float("nan")


def expected_calibration_error(
    labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, edges: np.ndarray
) -> float:
    """Σ over bins of (its share of the weight) · |mean predicted - mean label| (Naeini et al., AAAI 2015; Guo et al.,
    ICML 2017, eq. 3).

    Args:
        labels, predicted, weights: (N,) float.
        edges: inner edges of the bins, rising; equal predictions share a bin.

    Example:
        >>> labels, predicted = np.array([0.0, 1.0, 1.0, 1.0]), np.array([0.1, 0.3, 0.8, 0.8])
        >>> round(expected_calibration_error(labels, predicted, np.ones(4), np.array([0.5])), 6)
        0.25
    """
    bins = np.searchsorted(edges, predicted, side="right")
    gap = np.bincount(bins, weights * (predicted - labels), len(edges) + 1)
    return float(np.abs(gap).sum() / weights.sum())


def mass_edges(predicted: np.ndarray) -> np.ndarray:
    """(BINS - 1,) inner edges of bins that hold equally many rows."""
    return np.quantile(predicted, np.arange(1, BINS) / BINS)


def as_float64(predicted: np.ndarray) -> np.ndarray:
    """(N,) in float64; (N, C) class probabilities stay what they are, which are most of what an evaluation holds."""
    return predicted.astype(np.float64) if predicted.ndim == 1 else predicted


def log_losses(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(N,) float64: -log of the probability given to what happened, cut as by `sklearn.metrics.log_loss`, of which they
    are the terms: that makes several matrices of rows times classes.

    Args:
        labels: (N,) 0 or 1, or classes.
        predicted: (N,) probability of a 1, or (N, C) of each class.

    Example:
        >>> log_losses(np.array([1.0, 0.0]), np.array([[0.25, 0.75], [0.5, 0.5]])).round(3)
        array([0.288, 0.693])
    """
    if predicted.ndim == 1:
        own = np.where(labels == 1, predicted, 1 - predicted)
    else:
        own = predicted[np.arange(len(labels)), labels.astype(np.int64)] / predicted.sum(1, dtype=np.float64)
    tiny = np.finfo(np.float64).eps
    return -np.log(np.clip(own, tiny, 1 - tiny))


def task_metrics(task: Task, labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None = None) -> Metrics:
    """Metrics of one task over the rows whose label is present.

    Args:
        labels: (N,) float, NaN where missing or masked out.
        predicted: (N,) probability or value, or (N, C) class probabilities.
        groups: (N,) for GAUC.

    Returns:
        binary: auc, gauc, log_loss, ne (log-loss over that of always predicting the base rate), calibration (Σ
            predicted / Σ labels), base_rate.
        multiclass: log_loss, ne, top1, top5, base_rate (share of the most frequent class).
        regression: mse, mae, base_rate (mean label), r2.  Always: count.
    """
    present = ~np.isnan(labels)
    y, p = labels[present], as_float64(predicted[present])
    metrics: Metrics = {"count": float(len(y))}
    if len(y) == 0:
        return metrics
    if task.kind == "binary":
        base = float(y.mean())
        loss = float(log_losses(y, p).mean())
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
        loss = float(log_losses(y, p).mean())
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


def whole_task_metrics(
    task: Task,
    labels: np.ndarray,
    predicted: np.ndarray,
    groups: np.ndarray | None = None,
    threshold: float | None = None,
) -> Metrics:
    """`task_metrics`, and what takes longer and is not needed after every epoch.

    Args:
        threshold: from which probability of a binary task a yes is said, chosen on other rows.

    Returns:
        binary: pr_auc (average precision), brier, ece (in 15 bins of equally many rows); at the threshold, accuracy,
            precision, recall, f1, and what they are worth: majority (the accuracy of always saying what is more
            frequent), f1_all_yes (the F1 of always saying yes).  Precision is NaN where no yes is said.
        multiclass: ece, of the probability of the most probable class.
        regression: xauc, calibration.
    """
    metrics = task_metrics(task, labels, predicted, groups)
    present = ~np.isnan(labels)
    y, p = labels[present], as_float64(predicted[present])
    if len(y) == 0:
        return metrics
    if task.kind == "regression":
        ratio = float(p.sum() / y.sum()) if y.sum() else float("nan")
        return metrics | {"xauc": xauc(y, p), "calibration": ratio}
    if task.kind == "multiclass":
        y, p = (p.argmax(1) == y).astype(np.float64), p.max(1).astype(np.float64)
        return metrics | {"ece": expected_calibration_error(y, p, np.ones(len(y)), mass_edges(p))}
    metrics |= {
        "pr_auc": float(average_precision_score(y, p)) if y.any() else float("nan"),
        "brier": float(((p - y) ** 2).mean()),
        "ece": expected_calibration_error(y, p, np.ones(len(y)), mass_edges(p)),
    }
    return metrics if threshold is None else metrics | decision_metrics(y, p, threshold)


def weighted_metrics(task: Task, labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> Metrics:
    """What a task whose loss weighs its rows (`Task.sample_weight`) is worth by these weights, as scikit-learn's
    `sample_weight` counts them: a row of weight 2 as two rows.

    Args:
        labels, predicted: see `task_metrics`.
        weights: (N,) at least 0.

    Returns:
        binary: weighted_auc, weighted_log_loss, weighted_ne, weighted_calibration, weighted_base_rate.  multiclass:
            weighted_log_loss, weighted_ne, weighted_top1, weighted_base_rate.  regression: weighted_mse, weighted_mae,
            weighted_r2, weighted_base_rate.  Nothing where all weights are 0.

    Example:
        >>> found = weighted_metrics(Task.binary("click"), np.array([0.0, 1.0]), np.array([0.2, 0.5]), np.array([3, 1]))
        >>> round(found["weighted_calibration"], 4), found["weighted_base_rate"]
        (1.1, 0.25)
    """
    counts = ~np.isnan(labels) & (weights > 0)
    y, p, w = labels[counts], as_float64(predicted[counts]), weights[counts].astype(np.float64)
    if len(y) == 0:
        return {}
    if task.kind == "regression":
        mse, base = float(np.average((p - y) ** 2, weights=w)), float(np.average(y, weights=w))
        variance = float(np.average((y - base) ** 2, weights=w))
        found = {
            "mse": mse,
            "mae": float(np.average(np.abs(p - y), weights=w)),
            "r2": 1 - mse / variance if variance > 0 else float("nan"),
            "base_rate": base,
        }
    else:
        classes = np.arange(p.shape[1] if p.ndim == 2 else 2)
        shares = np.bincount(y.astype(np.int64), w, len(classes)) / w.sum()
        loss, entropy = float(np.average(log_losses(y, p), weights=w)), _entropy(shares)
        found = {"log_loss": loss, "ne": loss / entropy if entropy > 0 else float("nan")}
        if task.kind == "binary":
            base = float(shares[1])
            found["auc"] = float(roc_auc_score(y, p, sample_weight=w)) if 0 < base < 1 else float("nan")
            found["calibration"] = float(np.average(p, weights=w)) / base if base else float("nan")
            found["base_rate"] = base
        else:
            own = p[np.arange(len(p)), y.astype(np.int64)]
            found["top1"] = float(np.average((p >= own[:, None]).sum(1) <= 1, weights=w))
            found["base_rate"] = float(shares.max())
    return {f"weighted_{name}": value for name, value in found.items()}


def decision_metrics(labels: np.ndarray, predicted: np.ndarray, threshold: float) -> Metrics:
    """What saying yes from a probability on comes to.

    Args:
        labels: (N,) 0 or 1.
        predicted: (N,) probabilities; at least `threshold` is a yes.

    Returns:
        See `whole_task_metrics`.

    Example:
        >>> got = decision_metrics(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.1, 0.6, 0.7, 0.2]), 0.5)
        >>> got["accuracy"], got["precision"], got["f1_all_yes"].__round__(4)
        (0.5, 0.5, 0.6667)
    """
    yes = predicted >= threshold
    said, hits, positives, rows = float(yes.sum()), float(labels[yes].sum()), float(labels.sum()), float(len(labels))
    base = positives / rows
    return {
        "threshold": threshold,
        "accuracy": (rows - positives - said + 2 * hits) / rows,
        "majority": max(base, 1 - base),
        "precision": hits / said if said else float("nan"),
        "recall": hits / positives if positives else float("nan"),
        "f1": 2 * hits / (said + positives) if positives else float("nan"),
        "f1_all_yes": 2 * base / (1 + base),
        "said_yes": said / rows,
    }


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


def mean_auc(tasks: Sequence[Task], metrics: Mapping[str, Metrics]) -> float:
    """What early stopping watches: the mean AUC of the binary tasks, or, where there is none, the mean of 1 − NE and
    R².

    Tasks whose metric is not defined on this data are left out.
    """
    values = [task_quality(t, metrics[t.name]) for t in _watched(tasks)]
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def deciding(tasks: Sequence[Task], unsure: Mapping[str, str]) -> list[Task]:
    """The tasks of which enough is known to decide anything; all where that is so of none.

    Args:
        unsure: task -> why not, see `mtcl_torchrec.evaluation.supports.unsure_tasks`.

    Example:
        >>> tasks = [Task.binary("like"), Task.binary("click")]
        >>> [task.name for task in deciding(tasks, {"like": "too few events (3)"})]
        ['click']
    """
    return [task for task in tasks if task.name not in unsure] or list(tasks)


def stopping_tasks(tasks: Sequence[Task], watch: Collection[str], unsure: Mapping[str, str]) -> list[Task]:
    """The tasks whose `mean_auc` early stopping goes by.

    Args:
        watch: ``training.watch``; what it names decides however few its events.
        unsure: where it names nothing, those tasks are left out; see `deciding`.
    """
    return [task for task in tasks if task.name in watch] or deciding(_watched(tasks), unsure)


def _watched(tasks: Sequence[Task]) -> list[Task]:
    return [task for task in tasks if task.kind == "binary"] or list(tasks)
