"""Evaluate a model on a split and show it as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from mtcl_torchrec.evaluation.bootstrap import Interval
from mtcl_torchrec.evaluation.confidence import PLUS_MINUS, plus_minus
from mtcl_torchrec.evaluation.metrics import Metrics, auc, gauc, weighted_metrics, whole_task_metrics
from mtcl_torchrec.evaluation.naming import BASE, WEIGHTED, bounds_of, label_of
from mtcl_torchrec.evaluation.plain_table import print_columns
from mtcl_torchrec.schema import Schema, Task, chain_links

_WEIGHTED = ("auc", "top1", "log_loss", "ne", "calibration", "mse", "mae", "r2", "base_rate")


@dataclass
class Evaluation:
    """Metrics of one split.

    Args:
        kinds: task name -> kind of the task.
        tasks: task name -> its metrics; and, in a chain of events, ``"buy|click"`` -> those of the prediction given the
            parent's event, on the rows where that happened.
        ranking: ranking rule -> {"auc <task>", "gauc <task>"}, and what
            `mtcl_torchrec.evaluation.ranked.ranking_metrics` returns; ``"fused"``, the fused score, and ``"popular"``:
            of an event, by the popularity for it; of all that is shown, by the fused popularity.
        rows: number of rows.
        values: task -> what its event is worth, in value@k.
        segments: column -> its value -> what there is of these rows: ``"rows"``, ``"tasks"``, ``"ranking"``, by the
            fused score, and ``"quality"``, of `mtcl_torchrec.evaluation.segments.of_segment`.
        intervals: task or ``"ranking"`` -> metric -> how sure it is.
        against_popularity: event -> whether the fused score ranks better than popularity; see
            `mtcl_torchrec.evaluation.rivals.against_popularity`.
        same_event: task -> the task before it that has the same labels: as events, the two are one.
        knowable: of rows of a synthetic world, task -> how much of what is knowable is known, and so ``"score"``; see
            `mtcl_torchrec.evaluation.knowable`.
    """

    kinds: dict[str, str]
    tasks: dict[str, Metrics]
    ranking: dict[str, Metrics]
    rows: int
    values: dict[str, float] = field(default_factory=dict)
    segments: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    knowable: dict[str, Metrics] | None = None
    same_event: dict[str, str] = field(default_factory=dict)
    against_popularity: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate_predictions(
    tasks: Sequence[Task],
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray,
    users: np.ndarray | None,
    popularity: Mapping[str, np.ndarray],
    ranked_tasks: Sequence[str],
    thresholds: Mapping[str, float] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Evaluation:
    """Metrics of each task, and of the fused score beside each event's popularity as rankings of the same impressions.

    Args:
        predictions: what `predict` returned; a task without a prediction is left out.
        labels: (N, T) in the order of `tasks`.
        users: (N,) keys for GAUC, missing (NaN) where the user is not known.
        popularity: task -> (N,) how popular each row's item was for its event in the training split; see
            `mtcl_torchrec.data.popularity`.
        ranked_tasks: the tasks whose events the rankings are measured by; of them, the binary ones count.
        thresholds: binary task -> from which probability on a yes is said.
        weights: task -> (N,) sample weights, of those that have some: `weighted_metrics` are told beside the others,
            for which all rows count alike.
    """
    by_task: dict[str, Metrics] = {}
    kinds: dict[str, str] = {}

    def judge(name: str, task: Task, label: np.ndarray) -> None:
        if name in predictions:
            threshold = (thresholds or {}).get(name)
            by_task[name] = whole_task_metrics(task, label, predictions[name], users, threshold)
            kinds[name] = task.kind
            if weights is not None and name in weights:
                by_task[name] |= weighted_metrics(task, label, predictions[name], weights[name])

    for i, task in enumerate(tasks):
        judge(task.name, task, labels[:, i])
    for child, parent in chain_links(tasks):
        if (name := tasks[child].conditional_name) is not None:
            judge(name, tasks[child], np.where(labels[:, parent] == 1, labels[:, child], np.nan))
    score = predictions.get("score")
    known = {"fused": score is not None, "popular": bool(popularity)}
    ranking: dict[str, Metrics] = {rule: {} for rule, there in known.items() if there}
    for i, task in enumerate(tasks):
        if task.kind != "binary" or task.name not in ranked_tasks:
            continue
        present = ~np.isnan(labels[:, i])
        for rule, scores in {"fused": score, "popular": popularity.get(task.name)}.items():
            if scores is None:
                continue
            y, s, found = labels[present, i], scores[present], ranking[rule]
            found[f"auc {task.name}"] = auc(y, s)
            if users is not None:
                found[f"gauc {task.name}"] = gauc(y, s, users[present])
    return Evaluation(kinds, by_task, ranking, len(labels), same_event=same_events(tasks))


def same_events(tasks: Sequence[Task]) -> dict[str, str]:
    """Binary task -> the first binary task before it that has the same labels, of those that there are.

    Example:
        >>> same_events([Task.binary("click"), Task.binary("like"), Task.binary("match", label="click")])
        {'match': 'click'}
    """
    first: dict[tuple, str] = {}
    binary = [task for task in tasks if task.kind == "binary"]
    return {task.name: one for task in binary if (one := first.setdefault(task.event, task.name)) != task.name}


def ranked_events(evaluation: Evaluation, names: Sequence[str]) -> dict[str, str]:
    """Of these tasks, the first of each event -> a heading that names the others, too: ``"click, match"``."""
    of_event: dict[str, list[str]] = {}
    for name in names:
        of_event.setdefault(evaluation.same_event.get(name, name), []).append(name)
    return {tasks[0]: ", ".join(tasks) for tasks in of_event.values()}


def user_groups(schema: Schema, frame: pd.DataFrame) -> np.ndarray | None:
    """Keys for metrics within a user; missing where the schema's user feature says 'unknown' (index 0)."""
    if schema.user is None:
        return None
    users = frame[schema.user]
    feature = next((f for f in schema.sparse_features if f.kind == "id" and f.rows_from == schema.user), None)
    codes = pd.factorize(users)[0].astype(np.float64)
    codes[codes < 0] = np.nan
    if feature is not None and feature.encoding == "index":
        codes[(users == 0).to_numpy(dtype=bool, na_value=False)] = np.nan
    return codes


