"""Scores with parameters of their own, learnt from what a row was worth (`FusedLoss`) or fitted after training.

What they learn in joint training, they learn from predictions *before* calibration, which is fitted when training is
over; the model then gives them calibrated ones.  Where a run calibrates, fit them afterwards (``mtcl fuse``,
`mtcl_torchrec.fusing.learned`): on the parts that they will be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.fusion.contract import FusedScore, Parts, RowContext, Weighted
from mtcl_torchrec.schema import nearest

EPSILON = 1e-6
LARGEST = 14.0  # no log-odds of a part are larger


def log_odds(parts: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p moved into [10⁻⁶, 1 - 10⁻⁶], so that 0 and 1 have a gradient and their order stays.

    Example:
        >>> log_odds(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-13.8155,   0.0000,  13.8155])
    """
    inner = 1 - 2 * EPSILON
    return torch.log(EPSILON + inner * parts) - torch.log(EPSILON + inner * (1 - parts))


class Stacking(FusedScore):
    """σ(b + Σ wᵢ logit(pᵢ)): a logistic regression on the log-odds of the (calibrated) parts (Wolpert, *Stacked
    generalization*, 1992).

    The score rises with a part whose coefficient is positive, and falls where it is negative; learning may change their
    signs.  Of a multiclass or regression task it takes the log-odds of the part in [0, 1].

    Args:
        weights: task name -> the coefficient to begin with.
        bias: to begin with.

    Raises:
        ValueError: no task, or a number that is not finite.

    Example:
        >>> fused = Stacking({"click": 1.0, "like": 1.0})
        >>> fused({"click": torch.tensor([0.5]), "like": torch.tensor([0.9])}).detach()
        tensor([0.9000])
    """

    def __init__(self, weights: Mapping[str, float], *, bias: float = 0.0) -> None:
        super().__init__()
        if not weights:
            raise ValueError("stacking needs a task at least")
        self.tasks = tuple(weights)
        self.weights = nn.Parameter(torch.zeros(len(self.tasks)))
        self.bias = nn.Parameter(torch.zeros(()))
        self.set_weights(weights, bias=bias)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, float], *, bias: float | None = None) -> None:
        """Replace the coefficients of some or all tasks, and the bias where it is given.

        Raises:
            KeyError: a task that is not part of this score.
            ValueError: a number that is not finite.
        """
        new = dict(zip(self.tasks, self.weights.tolist(), strict=True))
        for task, weight in weights.items():
            if task not in new:
                raise KeyError(f"{task!r} is not part of this score, which has {list(self.tasks)}")
            new[task] = float(weight)
        values = torch.tensor([*new.values(), self.bias.item() if bias is None else float(bias)])
        if not bool(torch.isfinite(LARGEST * values.abs().sum())):
            raise ValueError(f"coefficients are finite, and so is their sum: {values.tolist()}")
        self.weights.copy_(values[:-1])
        self.bias.copy_(values[-1])

    def forward(self, parts: Parts) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        return torch.sigmoid((self.weights * log_odds(self.stacked(parts))).sum(1) + self.bias)

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor]:
        """wᵢ logit(pᵢ); the log-odds of the score are their sum and the bias."""
        return self.by_task((self.weights * log_odds(self.stacked(parts))).detach())


