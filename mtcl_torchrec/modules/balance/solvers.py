"""From the Gramian of the tasks' gradients to their weights: methods that solve an optimisation problem.

Those here are exact, and stay on the device: few tasks have few sets of binding constraints, so all sets are solved in
one batch and the one that fits is taken.  Methods with random orders are in `solvers_projection`, those that look at
norms alone in `solvers_norms`; `build_solver` knows all by name.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from mtcl_torchrec.schema import ConfigError

MOST_TASKS = 10  # of which all sets are solved at once, 1024 of them


class Solver(nn.Module):
    """From a Gramian to weights.

    Attributes:
        mean_one: whether the method gives a direction and no length: its weights are then scaled to a mean of 1 over
            the active tasks, so that learning rates keep their meaning.
        waits: whether it waits for the device.
        needs_losses: whether it looks at the tasks' losses.
    """

    mean_one = True
    waits = False
    needs_losses = False

    @abstractmethod
    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """Weights (T,) float64; those of tasks that are not active are of no meaning.

        Args:
            gramian: (T, T) float64, finite, 0 in the rows and columns of tasks that are not active.
            active: (T,) bool: the tasks whose gradient is not 0.
            losses: (T,) float64, of the global batch; 0 where nobody told them.
        """


class Measure(Solver):
    """Weights of 1: the plain sum, and statistics about it.

    Example:
        >>> Measure()(torch.eye(2), torch.ones(2, dtype=torch.bool), torch.zeros(2))
        tensor([1., 1.], dtype=torch.float64)
    """

    mean_one = False

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        return torch.ones(len(gramian), dtype=torch.float64, device=gramian.device)


class _BySets(Solver):
    """Tries all sets of tasks at once."""

    sets: torch.Tensor

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        if not 1 <= num_tasks <= MOST_TASKS:
            raise ConfigError(f"{type(self).__name__} takes up to {MOST_TASKS} tasks, not {num_tasks}")
        numbers, bits = torch.arange(2**num_tasks).unsqueeze(1), 2 ** torch.arange(num_tasks)
        self.register_buffer("sets", (numbers & bits) > 0, persistent=False)
        self.register_buffer("eye", torch.eye(num_tasks, dtype=torch.float64), persistent=False)


class UPGrad(_BySets):
    """Each task's gradient is projected to where it conflicts with none, and the projections are added up (Quinton and
    Rey, *Jacobian Descent for Multi-Objective Optimization*, 2024, eq. 5 and proposition 1).

    For each task i: min vᵀGv with v ≥ eᵢ; the weights are Σᵢ vᵢ, so that tasks which do not conflict keep weights of 1.
    For each of the 2ᵀ sets of binding constraints the optimum is one linear system; of all of them, solved in one
    batch, that with v ≥ eᵢ and Gv ≥ 0 is the optimum.  As in TorchJD, G is divided by its trace and 10⁻⁴ is added to
    its diagonal; TorchJD's own weights are these divided by T.

    Cost: 2ᵀ systems of size T in one call; it does not wait for the device.  For more than 10 tasks `build_solver`
    takes TorchJD's quadratic programs instead, which wait.

    Args:
        num_tasks: T, up to 10.
        regularisation: what is added to the diagonal.

    Example:
        >>> gradients = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
        >>> UPGrad(2)(gradients @ gradients.T, torch.ones(2, dtype=torch.bool), torch.zeros(2))
        tensor([2.2218, 1.5789], dtype=torch.float64)
    """

    mean_one = False
    eye: torch.Tensor

    def __init__(self, num_tasks: int, regularisation: float = 1e-4) -> None:
        super().__init__(num_tasks)
        self.regularisation = regularisation

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        g = gramian / gramian.trace().clamp(min=1e-300) + self.regularisation * self.eye
        binding = self.sets.unsqueeze(2)
        # vⱼ = uⱼ where the constraint binds, (Gv)ⱼ = 0 elsewhere; one column for each u = eᵢ.
        v = torch.linalg.solve_ex(torch.where(binding, self.eye, g), self.eye * binding)[0]
        violation = torch.maximum(self.eye - v, -(g @ v)).amax(1)
        best = torch.nan_to_num(violation, nan=float("inf")).argmin(0)
        return v[best, :, torch.arange(len(g), device=g.device)].sum(0)


class CAGrad(_BySets):
    """The direction within a ball around the mean gradient that is best for the task that gains least (Liu et al.,
    *Conflict-Averse Gradient Descent*, NeurIPS 2021, algorithm 1).

    min_w ⟨g_w, g₀⟩ + c‖g₀‖‖g_w‖ over the simplex, g₀ the mean gradient; the weights are 1/T + c‖g₀‖/‖g_w‖ · w, scaled
    to a mean of 1.  For each set of tasks with w > 0, stationarity is a quadratic equation for its multiplier; of all
    sets, solved in one batch, the one that satisfies the rest is the optimum.  Where the optimum is ‖g_w‖ = 0 (nothing
    is better for all), the mean is kept: weights of 1.

    Cost: 2ᵀ systems of size T in one call; it does not wait for the device.

    Args:
        num_tasks: T, up to 10.
        c: radius of the ball, as a share of ‖g₀‖; 0 is the mean, from 1 on it comes close to MGDA.

    Example:
        >>> weights = CAGrad(2, c=0.5)(torch.diag(torch.tensor([1.0, 9.0])).double(), torch.tensor([True, True]), None)
        >>> (weights / weights.mean()).round(decimals=3)
        tensor([1.4420, 0.5580], dtype=torch.float64)
    """

    eye: torch.Tensor

    def __init__(self, num_tasks: int, c: float = 0.4) -> None:
        super().__init__(num_tasks)
        self.c = c

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        g = gramian / gramian.trace().clamp(min=1e-300)
        mean = active.to(g.dtype) / active.sum().clamp(min=1)
        b = g @ mean  # ⟨gⱼ, g₀⟩
        radius = self.c * (mean @ b).clamp(min=0).sqrt()
        chosen = self.sets.double()
        both = chosen.unsqueeze(1) * chosen.unsqueeze(2)
        system = both * (g + 1e-10 * self.eye) + torch.diag_embed(1 - chosen)
        right = torch.stack([chosen, chosen * b], dim=2)
        p, q = torch.linalg.solve_ex(system, right)[0].unbind(2)
        # The multiplier λ of Σw = 1: αλ² - 2βλ + γ = radius².
        alpha, beta, gamma = p.sum(1), q.sum(1), q @ b
        gap = (beta**2 - alpha * (gamma - radius**2)).sqrt()  # αλ - β; NaN where a set has no solution
        multiplier = (beta + gap) / alpha
        w = (multiplier.unsqueeze(1) * p - q) / gap.unsqueeze(1)
        norm = radius / gap
        slope = b + radius * (w @ g) / norm.unsqueeze(1)
        violation = torch.maximum(-w, multiplier.unsqueeze(1) - slope).masked_fill(~active, 0.0).amax(1)
        violation = torch.where((self.sets & ~active).any(1), float("inf"), violation)
        violation = torch.nan_to_num(violation, nan=float("inf"))
        best = violation.argmin(0, keepdim=True)  # as an index of one dimension, which does not wait for the device
        found = (violation[best] < 1e-6) & (norm[best] > 1e-8)
        return torch.where(found, mean + radius / norm[best] * w[best].squeeze(0).clamp(min=0), mean)


class NashMTL(Solver):
    """The tasks bargain: the direction in which the product of their gains is largest (Navon et al., *Multi-Task
    Learning as a Bargaining Game*, ICML 2022, eq. 4).

    Gα = 1/α, the stationary point of the convex ½αᵀGα - Σ log αᵢ, found by Newton's method with the step that
    self-concordance allows, from α = 1/‖gᵢ‖ and with 10⁻⁸ on the diagonal of the cosine matrix, without which gradients
    that cancel have no solution.

    Cost: 40 systems of size T, one after the other; it does not wait for the device.

    Args:
        iterations: of Newton's method.

    Example:
        >>> NashMTL()(torch.diag(torch.tensor([1.0, 4.0])).double(), torch.tensor([True, True]), None)
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, iterations: int = 40) -> None:
        super().__init__()
        self.iterations = iterations

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        norms = torch.where(active, gramian.diagonal(), 1.0).sqrt()
        cosine = gramian / norms.unsqueeze(0) / norms.unsqueeze(1) + torch.where(active, 1e-8, 1.0).diag()
        y = torch.ones_like(norms)
        for _ in range(self.iterations):
            slope = cosine @ y - 1 / y
            step = torch.linalg.solve_ex(cosine + (1 / y.square()).diag(), -slope)[0]
            decrement = (-slope @ step).clamp(min=0).sqrt()
            y = y + step * torch.where(decrement > 0.25, 1 / (1 + decrement), 1.0)
        return y / norms


