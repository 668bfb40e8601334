"""The model that a run's configuration describes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet

from mtcl_torchrec.config import (
    FusionConfig,
    LossWeightingConfig,
    ModelConfig,
    OptimizersConfig,
    RunConfig,
    SequenceConfig,
    ShardingConfig,
    SurgeryConfig,
    TrunkConfig,
)
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.balance.weighting import (
    DWA,
    FAMO,
    IMTLL,
    GeometricMean,
    LossWeighting,
    SmoothTchebycheff,
    UncertaintyWeighting,
)
from mtcl_torchrec.modules.embeddings import (
    build_embedding_bag_collection,
    build_embedding_collections,
    embedding_dims,
    table_module_name,
)
from mtcl_torchrec.modules.gates import EPNet, PPNet
from mtcl_torchrec.modules.lookups import Lookups
from mtcl_torchrec.modules.rare import UncalibratedWarning
from mtcl_torchrec.modules.sequences import DIN, GRU, LSTM, HistoryEncoder, Mean, Sequences, Transformer
from mtcl_torchrec.modules.sequences.lstm_towers import LSTMTowers
from mtcl_torchrec.modules.towers import Precision
from mtcl_torchrec.modules.trunks import PLE, STEM, AdaTT, HoME, MMoE, SharedBottom, SingleTask
from mtcl_torchrec.modules.vectors import FrozenVectors
from mtcl_torchrec.schema import ConfigError, Schema, own_table
from mtcl_torchrec.training.fused import build_fused_score
from mtcl_torchrec.training.imported import import_module


def build_trunk(config: TrunkConfig) -> nn.Module:
    """The trunk of a configuration.

    Raises:
        ConfigError: a trunk of one's own cannot be imported or made; see `import_module`.
    """
    if config.import_path is not None:
        return import_module(config.import_path, config.options, key="model.trunk")
    layers = config.expert_layers
    common: dict[str, Any] = {"norm": config.norm, "dropout": config.dropout}
    if config.kind == "shared_bottom":
        return SharedBottom(layers, **common)
    if config.kind == "single_task":
        return SingleTask(layers, **common)
    common["gate_dropout"] = config.gate_dropout
    if config.kind == "mmoe":
        return MMoE(config.num_experts, layers, **common)
    task_experts = config.task_experts or 1
    if config.kind == "ple":
        return PLE(config.shared_experts or 2, task_experts, layers, levels=config.levels or 2, **common)
    common["task_experts"] = task_experts
    if config.kind == "adatt":
        return AdaTT(layers, shared_experts=config.shared_experts or 0, levels=config.levels or 2, **common)
    common["shared_experts"] = config.shared_experts or 1
    if config.kind == "home":
        return HoME(
            layers, groups=config.groups, group_experts=config.group_experts, feature_rank=config.feature_rank, **common
        )
    return STEM(layers, levels=config.levels or 1, **common)


def build_encoder(config: SequenceConfig, history: str) -> nn.Module:
    """The encoder of a history.

    Raises:
        ConfigError: an encoder of one's own cannot be imported or made; see `import_module`.
    """
    if config.import_path is not None:
        return import_module(config.import_path, config.options, key=f"model.sequences.{history}")
    if config.kind == "mean":
        return Mean()
    if config.kind == "transformer":
        return Transformer(config.blocks, heads=config.heads, dropout=config.dropout, times=config.times)
    if config.kind == "din":
        return DIN(config.hidden or 36, dropout=config.dropout)
    return (GRU if config.kind == "gru" else LSTM)(config.hidden, layers=config.layers, dropout=config.dropout)


def build_sequences(config: ModelConfig, schema: Schema, collections: Sequence[nn.Module]) -> Sequences:
    """Candidates and histories as the model's inputs.

    Args:
        collections: of `build_embedding_collections`.
    """
    histories = {}
    for feature in (f for f in schema.history_features if f.of is not None):
        beside = schema.companions(feature.name)
        histories[feature.name] = HistoryEncoder(
            build_encoder(config.sequences.get(feature.name, SequenceConfig()), feature.name),
            of=feature.of,
            beside=[f.name for f in beside],
            ages=next((f.name for f in beside if f.encoding == "log_bucket"), None),
            max_length=feature.max_length,
        )
    return Sequences(collections, histories)


def build_model(
    config: ModelConfig,
    encoder: FeatureEncoder,
    fusion: FusionConfig | None,
    *,
    seed: int = 0,
    table_device: torch.device | str = "meta",
    precision: Precision = "fp32",
    base_rates: Mapping[str, float | Sequence[float]] | None = None,
) -> MTCL:
    """The model for a fitted encoder's features and tasks.

    Args:
        config: the model part of a run.
        encoder: fitted; tells vocabularies, dense columns and label scales.
        fusion: the fused score, see `build_fused_score`.
        seed: of the dense parameters, so that every rank starts from the same.
        table_device: where the embedding tables live until they are sharded.
        precision: of everything after the embeddings, in training and afterwards.
        base_rates: of the training split, where the heads start; a model whose weights are going to be loaded needs
            none.
    """
    tasks = encoder.resolved_tasks()

    def cross(width: int) -> nn.Module:
        return LowRankCrossNet(width, config.cross_layers, low_rank=min(config.cross_rank, width))

    epnet, ppnet, tower = config.epnet, config.ppnet, config.tower
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedWarning)  # a run calibrates after training, or says so itself
        torch.manual_seed(seed)
        schema, copied = encoder.schema, config.copied_tables(encoder.schema)
        tables = build_embedding_bag_collection(schema, encoder.num_embeddings, table_device, copied)
        collections = build_embedding_collections(schema, encoder.num_embeddings, table_device)
        lookups: list[nn.Module] = [build_sequences(config, schema, collections)] if collections else []
        with torch.random.fork_rng(devices=[]):  # the rest starts the same whatever fuses it
            dims = embedding_dims(tables) | {
                f.name: f.embedding_dim for f in encoder.schema.sparse_features if f.kind == "vector"
            }
            dims = Lookups(dims, lookups).dims
            fused_score = build_fused_score(fusion, tasks, encoder=encoder, dims=dims)
        lookups = [*build_lookups(encoder, precision), *lookups]
        return MTCL(
            tables if tables.embedding_bag_configs() else None,
            len(encoder.dense_groups),
            build_trunk(config.trunk),
            tasks,
            fused_score,
            interaction=cross if config.cross_layers else None,
            tower_layers=config.tower_layers,
            embedding_dropout=config.embedding_dropout,
            dense_dropout=config.dense_dropout,
            dense_noise=config.dense_noise,
            tower_dropout=config.tower_dropout,
            feature_groups={f.name: f.group for f in encoder.schema.sparse_features},
            dense_groups=encoder.dense_groups,
            precision=precision,
            epnet=EPNet(epnet.features, hidden=epnet.hidden) if epnet else None,
            ppnet=PPNet(ppnet.features, hidden=ppnet.hidden) if ppnet else None,
            lookups=lookups,
            embedding_collection=collections or None,
            lstm_towers=LSTMTowers(tower.hidden, history=tower.history) if tower.kind == "lstm" else None,
            base_rates=base_rates,
        )


def build_lookups(encoder: FeatureEncoder, precision: Precision = "fp32") -> list[nn.Module]:
    """The inputs beside the tables: frozen vectors, in the order of the features."""
    return [
        FrozenVectors(
            feature.name,
            torch.from_numpy(encoder.vectors(feature.name)),
            feature.embedding_dim,
            trainable=feature.trainable,
            precision=precision,
        )
        for feature in encoder.schema.sparse_features
        if feature.kind == "vector"
    ]


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


def zero_tables(run: RunConfig) -> tuple[str, ...]:
    """Names in the model of the tables that start at zero: what items with no training of their own add to the rest.

    So an item that was never trained on has the sum of its trained prefixes alone, or its frozen vector alone.
    """
    tables = run.model.tables(run.data_schema)
    return tuple(table_module_name(table) for table, features in tables.items() if features[0].has_content)


def for_modules(run: RunConfig) -> tuple[OptimizersConfig, ShardingConfig]:
    """Optimizers and sharding with tables named as in the model.

    What is said of a table holds for the tasks' own copies of it, unless they are named themselves.
    """
    of_copy = {
        own_table(table, task): table
        for table, tasks in run.model.copied_tables(run.data_schema).items()
        for task in tasks
    }

    def named(given: dict[str, Any]) -> dict[str, Any]:
        copies = {copy: given[table] for copy, table in of_copy.items() if table in given}
        return {table_module_name(table): value for table, value in {**copies, **given}.items()}

    lr_of = named(run.optimizers.tables.lr_of)
    return (
        run.optimizers.model_copy(update={"tables": run.optimizers.tables.model_copy(update={"lr_of": lr_of})}),
        run.sharding.model_copy(update={"tables": named(run.sharding.tables)}),
    )
