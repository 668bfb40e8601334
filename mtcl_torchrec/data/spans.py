"""Histories of `mtcl_torchrec.data.earlier`, encoded: values are put together when a batch takes the row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mtcl_torchrec.data.earlier import Ages, Earlier, log_buckets
from mtcl_torchrec.data.jagged import Bag, members


@dataclass(frozen=True)
class Spans:
    """An encoded history of N rows: row i holds ``rows[codes[starts[i] : starts[i] + lengths[i]]]``.

    Args:
        codes: (E,) int32 of the events; -1 has no value.
        rows: (V + 1,) int64 row of the table for each code, the last one 0 for code -1.
        starts, lengths: (N,) int64 and int32.

    Example:
        >>> events = torch.tensor([0, 1, 0], dtype=torch.int32)
        >>> history = Spans(events, torch.tensor([7, 9, 0]), torch.tensor([0, 1]), torch.tensor([3, 1]))
        >>> history.take(torch.tensor([1, 0]))
        (tensor([9, 7, 9, 7]), tensor([1, 3]))
    """

    codes: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, row after row, and lengths of the rows in `index`."""
        lengths = self.lengths[index].to(torch.int64)
        return self.rows[self.codes[members(self.starts[index], lengths)].to(torch.int64)], lengths

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and lengths of all rows."""
        return self.take(torch.arange(len(self.starts)))

    def slice(self, start: int, stop: int) -> Bag:
        """The rows from `start` to `stop` (not included), copied."""
        return Bag.of(*self.take(torch.arange(start, stop)))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        return self.codes, self.rows, self.starts, self.lengths


@dataclass(frozen=True)
class AgeSpans:
    """Encoded ages of the events that N rows see: see `mtcl_torchrec.data.earlier.log_buckets`.

    Args:
        ages: times of events and rows.
        starts, lengths: (N,) int64 and int32.
        size: rows of the table.
    """

    ages: Ages
    starts: torch.Tensor
    lengths: torch.Tensor
    size: int

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, row after row, and lengths of the rows in `index`."""
        lengths = self.lengths[index].to(torch.int64)
        events = members(self.starts[index], lengths).numpy()
        seconds = self.ages.whole_seconds(torch.repeat_interleave(index, lengths).numpy(), events)
        return torch.from_numpy(log_buckets(seconds, self.size)), lengths

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and lengths of all rows."""
        return self.take(torch.arange(len(self.starts)))

    def slice(self, start: int, stop: int) -> Bag:
        """The rows from `start` to `stop` (not included), copied."""
        return Bag.of(*self.take(torch.arange(start, stop)))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        times, now = torch.from_numpy(self.ages.times), torch.from_numpy(self.ages.now)
        return times, now, self.starts, self.lengths


def spans_of(earlier: Earlier, rows_of_values: np.ndarray) -> Spans:
    """A history as row numbers of a table.

    Args:
        rows_of_values: (V,) int64 row number of each of `earlier.values`.
    """
    return Spans(
        torch.from_numpy(earlier.coded),
        torch.from_numpy(np.append(rows_of_values, 0)),
        torch.from_numpy(earlier.starts),
        torch.from_numpy(earlier.lengths),
    )


def ages_of(earlier: Earlier, size: int) -> AgeSpans:
    """Ages as row numbers of a table of `size` rows."""
    assert earlier.ages is not None
    return AgeSpans(earlier.ages, torch.from_numpy(earlier.starts), torch.from_numpy(earlier.lengths), size)
