"""Ranks, devices, and embedding tables cut over them by TorchRec's planner."""

from __future__ import annotations

import gc
import hashlib
import itertools
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import PoolingType

from mtcl_torchrec.config import ShardingConfig
from mtcl_torchrec.config.commands import Device
from mtcl_torchrec.openmp import calm_threads
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.planning.constraints import WHY_UNCUT, TableOptimizer
from mtcl_torchrec.training.planning.hardware import this_hardware
from mtcl_torchrec.training.planning.planner import plan_tables, table_sharders

BLOCK = 4096  # rows that one seeded generator fills
TIMEOUT = timedelta(minutes=30)  # of a collective


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: object) -> list:
        """The value of each rank, on every rank."""
        if self.world_size == 1:
            return [value]
        box: list = [None] * self.world_size
        dist.all_gather_object(box, value)
        return box


_groups = itertools.count()


@cache
def _store(address: str, port: int, world_size: int, serves: bool) -> dist.TCPStore:
    """The store of this process's groups; one for all of them: a store that is opened again on the same port may be
    found by some ranks before the old one is closed, and they wait there for ever."""
    return dist.TCPStore(address, port, world_size, is_master=serves, timeout=TIMEOUT, multi_tenant=True)


def _init_from_environment(backend: str) -> None:
    """Join the process group that ``torchrun`` describes.

    The store keeps the addresses of earlier groups, so each group has a prefix of its own.  On one host, torchrun
    (2.13) gives restarted ranks the store of their predecessors, with the addresses of the dead in it (pytorch issue
    135712), so a restart has a prefix too.  The agents of several hosts count restarts differently: start torchrun with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
    """
    env = os.environ
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    agent_serves = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _store(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, rank == 0 and not agent_serves)
    prefix = f"group_{next(_groups)}"
    if agent_serves and env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
        prefix = f"restart_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}/{prefix}"
    dist.init_process_group(
        backend, timeout=TIMEOUT, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size
    )


@contextmanager
def ranks(device: Device = "auto") -> Iterator[Ranks]:
    """The process group of a run: that of ``torchrun`` where there is one, else of this process alone.

    NCCL on CUDA, gloo otherwise.  A process group that already exists is used and left alone.  Leave the block with
    models, pipelines and optimizers out of scope: gloo's threads may abort the interpreter if tensors outlive the
        group.

    Args:
        device: ``"auto"`` (CUDA where the machine has it), ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this machine, or its build of torch, has none")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    own = not dist.is_initialized()
    if own:
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            _init_from_environment(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(calm_threads())
    if use_cuda:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(target)
    else:
        target = torch.device("cpu")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), target)
        if own:
            gc.collect()
            dist.barrier()
    finally:
        if own:
            dist.destroy_process_group()


def shard(
    module: nn.Module,
    where: Ranks,
    *,
    sharding: ShardingConfig | None = None,
    optimizer: TableOptimizer = "rowwise_adagrad",
    fused_tables: bool = True,
    batch_size: int = 512,
    seed: int = 0,
    init_scale: float | None = None,
    zero_first_row: bool = False,
    zero_tables: Collection[str] = (),
) -> DistributedModelParallel:
    """Cut the module's embedding tables over the ranks and fill them.

    The plan is the result's ``plan``; `plan_as_json` makes plain data of it.

    Args:
        module: holds EmbeddingBagCollections on the meta device.
        sharding: what the planner may do, its tables named as in the model.
        optimizer: of the tables; some kinds of sharding would make another of it, and are not taken.
        fused_tables: False keeps table gradients for an ordinary optimizer (compute kernel "dense").
        batch_size: rows a step and rank, from which the planner estimates times and buffers.
        seed, init_scale, zero_first_row, zero_tables: of `fill_tables`.

    Raises:
        ConfigError: the tables fit nowhere, or what is configured cannot be done; the same on every rank.
    """
    sharding = sharding or ShardingConfig()
    plan = _agreed_plan(module, where, sharding, optimizer, fused_tables, batch_size)
    model = DistributedModelParallel(
        module,
        env=ShardingEnv(where.world_size, where.rank, dist.group.WORLD, output_dtensor=True),
        device=where.device,
        plan=plan,
        sharders=table_sharders(sharding),
    )
    correct_mean_pooling(model)
    fill_tables(model, seed=seed, scale=init_scale, zero_first_row=zero_first_row, zero_tables=zero_tables)
    return model


def _agreed_plan(
    module: nn.Module,
    where: Ranks,
    sharding: ShardingConfig,
    optimizer: TableOptimizer,
    fused_tables: bool,
    batch_size: int,
) -> ShardingPlan:
    """Rank 0's plan on every rank, or its error: a rank that waited for a plan would wait for ever."""
    plan, mistake = None, ""
    if where.first:
        try:
            plan = plan_tables(
                module,
                sharding,
                this_hardware(where.device),
                world_size=where.world_size,
                ranks_per_host=ranks_per_host(where, sharding),
                optimizer=optimizer,
                fused=fused_tables,
                batch_size=batch_size,
            )
        except ConfigError as error:
            mistake = str(error)
        except Exception as error:  # whatever the planner meets
            mistake = f"the embedding tables cannot be planned: {type(error).__name__}: {error}"
    plan, mistake = where.broadcast((plan, mistake))  # type: ignore[misc]
    if plan is None:
        raise ConfigError(mistake)
    return plan


