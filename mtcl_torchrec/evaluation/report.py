"""Evaluate a model on a split and show it as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from mtcl_torchrec.evaluation.bootstrap import Interval
from mtcl_torchrec.evaluation.metrics import Metrics, auc, gauc, weighted_metrics, whole_task_metrics
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.schema import Schema, Task, chain_links

_WEIGHTED = {"auc": "AUC", "top1": "top-1", "log_loss": "log-loss", "ne": "NE", "calibration": "calib.", "mse": "MSE",
             "mae": "MAE", "r2": "R²", "base_rate": ""}  # fmt: skip
BASE = {"binary": "base rate", "multiclass": "top class", "regression": "mean label"}


@dataclass
class Evaluation:
    """Metrics of one split.

    Args:
        kinds: task name -> kind of the task.
        tasks: task name -> its metrics; and, in a chain of events, ``"buy|click"`` -> those of the prediction given the
            parent's event, on the rows where that happened.
        ranking: ranking rule -> {"auc <task>", "gauc <task>"}, and what
            `mtcl_torchrec.evaluation.ranked.ranking_metrics` returns; the fused score and what it is compared with.
        rows: number of rows.
        values: task -> what its event is worth, in value@k.
        segments: column -> its value -> what there is of these rows: ``"rows"``, ``"tasks"`` and ``"ranking"``, by the
            fused score.
        intervals: task or ``"ranking"`` -> metric -> how sure it is.
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


def evaluate_predictions(
    tasks: Sequence[Task],
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray,
    users: np.ndarray | None,
    popularity: np.ndarray | None,
    ranked_tasks: Sequence[str],
    thresholds: Mapping[str, float] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> Evaluation:
    """Metrics of each task, and of the fused score beside popularity as rankings of the same impressions.

    Args:
        predictions: what `predict` returned; a task without a prediction is left out.
        labels: (N, T) in the order of `tasks`.
        users: (N,) keys for GAUC, missing (NaN) where the user is not known.
        popularity: (N,) how popular each row's item was in the training split.
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
    rules = {"fused": predictions.get("score"), "popular": popularity}
    ranking: dict[str, Metrics] = {}
    for rule, scores in rules.items():
        if scores is None:
            continue
        ranking[rule] = {}
        for i, task in enumerate(tasks):
            if task.kind != "binary" or task.name not in ranked_tasks:
                continue
            present = ~np.isnan(labels[:, i])
            y, s = labels[present, i], scores[present]
            ranking[rule][f"auc {task.name}"] = auc(y, s)
            if users is not None:
                ranking[rule][f"gauc {task.name}"] = gauc(y, s, users[present])
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
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def print_evaluation(evaluation: Evaluation, title: str, console: Console | None = None) -> None:
    """Print the metrics as tables: the tasks, then the fused score beside popularity."""
    console = console or Console()
    by_kind = [
        ("binary", {"AUC": "auc", "GAUC": "gauc", "log-loss": "log_loss", "NE": "ne", "calib.": "calibration"}),
        ("multiclass", {"top-1": "top1", "top-5": "top5", "log-loss": "log_loss", "NE": "ne"}),
        ("regression", {"MSE": "mse", "MAE": "mae", "R²": "r2"}),
    ]
    heading = f"{title}: {evaluation.rows:,} rows"
    for kind, columns in by_kind:
        of_kind = {n: m for n, m in evaluation.tasks.items() if evaluation.kinds[n] == kind}
        if not of_kind:
            continue
        table = plain_table(heading, [f"{kind} task", *columns, BASE[kind], "labels"])
        for name, metrics in of_kind.items():
            cells = [cell(metrics.get(key)) for key in (*columns.values(), "base_rate")]
            table.add_row(name, *cells, f"{int(metrics['count']):,}")
        console.print(table, "")
        heading = ""
        weighed = {n: m for n, m in of_kind.items() if "weighted_base_rate" in m}
        if weighed:
            told = [key for key in _WEIGHTED if any(f"weighted_{key}" in m for m in weighed.values())]
            names = [BASE[kind] if key == "base_rate" else _WEIGHTED[key] for key in told]
            table = plain_table("By sample weights, as the loss counts rows; above, all rows count alike", ["", *names])
            for name, metrics in weighed.items():
                table.add_row(name, *(cell(metrics.get(f"weighted_{key}")) for key in told))
            console.print(table, "")
    if any(evaluation.ranking.values()):
        rules = list(evaluation.ranking)
        kinds = [k for k in ("auc", "gauc") if any(c.startswith(k + " ") for c in evaluation.ranking[rules[0]])]
        headers = [f"{k.upper()} {rule}" for k in kinds for rule in rules]
        title = "The same rows ranked by the fused score" + (" and by popularity" if len(rules) > 1 else "")
        table = plain_table(title, ["event", *headers])
        judged = [n for n in evaluation.tasks if f"{kinds[0]} {n}" in evaluation.ranking[rules[0]]]
        for name, heading in ranked_events(evaluation, judged).items():
            table.add_row(
                heading, *(cell(evaluation.ranking[rule].get(f"{k} {name}")) for k in kinds for rule in rules)
            )
        console.print(table)
