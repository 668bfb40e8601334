"""Between a configuration and TorchRec's planner: its sharders, what a rank holds, the search, and the plan as data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

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
from torchrec.distributed.types import ShardingPlan

from mtcl_torchrec.config import ShardingConfig
from mtcl_torchrec.config.sharding import ComputeKernel, ShardingKind
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.planning.constraints import SEQUENCE_KINDS, TableOptimizer, table_constraints
from mtcl_torchrec.training.planning.hardware import GB, Hardware, configured


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
