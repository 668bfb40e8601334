"""The training loop: TorchRec's pipeline, checkpoints on the way, evaluation after each epoch, early stopping."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from mtcl_torchrec.config import CheckpointConfig, OptimizersConfig, ShardingConfig, TrainingConfig
from mtcl_torchrec.data.batch import EncodedRows, MTBatch
from mtcl_torchrec.data.item_totals import ItemTotals
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.data.training_rows import TrainingRows
from mtcl_torchrec.evaluation.metrics import Metrics, mean_auc, stopping_tasks, task_metrics
from mtcl_torchrec.evaluation.naming import label_of, main_metric
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.report import cell
from mtcl_torchrec.evaluation.supports import unsure_tasks
from mtcl_torchrec.models import MTCL, MTCLTrain
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.balance import read_step
from mtcl_torchrec.training.checkpoint.state import TrainingState
from mtcl_torchrec.training.compiling import compiled, eagerly
from mtcl_torchrec.training.freezing import all_frozen, freeze_stalled
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.optimizers import build_optimizer, check_tables, fuse_table_optimizer, is_fused
from mtcl_torchrec.training.pace import Pace, epoch_speed
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.rec_metrics import TrainingMetrics
from mtcl_torchrec.training.sharding import Ranks, shard, tables_of
from mtcl_torchrec.training.waiting import TimedBatches, share_waited, waiting_lines


def parallelise(
    train_module: MTCLTrain,
    where: Ranks,
    optimizers: OptimizersConfig,
    *,
    sharding: ShardingConfig | None = None,
    batch_size: int = 512,
    seed: int = 0,
    zero_tables: Collection[str] = (),
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shard the tables and build the optimizers.

    Args:
        train_module: with its tables on the meta device.
        optimizers, sharding: their tables named as in the model.
        batch_size: rows a step and rank; the planner's estimates depend on it.
        seed: of the tables' first values.
        zero_tables: tables that start at zero.

    Raises:
        ConfigError: the tables fit nowhere, or what is configured cannot be done; the same on every rank.
    """
    check_tables(train_module, optimizers.tables, where.device)
    fused = is_fused(optimizers.tables, where.device)
    if fused:
        fuse_table_optimizer(train_module, optimizers.tables)
    model = shard(
        train_module,
        where,
        sharding=sharding,
        optimizer=optimizers.tables.kind,
        fused_tables=fused,
        batch_size=batch_size,
        seed=seed,
        init_scale=optimizers.tables.init_scale,
        zero_first_row=True,
        zero_tables=zero_tables,
    )
    return model, build_optimizer(model, optimizers.tables, optimizers.dense)


def build_pipeline(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, device: torch.device, kind: str = "sparse_dist"
) -> TrainPipelineBase | TrainPipelineSparseDist:
    """TorchRec's train pipeline: ``sparse_dist`` overlaps communication with computation, ``base`` does not.

    Without tables there is no such communication, and ``sparse_dist`` would trace through the whole model for it.
    """
    if kind == "base" or not tables_of(model):
        return TrainPipelineBase(model, optimizer, device)
    return TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True)


class SaveState(Protocol):
    """Writes the state of training; every rank calls it at the same step."""

    def __call__(self, state: TrainingState, *, on_the_way: bool) -> None:
        """Write it; on the way through an epoch, where training may go on if that fails, or at its end."""


KeepItems = Callable[[ItemTotals], None]
AfterEpoch = Callable[[TrainingHistory], None]


@dataclass(frozen=True)
class Validation:
    """What an epoch is judged by: the same on every rank.

    Args:
        rows: N rows.
        users: (N,) keys for GAUC, or None.
    """

    rows: EncodedRows
    users: np.ndarray | None = None


