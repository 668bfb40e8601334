"""Features of any number of values in a row, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class Jagged(Protocol):
    """A feature of N rows with any number of values in each: a `Bag`, or `mtcl_torchrec.data.spans.Spans`."""

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, row after row, and lengths, both int64, of the rows in `index`."""

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and lengths of all rows."""

    def slice(self, start: int, stop: int) -> Bag:
        """The rows from `start` to `stop` (not included), copied."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""


def members(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Where the values of some rows stand, row after row: ``starts[i], …, starts[i] + lengths[i] - 1``.

    Example:
        >>> members(torch.tensor([5, 0]), torch.tensor([2, 1]))
        tensor([5, 6, 0])
    """
    shift = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return shift + torch.arange(len(shift))


@dataclass(frozen=True)
class Bag:
    """A jagged feature of N rows: row i holds ``values[offsets[i]:offsets[i + 1]]``."""

    values: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, lengths: torch.Tensor) -> Bag:
        """From values, row after row, and the lengths of the rows."""
        return cls(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and lengths of all rows."""
        return self.values, self.offsets.diff()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Values and offsets."""
        return self.values, self.offsets

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and lengths of the rows in `index`.

        Example:
            >>> bag = Bag(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 2, 3]))
            >>> bag.take(torch.tensor([2, 0]))
            (tensor([7, 5, 6]), tensor([1, 2]))
        """
        starts = self.offsets[index]
        lengths = self.offsets[index + 1] - starts
        return self.values[members(starts, lengths)], lengths

    def slice(self, start: int, stop: int) -> Bag:
        """The rows from `start` to `stop` (not included), copied.

        Example:
            >>> Bag(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 2, 3])).slice(1, 3)
            Bag(values=tensor([7]), offsets=tensor([0, 0, 1]))
        """
        offsets = self.offsets[start : stop + 1]
        return Bag(self.values[offsets[0] : offsets[-1]].clone(), offsets - offsets[0])

    @classmethod
    def cat(cls, parts: Sequence[Jagged]) -> Bag:
        """The rows of all parts, one after the other.

        Example:
            >>> bag = Bag(torch.tensor([5, 6, 7]), torch.tensor([0, 2, 2, 3]))
            >>> Bag.cat([bag.slice(1, 3), bag.slice(0, 1)])
            Bag(values=tensor([7, 5, 6]), offsets=tensor([0, 0, 1, 3]))
        """
        values, lengths = zip(*(part.all() for part in parts), strict=True)
        return cls.of(torch.cat(values), torch.cat(lengths))
