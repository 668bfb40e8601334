"""One ranking against another for an event, on the same rows: by how much it is better, and whether that is sure.

Terminal, report and diagnosis draw their words from these gaps, so that they never say different things.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mtcl_torchrec.evaluation.confidence import Support
from mtcl_torchrec.evaluation.estimates import Estimate, auc_estimate, gauc_estimate
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.significance import t_quantile
from mtcl_torchrec.evaluation.supports import RANKING, supports_of

MARGIN = 0.005  # of an AUC, where no standard error is known
FUSED, HEAD, POPULARITY = "fused", "own head", "popularity"
WORDS = {1: "better", -1: "worse", 0: "too close to call"}


@dataclass(frozen=True)
class Gap:
    """By how much one ranking is better than another, for one task's event.

    Args:
        task: whose event.
        against: the name of the other.
        difference: of AUC (or GAUC): positive where the first is better.
        error: its standard error; NaN where it is not known.
        unsure: why no difference could be sure, in a few words, such as too few events; empty where one could.
        freedom: degrees of freedom of the standard error.
    """

    task: str
    against: str
    difference: float
    error: float = math.nan
    unsure: str = ""
    freedom: float = math.inf

    @property
    def half(self) -> float:
        """Half of its 95 % interval; NaN where it has none."""
        return math.nan if self.unsure else t_quantile(self.freedom) * self.error


def sign_of(gap: Gap) -> int:
    """1 where the difference is sure to be for the better, -1 for the worse, 0 where it is too close to call.

    Example:
        >>> sign_of(Gap("click", "popularity", 0.03, 0.01)), sign_of(Gap("click", "popularity", 0.03, 0.02))
        (1, 0)
        >>> sign_of(Gap("click", "popularity", 0.03, 0.01, "too few events (3)"))
        0
    """
    if math.isnan(gap.difference) or gap.unsure:
        return 0
    bound = MARGIN if math.isnan(gap.error) else gap.half
    return 0 if not abs(gap.difference) > bound else (1 if gap.difference > 0 else -1)


def word_of(gap: Gap) -> str:
    """Better, worse, too close to call, or why it cannot be told.

    Example:
        >>> word_of(Gap("click", "popularity", -0.03, 0.01))
        'worse'
    """
    return gap.unsure or WORDS[sign_of(gap)]


@dataclass(frozen=True)
class Ranked:
    """How some rankings order the rows for one event.

    Args:
        task: whose event.
        metric: ``"gauc"``, or ``"auc"`` where no user has rows with and without the event.
        estimates: ranking -> its value and error.
        support: what the metric rests on.
    """

    task: str
    metric: str
    estimates: Mapping[str, Estimate]
    support: Support

    def gap(self, against: str, *, unwanted: bool = False) -> Gap:
        """Of the fused score to another ranking.

        Args:
            unwanted: the event lowers the score, so that a low value is what is wanted.  A head that foresees such an
                event is right where the fused ranking puts it last.
        """
        fused, other = self.estimates[FUSED], self.estimates[against]
        if unwanted and against == HEAD:
            other = Estimate(1 - other.value, -other.influence)
        difference, error = fused.minus(other)
        gap = -difference if unwanted else difference
        return Gap(self.task, against, gap, error, self.support.unsure, self.support.freedom)


def ranked_events(
    table: PredictionsTable,
    tasks: Sequence[str],
    clusters: np.ndarray,
    count: int | None = None,
    *,
    against: Collection[str] = (HEAD, POPULARITY),
) -> list[Ranked]:
    """The fused score, each event's own head, and the popularity for that event, on the same rows.

    Args:
        table: with a score.
        tasks: binary ones.
        clusters, count: whose rows are drawn together; see `mtcl_torchrec.evaluation.estimates`.
        against: what the fused score is held against.

    Returns:
        One for each task that has rows with and without the event.
    """
    found, support = [], supports_of(table, (clusters, _count(clusters) if count is None else count))
    popular = table.popular_for if POPULARITY in against else {}
    for task in tasks:
        rankings = {FUSED: table.score}
        if HEAD in against and task in table.predicted_names:
            rankings[HEAD] = table.predicted(task)
        if task in popular:
            rankings[POPULARITY] = popular[task]
        labels = table.labels(task)
        metric, estimates = "auc", dict[str, Estimate]()
        if table.users is not None:
            within = np.where(np.isnan(table.users), np.nan, labels)  # rows of no known user are in no user's ranking
            found_within = {n: gauc_estimate(within, s, clusters, count) for n, s in rankings.items() if s is not None}
            if FUSED in found_within and not math.isnan(found_within[FUSED].value):
                labels, metric, estimates = within, "gauc", found_within
        if not estimates:
            estimates = {n: auc_estimate(labels, s, clusters, count) for n, s in rankings.items() if s is not None}
        if FUSED in estimates and not math.isnan(estimates[FUSED].value):
            found.append(Ranked(task, metric, estimates, support(RANKING, f"{metric} {task}")))
    return found


def _count(clusters: np.ndarray) -> int:
    return int(clusters.max(initial=-1)) + 1


def against_popularity(
    table: PredictionsTable,
    tasks: Sequence[str],
    clusters: np.ndarray,
    count: int | None = None,
    *,
    unwanted: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Event -> how the fused score does against the popularity for that event, as metrics.json keeps it; nothing where
    either is not known.

    Args:
        table, tasks, clusters, count: as of `ranked_events`.
        unwanted: events that lower the score.

    Returns:
        ``metric``, ``difference`` (positive: the fused score is better), ``error``, ``unsure`` and ``freedom`` as of
        `Gap`, and ``fused_is``, as `word_of` says it.
    """
    if table.score is None:
        return {}
    found, known = {}, [task for task in tasks if task in table.popular_for]
    for of in ranked_events(table, known, clusters, count, against=(POPULARITY,)):
        gap = of.gap(POPULARITY, unwanted=of.task in unwanted)
        found[of.task] = {"metric": of.metric, **_without(asdict(gap), "task", "against"), "fused_is": word_of(gap)}
    return found


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
