"""What settings are judged by: a number of the validation split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.evaluation.metrics import mean_auc
from mtcl_torchrec.schema import ConfigError, Task, nearest
from mtcl_torchrec.training.history import TrainingHistory

Direction = Literal["maximize", "minimize"]
MEAN = "mean_auc"
_LOWER = ("log_loss", "ne", "mse", "mae")  # the lower, the better
_OF_KIND = {
    "binary": ("auc", "gauc", "log_loss", "ne"),
    "multiclass": ("log_loss", "ne", "top1", "top5"),
    "regression": ("mse", "mae", "r2"),
}


@dataclass(frozen=True)
class Objective:
    """A validation metric of the epoch that a run keeps.

    Args:
        name: ``"mean_auc"``, over the tasks of ``training.watch`` (or all binary ones), or a task and its metric, such
            as ``"like.ne"``.
        tasks: those that decide.
        metric: of the one task; None of the mean.

    Example:
        >>> history = TrainingHistory(epochs=[{"like": {"auc": 0.6}}, {"like": {"auc": 0.7}}], best_epoch=2)
        >>> objective = Objective("like.auc", (Task.binary("like"),), "auc")
        >>> objective.kept(history), objective.of_epoch(history, 1), objective.direction
        (0.7, 0.6, 'maximize')
    """

    name: str
    tasks: tuple[Task, ...]
    metric: str | None = None

    @classmethod
    def named(cls, name: str, run: RunConfig) -> Objective:
        """The objective of that name.

        Raises:
            ConfigError: no such task, or no such metric of it.
        """
        tasks = run.data_schema.tasks
        if name == MEAN:
            return cls(name, tuple(t for t in tasks if t.name in run.training.watch) or tasks)
        task, _, metric = name.rpartition(".")
        found = next((t for t in tasks if t.name == task), None)
        if found is None:
            names = [MEAN, *(f"{t.name}.{m}" for t in tasks for m in _OF_KIND[t.kind])]
            hint = nearest(name, names)
            raise ConfigError(
                f"objective: {name!r} is neither {MEAN} nor a task and its metric, such as {names[1]}{hint}"
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
        return "minimize" if self.metric in _LOWER else "maximize"

    def of_epoch(self, history: TrainingHistory, epoch: int) -> float:
        """The number of an epoch, counted from 1; NaN where it is not defined."""
        of = {
            task: {name: math.nan if value is None else value for name, value in metrics.items()}
            for task, metrics in history.epochs[epoch - 1].items()
        }
        if self.metric is None:
            return mean_auc(self.tasks, of)
        return of[self.tasks[0].name].get(self.metric, math.nan)

    def kept(self, history: TrainingHistory) -> float:
        """The number of the epoch that the run keeps."""
        return self.of_epoch(history, history.best_epoch)