class _Clock:
    """Says when a checkpoint is due; the time is rank 0's, told along with the losses."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.saved_at = time.monotonic()

    @property
    def overdue(self) -> bool:
        """Whether this process's time for a checkpoint has come."""
        return 0 < self.config.every_minutes * 60 < time.monotonic() - self.saved_at

    def due(self, step: int, overdue: bool) -> bool:
        """Whether a checkpoint is written after this step."""
        return overdue or (self.config.every_steps > 0 and step % self.config.every_steps == 0)


def fit(
    state: TrainingState,
    rows: TrainingRows,
    validation: Validation,
    config: TrainingConfig,
    where: Ranks,
    *,
    save: SaveState,
    progress: TrainingProgress,
    metrics: TrainingMetrics | None = None,
    keep_items: KeepItems | None = None,
    after_epoch: AfterEpoch | None = None,
) -> TrainingHistory:
    """Train from where `state` stands to the last epoch, or until no epoch has been better for a while or all tasks
    are frozen.

    Args:
        state: with a sharded `MTCLTrain`; it is changed.
        rows: the training split.
        save: called after each epoch, before training goes on, and on the way as `TrainingConfig.checkpoint` says.
        progress: reports, and knows the number of steps of the whole schedule.
        metrics: of the predictions of the training steps; begun anew in each epoch.
        keep_items: called, on every rank, with what `TrainingState.items` has counted in an epoch, before the epoch's
            checkpoint; from then on nothing is counted.
        after_epoch: called with the history after each epoch, when its checkpoint is written; what it raises ends the
            training.  It must do the same on every rank.

    Raises:
        ConfigError: the dense part is to be compiled, and a rank has no compiler.
        FloatingPointError: the loss was not finite in too many batches.
    """
    plain = plain_model(state.model)
    state.history.unsure = unsure_tasks(plain.tasks, validation.rows.labels.numpy(), validation.users)
    with compiled(plain, config.compile, where):
        pipeline = build_pipeline(state.model, state.optimizer, where.device, config.pipeline)
        clock = _Clock(config.checkpoint)
        state.model.train()
        while (
            state.position.epoch <= config.epochs
            and not _patience_is_over(state.history, config)
            and not all_frozen(state.history, plain.tasks)
        ):
            started = time.perf_counter()
            waited, pace = _train_epoch(
                pipeline, state, rows, config, where, clock=clock, save=save, progress=progress, metrics=metrics
            )
            state.history.seconds.append(time.perf_counter() - started)
            state.history.samples_per_second.append(pace.samples_per_second)
            state.history.first_step.append(pace.first_step_s)
            state.history.waiting.append(share_waited(waited, state.history.seconds[-1], where))
            _let_go(pipeline)
            if state.items is not None and keep_items is not None:
                keep_items(state.items)
            state.items = None
            line, scalars = _judge_epoch(state, validation, config, where)
            said = freeze_stalled(train_module_of(state.model).loss, state.history, config.task_patience)
            said += waiting_lines(state.history.waiting[-1], streams=isinstance(rows, StreamRows))
            if len(state.history.epochs) == 1 and not config.watch:
                said += _undecided(plain.tasks, state.history.unsure)
            state.position = state.position.next_epoch()
            save(state, on_the_way=False)
            clock.saved_at = time.monotonic()
            progress.epoch(step=state.step, scalars=scalars, line="\n".join([line, *said]))
            if after_epoch is not None:
                after_epoch(state.history)
    history = state.history
    history.stopped_early = len(history.epochs) < config.epochs
    if history.stopped_early:
        why = f"no better epoch for {config.patience}" if _patience_is_over(history, config) else "all tasks are frozen"
        progress.line(f"{why}: stopping; epoch {history.best_epoch} is kept")
    return history


def _let_go(pipeline: TrainPipelineBase | TrainPipelineSparseDist) -> None:
    """Give the model back for other uses, and be ready for the batches of another epoch."""
    if isinstance(pipeline, TrainPipelineSparseDist):
        pipeline.detach()
    else:
        pipeline.reset()  # without it, the end of an epoch's batches would be the end of every later epoch's


