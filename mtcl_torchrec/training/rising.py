"""Whether a training ended while its tasks were still getting better: a comparison may then say more of the end of the
schedule than of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from mtcl_torchrec.evaluation.confidence import too_few_to_judge
from mtcl_torchrec.evaluation.naming import label_of, main_metric, sign_of_better

LEARNT = {"auc": 0.51, "r2": 0.0, "ne": 1.0}  # beyond which a task has learnt something
ENOUGH = {"auc": 0.004, "r2": 0.02, "ne": 0.003}  # in the second half of the epochs


class Rise(NamedTuple):
    """How much better a task has become, in every epoch, up to the last one."""

    metric: str
    since: int
    change: float

    def __str__(self) -> str:
        return f"{label_of(self.metric)} {self.change:+.3f}".replace("-", "−")


def still_rising(epochs: Sequence[Mapping[str, Mapping[str, Any]]], best_epoch: int) -> dict[str, Rise]:
    """The tasks that were better after every epoch of the second half than after the one before.

    Args:
        epochs: validation metrics by task, of each epoch.
        best_epoch: the kept one, from 1: where it is not the last one, patience has seen the end, and there is nothing.

    Example:
        >>> epochs = [{"click": {"auc": auc, "count": 1e5, "base_rate": 0.3}} for auc in (0.6, 0.66, 0.68, 0.69)]
        >>> {task: str(rise) for task, rise in still_rising(epochs, 4).items()}
        {'click': 'AUC +0.030'}
    """
    if best_epoch < 2 or best_epoch != len(epochs):
        return {}
    since, found = best_epoch - best_epoch // 2, {}
    for task, kept in epochs[-1].items():
        name = main_metric(kept)
        if name not in ENOUGH or too_few_to_judge(kept):
            continue
        known = [epoch.get(task, {}).get(name) for epoch in epochs[since - 1 :]]
        values = [float(value) for value in known if value is not None and math.isfinite(value)]
        if len(values) < len(known):
            continue
        sign = sign_of_better(name)
        if sign * values[-1] <= sign * LEARNT[name] or any(sign * b <= sign * a for a, b in pairwise(values)):
            continue
        change = values[-1] - values[0]
        # Epochs are judged by the same rows, so their difference varies by less than either; half is on the safe side.
        if sign * change > max(ENOUGH[name], chance_of_auc(kept) / 2 if name == "auc" else 0.0):
            found[task] = Rise(name, since, change)
    return found


def in_words(rising: Mapping[str, Rise]) -> str:
    """Of `still_rising`, as the end of a sentence.

    Example:
        >>> in_words({"click": Rise("auc", 3, 0.006), "next": Rise("ne", 3, -0.02)})
        'training ended while 2 tasks were still getting better (since epoch 3: click AUC +0.006, next NE −0.020)'
    """
    tasks = "1 task was" if len(rising) == 1 else f"{len(rising)} tasks were"
    since = next(iter(rising.values())).since
    by = ", ".join(f"{task} {rise}" for task, rise in rising.items())
    return f"training ended while {tasks} still getting better (since epoch {since}: {by})"


def chance_of_auc(metrics: Mapping[str, Any]) -> float:
    """Standard error of an AUC of 0.5 on as many positive and negative rows (Mann and Whitney, 1947)."""
    count, rate = metrics.get("count") or 0.0, metrics.get("base_rate") or 0.0
    positive, negative = count * rate, count * (1 - rate)
    return math.sqrt((count + 1) / (12 * positive * negative)) if positive > 0 and negative > 0 else 0.0
