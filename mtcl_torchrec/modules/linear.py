"""Products of float32 on a CPU, by whichever library is fast on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST = 1 << 21  # multiplications, below which a call's own cost is what counts
_NARROW = 64  # outputs, below which MKL's gradient of a weight is as fast


@cache
def mkl_is_slow() -> bool:
    """Whether MKL leaves half of this processor idle: on AMD's it takes kernels for AVX2 where there is AVX-512."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and _product() is not None):
        return False
    if "AVX512" not in backends.cpu.get_cpu_capability():
        return False
    about = Path("/proc/cpuinfo")
    return about.is_file() and "AuthenticAMD" in about.read_text(encoding="utf-8", errors="replace")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`; while training in float32 on processors where MKL is slow, by oneDNN.

    The products are float32's in both; they differ by rounding.  oneDNN's are up to 2.3 times as fast there
    (benchmarks/NOTES.md).  With ``torch.backends.mkldnn.enabled = False`` it is torch's own everywhere.

    Args:
        x: (..., D).
        weight: (O, D).
        bias: (O,).

    Returns:
        (..., O).

    Example:
        >>> x, weight = torch.randn(5, 3), torch.randn(2, 3)
        >>> torch.equal(linear(x, weight), F.linear(x, weight))
        True
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():  # or exporting: a look at sizes would bind the graph to them
        return False
    return bool(
        x.dim() == 2
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and x.numel() * len(weight) >= LEAST
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and mkl_is_slow()
    )


@cache
def _product() -> Any:
    """(x, weight, bias) -> x Wᵀ + b: the operator that torch's own compiler calls; None where this torch lacks it."""
    try:
        product = torch.ops.mkldnn._linear_pointwise
        like = torch.ones(2, 3)
        if product(like, like, None, "none", [], "").tolist() != [[3.0, 3.0], [3.0, 3.0]]:
            return None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return lambda x, weight, bias: product(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """Each of the three products in the order of its operands that is fastest."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product()(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        product = _product()
        return (
            product(grad, weight.t(), None) if of_x else None,
            _gradient_of_weight(x, grad) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _gradient_of_weight(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """gradᵀ x, (O, D)."""
    if x.shape[1] < grad.shape[1]:
        return _product()(x.t(), grad.t(), None).t()
    if grad.shape[1] >= _NARROW:
        return _product()(grad.t(), x.t(), None)
    return grad.t() @ x
