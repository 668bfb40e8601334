"""How metrics are called: by whom they are shown, what they mean, which way is better, and within which bounds.

A metric's key in metrics.json is a measure, such as ``auc``; at a length of what is shown, ``ndcg@10``; of a ranking
and a task's event, ``ndcg@10 click``; by sample weights, ``weighted_auc``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

WEIGHTED = "weighted_"


@dataclass(frozen=True)
class Measure:
    """What stands for a measure, wherever it is shown.

    Args:
        label: as a heading.
        explained: what it is, in a sentence without its name.
        better: which way; ``""`` where that depends on something else.
        low, high: what it cannot pass.
        short: where a terminal has no room for the label; the label where empty.
    """

    label: str
    explained: str
    better: Literal["higher", "lower", ""] = "higher"
    low: float = 0.0
    high: float = 1.0
    short: str = ""


_ANY = math.inf
MEASURES = {
    "auc": Measure("AUC", "how often a row with the event is predicted above one without; 0.5 is guessing, 1 perfect"),
    "gauc": Measure("GAUC", "AUC among the rows of one user, averaged over users by their number of rows"),
    "pr_auc": Measure("PR-AUC", "average precision: the mean share of events down to each event; guessing gets the "
                      "base rate"),
    "log_loss": Measure("log-loss", "mean −log of the probability given to what happened", "lower", high=_ANY),
    "ne": Measure("NE", "normalised entropy: log-loss relative to always predicting the base rate; below 1 is better "
                  "than that", "lower", high=_ANY),
    "brier": Measure("Brier", "mean squared distance of the probability from what happened (1 or 0)", "lower"),
    "calibration": Measure("calibration", "predicted over observed events (of a regression: labels); 1 is right on "
                           "average", "", high=_ANY, short="calib."),
    "ece": Measure("ECE", "expected calibration error: the mean distance of predicted and observed rates, in 15 bins "
                   "of equally many rows", "lower"),
    "accuracy": Measure("accuracy", "the share of rows where yes or no was right"),
    "majority": Measure("always the same", "the accuracy of always saying what is more frequent", "",
                        short="majority"),
    "precision": Measure("precision", "the share of events among the rows where yes was said", "", short="precis."),
    "recall": Measure("recall", "the share of the events that are found: where yes was said or, of a ranking, among "
                      "the first k rows, the mean over the requests that have the event", ""),
    "f1": Measure("F1", "the harmonic mean of precision and recall"),
    "f1_all_yes": Measure("F1 of all yes", "the F1 of always saying yes", "", short="all yes"),
    "said_yes": Measure("said yes", "the share of rows where yes was said", ""),
    "threshold": Measure("threshold", "the probability from which on yes is said, chosen on validation", "",
                         short="from"),
    "top1": Measure("top-1", "how often the most probable class is the right one"),
    "top5": Measure("top-5", "how often the right class is among the five most probable ones"),
    "mse": Measure("MSE", "mean squared error", "lower", high=_ANY),
    "mae": Measure("MAE", "mean absolute error", "lower", high=_ANY),
    "r2": Measure("R²", "the share of the labels' variance that is explained; 0 is always predicting the mean",
                  low=-_ANY),
    "xauc": Measure("XAUC", "how often two rows with different labels are predicted in the right order; 0.5 is "
                    "guessing"),
    "base_rate": Measure("base rate", "the share of rows with the event; of classes, of the most frequent one", "",
                         -_ANY, _ANY),
    "count": Measure("labels", "rows whose label is known", "", high=_ANY),
    "value": Measure("value", "what the first k rows of a request brought: the values of what happened, added up",
                     low=-_ANY, high=_ANY),
    "rate": Measure("rate", "the share of the first k rows in which the event happened, of all requests: "
                    "click-through rate, conversion"),
    "ndcg": Measure("NDCG", "how high in a request the rows with the event stand, against the best possible order; the "
                    "mean over the requests that have the event"),
    "hit": Measure("hit rate", "of the requests that have the event, the share that have it among their first k rows",
                   short="hit"),
    "mrr": Measure("MRR", "mean reciprocal rank: 1 over the place of the first row with the event; the mean over the "
                   "requests that have it"),
    "map": Measure("MAP", "mean average precision within the requests that have the event"),
    "coverage": Measure("items shown", "the share of the items that are shown to anybody", ""),
    "novelty": Measure("novelty", "how unusual what is shown is: −log₂ of the item's share of training clicks", "",
                       high=_ANY),
    "choice": Measure("choice", "the share of requests that have more than k rows: in all others the order changes "
                      "nothing", ""),
    "requests": Measure("requests", "whose rows are ranked against each other", "", high=_ANY),
}  # fmt: skip
BASE = {"binary": "base rate", "multiclass": "top class", "regression": "mean label"}  # what ``base_rate`` is of a kind
MAIN = {"binary": "auc", "multiclass": "ne", "regression": "r2"}  # of a kind, where there is room for one measure
TASK_MEASURES = {  # of which a report has a column
    "binary": ("auc", "gauc", "pr_auc", "log_loss", "ne", "brier", "calibration", "ece"),
    "multiclass": ("top1", "top5", "log_loss", "ne", "ece"),
    "regression": ("mse", "mae", "r2", "xauc", "calibration"),
}
DECISIONS = ("threshold", "accuracy", "majority", "precision", "recall", "f1", "f1_all_yes", "said_yes")
OF_SHOWN = ("value", "rate", "ndcg", "recall", "hit", "mrr", "map", "coverage", "novelty")  # rankings within requests


@dataclass(frozen=True)
class Parts:
    """A metric's key, taken apart.

    Args:
        measure: key of `MEASURES`, or one that is not known.
        k: length of what is shown; empty where there is none.
        of: task whose event a ranking is measured by; empty where there is none.
        weighted: by sample weights.
    """

    measure: str
    k: str = ""
    of: str = ""
    weighted: bool = False


def parts_of(metric: str) -> Parts:
    """Take a key apart.

    Example:
        >>> parts_of("ndcg@10 click"), parts_of("weighted_auc").measure
        (Parts(measure='ndcg', k='10', of='click', weighted=False), 'auc')
    """
    name, _, of = metric.partition(" ")
    measure, _, k = name.partition("@")
    weighted = measure.startswith(WEIGHTED)
    return Parts(measure.removeprefix(WEIGHTED) if weighted else measure, k, of, weighted)


def label_of(metric: str, *, short: bool = False) -> str:
    """As people read it; a key that is not known is its own label.

    Example:
        >>> label_of("ndcg@10 click"), label_of("weighted_ne"), label_of("calibration", short=True)
        ('NDCG@10 of click', 'weighted NE', 'calib.')
    """
    parts = parts_of(metric)
    known = MEASURES.get(parts.measure)
    if known is None:
        return metric
    name = (known.short if short else "") or known.label
    return "weighted " * parts.weighted + name + f"@{parts.k}" * bool(parts.k) + f" of {parts.of}" * bool(parts.of)


def heading_of(metric: str) -> str:
    """As the heading of a column, whose task stands apart.

    Example:
        >>> heading_of("gauc click"), heading_of("value@5"), heading_of("rate@5 buy")
        ('GAUC click', 'value@5', 'rate@5 buy')
    """
    name, _, of = metric.partition(" ")
    return f"{label_of(name)} {of}".strip()


def main_metric(metrics: Mapping[str, Any]) -> str | None:
    """The key of a task's metrics that is told where there is room for one; None where none of them is known.

    Example:
        >>> main_metric({"ne": 0.9, "auc": 0.7}), main_metric({"mse": 1.0, "r2": 0.2}), main_metric({"auc": None})
        ('auc', 'r2', None)
    """
    return next((metric for metric in ("auc", "r2", "ne") if metrics.get(metric) is not None), None)


def sign_of_better(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where that depends on something else.

    Example:
        >>> sign_of_better("auc"), sign_of_better("weighted_log_loss"), sign_of_better("calibration")
        (1, -1, 0)
    """
    known = MEASURES.get(parts_of(metric).measure)
    return 0 if known is None else {"higher": 1, "lower": -1}.get(known.better, 0)


def bounds_of(metric: str) -> tuple[float, float]:
    """What a metric cannot pass.

    Example:
        >>> bounds_of("gauc click"), bounds_of("r2")
        ((0.0, 1.0), (-inf, 1.0))
    """
    known = MEASURES.get(parts_of(metric).measure)
    return (-math.inf, math.inf) if known is None else (known.low, known.high)


def glossary(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """Label and explanation of the measures that some keys are of, in the order of `MEASURES`.

    Example:
        >>> [label for label, _ in glossary(["gauc click", "auc", "gauc like"])]
        ['AUC', 'GAUC']
    """
    there = {parts_of(metric).measure for metric in metrics}
    return [(of.label, of.explained) for key, of in MEASURES.items() if key in there]
