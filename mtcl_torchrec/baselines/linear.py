"""Logistic regression on one-hot features, one for each task; of a number, ridge regression."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.stats import loguniform
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from mtcl_torchrec.baselines.designs import one_hot
from mtcl_torchrec.baselines.rows import BaselineData
from mtcl_torchrec.baselines.search import Predictions, Settings
from mtcl_torchrec.schema import Task

USUAL: Settings = {"C": 0.03}
SPACE = {"C": loguniform(1e-4, 3)}
MAX_CLASSES = 32  # of a multiclass task; there is a column of coefficients for each
_ITERATIONS = 60  # of L-BFGS and LSQR; with C as small as validation chooses it, the coefficients stand by then


def fit_linear(data: BaselineData, task: Task, settings: Settings) -> Predictions:
    """Fit on the training rows that have the task's label, with their sample weights.

    Args:
        settings: ``C``, the inverse of the L2 penalty's weight.
    """
    column = data.column(task)
    at = data.train.labelled(column)
    designs = one_hot(data, task)
    train = designs["train"] if len(at) == len(data.train) else designs["train"][at]
    labels = data.train.labels[at, column].astype(np.float64)
    weights = None if data.train.weights is None else data.train.weights[at, column]
    if task.kind == "regression":
        mean, spread = labels.mean(), labels.std() or 1.0
        # No intercept: every row has as many one-hot columns, whose coefficients can add up to one.
        ridge = Ridge(alpha=1 / settings["C"], solver="lsqr", fit_intercept=False, max_iter=_ITERATIONS)
        ridge.fit(train, (labels - mean) / spread, weights)
        return {
            split: {task.name: (mean + spread * ridge.predict(designs[split])).astype(np.float32)}
            for split in data.held_out
        }
    model = LogisticRegression(C=settings["C"], max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, labels, weights)
    found: Predictions = {}
    for split in data.held_out:
        shares = model.predict_proba(designs[split]).astype(np.float32)
        found[split] = {task.name: of_classes(shares, model.classes_, task)}
    return found


def of_classes(shares: np.ndarray, classes: np.ndarray, task: Task) -> np.ndarray:
    """Probabilities of the classes a model has met as those of the task: (N,) of a binary one, else (N, C).

    Example:
        >>> of_classes(np.array([[0.25, 0.75]]), np.array([0.0, 2.0]), Task.multiclass("taste", 3)).tolist()
        [[0.25, 0.0, 0.75]]
    """
    if task.kind == "binary":
        return shares[:, 1]
    whole = np.zeros((len(shares), task.out_features), np.float32)
    whole[:, classes.astype(np.int64)] = shares
    return whole
