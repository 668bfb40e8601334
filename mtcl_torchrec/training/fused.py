"""The fused score that a run's configuration describes, and what it learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mtcl_torchrec.config import FusedLossConfig, FusionConfig
from mtcl_torchrec.config.fusion import LEARNED
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.modules.fusion import (
    Borda,
    ContextGatedMean,
    DenseNumber,
    ExpectedValue,
    FusedLoss,
    HardVoting,
    MonotoneNetwork,
    PowerProduct,
    ReciprocalRankFusion,
    SoftVoting,
    Stacking,
    TopKVoting,
    WeightedGeometricMean,
    WeightedMean,
)
from mtcl_torchrec.schema import ConfigError, Schema, Task, nearest
from mtcl_torchrec.training.imported import import_module

# The kinds whose options are named as the arguments of their class.
_CLASSES: dict[str, Any] = {
    "weighted_mean": (WeightedMean, ()),
    "weighted_geometric_mean": (WeightedGeometricMean, ("floor",)),
    "power_product": (PowerProduct, ("bases", "exponents")),
    "soft_voting": (SoftVoting, ("thresholds", "temperature")),
    "hard_voting": (HardVoting, ("thresholds",)),
    "top_k_voting": (TopKVoting, ("k", "temperature")),
    "borda": (Borda, ()),
    "reciprocal_rank": (ReciprocalRankFusion, ("k",)),
}


def build_fused_score(
    config: FusionConfig | None,
    tasks: Sequence[Task],
    *,
    encoder: FeatureEncoder | None = None,
    dims: Mapping[str, int] | None = None,
) -> nn.Module:
    """The fused score of a configuration.

    Args:
        config: None weighs every binary task the same, or all tasks where none is binary.
        tasks: the model's.
        encoder: fitted; where the score reads dense features (``numbers``, ``features``).
        dims: width of each pooled embedding of the model by its key; where the score reads any (``features``).

    Raises:
        ConfigError: a score of one's own cannot be imported or made, does not name its tasks, or gives no scores in
            [0, 1]; the numbers make no score; the configuration reads features, and nobody told of them.

    Example:
        >>> build_fused_score(FusionConfig(kind="stacking"), [Task.binary("click"), Task.binary("like")]).tasks
        ('click', 'like')
    """
    if config is None:
        binary = [task.name for task in tasks if task.kind == "binary"]
        return WeightedMean(dict.fromkeys(binary or [task.name for task in tasks], 1.0))
    if config.import_path is not None:
        return _imported(config.import_path, config.options, [task.name for task in tasks])
    try:
        return _built(config, tasks, encoder, dims)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"fusion: {error}") from None


def _built(
    config: FusionConfig, tasks: Sequence[Task], encoder: FeatureEncoder | None, dims: Mapping[str, int] | None
) -> nn.Module:
    """A score of ours."""
    if config.kind == "stacking":
        return Stacking(config.weights or {task.name: 1 / len(tasks) for task in tasks})
    if config.kind == "monotone_network":
        return MonotoneNetwork(config.signs or {}, **_given(config, "hidden"))
    weights = config.weights or {}
    if config.kind == "expected_value":
        numbers = {task: dense_number(name, encoder) for task, name in (config.numbers or {}).items()}
        return ExpectedValue(weights, numbers=numbers, **_given(config, "given", "scale"))
    if config.kind == "context_gated_mean":
        read = read_by_gate(config.features or [], encoder, dims)
        return ContextGatedMean(weights, **read, hidden=16 if config.hidden is None else config.hidden[0])
    make, options = _CLASSES[config.kind]
    return make(weights, **_given(config, *options))


def _given(config: FusionConfig, *options: str) -> dict[str, Any]:
    """Options that were given; the class knows the defaults of the others."""
    return {name: value for name in options if (value := getattr(config, name)) is not None}


def _imported(path: str, options: dict[str, Any], names: Sequence[str]) -> nn.Module:
    made = import_module(path, options, key="fusion")
    tasks = getattr(made, "tasks", None)
    if not isinstance(tasks, (tuple, list)) or not all(isinstance(task, str) for task in tasks):
        raise ConfigError(f"fusion.kind: {path} makes a module without an attribute tasks, the names that it needs")
    for task in tasks:
        if task not in names:
            raise ConfigError(f"fusion.kind: {path} needs task {task!r}, which the run lacks{nearest(task, names)}")
    if not getattr(made, "needs_context", False):
        _probe(made, tasks, path)
    return made


@torch.no_grad()
def _probe(made: nn.Module, tasks: Sequence[str], path: str) -> None:
    """Refuse a fused score of one's own whose scores of some rows are not (B,) numbers in [0, 1], before training."""
    levels = torch.linspace(0, 1, 5)  # no draws: nothing else depends on what fuses
    parts = {task: levels.roll(number) for number, task in enumerate(tasks)}
    was_training = made.training
    try:
        scores = made.eval()(parts)
    except Exception as error:
        raise ConfigError(f"fusion.kind: {path} fails on parts of 5 rows ({type(error).__name__}: {error})") from error
    finally:
        made.train(was_training)
    if not isinstance(scores, torch.Tensor) or scores.shape != levels.shape:
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ConfigError(f"fusion.kind: {path} gives {shape} for parts of 5 rows; a fused score gives (5,)")
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ConfigError(f"fusion.kind: {path} gives scores outside of [0, 1]: {scores.tolist()}")


