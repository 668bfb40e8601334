"""Gates over experts: their logits, and the mixtures they make; from one input, or from a copy for each gate.

Copies are made where the gradients of several tasks are to be told apart (`mtcl_torchrec.modules.balance.cut`).  The
gradient of a copy is a product of something small, so it is handed over as its factors where the receiver takes them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Factored(Protocol):
    """Gradients of n copies of one tensor that are known by their factors."""

    def gramian(self) -> torch.Tensor:
        """(n, n) float64 inner products."""

    def combine(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ wᵢ gᵢ for weights (n,)."""

    def dense(self) -> torch.Tensor:
        """(n, ...)."""


def hand_over(ctx: Any, argument: int, factored: Factored, like: torch.Tensor) -> torch.Tensor | None:
    """Give the gradient of an argument to the node that made the argument, if it takes factors.

    Args:
        ctx: of the function whose backward pass this is.
        argument: its number.
        like: the argument.

    Returns:
        What backward returns for it, zeros that take no memory, or None where factors are not taken.
    """
    node, output = ctx.next_functions[argument]
    taken = getattr(node, "factored", {}).get(output)
    if taken is None:
        return None
    nothing = like.new_zeros(()).expand(like.shape)
    # With the number of the backward pass: of an earlier one, which did not come as far as that node, all is void.
    taken.append((torch._C._current_graph_task_id(), nothing.data_ptr(), factored))
    return nothing


class _ProductGradient:
    """gᵢ = dᵢ Wᵢ.

    Args:
        d: (n, B, E).
        weight: (n, E, D).
    """

    def __init__(self, d: torch.Tensor, weight: torch.Tensor) -> None:
        self.d, self.weight = d, weight

    def gramian(self) -> torch.Tensor:
        """⟨dᵢWᵢ, dⱼWⱼ⟩ is the sum over (dᵢᵀdⱼ) ∘ (WᵢWⱼᵀ)."""
        n, e = self.weight.shape[:2]
        d = self.d.transpose(0, 1).flatten(1).double()
        weight = self.weight.flatten(0, 1).double()
        return ((d.T @ d) * (weight @ weight.T)).view(n, e, n, e).sum((1, 3))

    def combine(self, weights: torch.Tensor) -> torch.Tensor:
        """(B, D)."""
        d = self.d.to(self.weight.dtype) * weights.to(self.weight.dtype).view(-1, 1, 1)
        return d.transpose(0, 1).flatten(1) @ self.weight.flatten(0, 1)

    def dense(self) -> torch.Tensor:
        """(n, B, D)."""
        return torch.bmm(self.d, self.weight.to(self.d.dtype))


class _GateLogits(torch.autograd.Function):
    """Batched x Wᵀ whose backward pass never multiplies with a tall transposed x, which is several times slower on a
    CPU than the product it is part of; copies that are one tensor in memory are read once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if x.stride(0) != 0:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.matmul(x[0], weight.flatten(0, 1).T).view(x.shape[1], *weight.shape[:2]).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        product = _ProductGradient(grad, weight)
        of_x = hand_over(ctx, 0, product, x)
        if x.stride(0) != 0:
            of_weight = torch.bmm(grad.transpose(1, 2), x.to(grad.dtype))
        else:
            of_weight = (grad.transpose(0, 1).flatten(1).T @ x[0].to(grad.dtype)).view_as(weight)
        return product.dense().to(x.dtype) if of_x is None else of_x, of_weight.to(weight.dtype)


def gate_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits (G, B, E) of G gates over E experts.

    Args:
        x: (G, B, D), what each gate reads; may be an expanded (B, D).
        weight: (G, E, D).

    Example:
        >>> gate_logits(torch.randn(5, 4).expand(2, 5, 4), torch.randn(2, 3, 4)).shape
        torch.Size([2, 5, 3])
    """
    return _GateLogits.apply(x, weight)


class _MixtureGradient:
    """gᵢₑ = wᵢₑ dᵢ, of copies of the experts' outputs.

    Args:
        d: (n, B, H).
        weights: (n, B, E).
    """

    def __init__(self, d: torch.Tensor, weights: torch.Tensor) -> None:
        self.d, self.weights = d, weights

    def gramian(self) -> torch.Tensor:
        """Σ over rows of ⟨wᵢ, wⱼ⟩⟨dᵢ, dⱼ⟩."""
        d, w = (t.float() if t.dtype != torch.float64 else t for t in (self.d, self.weights))
        d, w = d.transpose(0, 1), w.transpose(0, 1)
        return (torch.bmm(d, d.transpose(1, 2)).double() * torch.bmm(w, w.transpose(1, 2)).double()).sum(0)

    def combine(self, weights: torch.Tensor) -> torch.Tensor:
        """(E, B, H)."""
        scaled = (self.weights * weights.to(self.weights.dtype).view(-1, 1, 1)).unsqueeze(-1)
        return torch.stack([(self.d * one).sum(0) for one in scaled.unbind(2)])

    def sum(self) -> torch.Tensor:
        """(E, B, H)."""
        each = self.weights.transpose(1, 2).contiguous().unsqueeze(-1)
        total = each[0] * self.d[0]
        for weights, d in zip(each[1:], self.d[1:], strict=True):
            total.addcmul_(weights, d)
        return total

    def dense(self) -> torch.Tensor:
        """(n, E, B, H)."""
        # Contiguous weights, or the product would be laid out as they are.
        return self.d.unsqueeze(1) * self.weights.transpose(1, 2).contiguous().unsqueeze(-1)


class _Mixture(torch.autograd.Function):
    """A sum over a handful of experts, not B tiny matrix products."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights, outputs)
        of = outputs.unbind(-3)
        mixed = weights[..., 0].unsqueeze(-1) * of[0]
        for e in range(1, len(of)):
            mixed.addcmul_(weights[..., e].unsqueeze(-1), of[e])
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,), (weights, outputs) = grads, ctx.saved_tensors
        of_weights = torch.stack([(grad * one).sum(-1) for one in outputs.unbind(-3)], dim=-1)
        gradient = _MixtureGradient(grad, weights)
        if outputs.dim() == 3:
            of_outputs: torch.Tensor | None = gradient.sum()
        else:
            of_outputs = hand_over(ctx, 1, gradient, outputs)
        if of_outputs is None:
            of_outputs = gradient.dense()
        return of_weights.to(weights.dtype), of_outputs.to(outputs.dtype)


def mixtures(weights: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Σₑ weightₑ · outputₑ for each of G gates: (G, B, H).

    Args:
        weights: (G, B, E).
        outputs: of the experts (E, B, H), or a copy for each gate (G, E, B, H).

    Example:
        >>> mixtures(torch.tensor([[[0.25, 0.75]]]), torch.tensor([[[4.0]], [[8.0]]]))
        tensor([[[7.]]])
    """
    return _Mixture.apply(weights, outputs)
