"""The Gramian of the embedding tables themselves, without a gradient of any table's size.

A row's gradient is the sum over its lookups in the batch, whichever rank, feature or bag they are in.  So ids are made
unique and the tasks' gradients of the pooled embeddings are added up by them; where several ranks share a batch, the
sums of a row meet on one of them.  Time and memory grow with the lookups of a batch, not with the rows of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.modules.balance.gramian import gramian
from mtcl_torchrec.modules.trunks.contract import ParameterSlices, shared_parameters


class Lookup(NamedTuple):
    """One feature that looks up one table.

    Args:
        feature: its name in the batch.
        start: first column of its pooled embedding among all of them.
        first_row: what is added to an id, so that rows of different tables differ.
        mean: whether its bags are averaged.
    """

    feature: str
    start: int
    first_row: int
    mean: bool


class TableLookups(NamedTuple):
    """All lookups.

    Args:
        by_width: width of an embedding -> the lookups of that width; tables of equal width are treated as one.
        weighted: whether the ids in the batch have weights.
    """

    by_width: dict[int, list[Lookup]]
    weighted: bool


def table_lookups(embedding_bag_collection: Any, dims: Mapping[str, int]) -> TableLookups:
    """The lookups of a collection.

    Args:
        dims: key of each pooled embedding -> width, in the order of the columns.

    Raises:
        ValueError: the rows are known only inside the collection.
    """
    if isinstance(embedding_bag_collection, ManagedCollisionEmbeddingBagCollection):
        raise ValueError(
            "gradient surgery at 'tables' needs ids that are rows, and managed collision gives rows to ids of its own; "
            "cut at 'embeddings', 'trunk' or 'both'"
        )
    starts, column = {}, 0
    for key, width in dims.items():
        starts[key] = column
        column += width
    tables = embedding_bag_collection.embedding_bag_configs()
    by_width: dict[int, list[Lookup]] = {}
    first_row = 0
    for table, names in zip(tables, get_embedding_names_by_table(tables), strict=True):
        for feature, name in zip(table.feature_names, names, strict=True):
            by_width.setdefault(table.embedding_dim, []).append(
                Lookup(feature, starts[name], first_row, table.pooling == PoolingType.MEAN)
            )
        first_row += table.num_embeddings
    is_weighted = getattr(embedding_bag_collection, "is_weighted", None)
    return TableLookups(by_width, bool(is_weighted is not None and is_weighted()))


def table_gramian(
    pooled_gradients: torch.Tensor,
    sparse_features: KeyedJaggedTensor,
    lookups: TableLookups,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Inner products of the tasks' gradients of all tables; exact, also where ranks have rows in common.

    It waits for the device: how many rows are unique decides the size of what follows.

    Args:
        pooled_gradients: (T, B, Σ dims).
        sparse_features: of the same B rows.
        group: the ranks whose gradients are added up; None is this rank alone.

    Returns:
        (T, T) float64; summed over the ranks, it is the Gramian of the summed gradients.
    """
    num_tasks = len(pooled_gradients)
    total = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=pooled_gradients.device)
    for width, of_width in lookups.by_width.items():
        rows, gradients = _by_row(pooled_gradients, sparse_features, of_width, width, weighted=lookups.weighted)
        rows, gradients = unique_rows(rows, gradients)
        if group is not None and dist.get_world_size(group) > 1:
            rows, gradients = unique_rows(*_to_owners(rows, gradients, group))
        total += gramian(gradients.transpose(0, 1))
    return total


def _by_row(
    pooled_gradients: torch.Tensor,
    sparse_features: KeyedJaggedTensor,
    lookups: Sequence[Lookup],
    width: int,
    *,
    weighted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each lookup's row (L,) and its part of that row's gradient (L, T, width)."""
    rows, gradients = [], []
    for lookup in lookups:
        jagged = sparse_features[lookup.feature]
        values, lengths = jagged.values(), jagged.lengths()
        of = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths, output_size=len(values))
        part = pooled_gradients[:, :, lookup.start : lookup.start + width].transpose(0, 1)[of]
        if lookup.mean:
            part = part / lengths[of].view(-1, 1, 1)
        if weighted:
            part = part * jagged.weights().view(-1, 1, 1)
        rows.append(values.long() + lookup.first_row)
        gradients.append(part)
    return torch.cat(rows), torch.cat(gradients)


def unique_rows(rows: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row once, with the sum of its gradients.

    Args:
        rows: (L,) int64.
        gradients: (L, ...).

    Returns:
        (U,) and (U, ...).

    Example:
        >>> unique_rows(torch.tensor([7, 3, 7]), torch.tensor([[1.0], [2.0], [3.0]]))
        (tensor([3, 7]), tensor([[2.], [4.]]))
    """
    unique, place = torch.unique(rows, return_inverse=True)
    return unique, gradients.new_zeros(len(unique), *gradients.shape[1:]).index_add_(0, place, gradients)


def _to_owners(
    rows: torch.Tensor, gradients: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send each row and its gradient to the rank that its number names; what this rank has received.

    Args:
        rows: (U,).
        gradients: (U, T, width).
    """
    ranks = dist.get_world_size(group)
    owner = rows % ranks
    order = torch.argsort(owner)
    counts = torch.bincount(owner, minlength=ranks)
    incoming = torch.empty_like(counts)
    dist.all_to_all_single(incoming, counts, group=group)
    sent, received = counts.tolist(), incoming.tolist()
    all_rows = rows.new_empty(sum(received))
    dist.all_to_all_single(all_rows, rows[order], received, sent, group=group)
    all_gradients = gradients.new_empty(sum(received), *gradients.shape[1:])
    dist.all_to_all_single(all_gradients, gradients[order], received, sent, group=group)
    return all_rows, all_gradients


def dense_gramian(gradients: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Inner products of the tasks' gradients of dense parameters; exact on any number of ranks.

    Args:
        gradients: (T, P) of this rank; added up over the ranks in place.
        group: the ranks; None is this rank alone.

    Returns:
        (T, T) float64; summed over the ranks, it is the Gramian of the summed gradients.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks > 1:
        dist.all_reduce(gradients, group=group)
    return gramian(gradients) / ranks


def dense_parameters(trunk: nn.Module, interaction: nn.Module, lookups: nn.Module | None = None) -> ParameterSlices:
    """Dense parameters that several tasks may move: the interaction's, those of the inputs beside the tables, and what
    `shared_parameters` names of the trunk's."""
    below = [p for part in (interaction, lookups) if part is not None for p in part.parameters()]
    of_both = [*((p, None) for p in below), *shared_parameters(trunk)]
    return [(parameter, indices) for parameter, indices in of_both if parameter.requires_grad]
