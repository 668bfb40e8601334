"""Where training stands inside an epoch, so that any number of ranks can go on from there and see each row once.

A position is tiny because everything else follows from it: the order of an epoch's rows from (seed, epoch), and which
of them are gone from how many batches were taken, by how many ranks, of which size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtcl_torchrec.schema import DataError

Stretch = tuple[int, int, int]
"""Batches taken between two restarts: number of ranks, rows of a batch, batches of each rank."""

Piece = tuple[int, int, int]
"""Rows ``from`` to ``to`` (not included) of a shuffled window: number of the window, from, to."""


@dataclass(frozen=True)
class Position:
    """A place in the training rows.

    Args:
        epoch: counted from 1.
        taken: what was taken from this epoch: one entry for each stretch between restarts with other ranks or batches.

    Example:
        >>> position = Position().after(100, world_size=4, batch_size=512).after(7, world_size=2, batch_size=512)
        >>> position.to_json()
        {'epoch': 1, 'taken': [[4, 512, 100], [2, 512, 7]]}
        >>> Position.from_json(position.to_json()) == position
        True
    """

    epoch: int = 1
    taken: tuple[Stretch, ...] = ()

    def after(self, batches: int, *, world_size: int, batch_size: int) -> Position:
        """The position once each of `world_size` ranks has taken `batches` more batches."""
        if batches == 0:
            return self
        *before, last = self.taken or [(world_size, batch_size, 0)]
        if last[:2] == (world_size, batch_size):
            return Position(self.epoch, (*before, (world_size, batch_size, last[2] + batches)))
        return Position(self.epoch, (*self.taken, (world_size, batch_size, batches)))

    def next_epoch(self) -> Position:
        """The start of the next epoch."""
        return Position(self.epoch + 1)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"epoch": self.epoch, "taken": [list(stretch) for stretch in self.taken]}

    @classmethod
    def from_json(cls, content: Any) -> Position:
        """Read what `to_json` wrote.

        Raises:
            DataError: `content` is no position.
        """
        try:
            epoch, taken = content["epoch"], tuple(tuple(stretch) for stretch in content["taken"])
            whole = all(type(n) is int and n > 0 for n in (epoch, *(n for stretch in taken for n in stretch)))
        except (TypeError, KeyError):
            whole = False
        if not whole or set(content) != {"epoch", "taken"} or any(len(stretch) != 3 for stretch in taken):
            raise DataError(f"no position in the training data: {content!r}")
        return cls(epoch, taken)


def shuffled(rows: int, seed: Sequence[int]) -> torch.Tensor:
    """A permutation of ``range(rows)``, (rows,) int64, that follows from the numbers of `seed`.

    Example:
        >>> sorted(shuffled(4, (0, 1)).tolist()), shuffled(4, (0, 1)).tolist() == shuffled(4, (0, 1)).tolist()
        ([0, 1, 2, 3], True)
    """
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part) % (1 << 62)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))


def rows_taken(total: int, taken: Iterable[Stretch]) -> int:
    """How many of `total` rows are gone when each step takes one global batch from the front, as in memory.

    Example:
        >>> rows_taken(1000, [(4, 32, 5), (2, 100, 1)]), rows_taken(100, [(4, 32, 5)])
        (840, 100)
    """
    return min(total, sum(world_size * batch_size * batches for world_size, batch_size, batches in taken))


def pieces_left(pieces: Sequence[Piece], taken: Iterable[Stretch]) -> list[Piece]:
    """What is left of an epoch when each rank took its batches from the front of a share of its own, as in a stream.

    Each stretch cut what was left into one share for each rank; the ends of the shares that were not reached are put
    together again, in order.  A stretch that is interrupted and goes on with as many ranks has the same shares as one
    that was not.

    Example:
        >>> pieces_left([(0, 0, 6), (1, 0, 4)], [(2, 1, 2)])  # shares: rows 0-4 of window 0; the last, and window 1
        [(0, 2, 5), (1, 1, 4)]
    """
    left = list(pieces)
    for world_size, batch_size, batches in taken:
        left = [piece for share in cut(left, world_size) for piece in skip(share, batches * batch_size)]
    return left


def cut(pieces: Sequence[Piece], shares: int) -> list[list[Piece]]:
    """Cut a sequence of pieces into shares of consecutive rows that differ by at most one row, larger ones first.

    Example:
        >>> cut([(7, 0, 3), (5, 0, 2)], 2)
        [[(7, 0, 3)], [(5, 0, 2)]]
        >>> cut([(7, 0, 3)], 2), cut([], 2)
        ([[(7, 0, 2)], [(7, 2, 3)]], [[], []])
    """
    each, larger = divmod(count(pieces), shares)
    wanted = [each + (i < larger) for i in range(shares)]
    parts: list[list[Piece]] = [[] for _ in range(shares)]
    share = 0
    for window, start, stop in pieces:
        while start < stop:
            while not wanted[share]:
                share += 1
            end = min(stop, start + wanted[share])
            parts[share].append((window, start, end))
            wanted[share] -= end - start
            start = end
    return parts


def skip(pieces: Sequence[Piece], rows: int) -> list[Piece]:
    """The pieces without their first `rows` rows.

    Example:
        >>> skip([(7, 0, 3), (5, 0, 2)], 4), skip([(7, 0, 3)], 9)
        ([(5, 1, 2)], [])
    """
    left = []
    for window, start, stop in pieces:
        gone = min(rows, stop - start)
        rows -= gone
        if start + gone < stop:
            left.append((window, start + gone, stop))
    return left


def count(pieces: Iterable[Piece]) -> int:
    """Rows in all pieces.

    Example:
        >>> count([(0, 2, 5), (1, 0, 4)])
        7
    """
    return sum(stop - start for _, start, stop in pieces)
