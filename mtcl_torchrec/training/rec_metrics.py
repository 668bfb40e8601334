"""Metrics of what a run predicts while it trains: TorchRec's `RecMetricModule` over the newest rows.

Each row is predicted before it is learnt from.  In the first epoch, and in a stream, these are figures of rows that the
model has not seen (progressive validation), with dropout; in later ones, of rows that it knows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torchmetrics import Metric
from torchrec.metrics.calibration import CalibrationMetric
from torchrec.metrics.metric_module import RecMetricModule
from torchrec.metrics.metrics_config import RecComputeMode, RecTaskInfo
from torchrec.metrics.mse import MSEMetric
from torchrec.metrics.ne import NEMetric
from torchrec.metrics.rec_metric import RecMetric, RecMetricList

from mtcl_torchrec.config import TrainingMetricsConfig
from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.modules.heads import prediction
from mtcl_torchrec.schema import Schema, Task
from mtcl_torchrec.training.rec_metric_kinds import GROUPS, MulticlassMetric, WindowAUC, of_own_class
from mtcl_torchrec.training.sharding import Ranks

# Rows that are handed to the module, and leave a window, together: it costs as much for one row as for thousands.
PIECE = 65_536
# What the module calls them -> what they are called everywhere else.
_NAMES = {
    "ne|window_ne": "ne",
    "auc|window_auc": "auc",
    "auc|window_gauc": "gauc",
    "calibration|window_calibration": "calibration",
    "mse|window_mse": "mse",
    "mse|window_r_squared": "r2",
    "accuracy|window_ne": "ne",
    "accuracy|window_accuracy": "top1",
    "sum_weights|window_sum_weights": "count",
    "num_positive_samples|window_num_positive_samples": "positives",
}
_OF_KIND = {"ne": {"ne"}, "auc": {"auc"}, "gauc": {"gauc"}, "calibration": {"calibration"}, "mse": {"mse", "r2"},
            "top1": {"top1"}}  # fmt: skip
Readings = dict[str, dict[str, float]]


def user_feature(schema: Schema) -> str | None:
    """The id feature whose rows tell users apart in a batch; None where there is none."""
    return next((f.name for f in schema.features if f.kind == "id" and f.rows_from == schema.user), None)


class TrainingMetrics:
    """Takes in every training step and, every few steps, tells NE, AUC, GAUC, calibration, MSE or top-1 of the newest
    rows of all ranks.

    A label counts as it does in the loss: a missing or masked one nowhere, the zeros of a chain as zeros.  Rows of a
    batch that was skipped count nowhere.  Sample weights do not count, as in the final metrics
    that are not called weighted.  AUC and GAUC are kept
    as rows, in a window of their own.  Nothing is drawn at random, and nothing waits for the device but `read`.

    `reset` begins anew; the training loop does so in each epoch, and where it goes on after a checkpoint: what is told
    then is of the rows since.

    Args:
        tasks: as the model has them.
        config: what is told, and how often; windows are those of all ranks together, and hold one step at least.
        where: every rank takes part.
        batch_size: rows a step and rank.
        users: sparse feature whose values are the groups of GAUC, of which 0 is unknown; None tells no GAUC.

    Example:
        >>> where = Ranks(0, 1, torch.device("cpu"))
        >>> config = TrainingMetricsConfig(kinds=["auc", "calibration"])
        >>> metrics = TrainingMetrics([Task.binary("click")], config, where, batch_size=4)
        >>> labels = torch.tensor([[0.0], [1.0], [float("nan")], [1.0]])
        >>> metrics.add({"click": torch.tensor([-1.0, 1.0, 5.0, 0.0])}, labels, torch.zeros(()))
        >>> metrics.read()
        {'click': {'count': 3.0, 'auc': 1.0, 'calibration': 0.75}}
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        config: TrainingMetricsConfig,
        where: Ranks,
        *,
        batch_size: int,
        users: str | None = None,
    ) -> None:
        self.tasks, self.config, self.users = tuple(tasks), config, users
        self._device, self._told = where.device, {name for kind in config.kinds for name in _OF_KIND[kind]} | {"count"}
        least = batch_size * where.world_size
        self._piece = max(batch_size, min(PIECE, config.window // (16 * where.world_size)))
        self.module = _module(self.tasks, config, where, least, users is not None and "gauc" in config.kinds)
        if where.world_size == 1:
            # With nobody to ask, gloo would still gather, by kernels on threads of its own: see `lone_workers`.
            for part in self.module.modules():
                if isinstance(part, Metric):
                    part.distributed_available_fn = _alone
        self._groups: deque[torch.Tensor] = deque()  # of batches that the pipeline has taken and not trained yet
        self._held: list[tuple[Mapping[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self._rows = 0

    def due(self, step: int) -> bool:
        """Whether this step is one to read after; the same on every rank."""
        return step % self.config.every == 0

    def watched(self, batches: Iterator[MTBatch]) -> Iterator[MTBatch]:
        """The batches, whose users are noted on their way to the pipeline."""
        if self.users is None:
            yield from batches
            return
        for batch in batches:
            users, rows = batch.sparse_features[self.users].values(), len(batch.labels)
            known = torch.where(users > 0, users, -1) if len(users) == rows else torch.full((rows,), -1)
            self._groups.append(known)
            yield batch

    def add(self, logits: Mapping[str, torch.Tensor], labels: torch.Tensor, skipped: torch.Tensor) -> None:
        """Take a training step in.

        Args:
            logits: task -> (B,) or (B, C), detached.
            labels: (B, T), NaN where missing; both as `MTCLTrain` returns them.
            skipped: () other than 0 where the batch trained nothing; copied.
        """
        groups = self._groups.popleft() if self._groups else None
        # Of many classes little is kept, at once.
        small = {
            task.name: of_own_class(logits[task.name], labels[:, i]) if task.kind == "multiclass" else logits[task.name]
            for i, task in enumerate(self.tasks)
        }
        self._held.append((small, labels, skipped.clone(), groups))
        self._rows += len(labels)
        if self._rows >= self._piece:
            self._hand_over()

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Everything that is held to the module."""
        if not self._held:
            return
        held, self._held, self._rows = self._held, [], 0
        labels = torch.cat([of for _, of, _, _ in held]).double()
        trained = torch.cat([(skipped == 0).expand(len(of)) for _, of, skipped, _ in held])
        out: dict[str, torch.Tensor] = {}
        for i, task in enumerate(self.tasks):
            logit = torch.cat([logits[task.name] for logits, _, _, _ in held]).double()
            finite = torch.isfinite(logit) if logit.dim() == 1 else torch.isfinite(logit).all(1)
            counts = trained & finite & ~torch.isnan(labels[:, i])
            safe = torch.where(counts if logit.dim() == 1 else counts.unsqueeze(1), logit, 0.0)
            out[f"{i}/prediction"] = safe if task.kind == "multiclass" else prediction(task, safe)
            out[f"{i}/label"] = torch.where(counts, labels[:, i], 0.0)
            out[f"{i}/weight"] = counts.double()
        if self.users is not None:
            groups = torch.cat([of if of is not None else torch.full((len(y),), -1) for _, y, _, of in held])
            groups = groups.pin_memory() if self._device.type == "cuda" else groups
            out[GROUPS] = groups.to(self._device, non_blocking=True)
        self.module.update(out)

    def read(self) -> Readings:
        """Metrics of the rows in the windows: task -> metric -> value, the same on every rank; what is not defined is
        left out.  Every rank calls it; it waits for the device."""
        self._hand_over()
        found = dict(self.module.compute())
        numbers = torch.stack([torch.as_tensor(v).double().reshape(()) for v in found.values()]).tolist()
        readings: Readings = {task.name: {} for task in self.tasks}
        for key, value in zip(found, numbers, strict=True):
            space, name = key.split("|")
            metric, _, number = space.rpartition("-")
            if (name := _NAMES.get(f"{metric}|{name}", "")) and math.isfinite(value):
                readings[self.tasks[int(number)].name][name] = value
        return {task.name: self._defined(task, readings[task.name]) for task in self.tasks}

    def _defined(self, task: Task, found: dict[str, float]) -> dict[str, float]:
        """TorchRec gives numbers, too, for what is not defined: without rows, or where only one class is there."""
        count, positives = round(found.get("count", 0.0)), round(found.pop("positives", 0.0))
        undefined = set(found) - {"count"} if count == 0 and task.kind != "multiclass" else set()
        if task.kind == "binary":
            undefined |= {"ne"} if positives in (0, count) else set()
            undefined |= {"calibration"} if positives == 0 else set()
        order = ("count", "ne", "auc", "gauc", "calibration", "mse", "r2", "top1")
        return {name: found[name] for name in order if name in found and name in self._told - undefined}

    def reset(self) -> None:
        """Forget all rows."""
        self._held, self._rows = [], 0
        self._groups.clear()
        self.module.reset()


def _module(
    tasks: Sequence[Task], config: TrainingMetricsConfig, where: Ranks, least: int, grouped: bool
) -> RecMetricModule:
    """The tasks are called by their numbers, since names may hold anything."""
    # Not at the top: TorchRec 1.6, the newest one for torch 2.11, lacks both, and trains without these metrics.
    from torchrec.metrics.num_positive_samples import NumPositiveSamplesMetric
    from torchrec.metrics.sum_weights import SumWeightsMetric

    infos = [
        RecTaskInfo(name=str(i), label_name=f"{i}/label", prediction_name=f"{i}/prediction", weight_name=f"{i}/weight")
        for i in range(len(tasks))
    ]
    of_kind = {
        kind: [info for info, task in zip(infos, tasks, strict=True) if task.kind == kind]
        for kind in ("binary", "multiclass", "regression")
    }

    def build(kind: type[RecMetric], of: list[RecTaskInfo], window: int, **options: Any) -> RecMetric:
        return kind(
            world_size=where.world_size, my_rank=where.rank, batch_size=least // where.world_size, tasks=of,
            compute_mode=RecComputeMode.FUSED_TASKS_COMPUTATION, window_size=max(window, least),
            compute_on_all_ranks=True, **options,
        )  # fmt: skip

    kinds, metrics = set(config.kinds), []
    if of := of_kind["binary"]:
        metrics.append(build(NumPositiveSamplesMetric, of, config.window))
        if "ne" in kinds:
            metrics.append(build(NEMetric, of, config.window))
        if "calibration" in kinds:
            metrics.append(build(CalibrationMetric, of, config.window))
        if "auc" in kinds or grouped:
            metrics.append(build(WindowAUC, of, config.ranked_window, grouped=grouped, overall="auc" in kinds))
    if of_kind["regression"] and "mse" in kinds:
        metrics.append(build(MSEMetric, of_kind["regression"], config.window, include_r_squared=True))
    if of := of_kind["binary"] + of_kind["regression"]:
        metrics.append(build(SumWeightsMetric, of, config.window))
    if kinds & {"ne", "top1"}:
        for info in of_kind["multiclass"]:
            classes = tasks[int(info.name)].out_features
            metrics.append(build(MulticlassMetric, [info], config.window, num_classes=classes))
    module = RecMetricModule(
        batch_size=least // where.world_size,
        world_size=where.world_size,
        rec_tasks=infos,
        rec_metrics=RecMetricList(metrics),
        compute_interval_steps=config.every,
    )
    return module.to(where.device)


def _alone() -> bool:
    """Whether there are other ranks: torchmetrics asks."""
    return False


def build_training_metrics(
    tasks: Sequence[Task], schema: Schema, config: TrainingMetricsConfig, where: Ranks, *, batch_size: int
) -> TrainingMetrics | None:
    """The metrics of a run while it trains; None where they are off."""
    if config.every == 0:
        return None
    users = user_feature(schema) if "gauc" in config.kinds else None
    return TrainingMetrics(tasks, config, where, batch_size=batch_size, users=users)
