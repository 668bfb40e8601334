"""Which numbers the dense part of a run computes with: what was asked for, or what suits machine and model."""

from __future__ import annotations

from typing import Literal

import torch

from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.towers import MultiTaskTower, Precision
from mtcl_torchrec.modules.vectors import FrozenVectors
from mtcl_torchrec.training.cost import dense_parameters
from mtcl_torchrec.training.sharding import Ranks

# On a CPU, from so many dense parameters on, the products are worth the casts around them (benchmarks/NOTES.md).
BF16_FROM = 65_536


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware: CUDA of compute capability 8.0 (Ampere) or later, a CPU
    with AVX512-BF16 or AMX-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # A CPU with AMX has AVX512-BF16 too: both came with Sapphire Rapids.
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.mkldnn.is_available()


def resolve_precision(
    asked: Literal["auto", "fp32", "bf16"], model: MTCL, where: Ranks, before: Precision | None = None
) -> Precision:
    """The precision of a run, the same on every rank; every rank calls this.

    Args:
        asked: ``"auto"`` is what the run had before it was interrupted, else bf16 where the machine of every rank has
            it in hardware and, on a CPU, the model is large enough to gain from it; fp32 elsewhere.
        before: what a run that is resumed had.
    """
    if asked != "auto":
        return asked
    if before is not None:
        return before
    large = where.device.type != "cpu" or dense_parameters(model) >= BF16_FROM
    return "bf16" if all(where.gather(has_fast_bf16(where.device))) and large else "fp32"


def set_precision(model: MTCL, precision: Precision) -> None:
    """Let everything after the embeddings compute in this precision, in training and afterwards."""
    for module in model.modules():
        if isinstance(module, MultiTaskTower | FrozenVectors):
            module.precision = precision
