"""Which of two runs is better, and whether that is more than chance: paired, on the same rows.

Both runs are measured in the same draws of users, so that what is hard for both cancels out of the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtcl_torchrec.evaluation.bootstrap import DRAWS, Resampled, clusters_of, draw, spread
from mtcl_torchrec.evaluation.confidence import Support
from mtcl_torchrec.evaluation.naming import parts_of, sign_of_better
from mtcl_torchrec.evaluation.predictions_table import AMOUNT, KEYS, POPULAR, PredictionsTable
from mtcl_torchrec.evaluation.report import same_events
from mtcl_torchrec.evaluation.resampled import RANKING, resampled_metrics
from mtcl_torchrec.evaluation.significance import LEVEL, holm, two_sided
from mtcl_torchrec.evaluation.supports import supports_of
from mtcl_torchrec.schema import DataError

HEADLINES = ("auc", "gauc", "ne", "f1", "top1", "r2", "mae", "value", "rate", "ndcg")


@dataclass(frozen=True)
class Difference:
    """One metric of two runs.

    Args:
        of: a task, a conditional prediction, or ``"ranking"``.
        metric: such as ``"auc"``, or ``"ndcg@10 click"`` of the ranking.
        a, b: of the two.
        difference: b - a.
        low, high: of its 95 % interval.
        p: of no difference, two-sided.
        p_holm: the same, where one of many such comparisons would be significant by chance (Holm, Scand. J. Stat.
            1979); NaN where there was nothing to test: `unsure`, or no draw in which the two differ.
        unsure: why no difference could be sure, in a few words, such as too few events; the interval and p are NaN
            then.
        unwanted: of a ranking, it is measured by an event that costs something: less of it is better.
    """

    of: str
    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = float("nan")
    unsure: str = ""
    unwanted: bool = False

    @property
    def equal(self) -> bool:
        """Whether the two are the same number in every draw, as of equal predictions."""
        return self.difference == 0 and self.low == 0 and self.high == 0

    @property
    def better(self) -> str | None:
        """``"a"`` or ``"b"`` where the difference is significant at 5 % after Holm's correction and a direction is
        better, else None.

        Example:
            >>> Difference("click", "ne", 0.9, 0.8, -0.1, -0.2, -0.01, 0.001, 0.01).better
            'b'
            >>> Difference("ranking", "rate@5 hide", 0.1, 0.3, 0.2, 0.1, 0.3, 0.001, 0.01, unwanted=True).better
            'a'
        """
        way = sign_of_better(self.metric) * (-1 if self.unwanted else 1)
        if not self.p_holm < LEVEL or not way:
            return None
        return "b" if self.difference * way > 0 else "a"


def is_headline(of: str, metric: str) -> bool:
    """Whether a metric is among the few that are compared unless all are asked for: the more are, the less a single
    difference says."""
    parts = parts_of(metric)
    return parts.measure in HEADLINES and not parts.weighted


def check_same_rows(a: PredictionsTable, b: PredictionsTable, names: Sequence[str] = ("A", "B")) -> None:
    """See that two tables are of the same rows, in the same order, with the same labels of the tasks that both have.

    Args:
        names: of the two, for the message.

    Raises:
        DataError: naming what differs.
    """
    what = f"{names[0]} and {names[1]} were not judged on the same rows"
    if len(a) != len(b):
        raise DataError(
            f"{what}: {len(a):,} and {len(b):,} rows; judge both by one file with `mtcl evaluate --data FILE --save`"
        )
    for key in KEYS:
        if key in a.frame and key in b.frame:
            differ = a.key_texts(key) != b.key_texts(key)
            if differ.any():
                at = int(differ.argmax())
                raise DataError(f"{what}: {int(differ.sum()):,} rows differ in {key}, the first is row {at:,}")
    common = [task.name for task in a.tasks if task.name in {other.name for other in b.tasks}]
    if not common:
        raise DataError(f"{names[0]} and {names[1]} have no task in common")
    for task in common:
        kinds = a.task(task).kind, b.task(task).kind
        if kinds[0] != kinds[1]:
            raise DataError(f"{what}: task {task!r} is {kinds[0]} in one and {kinds[1]} in the other")
        x, y = a.labels(task), b.labels(task)
        differ = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        if differ.any():
            at = int(differ.argmax())
            raise DataError(f"{what}: {int(differ.sum()):,} labels of task {task!r} differ, the first is row {at:,}")


def compare_tables(
    a: PredictionsTable,
    b: PredictionsTable,
    *,
    k: Sequence[int] = (5, 10),
    values: Mapping[str, float] | None = None,
    only: Callable[[str, str], bool] = is_headline,
    draws: int = DRAWS,
    seed: int = 0,
    names: Sequence[str] = ("A", "B"),
) -> list[Difference]:
    """Every metric that both have, with the difference, its interval and its p-value.

    What is equal by construction is left out: where k reaches every request, what is shown is the same in any order,
    and NDCG@5 and NDCG@10 are one number; tasks with the same labels are one event.  Metrics of a handful of events are
    there, without p-value.

    A metric's difference over draws of users (see `mtcl_torchrec.evaluation.bootstrap`) gives its standard error; t =
    difference / error is compared with Student's t of (users - 1) degrees of freedom, of the users who tell something
    of it (see `mtcl_torchrec.evaluation.supports`), so that the interval leaves out 0 exactly where p < 0.05.

    Args:
        a, b: on the same rows.
        k, values: of the ranking; see `mtcl_torchrec.evaluation.ranked.ranking_metrics`.  Values of A by default, and
            what they are multiplied by, such as prices, is always that of A.
        only: (task or ``"ranking"``, metric) -> whether it is compared; all that are share one correction by Holm.
        draws: of users.
        seed: of the draws.
        names: of the two, for a message.

    Raises:
        DataError: the rows differ, or no metric is in both.
    """
    check_same_rows(a, b, names)
    values = dict(a.values) if values is None else values
    a, b = _completed(a, b), with_amounts_of(a, _completed(b, a))
    clusters = clusters_of(a)
    wanted = distinct_metrics(a, k)
    parts = [
        resampled_metrics(of, clusters, k=k, values=values, only=lambda name, m: only(name, m) and wanted(name, m))
        for of in (a, b)
    ]
    named = [{name: part for part in of for name in part.names} for of in parts]
    shared = [name for name in named[0] if name in named[1]]
    if not shared:
        raise DataError(f"{names[0]} and {names[1]} have no metric in common")
    users = clusters[1]
    values_of, draws_of = zip(*(_measured(of, shared, users, draws, seed) for of in parts), strict=True)
    spreads = spread(draws_of[1] - draws_of[0])
    support = supports_of(a, clusters, values=values, paired=True)
    costs = {task for task, value in values.items() if value < 0}
    found = [
        difference_of(of, metric, float(x), float(y), float(over_draws), support(of, metric))
        for (of, metric), x, y, over_draws in zip(shared, values_of[0], values_of[1], spreads, strict=True)
    ]
    return corrected([replace(d, unwanted=d.of == RANKING and parts_of(d.metric).of in costs) for d in found])


def difference_of(of: str, metric: str, a: float, b: float, over_draws: float, support: Support) -> Difference:
    """A difference with its interval and its p-value.

    Args:
        over_draws: standard deviation of b - a over the draws.
        support: what it rests on.
    """
    error = support.error_of(over_draws)
    half, p = support.quantile * error, two_sided(b - a, error, support.freedom)
    return Difference(of, metric, a, b, b - a, b - a - half, b - a + half, p, unsure=support.unsure)


def corrected(found: Sequence[Difference]) -> list[Difference]:
    """One family of differences, with `Difference.p_holm`: what is equal, or cannot be sure, was not tested."""
    adjusted = holm([float("nan") if difference.equal else difference.p for difference in found])
    return [replace(difference, p_holm=p) for difference, p in zip(found, adjusted, strict=True)]


def distinct_metrics(table: PredictionsTable, lengths: Sequence[int]) -> Callable[[str, str], bool]:
    """A function from (task or ``"ranking"``, metric) to whether two rankings of these rows could differ in it, and no
    other metric is the same number."""
    again = same_events(table.tasks)
    known = None if table.requests is None else table.requests[~np.isnan(table.requests)].astype(np.int64)
    longest = 0 if known is None else int(np.bincount(known).max(initial=0))
    whole = min((k for k in lengths if k >= longest), default=None)

    def real(of: str, metric: str) -> bool:
        if of != RANKING:
            return True
        parts = parts_of(metric)
        if parts.of in again:
            return False
        if not parts.k or int(parts.k) < longest:
            return True
        return parts.measure == "ndcg" and int(parts.k) == whole

    return real


def _completed(table: PredictionsTable, other: PredictionsTable) -> PredictionsTable:
    """A table with what another says of the same rows: a ranking can be judged by an event that it does not predict."""
    more = [task for task in other.tasks if task.name not in {own.name for own in table.tasks}]
    popular = ["popularity", "popular", *(POPULAR + task.name for task in other.tasks)]
    columns = [*KEYS, *popular, *(f"label.{task.name}" for task in more)]
    known = {column: other.frame[column] for column in columns if column in other.frame and column not in table.frame}
    return replace(table, frame=table.frame.assign(**known), tasks=(*table.tasks, *more))


def with_amounts_of(run: PredictionsTable, other: PredictionsTable) -> PredictionsTable:
    """Another table of the same rows, in which events are worth what they are worth in the first one."""
    own = [column for column in map(str, other.frame) if column.startswith(AMOUNT)]
    theirs = {column: run.frame[column].to_numpy() for column in map(str, run.frame) if column.startswith(AMOUNT)}
    return replace(other, frame=other.frame.drop(columns=own).assign(**theirs))


def _measured(
    parts: Sequence[Resampled], names: Sequence[tuple[str, str]], users: int, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(M,) estimates and (draws, M), of some metrics in their order."""
    place = {name: i for i, name in enumerate(name for part in parts for name in part.names)}
    at = [place[name] for name in names]
    values = np.concatenate([part.estimate(users) for part in parts])
    return values[at], draw(parts, users, draws=draws, seed=seed)[:, at]