class MonotoneNetwork(FusedScore):
    """A network that is never lower when a task rises that speaks for an item, nor higher when one rises that speaks
    against it, whatever it has learnt.

    Log-odds of the parts, turned round where the sign is negative, go through layers whose weights are all positive
    (softplus of their parameters).  Half of each layer's units are convex and half concave (ELU and its point
    reflection), without which only convex functions could be learnt (Runje and Shankaranarayana, *Constrained
    Monotonic Neural Networks*, ICML 2023).

    Args:
        signs: task name -> 1 (or any positive number), or -1.
        hidden: widths of the hidden layers; none is a stacking with signs.

    Raises:
        ValueError: no task, a sign of 0, or a width below 1.

    Example:
        >>> fused = MonotoneNetwork({"click": 1, "report": -1}, hidden=[4])
        >>> low, high = fused({"click": torch.tensor([0.1, 0.2]), "report": torch.tensor([0.5, 0.4])}).tolist()
        >>> low < high
        True
    """

    signs: torch.Tensor

    def __init__(self, signs: Mapping[str, float], *, hidden: Sequence[int] = (16,)) -> None:
        super().__init__()
        self.tasks = tuple(signs)
        if not signs or not all(float(sign) and abs(float(sign)) < float("inf") for sign in signs.values()):
            raise ValueError(f"a monotone network needs a task at least, and a sign of 1 or -1 for each: {dict(signs)}")
        if not all(width >= 1 for width in hidden):
            raise ValueError(f"a hidden layer has a unit at least: {list(hidden)}")
        self.register_buffer("signs", torch.tensor([1.0 if sign > 0 else -1.0 for sign in signs.values()]))
        widths = [len(self.tasks), *hidden, 1]
        self.weights = nn.ParameterList(_positive(*shape) for shape in pairwise(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths[1:])

    def forward(self, parts: Parts) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        x = self.signs * log_odds(self.stacked(parts))
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer:
                convex = x.shape[1] - x.shape[1] // 2
                x = torch.cat([F.elu(x[:, :convex]), -F.elu(-x[:, convex:])], dim=1)
            x = x @ F.softplus(weight) + bias
        return torch.sigmoid(x.squeeze(1))


def _positive(inputs: int, outputs: int) -> nn.Parameter:
    """(inputs, outputs) parameters whose softplus lies around 1 / inputs."""
    target = (0.5 + torch.rand(inputs, outputs)) / inputs
    return nn.Parameter(torch.log(torch.expm1(target)))


class ContextGatedMean(Weighted):
    """A value model whose weights vary with user and context: Σ aᵢ(x) qᵢ, aᵢ = softmaxᵢ(log|wᵢ| + gᵢ(x)).

    qᵢ = pᵢ, or 1 - pᵢ where the weight wᵢ is negative.  g is a network of one hidden layer on the pooled embeddings
    of some features and on some dense columns; it starts at 0, so that the score starts as `WeightedMean` of w.  For
    one and the same context the score rises with a part of positive weight and falls with one of negative weight.  It
    reads the embeddings and does not train them.

    Args:
        weights: task name -> weight, whose sign stays; one of 0 keeps the task out.
        features: key of a pooled embedding (a sparse feature's name) -> its width.
        dense_columns: numbers of the dense columns that it reads.
        hidden: width of the hidden layer.

    Raises:
        ValueError: weights that give no score, or nothing to read.

    Example:
        >>> fused = ContextGatedMean({"click": 1.0, "like": 3.0}, features={"hour": 4})
        >>> rows = RowContext(torch.zeros(1, 0), {"hour": torch.randn(1, 4)})
        >>> fused({"click": torch.ones(1), "like": torch.zeros(1)}, rows).detach()
        tensor([0.2500])
    """

    needs_context = True
    dense_columns: torch.Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        features: Mapping[str, int] | None = None,
        dense_columns: Sequence[int] = (),
        hidden: int = 16,
    ) -> None:
        super().__init__(weights)
        self.set_weights(weights)
        self.features = dict(features or {})
        width = sum(self.features.values()) + len(dense_columns)
        if not width:
            raise ValueError("a context-gated mean needs features or dense columns to read")
        self.register_buffer("dense_columns", torch.tensor(list(dense_columns), dtype=torch.int64))
        self.hidden = nn.Linear(width, hidden)
        self.gate = nn.Linear(hidden, len(self.tasks))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def shares(self, context: RowContext) -> torch.Tensor:
        """(B, n): the tasks' shares a in the score, which add up to 1 in each row.

        Raises:
            ValueError: the context lacks a feature that the gate reads.
        """
        for key in self.features:
            if key not in context.embeddings:
                raise ValueError(f"no pooled embedding {key!r} in the context{nearest(key, context.embeddings)}")
        read = [context.embeddings[key] for key in self.features]
        read.append(context.dense_features.index_select(1, self.dense_columns))
        x = torch.cat([t.to(self.hidden.weight.dtype) for t in read], dim=1)
        of_context = self.gate(torch.relu(self.hidden(x)))
        return torch.softmax(torch.log(self.weights.abs()) + of_context, dim=1)

    def forward(self, parts: Parts, context: RowContext) -> torch.Tensor:
        """Scores (B,) in [0, 1] from each task's part (B,) in [0, 1]."""
        p = self.stacked(parts)
        return (self.shares(context) * torch.where(self.weights < 0, 1 - p, p)).sum(1).clamp(0, 1)

    def contributions(self, parts: Parts, context: RowContext | None = None) -> dict[str, torch.Tensor]:
        """aᵢ pᵢ, with a minus sign for a negative weight; the score is their sum and the row's Σ aᵢ of the negative
        ones.

        Raises:
            ValueError: there is no context.
        """
        if context is None:
            raise ValueError("the shares of a context-gated mean follow from the context")
        return self.by_task((self.shares(context) * self.stacked(parts) * torch.sign(self.weights)).detach())
