"""Weights of the tasks' losses that follow the losses themselves, instead of standing fixed in the weighted sum.

Each class here is a function S of the tasks' values vᵢ = (declared weight)ᵢ · Lᵢ of the *global* batch, with a state of
its own.  `MultiTaskLoss` calls it with the values that one all-reduce has made the same on every rank, and trains the
model with wᵢ = ∂S/∂vᵢ: weights and state are equal on all ranks without further communication.

What holds for all of them:

- A task without a label in a batch is left out of it: weight 0, and nothing is learnt about it.  A skipped batch (a
  loss that is not finite) leaves the state as it was.  Evaluation reads the state and never changes it.
- A weight is held within a factor `max_factor` of what all tasks would get if they were equal, and the steps in which
  it had to be are counted.  It guards the rest of the model from one task whose loss comes close to 0.
- S is invariant, up to a common factor, to the scale of a loss under uncertainty weighting, IMTL-L, FAMO and the
  geometric mean: **the declared weights of the tasks cancel out there**.  They count under the other two.
- Losses of this package are never negative.  Where S takes a logarithm, a value below 0 counts as 0, and 0 as 1e-8.

The default is none of these but the weighted sum, for good reason: the gains that papers report over a weighted sum
that was tuned as long are small where they can be repeated at all.

TorchJD (`pip install 'mtcl_torchrec[balance]'`) computes S where its classes hold under DDP and in checkpoints: `UW`,
`IMTLL` (their parameters are ordinary ones) and `STCH` (no state).  Its `DWA` and `FAMO` keep their state in plain
attributes that no checkpoint sees, and FAMO steps an optimizer of its own on a parameter which DDP would find unused;
its `GeometricMean` looks for negative values on the host, which waits for the device in every step.  Those three are
written here, in buffers, and equal TorchJD's in the tests.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

EPSILON = 1e-8  # below it, losses are not told apart by logarithms and ratios
MEMORY = 0.01  # of the moving averages that are reported: about the last hundred batches
_LARGEST_RATE = 100.0  # of DWA: a loss that was nearly 0 and came back


def _torchjd() -> Any:
    try:
        from torchjd import scalarization
    except ImportError:
        raise ImportError("this loss weighting needs torchjd: pip install 'mtcl_torchrec[balance]'") from None
    return scalarization


class LossWeighting(nn.Module):
    """Base of the weightings: a subclass says what S is, and what it learns from a batch.

    Attributes:
        title: its name in a sentence.
        scale_free: whether the declared weights of the tasks cancel out.
        mean_weights: (T,) moving averages of the weights, over the batches that had the task.
        seen, clamped: (T,) int64, number of training batches that had the task, and in how many its weight was held.

    Args:
        num_tasks: T.
        neutral: weight of each of T equal tasks.
        max_factor: weights are held within [neutral / max_factor, neutral · max_factor].
        lr: learning rate of its parameters; None is that of the dense optimizer.  They have no weight decay.

    Raises:
        ValueError: `max_factor` is below 1.
    """

    title = "the loss weighting"
    scale_free = False
    mean_weights: torch.Tensor
    seen: torch.Tensor
    clamped: torch.Tensor

    def __init__(self, num_tasks: int, *, neutral: float, max_factor: float = 100.0, lr: float | None = None) -> None:
        super().__init__()
        if max_factor < 1:
            raise ValueError(f"max_factor is at least 1, not {max_factor}")
        self.num_tasks, self.lr = num_tasks, lr
        self.lowest, self.highest = neutral / max_factor, neutral * max_factor
        self.register_buffer("mean_weights", torch.full((num_tasks,), neutral))
        self.register_buffer("seen", torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("clamped", torch.zeros(num_tasks, dtype=torch.int64))

    @abstractmethod
    def scalarize(self, values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """S, () float32, differentiable in `values` and free of those that are not active.

        Args:
            values: (T,) float32; any finite number where a task is not active.
            active: (T,) bool.
        """

    def observe(self, values: torch.Tensor, active: torch.Tensor) -> None:
        """Learn from a training batch, before its weights are computed.  Called without gradients; nothing active means
        that the batch does not count.
        """

    def forward(self, values: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """S and the weights of one global batch.

        Args:
            values: (T,) float32, detached, the same on every rank.
            active: (T,) bool: which tasks have a label in it; none in a batch that is skipped.

        Returns:
            S (), which carries the gradient of learnable parameters, and w (T,) without gradient; w is 0 where a task
            is not active, and where no gradient is wanted.
        """
        values = torch.where(active, values.float(), 1.0)
        if self.training:
            with torch.no_grad():
                self.observe(values, active)
                self.seen += active
        if not torch.is_grad_enabled():
            return self.scalarize(values, active), torch.zeros_like(values)
        leaf = values.requires_grad_()
        combined = self.scalarize(leaf, active)
        (raw,) = torch.autograd.grad(combined, leaf, retain_graph=True)
        held = raw.clamp(self.lowest, self.highest)
        weights = torch.where(active, held, 0.0)
        if self.training:
            self._count(weights, active, active & (held != raw))
        return combined, weights

    @torch.no_grad()
    def _count(self, weights: torch.Tensor, active: torch.Tensor, clamped: torch.Tensor) -> None:
        self.clamped += clamped
        share = (1 / self.seen.clamp(min=1)).clamp(min=MEMORY)  # a plain mean of the first batches
        self.mean_weights += torch.where(active, (weights - self.mean_weights) * share, 0.0)


class _Learned(LossWeighting):
    """S of a TorchJD scalarizer that has one parameter for each task."""

    scale_free = True

    def __init__(
        self, scalarizer: nn.Module, num_tasks: int, *, neutral: float, max_factor: float, lr: float | None
    ) -> None:
        super().__init__(num_tasks, neutral=neutral, max_factor=max_factor, lr=lr)
        self.scalarizer = scalarizer

    def scalarize(self, values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """See `LossWeighting.scalarize`."""
        # With value and parameter 0, a task's term and both its gradients are 0 in UW and in IMTL-L.
        parameters = {name: torch.where(active, p, 0.0) for name, p in self.scalarizer.named_parameters()}
        return functional_call(self.scalarizer, parameters, (torch.where(active, values, 0.0),))


class UncertaintyWeighting(_Learned):
    """Σ ½ e^(−sᵢ) vᵢ + ½ sᵢ with learnt log-variances sᵢ (Kendall et al., CVPR 2018), `torchjd.scalarization.UW`.

    The weight of a task that stays at loss v settles at 1 / (2 v).  Training the sᵢ is the dense optimizer's work.

    Args:
        num_tasks: T.
        lr: of the log-variances; None is the dense optimizer's.
        max_factor: see `LossWeighting`.

    Raises:
        ImportError: torchjd is not installed.

    Example:
        >>> weighting = UncertaintyWeighting(2)
        >>> combined, weights = weighting(torch.tensor([0.6, 0.2]), torch.tensor([True, True]))
        >>> weights
        tensor([0.5000, 0.5000])
    """

    title = "uncertainty weighting"

    def __init__(self, num_tasks: int, *, lr: float | None = None, max_factor: float = 100.0) -> None:
        super().__init__(_torchjd().UW(num_tasks), num_tasks, neutral=0.5, max_factor=max_factor, lr=lr)


class IMTLL(_Learned):
    """Σ e^(sᵢ) vᵢ − sᵢ with learnt scales sᵢ (IMTL-L; Liu et al., ICLR 2021), `torchjd.scalarization.IMTLL`.

    The weight of a task that stays at loss v settles at 1 / v: uncertainty weighting but for a factor of 2.

    Args:
        num_tasks: T.
        lr: of the scales; None is the dense optimizer's.
        max_factor: see `LossWeighting`.

    Raises:
        ImportError: torchjd is not installed.

    Example:
        >>> combined, weights = IMTLL(2)(torch.tensor([0.6, 0.2]), torch.tensor([True, False]))
        >>> weights
        tensor([1., 0.])
    """

    title = "IMTL-L"

    def __init__(self, num_tasks: int, *, lr: float | None = None, max_factor: float = 100.0) -> None:
        super().__init__(_torchjd().IMTLL(num_tasks), num_tasks, neutral=1.0, max_factor=max_factor, lr=lr)


class SmoothTchebycheff(LossWeighting):
    """μ log Σ exp(vᵢ / (T μ)): a smooth maximum of the values (Lin et al., ICML 2024), `torchjd.scalarization.STCH`.

    The declared weights are its preferences; its ideal point is 0.  A task whose value is far below the largest is held
    at 1 / max_factor of an equal share instead of at 0.

    Args:
        num_tasks: T.
        mu: μ; the smaller, the more the largest value alone counts.
        max_factor: see `LossWeighting`.

    Raises:
        ImportError: torchjd is not installed.
        ValueError: μ is not positive.

    Example:
        >>> combined, weights = SmoothTchebycheff(2)(torch.tensor([0.6, 0.2]), torch.tensor([True, True]))
        >>> (weights * 2).sum().round(decimals=4), bool(weights[0] > weights[1])
        (tensor(1.), True)
    """

    title = "smooth Tchebycheff"

    def __init__(self, num_tasks: int, *, mu: float = 0.1, max_factor: float = 100.0) -> None:
        super().__init__(num_tasks, neutral=1 / num_tasks**2, max_factor=max_factor)
        self.scalarizer = _torchjd().STCH(mu)

    def scalarize(self, values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """See `LossWeighting.scalarize`."""
        far_below = -1e30  # any other value is larger; an infinite one would make NaN where no task is active
        combined = self.scalarizer(torch.where(active, values, far_below))
        return torch.where(active.any(), combined, 0.0)


class GeometricMean(LossWeighting):
    """(Π vᵢ)^(1/n) over the n tasks that have a label (Chennupati et al., MultiNet++, CVPR workshops 2019).

    Args:
        num_tasks: T.
        max_factor: see `LossWeighting`.

    Example:
        >>> combined, weights = GeometricMean(2)(torch.tensor([0.9, 0.4]), torch.tensor([True, True]))
        >>> combined.detach(), weights
        (tensor(0.6000), tensor([0.3333, 0.7500]))
    """

    title = "the geometric mean"
    scale_free = True

    def __init__(self, num_tasks: int, *, max_factor: float = 100.0) -> None:
        super().__init__(num_tasks, neutral=1 / num_tasks, max_factor=max_factor)

    def scalarize(self, values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """See `LossWeighting.scalarize`."""
        logs = torch.where(active, _log(values), 0.0)
        return torch.where(active.any(), torch.exp(logs.sum() / active.sum().clamp(min=1)), 0.0)


class DWA(LossWeighting):
    """Dynamic weight average: Σ λᵢ vᵢ, λ = T softmax(r / temperature), rᵢ the ratio of a task's mean value in the last
    window to that in the one before (Liu et al., *End-to-End Multi-Task Learning with Attention*, CVPR 2019).

    The paper compares epochs.  A recommender is often trained in one or two, so a window is a number of batches here;
    for the paper's rule set it to the steps of an epoch.  A window without a label of a task leaves its ratio alone,
    and a task that has not met two windows counts as one whose loss stands still.

    Args:
        num_tasks: T.
        temperature: the larger, the more alike the weights.
        window: batches in a window; skipped ones do not count.
        max_factor: see `LossWeighting`.

    Raises:
        ValueError: the temperature is not positive, or the window is below 1.

    Example:
        >>> weighting, both = DWA(2, window=1), torch.tensor([True, True])
        >>> for values in ([1.0, 1.0], [0.9, 0.5], [0.8, 0.4]):
        ...     combined, weights = weighting(torch.tensor(values), both)
        >>> weights  # the first fell to 0.9 of what it was, the second to 0.5
        tensor([1.0997, 0.9003])
    """

    title = "DWA"
    total: torch.Tensor
    count: torch.Tensor
    newer: torch.Tensor
    older: torch.Tensor
    windows: torch.Tensor
    batches: torch.Tensor

    def __init__(
        self, num_tasks: int, *, temperature: float = 2.0, window: int = 200, max_factor: float = 100.0
    ) -> None:
        super().__init__(num_tasks, neutral=1.0, max_factor=max_factor)
        if temperature <= 0 or window < 1:
            raise ValueError(f"DWA needs a temperature above 0 and a window of 1 or more: {temperature=}, {window=}")
        self.temperature, self.window = temperature, window
        for name in ("total", "newer", "older"):
            self.register_buffer(name, torch.zeros(num_tasks))
        for name in ("count", "windows"):
            self.register_buffer(name, torch.zeros(num_tasks, dtype=torch.int64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def observe(self, values: torch.Tensor, active: torch.Tensor) -> None:
        """See `LossWeighting.observe`."""
        counts = active.any()
        full = counts & (self.batches >= self.window)
        moved = full & (self.count > 0)
        self.older.copy_(torch.where(moved, self.newer, self.older))
        self.newer.copy_(torch.where(moved, self.total / self.count.clamp(min=1), self.newer))
        self.windows += moved
        for sums, added in ((self.total, torch.where(active, values, 0.0)), (self.count, active)):
            sums.copy_(torch.where(full, 0, sums) + added)
        self.batches.copy_(torch.where(full, 0, self.batches) + counts)

    def scalarize(self, values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """See `LossWeighting.scalarize`."""
        rates = (self.newer / self.older.clamp(min=EPSILON)).clamp(max=_LARGEST_RATE)
        rates = torch.where(self.windows >= 2, rates, 1.0)
        weights = self.num_tasks * torch.softmax(rates / self.temperature, dim=0)
        return torch.where(active, weights * values, 0.0).sum()


class FAMO(LossWeighting):
    """c Σ zᵢ log vᵢ, z = softmax(ξ), c such that the weights c zᵢ / vᵢ add up to 1 (Liu et al., *FAMO: Fast Adaptive
    Multitask Optimization*, NeurIPS 2023).

    ξ is trained by Adam, by how much each log vᵢ has fallen since the task was last seen: the slower it falls, the
    larger its zᵢ.  The paper looks at the same batch again after the step; here it is the next batch, which needs no
    second forward but also measures how much harder that one was.  This noise averages out slowly, most of all for a
    rare task: give it large batches.

    Args:
        num_tasks: T.
        lr: of ξ's own Adam; no schedule applies to it.
        weight_decay: of ξ, which pulls the weights back together.
        max_factor: see `LossWeighting`.

    Example:
        >>> combined, weights = FAMO(2)(torch.tensor([0.6, 0.2]), torch.tensor([True, True]))
        >>> weights
        tensor([0.2500, 0.7500])
    """

    title = "FAMO"
    scale_free = True
    logits: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor
    updates: torch.Tensor
    previous: torch.Tensor

    def __init__(
        self, num_tasks: int, *, lr: float = 0.025, weight_decay: float = 1e-3, max_factor: float = 100.0
    ) -> None:
        super().__init__(num_tasks, neutral=1 / num_tasks, max_factor=max_factor)
        self.step_size, self.weight_decay = lr, weight_decay
        for name in ("logits", "first_moment", "second_moment", "updates", "previous"):
            self.register_buffer(name, torch.zeros(num_tasks))

    def observe(self, values: torch.Tensor, active: torch.Tensor) -> None:
        """See `LossWeighting.observe`."""
        logs = _log(values)
        known = active & (self.seen > 0)
        fallen = torch.where(known, self.previous - logs, 0.0)
        # Softmax among those of which something is known; NaN where there are none, and unused then.
        shares = torch.softmax(self.logits.masked_fill(~known, float("-inf")), dim=0)
        self._adam(shares * (fallen - (shares * fallen).sum()), known)
        self.previous.copy_(torch.where(active, logs, self.previous))

    def _adam(self, gradient: torch.Tensor, known: torch.Tensor) -> None:
        """One step of torch's Adam with its default betas and eps, for those that are known."""
        gradient = gradient + self.weight_decay * self.logits
        updates = self.updates + known
        first = torch.lerp(self.first_moment, gradient, 0.1)
        second = torch.lerp(self.second_moment, gradient.square(), 0.001)
        correction = (1 - 0.999 ** updates.double()).sqrt().float()
        step = self.step_size / (1 - 0.9 ** updates.double()).float() * first / (second.sqrt() / correction + 1e-8)
        new = (self.logits - step, first, second, updates)
        for buffer, value in zip((self.logits, self.first_moment, self.second_moment, self.updates), new, strict=True):
            buffer.copy_(torch.where(known, value, buffer))

    def scalarize(self, values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """See `LossWeighting.scalarize`."""
        shares = torch.where(active, torch.softmax(self.logits, dim=0), 0.0)
        normaliser = (shares / (values.detach().clamp(min=0) + EPSILON)).sum().clamp(min=EPSILON)
        return (shares / normaliser * _log(values)).sum()


def _log(values: torch.Tensor) -> torch.Tensor:
    return torch.log(values.clamp(min=0) + EPSILON)