def _train_epoch(
    pipeline: TrainPipelineBase | TrainPipelineSparseDist,
    state: TrainingState,
    rows: TrainingRows,
    config: TrainingConfig,
    where: Ranks,
    *,
    clock: _Clock,
    save: SaveState,
    progress: TrainingProgress,
    metrics: TrainingMetrics | None,
) -> tuple[float, Pace]:
    """From the state's position to the end of its epoch; the seconds this rank waited for batches, and its speed."""
    pace = Pace()
    epoch, cut = state.position.epoch, {"world_size": where.world_size, "batch_size": config.batch_size}
    if not (state.random_restored and state.position.taken):
        # Ranks draw different dropout masks; epoch and step are part of the seed, so that no two stretches share them.
        stretch = state.step << 40 if state.position.taken else 0
        torch.manual_seed((config.seed * 1000 + epoch) * 1000 + where.rank + stretch)
    state.random_restored = False
    if state.items is not None and isinstance(rows, StreamRows):
        rows = rows.counted_by(state.items)
    timed = TimedBatches(rows.batches(state.position, rank=where.rank, **cut))
    batches: Iterator[MTBatch] = timed
    if metrics is not None:
        metrics.reset()
        batches = metrics.watched(batches)
    rows_left, steps = rows.rows_left(state.position), rows.steps(state.position, **cut)
    train_module = train_module_of(state.model)
    for left in range(steps - 1, -1, -1):
        loss, logits, labels = pipeline.progress(batches)
        state.step += 1
        state.position = state.position.after(1, **cut)
        if state.items is not None:
            state.items.take(config.batch_size)
        state.schedule.step()
        if state.average is not None:
            state.average.update()
        taken = min(rows_left, config.batch_size * where.world_size)
        rows_left -= taken
        losses, overdue = None, False
        read = state.step % config.log_every == 0 or left == 0
        if read or where.device.type == "cpu":
            _count_skipped(train_module, state, config, progress)
        if read:
            losses, overdue = read_step(train_module, loss, where, state.history.balance, overdue=clock.overdue)
        readings = None
        if metrics is not None:
            metrics.add(logits, labels, train_module.loss.found_inf)
            readings = metrics.read() if metrics.due(state.step) or left == 0 else None
        scalars = state.history.balance.scalars() if read else None
        pace.step(taken)
        progress.step(epoch=epoch, step=state.step, rows=taken, losses=losses, scalars=scalars, metrics=readings)
        if left > 0 and clock.due(state.step, overdue):  # the end of an epoch has a checkpoint of its own
            save(state, on_the_way=True)
            clock.saved_at = time.monotonic()
    if next(batches, None) is not None:
        raise AssertionError("the training rows had more batches than they said")
    return timed.seconds, pace


def _judge_epoch(
    state: TrainingState, validation: Validation, config: TrainingConfig, where: Ranks
) -> tuple[str, dict[str, float]]:
    """Evaluate the epoch that is over and enter it into the history; a line and scalars about it."""
    plain, history, epoch = plain_model(state.model), state.history, state.position.epoch
    if state.average is not None:
        state.average.swap()
    with eagerly():
        metrics = _validate(plain, validation, config.eval_batch_size, where)
    if state.average is not None:
        state.average.swap()
    value = mean_auc(stopping_tasks(plain.tasks, config.watch, history.unsure), metrics)
    history.epochs.append({name: {**of} for name, of in metrics.items()})
    # Where the metric is not defined (one class only), the newest epoch is kept and nothing stops early.
    best = history.best_auc is None or not value <= history.best_auc
    if best:
        history.best_auc, history.best_epoch, history.best_step = value, epoch, state.step
    scalars = {f"val/{m}/{t}": v for t, of in metrics.items() for m, v in of.items() if m != "count"}
    scalars["waiting for data"] = history.waiting[-1]
    return _epoch_line(epoch, config.epochs, metrics, value, best, history), scalars


