"""What becomes of histories, and towers that read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from mtcl_torchrec.config.base import Fraction, Part, known_kind
from mtcl_torchrec.schema import Schema, nearest

SequenceKind = Literal["din", "gru", "lstm", "transformer", "mean"]
SEQUENCE_KINDS: tuple[SequenceKind, ...] = get_args(SequenceKind)

# Options that only some kinds have.  A kind given by its import path has `options` instead.
_BELONGS: dict[str, set[str]] = {
    "hidden": {"din", "gru", "lstm"},
    "layers": {"gru", "lstm"},
    "blocks": {"transformer"},
    "heads": {"transformer"},
    "times": {"transformer"},
    "dropout": {"din", "gru", "lstm", "transformer"},
}


class SequenceConfig(Part):
    """How a history becomes one vector; see `mtcl_torchrec.modules.sequences`.

    Args:
        kind: ``"din"`` (attention of the candidate), ``"gru"`` or ``"lstm"`` (the last state), ``"transformer"``
            (causal), ``"mean"``, or the import path of an `nn.Module` of your own; what is said of a trunk's goes for
            it, too.
        hidden: width of DIN's hidden layer, 36 by default; or of a recurrent state, which is that of the embeddings by
            default.
        layers: of a recurrent network.
        blocks, heads: of the transformer; the heads divide the width of the embeddings.
        times: whether the time between two events counts in the transformer, where ages stand beside the history.
        dropout: of what the encoder computes.
        options: of an encoder of your own: arguments of its constructor.
    """

    kind: str = "din"
    hidden: PositiveInt | None = None
    layers: PositiveInt = 1
    blocks: PositiveInt = 2
    heads: PositiveInt = 2
    times: bool = True
    dropout: Fraction = 0.0
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return known_kind(kind, SEQUENCE_KINDS, "MyEncoder")

    @model_validator(mode="after")
    def _fitting(self) -> SequenceConfig:
        for field, kinds in _BELONGS.items():
            if field in self.model_fields_set and self.kind not in kinds:
                own = "; give an encoder of your own its arguments as options" if self.import_path else ""
                raise ValueError(f"{field} belongs to {' and '.join(sorted(kinds))}, not to {self.kind}{own}")
        if self.options and not self.import_path:
            raise ValueError(f"options belong to an encoder given by its import path, not to {self.kind}")
        return self

    @property
    def import_path(self) -> str | None:
        """Where an encoder of one's own is, None for a kind of ours."""
        return self.kind if ":" in self.kind else None


def _as_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class TowerConfig(Part):
    """What stands between a task's representation and its head, before the layers of `tower_layers`.

    Args:
        kind: ``"mlp"`` (those layers alone) or ``"lstm"`` (an LSTM of each task's own over the shared embeddings, see
            `mtcl_torchrec.modules.sequences.lstm_towers.LSTMTowers`).
        hidden: width of the LSTM's state.
        history: which history it reads, where there are several.
    """

    kind: Literal["mlp", "lstm"] = "mlp"
    hidden: PositiveInt = 32
    history: str | None = None

    @model_validator(mode="after")
    def _fitting(self) -> TowerConfig:
        said = next((field for field in ("hidden", "history") if field in self.model_fields_set), None)
        if said is not None and self.kind != "lstm":
            raise ValueError(f"{said} belongs to lstm, not to {self.kind}")
        return self


SequenceOrKind = Annotated[SequenceConfig, BeforeValidator(_as_kind)]
TowerOrKind = Annotated[TowerConfig, BeforeValidator(_as_kind)]


def check_sequences(sequences: dict[str, SequenceConfig], tower: TowerConfig, schema: Schema) -> None:
    """See that what is named is in the schema, and that widths fit.

    Raises:
        ValueError: naming the key.
    """
    histories = {feature.name: feature for feature in schema.history_features if feature.of is not None}
    for name, feature in histories.items():
        if "item" in feature.group:
            raise ValueError(f"feature {name!r}: a history is the user's or the context's, the same for all candidates")
    for name, config in sequences.items():
        if name not in histories:
            companion = next((f for f in schema.history_features if f.name == name), None)
            hint = f"; it stands beside {companion.beside!r}" if companion is not None else nearest(name, histories)
            raise ValueError(f"model.sequences: no history {name!r}{hint}")
        if config.kind == "transformer" and histories[name].embedding_dim % config.heads:
            raise ValueError(
                f"model.sequences.{name}.heads: {config.heads} do not divide the embedding_dim of "
                f"{histories[name].of!r}, {histories[name].embedding_dim}"
            )
    if tower.history is not None and tower.history not in histories:
        raise ValueError(f"model.tower.history: no history {tower.history!r}{nearest(tower.history, histories)}")
    if tower.kind == "lstm" and tower.history is None and len(histories) > 1:
        raise ValueError(f"model.tower.history: say which history the lstm reads: {' or '.join(histories)}")
