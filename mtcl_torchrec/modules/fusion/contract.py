"""The signature of a fused score, what it may know of its rows besides the parts, and what ours have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mtcl_torchrec.schema import nearest

Parts = Mapping[str, torch.Tensor]


@dataclass
class RowContext:
    """What a fused score may know of B rows besides the tasks' parts.

    Args:
        dense_features: (B, D) as the model got them.
        embeddings: key of a pooled embedding (the sparse feature's name, or ``feature@table`` where several tables are
            looked up by it) -> (B, dim), detached.
        request: (B,) int64, equal for rows that are ranked against each other, negative for a row that stands alone;
            None: all rows are one request.
    """

    dense_features: torch.Tensor
    embeddings: Mapping[str, torch.Tensor]
    request: torch.Tensor | None = None


class FusedScore(nn.Module):
    """What our fused scores have in common; one of your own need not be one.

    Attributes:
        tasks: names of the tasks whose parts it reads.
        needs_context: it is called as ``forward(parts, context)``.
        within_request: it compares the candidates of one request with each other, so that a score means nothing beside
            those of other requests, and all candidates of a request must be scored together.
        differentiable: its gradient says how to train what is below it.
    """

    tasks: tuple[str, ...]
    needs_context: bool = False
    within_request: bool = False
    differentiable: bool = True

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor] | None:
        """What each task adds to the score, where the score is a sum in some unit: task -> (B,).

        None: there is no such explanation.  Each class says what the sum is; within one class a larger number is always
        more in favour of the item.
        """
        return None

    def stacked(self, parts: Parts) -> torch.Tensor:
        """(B, n): the parts that it reads, in the order of `tasks`."""
        return torch.stack([parts[task] for task in self.tasks], dim=1)

    def by_task(self, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """Columns (B, n) by task."""
        return dict(zip(self.tasks, columns.unbind(1), strict=True))


class Weighted(FusedScore):
    """A fused score with a weight for each task, in a buffer.

    Args:
        weights: task -> weight; a negative one lowers the score where the task's part rises.

    Raises:
        ValueError: no weight differs from 0, or their sum is not finite (in float32).
    """

    weights: torch.Tensor

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.tasks = tuple(weights)
        self.register_buffer("weights", torch.zeros(len(self.tasks)))

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Replace the weights of some or all tasks; no training is needed.

        Raises:
            KeyError: a task that is not part of this score.
            ValueError: weights that give no score; the old ones stay then.
        """
        new = {task: float(w) for task, w in zip(self.tasks, self.weights.tolist(), strict=True)}
        for task, weight in weights.items():
            if task not in new:
                raise KeyError(f"{task!r} is not part of this score, which has {list(self.tasks)}")
            new[task] = float(weight)
        values = torch.tensor(list(new.values()))
        if not bool(torch.isfinite(values.abs().sum())) or not bool(values.any()):
            raise ValueError(f"a fused score needs finite weights and at least one that is not 0: {new}")
        self.check(values)
        self.weights.copy_(values)

    def check(self, weights: torch.Tensor) -> None:
        """Raise ValueError if these weights (n,) give no score."""


def signed_mean(columns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(Σ wᵢ xᵢ + Σ|w⁻|) / Σ|w|: in [0, 1] for x in [0, 1], rising with xᵢ where wᵢ > 0 and falling where wᵢ < 0.

    Args:
        columns: (B, n) in [0, 1].
        weights: (n,), not all 0.

    Example:
        >>> signed_mean(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, -3.0]))
        tensor([1.])
    """
    total = (columns * weights).sum(1) - weights.clamp(max=0).sum()
    return (total / weights.abs().sum()).clamp(0, 1)


def options_by_task(what: str, given: Mapping[str, float], tasks: tuple[str, ...], default: float) -> torch.Tensor:
    """(n,) an option's value for each task.

    Raises:
        ValueError: it names a task that is none of these.

    Example:
        >>> options_by_task("thresholds", {"like": 0.1}, ("click", "like"), 0.5)
        tensor([0.5000, 0.1000])
    """
    for task in given:
        if task not in tasks:
            raise ValueError(f"{what}: {task!r} is not part of this score{nearest(task, tasks)}")
    return torch.tensor([float(given.get(task, default)) for task in tasks])


def fuse(fused_score: nn.Module, parts: Parts, context: RowContext) -> torch.Tensor:
    """Scores (B,) of a fused score, which is given the context only if it says ``needs_context = True``.

    Args:
        fused_score: a module of the signature in `mtcl_torchrec.modules.fusion`.
        parts: task name -> (B,) in [0, 1].
        context: of the same rows.

    Example:
        >>> from mtcl_torchrec import WeightedMean
        >>> rows = RowContext(torch.zeros(1, 0), {})
        >>> fuse(WeightedMean({"click": 1.0, "like": 3.0}), {"click": torch.ones(1), "like": torch.zeros(1)}, rows)
        tensor([0.2500])
    """
    if getattr(fused_score, "needs_context", False):
        return fused_score(parts, context)
    return fused_score(parts)


def contributions(fused_score: nn.Module, parts: Parts, context: RowContext) -> dict[str, torch.Tensor] | None:
    """What each task adds to the score, task -> (B,); None where the fused score has no additive explanation.

    One of your own may have a method ``contributions(parts, context)``.

    Args:
        fused_score, parts, context: as in `fuse`.

    Example:
        >>> from mtcl_torchrec import WeightedMean
        >>> rows = RowContext(torch.zeros(1, 0), {})
        >>> of = contributions(WeightedMean({"click": 1.0, "hide": -3.0}), {"click": torch.ones(1),
        ...                    "hide": torch.tensor([0.2])}, rows)
        >>> {task: round(value.item(), 4) for task, value in of.items()}
        {'click': 0.25, 'hide': -0.15}
    """
    explain = getattr(fused_score, "contributions", None)
    return None if explain is None else explain(parts, context)
