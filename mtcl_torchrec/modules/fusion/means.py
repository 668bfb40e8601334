"""Scores that are a mean of the tasks' parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mtcl_torchrec.modules.fusion.contract import RowContext


class WeightedMean(nn.Module):
    """The weighted mean of the tasks' parts; a negative weight lowers the score (a report, a hide).

    With s = Σ wᵢ pᵢ the score is (s + Σ|w⁻|) / Σ|w|, which is in [0, 1] and for positive weights the plain weighted
    mean.  A row's score depends on that row alone, never on who else is in the batch.

    Args:
        weights: task name -> weight.

    Raises:
        ValueError: no weight differs from 0, or one is not finite.

    Example:
        >>> fused = WeightedMean({"click": 0.5, "like": 0.3, "long_view": 0.2})
        >>> parts = {"click": torch.tensor([0.8]), "like": torch.tensor([0.9]), "long_view": torch.tensor([0.85])}
        >>> fused(parts)
        tensor([0.8400])
    """

    weights: torch.Tensor

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.tasks = tuple(weights)
        self.register_buffer("weights", torch.empty(len(self.tasks)))
        self.set_weights(weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Replace the weights of some or all tasks; no training is needed.

        Raises:
            KeyError: a task that is not part of this score.
        """
        new = {task: float(w) for task, w in zip(self.tasks, self.weights.tolist(), strict=True)}
        for task, weight in weights.items():
            if task not in new:
                raise KeyError(f"{task!r} is not part of this score, which has {list(self.tasks)}")
            new[task] = float(weight)
        values = torch.tensor(list(new.values()))
        if not bool(torch.isfinite(values).all()) or not bool(values.any()):
            raise ValueError(f"a fused score needs finite weights and at least one that is not 0: {new}")
        self.weights.copy_(values)

    def forward(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        stacked = torch.stack([parts[task] for task in self.tasks], dim=1)
        total = (stacked * self.weights).sum(1) - self.weights.clamp(max=0).sum()
        return (total / self.weights.abs().sum()).clamp(0, 1)

    def contributions(
        self, parts: dict[str, torch.Tensor], context: RowContext | None = None
    ) -> dict[str, torch.Tensor]:
        """What each task adds to the score: w_i · part_i / Σ|w|, (B,) by task.

        They add up to the score where no weight is negative; where some are, to the score minus what it starts from,
        Σ|negative weights| / Σ|w|.

        Example:
            >>> fused = WeightedMean({"click": 1.0, "like": 3.0})
            >>> fused.contributions({"click": torch.tensor([0.8]), "like": torch.tensor([0.4])})
            {'click': tensor([0.2000]), 'like': tensor([0.3000])}
        """
        shares = (self.weights / self.weights.abs().sum()).unbind()
        return {task: parts[task] * share for task, share in zip(self.tasks, shares, strict=True)}
