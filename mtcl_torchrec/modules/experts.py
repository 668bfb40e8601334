"""Many small MLPs of one shape, computed together instead of in a loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.linear import linear

Norm = Literal["layer", "rms", "none"]
Form = Literal["auto", "batched", "loop"]
# On a CPU, one expert after the other is as fast or faster (`benchmarks/experts.py`) from so many numbers on in an
# expert's largest weight, as the products are large enough by themselves and each one's norm is a single kernel; or in
# all layers' outputs of all experts, as one expert's stay in the cache and those of all do not.
LOOP_FROM, LOOP_FROM_OUTPUTS = 8_192, 3 << 19


class BatchedExperts(nn.Module):
    """E multi-layer perceptrons: each layer is linear → norm → SiLU → dropout.

    Where all experts read the same input, the first layer of all of them is one matrix product; every other layer is
    one batched product.  The result is that of a loop over E separate networks, and on a CPU a few large experts are
    computed in one: the parameters are the same in both forms.

    With `feature_rank` r, expert e reads x ⊙ 2σ(x Aₑ Bₑ) instead of x, Aₑ (D, r), Bₑ (r, D): a gate of low rank that
    lets it choose among the features, so that a sparse task's expert is not pulled about by columns of no use to it
    (HoME's Fea-gate with one LoRA; Wang et al., 2024).  It keeps E·B·D numbers more for backward.

    Args:
        in_features: D, width of an input stream.
        layers: widths of the layers, the last one H.
        num_experts: E.
        reads: which input stream each expert reads; None where there is one stream for all.
        norm: ``"layer"`` (LayerNorm), ``"rms"`` (RMSNorm) or ``"none"``, with scales of each expert's own.
        dropout: after each activation.
        feature_rank: r of each expert's feature gate; 0 is no gate.
        form: ``"batched"``, ``"loop"``, or ``"auto"``, whichever is faster for these sizes on the input's device.

    Example:
        >>> BatchedExperts(8, [16, 4], num_experts=3)(torch.randn(5, 8)).shape
        torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        in_features: int,
        layers: Sequence[int],
        num_experts: int,
        *,
        reads: Sequence[int] | None = None,
        norm: Norm = "layer",
        dropout: float = 0.0,
        feature_rank: int = 0,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        if not layers or min(layers) < 1 or in_features < 1 or num_experts < 1:
            raise ValueError(f"experts need widths of at least 1: {in_features=}, {layers=}, {num_experts=}")
        if norm not in ("layer", "rms", "none"):
            raise ValueError(f"norm is 'layer', 'rms' or 'none', not {norm!r}")
        if form not in get_args(Form):
            raise ValueError(f"form is one of {', '.join(get_args(Form))}, not {form!r}")
        if reads is not None and len(reads) != num_experts:
            raise ValueError(f"{num_experts} experts, but reads names {len(reads)} streams")
        if feature_rank < 0:
            raise ValueError(f"feature_rank is at least 0, not {feature_rank}")
        self.num_experts, self.out_features = num_experts, layers[-1]
        self.norm, self.dropout, self.form = norm, dropout, form
        self.reads = None if reads is None else list(reads)
        widths = [in_features, *layers]
        self._large = max(o * i for i, o in pairwise(widths)) >= LOOP_FROM
        self._outputs = num_experts * sum(layers)
        # Stored as (E, out, in): its (E·out, in) view is the one matrix of the shared first layer.
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, o, i)) for i, o in pairwise(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, o)) for o in layers)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(num_experts, o)) for o in layers if norm != "none")
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(num_experts, o)) for o in layers if norm == "layer")
        self.feature_gates: nn.ParameterList | None = None
        if feature_rank:
            shapes = [(num_experts, feature_rank, in_features), (num_experts, in_features, feature_rank)]
            self.feature_gates = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as `torch.nn.Linear` starts: uniform within ±1/√fan_in."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        for weight in self.feature_gates or ():
            nn.init.uniform_(weight, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)

    def forward(
        self, x: torch.Tensor, only: Sequence[int] | None = None, factors: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Outputs (E, B, H) of all experts, or of those in `only`, in that order.

        Args:
            x: (B, D) where all experts read one stream, else (S, B, D).
            factors: for each layer what its output is multiplied with, (E, B, width); see
                `mtcl_torchrec.modules.gates.PPNet`.
        """
        chosen = None if only is None or list(only) == list(range(self.num_experts)) else list(only)

        def of(parameter: torch.Tensor) -> torch.Tensor:
            return parameter if chosen is None else parameter[chosen]

        weight, bias = of(self.weights[0]), of(self.biases[0])
        if self.reads is not None:
            reads = self.reads if chosen is None else [self.reads[e] for e in chosen]
            x = x if reads == list(range(x.shape[0])) else x[reads]
        if self.feature_gates is not None:
            x = x * self._feature_gates(x, of)
        if self._one_by_one(x):
            return self._loop(x, chosen, factors)
        if x.dim() == 2:
            h = linear(x, weight.flatten(0, 1), bias.flatten())
            h = h.view(x.shape[0], *bias.shape).transpose(0, 1)
        else:
            h = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
        for layer in range(len(self.weights)):
            if layer:
                h = torch.baddbmm(of(self.biases[layer]).unsqueeze(1), h, of(self.weights[layer]).transpose(1, 2))
            h = self._activate(h, layer, of)
            if factors is not None:
                h = h * factors[layer]
        return h

    def _one_by_one(self, x: torch.Tensor) -> bool:
        if self.form != "auto":
            return self.form == "loop"
        if x.device.type != "cpu":
            return False
        # A graph that is exported or compiled must fit batches of all sizes.
        many = not torch.compiler.is_compiling() and x.shape[-2] * self._outputs >= LOOP_FROM_OUTPUTS
        return self._large or many

    def _loop(self, x: torch.Tensor, chosen: list[int] | None, factors: Sequence[torch.Tensor] | None) -> torch.Tensor:
        """The same, one expert after the other.

        Args:
            x: (B, D), or (len(chosen), B, D).
        """

        def apart(parameters: nn.ParameterList, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
            # At once: each expert's would leave a gradient of all, and a cast of its own under autocast.
            return [parameter.to(dtype).unbind(0) for parameter in parameters]

        own, device = self.weights[0].dtype, x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
        weights, biases = apart(self.weights, low), apart(self.biases, low)
        scales, shifts = apart(self.scales, own), apart(self.shifts, own)
        outputs = []
        for place, e in enumerate(range(self.num_experts) if chosen is None else chosen):
            h = x if x.dim() == 2 else x[place]
            for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                h, width = linear(h, weight[e], bias[e]), bias[e].shape
                if self.norm == "layer":
                    h = F.layer_norm(h, width, scales[layer][e], shifts[layer][e])
                elif self.norm == "rms":
                    h = F.rms_norm(h, width, scales[layer][e], eps=1e-6)
                h = F.dropout(F.silu(h), self.dropout, self.training)
                if factors is not None:
                    h = h * factors[layer][place]
            outputs.append(h)
        return torch.stack(outputs)

    def _feature_gates(self, x: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """(E, B, D) in (0, 2) for x (B, D), or (E, B, D): the stream of each expert."""
        assert self.feature_gates is not None
        down, up = (of(weight) for weight in self.feature_gates)
        if x.dim() == 2:
            low = F.linear(x, down.flatten(0, 1)).view(x.shape[0], *down.shape[:2]).transpose(0, 1)
        else:
            low = torch.bmm(x, down.transpose(1, 2))
        return 2 * torch.sigmoid(torch.bmm(low, up.transpose(1, 2)))

    def _activate(self, h: torch.Tensor, layer: int, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        width = (h.shape[-1],)
        if self.norm == "layer":
            h = torch.addcmul(
                of(self.shifts[layer]).unsqueeze(1), F.layer_norm(h, width), of(self.scales[layer]).unsqueeze(1)
            )
        elif self.norm == "rms":
            h = F.rms_norm(h, width, eps=1e-6) * of(self.scales[layer]).unsqueeze(1)
        return F.dropout(F.silu(h), self.dropout, self.training)
