"""The run's own architecture without what makes it multi-task collaborative: a network for each task, or plain sums."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from scipy.stats import loguniform

from mtcl_torchrec.baselines.rows import BaselineData
from mtcl_torchrec.baselines.search import Predictions, Settings
from mtcl_torchrec.config import RunConfig, dump_run, parse_run
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.training_rows import MemoryRows
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.judging import predictions_path
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import RunData
from mtcl_torchrec.training.sharding import Device

USUAL: Settings = {"tables_lr": 1.0, "dense_lr": 1.0}
SPACE = {"tables_lr": loguniform(0.2, 5), "dense_lr": loguniform(0.2, 5)}
# What only a trunk reads, and no dot head.
_OF_TRUNK = ("trunk", "tower", "tower_layers", "tower_dropout", "cross_layers", "cross_rank", "epnet", "ppnet")


def fit_network(
    run: RunConfig, data: BaselineData, tasks: Sequence[Task], settings: Settings, *, folder: Path, device: Device
) -> Predictions:
    """Train a run and predict the held-out rows with its best epoch.

    Args:
        run: of `single_task` or `unweighted`.
        tasks: those whose predictions are asked for.
        settings: ``tables_lr`` and ``dense_lr``, factors on the run's own learning rates.
        folder: in which the run directory is made, and removed.

    Raises:
        FloatingPointError: training diverged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="network-", dir=folder))
    try:
        quiet = Console(quiet=True)
        train_run(_with_rates(run, settings), place, device=device, console=quiet, data=data_for(run, data))
        tables = {split: read_predictions(predictions_path(place, split)) for split in data.encoded}
        return {
            split: {task.name: table.predicted(task.name).astype(np.float32) for task in tasks}
            for split, table in tables.items()
        }
    finally:
        shutil.rmtree(place, ignore_errors=True)


def data_for(run: RunConfig, data: BaselineData) -> RunData | None:
    """Rows that are in memory, with the labels of a run that has some of their tasks; None of a stream, which is opened
    anew.

    Args:
        run: of `single_task` or `unweighted`: the run of `data` with other tasks, or other weights of them.
    """
    if not isinstance(data.splits.train, MemoryRows):
        return None
    schema = run.data_schema
    there = [task.name for task in data.tasks]
    columns = [there.index(task.name) for task in schema.tasks]

    def of(rows: EncodedRows) -> EncodedRows:
        return replace(
            rows,
            labels=rows.labels[:, columns],
            weights=None if rows.weights is None else rows.weights[:, columns],
            requests=None if schema.request_column is None else rows.requests,
            rewards=None if schema.reward is None else rows.rewards,
        )

    before = data.splits.train
    train = MemoryRows(of(before.rows), seed=before.seed, id_dropout=before.id_dropout)
    encoded = {split: of(rows) for split, rows in data.splits.encoded.items()}
    splits = replace(data.splits, train=train, encoded=encoded)
    return RunData(data.preprocessor.redeclared(schema), splits)


def single_task(run: RunConfig, task: Task) -> RunConfig:
    """The run with one task: same features, architecture, optimizers and steps, no balancing, calibration or fusion.

    A task that comes after another in a chain predicts a product, for which its network keeps the tasks before it, with
    weight 0: it learns from no label of theirs.
    """
    declared = {t.name: t for t in run.data_schema.tasks}
    before, name = list[Task](), declared[task.name].after
    while name is not None:
        before.append(declared[name])
        name = declared[name].after
    alone = declared[task.name].model_copy(update={"weight": 1.0})
    if not before:
        return _changed(run, [alone])
    # The other kinds of chain lean on labels of the task before.
    chained = Task.model_validate({**alone.model_dump(exclude_unset=True), "chain": "esmm"})
    return _changed(run, [chained, *map(_untaught, before)])


def unweighted(run: RunConfig) -> RunConfig:
    """The run with a plain sum of the losses of its tasks, without balancing, calibration or a fusion that is fitted.

    A task that the run gives weight 0 does not train there, and does not here.
    """
    tasks = [t.model_copy(update={"weight": 1.0 if t.weight > 0 else 0.0}) for t in run.data_schema.tasks]
    return _changed(run, tasks)


def _untaught(task: Task) -> Task:
    """A task as a factor of another's probability alone."""
    kept = {"name", "kind", "label", "mask", "inputs", "head", "after"}
    return Task.model_validate({**task.model_dump(exclude_unset=True, include=kept), "weight": 0.0})


def _changed(run: RunConfig, tasks: Sequence[Task]) -> RunConfig:
    """The run with these tasks in the place of its own, and of the rest what still fits them."""
    names = [task.name for task in tasks]
    raw: dict[str, Any] = yaml.safe_load(dump_run(run))
    for part in ("balance", "fusion", "calibration"):
        raw.pop(part, None)
    raw.pop("evaluation", None)
    raw["schema"]["tasks"] = [task.model_dump(mode="json", exclude_unset=True) for task in tasks]
    raw["schema"].pop("reward", None)
    training = raw.setdefault("training", {})
    weighed = [task.name for task in tasks if task.weight > 0]
    training["watch"] = [name for name in training.get("watch", []) if name in weighed]
    if not training["watch"] and len(weighed) < len(tasks):
        training["watch"] = weighed
    training.pop("task_patience", None)
    model = raw.get("model", {})
    if not any(task.in_trunk for task in tasks):
        for key in _OF_TRUNK:
            model.pop(key, None)
        training.get("regularisers", {}).pop("expert_orthogonality", None)
        training.get("regularisers", {}).pop("gate_balance", None)
    trunk = model.get("trunk", {})
    if trunk.get("groups"):
        groups = [[name for name in group if name in names] for group in trunk["groups"]]
        trunk["groups"] = [group for group in groups if group]
    # Learning rates and shardings of tables that other tasks had for themselves.
    tables = run.model.tables(run.data_schema)
    gone = [table for table in tables if "@" in table and table.rsplit("@", 1)[1] not in names]
    of_tables = raw.get("optimizers", {}).get("tables", {})
    for part in (of_tables.get("lr_of", {}), raw.get("sharding", {}).get("tables", {})):
        for table in gone:
            part.pop(table, None)
    return parse_run(yaml.safe_dump(raw, allow_unicode=True), name=f"baseline of {', '.join(names)}")


def _with_rates(run: RunConfig, settings: Settings) -> RunConfig:
    """The run with its learning rates multiplied."""
    run = parse_run(dump_run(run))
    tables, dense = run.optimizers.tables, run.optimizers.dense
    tables.lr *= settings["tables_lr"]
    tables.lr_of = {table: rate * settings["tables_lr"] for table, rate in tables.lr_of.items()}
    dense.lr *= settings["dense_lr"]
    return run
