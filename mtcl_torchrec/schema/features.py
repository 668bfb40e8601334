"""Input columns, and the embedding tables they look up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

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
            column, or a string split at `separator`), ``"dense"`` (a number) or ``"history"`` (a list as of a bag,
            whose order counts: what someone met before the row, oldest first).
        vocabulary_size: rows of the embedding table, row 0 (unknown or missing) included.  May be left out
            where ``encoding="vocabulary"``: the training split decides.
        embedding_dim: width of the embedding, a multiple of 4.
        pooling: how the embeddings of a bag become one vector.
        encoding: how a value becomes a row: ``"index"`` (it already is an integer in
            [0, vocabulary_size)), ``"vocabulary"`` (values of the training split are numbered
            from 1, any other takes row 0), ``"hash"`` (into 1 … vocabulary_size - 1) or ``"log_bucket"`` (of the ages
            beside a history alone: the seconds s between an event and the row take row ⌊log₂(1 + s)⌋ + 1, at most
            vocabulary_size - 1, which is 33 by default; 0 is a missing one).
        min_count: values rarer than this in the training split take row 0 (`vocabulary` only).
        table: features that name the same table share its rows; the default is a table of its own.
        data_type: number format of the embedding table's weights.  Shorter ones than fp32 need a fused optimizer, bf16
            needs CUDA.
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
    kind: Literal["id", "bag", "dense", "history"] = "id"
    column: str | None = None
    vocabulary_size: PositiveInt | None = None
    embedding_dim: PositiveInt = 16
    pooling: Literal["sum", "mean"] = "mean"
    encoding: Literal["index", "vocabulary", "hash", "log_bucket"] = "vocabulary"
    min_count: PositiveInt = 1
    separator: Annotated[str, Field(min_length=1)] = "|"
    table: str | None = None
    data_type: Literal["fp32", "fp16", "bf16"] = "fp32"
    transform: Literal["none", "log", "logit"] = "none"
    clip: Annotated[float, Field(gt=0)] = 5.0
    mark_missing: bool = True
    of: str | None = None
    beside: str | None = None
    max_length: PositiveInt = 50

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

    @property
    def rows_from(self) -> str:
        """The column this feature is read from."""
        return self.column or self.name

    @property
    def table_name(self) -> str:
        """The embedding table this feature looks up."""
        return self.table or self.name
