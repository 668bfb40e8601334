"""The model that a run's configuration describes."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet

from mtcl_torchrec.config import (
    FusionConfig,
    LossWeightingConfig,
    ModelConfig,
    OptimizersConfig,
    RunConfig,
    ShardingConfig,
    TrunkConfig,
)
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.balance.weighting import (
    DWA,
    FAMO,
    IMTLL,
    GeometricMean,
    LossWeighting,
    SmoothTchebycheff,
    UncertaintyWeighting,
)
from mtcl_torchrec.modules.embeddings import build_embedding_bag_collection, table_module_name
from mtcl_torchrec.modules.fusion import WeightedMean
from mtcl_torchrec.modules.towers import Precision
from mtcl_torchrec.modules.trunks import PLE, MMoE, SharedBottom, SingleTask, Trunk
from mtcl_torchrec.schema import ConfigError


def build_trunk(config: TrunkConfig) -> Trunk:
    """The trunk of a configuration."""
    common = {"norm": config.norm, "dropout": config.dropout}
    if config.kind == "shared_bottom":
        return SharedBottom(config.expert_layers, **common)  # type: ignore[arg-type]
    if config.kind == "single_task":
        return SingleTask(config.expert_layers, **common)  # type: ignore[arg-type]
    gated = {**common, "gate_dropout": config.gate_dropout}
    if config.kind == "mmoe":
        return MMoE(config.num_experts, config.expert_layers, **gated)  # type: ignore[arg-type]
    return PLE(
        config.shared_experts,
        config.task_experts,
        config.expert_layers,
        levels=config.levels,
        **gated,  # type: ignore[arg-type]
    )


def build_model(
    config: ModelConfig,
    encoder: FeatureEncoder,
    fusion: FusionConfig | None,
    *,
    seed: int = 0,
    table_device: torch.device | str = "meta",
    precision: Precision = "fp32",
) -> MTCL:
    """The model for a fitted encoder's features and tasks.

    Args:
        config: the model part of a run.
        encoder: fitted; tells vocabularies, dense columns and label scales.
        fusion: weights of the fused score; None weighs every binary task the same, or all tasks where none is binary.
        seed: of the dense parameters, so that every rank starts from the same.
        table_device: where the embedding tables live until they are sharded.
        precision: of everything after the embeddings, in training and afterwards.
    """
    tasks = encoder.resolved_tasks()
    if fusion is None:
        binary = [task.name for task in tasks if task.kind == "binary"]
        weights = dict.fromkeys(binary or [task.name for task in tasks], 1.0)
    else:
        weights = fusion.weights

    def cross(width: int) -> nn.Module:
        return LowRankCrossNet(width, config.cross_layers, low_rank=min(config.cross_rank, width))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MTCL(
            build_embedding_bag_collection(encoder.schema, encoder.num_embeddings, table_device),
            len(encoder.dense_groups),
            build_trunk(config.trunk),
            tasks,
            WeightedMean(weights),
            interaction=cross if config.cross_layers else None,
            tower_layers=config.tower_layers,
            embedding_dropout=config.embedding_dropout,
            dense_dropout=config.dense_dropout,
            dense_noise=config.dense_noise,
            tower_dropout=config.tower_dropout,
            feature_groups={f.name: f.group for f in encoder.schema.sparse_features},
            dense_groups=encoder.dense_groups,
            precision=precision,
        )


def build_loss_weighting(config: LossWeightingConfig, num_tasks: int) -> LossWeighting | None:
    """The loss weighting of a configuration; None for the weighted sum.

    Raises:
        ConfigError: it needs a library that is not installed.
    """
    held = config.max_factor
    try:
        if config.kind == "uncertainty":
            return UncertaintyWeighting(num_tasks, lr=config.lr, max_factor=held)
        if config.kind == "imtl_l":
            return IMTLL(num_tasks, lr=config.lr, max_factor=held)
        if config.kind == "tchebycheff":
            return SmoothTchebycheff(num_tasks, mu=config.mu, max_factor=held)
    except ImportError as error:
        raise ConfigError(f"balance.weighting.kind {config.kind}: {error}") from None
    if config.kind == "dwa":
        return DWA(num_tasks, temperature=config.temperature, window=config.window, max_factor=held)
    if config.kind == "famo":
        return FAMO(num_tasks, lr=config.lr or 0.025, weight_decay=config.weight_decay, max_factor=held)
    return GeometricMean(num_tasks, max_factor=held) if config.kind == "geometric_mean" else None


def for_modules(run: RunConfig) -> tuple[OptimizersConfig, ShardingConfig]:
    """Optimizers and sharding with tables named as in the model."""
    lr_of = {table_module_name(table): lr for table, lr in run.optimizers.tables.lr_of.items()}
    tables = {table_module_name(table): of for table, of in run.sharding.tables.items()}
    return (
        run.optimizers.model_copy(update={"tables": run.optimizers.tables.model_copy(update={"lr_of": lr_of})}),
        run.sharding.model_copy(update={"tables": tables}),
    )
