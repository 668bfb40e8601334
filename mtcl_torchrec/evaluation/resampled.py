"""The metrics of `metrics` and `ranked` as functions of how often each user is drawn, so that thousands of draws take
seconds.

What is made of sums over rows is made of sums over users, once; AUC and average precision are read off one sorting of
the rows, whatever their weights; XAUC, which would have to be counted anew in each draw, is linearised: its Hájek
projection, exact to first order.  Bins and thresholds stay those of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy.sparse

from mtcl_torchrec.evaluation.bootstrap import Resampled
from mtcl_torchrec.evaluation.metrics import BINS, as_float64, log_losses, mass_edges
from mtcl_torchrec.evaluation.naming import WEIGHTED
from mtcl_torchrec.evaluation.pairs import pairs_in_order
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranked import PER_REQUEST, RankedRows, ranked_tasks, reward_of
from mtcl_torchrec.evaluation.ranking import auc_by_request

RANKING = "ranking"
Clusters = tuple[np.ndarray, int]
_Sums = Mapping[str, np.ndarray]
_BY_WEIGHT = {  # what `mtcl_torchrec.evaluation.metrics.weighted_metrics` tells, but base rates
    "binary": ("auc", "log_loss", "ne", "calibration"),
    "multiclass": ("log_loss", "ne", "top1"),
    "regression": ("mse", "mae", "r2"),
}


def resampled_metrics(
    table: PredictionsTable,
    clusters: Clusters,
    *,
    k: Sequence[int] = (5, 10),
    values: Mapping[str, float] | None = None,
    only: Callable[[str, str], bool] = lambda of, metric: True,
) -> list[Resampled]:
    """Every metric of a table, but counts, base rates and coverage, which is no mean.

    Args:
        clusters: from `mtcl_torchrec.evaluation.bootstrap.clusters_of`.
        k, values: as of `mtcl_torchrec.evaluation.ranked.ranking_metrics`.
        only: (task or ``"ranking"``, metric) -> whether it is wanted.
    """
    parts: list[Resampled] = []
    for name in table.predicted_names:
        kind = table.task(name).kind
        labels, predicted = table.labels(name), table.predicted(name)
        present = ~np.isnan(labels)
        if not present.any():
            continue
        y, p = labels[present], as_float64(predicted[present])
        own = (clusters[0][present], clusters[1])
        parts += _of_kind(kind, name, y, p, own, threshold=table.thresholds.get(name))
        if kind == "binary":
            parts += _grouped(name, table, labels, predicted, clusters)
        elif kind == "regression" and only(name, "xauc"):
            parts.append(_xauc(name, y, p, own))
        if (weights := table.weights(name)) is not None:
            parts += _weighted(kind, name, y, p, own, weights[present])
    if table.score is not None and table.requests is not None:
        parts += _ranked(table, clusters, k, values or {}, only)
    return [kept for part in parts if (kept := _only(part, only)) is not None]


def _of_kind(
    kind: str, name: str, y: np.ndarray, p: np.ndarray, clusters: Clusters, weights: np.ndarray | None = None,
    threshold: float | None = None,
) -> list[Resampled]:  # fmt: skip
    if kind == "binary":
        return [_probabilities(name, y, p, clusters, threshold, weights), _order(name, y, p, clusters, weights)]
    if kind == "multiclass":
        return [_classes(name, y.astype(np.int64), p, clusters, weights)]
    return [_errors(name, y, p, clusters, weights)]


def _weighted(
    kind: str, name: str, y: np.ndarray, p: np.ndarray, clusters: Clusters, weights: np.ndarray
) -> list[Resampled]:
    """The metrics by sample weights: a row of weight 2 counts as two rows."""
    counts = weights > 0
    if not counts.any():
        return []
    own = (clusters[0][counts], clusters[1])
    parts = _of_kind(kind, name, y[counts], p[counts], own, weights[counts].astype(np.float64))
    kept = [_only(part, lambda of, metric: metric in _BY_WEIGHT[kind]) for part in parts]
    return [replace(p, names=tuple((of, WEIGHTED + metric) for of, metric in p.names)) for p in kept if p is not None]


def _only(part: Resampled, only: Callable[[str, str], bool]) -> Resampled | None:
    at = [i for i, (of, metric) in enumerate(part.names) if only(of, metric)]
    if not at or len(at) == len(part.names):
        return part if at else None
    return Resampled(tuple(part.names[i] for i in at), lambda w: part.of(w)[:, at])


def _of_sums(
    name: str,
    rows: Mapping[str, np.ndarray],
    clusters: Clusters,
    metrics: Callable[[_Sums], dict[str, np.ndarray]],
    weights: np.ndarray | None = None,
) -> Resampled:
    """Metrics that are functions of sums over rows.

    Args:
        rows: (N,) by name.
        metrics: sums (B,) by name -> metrics (B,) by name.
        weights: (N,) of the rows; None: all count alike.
    """
    cluster, count = clusters
    by = 1.0 if weights is None else weights
    sums = np.stack([np.bincount(cluster, of * by, minlength=count) for of in rows.values()], 1)

    def of(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = metrics(dict(zip(rows, (weights @ sums).T, strict=True)))
        stacked = np.stack(list(found.values()), 1)
        return np.where(np.isfinite(stacked), stacked, np.nan)

    with np.errstate(divide="ignore", invalid="ignore"):
        names = tuple((name, metric) for metric in metrics(dict.fromkeys(rows, np.ones(1))))
    return Resampled(names, of)


def _probabilities(
    name: str, y: np.ndarray, p: np.ndarray, clusters: Clusters, threshold: float | None,
    weights: np.ndarray | None = None,
) -> Resampled:  # fmt: skip
    yes = p >= (2.0 if threshold is None else threshold)
    rows = {
        "n": np.ones(len(y)), "y": y, "p": p, "squares": (p - y) ** 2,
        "loss": log_losses(y, p),
        "said": yes.astype(np.float64), "hits": y * yes, **_gaps(y, p),
    }  # fmt: skip

    def metrics(s: _Sums) -> dict[str, np.ndarray]:
        base = s["y"] / s["n"]
        entropy = -(base * np.log(base) + (1 - base) * np.log1p(-base))
        found = {
            "log_loss": s["loss"] / s["n"],
            "ne": s["loss"] / s["n"] / entropy,
            "brier": s["squares"] / s["n"],
            "calibration": s["p"] / s["y"],
            "ece": _ece(s),
        }
        if threshold is not None:
            found |= {
                "accuracy": (s["n"] - s["y"] - s["said"] + 2 * s["hits"]) / s["n"],
                "precision": s["hits"] / s["said"],
                "recall": s["hits"] / s["y"],
                "f1": 2 * s["hits"] / (s["said"] + s["y"]),
            }
        return found

    return _of_sums(name, rows, clusters, metrics, weights)


def _gaps(y: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    bins = np.searchsorted(mass_edges(p), p, side="right")
    return {f"gap{b}": np.where(bins == b, p - y, 0.0) for b in range(BINS)}


def _ece(s: _Sums) -> np.ndarray:
    return sum(np.abs(s[f"gap{b}"]) for b in range(BINS)) / s["n"]


def _order(name: str, y: np.ndarray, p: np.ndarray, clusters: Clusters, weights: np.ndarray | None = None) -> Resampled:
    """AUC and average precision: the rows are sorted once, by falling prediction."""
    order = np.argsort(-p, kind="stable")
    of_row, y, p = clusters[0][order], y[order], p[order]
    by = None if weights is None else weights[order]
    ends = np.flatnonzero(np.r_[p[1:] != p[:-1], True]) + 1  # of rows predicted alike
    starts = np.r_[0, ends[:-1]]
    positives = np.r_[0, np.cumsum(y).astype(np.int64)]
    having = positives[ends] > positives[starts]  # others add nothing to either
    starts, ends = starts[having], ends[having]
    of_positive, by_positive = of_row[y == 1], None if by is None else by[y == 1]
    first, last = positives[starts], positives[ends]

    def measured(w: np.ndarray) -> tuple[float, float]:
        above, hits = _sums_before(w[of_row], by), _sums_before(w[of_positive], by_positive)
        found, missed = hits[-1], above[-1] - hits[-1]
        if found == 0:
            return np.nan, np.nan
        before, until = hits[first], hits[last]
        mine, down_to = until - before, above[ends]
        precision = float((mine * until / np.where(down_to > 0, down_to, 1)).sum() / found)
        if missed == 0:
            return np.nan, precision
        wrong = above[starts] - before + (down_to - until)  # twice: those above, and half of the equal ones
        return float((found * missed - mine @ wrong / 2) / (found * missed)), precision

    return Resampled(((name, "auc"), (name, "pr_auc")), lambda weights: np.array([measured(w) for w in weights]))


def _sums_before(drawn: np.ndarray, by: np.ndarray | None) -> np.ndarray:
    """(N + 1,) what the rows before each weigh, and all."""
    sums = np.zeros(len(drawn) + 1)
    np.cumsum(drawn if by is None else drawn * by, out=sums[1:])
    return sums


def _grouped(
    name: str, table: PredictionsTable, labels: np.ndarray, scores: np.ndarray, clusters: Clusters, metric: str = "gauc"
) -> list[Resampled]:
    """GAUC: that of each user, weighted by its rows."""
    if table.users is None or np.isnan(table.users).all():
        return []
    known = ~np.isnan(table.users)
    users = table.users[known].astype(np.int64)
    found, rows = auc_by_request(users, scores[known], labels[known])
    cluster = np.zeros(len(found), np.int64)
    cluster[users] = clusters[0][known]
    both = ~np.isnan(found)
    of_user = {"auc": np.where(both, found, 0) * rows, "rows": both * rows}
    return [_of_sums(name, of_user, (cluster, clusters[1]), lambda s: {metric: s["auc"] / s["rows"]})]


def _classes(
    name: str, y: np.ndarray, p: np.ndarray, clusters: Clusters, weights: np.ndarray | None = None
) -> Resampled:
    cluster = clusters[0]
    by = np.ones(len(y)) if weights is None else weights
    rows, own = np.ones(len(y)), p[np.arange(len(y)), y]
    rank = (p >= own[:, None]).sum(1)
    right = (p.argmax(1) == y).astype(np.float64)
    sums = {
        "n": rows, "loss": log_losses(y, p), "top1": (rank <= 1) * 1.0,
        "top5": (rank <= 5) * 1.0, **_gaps(right, p.max(1).astype(np.float64)),
    }  # fmt: skip
    plain = _of_sums(
        name, sums, clusters,
        lambda s: {"log_loss": s["loss"] / s["n"], "top1": s["top1"] / s["n"], "top5": s["top5"] / s["n"],
                   "ece": _ece(s)},
        weights,
    )  # fmt: skip

    of_users = scipy.sparse.csr_array((by, (y, cluster)), shape=(p.shape[1], clusters[1]))

    def of(drawn: np.ndarray) -> np.ndarray:
        found = plain.of(drawn)
        sums = (of_users @ drawn.T).T
        total = sums.sum(1, keepdims=True)
        share = sums / np.where(total > 0, total, 1)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
        ne = np.where(entropy > 0, found[:, 0] / np.where(entropy > 0, entropy, 1), np.nan)
        return np.concatenate([found, ne[:, None]], 1)

    return Resampled((*plain.names, (name, "ne")), of)


def _errors(
    name: str, y: np.ndarray, p: np.ndarray, clusters: Clusters, weights: np.ndarray | None = None
) -> Resampled:
    middle = y.mean()  # squares of large numbers would swallow their differences
    rows = {
        "n": np.ones(len(y)), "y": y, "p": p, "from_middle": y - middle, "around": (y - middle) ** 2,
        "squares": (p - y) ** 2, "distance": np.abs(p - y),
    }  # fmt: skip

    def metrics(s: _Sums) -> dict[str, np.ndarray]:
        variance = s["around"] / s["n"] - (s["from_middle"] / s["n"]) ** 2
        mse = s["squares"] / s["n"]
        return {"mse": mse, "mae": s["distance"] / s["n"], "r2": 1 - mse / variance, "calibration": s["p"] / s["y"]}

    return _of_sums(name, rows, clusters, metrics, weights)


def _xauc(name: str, y: np.ndarray, p: np.ndarray, clusters: Clusters) -> Resampled:
    cluster, count = clusters
    right, pairs = (np.bincount(cluster, of, minlength=count) for of in pairs_in_order(y, p))
    total = pairs.sum()
    if total == 0:
        return Resampled(((name, "xauc"),), lambda weights: np.full((len(weights), 1), np.nan))
    share = right.sum() / total
    slope = 2 * (right - share * pairs) / total  # a pair's weight is the product of its two rows'
    return Resampled(((name, "xauc"),), lambda weights: (share + (weights - 1) @ slope)[:, None])


def _ranked(
    table: PredictionsTable,
    clusters: Clusters,
    k: Sequence[int],
    values: Mapping[str, float],
    only: Callable[[str, str], bool],
) -> list[Resampled]:
    rows = RankedRows(table)
    of_row = clusters[0][rows.known]
    of_request = np.zeros(len(rows.rows_of_request), np.int64)
    of_request[rows.ranking.request] = of_row[rows.ranking.order]
    parts: list[Resampled] = []

    def mean(metric: str, values: np.ndarray, weights: np.ndarray, of: np.ndarray) -> None:
        sums = {"sum": np.nan_to_num(values) * weights, "weight": ~np.isnan(values) * weights}
        parts.append(_of_sums(RANKING, sums, (of, clusters[1]), lambda s: {metric: s["sum"] / s["weight"]}))

    reward = reward_of(table, values)[rows.known] if values else None
    one = np.ones(len(of_request))
    for n in k:
        if reward is not None and only(RANKING, f"value@{n}"):
            mean(f"value@{n}", rows.ranking.value_at_k(reward, n), one, of_request)
        information = rows.information() if only(RANKING, f"novelty@{n}") else None
        if information is not None:
            mean(f"novelty@{n}", information, rows.ranking.shown(n), of_row)
    for task in ranked_tasks(table):
        for n in k:
            if only(RANKING, f"rate@{n} {task}"):
                mean(f"rate@{n} {task}", rows.labels(task), rows.ranking.shown(n), of_row)
        at_k = [(f"{measure}@{n} {task}", measure, n) for n in k for measure in PER_REQUEST]
        for metric, measure, n in [*at_k, (f"mrr {task}", "mrr", 0), (f"map {task}", "map", 0)]:
            if only(RANKING, metric):
                mean(metric, rows.per_request(measure, task, n), one, of_request)
        parts += _orders_of_score(table, task, clusters, only)
    return parts


def _orders_of_score(
    table: PredictionsTable, task: str, clusters: Clusters, only: Callable[[str, str], bool]
) -> list[Resampled]:
    """AUC and GAUC of the score for one task's events."""
    labels, score = table.labels(task), table.score
    assert score is not None
    present = ~np.isnan(labels)
    parts: list[Resampled] = []
    if only(RANKING, f"auc {task}") and present.any():
        both = _order(RANKING, labels[present], score[present], (clusters[0][present], clusters[1]))
        parts.append(Resampled(((RANKING, f"auc {task}"),), lambda weights: both.of(weights)[:, :1]))
    if only(RANKING, f"gauc {task}"):
        parts += _grouped(RANKING, table, labels, score, clusters, f"gauc {task}")
    return parts
