"""Weights from the norms of the tasks' gradients alone, the diagonal of the Gramian, and from their losses."""

from __future__ import annotations

import torch

from mtcl_torchrec.modules.balance.solvers import Solver


class GradNorm(Solver):
    """All tasks train at the same rate: weights are learnt that pull the norm of each task's gradient towards the mean
    norm, the more so the less its loss has fallen (Chen et al., *GradNorm*, ICML 2018, eq. 1-2 and algorithm 1).

    With rᵢ the task's loss ratio Lᵢ/Lᵢ(0) divided by their mean, |wᵢ‖gᵢ‖ - mean·rᵢᵅ| is lowered by one step of gradient
    descent on wᵢ a step of training, and the weights are scaled to a mean of 1.  Norms count relative to their mean, so
    that `lr` does not depend on the scale of the loss.  Lᵢ(0) is the loss of the first batch that has labels of the
    task.  Weights and first losses are kept in buffers.

    Cost: a few operations on T numbers; it does not wait for the device.

    Args:
        num_tasks: T.
        alpha: how strongly tasks that lag behind are favoured.
        lr: of the weights.

    Example:
        >>> solver, yes = GradNorm(2, lr=0.1), torch.tensor([True, True])
        >>> for _ in range(2):
        ...     weights = solver(torch.diag(torch.tensor([1.0, 9.0])).double(), yes, torch.ones(2).double())
        >>> weights
        tensor([1.1053, 0.8947], dtype=torch.float64)
    """

    needs_losses = True
    learnt: torch.Tensor
    first_losses: torch.Tensor

    def __init__(self, num_tasks: int, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        self.alpha, self.lr = alpha, lr
        self.register_buffer("learnt", torch.ones(num_tasks, dtype=torch.float64))
        self.register_buffer("first_losses", torch.full((num_tasks,), -1.0, dtype=torch.float64))

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        weights = self.learnt.clone()
        self.first_losses.copy_(torch.where(active & (self.first_losses < 0), losses, self.first_losses))
        norms = gramian.diagonal().sqrt()
        norms = norms / _mean(norms, active).clamp(min=1e-300)
        ratio = losses / self.first_losses.clamp(min=1e-30)
        rate = ratio / _mean(ratio, active).clamp(min=1e-30)
        pulled = weights * norms
        target = _mean(pulled, active) * rate**self.alpha
        learnt = (weights - self.lr * torch.sign(pulled - target) * norms).clamp(min=1e-3)
        learnt = learnt / _mean(learnt, active).clamp(min=1e-30) * _mean(weights, active)
        self.learnt.copy_(torch.where(active & torch.isfinite(learnt).all(), learnt, weights))
        return weights


class DBMTL(Solver):
    """Gradients of the logarithms of the losses, each scaled to one norm (Lin et al., *Dual-Balancing for Multi-Task
    Learning*, 2023, algorithm 1).

    The gradient of log Lᵢ is gᵢ/Lᵢ, and its weight is the largest of the tasks' norms divided by its own.  Norms are
    moving averages, with a share β/√k of the past in step k.  (The paper averages gradients instead of norms; those of
    a representation belong to the batch's rows and cannot be averaged over batches.)  The weights, 1/(Lᵢ·averageᵢ), are
    scaled to a mean of 1, where the largest norm drops out.  The averages are kept in a buffer.

    Cost: a few operations on T numbers; it does not wait for the device.

    Args:
        num_tasks: T.
        beta: share of the past.

    Example:
        >>> solver, yes = DBMTL(2), torch.tensor([True, True])
        >>> solver(torch.diag(torch.tensor([1.0, 9.0])).double(), yes, torch.ones(2).double())
        tensor([1.0000, 0.3333], dtype=torch.float64)
    """

    needs_losses = True
    average: torch.Tensor
    steps: torch.Tensor

    def __init__(self, num_tasks: int, beta: float = 0.9) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("average", torch.zeros(num_tasks, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(num_tasks, dtype=torch.int64))

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        losses = losses.clamp(min=1e-30)
        norms = gramian.diagonal().sqrt() / losses
        past = self.beta / (self.steps + 1).double().sqrt() * (self.steps > 0)
        self.average.copy_(torch.where(active, past * self.average + (1 - past) * norms, self.average))
        self.steps += active
        return 1 / (losses * self.average.clamp(min=1e-300))


def _mean(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    return (values * active).sum() / active.sum().clamp(min=1)
