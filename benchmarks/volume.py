"""How many bytes a training step sends from rank to rank: counted as it runs, and by formula from the sharding plan.

`Traffic` counts what collectives are given, `by_formula` says what they must be given; a test holds them against each
other.  Both count bytes that leave a rank for another, of all ranks together, in one step, as the least that a
collective can do with: an all-reduce of S bytes on n ranks is a ring's, 2 (n - 1) S.  What a transport adds (headers,
other algorithms) is not in it.  The parts:

- ``ids``: ids and their lengths to the ranks that hold the rows;
- ``pooled embeddings``: back to the ranks of the batch;
- ``gradients of embeddings``: the same way again;
- ``dense gradients``: the all-reduce of everything that each rank has a copy of, data-parallel tables included;
- ``other``: numbers that ranks agree on, such as how many labels are present.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.model_parallel import DistributedModelParallel

from mtcl_torchrec.training.planning.constraints import table_configs

PARTS = ("ids", "pooled embeddings", "gradients of embeddings", "dense gradients", "other")
FLOAT, ID = 4, 8  # bytes


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends while the block runs, by part; collectives of the world alone.

    It sees torch.distributed's operators below autograd, those of DDP's C++ reducer too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func.name().split("::")[1].split(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        ranks, me = dist.get_world_size(), dist.get_rank()
        backward = torch._C._current_graph_task_id() != -1
        if name == "allreduce":
            given = args[0]
            sent = sum(2 * (ranks - 1) / ranks * t.nbytes for t in given)
            part = "dense gradients" if backward else "other"
        elif name == "alltoall_base":
            given, splits = [args[1]], list(args[4])
            whole = args[1].nbytes
            rows = max(sum(splits), 1)
            sent = whole * (1 - splits[me] / rows) if splits else whole * (ranks - 1) / ranks
            part = "gradients of embeddings" if backward else "pooled embeddings"
        elif name in ("alltoall", "reduce_scatter", "allgather"):
            given = _flat(args[1])
            to_others = [t for i, t in enumerate(given) if i != me] if name != "allgather" else given * (ranks - 1)
            sent = sum(t.nbytes for t in to_others)
            part = "gradients of embeddings" if backward else "pooled embeddings"
        elif name in ("reduce_scatter_base", "allgather_base"):
            given = [args[1]]
            sent = args[1].nbytes * ((ranks - 1) / ranks if name == "reduce_scatter_base" else ranks - 1)
            part = "gradients of embeddings" if backward else "pooled embeddings"
        elif name == "broadcast":
            given, part = list(args[0]), "other"
            sent = (ranks - 1) / ranks * sum(t.nbytes for t in given)  # the root's, shared out
        elif name == "barrier":
            return
        else:
            raise NotImplementedError(f"the collective {name} is not counted yet")
        if given and not given[0].is_floating_point() and part != "other":
            part = "ids"
        self.bytes[part] += sent


def _flat(of: Any) -> list[torch.Tensor]:
    return [of] if isinstance(of, torch.Tensor) else [t for part in of for t in _flat(part)]


# ---------------------------------------------------------------------- by formula


@dataclass(frozen=True)
class Placed:
    """A table and how it is cut.

    Args:
        kind: of sharding, as TorchRec names it.
        features: that look it up.
        values: ids of a row, mean over rows, of all its features together.
    """

    kind: str
    rows: int
    dim: int
    features: int = 1
    values: float = 1.0


def placed(model: DistributedModelParallel, values: Mapping[str, float] | None = None) -> list[Placed]:
    """The pooled tables of a sharded model.

    Args:
        values: feature -> ids of a row, mean; 1 where nothing is said.
    """
    configs = table_configs(model)
    kinds = {name: of.sharding_type for plan in model.plan.plan.values() for name, of in plan.items()}  # type: ignore
    return [
        Placed(
            kinds[name], config.num_embeddings, config.embedding_dim, len(config.feature_names),
            sum((values or {}).get(feature, 1.0) for feature in config.feature_names),
        )
        for name, config in configs.items()
    ]  # fmt: skip


def by_formula(
    tables: Iterable[Placed], dense_parameters: int, *, ranks: int, batch_size: int, length_bytes: int = ID
) -> dict[str, float]:
    """Bytes between ranks in a step, by part.

    A rank that holds a whole table (table-wise) or some of its columns sends each other rank the pooled rows of its
    part of the batch, (n - 1) B D numbers for the table; where rows are cut, every rank has partial sums of every row
    of the batch: n times as many.  Ids of tables that are cut by rows are taken to be spread evenly.

    Args:
        batch_size: rows of a rank, B.
        length_bytes: of the length of a list of ids.

    Raises:
        NotImplementedError: a kind of sharding that is not known here.

    Example:
        >>> table = Placed("table_wise", rows=1000, dim=16)
        >>> by_formula([table], 10, ranks=2, batch_size=8)
        {'ids': 128.0, 'pooled embeddings': 512, 'gradients of embeddings': 512, 'dense gradients': 80}
    """
    found: dict[str, float] = dict.fromkeys(PARTS[:-1], 0)
    others, numbers = ranks - 1, dense_parameters
    for table in tables:
        if table.kind == "data_parallel":
            numbers += table.rows * table.dim
            continue
        if table.kind not in ("table_wise", "column_wise", "row_wise"):
            raise NotImplementedError(f"no formula for tables that are cut {table.kind}")
        sums = ranks if table.kind == "row_wise" else 1
        pooled = others * sums * batch_size * table.features * table.dim * FLOAT
        found["ids"] += others * batch_size * (table.values * ID + sums * table.features * length_bytes)
        found["pooled embeddings"] += pooled
        found["gradients of embeddings"] += pooled
    found["dense gradients"] = 2 * others * numbers * FLOAT
    return found
