"""What a fit needs to know of any number of rows, in a memory of fixed size that is summed over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

MAX_BINS = 4096
MIN_BINS = 128
_CELLS = 2**22  # bins of all segments together
TEMPERATURES = np.geomspace(1 / 16, 16, 25)  # slopes a at which the loss of a multiclass task is known


@dataclass(frozen=True)
class Binned:
    """The bins that hold rows, as points in order of x.

    Args:
        x: (n,) mean value of a bin's rows, rising.
        y: (n,) mean label.
        weight: (n,) sum of the rows' weights.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray


class _RowSums:
    """Sums over rows, for each segment, that ranks add up; float64, in which sums of ones are exact in any order."""

    def __init__(self, kinds: int, segments: int, cells: int, device: torch.device | str) -> None:
        self.segments = segments
        self.sums = torch.zeros(kinds, segments, cells, dtype=torch.float64, device=device)
        self.counts = torch.zeros(segments, dtype=torch.float64, device=device)
        self.broken = torch.zeros(1, dtype=torch.float64, device=device)  # rows that count nowhere, and should

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is summed over ranks."""
        return [self.sums, self.counts, self.broken]


class Histogram(_RowSums):
    """Sums over the rows whose predicted value falls into a bin, for each segment.

    A bin keeps the sum of the values themselves, so a fit on the bins' means differs from one on the rows by the square
    of a bin's width only.  What lies outside counts in the first or last bin.

    Args:
        low, high: ends of the bins.
        segments: S, how many segments there are.
        device: where the sums are kept.

    Example:
        >>> histogram = Histogram(-16.0, 16.0)
        >>> histogram.add(torch.tensor([0.5, 2.0, 0.5]), torch.tensor([0.0, 1.0, 1.0]))
        >>> histogram.binned(histogram.sums.sum(1))
        Binned(x=array([0.5, 2. ]), y=array([0.5, 1. ]), weight=array([2., 1.]))
    """

    def __init__(self, low: float, high: float, segments: int = 1, device: torch.device | str = "cpu") -> None:
        self.low, self.high = low, high
        self.bins = min(max(2 ** ((_CELLS // segments).bit_length() - 1), MIN_BINS), MAX_BINS)
        super().__init__(3, segments, self.bins, device)  # weight, weighted label, weighted value

    def add(
        self,
        value: torch.Tensor,
        label: torch.Tensor,
        segment: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Count B rows.

        Args:
            value: (B,) predicted.
            label: (B,), NaN where missing: such a row counts nowhere.
            segment: (B,) int64 in [0, S); None is 0.
            weight: (B,) of the rows, None is 1.
        """
        value, label = value.double(), label.double()
        known, broken, segment, weight = _counted(label, torch.isfinite(value), segment, weight)
        self.broken += broken
        place = ((value - self.low) * (self.bins / (self.high - self.low))).floor().clamp(0, self.bins - 1)
        cell = segment * self.bins + place.nan_to_num().long()
        for of, each in enumerate((weight, weight * torch.where(known, label, 0.0), weight * value)):
            self.sums[of].view(-1).index_add_(0, cell, torch.where(known, each, 0.0))
        self.counts.index_add_(0, segment, (known & (weight > 0)).double())

    def binned(self, sums: torch.Tensor) -> Binned:
        """The points of some sums (3, bins)."""
        weight, label, value = sums.cpu().numpy()
        full = weight > 0
        x = value[full] / weight[full]
        # A bin's mean may leave it by a rounding error; the outermost hold what lies beyond.
        return Binned(np.maximum.accumulate(x) if len(x) else x, label[full] / weight[full], weight[full])


