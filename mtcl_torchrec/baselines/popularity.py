"""What an item usually gets: the simplest baseline, and what the others fall back on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtcl_torchrec.baselines.rows import BaselineData, BaselineRows
from mtcl_torchrec.baselines.search import Predictions, Settings
from mtcl_torchrec.schema import Task

USUAL: Settings = {"smoothing": 20.0}
SPACE = {"smoothing": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]}


def fit_popularity(data: BaselineData, task: Task, settings: Settings) -> Predictions:
    """The share of an item's training rows in which the event happened, (Σ wy + m·p̄) / (Σ w + m).

    Of a regression it is the item's smoothed mean; of a multiclass task, the shares of the classes, the same for all
    items.  An item that the training rows do not have gets the overall mean p̄.

    Args:
        settings: ``smoothing``, the pseudo-count m.
    """
    prior = prior_of(data, task)
    if task.kind == "multiclass":
        shares = np.asarray(prior, np.float32)
        whole = {split: np.tile(shares, (len(rows), 1)) for split, rows in data.held_out.items()}
        return {split: {task.name: predicted} for split, predicted in whole.items()}
    smoothed = item_means(data, task, settings["smoothing"])
    return {split: {task.name: smoothed(rows)} for split, rows in data.held_out.items()}


def item_means(data: BaselineData, task: Task, smoothing: float) -> Callable[[BaselineRows], np.ndarray]:
    """A function from rows to the smoothed means (N,) float32 of their items."""
    column, prior = data.column(task), float(prior_of(data, task))
    train = data.train
    at = train.labelled(column)
    at = at[train.items[at] >= 0]
    items, labels = train.items[at], train.labels[at, column].astype(np.float64)
    weights = np.ones(len(at)) if train.weights is None else train.weights[at, column]
    sums = np.bincount(items, weights * labels, minlength=data.num_items)
    counts = np.bincount(items, weights, minlength=data.num_items)
    means = np.r_[(sums + smoothing * prior) / (counts + smoothing), prior].astype(np.float32)  # the last: unknown

    def of(rows: BaselineRows) -> np.ndarray:
        return means[rows.items]

    return of


def prior_of(data: BaselineData, task: Task) -> np.ndarray:
    """What a model without inputs predicts: the mean label (), or the classes' shares (C,), of the training rows.

    A class that no row has still has a little, so that it is not impossible.
    """
    column = data.column(task)
    at = data.train.labelled(column)
    labels = data.train.labels[at, column].astype(np.float64)
    weights = np.ones(len(at)) if data.train.weights is None else data.train.weights[at, column].astype(np.float64)
    if task.kind == "multiclass":
        counts = np.bincount(labels.astype(np.int64), weights, minlength=task.out_features) + 1 / task.out_features
        return counts / counts.sum()
    if weights.sum() == 0:
        return np.array(0.5 if task.kind == "binary" else 0.0)
    return np.array(np.average(labels, weights=weights))
