"""The run's own architecture without what makes it multi-task collaborative: a network a task, or equal weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from mtcl_torchrec.training.build import build_loss_weighting
from mtcl_torchrec.training.directory import METRICS
from mtcl_torchrec.training.judging import predictions_path
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import RunData
from mtcl_torchrec.training.sharding import Device

USUAL: Settings = {"tables_lr": 1.0, "dense_lr": 1.0}
# What only a trunk reads, and no dot head.
_OF_TRUNK = ("trunk", "tower", "tower_layers", "tower_dropout", "cross_layers", "cross_rank", "epnet", "ppnet")


def fit_network(
    run: RunConfig, data: BaselineData, tasks: Sequence[Task], settings: Settings, *, folder: Path, device: Device
) -> Predictions:
    """Train a run and predict the held-out rows with its best epoch.

    Args:
        run: of `single_task` or `unweighted`.
        tasks: those whose predictions are asked for.
        settings: see `network_settings`.
        folder: in which the run directory is made, and removed.

    Raises:
        FloatingPointError: training diverged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="network-", dir=folder))
    try:
        quiet = Console(quiet=True)
        train_run(_with_settings(run, settings), place, device=device, console=quiet, data=data_for(run, data))
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


def total_weight(run: RunConfig, folder: Path | None = None) -> float:
    """What stands before the losses in what the run minimises, all in all: Σ aᵢwᵢ of Σ aᵢ wᵢ Lᵢ + λR.

    wᵢ are the tasks' weights, and aᵢ those that the loss weighting adds, 1 under the plain sum: the averages that the
    run measured, or, before it is trained, what the weighting gives to equal losses at first.  A fused score that
    trains the whole model counts with its weight.

    Args:
        folder: of the run, once it is trained.

    Example:
        >>> from mtcl_torchrec.config import parse_run
        >>> from mtcl_torchrec.data import kuairand
        >>> run = parse_run(kuairand.example_run())
        >>> round(total_weight(run), 6) == round(sum(task.weight for task in run.data_schema.tasks), 6)
        True
    """
    tasks, train = run.data_schema.tasks, None if run.fusion is None else run.fusion.train
    weights = {task.name: task.weight for task in tasks if task.weight > 0}
    weighting = build_loss_weighting(run.balance.weighting, len(weights))
    factors = dict.fromkeys(weights, 1.0)
    if weighting is not None:
        _, first = weighting.eval()(torch.tensor(list(weights.values())), torch.ones(len(weights), dtype=torch.bool))
        factors = dict(zip(weights, first.tolist(), strict=True))
        factors |= {name: factor for name, factor in _measured_weights(folder).items() if name in weights}
    through = 0.0 if train is None or train.heads == "detach" else train.weight
    return through + sum(factors[name] * weight for name, weight in weights.items())


def _measured_weights(folder: Path | None) -> dict[str, float]:
    """Task -> mean weight that the loss weighting of a run gave it; nothing where that is not known."""
    if folder is None or not (folder / METRICS).is_file():
        return {}
    balance = json.loads((folder / METRICS).read_text(encoding="utf-8")).get("balance") or {}
    mean = (balance.get("loss_weights") or {}).get("mean") or {}
    return {task: weight for task, weight in mean.items() if weight is not None}


def single_task(run: RunConfig, task: Task, *, total: float | None = None) -> RunConfig:
    """The run with one task: same features, architecture, optimizers and steps, no balancing, calibration or fusion.

    The task gets the weight that all of the run's have together, so that its loss is as large as theirs were beside all
    that has a scale of its own: penalties (λ of `training.regularisers`), ``clip_norm``, ``max_gradient``, under sgd
    the learning rate, and the weight decay of sgd and adam, which is added to the gradient.  (Alone with a weight of 1,
    it would be regularised Σw times as strongly.)  What is part of the task's loss (the L2 of a dot head, pairs) grows
    with it, and the decay of adamw hangs on no gradient.

    A task that comes after another in a chain predicts a product, for which its network keeps the tasks before it, with
    weight 0: it learns from no label of theirs.

    Args:
        total: see `total_weight`; None is that of the configuration.
    """
    declared = {t.name: t for t in run.data_schema.tasks}
    before, name = list[Task](), declared[task.name].after
    while name is not None:
        before.append(declared[name])
        name = declared[name].after
    weight = total_weight(run) if total is None else total
    alone = declared[task.name].model_copy(update={"weight": weight})
    if not before:
        return _changed(run, [alone])
    # The other kinds of chain lean on labels of the task before.
    chained = Task.model_validate({**alone.model_dump(exclude_unset=True), "chain": "esmm"})
    return _changed(run, [chained, *map(_untaught, before)])


