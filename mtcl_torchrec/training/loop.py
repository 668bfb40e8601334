"""The training loop: TorchRec's pipeline, evaluation after each epoch, early stopping, the best epoch kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from mtcl_torchrec.config import OptimizersConfig, ShardingConfig, TrainingConfig
from mtcl_torchrec.data.batch import EncodedRows, global_batches, iterate
from mtcl_torchrec.evaluation.metrics import Metrics, mean_auc, task_metrics
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.models import MTCL, MTCLTrain
from mtcl_torchrec.training.averaging import WeightAverage
from mtcl_torchrec.training.optimizers import build_optimizer, build_schedule, fuse_table_optimizer, is_fused
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.sharding import Ranks, shard

LOSSES_EVERY = 20  # steps between two readings of the losses, which wait for the device


@dataclass
class TrainingHistory:
    """What happened.

    Args:
        epochs: validation metrics by task, of each epoch.
        best_epoch: counted from 1; 0 while there is none.
        best_auc: its mean validation AUC.
        seconds: of each epoch's training, without evaluation.
        stopped_early: whether patience ran out.
    """

    epochs: list[dict[str, Metrics]] = field(default_factory=list)
    best_epoch: int = 0
    best_auc: float = float("-inf")
    seconds: list[float] = field(default_factory=list)
    stopped_early: bool = False


def parallelise(
    train_module: MTCLTrain,
    where: Ranks,
    optimizers: OptimizersConfig,
    *,
    sharding: ShardingConfig | None = None,
    batch_size: int = 512,
    seed: int = 0,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Shard the tables and build the optimizers.

    Args:
        train_module: with its tables on the meta device.
        optimizers, sharding: their tables named as in the model.
        batch_size: rows a step and rank; the planner's estimates depend on it.
        seed: of the tables' first values.

    Raises:
        ConfigError: the tables fit nowhere, or what is configured cannot be done; the same on every rank.
    """
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
    )
    return model, build_optimizer(model, optimizers.tables, optimizers.dense)


def build_pipeline(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, device: torch.device, kind: str = "sparse_dist"
) -> TrainPipelineBase | TrainPipelineSparseDist:
    """TorchRec's train pipeline: ``sparse_dist`` overlaps communication with computation, ``base`` does not."""
    if kind == "base":
        return TrainPipelineBase(model, optimizer, device)
    return TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True)


def fit(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    train_rows: EncodedRows,
    val_rows: EncodedRows,
    config: TrainingConfig,
    where: Ranks,
    *,
    val_users: np.ndarray | None,
    keep: Callable[[], None],
    progress: TrainingProgress,
) -> TrainingHistory:
    """Train, and call `keep` (on every rank) whenever an epoch is the best so far.

    Args:
        model: sharded `MTCLTrain`.
        train_rows, val_rows: the same on every rank; each rank takes its share.
        val_users: (N,) keys for the validation's GAUC.
        progress: reports, and knows the number of steps of the whole schedule.
        keep: stores the weights; they are the averaged ones where averaging is on.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    train_module = _train_module(model)
    plain = train_module.model
    average = WeightAverage(model, config.averaging) if config.averaging > 0 else None
    pipeline = build_pipeline(model, optimizer, where.device, config.pipeline)
    schedule = build_schedule(optimizer, config.warmup_steps, progress.total_steps, config.decay)
    history = TrainingHistory()
    labels, step = val_rows.labels.numpy(), 0
    model.train()
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        indices = global_batches(
            len(train_rows), config.batch_size, rank=where.rank, world_size=where.world_size, seed=(config.seed, epoch)
        )
        # Ranks draw different dropout masks; the epoch is part of the seed, so that no two epochs share them.
        torch.manual_seed((config.seed * 1000 + epoch) * 1000 + where.rank)
        batches = iterate(train_rows, indices)
        rows_left = len(train_rows)
        while True:
            try:
                loss, *_ = pipeline.progress(batches)
            except StopIteration:
                break
            step += 1
            schedule.step()
            if average is not None:
                average.update()
            rows = min(rows_left, config.batch_size * where.world_size)
            rows_left -= rows
            read = step % LOSSES_EVERY == 0 or rows_left == 0
            losses = _losses_over_ranks(train_module, loss, where) if read else None
            progress.step(epoch=epoch, step=step, rows=rows, losses=losses)
        history.seconds.append(time.perf_counter() - started)
        if isinstance(pipeline, TrainPipelineSparseDist):
            pipeline.detach()
        if average is not None:
            average.swap()
        metrics = _validate(plain, val_rows, labels, val_users, config.eval_batch_size, where)
        value = mean_auc([t for t in plain.tasks if t.name in config.watch] or plain.tasks, metrics)
        history.epochs.append(metrics)
        # Where the metric is not defined (one class only), the newest epoch is kept and nothing stops early.
        best = not value <= history.best_auc
        if best:
            history.best_auc, history.best_epoch = value, epoch
            keep()
        if average is not None:
            average.swap()
        scalars = {f"val/{m}/{t}": v for t, of in metrics.items() for m, v in of.items() if m != "count"}
        progress.epoch(
            step=step, scalars=scalars, line=_epoch_line(epoch, config.epochs, metrics, value, best, history)
        )
        patience_over = config.patience and epoch - history.best_epoch >= config.patience
        if patience_over and not np.isnan(value) and epoch < config.epochs:
            history.stopped_early = True
            progress.line(f"no better epoch for {config.patience}: stopping; epoch {history.best_epoch} is kept")
            break
    return history


def _train_module(model: DistributedModelParallel) -> MTCLTrain:
    module = model.module
    while not isinstance(module, MTCLTrain):
        module = module.module
    return module


def plain_model(model: DistributedModelParallel) -> MTCL:
    """The MTCL inside DistributedModelParallel and DDP, with its tables sharded."""
    return _train_module(model).model


def _losses_over_ranks(train_module: MTCLTrain, loss: torch.Tensor, where: Ranks) -> dict[str, float]:
    """Mean over the ranks of the total and each task's loss: the loss of the global batch."""
    values = torch.cat([loss.detach().reshape(1), train_module.loss.last_task_losses]).double()
    if where.world_size > 1:
        dist.all_reduce(values)
        values /= where.world_size
    names = ["total", *(task.name for task in train_module.model.tasks)]
    losses = dict(zip(names, values.tolist(), strict=True))
    bad = [name for name, value in losses.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"the loss is not finite any more ({', '.join(bad)}); "
            "lower the learning rates or look for extreme dense values"
        )
    return losses


def _validate(
    plain: MTCL,
    rows: EncodedRows,
    labels: np.ndarray,
    users: np.ndarray | None,
    batch_size: int,
    where: Ranks,
) -> dict[str, Metrics]:
    predictions = predict(plain, rows, batch_size=batch_size, device=where.device)
    metrics = None
    if where.first:
        metrics = {
            task.name: task_metrics(task, labels[:, i], predictions[task.name], users)
            for i, task in enumerate(plain.tasks)
        }
    return where.broadcast(metrics)  # type: ignore[return-value]


def _epoch_line(
    epoch: int, epochs: int, metrics: dict[str, Metrics], value: float, best: bool, history: TrainingHistory
) -> str:
    shown = []
    for name, of in metrics.items():
        for key in ("auc", "ne", "r2"):
            if key in of:
                shown.append(f"{name} {key.upper()} {of[key]:.4f}")
                break
    mark = " (best so far)" if best else ""
    return (
        f"epoch {epoch}/{epochs} in {history.seconds[-1]:.1f} s; validation: {', '.join(shown)}; mean {value:.4f}{mark}"
    )
