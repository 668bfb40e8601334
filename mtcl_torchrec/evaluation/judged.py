"""A table of predictions judged as a whole: tasks, ranking, segments, confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mtcl_torchrec.evaluation.bootstrap import clusters_of, intervals
from mtcl_torchrec.evaluation.metrics import Metrics
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.progress import Progress, quiet
from mtcl_torchrec.evaluation.ranked import ranking_metrics
from mtcl_torchrec.evaluation.report import Evaluation, evaluate_predictions
from mtcl_torchrec.evaluation.resampled import resampled_metrics
from mtcl_torchrec.evaluation.rivals import against_popularity
from mtcl_torchrec.evaluation.segments import of_segment, split_by_segment
from mtcl_torchrec.evaluation.supports import RANKING, Supports, supports_of


def evaluate_table(
    table: PredictionsTable,
    *,
    fused_tasks: Sequence[str] | None = None,
    k: Sequence[int] = (5, 10),
    segments: Sequence[str] = (),
    bootstrap: int = 0,
    seed: int = 0,
    popular: bool = True,
    progress: Progress = quiet,
) -> Evaluation:
    """Everything there is to know of the predictions of a run, or of a baseline.

    Args:
        table: with the thresholds of the validation split, and what events are worth.
        fused_tasks: the tasks whose events AUC and GAUC of the score are measured by; the default is all binary ones.
        k: lengths of what is shown.
        segments: names as of `mtcl_torchrec.evaluation.segments.segment_values`.
        bootstrap: draws of users for the intervals; 0 is none.
        seed: of the draws.
        popular: whether the rows are ranked by popularity, too, and the fused score is held against that: by the
            popularity for an event in what is measured of that event, and as a whole by the fused popularity.
        progress: told of the segments, and of the draws.

    Raises:
        DataError: a segment, or a task of `table.values`, that is not there.

    Example:
        >>> import pandas as pd
        >>> from mtcl_torchrec.schema import Task
        >>> rows = {"user": [1, 1, 2, 2], "label.click": [0.0, 1.0, 1.0, 0.0], "score": [0.1, 0.9, 0.8, 0.3]}
        >>> table = PredictionsTable(pd.DataFrame(rows), (Task.binary("click"),), values={"click": 1.0})
        >>> found = evaluate_table(table, k=[1], segments=["user"])
        >>> found.ranking["fused"]["value@1"], list(found.segments["user"])
        (1.0, ['1', '2'])
    """
    progress("judging rows", 0, 0)
    predictions = {name: table.predicted(name) for name in table.predicted_names}
    if table.score is not None:
        predictions["score"] = table.score
    popularity, clusters = table.popular_for if popular else {}, clusters_of(table)
    support = supports_of(table, clusters, values=table.values)
    labels = [table.labels(task.name) for task in table.tasks]
    found = evaluate_predictions(
        table.tasks,
        predictions,
        np.stack(labels, 1) if labels else np.empty((len(table), 0)),
        table.users,
        popularity,
        [task.name for task in table.tasks] if fused_tasks is None else fused_tasks,
        table.thresholds,
        {name: weights for name in table.predicted_names if (weights := table.weights(name)) is not None},
    )
    if table.requests is not None and not np.isnan(table.requests).all():

        def ranked(scores: np.ndarray | None, of_event: dict[str, np.ndarray] | None = None) -> Metrics:
            return _with_halves(ranking_metrics(table, scores, k=k, values=table.values, of_event=of_event), support)

        if "fused" in found.ranking:
            found.ranking["fused"] |= ranked(table.score)
        if popular and table.popular is not None:
            found.ranking["popular"] = found.ranking.get("popular", {}) | ranked(table.popular, popularity)
    apart: dict[str, dict[str, dict]] = {}
    for name in segments:
        apart[name], done = {}, 0
        for value, rows in split_by_segment(table, name):
            progress(f"judging rows by {name}", done, len(table))
            apart[name][value] = _of_segment(rows, k)
            done += len(rows)
    sure = {}
    if bootstrap:
        parts = resampled_metrics(table, clusters, k=k, values=table.values)
        sure = intervals(parts, clusters[1], draws=bootstrap, seed=seed, support=support, progress=progress)
    held_against = {}
    if popularity:
        judged = [key.removeprefix("auc ") for key in found.ranking.get("fused", {}) if key.startswith("auc ")]
        unwanted = {task for task, value in table.values.items() if value < 0}
        held_against = against_popularity(table, judged, *clusters, unwanted=unwanted)
    return replace(found, values=dict(table.values), segments=apart, intervals=sure, against_popularity=held_against)


def _with_halves(metrics: Metrics, support: Supports) -> Metrics:
    """``value@5 half``, half of its 95 % interval, in place of ``value@5 error``."""
    found: Metrics = {}
    for key, value in metrics.items():
        metric = key.removesuffix(" error")
        if metric == key:
            found[key] = value
        else:
            found[f"{metric} half"] = support(RANKING, metric).quantile * value
    return found


def _of_segment(rows: PredictionsTable, k: Sequence[int]) -> dict:
    found = evaluate_table(rows, k=k, popular=False)
    return {
        "rows": found.rows,
        "tasks": found.tasks,
        "ranking": found.ranking.get("fused", {}),
        "quality": of_segment(rows),
    }
