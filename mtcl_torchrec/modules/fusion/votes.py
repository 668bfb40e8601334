"""Scores that count votes: over thresholds, or over where an item stands among the candidates of its request.

Those that compare the candidates of a request (`TopKVoting`, `Borda`, `ReciprocalRankFusion`) say nothing about
anything else: their scores are not comparable between requests, and all candidates of a request must be scored
together.  They do not change with the candidates of *other* requests, nor with the order of the rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch

from mtcl_torchrec.modules.fusion.contract import Parts, RowContext, Weighted, options_by_task, signed_mean
from mtcl_torchrec.modules.fusion.standings import kth_largest, standings


class _Votes(Weighted):
    """The weighted mean of what each task says, a vote in [0, 1]."""

    @abstractmethod
    def votes(self, columns: torch.Tensor, request: torch.Tensor | None) -> torch.Tensor:
        """(B, n) in [0, 1] from the parts (B, n)."""

    def forward(self, parts: Parts, context: RowContext | None = None) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        return signed_mean(self._votes(parts, context), self.weights)

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor]:
        """wᵢ voteᵢ / Σ|w|; the score is their sum and the constant Σ|w⁻| / Σ|w|."""
        return self.by_task(self._votes(parts, context) * self.weights / self.weights.abs().sum())

    def _votes(self, parts: Parts, context: RowContext | None) -> torch.Tensor:
        return self.votes(self.stacked(parts), None if context is None else context.request)


class HardVoting(_Votes):
    """The weighted share of tasks whose part reaches its threshold; a task of negative weight votes against.

    Items with the same votes tie.  Its gradient is zero everywhere.

    Args:
        weights: task name -> weight.
        thresholds: task name -> threshold; 0.5 where it is left out.

    Raises:
        ValueError: weights that give no score, a threshold outside [0, 1] or of no task of the score.

    Example:
        >>> fused = HardVoting({"click": 1.0, "like": 3.0}, thresholds={"like": 0.1})
        >>> fused({"click": torch.tensor([0.4, 0.5]), "like": torch.tensor([0.2, 0.05])})
        tensor([0.7500, 0.2500])
    """

    differentiable = False
    thresholds: torch.Tensor

    def __init__(self, weights: Mapping[str, float], *, thresholds: Mapping[str, float] | None = None) -> None:
        super().__init__(weights)
        self.set_weights(weights)
        self.register_buffer("thresholds", options_by_task("thresholds", thresholds or {}, self.tasks, 0.5))
        if not bool(((self.thresholds >= 0) & (self.thresholds <= 1)).all()):
            raise ValueError(f"thresholds lie between 0 and 1: {self.thresholds.tolist()}")

    def votes(self, columns: torch.Tensor, request: torch.Tensor | None) -> torch.Tensor:
        """1 from the threshold on, else 0."""
        return (columns >= self.thresholds).to(columns.dtype)


class SoftVoting(HardVoting):
    """Votes of σ((p - threshold) / temperature): `HardVoting` for a temperature towards 0.

    The score rises with a part of positive weight and falls with one of negative weight.

    Args:
        weights, thresholds: as of `HardVoting`.
        temperature: above 0.

    Raises:
        ValueError: as `HardVoting`, or a temperature that is not above 0.

    Example:
        >>> fused = SoftVoting({"click": 1.0}, thresholds={"click": 0.3}, temperature=0.1)
        >>> fused({"click": torch.tensor([0.3, 0.5])})
        tensor([0.5000, 0.8808])
    """

    differentiable = True
    temperature: torch.Tensor

    def __init__(
        self, weights: Mapping[str, float], *, thresholds: Mapping[str, float] | None = None, temperature: float = 0.1
    ) -> None:
        super().__init__(weights, thresholds=thresholds)
        self.register_buffer("temperature", torch.tensor(_above_zero(temperature)))

    def votes(self, columns: torch.Tensor, request: torch.Tensor | None) -> torch.Tensor:
        """In (0, 1), ½ at the threshold."""
        return torch.sigmoid((columns - self.thresholds) / self.temperature)


class TopKVoting(_Votes):
    """The weighted share of tasks that have the item among the k best of its request.

    An item is among them if fewer than k candidates of the request have a higher part, so that ties are all in.  With a
    `temperature` the vote is σ((p - t) / temperature) instead, t lying half way between the request's k-th and (k+1)-th
    highest part: the hard vote for a temperature towards 0, apart from ties across that border, which have ½.  Where a
    request has no more than k candidates, all of them are in.

    Args:
        weights: task name -> weight; a task of negative weight votes against its k highest.
        k: how many.
        temperature: above 0; None is the hard vote, which has no gradient.

    Raises:
        ValueError: weights that give no score, k below 1, or a temperature that is not above 0.

    Example:
        >>> fused = TopKVoting({"click": 1.0, "like": 1.0}, k=1)
        >>> rows = RowContext(torch.zeros(3, 0), {}, request=torch.tensor([5, 5, 6]))
        >>> fused({"click": torch.tensor([0.4, 0.5, 0.1]), "like": torch.tensor([0.2, 0.2, 0.1])}, rows)
        tensor([0.5000, 1.0000, 1.0000])
    """

    needs_context = True
    within_request = True
    k: torch.Tensor
    temperature: torch.Tensor | None

    def __init__(self, weights: Mapping[str, float], *, k: int = 10, temperature: float | None = None) -> None:
        super().__init__(weights)
        self.set_weights(weights)
        if k < 1:
            raise ValueError(f"k is at least 1, not {k}")
        self.register_buffer("k", torch.tensor(int(k)))
        soft = temperature is not None
        self.register_buffer("temperature", torch.tensor(_above_zero(temperature)) if soft else None)
        self.differentiable = soft

    def votes(self, columns: torch.Tensor, request: torch.Tensor | None) -> torch.Tensor:
        """1 for the k highest of the request; smooth with a temperature."""
        if self.temperature is None:
            return (standings(columns, request).higher < self.k).to(columns.dtype)
        border = (kth_largest(columns, request, self.k) + kth_largest(columns, request, self.k + 1)) / 2
        in_any_case = standings(columns, request).size <= self.k
        return torch.where(in_any_case, 1.0, torch.sigmoid((columns - border) / self.temperature))


class Borda(_Votes):
    """Borda's count: a task gives an item the share of the other candidates of its request that it puts below it.

    A tie counts half.  The only candidate of a request gets ½.  A negative weight turns the task's ranking round.  Its
    gradient is zero everywhere.

    Args:
        weights: task name -> weight.

    Raises:
        ValueError: weights that give no score.

    Example:
        >>> rows = RowContext(torch.zeros(3, 0), {})
        >>> Borda({"click": 1.0})({"click": torch.tensor([0.1, 0.9, 0.2])}, rows)
        tensor([0.0000, 1.0000, 0.5000])
    """

    needs_context = True
    within_request = True
    differentiable = False

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.set_weights(weights)

    def votes(self, columns: torch.Tensor, request: torch.Tensor | None) -> torch.Tensor:
        """1 for the best of a request, 0 for the worst."""
        found = standings(columns, request)
        points = (found.size - found.rank) / (found.size - 1).clamp(min=1)
        return torch.where(found.size > 1, points, 0.5).to(columns.dtype)


class ReciprocalRankFusion(_Votes):
    """Σ wᵢ (k + 1) / (k + rankᵢ) / Σ|w|, the rank being that within the request, from 1 (Cormack et al., SIGIR 2009).

    Ties share the mean of their ranks.  A negative weight takes its term away instead.  Its gradient is zero
    everywhere.

    Args:
        weights: task name -> weight.
        k: the larger, the less the first places stand out; 60 in the paper.

    Raises:
        ValueError: weights that give no score, or k below 0.

    Example:
        >>> rows = RowContext(torch.zeros(2, 0), {})
        >>> ReciprocalRankFusion({"click": 1.0}, k=1)({"click": torch.tensor([0.1, 0.9])}, rows)
        tensor([0.6667, 1.0000])
    """

    needs_context = True
    within_request = True
    differentiable = False
    k: torch.Tensor

    def __init__(self, weights: Mapping[str, float], *, k: float = 60) -> None:
        super().__init__(weights)
        self.set_weights(weights)
        if not 0 <= k < float("inf"):
            raise ValueError(f"k is at least 0, not {k}")
        self.register_buffer("k", torch.tensor(float(k)))

    def votes(self, columns: torch.Tensor, request: torch.Tensor | None) -> torch.Tensor:
        """1 for the best of a request."""
        return ((self.k + 1) / (self.k + standings(columns, request).rank)).to(columns.dtype)


def _above_zero(temperature: float | None) -> float:
    if temperature is None or not 0 < temperature < float("inf"):
        raise ValueError(f"a temperature is above 0, not {temperature}")
    return float(temperature)
