"""What each metric of a table of predictions rests on: how many users tell something of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

from mtcl_torchrec.evaluation.confidence import Support, rests_on, support_of, weakest
from mtcl_torchrec.evaluation.estimates import clusters_of
from mtcl_torchrec.evaluation.naming import parts_of
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranked import RankedRows, reward_of
from mtcl_torchrec.evaluation.resampled import RANKING
from mtcl_torchrec.schema import Task

Supports = Callable[[str, str], Support]  # (task or "ranking", metric) -> what it rests on
_CHOSEN = ("rate", "recall", "hit", "value", "novelty")  # which are the same in any order where all rows are shown


def supports_of(
    table: PredictionsTable,
    clusters: tuple[np.ndarray, int],
    *,
    values: Mapping[str, float] | None = None,
    paired: bool = False,
) -> Supports:
    """A function from (task or ``"ranking"``, metric) to what that rests on.

    - A metric of an event: users with the event, and users with rows without (see `support_of`); GAUC: users with both.
    - Of a ranking, those with a request in which the event happened; of value@k, those to whom something happened that
      is worth something.
    - Of classes and numbers: users with labels.

    Args:
        clusters: from `mtcl_torchrec.evaluation.bootstrap.clusters_of`.
        values: task -> what its event is worth, of ``value@k``.
        paired: of the difference of two rankings of these rows, which only requests tell something of that leave a
            choice: of more than k rows, and with the event and without.
    """
    owner, count = clusters

    @cache
    def rows() -> RankedRows:
        return RankedRows(table)

    @cache
    def of_task(name: str, weighted: bool = False) -> Support:
        labels, weights = table.labels(name), table.weights(name) if weighted else None
        if table.task(name).kind == "binary":
            return support_of(labels, owner, weights)
        known = (~np.isnan(labels)).astype(np.float64)
        return rests_on(known if weights is None else known * weights, owner, "label")

    @cache
    def of_users(name: str) -> Support:
        labels, users = table.labels(name), table.users
        if users is None:
            return Support(0.0, "no users are known")
        known = ~(np.isnan(labels) | np.isnan(users))
        happened = np.bincount(owner[known], labels[known] > 0, count)
        number = np.bincount(owner[known], minlength=count)
        both = (happened > 0) & (happened < number)
        within = weakest([of_task(name), support_of(np.where(known & both[owner], labels, np.nan), owner)])
        if within.unsure:
            return within
        return rests_on(both[owner] & known, owner, "both")

    @cache
    def of_requests(measure: str, name: str, k: int) -> Support:
        ranked = rows()
        request, own = ranked.requests, owner[ranked.known]
        size = ranked.rows_of_request
        counts = size > (k if paired and measure in _CHOSEN else 0)
        if measure == "value":
            return rests_on(np.where(counts[request], reward_of(table, values or {})[ranked.known], 0.0), own)
        if measure == "novelty":
            return rests_on(counts[request].astype(np.float64), own, "request")
        happened = ranked.labels(name) > 0
        if paired:
            events = np.bincount(request, happened, len(size))
            counts = counts & (events > 0) & (events < size)
        return weakest([of_task(name), rests_on(np.where(counts[request], happened, 0.0), own)])

    def support(of: str, metric: str) -> Support:
        parts = parts_of(metric)
        if of == RANKING and parts.measure not in ("auc", "gauc"):
            return of_requests(parts.measure, parts.of, int(parts.k or 0))
        name = parts.of if of == RANKING else of
        return of_users(name) if parts.measure == "gauc" else of_task(name, parts.weighted)

    return support


def unsure_tasks(tasks: Sequence[Task], labels: np.ndarray, users: np.ndarray | None) -> dict[str, str]:
    """Task -> why nothing can be sure of it on some rows, in a few words; of those tasks of which that is so.

    What is chosen by a mean over tasks (an epoch, a trial) leaves them out: noise would decide.

    Args:
        tasks: T of them.
        labels: (N, T), NaN where missing.
        users: (N,) keys, NaN or None where not known; None where no user is.

    Example:
        >>> labels = np.stack([np.arange(300) % 2, np.arange(300) % 100 == 0], axis=1).astype(float)
        >>> unsure_tasks([Task.binary("click"), Task.binary("like")], labels, np.arange(300) // 10)
        {'like': 'too few events (3)'}
    """
    clusters = clusters_of(users, len(labels))
    found = dict[str, str]()
    for task, of in zip(tasks, labels.T, strict=True):
        known = ~np.isnan(of)
        rest = support_of(of, clusters) if task.kind == "binary" else rests_on(known, clusters, "label")
        one = "" if task.kind == "binary" or len(np.unique(of[known])) > 1 else "one label throughout"
        if why := rest.unsure or one:
            found[task.name] = why
    return found
