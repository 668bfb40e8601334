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


class TableShardingConfig(Part):
    """What the planner may do with one table.

    Args:
        kinds: sharding types to choose from; empty takes those of the whole run.
        compute_kernels: ``fused_uvm_caching`` keeps the table in host memory and caches hot rows on the GPU,
            ``fused_uvm`` leaves it in host memory altogether; empty leaves it to the planner.
        cache_load_factor: share of the rows that a caching kernel keeps on the GPU.
        pooling_factor: mean number of ids a row has for this table's features; it decides the estimated times.
        min_partition: least number of columns of a column-wise shard.
    """

    kinds: Kinds = Field(default_factory=list)
    compute_kernels: Annotated[list[ComputeKernel], BeforeValidator(as_list)] = Field(default_factory=list)
    cache_load_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    pooling_factor: PositiveFloat | None = None
    min_partition: PositiveInt | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TableShardingConfig:
        if self.cache_load_factor is not None and self.compute_kernels != ["fused_uvm_caching"]:
            raise ValueError("cache_load_factor belongs to compute_kernels: fused_uvm_caching")
        return self


class CommunicationConfig(Part):
    """Number formats in which pooled embeddings and their gradients travel between ranks (TorchRec's qcomms)."""

    forward: Wire = "fp32"
    backward: Wire = "fp32"


class ShardingConfig(Part):
    """How tables are cut.

    Args:
        kinds: sharding types that every table may take; empty leaves it to the planner.
        tables: table -> what holds for it alone.
        ranks_per_host: ranks that share a host; the default is what ``torchrun`` says, or all of them.
        device_memory_gb, host_memory_gb: of one device and, divided among its ranks, of one host (10⁹ bytes); the
            default is TorchRec's figure for the device.
        reserve: share of the device memory that the planner leaves for dense parameters, activations and batches.
        communication: number formats on the wire.
    """

    kinds: Kinds = Field(default_factory=list)
    tables: dict[str, TableShardingConfig] = Field(default_factory=dict)
    ranks_per_host: PositiveInt | None = None
    device_memory_gb: PositiveFloat | None = None
    host_memory_gb: PositiveFloat | None = None
    reserve: Fraction = 0.15
    communication: CommunicationConfig = Field(default_factory=CommunicationConfig)

    def kinds_of(self, table: str) -> list[ShardingKind]:
        """The sharding types that a table may take; empty leaves it to the planner."""
        return (self.tables[table].kinds if table in self.tables else []) or self.kinds
