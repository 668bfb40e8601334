"""What the training loop takes its batches from: rows in memory, or a stream (`mtcl_torchrec.data.stream`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from typing import Protocol

import numpy as np

from mtcl_torchrec.data.batch import EncodedRows, MTBatch, global_batches, iterate, last_batch
from mtcl_torchrec.data.id_dropout import drop_ids
from mtcl_torchrec.data.position import Position, rows_taken


class TrainingRows(Protocol):
    """The training split as batches, one epoch after another, each in an order of its own.

    Whatever happened before `position`, the batches of all ranks from there to the end of the epoch hold each row that
    is left exactly once, and every rank gets the same number of them, of the same sizes: where a rank has a row fewer,
    a blank one stands in for it.
    """

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the split, over all ranks."""

    @property
    def fingerprint(self) -> str:
        """Equal for the same rows in the same order; a position means nothing for other ones."""

    def rows_left(self, position: Position) -> int:
        """Rows of the epoch, over all ranks, that were not taken yet.

        Each step takes ``batch_size · world_size`` of them; the last, what there is.
        """

    def steps(self, position: Position, *, world_size: int, batch_size: int) -> int:
        """Batches that each rank gets from `position` to the end of the epoch."""

    def batches(self, position: Position, *, rank: int, world_size: int, batch_size: int) -> Iterator[MTBatch]:
        """The batches of one rank from `position` to the end of the epoch."""


class MemoryRows:
    """Encoded rows in memory as `TrainingRows`.

    The same position gives the same global batches for any number of ranks whose batches make up the same product.

    Args:
        rows: the whole split, the same on every rank.
        seed: of the shuffle and of dropped ids; the epoch is part of it.
        id_dropout: id feature -> share of the rows in which it is unknown; see `mtcl_torchrec.data.id_dropout`.

    Example:
        >>> import torch
        >>> encoded = EncodedRows(
        ...     dense=torch.empty(5, 0), keys=("u",), ids=torch.arange(5)[:, None], labels=torch.zeros(5, 1)
        ... )
        >>> rows = MemoryRows(encoded, seed=0)
        >>> position = Position().after(1, world_size=1, batch_size=2)
        >>> rows.rows_left(position), rows.steps(position, world_size=2, batch_size=1)
        (3, 2)
    """

    def __init__(self, rows: EncodedRows, *, seed: int, id_dropout: Mapping[str, float] | None = None) -> None:
        self.rows = rows.row_by_row()
        self.seed = seed
        self.id_dropout = id_dropout or {}

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the split."""
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """The number of rows, what they hold, and the seed."""
        return f"memory, {len(self.rows)} rows, seed {self.seed}, {self._digest}"

    @cached_property
    def _digest(self) -> str:
        bags = [part for bag in self.rows.bags.values() for part in bag.tensors()]
        optional = [t for t in (self.rows.weights, self.rows.requests, self.rows.rewards) if t is not None]
        digest = sha256()
        for tensor in (self.rows.dense, self.rows.ids, self.rows.labels, *optional, *bags):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()[:16]

    def rows_left(self, position: Position) -> int:
        """Rows of the epoch that were not taken yet."""
        return len(self.rows) - rows_taken(len(self.rows), position.taken)

    def steps(self, position: Position, *, world_size: int, batch_size: int) -> int:
        """Batches that each rank gets from `position` to the end of the epoch."""
        return -(-self.rows_left(position) // (batch_size * world_size))

    def batches(self, position: Position, *, rank: int, world_size: int, batch_size: int) -> Iterator[MTBatch]:
        """The batches of one rank from `position` to the end of the epoch."""
        indices = global_batches(
            len(self.rows),
            batch_size,
            rank=rank,
            world_size=world_size,
            seed=(self.seed, position.epoch),
            start=rows_taken(len(self.rows), position.taken),
        )
        rows = drop_ids(self.rows, self.id_dropout, np.arange(len(self.rows)), (self.seed, position.epoch))
        return iterate(rows, indices, last=last_batch(self.rows_left(position), batch_size, world_size))