def unweighted(run: RunConfig, *, total: float | None = None) -> RunConfig:
    """The run with equal weights of its tasks, without balancing, calibration or a fusion that is fitted.

    The weights add up to what the run's do, for the reason that `single_task` gives.  A task that the run gives weight
    0 does not train there, and does not here.

    Args:
        total: see `total_weight`; None is that of the configuration.
    """
    count = sum(t.weight > 0 for t in run.data_schema.tasks)
    weight = (total_weight(run) if total is None else total) / count
    tasks = [t.model_copy(update={"weight": weight if t.weight > 0 else 0.0}) for t in run.data_schema.tasks]
    return _changed(run, tasks)


def is_unweighted(run: RunConfig) -> bool:
    """Whether `unweighted` would be the run itself: equal weights, nothing that balances, no score that trains."""
    weights = {task.weight for task in run.data_schema.tasks if task.weight > 0}
    balance, trains = run.balance, run.fusion is not None and run.fusion.train is not None
    moved = balance.weighting.kind != "sum" or balance.surgery.kind not in ("none", "measure")
    return len(weights) == 1 and not moved and not trains and run.training.task_patience == 0


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
    if set(names) != {task.name for task in run.data_schema.tasks}:
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


def network_settings(run: RunConfig) -> tuple[Settings, dict[str, Any]]:
    """The run's own settings, and what the others are drawn from: factors on its learning rates, its penalty on
    embeddings and its weight decay.  A network of one task may well want others than several together.

    Example:
        >>> from mtcl_torchrec.config import parse_run
        >>> from mtcl_torchrec.data import kuairand
        >>> network_settings(parse_run(kuairand.example_run()))[0]
        {'tables_lr': 1.0, 'dense_lr': 1.0, 'weight_decay': 0.01, 'l2_embedding': 0.0}
    """
    decay, l2 = run.optimizers.dense.weight_decay, run.training.regularisers.l2_embedding
    usual: Settings = {**USUAL, "weight_decay": decay}
    space: dict[str, Any] = {name: loguniform(0.2, 5) for name in USUAL}
    space["weight_decay"] = _around(decay, [0.0, 0.01, 0.1, 0.3])
    if isinstance(l2, dict):
        usual["l2_embedding_times"], space["l2_embedding_times"] = 1.0, loguniform(0.1, 10)
    elif run.data_schema.tables():
        usual["l2_embedding"], space["l2_embedding"] = l2, _around(l2, [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
    return usual, space


def _around(own: float, others: Sequence[float]) -> Any:
    return loguniform(own / 10, own * 10) if own > 0 else list(others)


def _with_settings(run: RunConfig, settings: Settings) -> RunConfig:
    """The run with its learning rates multiplied, and what else is set; see `network_settings`."""
    run = parse_run(dump_run(run))
    tables, dense, penalties = run.optimizers.tables, run.optimizers.dense, run.training.regularisers
    tables.lr *= settings["tables_lr"]
    tables.lr_of = {table: rate * settings["tables_lr"] for table, rate in tables.lr_of.items()}
    dense.lr *= settings["dense_lr"]
    dense.weight_decay = settings.get("weight_decay", dense.weight_decay)
    if isinstance(penalties.l2_embedding, dict):
        times = settings.get("l2_embedding_times", 1.0)
        penalties.l2_embedding = {feature: times * own for feature, own in penalties.l2_embedding.items()}
    else:
        penalties.l2_embedding = settings.get("l2_embedding", penalties.l2_embedding)
    return run
