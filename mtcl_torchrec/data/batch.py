"""Encoded rows in memory, and the batches that TorchRec's pipelines move to the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from mtcl_torchrec.data.jagged import Bag, Jagged
from mtcl_torchrec.data.position import shuffled


@dataclass
class MTBatch(Pipelineable):
    """A batch of B rows for T tasks.  TorchRec's own ``Batch`` has the first three fields and works wherever this does.

    Args:
        dense_features: (B, D) float32; D may be 0.
        sparse_features: KeyedJaggedTensor of F features and B rows.
        labels: (B, T) float32, one column per task in the model's order; NaN is a missing label.
        weights: (B, T) float32 sample weights, or None for equal ones.
        mask: (B, T) bool, False where a label must not count, or None.
        requests: (B,) int64 keys of the requests that the rows belong to, negative where a row belongs to none; needed
            where a task has a pairwise term.
        largest_request: rows of the largest request; found out where `requests` lie on the CPU.
        reward: (B,) float32 in [0, 1], what the fused score is trained against; NaN where it is not known.
    """

    dense_features: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels: torch.Tensor
    weights: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    requests: torch.Tensor | None = None
    largest_request: int | None = None
    reward: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.requests is not None and self.largest_request is None and self.requests.device.type == "cpu":
            known = self.requests[self.requests >= 0]
            self.largest_request = int(known.unique(return_counts=True)[1].max()) if len(known) else 0

    def filled_up(self, size: int) -> MTBatch:
        """The batch with blank rows behind its own, so that there are `size`, where there are fewer.

        A blank row looks up nothing, has no label and therefore trains nothing.
        """
        rows = len(self.labels)
        more = size - rows
        if more <= 0:
            return self

        def longer(t: torch.Tensor | None, value: float) -> torch.Tensor | None:
            return None if t is None else torch.cat([t, t.new_full((more, *t.shape[1:]), value)])

        keys, sparse = self.sparse_features.keys(), self.sparse_features
        lengths = F.pad(sparse.lengths().view(len(keys), rows), (0, more)).reshape(-1)
        return MTBatch(
            dense_features=F.pad(self.dense_features, (0, 0, 0, more)),
            sparse_features=KeyedJaggedTensor(keys=keys, values=sparse.values(), lengths=lengths),
            labels=F.pad(self.labels, (0, 0, 0, more), value=float("nan")),
            weights=longer(self.weights, 1.0),
            mask=longer(self.mask, False),
            requests=longer(self.requests, -1),
            reward=longer(self.reward, float("nan")),
        )

    def to(
        self, device: torch.device, non_blocking: bool = False, data_copy_stream: torch.Stream | None = None
    ) -> MTBatch:
        """The batch on `device`.  `data_copy_stream` is accepted because some TorchRec pipelines pass it."""

        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        # Where each feature's values stand is found out while they lie here: asked of a GPU, it would be waited for.
        self.sparse_features.offset_per_key()
        return MTBatch(
            self.dense_features.to(device, non_blocking=non_blocking),
            self.sparse_features.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            move(self.weights),
            move(self.mask),
            move(self.requests),
            self.largest_request,
            move(self.reward),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Mark every tensor as used on `stream`."""
        self.sparse_features.record_stream(stream)
        for tensor in (self.dense_features, self.labels, self.weights, self.mask, self.requests, self.reward):
            if tensor is not None:
                tensor.record_stream(stream)

    def pin_memory(self) -> MTBatch:
        """The batch in page-locked memory."""
        return MTBatch(
            self.dense_features.pin_memory(),
            self.sparse_features.pin_memory(),
            self.labels.pin_memory(),
            None if self.weights is None else self.weights.pin_memory(),
            None if self.mask is None else self.mask.pin_memory(),
            None if self.requests is None else self.requests.pin_memory(),
            self.largest_request,
            None if self.reward is None else self.reward.pin_memory(),
        )


