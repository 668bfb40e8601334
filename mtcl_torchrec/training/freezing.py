"""Early stopping of each task for itself: one that no longer improves stops pulling at what all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtcl_torchrec.evaluation.metrics import task_quality
from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.history import TrainingHistory


def freeze_stalled(loss: MultiTaskLoss, history: TrainingHistory, patience: int) -> list[str]:
    """Freeze the tasks whose validation metric has not improved for `patience` epochs, for good; 0 freezes none.

    It follows from the history alone, so every rank decides the same, and a resumed run what the uninterrupted one did.

    Args:
        loss: its tasks are frozen; `FrozenTasks` says what that means.
        history: the epoch that was just judged is its last; what is frozen is entered.

    Returns:
        A line about each task that is frozen now.
    """
    if not patience:
        return []
    lines, epoch = [], len(history.epochs) + 1
    for task in stalled(history, loss.tasks, patience):
        loss.freeze(task)
        history.frozen[task] = epoch
        epochs = "1 epoch" if patience == 1 else f"{patience} epochs"
        lines.append(f"{task} has not improved for {epochs}: frozen from epoch {epoch}")
    return lines


def stalled(history: TrainingHistory, tasks: Sequence[Task], patience: int) -> list[str]:
    """The tasks, not frozen yet, whose best epoch lies `patience` or more epochs back.

    A task is judged by AUC, 1 - NE or R²; an equal value is no improvement.  One whose metric is not defined in the
    newest epoch (validation labels of one class only) is left alone.

    Example:
        >>> epochs = [{"like": {"auc": a}} for a in (0.6, 0.7, 0.7, 0.65)]
        >>> stalled(TrainingHistory(epochs=epochs), [Task.binary("like")], patience=2)
        ['like']
    """
    found = []
    for task in tasks:
        values = [_quality(task, epoch.get(task.name, {})) for epoch in history.epochs]
        if task.name in history.frozen or not values or math.isnan(values[-1]):
            continue
        best = max(v for v in values if not math.isnan(v))
        if len(values) - 1 - values.index(best) >= patience:
            found.append(task.name)
    return found


def all_frozen(history: TrainingHistory, tasks: Sequence[Task]) -> bool:
    """Whether no task is left to train."""
    return all(task.name in history.frozen for task in tasks)


def _quality(task: Task, metrics: dict[str, float | None]) -> float:
    """As `task_quality`, of an epoch in the history, where None is what is not defined."""
    return task_quality(task, {name: math.nan if value is None else value for name, value in metrics.items()})
