"""What an item usually gets: the simplest baseline, and what the others fall back on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtcl_torchrec.baselines.rows import BaselineData, BaselineRows
from mtcl_torchrec.baselines.search import Predictions, Settings
from mtcl_torchrec.data.popularity import SMOOTHING
from mtcl_torchrec.schema import Task

# Nothing is tuned: it is the popularity that a run is held against wherever it is judged.
USUAL: Settings = {"smoothing": SMOOTHING}


def fit_popularity(data: BaselineData, task: Task, settings: Settings) -> Predictions:
    """What `mtcl_torchrec.data.popularity.Popularity` says of each row's item; of a multiclass task, the shares of the
    classes, the same for all items."""
    if task.kind == "multiclass":
        shares = prior_of(data, task).astype(np.float32)
        whole = {split: np.tile(shares, (len(rows), 1)) for split, rows in data.held_out.items()}
        return {split: {task.name: predicted} for split, predicted in whole.items()}
    smoothed = item_means(data, task)
    return {split: {task.name: smoothed(rows)} for split, rows in data.held_out.items()}


def item_means(data: BaselineData, task: Task) -> Callable[[BaselineRows], np.ndarray]:
    """A function from rows to the smoothed means (N,) float32 of their items."""
    return lambda rows: data.popularity.of(rows.known_items, [task.name])[task.name]


def prior_of(data: BaselineData, task: Task) -> np.ndarray:
    """What a model without inputs predicts: the mean label (), or the classes' shares (C,), of the training rows."""
    return np.array(data.popularity.usual[task.name])
