"""The logits of several gates, each from its own copy of an input."""

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
