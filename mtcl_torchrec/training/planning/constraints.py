"""What TorchRec's planner may do with each table: what was asked for, what this device can, and what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from mtcl_torchrec.config import ShardingConfig
from mtcl_torchrec.config.sharding import COLUMN_CUTS, ShardingKind
from mtcl_torchrec.modules.sequences import Sequences
from mtcl_torchrec.schema import ConfigError, nearest

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
# What TorchRec (1.8) has for tables that give a row for each value.
SEQUENCE_KINDS: tuple[ShardingKind, ...] = ("table_wise", "row_wise", "column_wise", "data_parallel")
ROW_CUTS = frozenset({"row_wise", "table_row_wise"})
WHY_UNCUT = (
    "since its bags are averaged and a feature is looked up in several tables: TorchRec would average those of other "
    "tables too; take table_wise, or pooling: sum"
)
# The dense one (1.8) takes every list for a bag there: wrong sizes where lists are not of one value, or worse.
WHY_FUSED = (
    "a history looks it up, for which FBGEMM has fused kernels only on a CPU; take table_wise, row_wise or column_wise "
    "with compute_kernels: fused"
)
COLUMN_STEP = 4  # FBGEMM's kernels read four numbers at a time


def table_configs(module: nn.Module) -> dict[str, BaseEmbeddingConfig]:
    """Table name -> its configuration, for all collections of embeddings in a module, sharded or not."""
    found: dict[str, BaseEmbeddingConfig] = {}
    for collection in module.modules():
        if isinstance(collection, EmbeddingBagCollection):
            found |= {config.name: config for config in collection.embedding_bag_configs()}
        elif isinstance(collection, ShardedEmbeddingBagCollection):
            found |= {config.name: config for config in collection._embedding_bag_configs}
        elif isinstance(collection, EmbeddingCollection):
            found |= {config.name: config for config in collection.embedding_configs()}
        elif isinstance(collection, ShardedEmbeddingCollection):
            found |= {config.name: config for config in collection._embedding_configs}
    return found


def sequence_tables(module: nn.Module) -> set[str]:
    """Names of the tables of the EmbeddingCollections in a module."""
    collections = [m for m in module.modules() if isinstance(m, EmbeddingCollection)]
    return {config.name for collection in collections for config in collection.embedding_configs()}


def _usual_lengths(module: nn.Module) -> dict[str, float]:
    """Feature -> how many values a row is taken to have: half of the cap, in a history and beside it."""
    found = [m for m in module.modules() if isinstance(m, Sequences)]
    return {feature: max(1.0, length / 2) for of in found for feature, length in of.lengths.items()}


def table_constraints(
    module: nn.Module,
    sharding: ShardingConfig,
    *,
    device_type: str,
    world_size: int,
    ranks_per_host: int,
    optimizer: TableOptimizer,
) -> dict[str, ParameterConstraints]:
    """What the planner may do with each table.

    Raises:
        ConfigError: a configured table does not exist, or what is asked of it cannot be done, or not be right, on this
            device with this optimizer.
    """
    configs = table_configs(module)
    for name in sharding.tables:
        if name not in configs:
            raise ConfigError(f"sharding.tables: no table {name!r}{nearest(name, configs)}")
    usual = _usual_kinds(device_type, world_size, ranks_per_host, optimizer)
    uncut, sequences, lengths = not_to_cut_by_rows(module), sequence_tables(module), _usual_lengths(module)
    constraints = {}
    for name, config in configs.items():
        own = sharding.tables.get(name)
        kinds, kernels = list(sharding.kinds_of(name)), list(sharding.kernels_of(name)) or ["fused"]
        shown = name.removeprefix("table_")  # as the schema has it, see `table_module_name`
        _refuse(shown, kinds, kernels, device_type, optimizer)
        # The planner knows the dense kernel for data-parallel tables only; `plan_tables` puts it in place of "fused".
        known = ["fused" if kernel == "dense" else kernel for kernel in kernels]
        allowed = list(kinds or usual)
        if name in sequences:
            usable = [k for k in SEQUENCE_KINDS if k != "data_parallel" or device_type != "cpu"]
            if own is not None and own.kinds and not set(own.kinds) & set(SEQUENCE_KINDS):
                raise ConfigError(
                    f"sharding of table {shown!r}: a history looks it up, and TorchRec has no {own.kinds[0]} for that; "
                    f"take {', '.join(usable)}"
                )
            if device_type == "cpu" and ("dense" in kernels or (own is not None and own.kinds == ["data_parallel"])):
                raise ConfigError(f"sharding of table {shown!r}: {WHY_FUSED}")
            allowed = [kind for kind in allowed if kind in usable] or ["table_wise"]
        if device_type == "cpu":
            short = {
                kind: parts
                for kind, parts in (("row_wise", world_size), ("table_row_wise", ranks_per_host))
                if not _every_part_has_rows(config.num_embeddings, parts)
            }
            if own is not None:
                _refuse_empty_shards(shown, config.num_embeddings, own.kinds, short)
            allowed = [kind for kind in allowed if kind not in short] or ["table_wise"]
        if name in uncut:
            if own is not None and own.kinds and set(own.kinds) <= ROW_CUTS:
                raise ConfigError(f"sharding of table {shown!r}: {own.kinds[0]} is not right here, {WHY_UNCUT}")
            allowed = [kind for kind in allowed if kind not in ROW_CUTS] or ["table_wise"]
        constraints[name] = ParameterConstraints(
            sharding_types=allowed,
            compute_kernels=[*known, "dense"],
            min_partition=_min_partition(
                shown, config.embedding_dim, kinds, own.min_partition if own else None, world_size
            ),
            pooling_factors=[
                own.pooling_factor if own and own.pooling_factor else lengths.get(feature, 1.0)
                for feature in config.feature_names
            ],
            cache_params=CacheParams(load_factor=own.cache_load_factor) if own and own.cache_load_factor else None,
        )
    return constraints


def not_to_cut_by_rows(module: nn.Module) -> set[str]:
    """Names of the mean-pooled tables of collections that look a feature up in several tables.

    TorchRec (1.8) averages bags of tables cut by rows after their sums have come together, and finds the lengths by the
    name of the feature: those of one table would be applied to the others too.
    """
    found: set[str] = set()
    for ebc in (m for m in module.modules() if isinstance(m, EmbeddingBagCollection)):
        configs = ebc.embedding_bag_configs()
        features = [feature for config in configs for feature in config.feature_names]
        if len(set(features)) < len(features):
            found |= {config.name for config in configs if config.pooling == PoolingType.MEAN}
    return found


def _every_part_has_rows(rows: int, parts: int) -> bool:
    """Whether no part is empty when a table's rows are cut as TorchRec does: all parts but the last are equally large.

    Example:
        >>> _every_part_has_rows(9, 4), _every_part_has_rows(8, 4)  # 3, 3, 3, 0 and 2, 2, 2, 2
        (False, True)
    """
    return -(-rows // parts) * (parts - 1) < rows


def _refuse_empty_shards(name: str, rows: int, kinds: Sequence[ShardingKind], short: Mapping[str, int]) -> None:
    """FBGEMM's backward pass on CPU (1.8) updates other tables wrongly, or crashes, where a shard has no rows."""
    for kind in kinds:
        if kind in short:
            raise ConfigError(
                f"sharding of table {name!r}: cut {kind}, its {rows} rows would leave some of {short[kind]} ranks "
                "without any, which is not right on a CPU; take table_wise"
            )


