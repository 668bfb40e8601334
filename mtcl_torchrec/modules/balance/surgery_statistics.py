"""What gradient surgery met: how alike the tasks' gradients were, how often they conflicted, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class PartStatistics:
    """Of one Gramian; lists in the order of the tasks, NaN where there was nothing to see.

    Args:
        name: ``"trunk"``, ``"embeddings"``, ``"tables"``, or the features of a group.
        cosine: (T, T) cosine between the tasks' gradients, moving average over the steps in which both had one.
        conflicts: (T, T) share of those steps in which it was negative.
        weights: (T,) moving average over the steps in which the task had a gradient.
        active: (T,) share of steps in which it had one.
        clamped: steps in which a weight was clamped.
        degenerate: steps whose weights could not be told and were 1: no gradient, one that is not finite, no solution.
    """

    name: str
    cosine: list[list[float]]
    conflicts: list[list[float]]
    weights: list[float]
    active: list[float]
    clamped: int
    degenerate: int


@dataclass(frozen=True)
class SurgeryStatistics:
    """What gradient surgery met since training began.

    Args:
        tasks: their names.
        steps: backward passes.
        parts: one for each Gramian.
    """

    tasks: tuple[str, ...]
    steps: int
    parts: tuple[PartStatistics, ...]


class Counts(nn.Module):
    """Counts and moving averages, in buffers that travel in the checkpoint.

    Args:
        tasks: names of the T tasks.
        parts: names of the P Gramians.
        decay: of the moving averages.
    """

    steps: torch.Tensor
    together: torch.Tensor
    conflicts: torch.Tensor
    averages: torch.Tensor
    known: torch.Tensor
    clamped: torch.Tensor
    degenerate: torch.Tensor

    def __init__(self, tasks: Sequence[str], parts: Sequence[str], decay: float) -> None:
        super().__init__()
        self.tasks, self.parts, self.decay = tuple(tasks), tuple(parts), decay
        p, t = len(parts), len(tasks)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("together", torch.zeros(p, t, t, dtype=torch.int64))
        self.register_buffer("conflicts", torch.zeros(p, t, t, dtype=torch.int64))
        # Cosines, and in one row more the weights; beside them what the average of ones would be.
        self.register_buffer("averages", torch.zeros(p, t + 1, t, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(p, t + 1, t, dtype=torch.float64))
        self.register_buffer("clamped", torch.zeros(p, dtype=torch.int64))
        self.register_buffer("degenerate", torch.zeros(p, dtype=torch.int64))

    @torch.no_grad()
    def record(
        self,
        gramians: torch.Tensor,
        active: torch.Tensor,
        weights: torch.Tensor,
        clamped: torch.Tensor,
        degenerate: torch.Tensor,
    ) -> None:
        """Take in a step.

        Args:
            gramians: (P, T, T), finite.
            active: (P, T) bool.
            weights: (P, T).
            clamped, degenerate: (P,) bool.
        """
        norms = torch.where(active, gramians.diagonal(dim1=1, dim2=2), 1.0).sqrt()
        newest = torch.cat([gramians / norms.unsqueeze(1) / norms.unsqueeze(2), weights.unsqueeze(1)], dim=1)
        pairs = active.unsqueeze(1) & active.unsqueeze(2)
        seen = torch.cat([pairs, active.unsqueeze(1)], dim=1)
        share = seen.double() * (1 - self.decay)
        self.averages.lerp_(newest, share)
        self.known.lerp_(torch.ones_like(newest), share)
        self.steps += 1
        self.together += pairs
        self.conflicts += pairs & (gramians < 0)
        self.clamped += clamped
        self.degenerate += degenerate

    def read(self) -> SurgeryStatistics:
        """On the host: this waits for the device."""
        averages = (self.averages / self.known).tolist()  # 0/0 is NaN
        conflicts = (self.conflicts / self.together).tolist()
        steps = int(self.steps)
        active = (self.together.diagonal(dim1=1, dim2=2) / self.steps).tolist()
        return SurgeryStatistics(
            tasks=self.tasks,
            steps=steps,
            parts=tuple(
                PartStatistics(name, of[:-1], shares, of[-1], present, int(clamped), int(degenerate))
                for name, of, shares, present, clamped, degenerate in zip(
                    self.parts, averages, conflicts, active, self.clamped.tolist(), self.degenerate.tolist(),
                    strict=True,
                )
            ),
        )  # fmt: skip