def dense_number(name: str, encoder: FeatureEncoder | None) -> DenseNumber:
    """A dense feature in its own unit.

    Raises:
        ConfigError: there is no encoder to read it by.
    """
    if encoder is None:
        raise ConfigError(f"fusion.numbers: {name!r} is read from the dense features, which needs the encoder")
    column, mean, std = encoder.dense_scale(name)
    transform = next(f.transform for f in encoder.schema.dense_features if f.name == name)
    return DenseNumber(column, mean, std, transform, name)


def item_numbers(
    declared: FusionConfig | None, fitted: FusionConfig | None, encoder: FeatureEncoder | None
) -> dict[str, DenseNumber]:
    """Task -> the number of the item, such as its price, that what its event is worth is multiplied by, wherever
    value@k counts it; see `numbers_named`."""
    return {task: dense_number(name, encoder) for task, name in numbers_named(declared, fitted).items()}


def numbers_named(declared: FusionConfig | None, fitted: FusionConfig | None) -> dict[str, str]:
    """Task -> the dense feature that holds that number: as the expected value says it that the run declares, or else
    the one fitted after training."""
    for config in (declared, fitted):
        if config is not None and config.kind == "expected_value":
            return dict(config.numbers or {})
    return {}


def read_by_gate(
    names: Sequence[str], encoder: FeatureEncoder | None, dims: Mapping[str, int] | None
) -> dict[str, Any]:
    """The pooled embeddings and dense columns of features, as a `ContextGatedMean` takes them.

    Raises:
        ConfigError: there is no encoder, or no widths, to read them by.
    """
    if encoder is None or dims is None:
        raise ConfigError("fusion.features: they are read from the model's inputs, which needs the encoder and dims")
    dense = {feature.name for feature in encoder.schema.dense_features}
    tasks = {task.name.replace(".", "_") for task in encoder.schema.tasks}
    features: dict[str, int] = {}
    for name in names:
        # Where tasks have tables of their own, those shared by all are read.
        keys = [key for key in dims if key.split("@")[0] == name]
        features |= {key: dims[key] for key in keys if key.count("@") < 2 or key.rsplit("@", 1)[1] not in tasks}
    return {"features": features, "dense_columns": [encoder.dense_scale(name)[0] for name in names if name in dense]}


def build_fused_loss(config: FusedLossConfig | None, schema: Schema) -> FusedLoss | None:
    """What the fused score learns from, if it does.

    Args:
        schema: tells the tasks from the columns.
    """
    if config is None:
        return None
    return FusedLoss(
        config.values(schema), weight=config.weight, heads=config.heads, loss=config.loss, missing=config.missing
    )


def is_learned(config: FusionConfig | None) -> bool:
    """Whether training changed the fused score, or may have: a kind that learns, or one of one's own."""
    return config is not None and (config.kind in LEARNED or config.import_path is not None)