def _usual_kinds(device_type: str, world_size: int, ranks_per_host: int, optimizer: TableOptimizer) -> list[str]:
    """What a table may take where nothing is said."""
    if world_size == 1:
        return ["table_wise"]
    kinds = ["table_wise", "row_wise"]
    if optimizer != "rowwise_adagrad":
        kinds.append("column_wise")
    if world_size > ranks_per_host:
        kinds.append("table_row_wise")
    # Data-parallel tables take an ordinary optimizer over all rows: worth it on GPUs, where they save communication.
    if device_type == "cuda" and optimizer != "adam":
        kinds.append("data_parallel")
    return kinds


def _refuse(
    name: str, kinds: Sequence[ShardingKind], kernels: Sequence[str], device_type: str, optimizer: TableOptimizer
) -> None:
    table = f"sharding of table {name!r}"
    uvm = [kernel for kernel in kernels if kernel.startswith("fused_uvm")]
    if uvm and device_type == "cpu":
        raise ConfigError(f"{table}: {uvm[0]} caches host memory on a GPU; on a CPU take fused")
    if uvm == list(kernels) and list(kinds) == ["data_parallel"]:
        raise ConfigError(f"{table}: a data_parallel table has no {uvm[0]} kernel; take table_wise or row_wise")
    if "grid_shard" in kinds:
        # As of TorchRec 1.8: another loss than unsharded tables give (gloo), and wrong sizes where rows do not divide.
        raise ConfigError(f"{table}: TorchRec's grid_shard is not right on {device_type}; take another kind")
    cut = next((kind for kind in kinds if kind in COLUMN_CUTS), None)
    if cut is not None and optimizer == "rowwise_adagrad":
        raise ConfigError(
            f"{table}: {cut} would make row-wise Adagrad another optimizer (one state for each piece of a row); "
            "take adagrad, or another kind"
        )
    if optimizer == "adam" and device_type == "cuda":
        unlike = "data_parallel" if "data_parallel" in kinds else "dense" if "dense" in kernels else None
        if unlike is not None:
            raise ConfigError(
                f"{table}: fused Adam moves the rows of a batch only, Adam over a {unlike} table moves all of them in "
                "every step; take another kind, or adagrad"
            )


def _min_partition(
    name: str, columns: int, kinds: Sequence[ShardingKind], asked: int | None, world_size: int
) -> int | None:
    """Least width of a column-wise shard; None is TorchRec's own.

    Example:
        >>> _min_partition("t", 64, ["column_wise"], None, 2)  # one piece for each rank
        32
        >>> _min_partition("t", 48, ["column_wise"], 28, 2)
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: sharding of table 't': 48 columns have no equal parts of 28 or
        more; a part is a multiple of 4
    """
    widths = [w for w in range(COLUMN_STEP, columns, COLUMN_STEP) if columns % w == 0]
    if asked is not None:
        if asked < columns and not any(w >= asked for w in widths):
            raise ConfigError(
                f"sharding of table {name!r}: {columns} columns have no equal parts of {asked} or more; "
                f"a part is a multiple of {COLUMN_STEP}"
            )
        return asked
    if not kinds or not set(kinds) <= COLUMN_CUTS:
        return None
    return next((w for w in widths if columns // w <= world_size), columns)
