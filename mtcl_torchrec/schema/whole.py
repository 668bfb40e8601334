"""Features, tasks, and the columns that name the user, the item and the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from mtcl_torchrec.schema.declared import Declared, check_unique, nearest
from mtcl_torchrec.schema.features import Feature
from mtcl_torchrec.schema.histories import resolved
from mtcl_torchrec.schema.tasks import Task, chain_links, check_weights


class Schema(Declared):
    """Features, tasks, and the columns that name the user, the item and the time.

    Args:
        features: the input columns.
        tasks: what is predicted.
        user: column that names the user (metrics within a user, `recommend --user`).
        item: column that names the item.
        time: column of the event's time; a number or a timestamp.
        request: column that names the request, the rows that were offered to a user together: what `Task.pairwise` and
            fused scores within a request compare; without one, all rows of a user.
        reward: column of a number in [0, 1] that the fused score can be trained against, empty where it is not known.

    Example:
        >>> schema = Schema(
        ...     features=[Feature(name="user_id", group="user"), Feature(name="price", group="item", kind="dense")],
        ...     tasks=[Task.binary("buy")],
        ...     user="user_id",
        ... )
        >>> [f.name for f in schema.sparse_features], [f.name for f in schema.dense_features]
        (['user_id'], ['price'])
    """

    features: Annotated[tuple[Feature, ...], Field(min_length=1)]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    user: str | None = None
    item: str | None = None
    time: str | None = None
    request: str | None = None
    reward: str | None = None

    @field_validator("features", mode="after")
    @classmethod
    def _histories_know_their_tables(cls, features: tuple[Feature, ...]) -> tuple[Feature, ...]:
        check_unique("feature", [f.name for f in features])
        return resolved(features)

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        check_unique("task", [t.name for t in self.tasks])
        chain_links(self.tasks)
        check_weights(self.tasks)
        sparse = {f.name: f for f in self.sparse_features if f.kind != "history" and not f.has_content}
        for task in self.tasks:
            if task.item_class is not None and task.item_class not in sparse:
                raise ValueError(
                    f"task {task.name!r}: item_class {task.item_class!r} is no id feature"
                    f"{nearest(task.item_class, sparse)}"
                )
        for task in self.tasks:
            self._check_softmax(task)
            self._check_factors(task)
        paired = next((t.name for t in self.tasks if t.pairwise), None)
        if paired is not None and (self.request or self.user) is None:
            raise ValueError(f"task {paired!r}: pairwise compares rows of one request, and needs request or user")
        check_unique("table (dots and underscores are the same)", [t.replace(".", "_") for t in self.tables()])
        for table, features in self.tables().items():
            agree = ["embedding_dim", "encoding", "vocabulary_size", "min_count", "data_type"]
            agree += ["pooling"] if table not in self.sequence_tables() else []  # whose rows are not pooled
            agree += ["kind", "codes"] if any(f.has_content for f in features) else []
            for field in agree:
                if len({getattr(f, field) for f in features}) > 1:
                    names = " and ".join(f.name for f in features)
                    raise ValueError(f"features {names} share table {table!r} and must agree on {field}")
        return self

    def _check_softmax(self, task: Task) -> None:
        """Raise ValueError where a task's sampled softmax cannot tell items apart."""
        softmax = task.head.sampled_softmax
        if softmax is None:
            return
        ids = {f.name: f for f in self.features if f.kind == "id"}
        if softmax.item is not None and softmax.item not in ids:
            hint = nearest(softmax.item, ids)
            raise ValueError(f"task {task.name!r}: head.sampled_softmax.item: no id feature {softmax.item!r}{hint}")
        if softmax.item is None and self.item_feature is None:
            raise ValueError(
                f"task {task.name!r}: head.sampled_softmax compares items: name the id feature that tells them apart "
                "(item), or the schema's item column, with an id feature of it"
            )

    def _check_factors(self, task: Task) -> None:
        """Raise ValueError where a dot head's vectors cannot take a feature's embeddings as they are."""
        what, embedded = f"task {task.name!r}: head.factors", {f.name: f for f in self.sparse_features}
        check_unique(f"head.factors of task {task.name!r}:", task.head.factors)
        for name in task.head.factors:
            if name not in embedded:
                raise ValueError(f"{what}: no feature {name!r} that has embeddings{nearest(name, embedded)}")
            dim = embedded[name].embedding_dim
            if dim != task.head.dim:
                raise ValueError(
                    f"{what}: {name!r} has embedding_dim {dim}, and the head dim {task.head.dim}; make them equal"
                )

    @property
    def item_feature(self) -> str | None:
        """The id feature of the item column, if there is one."""
        return next((f.name for f in self.features if f.kind == "id" and f.rows_from == self.item), None)

    @property
    def sparse_features(self) -> tuple[Feature, ...]:
        """Features that a row has as ids: looked up in embedding tables, or in vectors; in declaration order."""
        return tuple(f for f in self.features if f.kind != "dense")

    @property
    def dense_features(self) -> tuple[Feature, ...]:
        """Numeric features, in declaration order."""
        return tuple(f for f in self.features if f.kind == "dense")

    def with_files(self, place: Callable[[str], str]) -> Schema:
        """The schema with other paths of the files that its features name.

        Args:
            place: from a path to the one that stands in its stead.
        """
        features = []
        for feature in self.features:
            files = {name: place(path) for name in ("vectors", "codes") if (path := getattr(feature, name)) is not None}
            features.append(feature.model_copy(update=files) if files else feature)
        return self.model_copy(update={"features": tuple(features)})

    def tables(self) -> dict[str, list[Feature]]:
        """Embedding table name -> features that look it up."""
        tables: dict[str, list[Feature]] = {}
        for feature in self.sparse_features:
            if not feature.has_table:
                continue
            tables.setdefault(feature.table_name, []).append(feature)
        return tables

    @property
    def history_features(self) -> tuple[Feature, ...]:
        """Histories and their companions, in declaration order."""
        return tuple(f for f in self.features if f.kind == "history")

    def companions(self, history: str) -> tuple[Feature, ...]:
        """The features that stand beside a history, in declaration order."""
        return tuple(f for f in self.features if f.beside == history)

    def sequence_tables(self) -> dict[str, list[Feature]]:
        """As `tables`, of those that a history or its companion looks up: they give a row for each value.

        Every id feature that shares such a table is looked up there, too.

        Example:
            >>> schema = Schema(
            ...     features=[
            ...         Feature(name="item_id", group="item"),
            ...         Feature(name="city", group="user"),
            ...         Feature(name="clicked", group="user", kind="history", of="item_id"),
            ...         Feature(name="ages", group="user", kind="history", beside="clicked", encoding="log_bucket"),
            ...     ],
            ...     tasks=[Task.binary("buy")],
            ... )
            >>> {table: [f.name for f in features] for table, features in schema.sequence_tables().items()}
            {'item_id': ['item_id', 'clicked'], 'ages': ['ages']}
        """
        tables = {f.table_name for f in self.history_features}
        return {table: features for table, features in self.tables().items() if table in tables}

    @property
    def request_column(self) -> str | None:
        """The column that names the request; the user, where one is needed and none was named."""
        return self.request or (self.user if any(t.pairwise for t in self.tasks) else None)

    def label_columns(self) -> list[str]:
        """Every column that the tasks read, once."""
        columns: list[str] = []
        for task in self.tasks:
            columns += [c for c in (task.label_column, task.mask, task.sample_weight) if c]
        columns += [c for c in (self.request_column, self.reward) if c is not None]
        return list(dict.fromkeys(columns))
