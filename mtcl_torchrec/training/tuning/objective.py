"""What settings are judged by: a number of the validation split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.evaluation.metrics import Metrics, deciding, task_quality
from mtcl_torchrec.evaluation.naming import sign_of_better
from mtcl_torchrec.schema import ConfigError, Task, nearest
from mtcl_torchrec.training.history import TrainingHistory

Direction = Literal["maximize", "minimize"]
MEAN = "mean_skill"
_OF_KIND = {
    "binary": ("auc", "gauc", "log_loss", "ne"),
    "multiclass": ("log_loss", "ne", "top1", "top5"),
    "regression": ("mse", "mae", "r2"),
}


def skill(task: Task, metrics: Metrics) -> float:
    """How good a task's predictions are, on one scale for tasks of every kind: 1 is perfect, 0 what somebody reaches
    who knows nothing of the row, below 0 is worse than that.  NaN where it is not defined.

    Binary: 2·AUC - 1, the Gini coefficient.  Multiclass: 1 - NE, NE being the log-loss over that of the base rates
    (He et al., *Practical Lessons from Predicting Clicks on Ads at Facebook*, ADKDD 2014).  Regression: R².

    Example:
        >>> skill(Task.binary("like"), {"auc": 0.75}), skill(Task.regression("minutes"), {"r2": 0.2})
        (0.5, 0.2)
    """
    quality = task_quality(task, metrics)
    return 2 * quality - 1 if task.kind == "binary" else quality


@dataclass(frozen=True)
class Objective:
    """A validation metric of the epoch that a run keeps.

    Args:
        name: ``"mean_skill"``, the mean of `skill` over the tasks of ``training.watch`` (or all of which the validation
            split tells enough), or a metric and its task, such as ``"ne:like"``.
        tasks: those that decide.
        metric: of the one task; None of the mean.
        watched: whether the tasks of the mean are named, and so decide however few their events.

    Example:
        >>> history = TrainingHistory(epochs=[{"like": {"auc": 0.6}}, {"like": {"auc": 0.7}}], best_epoch=2)
        >>> objective = Objective("auc:like", (Task.binary("like"),), "auc")
        >>> objective.kept(history), objective.of_epoch(history, 1), objective.direction
        (0.7, 0.6, 'maximize')
    """

    name: str
    tasks: tuple[Task, ...]
    metric: str | None = None
    watched: bool = False

    @classmethod
    def named(cls, name: str, run: RunConfig) -> Objective:
        """The objective of that name.

        Raises:
            ConfigError: no such task, or no such metric of it.
        """
        tasks = run.data_schema.tasks
        if name == MEAN:
            watched = tuple(t for t in tasks if t.name in run.training.watch)
            return cls(name, watched or tasks, watched=bool(watched))
        metric, _, task = name.partition(":")
        found = next((t for t in tasks if t.name == task), None)
        if found is None:
            names = [MEAN, *(f"{m}:{t.name}" for t in tasks for m in _OF_KIND[t.kind])]
            hint = nearest(name, names)
            raise ConfigError(
                f"objective: {name!r} is neither {MEAN} nor a metric and its task, such as {names[1]}{hint}"
            )
        metrics = _OF_KIND[found.kind]
        if metric not in metrics:
            raise ConfigError(
                f"objective: no metric {metric!r} of {found.kind} task {task!r}{nearest(metric, metrics)}; there are "
                f"{', '.join(metrics)}"
            )
        return cls(name, (found,), metric)

    @property
    def direction(self) -> Direction:
        """What is done to the number."""
        return "minimize" if self.metric is not None and sign_of_better(self.metric) < 0 else "maximize"

    def left_out(self, history: TrainingHistory) -> dict[str, str]:
        """Tasks that do not count in the mean, as noise would decide -> why; as of early stopping.

        Example:
            >>> mean = Objective("mean_skill", (Task.binary("like"), Task.binary("click")))
            >>> mean.left_out(TrainingHistory(unsure={"like": "too few events (3)"}))
            {'like': 'too few events (3)'}
        """
        if self.metric is not None or self.watched:
            return {}
        count = {task.name for task in deciding(self.tasks, history.unsure)}
        return {t.name: history.unsure[t.name] for t in self.tasks if t.name not in count}

    def of_epoch(self, history: TrainingHistory, epoch: int) -> float:
        """The number of an epoch, counted from 1; NaN where it is not defined."""
        of = {
            task: {name: math.nan if value is None else value for name, value in metrics.items()}
            for task, metrics in history.epochs[epoch - 1].items()
        }
        if self.metric is None:
            out = self.left_out(history)
            there = [t for t in self.tasks if t.name not in out]
            known = [value for t in there if not math.isnan(value := skill(t, of[t.name]))]
            return sum(known) / len(known) if known else math.nan
        return of[self.tasks[0].name].get(self.metric, math.nan)

    def kept(self, history: TrainingHistory) -> float:
        """The number of the epoch that the run keeps."""
        return self.of_epoch(history, history.best_epoch)


def said_of(left_out: Mapping[str, str]) -> str:
    """Tasks that do not count, and why.

    Example:
        >>> said_of({"like": "too few events (3)", "hide": "a single user"})
        'like, too few events (3); hide, a single user'
    """
    return "; ".join(f"{task}, {why}" for task, why in left_out.items())
