"""Between a configuration and TorchRec's planner: what each table may do, what a rank holds, and the plan as data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torchrec.optim
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Storage
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from mtcl_torchrec.config import ShardingConfig
from mtcl_torchrec.config.sharding import COLUMN_CUTS, ComputeKernel, ShardingKind
from mtcl_torchrec.modules.sequences import Sequences
from mtcl_torchrec.schema import ConfigError, nearest
from mtcl_torchrec.training.planning.hardware import GB, Hardware, configured

TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
MIN_COLUMNS = 128  # TorchRec's least width of a column-wise shard
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


def state_numbers(table: torch.Tensor) -> int:
    """Numbers of state that the optimizer which `fuse_table_optimizer` gave a table keeps for each weight; 0 for
    row-wise Adagrad, which keeps one a row."""
    kept = {torchrec.optim.Adagrad: 1, torchrec.optim.Adam: 2}
    return kept.get(getattr(table, "_optimizer_classes", [None])[0], 0)


class TableSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, with every sharding type on a CPU too: gloo has the collectives that they need."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types the planner may choose from."""
        return list(get_args(ShardingKind))


class SequenceTableSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder of embedding collections, in which histories are looked up."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types the planner may choose from."""
        return list(SEQUENCE_KINDS)


Sharders = list[TableSharder | SequenceTableSharder]


def table_sharders(sharding: ShardingConfig) -> Sharders:
    """The sharders of a configuration, which carry the number formats on the wire."""
    wire = sharding.communication
    formats = {"fp32": CommType.FP32, "fp16": CommType.FP16, "bf16": CommType.BF16}
    qcomms = QCommsConfig(forward_precision=formats[wire.forward], backward_precision=formats[wire.backward])
    # On a CPU, TorchRec would take fp16 in place of bf16, which gloo once lacked.
    registry = get_qcomm_codecs_registry(qcomms, device=torch.device("cuda"))
    return [TableSharder(qcomm_codecs_registry=registry), SequenceTableSharder(qcomm_codecs_registry=registry)]


def table_configs(module: nn.Module) -> dict[str, BaseEmbeddingConfig]:
    """Table name -> its configuration, for all EmbeddingBagCollections and EmbeddingCollections in a module."""
    found: dict[str, BaseEmbeddingConfig] = {}
    for collection in module.modules():
        if isinstance(collection, EmbeddingBagCollection):
            found |= {config.name: config for config in collection.embedding_bag_configs()}
        elif isinstance(collection, EmbeddingCollection):
            found |= {config.name: config for config in collection.embedding_configs()}
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
            if own is not None and own.kinds and not set(own.kinds) & set(SEQUENCE_KINDS):
                raise ConfigError(
                    f"sharding of table {shown!r}: a history looks it up, and TorchRec has no {own.kinds[0]} for that; "
                    f"take {', '.join(SEQUENCE_KINDS)}"
                )
            if device_type == "cpu" and ("dense" in kernels or (own is not None and own.kinds == ["data_parallel"])):
                raise ConfigError(f"sharding of table {shown!r}: {WHY_FUSED}")
            usable = [k for k in SEQUENCE_KINDS if k != "data_parallel" or device_type != "cpu"]
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


