"""Input columns, and the embedding tables they look up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from mtcl_torchrec.schema.declared import Declared, GroupSet
from mtcl_torchrec.schema.histories import check_history


def own_table(table: str, task: str) -> str:
    """Name of the copy of an embedding table that one task alone trains.

    Example:
        >>> own_table("user_id", "click")
        'user_id@click'
    """
    return f"{table}@{task}"


class Feature(Declared):
    """One input column.

    Args:
        name: name of the feature, and of its column unless `column` says otherwise.
        group: whose property it is: ``"user"``, ``"item"`` or ``"context"``.  A feature of a pair
            (how this user likes this tag) belongs to several groups, and a task restricted by
            `Task.inputs` sees it only if it may see all of them.
        kind: ``"id"`` (one categorical value a row), ``"bag"`` (a list of them: a Parquet list
            column, or a string split at `separator`), ``"dense"`` (a number), ``"history"`` (a list as of a bag, whose
            order counts: what someone met before the row, oldest first), ``"vector"`` (the key of an item, which
            stands for its vector in a file) or ``"semantic_id"`` (the key of an item, which stands for its code in a
            file: all prefixes of the code are looked up in one table, and summed).  Several features may read one
            column, such as an item's id, its vector and its semantic id.
        vocabulary_size: rows of the embedding table, row 0 (unknown or missing) included.  May be left out
            where ``encoding="vocabulary"``: the training split decides.
        embedding_dim: width of the embedding, a multiple of 4; of a vector, the width after its projection.
        pooling: how the embeddings of a bag become one vector.
        encoding: how a value becomes a row: ``"index"`` (it already is an integer in
            [0, vocabulary_size)), ``"vocabulary"`` (values of the training split are numbered
            from 1, any other takes row 0), ``"hash"`` (into 1 … vocabulary_size - 1) or ``"log_bucket"`` (of the ages
            beside a history alone: the seconds s between an event and the row take row ⌊log₂(1 + s)⌋ + 1, at most
            vocabulary_size - 1, which is 33 by default; 0 is a missing one).
        min_count: values rarer than this in the training split take row 0 (`vocabulary` only).
        table: features that name the same table share its rows; the default is a table of its own.
        data_type: number format of the embedding table's weights.  Shorter ones than fp32 need a fused optimizer, bf16
            needs CUDA.  Of a vector feature, fp32 or fp16, the format in which the frozen vectors are kept.
        vectors: of a vector feature, the vectors file (see `mtcl_torchrec.data.vectors`, ``mtcl embed`` writes it).
            Every item of the file has its vector, also one that training never met; an item without one gets a learnt
            vector.
        trainable: of a vector feature, the bound of what training adds to each item's projected vector: the root mean
            square of its numbers stays below this.  0, the default, adds nothing; above 0 there is a table of that name
            with a row for each vector, that starts at zero.
        codes: of a semantic_id feature, the codes file.
        transform: of a dense feature before it is standardised: ``"none"``, ``"log"``
            (sign(x)·log(1 + |x|)) or ``"logit"`` (for rates in [0, 1]).
        clip: a standardised dense value is cut at ± this many standard deviations.
        mark_missing: whether a dense feature that is missing in some training rows gets a second column that says so.
        of: the id feature whose values a history lists, and whose table it shares.  A value that is not in the table's
            vocabulary, which is that of the id features alone, takes row 0 and stays in the list.
        beside: the history that a companion says more of: its values have the same lengths row by row, such as kinds
            of the events or their ages, and a table of their own.
        max_length: a longer history is cut to its newest so many values, its companions with it.

    Example:
        >>> Feature(name="city", group="user", kind="id", vocabulary_size=1000).rows_from
        'city'
        >>> Feature(name="clicked", group="user", kind="history", of="item_id", max_length=20).of
        'item_id'
    """

    name: str
    group: Annotated[GroupSet, Field(min_length=1)]
    kind: Literal["id", "bag", "dense", "history", "vector", "semantic_id"] = "id"
    column: str | None = None
    vocabulary_size: PositiveInt | None = None
    embedding_dim: PositiveInt = 16
    pooling: Literal["sum", "mean"] = "mean"
    encoding: Literal["index", "vocabulary", "hash", "log_bucket"] = "vocabulary"
    min_count: PositiveInt = 1
    separator: Annotated[str, Field(min_length=1)] = "|"
    table: str | None = None
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    vectors: str | None = None
    trainable: Annotated[float, Field(ge=0)] = 0.0
    codes: str | None = None
    transform: Literal["none", "log", "logit"] = "none"
    clip: Annotated[float, Field(gt=0)] = 5.0
    mark_missing: bool = True
    of: str | None = None
    beside: str | None = None
    max_length: PositiveInt = 50

    @field_validator("kind", mode="before")
    @classmethod
    def _no_text(cls, kind: object) -> object:
        if kind == "text":
            raise ValueError("no kind 'text': `mtcl embed` makes vectors of texts, which are read with kind: vector")
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> Feature:
        check_history(self)
        if self.kind == "dense":
            embedding_only = self.model_fields_set & {
                "vocabulary_size", "embedding_dim", "pooling", "encoding", "min_count", "table", "separator",
                "data_type",
            }  # fmt: skip
            if embedding_only:
                raise ValueError(f"feature {self.name!r} is dense and has no {sorted(embedding_only)[0]}")
        else:
            if self.model_fields_set & {"transform", "clip", "mark_missing"}:
                raise ValueError(
                    f"feature {self.name!r} is no dense feature: transform, clip and mark_missing do nothing"
                )
            if self.encoding in ("index", "hash") and self.vocabulary_size is None:
                raise ValueError(f"feature {self.name!r}: encoding {self.encoding!r} needs vocabulary_size")
            if self.embedding_dim % 4:
                raise ValueError(f"feature {self.name!r}: embedding_dim is a multiple of 4 (FBGEMM's kernels need it)")
            if "@" in self.name:
                raise ValueError(f"feature {self.name!r}: TorchRec takes no '@' in a name; use `column` to rename it")
            if self.vocabulary_size is not None and self.vocabulary_size < 2:
                raise ValueError(f"feature {self.name!r}: vocabulary_size must be at least 2 (row 0 is 'unknown')")
        return self

    @model_validator(mode="after")
    def _content(self) -> Feature:
        for field, kind in (("vectors", "vector"), ("trainable", "vector"), ("codes", "semantic_id")):
            if field in self.model_fields_set and self.kind != kind:
                raise ValueError(f"feature {self.name!r}: {field} belongs to kind {kind}, not to {self.kind}")
        if not self.has_content:
            return self
        file = "vectors" if self.kind == "vector" else "codes"
        if not getattr(self, file):
            raise ValueError(f"feature {self.name!r}: kind {self.kind} needs {file}, a file")
        of_values = ["vocabulary_size", "encoding", "min_count", "separator", "pooling"]
        of_values += ["table"] if self.kind == "vector" else []
        for field in of_values:
            if field in self.model_fields_set and not (field == "pooling" and self.pooling == "sum"):
                why = (
                    "the sum of an item's prefixes" if field == "pooling" else f"its rows are those of its {file} file"
                )
                raise ValueError(f"feature {self.name!r}: {field} does nothing for kind {self.kind}: {why}")
        if self.kind == "vector" and self.data_type == "bf16":
            raise ValueError(f"feature {self.name!r}: vectors are kept in fp32 or fp16, not in bf16")
        return self

    @property
    def has_content(self) -> bool:
        """Whether its values are keys of items in a file with something of each item."""
        return self.kind in ("vector", "semantic_id")

    @property
    def has_table(self) -> bool:
        """Whether it looks up an embedding table."""
        return self.kind != "dense" and (self.kind != "vector" or self.trainable > 0)

    @property
    def learns_values(self) -> bool:
        """Whether the training split decides which values have a row."""
        return self.kind != "dense" and not self.has_content and self.encoding == "vocabulary"

    @property
    def rows_from(self) -> str:
        """The column this feature is read from."""
        return self.column or self.name

    @property
    def table_name(self) -> str:
        """The embedding table this feature looks up."""
        return self.table or self.name
