"""How embedding tables are cut over ranks, and what the machines hold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from mtcl_torchrec.config.base import Fraction, Part, as_list

ShardingKind = Literal[
    "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard", "data_parallel"
]
ComputeKernel = Literal["fused", "dense", "fused_uvm", "fused_uvm_caching"]
Wire = Literal["fp32", "fp16", "bf16"]
COLUMN_CUTS = frozenset({"column_wise", "table_column_wise", "grid_shard"})  # a row lies on several ranks

Kinds = Annotated[list[ShardingKind], BeforeValidator(as_list)]
Kernels = Annotated[list[ComputeKernel], BeforeValidator(as_list)]


class TableShardingConfig(Part):
    """What the planner may do with one table.

    Args:
        kinds: sharding types to choose from; empty takes those of the whole run.
        compute_kernels: empty takes those of the whole run.
        cache_load_factor: share of the rows that ``fused_uvm_caching`` keeps on the GPU; TorchRec's default is 0.2.
        pooling_factor: mean number of ids a row has for each of this table's features; it decides the estimated times.
        min_partition: least number of columns of a column-wise shard, which has the smallest number from there on that
            divides the table's and is a multiple of 4.  The default is 128, or, where only cuts by columns are
            allowed, what gives each rank at most one piece.
    """

    kinds: Kinds = Field(default_factory=list)
    compute_kernels: Kernels = Field(default_factory=list)
    cache_load_factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    pooling_factor: PositiveFloat | None = None
    min_partition: PositiveInt | None = None


class CommunicationConfig(Part):
    """Number formats in which pooled embeddings and their gradients travel between ranks (TorchRec's qcomms).

    fp16 has a relative error of 2⁻¹¹ and ends at 65504, bf16 one of 2⁻⁸ and the range of fp32.  Data-parallel tables
    exchange gradients of weights instead, always as fp32.
    """

    forward: Wire = "fp32"
    backward: Wire = "fp32"


class ShardingConfig(Part):
    """How tables are cut.

    Args:
        kinds: sharding types that every table may take; empty leaves it to the planner.  On a CPU, a table with so few
            rows that a row-wise cut would leave a rank without any is cut table-wise instead.
        compute_kernels: ``fused`` keeps a table and its optimizer state in device memory.  ``fused_uvm_caching`` keeps
            it in host memory and caches hot rows on the GPU, ``fused_uvm`` leaves it in host memory altogether; both
            are much slower and so never chosen unless they are named.  ``dense`` takes an ordinary optimizer over all
            rows.  Empty is ``fused``.
        tables: table -> what holds for it alone.
        ranks_per_host: ranks that share a host.  ``torchrun`` tells it to a run that trains, and must agree; an offline
            plan takes 8 where it is left out.
        device_memory_gb: of one device (10⁹ bytes); the default is what the device has.  On a CPU, a rank's share of
            the host.
        host_memory_gb: of one host (10⁹ bytes), divided among its ranks; the default is what the host has.
        reserve: share of the memory that the planner leaves for the allocator, collectives, and, in a run that trains,
            dense parameters, activations and batches.
        communication: number formats on the wire.
    """

    kinds: Kinds = Field(default_factory=list)
    compute_kernels: Kernels = Field(default_factory=list)
    tables: dict[str, TableShardingConfig] = Field(default_factory=dict)
    ranks_per_host: PositiveInt | None = None
    device_memory_gb: PositiveFloat | None = None
    host_memory_gb: PositiveFloat | None = None
    reserve: Fraction = 0.15
    communication: CommunicationConfig = Field(default_factory=CommunicationConfig)

    @model_validator(mode="after")
    def _caches_have_a_kernel(self) -> ShardingConfig:
        for name, table in self.tables.items():
            if table.cache_load_factor is not None and self.kernels_of(name) != ["fused_uvm_caching"]:
                raise ValueError(f"tables.{name}.cache_load_factor belongs to compute_kernels: fused_uvm_caching")
        return self

    def kinds_of(self, table: str) -> list[ShardingKind]:
        """The sharding types that a table may take; empty leaves it to the planner."""
        return (self.tables[table].kinds if table in self.tables else []) or self.kinds

    def kernels_of(self, table: str) -> list[ComputeKernel]:
        """The compute kernels that a table may take; empty is ``fused``."""
        return (self.tables[table].compute_kernels if table in self.tables else []) or self.compute_kernels