class FromGramian(Solver):
    """A weighting of TorchJD, or any module from a (n, n) Gramian to (n,) weights, on the host.

    It gets the Gramian of the active tasks alone, as float64 and divided by the mean of its diagonal, so that absolute
    constants in it do not depend on the scale of the loss.  Its own state, if it has any, must be in buffers to
    travel in a checkpoint.

    Cost: a copy of T² numbers to the host, which waits for the device, and what the module takes.

    Args:
        weighting: the module.
        mean_one: whether its weights are scaled to a mean of 1.

    Example:
        >>> from torchjd.aggregation import MGDAWeighting
        >>> g = torch.diag(torch.tensor([1.0, 0.0, 3.0])).double()
        >>> FromGramian(MGDAWeighting())(g, torch.tensor([True, False, True]), None)
        tensor([0.7500, 1.0000, 0.2500], dtype=torch.float64)
    """

    waits = True

    def __init__(self, weighting: nn.Module, *, mean_one: bool = True) -> None:
        super().__init__()
        self.weighting, self.mean_one = weighting, mean_one

    def forward(self, gramian: torch.Tensor, active: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """See `Solver.forward`."""
        on_host = gramian.cpu()
        among = on_host.diagonal().nonzero().flatten()
        weights = torch.ones(len(on_host), dtype=torch.float64)
        if len(among):
            of_active = on_host[among][:, among]
            try:
                weights[among] = self.weighting(of_active / of_active.diagonal().mean()).double()
            except (ValueError, torch.linalg.LinAlgError):  # no solution: an outcome, not a reason to stop a run
                weights[among] = float("nan")
        return weights.to(gramian.device)


def torchjd(name: str, **options: Any) -> nn.Module:
    """One of TorchJD's weightings.

    Raises:
        ConfigError: it, or what it needs, is not installed.

    Example:
        >>> torchjd("MGDAWeighting").epsilon
        0.001
    """
    try:
        return getattr(importlib.import_module("torchjd.aggregation"), name)(**options)
    except ImportError as error:
        raise ConfigError(f"{name} is TorchJD's: pip install 'mtcl_torchrec[balance]' ({error})") from None
