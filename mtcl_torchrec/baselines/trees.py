"""Gradient-boosted trees of scikit-learn on dense and target-encoded features, one forest for each task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.stats import loguniform
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from mtcl_torchrec.baselines.designs import dense_columns, target_means
from mtcl_torchrec.baselines.linear import of_classes
from mtcl_torchrec.baselines.rows import BaselineData
from mtcl_torchrec.baselines.search import Predictions, Settings
from mtcl_torchrec.evaluation.metrics import task_metrics, task_quality
from mtcl_torchrec.schema import Task

USUAL: Settings = {
    "learning_rate": 0.1, "max_leaf_nodes": 31, "min_samples_leaf": 50, "l2_regularization": 1.0, "smoothing": 20.0,
}  # fmt: skip
SPACE = {
    "learning_rate": loguniform(0.03, 0.2),
    "max_leaf_nodes": [7, 15, 31, 63],
    "min_samples_leaf": [20, 50, 100, 200, 500],
    "l2_regularization": loguniform(0.1, 30),
    "smoothing": [5.0, 20.0, 100.0],
}
MAX_CLASSES = 8  # of a multiclass task: each has a tree in every iteration, and a target encoding of every feature
ITERATIONS = 200
PATIENCE = 20  # iterations in which the loss on the validation split does not fall, and none is added
_EVERY = 5  # iterations between two looks at the ranking of the validation split


def fit_trees(data: BaselineData, task: Task, settings: Settings, *, seed: int = 0) -> Predictions:
    """Fit on the training rows that have the task's label; the validation split says after how many trees to stop.

    No more are grown when its loss falls no longer, and of those that were, as many predict as rank it best.  Ids and
    bags are target-encoded out of fold, see `target_means`, once for all trials of equal smoothing.

    Args:
        settings: ``smoothing`` of the encoding, and arguments of `HistGradientBoostingClassifier`.
        seed: of the folds.
    """
    column = data.column(task)
    at = data.train.labelled(column)
    train, held_out = _designs(data, task, at, settings["smoothing"], seed)
    labels = data.held_out["val"].labels[:, column]
    stop = _stopping_rows(task, held_out["val"], labels, data.train.labels[at, column])
    options: dict[str, Any] = {name: value for name, value in settings.items() if name != "smoothing"}
    kind = HistGradientBoostingRegressor if task.kind == "regression" else HistGradientBoostingClassifier
    model = kind(
        max_iter=ITERATIONS, early_stopping=bool(stop), n_iter_no_change=PATIENCE, tol=0.0, random_state=seed, **options
    )
    weights = None if data.train.weights is None else data.train.weights[at, column]
    model.fit(train, data.train.labels[at, column], weights, **stop)
    best, last = (-np.inf, 0), model.n_iter_
    found: Predictions = {split: {} for split in held_out}
    for number, predicted in enumerate(_staged(model, held_out["val"], task), 1):
        if number % _EVERY and number != last:
            continue
        quality = task_quality(task, task_metrics(task, labels, predicted))
        if quality > best[0] or not best[1]:
            best, found["val"] = (quality, number), {task.name: predicted}
    for split in (s for s in held_out if s != "val"):
        stages = _staged(model, held_out[split], task)
        found[split] = {task.name: next(p for number, p in enumerate(stages, 1) if number == best[1])}
    return found


def _designs(
    data: BaselineData, task: Task, at: np.ndarray, smoothing: float, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(n, d) of the task's training rows, and (N, d) of each held-out split; kept while the task's trials last."""
    key = ("trees", task.name, smoothing, seed)
    if key not in data.designs:
        for other in [k for k in data.designs if k[0] == "trees" and k[1] != task.name]:
            del data.designs[other]
        labels = data.train.labels[at, data.column(task)]
        events = [labels == c for c in range(task.out_features)] if task.kind == "multiclass" else [labels]
        encodings = [target_means(data, task, at, event, smoothing, seed) for event in events]
        data.designs[key] = (
            np.hstack([dense_columns(data, task, data.train)[at], *(encoded for encoded, _ in encodings)]),
            {
                split: np.hstack([dense_columns(data, task, rows), *(later(rows) for _, later in encodings)])
                for split, rows in data.held_out.items()
            },
        )
    return data.designs[key]


def _stopping_rows(task: Task, design: np.ndarray, labels: np.ndarray, trained: np.ndarray) -> dict[str, np.ndarray]:
    """The validation rows whose loss can be told, as `fit` takes them; nothing where there is none."""
    known = ~np.isnan(labels)
    if task.kind != "regression":
        known &= np.isin(labels, np.unique(trained))  # a class that no training row has has no probability
    return {"X_val": design[known], "y_val": labels[known]} if known.any() else {}


def _staged(model: Any, design: np.ndarray, task: Task) -> Iterator[np.ndarray]:
    """Predictions after each iteration."""
    if task.kind == "regression":
        yield from (p.astype(np.float32) for p in model.staged_predict(design))
        return
    for shares in model.staged_predict_proba(design):
        yield of_classes(shares.astype(np.float32), model.classes_, task)
