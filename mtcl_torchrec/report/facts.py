"""The numbers that the verdict is drawn from: of metrics.json, with standard errors where there are predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtcl_torchrec.evaluation.confidence import FEWEST, SURE, TOO_FEW, Support
from mtcl_torchrec.evaluation.estimates import Estimate, chance_error, task_estimates
from mtcl_torchrec.evaluation.naming import MAIN, label_of
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.rivals import FUSED, HEAD, POPULARITY, Gap, Ranked, ranked_events
from mtcl_torchrec.evaluation.supports import supports_of
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.influence import shares_of_ranking


@dataclass(frozen=True)
class TaskFact:
    """How well one task is predicted.

    Args:
        task, kind: its name and kind.
        metrics: as in metrics.json.
        errors: metric -> standard error: as metrics.json has it, or as the predictions tell; of a run without either,
            that of an AUC of ½ on as many rows.
        unsure: why nothing can be sure of it, such as too few events; empty where it can.
    """

    task: str
    kind: str
    metrics: Mapping[str, Any]
    errors: Mapping[str, float] = field(default_factory=dict)
    unsure: str = ""

    def number(self, key: str) -> float:
        """One of its metrics, NaN where it is not defined."""
        value = self.metrics.get(key)
        return math.nan if value is None else float(value)

    def error(self, key: str) -> float:
        """Standard error of one of them, NaN where it is not known."""
        return self.errors.get(key, math.nan)


@dataclass(frozen=True)
class Event:
    """How the rankings order the rows for one event.

    Args:
        task: whose event.
        metric: ``"GAUC"`` or ``"AUC"``.
        rankings: ``"fused"``, ``"own head"``, ``"popularity"`` -> value and standard error.
        unwanted: the event lowers the score: a low value is what is wanted of the fused ranking.
        gaps: of the fused ranking against the others, as wanted.
        others: tasks that have the same labels, so that this is their event, too; the own head is that of `task`.
    """

    task: str
    metric: str
    rankings: Mapping[str, tuple[float, float]]
    unwanted: bool = False
    gaps: tuple[Gap, ...] = ()
    others: tuple[str, ...] = ()


def task_facts(run: RunContents) -> list[TaskFact]:
    """Of every task of the run, and every conditional prediction that was evaluated."""
    facts = []
    for task in dict.fromkeys([*run.of_tasks, *run.tasks]):
        metrics, kind = run.of_tasks.get(task) or {}, run.kinds.get(task, "binary")
        errors: dict[str, float] = {}
        unsure = ""
        if run.table is not None and task in run.table.predicted_names:
            support = supports_of(run.table, run.clusters)
            found = task_estimates(run.table, task, *run.clusters)
            errors = {key: error_of(of, support(task, key)) for key, of in found.items()}
            unsure = support(task, MAIN[kind]).unsure
        elif kind == "binary" and metrics.get("auc") is not None:
            rows, rate = metrics.get("count") or 0.0, metrics.get("base_rate") or 0.0
            unsure = f"{TOO_FEW} ({rows * rate:.0f})" if rows * rate < FEWEST else ""
            errors["auc"] = chance_error(rows, rate)
        for key in run.intervals.get(task) or {}:
            errors[key] = known_or(stored_error(run, task, key), errors.get(key))
        facts.append(TaskFact(task, kind, metrics, errors, unsure))
    return facts


def error_of(estimate: Estimate, support: Support) -> float:
    """Standard error of which 1.96 make half of the interval, as `stored_error`; NaN where nothing is sure."""
    return support.quantile * estimate.error / SURE


def stored_error(run: RunContents, of: str, metric: str) -> float:
    """Standard error of which 1.96 make half of the interval that metrics.json has; NaN where it has none.

    Args:
        of: a task, or ``"ranking"``.
    """
    found = (run.intervals.get(of) or {}).get(metric) or {}
    value, low, high = found.get("value"), found.get("low"), found.get("high")
    if value is None or low is None or high is None:
        return math.nan
    return max(float(high) - float(value), float(value) - float(low)) / SURE  # a bound may cut one end off


def known_or(first: float, other: float | None) -> float:
    """The first, or the other where that is NaN."""
    return first if not math.isnan(first) or other is None else other


def negative(run: RunContents, task: str) -> bool:
    """Whether the event is unwanted: it costs something, or else lowers the fused score that the rows were judged by,
    as far as its declaration says."""
    worth = (run.evaluation.get("values") or {}).get(task)
    if worth:
        return float(worth) < 0
    fusion = (run.config.get("fusion") if run.fused_anew else run.fusion) or {}
    declared = [(fusion.get(key) or {}).get(task, 0.0) for key in ("weights", "signs", "exponents")]
    return any(float(value) < 0 for value in declared)


def events(run: RunContents) -> list[Event]:
    """The events that the fused score is measured by: GAUC where there is one, else AUC."""
    ranking = run.evaluation.get("ranking") or {}
    fused, popular = ranking.get("fused") or {}, ranking.get("popular") or {}
    judged = [key.removeprefix("auc ") for key in fused if key.startswith("auc ")]
    heads: dict[str, list[str]] = {}
    for task in judged:
        heads.setdefault(run.same_event.get(task, task), []).append(task)
    by_task: dict[str, Ranked] = {}
    if run.table is not None and run.table.score is not None:
        there = [task for task in heads if task in run.table.predicted_names]
        by_task = {of.task: of for of in ranked_events(run.table, there, *run.clusters)}
    found = []
    for task, *others in heads.values():
        metric = "gauc" if fused.get(f"gauc {task}") is not None else "auc"
        own = (run.of_tasks.get(task) or {}).get(metric)
        values = {FUSED: fused.get(f"{metric} {task}"), HEAD: own, POPULARITY: popular.get(f"{metric} {task}")}
        known = {name: float(v) for name, v in values.items() if v is not None}
        if FUSED not in known:
            continue
        of = by_task.get(task)
        of = of if of is not None and of.metric == metric else None
        stored = {
            FUSED: stored_error(run, "ranking", f"{metric} {task}"), HEAD: stored_error(run, task, metric),
        }  # fmt: skip
        estimates = {} if of is None else of.estimates
        rankings = {
            n: (
                v,
                known_or(
                    stored.get(n, math.nan), error_of(estimates[n], of.support) if of and n in estimates else None
                ),
            )
            for n, v in known.items()
        }
        unwanted = negative(run, task)
        gaps = tuple(_gap(of, task, other, known, unwanted) for other in (HEAD, POPULARITY) if other in known)
        found.append(Event(task, label_of(metric), rankings, unwanted, gaps, tuple(others)))
    return found


def _gap(of: Ranked | None, task: str, other: str, known: Mapping[str, float], unwanted: bool) -> Gap:
    if of is not None and other in of.estimates:
        return of.gap(other, unwanted=unwanted)
    # A head that foresees what is unwanted is right where the fused ranking puts it last.
    aim = 1 - known[other] if unwanted and other == HEAD else known[other]
    return Gap(task, other, (aim - known[FUSED]) if unwanted else known[FUSED] - aim)


def same_rows(one: PredictionsTable, other: PredictionsTable, task: str) -> bool:
    """Whether two tables have the same labels of a task in the same order, so that they are compared row by row."""
    if len(one) != len(other):
        return False
    a, b = one.labels(task), other.labels(task)
    return bool(np.array_equal(a, b, equal_nan=True)) and one.fingerprint == other.fingerprint


def tried_gaps(run: RunContents) -> tuple[float, list[Gap]]:
    """Of a fusion fitted after training: its target on rows left out, and by how much it is better than the best head
    alone and than popularity; NaN and nothing where none was fitted."""
    tried = {str(of["name"]): of for of in run.fitted.get("tried") or [] if of.get("target") is not None}
    chosen = tried.get(chosen_name(run.fitted))
    if chosen is None:
        return math.nan, []
    target, gaps = float(chosen["target"]), []
    heads = [name for name in tried if name.startswith("head ")]
    if heads and chosen["name"] not in heads:
        best = max(heads, key=lambda name: float(tried[name]["target"]))
        better, half = chosen.get("better"), chosen.get("better_half")
        gap = target - float(tried[best]["target"]) if better is None else float(better)
        gaps.append(Gap(best.removeprefix("head "), best, gap, math.nan if half is None else float(half) / SURE))
    if "popularity" in tried:
        of = tried["popularity"]
        errors = [
            math.nan if line.get("better_half") is None else float(line["better_half"]) / SURE for line in (chosen, of)
        ]
        gap = target - float(of["target"])
        gaps.append(Gap("", "popularity", gap, math.hypot(*errors)))
    return target, gaps


def chosen_name(fitted: Mapping[str, Any]) -> str:
    """The name under which report.json lists what was chosen among what was tried."""
    method = str(fitted.get("method", ""))
    return method if method.startswith("head ") else f"{fitted.get('combiner', '')}, {method}"


def influence(run: RunContents) -> tuple[dict[str, float], str]:
    """Task -> its share of the ranking, and where that is known from; empty where it is not."""
    if run.fitted.get("influence"):
        return {task: float(v) for task, v in run.fitted["influence"].items()}, "as measured when the fusion was fitted"
    table = run.table
    if table is None or table.score is None or run.fused_anew:
        return {}, ""
    names = [n for n in (run.fused_tasks or run.tasks) if n in table.predicted_names and f"p.{n}" in table.frame]
    requests = table.requests
    groups = None if requests is None else np.where(np.isnan(requests), -1 - np.arange(len(table)), requests)
    shares = shares_of_ranking({n: table.predicted(n) for n in names}, table.score, groups)
    left = 1 - sum(shares.values())
    if shares and abs(left) >= 0.005:
        shares["the rest"] = left
    return shares, f"as told from the predictions on the {run.split} split"
