"""How the model is trained: optimizers, steps, epochs."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mtcl_torchrec.config.base import Fraction, Part
from mtcl_torchrec.schema import Schema, check_unique, nearest


class TableOptimizerConfig(Part):
    """Optimizer of the embedding tables, fused into backward wherever the table is sharded.

    Args:
        kind: ``adam`` is fused on CUDA only; on the CPU it updates all rows in every step.
        lr: learning rate.
        lr_of: table -> learning rate of its own; large tables overfit where small ones still learn.
        eps: added to the denominator of the adaptive kinds.
        init_scale: tables start uniform in ± this; the default is 1/√rows.
        max_gradient: each number of the gradient of a pooled embedding (of the mean loss over the global batch) is cut
            to ± this inside the fused kernel; 0 is off.  (A norm over all parameters cannot include fused tables, whose
            gradients never exist as a whole.)  Of a mean-pooled bag in a row-wise table, the gradient is divided by the
            length of the bag before it is cut, else afterwards.
    """

    kind: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    lr: PositiveFloat = 0.02
    lr_of: dict[str, PositiveFloat] = Field(default_factory=dict)
    eps: PositiveFloat = 1e-8
    init_scale: PositiveFloat | None = None
    max_gradient: NonNegativeFloat = 0.0


class DenseOptimizerConfig(Part):
    """Optimizer of everything that is no embedding table.

    Args:
        kind: ``adamw`` decays weights apart from the gradient.
        betas: of Adam.
        weight_decay: of weight matrices; biases and the scales of norms are left alone.
        clip_norm: the gradient of all dense parameters together is cut to this norm; 0 is off.
    """

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: NonNegativeFloat = 10.0


class OptimizersConfig(Part):
    """The two optimizers of a TorchRec model."""

    tables: TableOptimizerConfig = Field(default_factory=TableOptimizerConfig)
    dense: DenseOptimizerConfig = Field(default_factory=DenseOptimizerConfig)


class CheckpointConfig(Part):
    """When the whole state of training is written, beside the end of each epoch.

    Args:
        every_steps: write after this many steps; 0 is off.
        every_minutes: write when this much time has passed; 0 is off.
        keep: how many of the newest are kept, beside the best epoch's.
        asynchronous: write in the background while training goes on, from a copy that takes as much host memory as this
            rank's part of the state; the end of an epoch always waits.
    """

    every_steps: NonNegativeInt = 0
    every_minutes: NonNegativeFloat = 15.0
    keep: PositiveInt = 2
    asynchronous: bool = True


class RegularisersConfig(Part):
    """The weight λ of each penalty in the loss; see `mtcl_torchrec.modules.regularisers.Regularisers`.

    Args:
        l2_embedding: of the mean of ‖pooled embeddings‖² over rows; one number for all features, or feature -> λ.
        l2_rows: feature -> λ of the mean of ‖row‖² over the rows of its table, of features of one id: a Gaussian prior,
            which shrinks a rare id more than a frequent one.
        l2_dense: of the sum of squares of all dense weights.
        expert_orthogonality: of the mean squared cosine between the outputs of two experts.
        gate_balance: of CV² of the experts' importance.
    """

    l2_embedding: float | dict[str, float] = 0.0
    l2_rows: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    l2_dense: NonNegativeFloat = 0.0
    expert_orthogonality: NonNegativeFloat = 0.0
    gate_balance: NonNegativeFloat = 0.0

    @field_validator("l2_embedding", mode="plain")
    @classmethod
    def _one_or_by_feature(cls, value: Any) -> float | dict[str, float]:
        # By hand: pydantic would say of a wrong number, too, that it is no mapping.
        if not isinstance(value, dict):
            return _penalty(value)
        return {str(feature): _penalty(weight, f"of {feature!r} ") for feature, weight in value.items()}

    def check(self, schema: Schema) -> None:
        """See that what l2_embedding and l2_rows name has embeddings, and that of the latter, one id a row.

        Raises:
            ValueError: naming the feature.
        """
        if isinstance(self.l2_embedding, dict):
            embedded = [f.name for f in schema.sparse_features]
            for name in self.l2_embedding:
                if name not in embedded:
                    raise ValueError(
                        f"training.regularisers.l2_embedding: no feature {name!r} that has embeddings"
                        f"{nearest(name, embedded)}"
                    )
        ids = [f.name for f in schema.sparse_features if f.kind == "id"]
        for name in self.l2_rows:
            if name not in ids:
                raise ValueError(f"training.regularisers.l2_rows: no id feature {name!r}{nearest(name, ids)}")


def _penalty(value: Any, of: str = "") -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if isinstance(value, bool) or not 0 <= weight < math.inf:
        raise ValueError(f"the penalty {of}is a number of at least 0, not {value!r}")
    return weight


MetricKind = Literal["ne", "auc", "gauc", "calibration", "mse", "top1"]
METRIC_KINDS: tuple[MetricKind, ...] = get_args(MetricKind)
# The kinds of task that each metric is of.
METRICS_OF: dict[MetricKind, tuple[str, ...]] = {
    "ne": ("binary", "multiclass"),
    "auc": ("binary",),
    "gauc": ("binary",),
    "calibration": ("binary",),
    "mse": ("regression",),
    "top1": ("multiclass",),
}


class TrainingMetricsConfig(Part):
    """Metrics of what the training steps predict; see `mtcl_torchrec.training.rec_metrics`.

    Args:
        every: steps between two readings; 0 is off.  A reading waits for the device and is a collective of all ranks.
        window: the newest rows of the epoch, of all ranks, that count.
        ranked_window: the same for ``auc`` and ``gauc``, which keep each row and sort them all in every reading.
        kinds: what is told, each of the tasks that it fits; ``gauc`` needs the schema's user as an id feature.
    """

    every: NonNegativeInt = 100
    window: PositiveInt = 10_000_000
    ranked_window: PositiveInt = 50_000
    kinds: Annotated[list[MetricKind], Field(min_length=1)] = Field(default_factory=lambda: list(METRIC_KINDS))

    @model_validator(mode="after")
    def _fitting(self) -> TrainingMetricsConfig:
        check_unique("metric", self.kinds)
        if self.every == 0 and (given := self.model_fields_set - {"every"}):
            raise ValueError(f"{min(given)} does nothing: every is 0, which is off")
        if "ranked_window" in self.model_fields_set and not {"auc", "gauc"} & set(self.kinds):
            raise ValueError("ranked_window belongs to auc and gauc")
        return self

    def check(self, schema: Schema) -> None:
        """See that what was asked for can be told of some task.

        Raises:
            ValueError: naming the metric.
        """
        if "kinds" not in self.model_fields_set:
            return
        there = {task.kind for task in schema.tasks}
        for kind in self.kinds:
            if not there & set(METRICS_OF[kind]):
                of = " or ".join(METRICS_OF[kind])
                raise ValueError(f"training.metrics.kinds: {kind} is of a {of} task, and there is none")
        users = [f.name for f in schema.features if f.kind == "id" and f.rows_from == schema.user]
        if "gauc" in self.kinds and not users:
            raise ValueError("training.metrics.kinds: gauc needs schema.user, and an id feature of that column")


class TrainingConfig(Part):
    """How long and in which steps.

    Args:
        epochs: passes over the training split, at most.
        batch_size: rows a step and rank.
        patience: stop after this many epochs without a better mean validation AUC; 0 never stops.
        task_patience: freeze a task after this many epochs in which its own validation metric has not improved: it no
            longer moves what the tasks share, while the others go on; 0 never does.  Training stops when all are
            frozen.  Which epoch is kept is still decided by the mean.
        watch: the tasks whose mean AUC decides which epoch is best; the default is every binary task with at
            least 20 events, and 20 rows without, of 10 users each and no handful who have most of them, in the
            validation split.
        id_dropout: id feature -> share of the training rows in which it is unknown, so that the model learns to do
            without it, as it must for users and items that training never met: what else is known of them (text,
            semantic ids, attributes) then speaks.  Each epoch draws anew.
        warmup_steps: the learning rates rise linearly from 0 over this many steps.
        decay: how the learning rates fall from then to the last step of the last epoch.
        averaging: decay of the exponential moving average of all weights that is evaluated and kept; 0 is off.
        regularisers: penalties in the loss.
        pipeline: TorchRec's train pipeline: ``sparse_dist`` overlaps communication with computation, ``base`` does not.
        precision: of the dense part (everything after the embeddings, up to the heads): ``bf16`` computes it under
            autocast; ``auto`` is bf16 where the machine of every rank has it in hardware (CUDA from compute capability
            8.0 on; a CPU with AVX512-BF16, and from 65,536 dense parameters on), else fp32.  The run directory's
            run.yaml tells which it was, and a run that is resumed keeps it.
        compile: ``dense`` compiles everything after the embeddings, up to the logits, with torch.compile for training;
            it needs a C++ compiler (CUDA: triton) and a minute or two at the start.  Evaluation stays eager.
        log_every: steps between two readings of the losses and of how the tasks get along, which wait for the device.
        metrics: what is told of the predictions of the training steps, and how often.
        max_skipped_steps: a batch whose loss is not finite trains nothing and is counted; after this many, training
            stops.
        gradient_accumulation: always 1, since a fused table steps in every backward pass.
        checkpoint: when the state of training is written.
    """

    epochs: PositiveInt = 10
    batch_size: PositiveInt = 1024
    eval_batch_size: PositiveInt = 8192
    patience: NonNegativeInt = 3
    task_patience: NonNegativeInt = 0
    watch: list[str] = Field(default_factory=list)
    id_dropout: dict[str, Fraction] = Field(default_factory=dict)
    warmup_steps: NonNegativeInt = 100
    decay: Literal["none", "linear", "cosine"] = "linear"
    averaging: Fraction = 0.0
    regularisers: RegularisersConfig = Field(default_factory=RegularisersConfig)
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    pipeline: Literal["sparse_dist", "base"] = "sparse_dist"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["none", "dense"] = "none"
    log_every: PositiveInt = 20
    metrics: TrainingMetricsConfig = Field(default_factory=TrainingMetricsConfig)
    max_skipped_steps: NonNegativeInt = 10
    gradient_accumulation: PositiveInt = 1
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)

    @model_validator(mode="after")
    def _one_backward_a_step(self) -> TrainingConfig:
        if self.gradient_accumulation != 1:
            raise ValueError(
                "gradient_accumulation: tables whose optimizer is fused into backward step in every backward pass, so "
                "gradients cannot be added up over several; raise batch_size, or take more ranks"
            )
        return self
