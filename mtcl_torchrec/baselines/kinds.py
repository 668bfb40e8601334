"""Which baselines there are, what each predicts, and how one setting of it is fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mtcl_torchrec.baselines import collaborative, linear, networks, popularity, trees
from mtcl_torchrec.baselines.entries import ABOUT
from mtcl_torchrec.baselines.rows import BaselineData
from mtcl_torchrec.baselines.search import Predictions, Settings
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.sharding import Device


@dataclass(frozen=True)
class Job:
    """What a baseline is fitted with.

    Args:
        run: the configuration to be compared with.
        data: its rows.
        folder: for what is only needed meanwhile.
        device: of networks.
        seed: of whatever draws.
        tasks: that are asked for of a baseline with a model for each; all, where it is empty.
        total: of the run's losses, see `mtcl_torchrec.baselines.networks.total_weight`; None is that of its
            configuration.
    """

    run: RunConfig
    data: BaselineData
    folder: Path
    device: Device = "auto"
    seed: int = 0
    tasks: tuple[str, ...] = ()
    total: float | None = None


# Predictions of tasks by one setting.  Where a model predicts one task only, there is one.
Fit = Callable[[Job, Sequence[Task], Settings], Predictions]


@dataclass(frozen=True)
class Baseline:
    """One way to predict, to compare a run with.

    Args:
        about: a line about it.
        fit: one setting of it.
        usual: the settings of the first trial.
        space: what the others are drawn from, see `mtcl_torchrec.baselines.search.candidates`.  Those of a network
            follow from the run: `settings_in`.
        most_classes: of a multiclass task that it predicts; 0 for none.
        binary_only: whether it predicts events, and no number or class.
        needs: keys of the schema that it needs.
        joint: whether one model predicts all tasks.
        network: whether it is trained as the run is, so that its model and optimizers count.
        whole: whether it predicts all tasks, whichever are asked for: it costs nothing, and its fused score is one that
            the run is held against.
        same_as: says of a run that it would be the same, and why; empty where it would not.
        lacks: says which library is not installed, and the extra that has it; empty where nothing is lacking.
    """

    about: str
    fit: Fit
    usual: Settings
    space: Mapping[str, Any]
    most_classes: float = float("inf")
    binary_only: bool = False
    needs: tuple[str, ...] = ()
    joint: bool = False
    network: bool = False
    whole: bool = False
    same_as: Callable[[RunConfig], str] = lambda run: ""
    lacks: Callable[[], str] = lambda: ""

    def settings_in(self, run: RunConfig) -> tuple[Settings, Mapping[str, Any]]:
        """The settings of the first trial beside a run, and what the others are drawn from."""
        return networks.network_settings(run) if self.network else (self.usual, self.space)

    def why_not_in(self, run: RunConfig) -> str:
        """Why it is of no use beside a run, as far as its configuration tells; empty where it is."""
        if lacking := [key for key in self.needs if getattr(run.data_schema, key) is None]:
            return f"needs schema.{lacking[0]}, the column that names the {lacking[0]}"
        reasons = [self._why_never(task) for task in run.data_schema.tasks]
        return reasons[0] if all(reasons) else self.same_as(run)

    def _why_never(self, task: Task) -> str:
        """Why it does not predict a task, whatever the data."""
        if self.binary_only and task.kind != "binary":
            return f"predicts events only, and {task.name!r} is a {task.kind} task"
        if self.network and task.weight == 0:
            return f"the run does not train {task.name!r} (weight 0)"
        return ""

    def why_not(self, task: Task, data: BaselineData) -> str:
        """Why it does not predict a task; empty where it does."""
        if never := self._why_never(task):
            return never
        if task.kind == "multiclass" and task.out_features > self.most_classes:
            return f"predicts up to {self.most_classes} classes, and {task.name!r} has {task.out_features}"
        at = data.train.labelled(data.column(task))
        labels = data.train.labels[at, data.column(task)]
        if len(at) == 0 or (task.kind != "regression" and len(np.unique(labels)) < 2):
            return f"all training labels of {task.name!r} are the same, or missing"
        return ""


def _alone(fit: Callable[..., Predictions], *, seeded: bool = False) -> Fit:
    """Of a function that fits one task from the data."""

    def fitted(job: Job, tasks: Sequence[Task], settings: Settings) -> Predictions:
        (task,) = tasks
        return fit(job.data, task, settings, seed=job.seed) if seeded else fit(job.data, task, settings)

    return fitted


def _single(job: Job, tasks: Sequence[Task], settings: Settings) -> Predictions:
    run = networks.single_task(job.run, tasks[0], total=job.total)
    return networks.fit_network(run, job.data, tasks, settings, folder=job.folder, device=job.device)


def _unweighted(job: Job, tasks: Sequence[Task], settings: Settings) -> Predictions:
    run = networks.unweighted(job.run, total=job.total)
    return networks.fit_network(run, job.data, tasks, settings, folder=job.folder, device=job.device)


_collaborative = partial(Baseline, binary_only=True, needs=("user", "item"))
_network = partial(Baseline, usual=networks.USUAL, space={}, network=True)


def _own_twin(run: RunConfig) -> str:
    trained = [task for task in run.data_schema.tasks if task.weight > 0]
    alone = len(trained) == 1 and trained[0].after is None and networks.is_unweighted(run)
    return f"would be the run itself, which trains {trained[0].name!r} alone" if alone else ""


def _already_unweighted(run: RunConfig) -> str:
    same = networks.is_unweighted(run)
    return "would be the run itself, whose tasks weigh the same and are not balanced otherwise" if same else ""


# In the order of `ABOUT`.
BASELINES: dict[str, Baseline] = {
    "popularity": Baseline(
        ABOUT["popularity"], _alone(popularity.fit_popularity), popularity.USUAL, {}, needs=("item",), whole=True,
    ),
    "item_knn": _collaborative(
        ABOUT["item_knn"], _alone(collaborative.fit_knn),
        collaborative.KNN_USUAL, collaborative.KNN_SPACE, lacks=partial(collaborative.lacks, "nearest_neighbours"),
    ),
    "als": _collaborative(
        ABOUT["als"], _alone(collaborative.fit_als, seeded=True),
        collaborative.ALS_USUAL, collaborative.ALS_SPACE, lacks=partial(collaborative.lacks, "als"),
    ),
    "bpr": _collaborative(
        ABOUT["bpr"], _alone(collaborative.fit_bpr, seeded=True),
        collaborative.BPR_USUAL, collaborative.BPR_SPACE, lacks=partial(collaborative.lacks, "bpr"),
    ),
    "logistic_regression": Baseline(
        ABOUT["logistic_regression"], _alone(linear.fit_linear), linear.USUAL, linear.SPACE,
        most_classes=linear.MAX_CLASSES,
    ),
    "trees": Baseline(
        ABOUT["trees"], _alone(trees.fit_trees, seeded=True),
        trees.USUAL, trees.SPACE, most_classes=trees.MAX_CLASSES,
    ),
    "single_task": _network(ABOUT["single_task"], _single, same_as=_own_twin),
    "unweighted": _network(ABOUT["unweighted"], _unweighted, joint=True, same_as=_already_unweighted),
}  # fmt: skip
