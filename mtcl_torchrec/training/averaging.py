"""Exponential moving average of a model's weights, tables included."""

from __future__ import annotations

import torch
from torch import nn


class WeightAverage:
    """Keeps ``average ← decay · average + (1 - decay) · weight`` for every parameter of this rank (Polyak averaging).

    Early on, the decay is at most (1 + step) / (10 + step), so that the start is forgotten.  Tables are averaged over
    all their rows in every step, which costs one pass over this rank's shards.

    Args:
        model: its parameters are averaged in place of the shards they are.
        decay: such as 0.999.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(layer, decay=0.9)
        >>> _ = layer.weight.data.add_(1.0)
        >>> average.update()
        >>> before = layer.weight.item()
        >>> average.swap()
        >>> layer.weight.item() < before
        True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of a weight average lies between 0 and 1, not at {decay}")
        self.decay = decay
        self._weights = [p for p in model.parameters() if p.numel() > 0]
        self.restart()

    def restart(self) -> None:
        """Forget the past: the average is what the weights are now."""
        self.steps = 0
        self._averages = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._weights], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the averages into the model and keep its weights, or the other way round."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)
