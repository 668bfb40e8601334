"""A batch whose loss is not finite trains nothing, and is counted.

One bad label, weight or activation would otherwise make every parameter NaN, for good: tables whose optimizer is fused
into backward step before anyone can look at the loss.  So the gradient is stopped on its way back, by a flag on the
device that the loss sets in forward, the same on all ranks.  Nobody waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LARGEST = 1e30  # a sum of losses beyond this is no use: the square of its gradient would leave float32


class SkipFlag(nn.Module):
    """A fresh flag for each forward: False, until the loss finds that the batch must be skipped.

    A module, because TorchRec's tracer takes modules without tables as they are.

    Example:
        >>> SkipFlag()(torch.zeros(3))
        tensor(False)
    """

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """() bool on the device of `like`."""
        return torch.zeros((), dtype=torch.bool, device=like.device)


class _StopGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        ctx.skip = skip  # not save_for_backward: it is written between forward and backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # A product with 0 would leave NaN as it is.
        return torch.where(ctx.skip, 0.0, grads[0]), None


def stop_gradient_if(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """`x`, whose gradient is exactly zero if `skip` is True by the time of the backward pass.

    Args:
        x: any shape.
        skip: bool, () or of a shape that fits that of `x`; may be written until then.

    Example:
        >>> x, skip = torch.ones(2, requires_grad=True), torch.tensor(False)
        >>> y = stop_gradient_if(x, skip) * float("nan")
        >>> _ = skip.fill_(True)
        >>> y.sum().backward()
        >>> x.grad
        tensor([0., 0.])
    """
    return _StopGradient.apply(x, skip)


@dataclass(frozen=True)
class Skipped:
    """Batches that trained nothing.

    Args:
        steps: how many.
        last_batch: number of the last one among all training batches, from 1; 0 while there is none.
        last_parts: the tasks whose loss was not finite in it, and the regularisers that were not.
        last_ranks: on how many ranks.
        last_rank: the one rank that had it, None where several had.
        by_part: part of the loss -> in how many batches it was not finite.
    """

    steps: int
    last_batch: int
    last_parts: tuple[str, ...]
    last_ranks: int
    last_rank: int | None
    by_part: dict[str, int]


class SkippedSteps(nn.Module):
    """Counts training batches and those that were skipped; its buffers travel in the checkpoint.

    Args:
        parts: names of the parts of the loss.
    """

    found_inf: torch.Tensor
    batches: torch.Tensor
    steps: torch.Tensor
    by_part: torch.Tensor
    last_batch: torch.Tensor
    last: torch.Tensor

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        # 1.0 if the newest batch was skipped: what torch's fused optimizers look at before they step.
        self.register_buffer("found_inf", torch.zeros(()), persistent=False)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("by_part", torch.zeros(len(self.parts), dtype=torch.int64))
        self.register_buffer("last_batch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(len(self.parts) + 2))

    @torch.no_grad()
    def record(self, bad: torch.Tensor) -> torch.Tensor:
        """Count a training batch.

        Args:
            bad: (parts + 2,) float32, summed over ranks: on how many ranks each part of the loss was not finite, on
                how many any of them was, and the sum of those ranks' numbers.

        Returns:
            () bool: whether the batch is to be skipped.
        """
        skip = bad[-2] > 0
        self.found_inf.copy_(skip)
        self.batches += 1
        self.steps += skip
        self.by_part += bad[:-2] > 0
        self.last_batch.copy_(torch.where(skip, self.batches, self.last_batch))
        self.last.copy_(torch.where(skip, bad, self.last))
        return skip

    def read(self) -> Skipped:
        """The counts, on the host: this waits for the device."""
        *by_part, ranks, rank = (int(n) for n in self.last.tolist())
        return Skipped(
            steps=int(self.steps),
            last_batch=int(self.last_batch),
            last_parts=tuple(name for name, n in zip(self.parts, by_part, strict=True) if n),
            last_ranks=ranks,
            last_rank=rank if ranks == 1 else None,
            by_part=dict(zip(self.parts, self.by_part.tolist(), strict=True)),
        )