def topology(
    hardware: Hardware, world_size: int, ranks_per_host: int, *, reserve: float = 0.0, taken_gb: float = 0.0
) -> Topology:
    """The cluster as the planner sees it: what is left of each rank's memory, and how fast things move.

    Args:
        reserve: share of each memory that is left free.
        taken_gb: of each rank's memory, for what is no table.

    Raises:
        ConfigError: the ranks do not fill their hosts, or nothing is left.
    """
    if world_size % ranks_per_host:
        raise ConfigError(f"{world_size} ranks do not fill hosts of {ranks_per_host}; take a multiple")
    on_gpu = hardware.kind == "cuda"
    device = hardware.memory_gb * (1 - reserve) - taken_gb
    host = hardware.host_memory_gb / ranks_per_host * (1 - reserve) - (0 if on_gpu else taken_gb)
    if min(device if on_gpu else host, host) <= 0:
        raise ConfigError(
            f"no memory is left for tables: of {hardware.memory_gb if on_gpu else hardware.host_memory_gb:g} GB, "
            f"{reserve:.0%} are reserved and {taken_gb:.1f} GB taken by the rest of the model"
        )
    per_ms = GB / 1000  # TorchRec counts bytes per millisecond
    with quiet_planner():
        return Topology(
            world_size=world_size,
            compute_device=hardware.kind,
            local_world_size=ranks_per_host,
            hbm_cap=int(device * GB) if on_gpu else 0,
            ddr_cap=int(host * GB),
            hbm_mem_bw=hardware.memory_gb_s * per_ms,
            ddr_mem_bw=hardware.host_memory_gb_s * per_ms,
            hbm_to_ddr_mem_bw=hardware.host_link_gb_s * per_ms,
            intra_host_bw=hardware.intra_host_gb_s * per_ms,
            inter_host_bw=hardware.inter_host_gb_s * per_ms,
        )


@contextmanager
def quiet_planner() -> Iterator[None]:
    """TorchRec's planner warns of a topology that is given by hand, as documented."""
    logger = logging.getLogger("torchrec.distributed.planner")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


class TableStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimate, and what it leaves out.

    A table whose optimizer is not fused into backward has a gradient as large as itself; a data-parallel one is held
    once more in the buckets of its exchange.  FBGEMM keeps element-wise optimizer state as fp32, also that of an fp16
    table.
    """

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **options: Any) -> None:
        """Set the storage of each shard."""
        super().estimate(sharding_options, *args, **options)
        for option in sharding_options:
            table, kernel = option.tensor, option.compute_kernel
            narrow = 4 - table.element_size()
            per_number = 2 * table.element_size() if kernel == "dense" else narrow * state_numbers(table)
            on_device = self._topology.compute_device != "cpu" and kernel in ("dense", "fused")
            for shard in option.shards:
                extra = shard.size[0] * shard.size[1] * per_number
                shard.storage += Storage(hbm=extra if on_device else 0, ddr=0 if on_device else extra)


class OrderedEnumerator(EmbeddingEnumerator):
    """TorchRec's enumerator, which goes through sets of strings: equally good plans would differ from one process to
    the next, and with them the last bits of a run that is resumed."""

    def enumerate(self, module: nn.Module, sharders: list[Any]) -> list[ShardingOption]:
        """Every way to cut every table, table by table, kinds and kernels in the order in which they are declared."""
        options = super().enumerate(module, sharders)
        kinds, kernels = get_args(ShardingKind), get_args(ComputeKernel)
        tables = list(dict.fromkeys(option.fqn for option in options))
        return sorted(
            options,
            key=lambda o: (tables.index(o.fqn), kinds.index(o.sharding_type), kernels.index(o.compute_kernel)),
        )


@dataclass(frozen=True)
class Search:
    """TorchRec's planner over a cluster, with all that it may choose from.

    Args:
        cluster: with its reserve taken off already.
        constraints: of each table.
        batch_size: rows a step and rank.
        timeout_s: no further proposal is tried after this many seconds.
    """

    cluster: Topology
    constraints: dict[str, ParameterConstraints]
    batch_size: int
    timeout_s: float | None = None

    def options(self, module: nn.Module, sharders: Sharders) -> list[ShardingOption]:
        """Every way to cut every table, with estimates."""
        return self._enumerator().enumerate(module, sharders)

    def best(self, module: nn.Module, sharders: Sharders) -> tuple[ShardingPlan, list[ShardingOption]]:
        """The plan of the least estimated time, also with its estimates.

        Raises:
            PlannerError: no plan fits.
        """
        chosen: list[ShardingOption] = []

        def keep(options: list[ShardingOption]) -> list[ShardingOption]:
            chosen.extend(options)
            return options

        planner = EmbeddingShardingPlanner(
            topology=self.cluster,
            batch_size=self.batch_size,
            enumerator=self._enumerator(),
            storage_reservation=FixedPercentageStorageReservation(0.0),
            constraints=self.constraints,
            debug=False,
            callbacks=[keep],
            timeout_seconds=None if self.timeout_s is None else max(1, round(self.timeout_s)),
        )
        return planner.plan(module, sharders), chosen

    def _enumerator(self) -> OrderedEnumerator:
        estimators = [
            EmbeddingPerfEstimator(topology=self.cluster, constraints=self.constraints),
            TableStorageEstimator(topology=self.cluster, constraints=self.constraints),
        ]
        return OrderedEnumerator(self.cluster, self.batch_size, self.constraints, estimator=estimators)


def plan_tables(
    module: nn.Module,
    sharding: ShardingConfig,
    hardware: Hardware,
    *,
    world_size: int,
    ranks_per_host: int,
    optimizer: TableOptimizer,
    fused: bool,
    batch_size: int,
) -> ShardingPlan:
    """Where each table of a module goes.

    Args:
        module: holds EmbeddingBagCollections, also ones on the meta device.
        fused: False gives every table an ordinary optimizer (compute kernel "dense").

    Raises:
        ConfigError: the tables fit nowhere, or what is configured cannot be done.
    """
    constraints = table_constraints(
        module, sharding, device_type=hardware.kind, world_size=world_size, ranks_per_host=ranks_per_host,
        optimizer=optimizer,
    )  # fmt: skip
    cluster = topology(configured(hardware, sharding), world_size, ranks_per_host, reserve=sharding.reserve)
    try:
        with quiet_planner():
            plan, _ = Search(cluster, constraints, batch_size).best(module, table_sharders(sharding))
    except PlannerError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"the embedding tables fit on no plan for {world_size} ranks: {reason}") from None
    complete(plan, sharding, fused=fused)
    return plan


def complete(plan: ShardingPlan, sharding: ShardingConfig, *, fused: bool) -> None:
    """Put into the plan what the planner cannot say."""
    for tables in plan.plan.values():
        for name, parameter in tables.items():
            # The planner offers the unfused kernel to data-parallel tables only.
            kernels = sharding.kernels_of(name)
            asked = "dense" in kernels and "fused" not in kernels and parameter.compute_kernel == "fused"
            if not fused or asked:
                parameter.compute_kernel = EmbeddingComputeKernel.DENSE.value
            # Once its pieces have their places within one host, this is column-wise sharding, and TorchRec's DTensors
            # (as of 1.8) know it by that name only.
            if parameter.sharding_type == "table_column_wise":
                parameter.sharding_type = "column_wise"


def plan_as_json(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """The plan as plain data: table -> ``module``, ``kind``, ``kernel`` and ``shards``.

    Each shard has its ``rank``, its first ``row`` and ``column`` in the table, and how many ``rows`` and ``columns`` it
    holds; a data-parallel table, which lies on every rank as a whole, has ``ranks`` instead.

    Args:
        plan: of `DistributedModelParallel`, as its ``plan``.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, tables in plan.plan.items():
        for name, parameter in tables.items():
            about = {"module": path, "kind": parameter.sharding_type, "kernel": parameter.compute_kernel}
            if parameter.sharding_spec is None:
                about["ranks"] = list(parameter.ranks)
            else:
                about["shards"] = [
                    {
                        "rank": shard.placement.rank(),
                        "row": shard.shard_offsets[0],
                        "column": shard.shard_offsets[1],
                        "rows": shard.shard_sizes[0],
                        "columns": shard.shard_sizes[1],
                    }
                    for shard in parameter.sharding_spec.shards
                ]
            found[name if name not in found else f"{path}.{name}"] = about
    return found
