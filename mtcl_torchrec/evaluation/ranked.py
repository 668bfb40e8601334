"""What is shown when the rows of a request are ranked: what it brings, of each event and altogether, and how varied it
is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mtcl_torchrec.evaluation.metrics import Metrics
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranking import Ranking, mean_and_error
from mtcl_torchrec.schema import DataError, nearest

PER_REQUEST = ("ndcg", "recall", "hit")  # at k, by task; beside them, mrr and map


def ranked_tasks(table: PredictionsTable) -> list[str]:
    """The tasks whose events a ranking is measured by: the binary ones."""
    return [task.name for task in table.tasks if task.kind == "binary"]


def reward_of(table: PredictionsTable, values: Mapping[str, float]) -> np.ndarray:
    """(N,) Σ valueᵢ · labelᵢ: what each row brought, by `PredictionsTable.amounts` of it where the value is that of a
    unit; a label that is missing brings nothing.

    Raises:
        DataError: a task without labels, or a multiclass one, of which no class is worth anything by itself.
    """
    names = [task.name for task in table.tasks if task.kind != "multiclass"]
    for task in values:
        if task not in names:
            raise DataError(f"values: no binary or regression task {task!r}{nearest(task, names)}")
    reward = np.zeros(len(table))
    for task, value in values.items():
        reward += value * table.amounts(task) * np.nan_to_num(table.labels(task))
    return reward


class RankedRows:
    """The rows of a table that belong to a known request, ranked.

    Args:
        table: with keys of requests, or of users.
        scores: (N,) what ranks; the default is the table's own score.

    Attributes:
        known: (N,) bool, which rows of the table they are.
        requests: (M,) int64, the request of each of those.
        ranking: of those.

    Raises:
        DataError: there is no score, or no key.
    """

    def __init__(self, table: PredictionsTable, scores: np.ndarray | None = None) -> None:
        scores = table.score if scores is None else scores
        if scores is None or table.requests is None:
            raise DataError("ranking needs a score, and the keys of requests or users")
        self.table = table
        self.known = ~np.isnan(table.requests)
        self.requests = table.requests[self.known].astype(np.int64)
        self.ranking = Ranking(self.requests, scores[self.known])
        self.rows_of_request = np.bincount(self.requests)
        self._labels: dict[str, np.ndarray] = {}

    def labels(self, task: str) -> np.ndarray:
        """Labels of the known rows; one that is missing counts as 0: nothing is known to have happened."""
        if task not in self._labels:
            self._labels[task] = np.nan_to_num(self.table.labels(task)[self.known])
        return self._labels[task]

    def per_request(self, measure: str, task: str, k: int = 0) -> np.ndarray:
        """(R,) one of ``ndcg``, ``recall``, ``hit`` at k, ``mrr``, ``map`` of a binary task; NaN where a request has
        no positive row."""
        ranking, labels = self.ranking, self.labels(task)
        if measure == "mrr":
            return ranking.reciprocal_rank(labels)
        if measure == "map":
            return ranking.average_precision(labels)
        at_k = {"ndcg": ranking.ndcg_at_k, "recall": ranking.recall_at_k, "hit": ranking.hit_at_k}
        return at_k[measure](labels, k)

    def users_of_requests(self) -> np.ndarray:
        """(R,) the user of each request, or of one that is not known, the request itself."""
        count = len(self.rows_of_request)
        users = np.full(count, np.nan)
        if self.table.users is not None:
            users[self.ranking.request] = self.table.users[self.known][self.ranking.order]
        first = np.nanmax(users, initial=0) + 1
        return np.where(np.isnan(users), first + np.arange(count), users).astype(np.int64)

    def coverage(self, shown: np.ndarray, items: np.ndarray) -> float:
        """The expected share of the items of these rows that is shown to somebody.

        Args:
            shown: (N,) the probability of each row to be shown.
            items: (N,) numbers, NaN where not known.
        """
        known = ~np.isnan(items)
        number = items[known].astype(np.int64)
        there = np.bincount(number) > 0
        with np.errstate(divide="ignore"):
            never = np.exp(np.bincount(number, np.log1p(-shown[known])))
        return float((1 - never[there]).mean()) if there.any() else float("nan")

    def information(self) -> np.ndarray | None:
        """(N,) self-information of each row's item, -log₂ of its share of all training clicks (Zhou et al., PNAS 2010),
        NaN where the item is not known: over the items of these rows, each with a click more than it had, so that new
        ones have a share.  None where items or their popularity are not known."""
        if self.table.items is None or self.table.popularity is None:
            return None
        items, popularity = self.table.items[self.known], self.table.popularity[self.known]
        known = ~np.isnan(items)
        number = items[known].astype(np.int64)
        clicks = np.zeros(int(number.max(initial=0)) + 1)
        clicks[number] = np.nan_to_num(popularity[known]) + 1
        found = np.full(len(items), np.nan)
        found[known] = np.log2(max(clicks.sum(), 1)) - np.log2(clicks[number])
        return found


def ranking_metrics(
    table: PredictionsTable,
    scores: np.ndarray | None = None,
    *,
    k: Sequence[int] = (5, 10),
    values: Mapping[str, float] | None = None,
    of_event: Mapping[str, np.ndarray] | None = None,
) -> Metrics:
    """What is shown when the rows of each request are ranked by a score.

    Rows of equal scores count as if in random order (see `mtcl_torchrec.evaluation.ranking`), a missing label as an
    event that did not happen.  A request without a positive row says nothing of NDCG, recall, hit rate, MRR and MAP
    and is left out there; where it has no more than k rows, all of them are shown, whatever the score.

    Args:
        table: with a score and keys.
        scores: (N,) other ones than the table's.
        k: lengths of what is shown.
        values: task -> what its event is worth; see `reward_of`.
        of_event: task -> (N,) what ranks instead in all that is measured of its event alone.

    Returns:
        requests; ``choice@k`` (the share of requests of more than k rows); ``value@k`` and ``value@k error`` (mean
        realised value of what is shown of a request, and its standard error over users); ``coverage@k`` (of the items
        of these rows); ``novelty@k``; by binary task ``rate@k click`` (the share of what is shown in which the event
        happened: click-through rate, conversion), ``ndcg@k click``, ``recall@k click``, ``hit@k click``,
        ``mrr click``, ``map click``.
    """
    rows = RankedRows(table, scores)
    found: Metrics = {"requests": float(len(rows.rows_of_request))}
    clusters = rows.users_of_requests()
    reward = reward_of(table, values)[rows.known] if values else None
    items = None if table.items is None else table.items[rows.known]
    information = rows.information()
    alone = {task: RankedRows(table, by) for task, by in (of_event or {}).items() if task in ranked_tasks(table)}
    for n in k:
        shown = rows.ranking.shown(n)
        found[f"choice@{n}"] = float((rows.rows_of_request > n).mean()) if len(shown) else float("nan")
        if reward is not None:
            mean, error = mean_and_error(rows.ranking.value_at_k(reward, n), clusters)
            found |= {f"value@{n}": mean, f"value@{n} error": error}
        if items is not None:
            found[f"coverage@{n}"] = rows.coverage(shown, items)
        if information is not None:
            found[f"novelty@{n}"] = _average(information, shown)
        for task in ranked_tasks(table):
            own = alone.get(task, rows)
            found[f"rate@{n} {task}"] = _average(own.labels(task), own.ranking.shown(n))
            for measure in PER_REQUEST:
                found[f"{measure}@{n} {task}"] = mean_and_error(own.per_request(measure, task, n))[0]
    for task in ranked_tasks(table):
        for measure in ("mrr", "map"):
            found[f"{measure} {task}"] = mean_and_error(alone.get(task, rows).per_request(measure, task))[0]
    return found


def _average(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean of those that are known."""
    known = ~np.isnan(values)
    total = weights[known].sum()
    return float((values[known] * weights[known]).sum() / total) if total else float("nan")