class TemperatureSums(_RowSums):
    """Derivatives of a multiclass task's loss by the slope a of softmax(a log p), at `TEMPERATURES`, for each segment.

    The loss is convex in a.  Its first and second derivatives at the ends of the interval in which the first one is 0
    tell its minimum to the fourth power of the interval's length.

    Args:
        segments: S, how many segments there are.
        device: where the sums are kept.

    Example:
        >>> sums = TemperatureSums()
        >>> log_p = torch.log(torch.tensor([[0.9, 0.1]] * 4))  # right in three of four cases
        >>> sums.add(log_p, torch.tensor([0.0, 0.0, 0.0, 1.0]))
        >>> round(float(best_slope(sums.sums.sum(1))), 4), round(float(np.log(3) / np.log(9)), 4)
        (0.5, 0.5)
    """

    def __init__(self, segments: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__(2, segments, len(TEMPERATURES), device)  # first and second derivative

    def add(
        self,
        log_p: torch.Tensor,
        label: torch.Tensor,
        segment: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Count B rows.

        Args:
            log_p: (B, C) log-probabilities.
            label: (B,) class, NaN where missing: such a row counts nowhere.
            segment: (B,) int64 in [0, S); None is 0.
            weight: (B,) of the rows, None is 1.
        """
        fits = torch.isfinite(log_p).all(1) & ~((label < 0) | (label >= log_p.shape[1]))
        known, broken, segment, weight = _counted(label, fits, segment, weight)
        self.broken += broken
        log_p, weight = torch.where(fits.unsqueeze(1), log_p, 0.0), torch.where(known, weight, 0.0)
        own = log_p.gather(1, torch.where(known, label, 0.0).long().unsqueeze(1)).squeeze(1).double()
        for at, slope in enumerate(TEMPERATURES):
            p = torch.softmax(float(slope) * log_p, dim=1)
            mean = (p * log_p).sum(1).double()
            spread = (p * (log_p - mean.float().unsqueeze(1)).square()).sum(1).double()
            self.sums[0, :, at].index_add_(0, segment, weight * (mean - own))
            self.sums[1, :, at].index_add_(0, segment, weight * spread)
        self.counts.index_add_(0, segment, (weight > 0).double())


def best_slope(sums: torch.Tensor) -> float:
    """The slope a at which the loss is least, from its derivatives (2, len(TEMPERATURES)).

    Returns:
        NaN where it lies outside of `TEMPERATURES`, or the loss does not depend on a.
    """
    first, second = sums.cpu().numpy()
    if not second.max() > 1e-9 * max(abs(first).max(), 1e-30) or first[0] >= 0 or first[-1] <= 0:
        return float("nan")
    at = int(np.searchsorted(first > 0, True)) - 1  # the last one that still falls
    low, high = TEMPERATURES[at], TEMPERATURES[at + 1]
    width = high - low
    ends = (first[at], width * second[at], first[at + 1], width * second[at + 1])

    def derivative(t: float) -> float:  # the cubic with these values and slopes at both ends (Hermite)
        a, da, b, db = ends
        return (1 + 2 * t) * (1 - t) ** 2 * a + t * (1 - t) ** 2 * da + t * t * (3 - 2 * t) * b - t * t * (1 - t) * db

    left, right = 0.0, 1.0
    for _ in range(50):
        middle = (left + right) / 2
        left, right = (left, middle) if derivative(middle) > 0 else (middle, right)
    return float(low + width * (left + right) / 2)


def _counted(
    label: torch.Tensor, fits: torch.Tensor, segment: torch.Tensor | None, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rows count, how many do not although they have a label, and every row's segment and weight."""
    segment = torch.zeros_like(label, dtype=torch.int64) if segment is None else segment
    weight = torch.ones_like(label, dtype=torch.float64) if weight is None else weight.double()
    known = ~torch.isnan(label)
    counts = known & fits & ~torch.isinf(label) & (weight >= 0) & ~torch.isinf(weight)
    return counts, (known & ~counts).double().sum(), segment, torch.where(counts, weight, 0.0)


def sum_over_ranks(tensors: list[torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over all ranks, in one collective.

    Args:
        tensors: float64, of the same shapes on every rank.
        group: the ranks; None is the default group, or this process alone where there is none.
    """
    if not tensors or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