def ranks_per_host(where: Ranks, sharding: ShardingConfig) -> int:
    """How many ranks share a host, as ``torchrun`` says.

    Raises:
        ConfigError: the configuration says otherwise.
    """
    # TorchRec makes its process groups within and between hosts from the same figure.
    actual = get_local_size(where.world_size) if where.world_size > 1 else 1
    if sharding.ranks_per_host is not None and min(sharding.ranks_per_host, where.world_size) != actual:
        raise ConfigError(
            f"sharding.ranks_per_host is {sharding.ranks_per_host}, but {actual} of {where.world_size} ranks run on "
            "each host; correct it, or leave it out"
        )
    return actual


def correct_mean_pooling(model: nn.Module) -> None:
    """Mend a sharded model in which TorchRec (1.8) would divide some pooled embeddings by the length of their bags.

    It averages the bags of tables cut by rows after their sums have come together, and divides the features of all
    other tables of the collection on the way, summed ones and those that were averaged already.

    Raises:
        ConfigError: a mean-pooled table is cut by rows in a collection that looks a feature up in several tables, which
            cannot be mended.
    """
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            cut_by_rows = module._pooling_type_to_rs_features
            if PoolingType.MEAN.value in cut_by_rows:
                features = [feature for table in module._embedding_bag_configs for feature in table.feature_names]
                if len(set(features)) < len(features):
                    table = next(
                        table.name
                        for table in module._embedding_bag_configs
                        if set(table.feature_names) & set(cut_by_rows[PoolingType.MEAN.value])
                    )
                    raise ConfigError(f"table {table!r} is not to be cut by rows, {WHY_UNCUT}")
                known = {feature for features in cut_by_rows.values() for feature in features}
                of_others = [
                    f for table in module._embedding_bag_configs for f in table.feature_names if f not in known
                ]
                cut_by_rows[PoolingType.SUM.value].extend(of_others)  # these are divided by 1


def local_shards(value: torch.Tensor) -> list[tuple[torch.Tensor, int, int]]:
    """A table's shards on this rank, each with its first row and first column in the whole table."""
    if isinstance(value, DTensor):
        local: Any = value.to_local()
        # A rank without a shard still has an offset.
        return [(t, o[0], o[1]) for t, o in zip(local.local_shards(), local.local_offsets(), strict=False)]
    if hasattr(value, "local_shards"):
        return [(s.tensor, *s.metadata.shard_offsets) for s in value.local_shards()]
    return [(value, 0, 0)]


def is_table(name: str) -> bool:
    """Whether a parameter of that fully qualified name is an embedding table."""
    return ".embedding_bags." in name or ("embedding_collections." in name and ".embeddings." in name)


def tables_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Fully qualified name -> weight (plain, ShardedTensor or DTensor) of every embedding table."""
    return {name: value for name, value in model.state_dict().items() if is_table(name)}


@torch.no_grad()
def fill_tables(
    model: nn.Module,
    *,
    seed: int = 0,
    scale: float | None = None,
    zero_first_row: bool = False,
    zero_tables: Collection[str] = (),
) -> None:
    """Uniform random rows in ±scale that depend on seed, table and row alone, not on the plan or the number of ranks.

    Args:
        scale: None takes 1/√rows, TorchRec's own default.
        zero_first_row: row 0 starts at zero.  Where it stands for "unknown" and training never meets one, it stays what
            the model sees of a feature that is left out.
        zero_tables: names of tables that start at zero altogether, since what was never trained of them is to add
            nothing.
    """
    for name, value in tables_of(model).items():
        table, (rows, dim) = name.split(".")[-2], value.shape
        bound = scale if scale is not None else rows**-0.5
        if table in zero_tables:
            for tensor, _, _ in local_shards(value):
                tensor.zero_()
            continue
        for tensor, row0, col0 in local_shards(value):
            if tensor.numel() == 0:
                continue
            end = row0 + tensor.shape[0]
            for block in range(row0 // BLOCK, (end - 1) // BLOCK + 1):
                digest = hashlib.blake2b(f"{seed}/{table}/{block}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
                full = torch.empty(BLOCK, dim).uniform_(-bound, bound, generator=generator)
                low, high = max(row0, block * BLOCK), min(end, (block + 1) * BLOCK)
                part = full[low - block * BLOCK : high - block * BLOCK, col0 : col0 + tensor.shape[1]]
                tensor[low - row0 : high - row0].copy_(part)
            if zero_first_row and row0 == 0:
                tensor[0] = 0.0
