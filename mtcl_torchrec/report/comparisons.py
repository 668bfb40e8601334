"""This run beside its baselines and twins: how well each predicts, and which differences are more than chance.

Differences, their intervals and what is concluded from them are those of `mtcl baselines`; see
`mtcl_torchrec.baselines.family`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mtcl_torchrec.baselines.entries import NETWORKS, TUNED, is_tuned
from mtcl_torchrec.baselines.family import against_run, concluded_from, lengths_of
from mtcl_torchrec.evaluation.compare import Difference
from mtcl_torchrec.evaluation.confidence import plain_number, plus_minus
from mtcl_torchrec.evaluation.estimates import clusters_of, task_estimates
from mtcl_torchrec.evaluation.naming import MAIN, label_of, sign_of_better
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.resampled import RANKING
from mtcl_torchrec.evaluation.rivals import WORDS
from mtcl_torchrec.evaluation.supports import supports_of
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.facts import error_of, known_or, stored_error
from mtcl_torchrec.report.words import signed

THIS_RUN = "this run"
GUESS = {"auc": 0.5, "ne": 1.0, "r2": 0.0}  # what predicting nothing gets
SINGLE = ("single_task", "single-task", "single", "twin")  # in the name of the baseline that trains each task alone


@dataclass(frozen=True)
class Comparison:
    """This run and a baseline, in one measure.

    Args:
        of: a task, or ``"ranking"``.
        metric: such as ``"auc"``, ``"ne"``, ``"r2"``; of the ranking ``"value@5"``.
        against: the baseline.
        difference: the run's less the baseline's, in the metric: of NE, the run is better where it is negative.
        half: of its 95 % interval; NaN where it has none.
        sign: 1 where the run is better beyond chance, -1 worse, 0 too close to call; all baselines and measures tested
            together.
        unsure: why that cannot be told, in a few words; empty where it can.
    """

    of: str
    metric: str
    against: str
    difference: float
    half: float = math.nan
    sign: int = 0
    unsure: str = ""

    @property
    def gain(self) -> float:
        """The difference, positive where the run is better.

        Example:
            >>> Comparison("taste", "ne", "trees", -0.25).gain
            0.25
        """
        return sign_of_better(self.metric) * self.difference

    @property
    def word(self) -> str:
        """Better, worse, too close to call, or why that cannot be told."""
        return self.unsure or WORDS[self.sign]

    def said(self, digits: int = 4) -> str:
        """The difference and its interval.

        Example:
            >>> Comparison("like", "auc", "trees", 0.01, 0.002).said(), Comparison("taste", "ne", "als", -0.1).said(2)
            ('+0.0100 ± 0.0020 AUC', '−0.10 NE')
        """
        value = plus_minus(self.difference, self.half, digits).removeprefix(plain_number(self.difference, digits))
        return f"{signed(self.difference, digits)}{value} {label_of(self.metric)}"

    def by(self) -> str:
        """By how much one of the two is better than the other, without a sign.

        Example:
            >>> Comparison("taste", "ne", "trees", 0.0855, 0.0089, -1).by()
            '0.0855 ± 0.0089 NE'
        """
        return f"{plus_minus(abs(self.difference), self.half)} {label_of(self.metric)}"


def is_single_task(name: str) -> bool:
    """Whether a baseline is the twin that trains each task alone.

    Example:
        >>> is_single_task("single_task"), is_single_task("item_knn")
        (True, False)
    """
    return any(part in name.lower() for part in SINGLE)


def comparisons(run: RunContents) -> list[Comparison]:
    """This run beside each baseline: the main measure of each task that both predict, and value@k."""
    if run.table is None:
        return []
    theirs = {name: _filled(of[run.split]) for name, of in run.of_baselines.items() if run.split in of}
    lengths = lengths_of(run.evaluation)
    found = against_run(run.table, theirs, lengths)
    keys = concluded_from(run.table, lengths)
    return [
        _comparison(found[name][key], name)
        for key in keys
        for name in found
        if key in found[name] and not math.isnan(found[name][key].difference)
    ]


def _comparison(of: Difference, name: str) -> Comparison:
    sign = 0 if of.better is None else 1 if of.better == "a" else -1
    return Comparison(of.of, of.metric, name, -of.difference, (of.high - of.low) / 2, sign, of.unsure)


def of_tasks(found: Sequence[Comparison]) -> list[Comparison]:
    """Those of a task, not of the ranking."""
    return [c for c in found if c.of != RANKING]


def _filled(table: PredictionsTable) -> PredictionsTable:
    """A baseline that predicts one score alone is judged by that for every event."""
    if table.predicted_names or table.score is None:
        return table
    place = pd.Series(table.score).rank(pct=True).fillna(0.0).to_numpy()  # in the same order, and from 0 to 1
    events = {f"p.{task.name}": place for task in table.tasks if task.kind == "binary"}
    return replace(table, frame=table.frame.assign(**events))


def qualities(run: RunContents) -> dict[str, dict[str, tuple[float, float]]]:
    """Task -> this run and each baseline -> its main measure (`MAIN` of its kind) and the standard error of that (NaN
    where nothing is sure), on the report's split; of tasks that some baseline predicts."""
    tables = {THIS_RUN: run.table, **{name: of.get(run.split) for name, of in run.of_baselines.items()}}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for task in [name for name in run.kinds if "|" not in name]:
        metric = MAIN[run.kinds[task]]
        for name, table in tables.items():
            if table is None:
                continue
            of = _filled(table)
            if task not in of.predicted_names:
                continue
            clusters = run.clusters if table is run.table else _clusters(table)
            estimate = task_estimates(of, task, *clusters).get(metric)
            if estimate is None or math.isnan(estimate.value):
                continue
            stored = stored_error(run, task, metric) if table is run.table else math.nan
            own = error_of(estimate, supports_of(of, clusters)(task, metric))
            found.setdefault(task, {})[name] = (estimate.value, known_or(stored, own))
    return {task: of for task, of in found.items() if set(of) - {THIS_RUN}}


def _clusters(table: PredictionsTable) -> tuple[np.ndarray, int]:
    clusters = clusters_of(table.users, len(table))
    return clusters, int(clusters.max(initial=-1)) + 1


def untuned(run: RunContents) -> dict[str, str]:
    """The baselines, twins among them, that were trained at one setting only -> which one, in words."""
    found = {name: of for name, of in run.baselines.items() if isinstance(of, dict) and not is_tuned(of)}
    return {name: _which(name, str(of.get(TUNED) or "")) for name, of in found.items()}


def _which(name: str, how: str) -> str:
    own = "the run's own settings" if name in NETWORKS else "its usual settings"
    return how.partition("not tuned: ")[2] or own
