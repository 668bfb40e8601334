"""Histories and their candidates as inputs by key: from what embedding collections looked up to one vector a row."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor

from mtcl_torchrec.modules.sequences.history import History, JaggedHistory
from mtcl_torchrec.schema import ConfigError, nearest


def positions_of(history: str) -> str:
    """Key of a history itself, beside that of the vector that became of it, in what `Sequences` returns."""
    return f"{history}:positions"


class HistoryInput(NamedTuple):
    """A history of the model, for what reads its positions.

    Args:
        width: of a position's vector.
        candidate: the feature of the same table that holds the candidate, or None.
        attends: whether the vector that becomes of it depends on the candidate.
    """

    width: int
    candidate: str | None
    attends: bool = False


class HistoryEncoder(nn.Module):
    """An encoder, and what one history is made of.

    A position's vector is the sum of its embedding and its companions', each through a projection of its own where its
    table is of another width.  A row without history has a learnt vector, zero at first.

    Args:
        encoder: of `mtcl_torchrec.modules.sequences`, or one's own.
        of: the feature that is looked up in the same table and holds the candidate; needed by an encoder that reads it.
        beside: companions: features of the same lengths, row by row.
        ages: that companion whose values are buckets of ages.
        max_length: the cap.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        of: str | None = None,
        beside: Sequence[str] = (),
        ages: str | None = None,
        max_length: int = 50,
    ) -> None:
        super().__init__()
        if ages is not None and ages not in beside:
            raise ConfigError(f"ages: {ages!r} does not stand beside the history{nearest(ages, beside)}")
        self.encoder, self.of, self.beside, self.ages, self.max_length = encoder, of, tuple(beside), ages, max_length
        self.reads_candidate = bool(getattr(encoder, "reads_candidate", False))

    def build(self, history: str, dims: Mapping[str, int]) -> None:
        """Create the parameters; `Sequences` does so.

        Raises:
            ConfigError: the encoder does not keep its contract, or a feature is looked up in no embedding collection.
        """
        for feature in (history, *self.beside, *((self.of,) if self.reads_candidate and self.of else ())):
            if feature not in dims:
                raise ConfigError(f"history {history!r}: no embedding collection looks up {feature!r}"
                                  f"{nearest(feature, dims)}")  # fmt: skip
        width, name = dims[history], type(self.encoder).__name__
        self.width = width
        if self.reads_candidate and self.of is None:
            raise ConfigError(f"history {history!r}: {name} reads the candidate; say of which feature (of=...)")
        if self.reads_candidate and dims[str(self.of)] != width:
            raise ConfigError(f"history {history!r}: its candidate {self.of!r} is looked up in another table")
        _build_encoder(self.encoder, history, width, self.max_length, ages=self.ages is not None)
        self.project = nn.ModuleDict(
            {f"of_{n}": nn.Linear(dims[feature], width, bias=False)
             for n, feature in enumerate(self.beside) if dims[feature] != width}
        )  # fmt: skip
        self.empty = nn.Parameter(torch.zeros(int(self.encoder.out_features)))  # type: ignore[arg-type]

    def positions(self, embeddings: torch.Tensor, beside: Iterable[torch.Tensor]) -> torch.Tensor:
        """(..., D) vectors of positions, from their embeddings (..., D) and those of the companions, in their order."""
        x = embeddings.float()
        for number, companion in enumerate(beside):
            name = f"of_{number}"
            companion = companion.float()
            x = x + (self.project[name](companion) if name in self.project else companion)
        return x

    def forward(self, history: History, candidate: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H) the vector of each row.

        Args:
            candidate: (B, D), for an encoder that reads it.

        Raises:
            ConfigError: an encoder of one's own returns another shape.
        """
        out = self.encoder(history, candidate) if self.reads_candidate else self.encoder(history)
        expected = (history.lengths.shape[0], self.empty.shape[0])
        if not isinstance(out, torch.Tensor) or tuple(out.shape) != expected:
            given = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ConfigError(f"encoder {type(self.encoder).__name__} returned {given}, expected {expected}: rows, "
                              "out_features")  # fmt: skip
        return torch.where((history.lengths > 0).unsqueeze(1), out, self.empty)


def _build_encoder(encoder: nn.Module, history: str, width: int, max_length: int, *, ages: bool) -> None:
    name = type(encoder).__name__
    if not isinstance(encoder, nn.Module) or type(encoder).forward is nn.Module.forward:
        raise ConfigError(f"history {history!r}: an encoder is an nn.Module with forward(history), not {name}")
    build = getattr(encoder, "build", None)
    if build is not None:
        if getattr(encoder, "built_for_a_model", False):
            raise ConfigError(f"history {history!r}: this {name} encodes another history already; make one for each")
        told = {"ages": ages} if "ages" in inspect.signature(build).parameters else {}
        try:
            build(width, max_length, **told)
        except ValueError as error:
            raise ConfigError(f"history {history!r}: {error}") from None
        encoder.built_for_a_model = True  # type: ignore[assignment]
    out = getattr(encoder, "out_features", None)
    if not isinstance(out, int) or out < 1:
        raise ConfigError(f"history {history!r}: encoder {name} has no out_features: an int, the width of its vectors")


class Sequences(nn.Module):
    """Inputs by key from embedding collections: each history as one vector, and each id feature that shares a table
    with one, among them the candidates.  One of the modules that ``MTCL(lookups=...)`` takes.

    Args:
        collections: the embedding collections, also ones on the meta device.
        histories: feature -> how it becomes a vector.

    Raises:
        ConfigError: a history is looked up nowhere, or an encoder does not keep its contract.

    Attributes:
        dims: key -> width, of candidates and histories.
        candidates: the features of one value a row.
        widths: feature that is looked up -> width of its embedding.
        lengths: history or companion -> its cap.

    Example:
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from mtcl_torchrec.modules.sequences import DIN
        >>> table = EmbeddingConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["item", "clicked"])
        >>> tables = EmbeddingCollection(tables=[table])
        >>> sequences = Sequences([tables], {"clicked": HistoryEncoder(DIN(), of="item")})
        >>> sequences.dims
        {'item': 4, 'clicked': 4}
        >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
        >>> ids = KeyedJaggedTensor(
        ...     ["item", "clicked"], values=torch.tensor([1, 2, 3, 4, 5]), lengths=torch.tensor([1, 1, 0, 3])
        ... )
        >>> sequences(ids, tables(ids))["clicked"].shape
        torch.Size([2, 4])
    """

    def __init__(self, collections: Sequence[nn.Module], histories: Mapping[str, HistoryEncoder]) -> None:
        super().__init__()
        configs = [config for collection in collections for config in sequence_configs(collection)]
        of_feature = {feature: config.embedding_dim for config in configs for feature in config.feature_names}
        self.widths = of_feature
        self.lengths = {f: of.max_length for name, of in histories.items() for f in (name, *of.beside)}
        self.candidates = tuple(feature for feature in of_feature if feature not in self.lengths)
        self.names = tuple(histories)
        self.histories = nn.ModuleList(histories.values())
        for name, encoder in histories.items():
            encoder.build(name, of_feature)
        self.dims = {feature: of_feature[feature] for feature in self.candidates}
        self.dims |= {name: int(of.encoder.out_features) for name, of in histories.items()}  # type: ignore[arg-type]

    def encoders(self) -> dict[str, HistoryEncoder]:
        """History -> its encoder."""
        return dict(zip(self.names, self.histories, strict=True))  # type: ignore[arg-type]

    def inputs(self) -> dict[str, HistoryInput]:
        """What the histories are, for others that read them."""
        return {name: HistoryInput(of.width, of.of, of.reads_candidate) for name, of in self.encoders().items()}

    def forward(
        self, sparse_features: Any, sequence_embeddings: Mapping[str, JaggedTensor] | None = None
    ) -> dict[str, Any]:
        """Candidates and histories by key, (B, width) each, zero of a candidate that is missing; and, under
        `positions_of` each history, the history itself.

        Args:
            sparse_features: of B rows, for the ages.
            sequence_embeddings: what the embedding collections gave.

        Raises:
            ConfigError: the model has no embedding collection.
        """
        if sequence_embeddings is None:
            raise ConfigError("histories need MTCL(embedding_collection=...)")
        out: dict[str, Any] = {name: _first(sequence_embeddings[name]) for name in self.candidates}
        for name, of in self.encoders().items():
            looked_up = sequence_embeddings[name]
            values = of.positions(looked_up.values(), (sequence_embeddings[f].values() for f in of.beside))
            ages = None if of.ages is None else sparse_features[of.ages].values()
            history = JaggedHistory(values, looked_up.lengths(), of.max_length, ages)
            out[name] = of(history, out[str(of.of)] if of.reads_candidate else None)
            out[positions_of(name)] = history
        return out


def sequence_configs(collection: nn.Module) -> list[EmbeddingConfig]:
    """The tables of an embedding collection.

    Raises:
        TypeError: it is none.
    """
    configs: Any = getattr(collection, "embedding_configs", None)
    if configs is None:
        raise TypeError(
            f"{type(collection).__name__} has no embedding_configs(); expected a TorchRec EmbeddingCollection"
        )
    return configs()


def _first(looked_up: JaggedTensor) -> torch.Tensor:
    """(B, D) float32, the embedding of each row's first value; zero where it has none."""
    values, lengths = looked_up.values().float(), looked_up.lengths().long()
    at = torch.where(lengths > 0, lengths.cumsum(0) - lengths, values.shape[0])
    return F.pad(values, (0, 0, 0, 1)).index_select(0, at)
