"""The two optimizers of a TorchRec model: one fused into backward for sharded tables, an ordinary one for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torchrec.optim
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding, BatchedDenseEmbeddingBag
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.mc_embeddingbag import ShardedManagedCollisionEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mtcl_torchrec.config import DenseOptimizerConfig, TableOptimizerConfig
from mtcl_torchrec.modules.balance.weighting import LossWeighting
from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.modules.regularisers import is_weight
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.planning.constraints import sequence_tables, table_configs
from mtcl_torchrec.training.sharding import is_table

# What TorchRec fuses into backward.  Its own classes for SGD and the like stand for FBGEMM's and take its options.
_FUSED_CLASSES: dict[str, Any] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torchrec.optim.Adagrad,
    "sgd": torchrec.optim.SGD,
    "adam": torchrec.optim.Adam,
}
_UNFUSED_CLASSES: dict[str, Any] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}
_DENSE_CLASSES: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def is_fused(config: TableOptimizerConfig, device: torch.device) -> bool:
    """Whether FBGEMM has this optimizer fused into backward on this device (Adam: on CUDA only)."""
    return config.kind != "adam" or device.type == "cuda"


def _table_options(config: TableOptimizerConfig, table: str) -> dict[str, Any]:
    """A fresh dict each time: sharding writes into it."""
    lr = config.lr_of.get(table, config.lr)
    return {"lr": lr} if config.kind == "sgd" else {"lr": lr, "eps": config.eps}


def check_tables(module: nn.Module, config: TableOptimizerConfig, device: torch.device) -> None:
    """Make sure that every table can be trained; `build_optimizer` does so too, but after sharding.

    Args:
        module: with its tables sharded or not.
        device: on which it is trained.

    Raises:
        ConfigError: a bf16 table on the CPU, for which FBGEMM has no kernel; a table of fp16 or bf16 with an optimizer
            that is not fused there, whose gradients and state would be as short (Adagrad's eps is 0 in fp16); row-wise
            Adagrad under managed collision on the CPU, where FBGEMM cannot reset the state of an evicted row; Adam on
            the CPU for a table that a history looks up.
    """
    for table, of in table_configs(module).items():
        if of.data_type == DataType.BF16 and device.type == "cpu":
            raise ConfigError(f"table {table!r}: bf16 has no kernel on the CPU; use fp16 or fp32, or train on CUDA")
        if of.data_type != DataType.FP32 and not is_fused(config, device):
            raise ConfigError(
                f"table {table!r}: {of.data_type.value.lower()} needs an optimizer fused into backward, and "
                f"{config.kind} has none on {device.type}; use fp32, or another kind"
            )
    if device.type == "cpu" and not is_fused(config, device):
        for table in sorted(sequence_tables(module)):
            raise ConfigError(
                f"table {table.removeprefix('table_')!r}: a history looks it up, for which {config.kind} has no kernel "
                "on the CPU; use rowwise_adagrad, adagrad or sgd, or train on CUDA"
            )
    managed = (ManagedCollisionEmbeddingBagCollection, ShardedManagedCollisionEmbeddingBagCollection)
    if device.type == "cpu" and config.kind == "rowwise_adagrad":
        for table in (t for m in module.modules() if isinstance(m, managed) for t in table_configs(m)):
            raise ConfigError(
                f"table {table!r}: under managed collision, rowwise_adagrad cannot reset an evicted row on the CPU; "
                "use adagrad or sgd, or train on CUDA"
            )


def fuse_table_optimizer(module: nn.Module, config: TableOptimizerConfig) -> None:
    """Mark every table's optimizer to run inside backward.  Call before sharding.

    With `max_gradient`, the kernel cuts each number of the gradient of a *pooled* embedding (that of the mean loss over
    the global batch) to ± that, before it is added up over the rows of a batch that look up the same id; in a history,
    of the embedding of each position.

    Args:
        module: holds EmbeddingBagCollections and EmbeddingCollections; one inside a
            ManagedCollisionEmbeddingBagCollection is found too.
    """
    clipping = {"gradient_clipping": True, "max_gradient": config.max_gradient} if config.max_gradient else {}
    for collection in module.modules():
        if not isinstance(collection, (EmbeddingBagCollection, EmbeddingCollection)):
            continue
        bags = isinstance(collection, EmbeddingBagCollection)
        for table, rows in (collection.embedding_bags if bags else collection.embeddings).items():
            options = {**_table_options(config, table), **clipping}
            apply_optimizer_in_backward(_FUSED_CLASSES[config.kind], list(rows.parameters()), options)


def build_optimizer(
    model: DistributedModelParallel, tables: TableOptimizerConfig, dense: DenseOptimizerConfig
) -> CombinedOptimizer:
    """One optimizer over everything, for TorchRec's pipelines: fused tables, unfused tables, dense parameters.

    A table that was sharded data-parallel, or whose optimizer has no fused kernel on this device, gets the same
    optimizer unfused; without that it would never move.

    A step whose loss is not finite is left out, state included, wherever torch's fused optimizers offer that; elsewhere
    (Adagrad, SGD) the zero gradient that `MTCLTrain` gives to tables then changes no weight and no sum of squares.

    Args:
        model: sharded, with `fuse_table_optimizer` applied before.

    Raises:
        ConfigError: see `check_tables`; or a table of fewer than 32 bits that was cut data-parallel.
    """
    check_tables(model, tables, torch.device(model.device))
    loss = next((m for m in model.modules() if isinstance(m, MultiTaskLoss)), None)
    found_inf = None if loss is None else loss.found_inf
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    unfused = {n: p for n, p in rest.items() if is_table(n) and p.numel() > 0}
    others = {n: p for n, p in rest.items() if not is_table(n)}
    parts: list[tuple[str, KeyedOptimizer]] = []
    if model.fused_optimizer.params:
        parts.append(("fused_tables", model.fused_optimizer))
    if unfused:
        parts.append(("tables", _unfused_table_optimizer(unfused, tables, found_inf)))
    if tables.max_gradient:
        _clip_unfused_gradients(model, tables.max_gradient)
    parts.append(("dense", _dense_optimizer(others, dense, found_inf, None if loss is None else loss.weighting)))
    return CombinedOptimizer(parts)


def _unfused_table_optimizer(
    tables: dict[str, nn.Parameter], config: TableOptimizerConfig, found_inf: torch.Tensor | None
) -> KeyedOptimizer:
    for name, parameter in tables.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"table {name.split('.')[-2]!r}: {str(parameter.dtype).removeprefix('torch.')} needs an optimizer "
                "fused into backward, and a table that is cut data_parallel has none; use fp32, or another sharding"
            )
    groups = [{"params": [p], **_table_options(config, n.split(".")[-2])} for n, p in tables.items()]
    # Adam alone moves on at a zero gradient, so Adam alone must be able to leave a step out.
    options = {"fused": True} if config.kind == "adam" else {}
    optimizer = _UNFUSED_CLASSES[config.kind](groups, **options)
    optimizer.found_inf = found_inf if options else None
    return KeyedOptimizerWrapper(tables, lambda _: optimizer)


def _dense_optimizer(
    parameters: dict[str, nn.Parameter],
    config: DenseOptimizerConfig,
    found_inf: torch.Tensor | None,
    weighting: LossWeighting | None,
) -> KeyedOptimizer:
    of_weighting = {id(p) for p in weighting.parameters()} if weighting is not None else set()
    of_model = {n: p for n, p in parameters.items() if id(p) not in of_weighting}
    decaying = [p for n, p in of_model.items() if is_weight(n)]
    lasting = [p for n, p in of_model.items() if not is_weight(n)]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decaying, config.weight_decay), (lasting, 0.0))
        if params
    ]
    if weighting is not None and of_weighting:
        own = [p for p in parameters.values() if id(p) in of_weighting]
        groups.append({"params": own, "weight_decay": 0.0, "lr": weighting.lr or config.lr})
    options: dict[str, Any] = {"lr": config.lr} if config.kind == "sgd" else {"lr": config.lr, "betas": config.betas}
    optimizer = _DENSE_CLASSES[config.kind](groups, fused=True, **options)
    # Gradients of a batch that is skipped may be NaN, and stay so when they are clipped; nothing reads them then.
    optimizer.found_inf = found_inf
    keyed: KeyedOptimizer = KeyedOptimizerWrapper(parameters, lambda _: optimizer)
    if config.clip_norm > 0:
        keyed = GradientClippingOptimizer(keyed, GradientClipping.NORM, max_gradient=config.clip_norm)
    return keyed


def _clip_unfused_gradients(model: nn.Module, max_gradient: float) -> None:
    """Cut the gradients of pooled embeddings of unfused tables exactly where FBGEMM's fused kernels do."""
    for collection in model.modules():
        if not isinstance(collection, (ShardedEmbeddingBagCollection, ShardedEmbeddingCollection)):
            continue
        for lookup in collection._lookups:
            # A data-parallel table's gradient is divided by the number of ranks only later, by DDP.
            ranks = dist.get_world_size(lookup.process_group) if isinstance(lookup, DistributedDataParallel) else 1
            for module in lookup.modules():
                if isinstance(module, (BatchedDenseEmbeddingBag, BatchedDenseEmbedding)):
                    module.register_forward_hook(_clipping_hook(max_gradient * ranks))


def _clipping_hook(limit: float) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    def hook(_module: nn.Module, _features: Any, pooled: torch.Tensor) -> None:
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient.clamp(-limit, limit))

    return hook


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
