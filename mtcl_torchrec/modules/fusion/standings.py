"""Where each row stands among the candidates of its request: sorted, without a loop over requests."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Standings(NamedTuple):
    """How B rows compare with the others of their request, in n columns.

    Args:
        higher, lower: (B, n) int64, rows of the same request with a higher, a lower value.
        size: (B, 1) int64, rows of the request.
    """

    higher: torch.Tensor
    lower: torch.Tensor
    size: torch.Tensor

    @property
    def rank(self) -> torch.Tensor:
        """(B, n) float: 1 is the best; rows of equal value share the mean of their ranks."""
        return 1 + self.higher + (self.size - 1 - self.higher - self.lower) / 2


def standings(columns: torch.Tensor, request: torch.Tensor | None) -> Standings:
    """Compare each row with the others of its request, whatever their order in the batch.

    Args:
        columns: (B, n).
        request: (B,) int64; a negative one stands alone.  None: all rows are one request.

    Example:
        >>> found = standings(torch.tensor([[0.1], [0.3], [0.3], [0.9]]), torch.tensor([7, 7, 7, 8]))
        >>> found.higher.flatten().tolist(), found.lower.flatten().tolist(), found.rank.flatten().tolist()
        ([2, 0, 0, 0], [0, 1, 1, 0], [3.0, 1.5, 1.5, 1.0])
    """
    order, first, after = _sorted(columns, request)
    values, back = columns.gather(0, order), order.argsort(0)
    index = _index(values)
    new = _begins(values) | (index == first)
    higher, lower = _begins_at(index, new) - first, after - _ends_at(index, new)
    return Standings(higher.gather(0, back), lower.gather(0, back), (after - first).gather(0, back)[:, :1])


def kth_largest(columns: torch.Tensor, request: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """(B, n): the k-th largest value in each row's request; its smallest, where the request has fewer rows.

    Args:
        columns, request: as in `standings`.
        k: () int64, from 1.

    Example:
        >>> kth_largest(torch.tensor([[0.1], [0.3], [0.9]]), None, torch.tensor(2)).flatten()
        tensor([0.3000, 0.3000, 0.3000])
    """
    order, first, after = _sorted(columns, request)
    return columns.gather(0, order).gather(0, torch.minimum(first + k, after) - 1).gather(0, order.argsort(0))


def _sorted(columns: torch.Tensor, request: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, n) each: rows by request and from the highest value down; where, in that order, the request of the row at
    each place begins; and where it has ended."""
    alone = -1 - torch.arange(columns.shape[0], device=columns.device)
    keys = torch.zeros_like(alone) if request is None else torch.where(request < 0, alone, request)
    keys = keys.unsqueeze(1).expand(columns.shape)
    by_value = torch.argsort(columns.detach(), dim=0, descending=True, stable=True)
    order = by_value.gather(0, torch.argsort(keys.gather(0, by_value), dim=0, stable=True))
    ordered = keys.gather(0, order)
    index, new = _index(ordered), _begins(ordered)
    return order, _begins_at(index, new), _ends_at(index, new)


def _index(ordered: torch.Tensor) -> torch.Tensor:
    return torch.arange(ordered.shape[0], device=ordered.device).unsqueeze(1).expand(ordered.shape)


def _begins(ordered: torch.Tensor) -> torch.Tensor:
    """(B, n) bool: another value stands before."""
    return (_index(ordered) == 0) | (ordered != ordered.roll(1, 0))  # torch.export takes this for any number of rows


def _begins_at(index: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(B, n): where the stretch of each place begins."""
    return torch.where(new, index, 0).cummax(0).values


def _ends_at(index: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(B, n): where the stretch of each place has ended."""
    last = (index == index.shape[0] - 1) | new.roll(-1, 0)
    return torch.where(last, index + 1, index.shape[0]).flip(0).cummin(0).values.flip(0)
