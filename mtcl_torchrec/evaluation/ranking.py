"""What a ranking is worth: realised value@k, NDCG@k, recall@k, hit rate@k, reciprocal rank, average precision, grouped
AUC, AUC; all of them within requests but the last.

Ties are treated as if they were put in random order and the mean over all orders taken (McSherry & Najork, ECIR 2008),
so that a ranking gains nothing from the order in which the rows were stored.
"""

from __future__ import annotations

import numpy as np
from scipy.special import gammaln


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


class Ranking:
    """Rows from best to worst within each request: what a list of the first k of them brings.

    Args:
        request: (N,) numbers from 0 to R - 1.
        scores: (N,) the higher the better.

    Example:
        >>> ranking = Ranking(np.array([0, 0, 0, 1]), np.array([0.9, 0.5, 0.5, 0.3]))
        >>> labels = np.array([0.0, 1.0, 0.0, 0.0])
        >>> ranking.shown(2), ranking.hit_at_k(labels, 2), ranking.reciprocal_rank(labels).round(4)
        (array([1. , 0.5, 0.5, 1. ]), array([0.5, nan]), array([0.4167,    nan]))
    """

    def __init__(self, request: np.ndarray, scores: np.ndarray) -> None:
        self.order = _in_order(request, -scores)
        r, s = request[self.order], scores[self.order]
        new_request = np.r_[True, r[1:] != r[:-1]][: len(r)]
        starts = np.flatnonzero(new_request)
        self.request = r
        self.count = int(r[-1]) + 1 if len(r) else 0
        self.place = np.arange(len(r)) - np.repeat(starts, np.diff(np.r_[starts, len(r)]))  # from 0
        new = new_request | np.r_[True, s[1:] != s[:-1]][: len(r)]
        self.tied = np.cumsum(new) - 1  # which group of equal scores a row is in
        self.size = np.bincount(self.tied)  # by group, as the next ones
        self.first = self.place[new]
        self.request_of = r[new]

    def shown(self, k: int) -> np.ndarray:
        """(N,) float64, in the order of the rows: the probability to be among the first k."""
        slots = self._slots(k) / self.size
        out = np.empty(len(self.order))
        out[self.order] = slots[self.tied]
        return out

    def value_at_k(self, reward: np.ndarray, k: int) -> np.ndarray:
        """See `value_at_k`."""
        return self._sum(self._shared(reward) * (self.place < k))

    def ndcg_at_k(self, reward: np.ndarray, k: int) -> np.ndarray:
        """See `ndcg_at_k`."""
        gains = np.maximum(reward, 0)
        ideal = self._ideal_dcg(gains, k)
        return np.where(ideal > 0, self._dcg(gains, k) / np.where(ideal > 0, ideal, 1), np.nan)

    def recall_at_k(self, labels: np.ndarray, k: int) -> np.ndarray:
        """(R,) the share of a request's positive rows that are among the first k; NaN where it has none.

        Args:
            labels: (N,) 0 or 1, here and in the following.
        """
        return self._over(self.value_at_k(labels, k), labels)

    def hit_at_k(self, labels: np.ndarray, k: int) -> np.ndarray:
        """(R,) the probability that one of the first k rows is positive; NaN where no row of the request is."""
        positives, size = np.bincount(self.tied, labels[self.order]), self.size.astype(float)
        slots = self._slots(k)
        blanks = size - positives
        missed = (blanks >= slots).astype(np.float64)
        # C(blanks, slots) / C(size, slots): all slots of a group of equals go to rows without the event.
        some = np.flatnonzero((missed > 0) & (positives > 0) & (slots > 0))
        missed[some] = np.exp(_log_choose(blanks[some], slots[some]) - _log_choose(size[some], slots[some]))
        starts = np.flatnonzero(np.r_[True, self.request_of[1:] != self.request_of[:-1]][: len(size)])
        hit = np.full(self.count, np.nan)
        hit[self.request_of[starts]] = 1 - np.multiply.reduceat(missed, starts) if len(starts) else 0
        return np.where(self._positives(labels) > 0, hit, np.nan)

    def reciprocal_rank(self, labels: np.ndarray) -> np.ndarray:
        """(R,) 1 / the rank of the first positive row (Voorhees, TREC-8); NaN where no row of the request is positive.

        Of equal scores, the j-th of g rows of which p are positive is the first of these with the probability
        C(g - j, p - 1) / C(g, p).
        """
        positives = np.bincount(self.tied, labels[self.order])
        having = np.flatnonzero(positives > 0)
        leading = np.zeros(len(self.size), bool)
        leading[having[np.unique(self.request_of[having], return_index=True)[1]]] = True
        rows = np.flatnonzero(leading[self.tied])
        group = self.tied[rows]
        g, p, j = self.size[group], positives[group], self.place[rows] - self.first[group] + 1.0
        possible = g - j >= p - 1
        log = _log_choose(np.where(possible, g - j, p - 1), p - 1) - _log_choose(g, p)
        found = np.bincount(
            self.request[rows], np.where(possible, np.exp(log), 0) / (self.first[group] + j), minlength=self.count
        )
        return np.where(self._positives(labels) > 0, found, np.nan)

    def average_precision(self, labels: np.ndarray) -> np.ndarray:
        """(R,) the mean, over the positive rows of a request, of the share of positive rows down to each; NaN where
        there is none.  Its mean over requests is MAP.

        Of equal scores, the j-th of g rows of which p are positive, after a rows with n positive ones, brings
        p / g · (n + 1 + (j - 1)(p - 1) / (g - 1)) / (a + j) (McSherry & Najork, ECIR 2008).
        """
        positives = np.bincount(self.tied, labels[self.order])
        total = np.cumsum(positives) - positives  # in earlier groups, of earlier requests too
        own = np.r_[True, self.request_of[1:] != self.request_of[:-1]][: len(self.size)]
        earlier = total - np.repeat(total[own], np.diff(np.r_[np.flatnonzero(own), len(total)]))
        g, p, n, a = (of[self.tied] for of in (self.size, positives, earlier, self.first))
        j = self.place - a + 1.0
        above = n + 1 + (j - 1) * (p - 1) / np.maximum(g - 1, 1)
        return self._over(self._sum(p / g * above / (a + j)), labels)

    def _slots(self, k: int) -> np.ndarray:
        """How many of the first k places the rows of each group of equal scores take."""
        return np.clip(min(k, len(self.order)) - self.first, 0, self.size)

    def _shared(self, gains: np.ndarray) -> np.ndarray:
        """Gains in the order of the ranking; tied rows share theirs."""
        return (np.bincount(self.tied, gains[self.order]) / self.size)[self.tied]

    def _sum(self, of_rows: np.ndarray) -> np.ndarray:
        return np.bincount(self.request, of_rows, minlength=self.count)

    def _positives(self, labels: np.ndarray) -> np.ndarray:
        return self._sum(labels[self.order])

    def _over(self, found: np.ndarray, labels: np.ndarray) -> np.ndarray:
        positives = self._positives(labels)
        return np.where(positives > 0, found / np.where(positives > 0, positives, 1), np.nan)

    def _ideal_dcg(self, gains: np.ndarray, k: int) -> np.ndarray:
        if bool(np.all((gains == 0) | (gains == 1))):  # no need to sort
            k = min(k, int(self.place.max(initial=-1)) + 1)  # no list is longer
            of_count = np.r_[0.0, np.cumsum(1 / np.log2(2.0 + np.arange(k)))]
            return of_count[np.minimum(self._positives(gains), k).astype(np.int64)]
        request = np.empty(len(self.order), np.int64)
        request[self.order] = self.request
        return Ranking(request, gains)._dcg(gains, k)

    def _dcg(self, gains: np.ndarray, k: int) -> np.ndarray:
        return self._sum(self._shared(gains) * (self.place < k) / np.log2(2.0 + self.place))


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def value_at_k(request: np.ndarray, scores: np.ndarray, reward: np.ndarray, k: int) -> np.ndarray:
    """The reward of the k best rows of each request, added up; of all its rows where it has fewer.

    Args:
        request: (N,) numbers from 0 to R - 1.
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
    return Ranking(request, scores).value_at_k(reward, k)


def ndcg_at_k(request: np.ndarray, scores: np.ndarray, reward: np.ndarray, k: int) -> np.ndarray:
    """Normalised discounted cumulative gain of each request (Järvelin & Kekäläinen, TOIS 2002), by 1 / log₂(1 + rank).

    A gain is the reward, or 0 where that is negative: NDCG is not defined for negative gains.

    Returns:
        (R,) float64 in [0, 1]; NaN where no row of the request has a gain.

    Example:
        >>> ndcg_at_k(np.array([0, 0, 1]), np.array([0.1, 0.9, 0.5]), np.array([1.0, 0.0, 0.0]), 2).round(4)
        array([0.6309,    nan])
    """
    return Ranking(request, scores).ndcg_at_k(reward, k)


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
