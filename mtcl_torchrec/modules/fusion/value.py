"""The expected value of what may happen: a sum over events of value · number of the item · probability of the chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from mtcl_torchrec.modules.fusion.contract import Parts, RowContext, Weighted, options_by_task
from mtcl_torchrec.schema import nearest

LARGEST = 1e30  # a number of an item beyond it counts as this, so that no value is infinite


class DenseNumber(NamedTuple):
    """A number of the item in its own unit, such as a price, found again in a dense column that was transformed,
    standardised and clipped for the model.

    A value beyond the clip reads as the clip, a missing one as the mean (of the transformed values).

    Args:
        column: which dense column.
        mean, std: of the transformed values.
        transform: ``"none"``, ``"log"`` or ``"logit"``, see `mtcl_torchrec.Feature`.
        name: of the dense feature, where it has one.

    Example:
        >>> price = DenseNumber(0, mean=0.0, std=2.0, transform="log")
        >>> price.read(torch.tensor([[0.5 * torch.log(torch.tensor(101.0))]]))  # log(1 + 100) standardised
        tensor([100.0000])
    """

    column: int
    mean: float = 0.0
    std: float = 1.0
    transform: str = "none"
    name: str = ""

    def read(self, dense_features: torch.Tensor) -> torch.Tensor:
        """(B,) in its own unit, from the dense features (B, D)."""
        return self.undo(dense_features[:, self.column] * self.std + self.mean)

    def undo(self, transformed: torch.Tensor) -> torch.Tensor:
        """What was transformed."""
        if self.transform == "log":
            return torch.sign(transformed) * torch.expm1(transformed.abs())
        return torch.sigmoid(transformed) if self.transform == "logit" else transformed

    @property
    def typical(self) -> float:
        """The number of the mean."""
        return float(self.undo(torch.tensor(self.mean, dtype=torch.float64)))


def amounts_of(numbers: Mapping[str, DenseNumber], dense_features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Task -> (N,) float64, at least 0: the number of each row's item that the value of the task's event is multiplied
    by.

    Args:
        numbers: by task.
        dense_features: (N, D) as the model takes them.

    Example:
        >>> amounts_of({"buy": DenseNumber(0, mean=10.0, std=2.0)}, torch.tensor([[-6.0], [1.0]]))["buy"].tolist()
        [0.0, 12.0]
    """
    return {task: number.read(dense_features.double()).clamp(0, LARGEST) for task, number in numbers.items()}


class ExpectedValue(Weighted):
    """V = Σ wᵢ nᵢ Pᵢ, the expected value of showing an item: wᵢ is what event i is worth, Pᵢ its probability, nᵢ
    a number of the item (its price), or 1.

    The score is a map of v = V / Σ|w|, which has no upper bound where there is a price, into [0, 1]: ``v / (scale +
    v)`` where no weight is negative, ``½ (1 + v / (scale + |v|))`` where one is.  It keeps the order of V, as long as
    weights and scale stay the same; an item worth the scale scores ½ (¾).  Far beyond the scale float32 tells values
    apart no better than in steps of v² / scale · 10⁻⁷.

    Args:
        weights: task name -> value of its event; negative for a loss.
        given: task -> the task whose event must happen first, where the task's prediction is the probability *given*
            that (labels that count only there, `Task.mask`): ``{"buy": "click"}`` makes P(buy) = P(click) P(buy |
            click).  A task that was declared with `Task.after` predicts the probability of both already.
        numbers: task -> the number of the item that its value is multiplied by; below 0 it counts as 0.
        scale: the v that scores in the middle; None takes the typical size of v: the mean of Σ |wᵢ| nᵢ / Σ|w| at each
            number's typical value, for probabilities of 1.

    Raises:
        ValueError: weights that give no score, a `given` that names no task of this score or runs in a circle, numbers
            of a task without weight, or a scale that is not above 0.

    Example:
        >>> fused = ExpectedValue({"click": 0.0, "buy": 1.0}, given={"buy": "click"}, numbers={"buy": DenseNumber(0)},
        ...                       scale=10.0)
        >>> rows = RowContext(torch.tensor([[100.0], [50.0]]), {})  # prices
        >>> fused({"click": torch.tensor([0.5, 0.5]), "buy": torch.tensor([0.2, 0.6])}, rows)  # worth 10 and 15
        tensor([0.5000, 0.6000])
    """

    scale: torch.Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        given: Mapping[str, str] | None = None,
        numbers: Mapping[str, DenseNumber] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(weights)
        self.numbers = dict(numbers or {})
        options_by_task("numbers", dict.fromkeys(self.numbers, 1.0), self.tasks, 1.0)
        self.chains = {task: _chain(task, dict(given or {}), self.tasks) for task in self.tasks}
        self.needs_context = bool(self.numbers)
        self.set_weights(weights)
        if scale is None:
            typical = torch.tensor([self.numbers[t].typical if t in self.numbers else 1.0 for t in self.tasks])
            scale = float((self.weights.abs() * typical.clamp(0, LARGEST)).sum() / self.weights.abs().sum()) or 1.0
        if not 0 < scale < float("inf"):
            raise ValueError(f"the scale of an expected value is above 0, not {scale}")
        self.register_buffer("scale", torch.tensor(float(scale)))

    def _values(self, parts: Parts, context: RowContext | None) -> torch.Tensor:
        """(B, n): wᵢ nᵢ Pᵢ / Σ|w|."""
        columns = []
        for task, chain in self.chains.items():
            value = torch.stack([parts[event] for event in chain], dim=1).prod(1)
            if task in self.numbers:
                if context is None:
                    raise ValueError(f"the value of {task!r} needs a number of the item, and there is no context")
                value = value * self.numbers[task].read(context.dense_features).clamp(0, LARGEST)
            columns.append(value)
        return torch.stack(columns, dim=1) * self.weights / self.weights.abs().sum()

    def forward(self, parts: Parts, context: RowContext | None = None) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        value = self._values(parts, context).sum(1)
        bounded = value / (self.scale + value.abs())
        return torch.where((self.weights < 0).any(), (1 + bounded) / 2, bounded).clamp(0, 1)

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor]:
        """wᵢ nᵢ Pᵢ / Σ|w|; v is their sum."""
        return self.by_task(self._values(parts, context))


def _chain(task: str, given: dict[str, str], tasks: tuple[str, ...]) -> tuple[str, ...]:
    """A task and the tasks whose events must happen before its own."""
    for name in (*given, *given.values()):
        if name not in tasks:
            raise ValueError(f"given: {name!r} has no weight{nearest(name, tasks)}; one of 0 will do")
    chain = [task]
    while chain[-1] in given:
        chain.append(given[chain[-1]])
        if chain[-1] in chain[:-1]:
            raise ValueError(f"given: {' after '.join(repr(name) for name in chain)} runs in a circle")
    return tuple(chain)
