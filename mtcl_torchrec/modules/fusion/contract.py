"""The signature of a fused score, and what it may know of its rows besides the tasks' parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class RowContext:
    """What a fused score may know of B rows besides the tasks' parts.

    Args:
        dense_features: (B, D) as the model got them.
        embeddings: sparse feature -> (B, dim) pooled embedding, detached.
        request: (B,) int64, equal for rows that are ranked against each other; None: all rows are one request.
    """

    dense_features: torch.Tensor
    embeddings: Mapping[str, torch.Tensor]
    request: torch.Tensor | None = None


def fuse(fused_score: nn.Module, parts: Mapping[str, torch.Tensor], context: RowContext) -> torch.Tensor:
    """Scores (B,) of a fused score, which is given the context only if it says ``needs_context = True``.

    Args:
        fused_score: a module of the signature in `mtcl_torchrec.modules.fusion`.
        parts: task name -> (B,) in [0, 1].
        context: of the same rows.

    Example:
        >>> from mtcl_torchrec import WeightedMean
        >>> rows = RowContext(torch.zeros(1, 0), {})
        >>> fuse(WeightedMean({"click": 1.0, "like": 3.0}), {"click": torch.ones(1), "like": torch.zeros(1)}, rows)
        tensor([0.2500])
    """
    if getattr(fused_score, "needs_context", False):
        return fused_score(parts, context)
    return fused_score(parts)
