"""From which probability on a yes is said: chosen on the validation split, judged on the test split."""

from __future__ import annotations

from typing import Literal

import numpy as np

from mtcl_torchrec.evaluation.predictions_table import PredictionsTable

ThresholdRule = Literal["f1", "accuracy", "youden"]
NEVER = 2.0  # no probability reaches it


def best_threshold(labels: np.ndarray, predicted: np.ndarray, rule: ThresholdRule = "f1") -> float:
    """The threshold that is best on these rows, where a probability of at least the threshold is a yes.

    Args:
        labels: (N,) 0 or 1, NaN where missing.
        predicted: (N,) probabilities.
        rule: ``"f1"``: the harmonic mean of precision and recall; ``"accuracy"``; ``"youden"``: sensitivity +
            specificity - 1 (Youden, Cancer 1950).  Of equally good ones, the highest.

    Returns:
        One of the probabilities, or a number above 1 where nothing beats saying no to all; NaN where no label, or no
        positive one, is there.

    Example:
        >>> best_threshold(np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.1, 0.2, 0.3, 0.4]))
        0.2
        >>> best_threshold(np.array([0.0, 0.0, 0.0, 1.0]), np.array([0.1, 0.5, 0.3, 0.4]), "accuracy") == NEVER
        True
    """
    present = ~np.isnan(labels)
    y, p = labels[present], np.asarray(predicted, np.float64)[present]
    positives = y.sum()
    if positives == 0:
        return float("nan")
    order = np.argsort(-p, kind="stable")
    p, hits = p[order], np.cumsum(y[order])
    last = np.flatnonzero(np.r_[p[1:] != p[:-1], True])  # equal probabilities are said yes to together
    said, hits = last + 1.0, hits[last]
    if rule == "f1":
        return float(p[last][np.argmax(2 * hits / (said + positives))])
    negatives, false = len(y) - positives, said - hits
    # Of accuracy, saying no to all is an answer too.
    right = hits - false if rule == "accuracy" else hits / positives - false / max(negatives, 1)
    best = int(np.argmax(right))
    return NEVER if rule == "accuracy" and right[best] <= 0 else float(p[last][best])


def chosen_thresholds(validation: PredictionsTable, rule: ThresholdRule = "f1") -> dict[str, float]:
    """Binary task, or conditional prediction of a chain -> its threshold; of those that have a positive label.

    Args:
        validation: predictions for the validation split.
        rule: see `best_threshold`.
    """
    found = {
        name: best_threshold(validation.labels(name), validation.predicted(name), rule)
        for name in validation.predicted_names
        if validation.task(name).kind == "binary"
    }
    return {name: threshold for name, threshold in found.items() if not np.isnan(threshold)}
