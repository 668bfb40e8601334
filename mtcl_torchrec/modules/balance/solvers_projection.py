"""Weights from pairwise projections of gradients, one after the other in a random order.

The order is the same on all ranks and after a resume: it is looked up, by a count of steps that travels in the
checkpoint, among orders that were drawn with a seed.
"""

from __future__ import annotations

import torch

from mtcl_torchrec.modules.balance.solvers import Solver

ORDERS = 4096  # that are drawn; then they come again


class _InRandomOrder(Solver):
    """Changes each task's gradient by the others', in an order that is drawn for each task and step.

    All tasks are worked on at once: in round p, task i meets the p-th of the others in its order.
    """

    mean_one = False
    step: torch.Tensor
    others: torch.Tensor

    def __init__(self, num_tasks: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(ORDERS, num_tasks, num_tasks, generator=generator)
        drawn.diagonal(dim1=1, dim2=2).fill_(2.0)  # a task never meets itself
        self.register_buffer("others", drawn.argsort(2)[:, :, :-1].contiguous(), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def order(self) -> torch.Tensor:
        """(T, T - 1): the others that each task meets, in the order of this step."""
        return self.others.index_select(0, (self.step % ORDERS).reshape(1)).squeeze(0)

    def next_order(self) -> torch.Tensor:
        """As `order`, and the step is counted."""
        order = self.order()
        self.step += 1
        return order


class PCGrad(_InRandomOrder):
    """A gradient that conflicts with another task's is projected onto that one's normal plane (Yu et al., *Gradient
    Surgery for Multi-Task Learning*, NeurIPS 2020, algorithm 1).

    gᵢ ← gᵢ - ⟨gᵢ, gⱼ⟩/‖gⱼ‖² gⱼ where ⟨gᵢ, gⱼ⟩ < 0, for all j in random order; the weights are those of Σᵢ gᵢ, which are
    1 without conflicts.

    Cost: T - 1 rounds of a handful of operations; it does not wait for the device.

    Args:
        num_tasks: T.
        seed: of the orders.

    Example:
        >>> gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double()
        >>> PCGrad(2)(gradients @ gradients.T, torch.tensor([True, True]), None)
        tensor([2.0000, 1.5000], dtype=torch.float64)
    """

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        squared = gramian.diagonal()
        coefficients = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
        for other in self.next_order().T:
            at = other.unsqueeze(1)
            inner = (coefficients @ gramian).gather(1, at).squeeze(1)
            change = torch.where(inner < 0, -inner / squared[other], 0.0)
            coefficients = coefficients.scatter_add(1, at, change.unsqueeze(1))
        return coefficients.sum(0)


class GradVac(_InRandomOrder):
    """Gradients that are less alike than usual are made as alike as usual (Wang et al., *Gradient Vaccine*, ICLR 2021,
    eq. 4 and algorithm 1).

    φ̂ᵢⱼ is the moving average of the cosine between tasks i and j; where the cosine φᵢⱼ is below it,
    gᵢ ← gᵢ + ‖gᵢ‖(φ̂√(1 - φ²) - φ√(1 - φ̂²)) / (‖gⱼ‖√(1 - φ̂²)) gⱼ.  The averages are kept in a buffer; a task without a
    gradient changes none.

    Cost: T - 1 rounds of some twenty operations; it does not wait for the device.

    Args:
        num_tasks: T.
        beta: share of the newest step in the averages.
        seed: of the orders.

    Example:
        >>> gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double()
        >>> GradVac(2)(gradients @ gradients.T, torch.tensor([True, True]), None)  # the averages start at 0: as PCGrad
        tensor([2.0000, 1.5000], dtype=torch.float64)
    """

    average: torch.Tensor

    def __init__(self, num_tasks: int, beta: float = 0.01, seed: int = 0) -> None:
        super().__init__(num_tasks, seed)
        self.beta = beta
        self.register_buffer("average", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        tiny = 1e-12 * gramian.diagonal().amax().sqrt()
        norms = gramian.diagonal().clamp(min=0).sqrt()
        coefficients = torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
        average = self.average.clone()
        for other in self.next_order().T:
            at = other.unsqueeze(1)
            products = coefficients @ gramian
            norm = (products * coefficients).sum(1).clamp(min=0).sqrt()
            cosine = products.gather(1, at).squeeze(1) / (norm * norms[other] + tiny**2).clamp(min=1e-300)
            usual = average.gather(1, at).squeeze(1)
            sine, usual_sine = ((1 - c.square()).clamp(min=0).sqrt() for c in (cosine, usual))
            change = norm * (usual * sine - cosine * usual_sine) / (norms[other] * usual_sine + tiny).clamp(min=1e-300)
            meets = active & active[other]
            change = torch.where(meets & (cosine < usual), change, 0.0)
            coefficients = coefficients.scatter_add(1, at, change.unsqueeze(1))
            new = torch.where(meets, torch.lerp(usual, cosine, self.beta), usual)
            average = average.scatter(1, at, new.unsqueeze(1))
        self.average.copy_(average)
        return coefficients.sum(0)
