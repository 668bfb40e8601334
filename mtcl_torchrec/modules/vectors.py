"""Frozen vectors of items, such as those of a language model, as inputs of the model: looked up, projected, shifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.embeddings import single_value


class FrozenVectors(nn.Module):
    """One sparse feature whose value i stands for row i of a matrix that is not trained: a module of `Lookups`.

    A row's input is y = W v + b with v its frozen vector (d,) and W (D, d); a row without one (value 0, no value, or
    one beyond the matrix) has a learnt vector of its own instead, which starts at zero.

    With a bound `trainable` = t > 0 an item's own vector is added, from an ordinary table of the embedding-bag
    collection with a row for each vector, sharded and trained like any other, which looks the same feature up: what is
    pooled of it, e (D,), enters as t · e / √(1 + mean(e²)).  Its root mean square is less than t whatever e is, and
    where e is small it is t e.  So training may move an item's vector by as much as is allowed, and no further; an item
    that was never trained on has e = 0, its frozen vector alone.

    The matrix is a buffer, in no checkpoint: it is as it was read, and the run keeps it once.  It has no gradient, is
    in no optimizer, and each rank has a copy.

    Args:
        feature: name of the sparse feature, and of the input that this makes.
        vectors: (V + 1, d) float32 or float16, row 0 zero; it is not copied.
        out_features: D.
        trainable: t.
        precision: ``"bf16"`` projects under autocast; what comes out is float32.

    Example:
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> text = FrozenVectors("text", torch.tensor([[0.0, 0.0], [1.0, -1.0]]), 4)
        >>> ids = KeyedJaggedTensor(["text"], values=torch.tensor([1, 0, 1]), lengths=torch.tensor([1, 1, 1]))
        >>> out = text(ids)["text"]
        >>> out.shape, out[1].tolist(), bool((out[0] == out[2]).all())
        (torch.Size([3, 4]), [0.0, 0.0, 0.0, 0.0], True)
    """

    vectors: torch.Tensor
    penalised = False  # a projection is a dense weight, not an embedding

    def __init__(
        self,
        feature: str,
        vectors: torch.Tensor,
        out_features: int,
        *,
        trainable: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        if vectors.dim() != 2 or len(vectors) < 2 or not vectors.is_floating_point():
            raise ValueError(
                f"vectors of {feature!r} are floats (V + 1, d), not {vectors.dtype} {tuple(vectors.shape)}"
            )
        if trainable < 0:
            raise ValueError(f"the bound of what is trained of {feature!r} is at least 0, not {trainable}")
        self.feature, self.trainable, self.precision = feature, trainable, precision
        self.features = (feature,)
        self.takes = (feature,) if trainable > 0 else ()
        self.dims = {feature: out_features}
        self.register_buffer("vectors", vectors, persistent=False)
        self.projection = nn.Linear(vectors.shape[1], out_features)
        self.missing = nn.Parameter(torch.zeros(out_features))

    def forward(
        self,
        sparse_features: Any,
        sequence_embeddings: Any = None,
        taken: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """feature -> (B, D) float32.

        Args:
            sparse_features: has the feature, one value a row or none.
            sequence_embeddings: not read.
            taken: feature -> (B, D), what was pooled of its table; needed where a part is trained.
        """
        own = None if taken is None else taken.get(self.feature)
        return {self.feature: self.of_rows(self.known_rows(sparse_features), own)}

    def known_rows(self, sparse_features: Any) -> torch.Tensor:
        """(B,) the row of each vector, 0 where there is none."""
        rows = single_value(sparse_features, self.feature)
        return torch.where((rows > 0) & (rows < self.vectors.shape[0]), rows, 0)

    def of_rows(self, rows: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """(B, D) float32 of rows (B,) of the matrix.

        Args:
            own: (B, D) what the table has for them.

        Raises:
            ValueError: vectors that are trained in part, and nothing of their table.
        """
        read = F.embedding(rows, self.vectors)
        if self.precision == "bf16":
            with torch.autocast(read.device.type, torch.bfloat16):
                projected = self.projection(read).float()
        else:
            projected = self.projection(read.to(self.projection.weight.dtype))
        if self.trainable > 0:
            if own is None:
                raise ValueError(f"{self.feature!r} is trained in part: its table's embedding is missing")
            own = own.float()
            bounded = own / (1 + own.square().mean(dim=1, keepdim=True)).sqrt()
            projected = projected + self.trainable * bounded
        return torch.where((rows > 0).unsqueeze(1), projected, self.missing)
