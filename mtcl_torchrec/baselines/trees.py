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
_EVERY = 10  # iterations between two looks at the validation split


def fit_trees(data: BaselineData, task: Task, settings: Settings, *, seed: int = 0) -> Predictions:
    """Fit on the training rows that have the task's label; the validation split says after how many trees to stop.

    Ids and bags are target-encoded out of fold, see `target_means`.

    Args:
        settings: ``smoothing`` of the encoding, and arguments of `HistGradientBoostingClassifier`.
        seed: of the folds.
    """
    column = data.column(task)
    at = data.train.labelled(column)
    labels = data.train.labels[at, column]
    events = [labels == c for c in range(task.out_features)] if task.kind == "multiclass" else [labels]
    encodings = [target_means(data, task, at, event, settings["smoothing"], seed) for event in events]
    design = np.hstack([dense_columns(data, task, data.train)[at], *(encoded for encoded, _ in encodings)])
    options: dict[str, Any] = {name: value for name, value in settings.items() if name != "smoothing"}
    kind = HistGradientBoostingRegressor if task.kind == "regression" else HistGradientBoostingClassifier
    model = kind(max_iter=ITERATIONS, early_stopping=False, random_state=seed, **options)
    weights = None if data.train.weights is None else data.train.weights[at, column]
    model.fit(design, labels, weights)
    del design
    held_out = {
        split: np.hstack([dense_columns(data, task, rows), *(later(rows) for _, later in encodings)])
        for split, rows in data.held_out.items()
    }
    labels, best = data.held_out["val"].labels[:, column], (-np.inf, 0)
    found: Predictions = {split: {} for split in held_out}
    for number, predicted in enumerate(_staged(model, held_out["val"], task), 1):
        if number % _EVERY:
            continue
        quality = task_quality(task, task_metrics(task, labels, predicted))
        if quality > best[0] or not best[1]:
            best, found["val"] = (quality, number), {task.name: predicted}
    for split in (s for s in held_out if s != "val"):
        stages = _staged(model, held_out[split], task)
        found[split] = {task.name: next(p for number, p in enumerate(stages, 1) if number == best[1])}
    return found


def _staged(model: Any, design: np.ndarray, task: Task) -> Iterator[np.ndarray]:
    """Predictions after each iteration."""
    if task.kind == "regression":
        yield from (p.astype(np.float32) for p in model.staged_predict(design))
        return
    for shares in model.staged_predict_proba(design):
        yield of_classes(shares.astype(np.float32), model.classes_, task)