def cell(value: float | None, digits: int = 4) -> str:
    """A number of a table; a dash where it is not defined."""
    return "–" if value is None or np.isnan(value) else f"{value:z.{digits}f}"


def told(evaluation: Evaluation, of: str, metric: str, value: float | None) -> str:
    """A metric, with half of its interval where there is one.

    Args:
        of: a task, or ``"ranking"`` for the fused score.
    """
    sure = evaluation.intervals.get(of, {}).get(metric)
    return plus_minus(value, None if sure is None else sure.half, bounds=bounds_of(metric))


_TOLD = {
    "binary": ("auc", "gauc", "log_loss", "ne", "calibration"),
    "multiclass": ("top1", "top5", "log_loss", "ne"),
    "regression": ("mse", "mae", "r2"),
}


def print_evaluation(evaluation: Evaluation, title: str, console: Console | None = None) -> None:
    """Print the metrics as tables: the tasks, then the fused score beside popularity; with intervals, where the
    evaluation has them."""
    console = console or Console()
    heading = f"{title}: {evaluation.rows:,} rows"
    for kind, keys in _TOLD.items():
        of_kind = {n: m for n, m in evaluation.tasks.items() if evaluation.kinds[n] == kind}
        if not of_kind:
            continue
        columns = [f"{kind} task", *(label_of(key, short=True) for key in keys), BASE[kind], "labels"]
        rows = [
            [name, *(told(evaluation, name, key, m.get(key)) for key in keys), cell(m.get("base_rate")),
             f"{int(m['count']):,}"]
            for name, m in of_kind.items()
        ]  # fmt: skip
        print_columns(console, heading, columns, rows)
        heading = ""
        weighed = {n: m for n, m in of_kind.items() if "weighted_base_rate" in m}
        if weighed:
            keys = tuple(key for key in _WEIGHTED if any(WEIGHTED + key in m for m in weighed.values()))
            names = [BASE[kind] if key == "base_rate" else label_of(key, short=True) for key in keys]
            rows = [
                [name, *(told(evaluation, name, WEIGHTED + key, m.get(WEIGHTED + key)) for key in keys)]
                for name, m in weighed.items()
            ]
            title = "By sample weights, as the loss counts rows; above, all rows count alike"
            print_columns(console, title, ["", *names], rows)
    if any(evaluation.ranking.values()):
        _print_ranking(evaluation, console)
    if evaluation.intervals:
        few = {of: sure.unsure for of, by in evaluation.intervals.items() for sure in by.values() if sure.unsure}
        said = "".join(f"; none of {of}: {why}" for of, why in few.items() if of != "ranking")
        console.print(f"{PLUS_MINUS}{said}.", highlight=False, markup=False, soft_wrap=True)


def _print_ranking(evaluation: Evaluation, console: Console) -> None:
    rules = list(evaluation.ranking)
    kinds = [k for k in ("auc", "gauc") if any(c.startswith(k + " ") for c in evaluation.ranking[rules[0]])]
    judged = [n for n in evaluation.tasks if kinds and f"{kinds[0]} {n}" in evaluation.ranking[rules[0]]]
    if not judged:
        return
    against = {n: of["fused_is"] for n, of in evaluation.against_popularity.items()}
    columns = ["event", *(f"{label_of(k)} {rule}" for k in kinds for rule in rules), *(["fused is"] if against else [])]
    rows = []
    for name, heading in ranked_events(evaluation, judged).items():
        cells = [
            told(evaluation, "ranking" if rule == "fused" else "", f"{k} {name}", metrics.get(f"{k} {name}"))
            for k in kinds
            for rule, metrics in evaluation.ranking.items()
        ]
        rows.append([heading, *cells, *([against.get(name, "–")] if against else [])])
    title = "The same rows ranked by the fused score" + (" and by each event's popularity" if len(rules) > 1 else "")
    print_columns(console, title, columns, rows, last=True)
    if against:
        unwanted = [n for n, value in evaluation.values.items() if value < 0 and n in against]
        line = "fused is: than popularity, of the same rows, " + f"by {label_of(kinds[-1])}"
        line += "; better or worse where the difference is beyond its 95 % interval"
        line += f"; of {', '.join(unwanted)}, low is what is wanted" if unwanted else ""
        console.print(f"{line}.", highlight=False, markup=False, soft_wrap=True)
