"""Frozen vectors for serving: projected once for every item, so that a request looks up narrow rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtcl_torchrec.modules.lookups import Lookups
from mtcl_torchrec.modules.sequences import Sequences
from mtcl_torchrec.modules.vectors import FrozenVectors
from mtcl_torchrec.serving.histories import ServedHistories
from mtcl_torchrec.serving.tables import TablePrecision, quantise_rows

ROWS_AT_ONCE = 65_536


class ProjectedVectors(nn.Module):
    """What a `FrozenVectors` makes of each row, its trained part included: (V + 1, D) instead of (V + 1, d).

    Args:
        vectors: as trained, on the CPU.
        own: (V + 1, D) the weights of its table, where a part is trained.
        precision: of the stored rows.
    """

    rows: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, vectors: FrozenVectors, own: torch.Tensor | None = None, precision: TablePrecision | None = None
    ) -> None:
        super().__init__()
        self.feature, self.features, self.dims = vectors.feature, vectors.features, dict(vectors.dims)
        self.precision = precision or "fp32"
        with torch.no_grad():
            parts = [
                vectors.of_rows(of, None if own is None else own[of])
                for of in torch.arange(vectors.vectors.shape[0]).split(ROWS_AT_ONCE)
            ]
        rows = torch.cat(parts)
        if self.precision == "int8":
            rows, scale = quantise_rows(rows)
            self.register_buffer("scale", scale)
        self.register_buffer("rows", rows.half() if self.precision == "fp16" else rows)

    def forward(self, sparse_features: Any, sequence_embeddings: Any = None) -> dict[str, torch.Tensor]:
        """feature -> (B, D) float32; see `FrozenVectors.forward`."""
        jagged = sparse_features[self.feature]
        values, lengths, offsets = jagged.values(), jagged.lengths(), jagged.offsets()
        padded = torch.cat([values, values.new_zeros(1)])
        rows = torch.where(lengths > 0, padded[offsets[:-1]], 0)
        rows = torch.where((rows > 0) & (rows < self.rows.shape[0]), rows, 0)
        read = self.rows[rows].float()
        if self.precision == "int8":
            scale = self.scale[rows]
            read = read * scale[:, :1] + scale[:, 1:]
        return {self.feature: read}


def served_lookups(
    lookups: Lookups, collection: Any, precision: TablePrecision | None, collections: Sequence[nn.Module] = ()
) -> Lookups:
    """A model's lookups with all frozen vectors projected, and histories looked up in tables of their own; others are
    shared with the model.

    Args:
        collection: the unsharded EmbeddingBagCollection, which has the tables of what is trained.
        collections: the unsharded EmbeddingCollections, which have those of histories.
    """
    taken = {key for module in lookups if isinstance(module, FrozenVectors) for key in module.takes}
    own: dict[str, torch.Tensor] = {}
    for table in collection.embedding_bag_configs() if taken else ():
        own |= dict.fromkeys(table.feature_names, collection.embedding_bags[table.name].weight.detach())
    served = [
        ProjectedVectors(module, own[module.feature] if module.takes else None, precision)
        if isinstance(module, FrozenVectors)
        else ServedHistories(module, collections, precision)
        if isinstance(module, Sequences)
        else module
        for module in lookups
    ]
    return Lookups({key: width for key, width in lookups.table_dims.items() if key not in taken}, served)