def _undecided(tasks: Sequence[Task], unsure: Mapping[str, str]) -> list[str]:
    """A line about the tasks that the validation split tells too little of to decide which epoch is kept."""
    decide = {task.name for task in stopping_tasks(tasks, (), unsure)}
    binary = [task.name for task in tasks if task.kind == "binary"]
    out = [f"{name}, {unsure[name]}" for name in binary if name not in decide] if decide & {*binary} else []
    if not out:
        return []
    said = f"too little is known of {'; '.join(out)}, in validation: the other events decide which epoch is kept"
    return [f"{said} (or training.watch)"]


def _patience_is_over(history: TrainingHistory, config: TrainingConfig) -> bool:
    defined = history.best_auc is not None and np.isfinite(history.best_auc)
    return bool(config.patience and defined and len(history.epochs) - history.best_epoch >= config.patience)


def train_module_of(model: DistributedModelParallel) -> MTCLTrain:
    """The MTCLTrain inside DistributedModelParallel and DDP."""
    module = model.module
    while not isinstance(module, MTCLTrain):
        module = module.module
    return module


def plain_model(model: DistributedModelParallel) -> MTCL:
    """The MTCL inside DistributedModelParallel and DDP, with its tables sharded."""
    return train_module_of(model).model


def _count_skipped(
    train_module: MTCLTrain, state: TrainingState, config: TrainingConfig, progress: TrainingProgress
) -> None:
    """Say which batch was skipped since the last look, and stop when there are too many; the same on every rank."""
    skipped, history = train_module.loss.skipped(), state.history
    if skipped.steps == history.skipped_steps:
        return
    history.skipped_steps = skipped.steps
    where = f"rank {skipped.last_rank}" if skipped.last_rank is not None else f"{skipped.last_ranks} ranks"
    what = (
        f"step {skipped.last_batch} (epoch {state.position.epoch}): the loss of {', '.join(skipped.last_parts)} is not "
        f"finite on {where}"
    )
    if skipped.steps > config.max_skipped_steps:
        raise FloatingPointError(
            f"{what}; {skipped.steps} such batches are more than max_skipped_steps: lower the learning rates or look "
            "for extreme labels"
        )
    progress.line(f"{what}; the batch trained nothing ({skipped.steps} so far)")


def _validate(plain: MTCL, validation: Validation, batch_size: int, where: Ranks) -> dict[str, Metrics]:
    predictions = predict(plain, validation.rows, batch_size=batch_size, device=where.device)
    bad = [name for name, values in predictions.items() if not np.isfinite(values).all()]
    if bad:  # the same on every rank, which all have all predictions
        raise FloatingPointError(
            f"predictions of {', '.join(bad)} are not finite on the validation rows: the weights have overflowed; "
            "lower the learning rates"
        )
    metrics = None
    if where.first:
        labels = validation.rows.labels.numpy()
        metrics = {
            task.name: task_metrics(task, labels[:, i], predictions[task.name], validation.users)
            for i, task in enumerate(plain.tasks)
        }
    return where.broadcast(metrics)  # type: ignore[return-value]


def _epoch_line(
    epoch: int, epochs: int, metrics: dict[str, Metrics], value: float, best: bool, history: TrainingHistory
) -> str:
    shown = []
    for name, of in metrics.items():
        if (key := main_metric(of)) is not None:
            shown.append(f"{name} {label_of(key)} {cell(of[key])}")
    found = f"validation: {', '.join(shown)}" if shown else "no task has a label in the validation rows"
    mean = "" if np.isnan(value) else f"; mean {value:.4f}"
    speed = epoch_speed(history.seconds[-1], history.samples_per_second[-1], history.first_step[-1])
    return f"epoch {epoch}/{epochs} {speed}; {found}{mean}{' (best so far)' if best else ''}"
