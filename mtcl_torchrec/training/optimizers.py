"""The two optimizers of a TorchRec model: one fused into backward for sharded tables, an ordinary one for the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mtcl_torchrec.config import DenseOptimizerConfig, TableOptimizerConfig

_TABLE_CLASSES: dict[str, Any] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}

_UNDECAYED = {"bias", "biases", "scales", "shifts"}  # parts of names


def is_fused(config: TableOptimizerConfig, device: torch.device) -> bool:
    """Whether FBGEMM has this optimizer fused into backward on this device (Adam: on CUDA only)."""
    return config.kind != "adam" or device.type == "cuda"


def _table_options(config: TableOptimizerConfig, table: str) -> dict[str, float]:
    """A fresh dict each time: sharding writes into it."""
    lr = config.lr_of.get(table, config.lr)
    return {"lr": lr} if config.kind == "sgd" else {"lr": lr, "eps": config.eps}


def fuse_table_optimizer(module: nn.Module, config: TableOptimizerConfig) -> None:
    """Mark every table's optimizer to run inside backward.  Call before sharding."""
    for ebc in module.modules():
        if isinstance(ebc, EmbeddingBagCollection):
            for table, bag in ebc.embedding_bags.items():
                options = _table_options(config, table)
                apply_optimizer_in_backward(_TABLE_CLASSES[config.kind], list(bag.parameters()), options)


def build_optimizer(
    model: DistributedModelParallel, tables: TableOptimizerConfig, dense: DenseOptimizerConfig
) -> CombinedOptimizer:
    """One optimizer over everything, for TorchRec's pipelines: fused tables, unfused tables, dense parameters.

    A table that was sharded data-parallel, or whose optimizer has no fused kernel on this device, gets the same
    optimizer unfused; without that it would never move.

    Args:
        model: sharded, with `fuse_table_optimizer` applied before.
    """
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    unfused = {n: p for n, p in rest.items() if ".embedding_bags." in n and p.numel() > 0}
    others = {n: p for n, p in rest.items() if ".embedding_bags." not in n}
    parts: list[tuple[str, KeyedOptimizer]] = []
    if model.fused_optimizer.params:
        parts.append(("fused_tables", model.fused_optimizer))
    if unfused:
        table_class = _TABLE_CLASSES[tables.kind]
        groups = [{"params": [p], **_table_options(tables, n.split(".")[-2])} for n, p in unfused.items()]
        parts.append(("tables", KeyedOptimizerWrapper(unfused, lambda _: table_class(groups))))
    dense_class: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[dense.kind]
    options: dict[str, Any] = {"lr": dense.lr} if dense.kind == "sgd" else {"lr": dense.lr, "betas": dense.betas}
    decaying = [p for n, p in others.items() if not _UNDECAYED & set(n.split("."))]
    lasting = [p for n, p in others.items() if _UNDECAYED & set(n.split("."))]
    dense_groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decaying, dense.weight_decay), (lasting, 0.0))
        if params
    ]
    ordinary: KeyedOptimizer = KeyedOptimizerWrapper(others, lambda _: dense_class(dense_groups, **options))
    if dense.clip_norm > 0:
        ordinary = GradientClippingOptimizer(ordinary, GradientClipping.NORM, max_gradient=dense.clip_norm)
    parts.append(("dense", ordinary))
    return CombinedOptimizer(parts)


def lr_factor(step: int, warmup_steps: int, total_steps: int, decay: str) -> float:
    """What every learning rate is multiplied with in a step: a linear rise, then the decay to 0 at `total_steps`.

    Args:
        step: counted from 0.
        warmup_steps: the factor is 1 after this many steps; at most half of `total_steps`.
        decay: ``"none"``, ``"linear"`` or ``"cosine"``.

    Example:
        >>> [round(lr_factor(s, 2, 6, "linear"), 2) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup_steps = min(warmup_steps, total_steps // 2)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if decay == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if decay == "cosine" else 1.0


def build_schedule(optimizer: CombinedOptimizer, warmup_steps: int, total_steps: int, decay: str) -> LambdaLR:
    """The schedule of all learning rates; call its ``step()`` after each step of the pipeline."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, warmup_steps, total_steps, decay))
