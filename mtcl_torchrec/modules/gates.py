"""Gates over experts: their logits, and the mixtures they make, for copies of the inputs too."""

from __future__ import annotations

from typing import Any

import torch


class _GateLogits(torch.autograd.Function):
    """Batched x Wᵀ whose backward pass never multiplies with a tall transposed x, which is several times slower on a
    CPU than the product it is part of; copies that are one tensor in memory are read once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if x.stride(0) != 0:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.matmul(x[0], weight.flatten(0, 1).T).view(len(x[0]), *weight.shape[:2]).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x = torch.bmm(grad, weight.to(grad.dtype)).to(x.dtype)
        if x.stride(0) != 0:
            of_weight = torch.bmm(grad.transpose(1, 2), x.to(grad.dtype))
        else:
            of_weight = (grad.transpose(0, 1).flatten(1).T @ x[0].to(grad.dtype)).view_as(weight)
        return of_x, of_weight.to(weight.dtype)


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


class _Mixture(torch.autograd.Function):
    """A sum over a handful of experts, not B tiny matrix products; gradients are written where they belong at once."""

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
        if outputs.dim() == 4:
            # Contiguous weights, or the product would be laid out as they are.
            of_outputs = grad.unsqueeze(1) * weights.transpose(1, 2).contiguous().unsqueeze(-1)
        else:
            each = weights.unsqueeze(-1).unbind(2)
            of_outputs = torch.stack([(grad * one).sum(0) for one in each])
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
