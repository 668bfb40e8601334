"""Settings that suit a log of so many rows, for a first YAML."""

from __future__ import annotations

from dataclasses import dataclass

FEW = 200_000


@dataclass(frozen=True)
class Defaults:
    """What a first run is trained with.

    Args:
        epochs, batch_size, patience: of the training; few rows need small batches, or there are hardly any steps.
        expert_layers, embedding_dropout, most_dims: few rows are soon learnt by heart.
    """

    epochs: int
    batch_size: int
    patience: int
    expert_layers: tuple[int, ...]
    embedding_dropout: float
    most_dims: int


def defaults_for(rows: int) -> Defaults:
    """The settings for a log.

    Example:
        >>> defaults_for(30_000).batch_size, defaults_for(1_000_000).batch_size
        (256, 1024)
    """
    if rows < FEW:
        return Defaults(20, 256, 3, (64, 32), 0.3, 8)
    return Defaults(10, 1024 if rows < 5_000_000 else 4096, 2, (128, 64), 0.1, 16)
