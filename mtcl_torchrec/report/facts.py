"""The numbers that the verdict is drawn from: of metrics.json, with standard errors where there are predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtcl_torchrec.evaluation.confidence import SURE
from mtcl_torchrec.evaluation.estimates import Estimate, auc_estimate, chance_error, clusters_of, gauc_estimate
from mtcl_torchrec.evaluation.predictions_file import PredictionsTable
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.influence import shares_of_ranking

SINGLE = ("single_task", "single-task", "single", "twin")  # in the name of the baseline that trains each task alone


@dataclass(frozen=True)
class TaskFact:
    """How well one task is predicted.

    Args:
        task, kind: its name and kind.
        metrics: as in metrics.json.
        error: standard error of its AUC: as metrics.json has it, or as the predictions tell; of a run without either,
            that of an AUC of ½ on as many rows.
        errors: metric -> standard error, of those that metrics.json has intervals of.
    """

    task: str
    kind: str
    metrics: Mapping[str, Any]
    error: float = math.nan
    errors: Mapping[str, float] = field(default_factory=dict)

    def number(self, key: str) -> float:
        """One of its metrics, NaN where it is not defined."""
        value = self.metrics.get(key)
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Gap:
    """By how much one ranking is better than another, for one task's event.

    Args:
        task: whose event.
        against: the name of the other.
        difference: of AUC (or GAUC): positive where the first is better.
        error: its standard error; NaN where it is not known.
    """

    task: str
    against: str
    difference: float
    error: float = math.nan


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
        error = math.nan
        if kind == "binary" and metrics.get("auc") is not None:
            error = chance_error(metrics.get("count") or 0, metrics.get("base_rate") or 0)
            if run.table is not None and task in run.table.predicted_names:
                found = _auc(run, run.table.labels(task), run.table.predicted(task))
                error = found.error
        errors = {key: stored_error(run, task, key) for key in (run.intervals.get(task) or {})}
        facts.append(TaskFact(task, kind, metrics, _known(errors.get("auc"), error), errors))
    return facts


def stored_error(run: RunContents, of: str, metric: str) -> float:
    """Standard error of which 1.96 make half of the interval that metrics.json has; NaN where it has none.

    Args:
        of: a task, or ``"ranking"``.
    """
    found = (run.intervals.get(of) or {}).get(metric) or {}
    low, high = found.get("low"), found.get("high")
    return math.nan if low is None or high is None else (float(high) - float(low)) / (2 * SURE)


def _known(first: float | None, other: float) -> float:
    return other if first is None or math.isnan(first) else first


def _auc(run: RunContents, labels: np.ndarray, scores: np.ndarray) -> Estimate:
    return auc_estimate(labels, scores, *run.clusters)


def negative(run: RunContents, task: str) -> bool:
    """Whether the event lowers the fused score that the rows were judged by, as far as its declaration says."""
    fusion = (run.config.get("fusion") if run.fused_anew else run.fusion) or {}
    declared = [(fusion.get(key) or {}).get(task, 0.0) for key in ("weights", "signs", "exponents")]
    return any(float(value) < 0 for value in declared)


def events(run: RunContents) -> list[Event]:
    """The events that the fused score is measured by: GAUC where there is one, else AUC."""
    ranking = run.evaluation.get("ranking") or {}
    fused, popular = ranking.get("fused") or {}, ranking.get("popular") or {}
    found = []
    judged = [key.removeprefix("auc ") for key in fused if key.startswith("auc ")]
    heads: dict[str, list[str]] = {}
    for task in judged:
        heads.setdefault(run.same_event.get(task, task), []).append(task)
    for task, *others in heads.values():
        metric = "gauc" if fused.get(f"gauc {task}") is not None else "auc"
        own = (run.of_tasks.get(task) or {}).get(metric)
        values = {
            "fused": fused.get(f"{metric} {task}"), "own head": own, "popularity": popular.get(f"{metric} {task}"),
        }  # fmt: skip
        known = {name: float(v) for name, v in values.items() if v is not None}
        if "fused" not in known:
            continue
        unwanted = negative(run, task)
        estimates = _estimates(run, task, metric)
        stored = {
            "fused": stored_error(run, "ranking", f"{metric} {task}"), "own head": stored_error(run, task, metric),
        }  # fmt: skip
        rankings = {n: (v, _known(stored.get(n), _error_of(estimates.get(n)))) for n, v in known.items()}
        gaps = []
        for other in ("own head", "popularity"):
            if other not in known:
                continue
            error = math.nan
            if "fused" in estimates and other in estimates:
                error = estimates["fused"].minus(estimates[other])[1]
            # A head that foresees what is unwanted is right where the fused ranking puts it last.
            aim = 1 - known[other] if unwanted and other == "own head" else known[other]
            gaps.append(Gap(task, other, (aim - known["fused"]) if unwanted else known["fused"] - aim, error))
        found.append(Event(task, metric.upper(), rankings, unwanted, tuple(gaps), tuple(others)))
    return found


def _error_of(estimate: Estimate | None) -> float:
    return math.nan if estimate is None else estimate.error


def _estimates(run: RunContents, task: str, metric: str) -> dict[str, Estimate]:
    table = run.table
    if table is None or table.score is None or task not in table.predicted_names:
        return {}
    rankings = {"fused": table.score, "own head": table.predicted(task)}
    if table.popularity is not None:
        rankings["popularity"] = np.nan_to_num(table.popularity)
    estimate = gauc_estimate if metric == "gauc" else auc_estimate
    labels, (clusters, count) = table.labels(task), run.clusters
    if metric == "gauc" and table.users is not None:  # rows of no known user are in no user's ranking
        labels = np.where(np.isnan(table.users), np.nan, labels)
    return {name: estimate(labels, scores, clusters, count) for name, scores in rankings.items()}


def same_rows(one: PredictionsTable, other: PredictionsTable, task: str) -> bool:
    """Whether two tables have the same labels of a task in the same order, so that they are compared row by row."""
    if len(one) != len(other):
        return False
    a, b = one.labels(task), other.labels(task)
    return bool(np.array_equal(a, b, equal_nan=True)) and one.fingerprint == other.fingerprint


def baseline_estimates(run: RunContents) -> dict[str, dict[str, tuple[float, float]]]:
    """Binary task -> this run and each baseline -> AUC and its standard error on the report's split.

    A baseline that predicts one score alone is judged by that for every event.
    """
    tables = {"this run": run.table, **{name: of.get(run.split) for name, of in run.of_baselines.items()}}
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for fact in run.kinds:
        if run.kinds[fact] != "binary":
            continue
        for name, table in tables.items():
            scores = None if table is None else scores_for(table, fact)
            if table is None or scores is None or fact not in _labelled(table):
                continue
            e = auc_estimate(table.labels(fact), scores, *_clusters(run, table))
            error = _known(stored_error(run, fact, "auc"), e.error) if table is run.table else e.error
            if not math.isnan(e.value):
                found.setdefault(fact, {})[name] = (e.value, error)
    return {task: of for task, of in found.items() if set(of) - {"this run"}}


def baseline_gaps(run: RunContents) -> list[Gap]:
    """By how much this run's AUC is better than each baseline's, for each binary task that both predict."""
    gaps = []
    for name, of in run.of_baselines.items():
        table = of.get(run.split)
        if table is None or run.table is None:
            continue
        for task in run.kinds:
            scores = scores_for(table, task)
            if run.kinds[task] != "binary" or scores is None or task not in _labelled(table):
                continue
            if task not in run.table.predicted_names:
                continue
            paired = same_rows(run.table, table, task)
            own = _auc(run, run.table.labels(task), run.table.predicted(task))
            clusters = run.clusters if paired else _clusters(run, table)
            difference, error = own.minus(auc_estimate(table.labels(task), scores, *clusters), paired=paired)
            if not math.isnan(difference):
                gaps.append(Gap(task, name, difference, error))
    return gaps


def scores_for(table: PredictionsTable, task: str) -> np.ndarray | None:
    """What a table ranks the rows by for an event: its prediction, or its only score where it predicts none; None
    otherwise.
    """
    if table.predicted_names and task not in table.predicted_names:
        return None
    scores = table.predicted(task) if table.predicted_names else table.score
    return None if scores is None else np.nan_to_num(scores, nan=float(np.nanmin(scores)) if len(scores) else 0.0)


def _labelled(table: PredictionsTable) -> set[str]:
    return {name for task in table.tasks for name in (task.name, task.conditional_name) if name is not None}


def _clusters(run: RunContents, table: PredictionsTable) -> tuple[np.ndarray, int]:
    if table is run.table:
        return run.clusters
    clusters = clusters_of(table.users, len(table))
    return clusters, int(clusters.max(initial=-1)) + 1


def untuned(run: RunContents) -> bool:
    """Whether the baselines other than twins were tried at their usual settings only."""
    rivals = [of for name, of in run.baselines.items() if not is_single_task(name) and isinstance(of, dict)]
    return bool(rivals) and all((of.get("budget") or {}).get("trials") == 1 for of in rivals)


def is_single_task(name: str) -> bool:
    """Whether a baseline is the twin that trains each task alone.

    Example:
        >>> is_single_task("single_task"), is_single_task("item_knn")
        (True, False)
    """
    return any(part in name.lower() for part in SINGLE)


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
        better, error = chosen.get("better"), chosen.get("better_error")
        gap = target - float(tried[best]["target"]) if better is None else float(better)
        gaps.append(Gap(best.removeprefix("head "), best, gap, math.nan if error is None else float(error)))
    if "popularity" in tried:
        of = tried["popularity"]
        errors = [
            math.nan if line.get("better_error") is None else float(line["better_error"]) for line in (chosen, of)
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
