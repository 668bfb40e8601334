"""The model that a run's configuration describes."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet

from mtcl_torchrec.config import (
    FusionConfig,
    ModelConfig,
    OptimizersConfig,
    RunConfig,
    ShardingConfig,
    SurgeryConfig,
    TrunkConfig,
)
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.embeddings import build_embedding_bag_collection, table_module_name
from mtcl_torchrec.modules.fusion import WeightedMean
from mtcl_torchrec.modules.towers import Precision
from mtcl_torchrec.modules.trunks import PLE, MMoE, SharedBottom, SingleTask, Trunk


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


def build_surgery(config: SurgeryConfig, *, seed: int = 0) -> GradientSurgery | None:
    """The gradient surgery of a configuration, if it has one.

    Args:
        seed: of random orders; the same on every rank.

    Raises:
        ConfigError: TorchJD is needed and not installed.
    """
    if config.kind == "none":
        return None
    return GradientSurgery(
        config.kind,
        cut=config.cut,
        groups=config.groups,
        min_weight=config.min_weight,
        max_weight=config.max_weight,
        seed=seed,
        options=config.options(),
    )


def for_modules(run: RunConfig) -> tuple[OptimizersConfig, ShardingConfig]:
    """Optimizers and sharding with tables named as in the model."""
    lr_of = {table_module_name(table): lr for table, lr in run.optimizers.tables.lr_of.items()}
    tables = {table_module_name(table): of for table, of in run.sharding.tables.items()}
    return (
        run.optimizers.model_copy(update={"tables": run.optimizers.tables.model_copy(update={"lr_of": lr_of})}),
        run.sharding.model_copy(update={"tables": tables}),
    )
