"""What a ranking is worth: realised value@k, NDCG@k, grouped AUC, AUC; all of them within requests but the last.

Ties are treated as if they were put in random order and the mean over all orders taken (McSherry & Najork, ECIR 2008),
so that a ranking gains nothing from the order in which the rows were stored.
"""

from __future__ import annotations

import numpy as np


def rows_by_request(request: np.ndarray) -> tuple[np.ndarray, int]:
    """Requests numbered from 0 in the order of their keys, (N,) int64, and how many there are.

    Example:
        >>> rows_by_request(np.array([7, 3, 7]))
        (array([1, 0, 1]), 2)
    """
    keys, numbers = np.unique(request, return_inverse=True)
    return numbers, len(keys)


def _in_order(request: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Rows by request, within it by rising `by`; sorting integers twice is faster than `numpy.lexsort` on floats."""
    place = np.empty(len(by), np.int64)
    place[np.argsort(by)] = np.arange(len(by))
    return np.argsort(request * len(by) + place)


def _ranked(request: np.ndarray, scores: np.ndarray, gains: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows from best to worst within each request: request, place from 0, and gain; tied rows share theirs."""
    order = _in_order(request, -scores)
    r, s = request[order], scores[order]
    new_request = np.r_[True, r[1:] != r[:-1]]
    first = np.flatnonzero(new_request)
    place = np.arange(len(r)) - np.repeat(first, np.diff(np.r_[first, len(r)]))
    tied = np.cumsum(new_request | np.r_[True, s[1:] != s[:-1]]) - 1
    shared = np.bincount(tied, gains[order]) / np.bincount(tied)
    return r, place, shared[tied]


def value_at_k(request: np.ndarray, scores: np.ndarray, reward: np.ndarray, k: int) -> np.ndarray:
    """The reward of the k best rows of each request, added up; of all its rows where it has fewer.

    Args:
        request: (N,) numbers from 0 to R − 1.
        scores: (N,) the higher the better.
        reward: (N,) what a row brought, Σ valueᵢ · labelᵢ; may be negative.
        k: at least 1.

    Returns:
        (R,) float64.

    Example:
        >>> request, reward = np.array([0, 0, 0, 1]), np.array([1.0, 0.0, 8.0, 1.0])
        >>> value_at_k(request, np.array([0.9, 0.5, 0.1, 0.3]), reward, 2)
        array([1., 1.])
        >>> value_at_k(request, np.array([0.5, 0.5, 0.5, 0.3]), reward, 2)  # ties: the mean over all orders
        array([6., 1.])
    """
    if len(request) == 0:
        return np.empty(0)
    r, place, gain = _ranked(request, scores, reward)
    return np.bincount(r, gain * (place < k), minlength=int(r[-1]) + 1)


def ndcg_at_k(request: np.ndarray, scores: np.ndarray, reward: np.ndarray, k: int) -> np.ndarray:
    """Normalised discounted cumulative gain of each request (Järvelin & Kekäläinen, TOIS 2002), by 1 / log₂(1 + rank).

    A gain is the reward, or 0 where that is negative: NDCG is not defined for negative gains.

    Returns:
        (R,) float64 in [0, 1]; NaN where no row of the request has a gain.

    Example:
        >>> ndcg_at_k(np.array([0, 0, 1]), np.array([0.1, 0.9, 0.5]), np.array([1.0, 0.0, 0.0]), 2).round(4)
        array([0.6309,    nan])
    """
    if len(request) == 0:
        return np.empty(0)
    gains = np.maximum(reward, 0)

    def dcg(by: np.ndarray) -> np.ndarray:
        r, place, gain = _ranked(request, by, gains)
        return np.bincount(r, gain * (place < k) / np.log2(2.0 + place), minlength=int(r[-1]) + 1)

    ideal = dcg(gains)
    return np.where(ideal > 0, dcg(scores) / np.where(ideal > 0, ideal, 1), np.nan)


def auc_by_request(request: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each request and its number of rows; the weighted mean is the grouped AUC (Zhou et al., KDD 2018, eq. 7).

    Args:
        labels: (N,) 0 or 1; rows where it is missing (NaN) are left out.

    Returns:
        (R,) float64, NaN for a request with one class only, and (R,) float64 rows.

    Example:
        >>> auc_by_request(np.array([0, 0, 1]), np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, 1.0]))
        (array([ 1., nan]), array([2., 1.]))
    """
    count = int(request.max(initial=0)) + 1
    known = ~np.isnan(labels)
    request, scores, labels = request[known], scores[known], labels[known]
    order = _in_order(request, scores)
    r, s, y = request[order], scores[order], labels[order]
    rows, positives = np.bincount(r, minlength=count).astype(float), np.bincount(r, y, minlength=count)
    if len(r) == 0:
        return np.full(count, np.nan), rows
    new = np.r_[True, (r[1:] != r[:-1]) | (s[1:] != s[:-1])]
    tied = np.cumsum(new) - 1
    first, size = np.flatnonzero(new), np.bincount(tied)
    before = np.concatenate([[0.0], np.cumsum(rows)])[:-1]  # rows of earlier requests
    rank = (first + (size + 1) / 2)[tied] - before[r]
    u = np.bincount(r, rank * y, minlength=count) - positives * (positives + 1) / 2
    pairs = positives * (rows - positives)
    return np.where(pairs > 0, u / np.where(pairs > 0, pairs, 1), np.nan), rows


def auc_of(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve over all rows whose label is there; NaN where only one class is.

    Example:
        >>> auc_of(np.array([0.1, 0.4, 0.3, 0.2]), np.array([0.0, 1.0, 1.0, np.nan]))
        1.0
    """
    return float(auc_by_request(np.zeros(len(scores), np.int64), scores, labels)[0][0])


def mean_and_error(values: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """Mean, and its standard error where values of one cluster may depend on each other.

    With clusters g, the error is that of Liang & Zeger (Biometrika 1986) for a mean:
    √(G / (G − 1) · Σ_g (Σ_{r in g} (x_r − x̄))²) / R; clusters of one value each give the textbook's s / √R.

    Args:
        values: (R,) one for each request; NaN is left out.
        clusters: (R,) such as the user of each request; None: every value is one of its own.

    Returns:
        Both NaN without values; the error NaN with a single cluster.

    Example:
        >>> mean_and_error(np.array([1.0, 3.0, np.nan]))
        (2.0, 1.0)
        >>> mean_and_error(np.array([1.0, 1.0, 3.0, 3.0]), np.array([4, 4, 9, 9]))
        (2.0, 1.0)
    """
    known = ~np.isnan(values)
    x = values[known]
    if len(x) == 0:
        return float("nan"), float("nan")
    mean = float(x.mean())
    group = np.arange(len(x)) if clusters is None else np.unique(clusters[known], return_inverse=True)[1]
    sums = np.bincount(group, x - mean)
    if len(sums) < 2:
        return mean, float("nan")
    return mean, float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(x))