@dataclass(frozen=True)
class EncodedRows:
    """N rows ready for the model.

    Args:
        dense: (N, D) float32.
        keys: the sparse features, in the order of the KeyedJaggedTensor.
        ids: (N, len(id features)) int64, the features of exactly one value, in the order of `keys`.  They may lie
            column by column, as a KeyedJaggedTensor has them (rows that become batches in order), or row by row (rows
            that are picked from all over a table: see `row_by_row`).
        bags: the other sparse features.
        labels: (N, T) float32, NaN where missing or masked out.
        weights: (N, T) float32, or None.
        requests: (N,) int64 keys of the rows' requests, -1 where missing; or None, where nothing compares rows.
        rewards: (N,) float32, NaN where not known; or None, where the fused score learns from none.
    """

    dense: torch.Tensor
    keys: tuple[str, ...]
    ids: torch.Tensor
    labels: torch.Tensor
    bags: Mapping[str, Jagged] = field(default_factory=dict)
    weights: torch.Tensor | None = None
    requests: torch.Tensor | None = None
    rewards: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.dense)

    def first_values(self, feature: str) -> torch.Tensor:
        """(N,) int64: the first value of a sparse feature in each row, -1 where it has none."""
        if feature not in self.bags:
            return self.ids[:, [key for key in self.keys if key not in self.bags].index(feature)]
        values, lengths = self.bags[feature].all()
        starts = lengths.cumsum(0) - lengths
        padded = torch.cat([values, values.new_full((1,), -1)])
        return torch.where(lengths > 0, padded[starts.clamp(max=len(values))], -1)

    def slice(self, start: int, stop: int) -> EncodedRows:
        """The rows from `start` to `stop` (not included), copied: keeping them does not keep the others in memory."""
        return EncodedRows(
            dense=_copied(self.dense[start:stop]),
            keys=self.keys,
            ids=_copied(self.ids[start:stop].T).T,
            labels=_copied(self.labels[start:stop]),
            bags={key: bag.slice(start, stop) for key, bag in self.bags.items()},
            weights=None if self.weights is None else _copied(self.weights[start:stop]),
            requests=None if self.requests is None else _copied(self.requests[start:stop]),
            rewards=None if self.rewards is None else _copied(self.rewards[start:stop]),
        )

    def parts(self, index: Sequence[torch.Tensor]) -> list[EncodedRows]:
        """The rows in each of `index` (b,), copied, with ids column by column.

        Example:
            >>> rows = EncodedRows(
            ...     dense=torch.empty(4, 0), keys=("user", "item"), ids=torch.arange(8).view(4, 2),
            ...     labels=torch.zeros(4, 1),
            ... )
            >>> [part.ids.tolist() for part in rows.parts([torch.tensor([3, 0]), torch.tensor([1])])]
            [[[6, 7], [0, 1]], [[2, 3]]]
        """
        return [
            EncodedRows(
                dense=self.dense.index_select(0, rows),
                keys=self.keys,
                ids=ids.T,
                labels=self.labels.index_select(0, rows),
                bags={key: Bag.of(*bag.take(rows)) for key, bag in self.bags.items()},
                weights=None if self.weights is None else self.weights.index_select(0, rows),
                requests=None if self.requests is None else self.requests.index_select(0, rows),
                rewards=None if self.rewards is None else self.rewards.index_select(0, rows),
            )
            for rows, ids in zip(index, _columns_of_parts(self.ids, index), strict=True)
        ]

    @classmethod
    def cat(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """The rows of all parts, one after the other; the parts have the same columns, and there is at least one."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            dense=torch.cat([part.dense for part in parts]),
            keys=first.keys,
            ids=torch.cat([part.ids.T for part in parts], dim=1).T,
            labels=torch.cat([part.labels for part in parts]),
            bags={key: Bag.cat([part.bags[key] for part in parts]) for key in first.bags},
            weights=_cat([part.weights for part in parts]),
            requests=_cat([part.requests for part in parts]),
            rewards=_cat([part.rewards for part in parts]),
        )

    def row_by_row(self) -> EncodedRows:
        """The same with the ids of a row beside each other, so that a row picked from many is one place in memory."""
        return self if self.ids.is_contiguous() else replace(self, ids=self.ids.contiguous())

    def batch(self, index: torch.Tensor | None = None) -> MTBatch:
        """The rows in `index` (B,), or all of them, as one batch; of all of them it may share the memory."""
        ids = self.ids.T if index is None else _columns_at(self.ids, index)
        size = ids.shape[1]
        if not self.bags:
            values, lengths = ids.reshape(-1), torch.from_numpy(np.ones(ids.numel(), np.int64))
        else:
            ones = torch.ones(size, dtype=torch.int64)
            column, parts = iter(ids), []
            for key in self.keys:
                if key not in self.bags:
                    parts.append((next(column), ones))
                elif index is None:
                    parts.append(self.bags[key].all())
                else:
                    parts.append(self.bags[key].take(index))
            values = torch.cat([v for v, _ in parts])
            lengths = torch.cat([n for _, n in parts])
        return MTBatch(
            dense_features=self.dense if index is None else self.dense.index_select(0, index),
            sparse_features=KeyedJaggedTensor(keys=list(self.keys), values=values, lengths=lengths),
            labels=self.labels if index is None else self.labels.index_select(0, index),
            weights=self.weights if index is None or self.weights is None else self.weights[index],
            requests=self.requests if index is None or self.requests is None else self.requests[index],
            reward=self.rewards if index is None or self.rewards is None else self.rewards[index],
        )

    def blank(self) -> MTBatch:
        """One row that looks up nothing, has no label and therefore trains nothing."""
        return self.batch(torch.empty(0, dtype=torch.int64)).filled_up(1)


def _columns_at(ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(F, B), one column after the other: the rows of ids (N, F) in `index` (B,)."""
    if ids.is_contiguous():
        return _copied(ids.index_select(0, index).T)
    return ids.T.gather(1, index.expand(ids.shape[1], -1))


def _columns_of_parts(ids: torch.Tensor, index: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(F, b), one column after the other, for each of `index` (b,): those rows of ids (N, F).

    What takes long is to fetch values from all over a column, which a core's cache should hold.  So a column is
    gathered for all parts before the next one, and in 32 bits where its ids fit.
    """
    found = [np.empty((ids.shape[1], len(rows)), np.int64) for rows in index]
    order = torch.cat(list(index))
    for number, column in enumerate(ids.numpy().T):
        if column.view(np.uint64).max(initial=0) <= np.iinfo(np.int32).max:
            column = column.astype(np.int32)
        gathered, at = torch.from_numpy(column).index_select(0, order).numpy(), 0
        for part in found:
            part[number] = gathered[at : (at := at + part.shape[1])]
    return [torch.from_numpy(part) for part in found]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, made on this thread: torch would wake all of its threads for what takes one 0.1 ms, and wait
    for them while they have other work.

    One without columns has the strides that torch gives it, not numpy's, or a compiled graph would take it for another
    kind of tensor than those that torch has made.
    """
    if tensor.numel() == 0:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return torch.from_numpy(tensor.numpy().copy(order="C"))


def _cat(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def global_batches(
    num_rows: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: Sequence[int] | None = None,
    start: int = 0,
) -> list[torch.Tensor]:
    """Row numbers of every step of one pass, for one rank.

    The ranks cut each global batch of ``batch_size · world_size`` rows among them, so one pass has the same global
    batches on any number of ranks that gives the same product, every rank takes the same number of steps, and each row
    is seen once.

    Args:
        seed: numbers that seed the shuffle (such as seed and epoch); None keeps the order of the rows.
        start: how many rows of that order are left out because they were taken before.

    Returns:
        One (b,) int64 tensor per step.  In the last step b may differ by one between ranks, down to 0.

    Example:
        >>> [b.tolist() for b in global_batches(5, 2, rank=1, world_size=2)]
        [[1, 3], []]
    """
    order = torch.arange(num_rows) if seed is None else shuffled(num_rows, seed)
    step = batch_size * world_size
    return [order[at : at + step][rank::world_size] for at in range(start, num_rows, step)]


def iterate(rows: EncodedRows, indices: Sequence[torch.Tensor], *, last: int = 1) -> Iterator[MTBatch]:
    """The batches of `indices`.

    Args:
        last: rows of the last batch, at least: on a rank that has fewer, blank ones fill it up, so that all ranks stay
            in step.  In training, see `last_batch`: gloo's collectives want equal batches of row-wise tables.
    """
    for step, index in enumerate(indices, start=1):
        batch = rows.batch(index)
        yield batch.filled_up(last if step == len(indices) else 1)


def last_batch(num_rows: int, batch_size: int, world_size: int) -> int:
    """Rows of the largest batch of all ranks in the last step of `global_batches` over so many rows.

    Example:
        >>> last_batch(11, 2, 2), [len(global_batches(11, 2, rank=rank, world_size=2)[-1]) for rank in (0, 1)]
        (2, [2, 1])
    """
    return -(-(num_rows - (num_rows - 1) // (batch_size * world_size) * batch_size * world_size) // world_size)
