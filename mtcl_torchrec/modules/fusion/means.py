"""Scores that are a mean or a product of the tasks' parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mtcl_torchrec.modules.fusion.contract import Parts, RowContext, Weighted, options_by_task, signed_mean


class WeightedMean(Weighted):
    """The weighted mean of the tasks' parts (a value model); a negative weight lowers the score (a report, a hide).

    With s = Σ wᵢ pᵢ the score is (s + Σ|w⁻|) / Σ|w|, which is in [0, 1] and for positive weights the plain weighted
    mean.  It keeps the order of s.  A row's score depends on that row alone, never on who else is in the batch.

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

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.set_weights(weights)

    def forward(self, parts: Parts) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        return signed_mean(self.stacked(parts), self.weights)

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor]:
        """wᵢ pᵢ / Σ|w|; the score is their sum and the constant Σ|w⁻| / Σ|w|."""
        return self.by_task(self.stacked(parts) * self.weights / self.weights.abs().sum())


class WeightedGeometricMean(Weighted):
    """∏ qᵢ^(|wᵢ| / Σ|w|), a log-linear score: qᵢ = pᵢ, and 1 - pᵢ where the weight is negative.

    An item that one task speaks against is not saved by the others, as it is in the arithmetic mean, and a task's scale
    (all its parts halved) changes no order.  So that a part of exactly 0 has a gradient, and the others still count
    then, qᵢ is raised to ``floor + (1 - floor) qᵢ``.  The score rises with each part of positive weight and falls with
    the others, and lies in [floor, 1].

    Args:
        weights: task name -> weight.
        floor: in (0, 1).

    Raises:
        ValueError: weights that give no score, or a floor outside (0, 1).

    Example:
        >>> fused = WeightedGeometricMean({"click": 1.0, "like": 1.0})
        >>> fused({"click": torch.tensor([0.9]), "like": torch.tensor([0.4])})
        tensor([0.6000])
    """

    floor: torch.Tensor

    def __init__(self, weights: Mapping[str, float], *, floor: float = 1e-6) -> None:
        super().__init__(weights)
        if not 0 < floor < 1:
            raise ValueError(f"the floor of a geometric mean lies between 0 and 1, not at {floor}")
        self.set_weights(weights)
        self.register_buffer("floor", torch.tensor(float(floor)))

    def _logs(self, parts: Parts) -> torch.Tensor:
        """(B, n): |wᵢ| log qᵢ / Σ|w|."""
        p, inner = self.stacked(parts), 1 - self.floor
        # log1p keeps what 1 - p would round away.
        logs = torch.where(self.weights < 0, torch.log1p(-inner * p), torch.log(self.floor + inner * p))
        return self.weights.abs() * logs / self.weights.abs().sum()

    def forward(self, parts: Parts) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        return torch.exp(self._logs(parts).sum(1)).clamp(0, 1)

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor]:
        """|wᵢ| log qᵢ / Σ|w|, each at most 0; the logarithm of the score is their sum."""
        return self.by_task(self._logs(parts))


class PowerProduct(Weighted):
    """∏ (bᵢ + wᵢ pᵢ)^βᵢ, as short-video feeds fuse their predictions, moved and scaled from its range to [0, 1].

    It keeps the order of the product: the score rises with a part where wᵢ βᵢ > 0 and falls where wᵢ βᵢ < 0.  A report
    that should weigh 60 is ``weights={"report": 60}, exponents={"report": -1}``.

    Args:
        weights: task name -> w; b + w must be above 0.
        bases: task name -> b > 0; 1 where it is left out.
        exponents: task name -> β; 1 where it is left out.

    Raises:
        ValueError: a base, weight or exponent that gives no score.

    Example:
        >>> fused = PowerProduct({"click": 1.0, "like": 3.0}, exponents={"like": 2.0})
        >>> fused({"click": torch.tensor([0.0, 1.0]), "like": torch.tensor([0.0, 1.0])})
        tensor([0., 1.])
    """

    bases: torch.Tensor
    exponents: torch.Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        bases: Mapping[str, float] | None = None,
        exponents: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weights)
        self.register_buffer("bases", options_by_task("bases", bases or {}, self.tasks, 1.0))
        self.register_buffer("exponents", options_by_task("exponents", exponents or {}, self.tasks, 1.0))
        if not bool((self.bases > 0).all()) or not bool(torch.isfinite(self.bases).all()):
            raise ValueError(f"bases are above 0: {self.bases.tolist()}")
        if not bool(torch.isfinite(self.exponents).all()):
            raise ValueError(f"exponents are finite: {self.exponents.tolist()}")
        self.set_weights(weights)

    def check(self, weights: torch.Tensor) -> None:
        """See that each factor is above 0, and that some factor varies.

        Raises:
            ValueError: they do not; naming the task.
        """
        for task, base, weight in zip(self.tasks, self.bases.tolist(), weights.tolist(), strict=True):
            if base + weight <= 0:
                raise ValueError(
                    f"weight {weight:g} of task {task!r}: with base {base:g} its factor would not stay above 0; what "
                    "lowers the score has a positive weight and a negative exponent"
                )
        if not bool((weights * self.exponents).any()):
            raise ValueError("a fused score needs at least one task whose weight and exponent are not 0")
        span = (self.exponents * (torch.log(self.bases + weights) - torch.log(self.bases))).abs().sum().item()
        if not 0 < span < float("inf"):
            numbers = (f"{name} {of.tolist()}" for name, of in (("weights", weights), ("exponents", self.exponents)))
            raise ValueError(
                f"the logarithm of the product runs over {span:g}, which orders nothing: {', '.join(numbers)}"
            )

    def _logs(self, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, n) logarithms of the factors, each relative to its least; and () that of the greatest product."""
        at_zero = self.exponents * torch.log(self.bases)
        at_one = self.exponents * torch.log(self.bases + self.weights)
        logs = self.exponents * torch.log(self.bases + self.weights * self.stacked(parts))
        return logs - torch.minimum(at_zero, at_one), (at_zero - at_one).abs().sum()

    def forward(self, parts: Parts) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        logs, whole = self._logs(parts)
        above = logs.sum(1)
        # (e^a - 1) / (e^whole - 1), for any size of both.
        score = torch.exp(above - whole) * torch.expm1(-above) / torch.expm1(-whole)
        return score.clamp(0, 1)

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor]:
        """βᵢ log(bᵢ + wᵢ pᵢ) above its least; the product is, in its logarithm, their sum above the least product."""
        return self.by_task(self._logs(parts)[0])
