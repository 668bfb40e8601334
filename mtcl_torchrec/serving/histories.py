"""Histories for serving: tables with a row for each value, looked up with plain tensor operations, once a user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.modules.embedding_modules import EmbeddingCollection

from mtcl_torchrec.modules.embeddings import single_value
from mtcl_torchrec.modules.sequences import HistoryEncoder, PaddedHistory, Sequences, positions_of
from mtcl_torchrec.serving.tables import TablePrecision, quantise_rows


class UserHistories(NamedTuple):
    """The histories of R users, of whom B rows are.

    Args:
        values: (W,) int64 row numbers: those of the first feature's R users, then of the second's, and so on.
        lengths: (H, R) int64.
        of_row: (B,) int64, the user of each row.
    """

    values: torch.Tensor
    lengths: torch.Tensor
    of_row: torch.Tensor


class ServedHistories(nn.Module):
    """What `Sequences` gives, from tables that are held here: candidates for each row, and what depends on a history
    alone for each user.  Histories are padded to their cap, so that it can be exported.

    Args:
        sequences: of the model; its encoders are shared with it.
        collections: in this process, unsharded.
        precision: of the stored rows; None keeps each table's own.

    Raises:
        TypeError: other kinds of collections.

    Attributes:
        features: the candidates, which are looked up for each row.
        histories: the features in the order of `UserHistories.lengths`.
    """

    def __init__(
        self, sequences: Sequences, collections: Sequence[nn.Module], precision: TablePrecision | None = None
    ) -> None:
        super().__init__()
        self.sequences = sequences
        self.dims, self.features = sequences.dims, sequences.candidates
        encoders = sequences.encoders()
        self.histories = tuple(f for name, of in encoders.items() for f in (name, *of.beside))
        self._table_of: dict[str, int] = {}
        self._precisions: list[TablePrecision] = []
        for collection in collections:
            if not isinstance(collection, EmbeddingCollection):
                raise TypeError(f"a {type(collection).__name__} cannot be exported; expected an EmbeddingCollection")
            for config in collection.embedding_configs():
                self._table_of |= dict.fromkeys(config.feature_names, len(self._precisions))
                self._store(collection.embeddings[config.name].weight.detach(), precision)

    def _store(self, weight: torch.Tensor, precision: TablePrecision | None) -> None:
        kind: TablePrecision = precision or ("fp16" if weight.dtype == torch.float16 else "fp32")
        number = len(self._precisions)
        self._precisions.append(kind)
        if kind == "int8":
            rows, scale = quantise_rows(weight)
            self.register_buffer(f"rows_{number}", rows)
            self.register_buffer(f"scale_{number}", scale)
        else:
            self.register_buffer(f"rows_{number}", weight.to(torch.float16 if kind == "fp16" else torch.float32))

    def rows(self, feature: str, ids: torch.Tensor) -> torch.Tensor:
        """(..., dim) float32 embeddings of row numbers (...); one outside of the table is read as 0."""
        number = self._table_of[feature]
        table = getattr(self, f"rows_{number}")
        at = torch.where((ids >= 0) & (ids < table.shape[0]), ids, 0)
        read = F.embedding(at, table).float()
        if self._precisions[number] == "int8":
            scale = F.embedding(at, getattr(self, f"scale_{number}"))
            read = read * scale[..., :1] + scale[..., 1:]
        return read

    def forward(self, features: Any, sequence_embeddings: None = None) -> dict[str, Any]:
        """As `Sequences`, but that the histories themselves are those of R users.

        Args:
            features: of B rows, with an attribute ``histories``, a `UserHistories`.
            sequence_embeddings: none; what is looked up is looked up here.
        """
        out: dict[str, Any] = {}
        for name in self.features:
            value = single_value(features, name)
            out[name] = torch.where((value >= 0).unsqueeze(1), self.rows(name, value), 0.0)
        users: UserHistories = features.histories
        offsets = F.pad(users.lengths.flatten().cumsum(0), (1, 0))
        for name, of in self.sequences.encoders().items():
            history = self._history(name, of, users, offsets)
            if of.reads_candidate:
                out[name] = of(history.rows(users.of_row), out[str(of.of)])
            else:
                out[name] = of(history)[users.of_row]
            out[positions_of(name)] = history
        return out

    def _history(self, name: str, of: HistoryEncoder, users: UserHistories, offsets: torch.Tensor) -> PaddedHistory:
        ids = {feature: self._padded_ids(feature, of.max_length, users, offsets) for feature in (name, *of.beside)}
        values = of.positions(self.rows(name, ids[name]), (self.rows(f, ids[f]) for f in of.beside))
        lengths = users.lengths[self.histories.index(name)]
        return PaddedHistory(values, lengths, None if of.ages is None else ids[of.ages])

    def _padded_ids(self, feature: str, max_length: int, users: UserHistories, offsets: torch.Tensor) -> torch.Tensor:
        """(R, max_length) row numbers, the newest of each user from the left, 0 behind them."""
        number, width = self.histories.index(feature), users.lengths.shape[1]
        ends = offsets[number * width + 1 : (number + 1) * width + 1]
        lengths = users.lengths[number].clamp(max=max_length)
        place = torch.arange(max_length, device=ends.device)
        there = place < lengths.unsqueeze(1)
        at = torch.where(there, (ends - lengths).unsqueeze(1) + place, users.values.shape[0])
        return F.pad(users.values, (0, 1))[at]
