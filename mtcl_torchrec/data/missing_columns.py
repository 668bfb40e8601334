"""What a run that wants a column can do where its files lack it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mtcl_torchrec.data.source import NoColumnError, column_names
from mtcl_torchrec.data.vectors import CODES, VECTOR
from mtcl_torchrec.schema import DataError, Feature, Schema, nearest


@contextmanager
def explained(schema: Schema) -> Iterator[None]:
    """Let an error about a column that is not there say what it is to the schema, and how to have it.

    Args:
        schema: as declared.

    Raises:
        DataError: in the place of a `NoColumnError`, if there is more to say.
    """
    try:
        yield
    except NoColumnError as error:
        if said := how_to_have(schema, error.column, error.there):
            raise DataError(f"{error.path}: no column {error.column!r}{said}") from None
        raise


def how_to_have(schema: Schema, column: str, there: Sequence[str]) -> str:
    """What to do about a column that is not there; empty where nothing is known but the name.

    Args:
        schema: as declared.
        column: what is lacking.
        there: the columns of the file.

    Example:
        >>> from mtcl_torchrec.schema import Task
        >>> features = [
        ...     Feature(name="item", group="item"),
        ...     Feature(name="clicked", group="user", kind="history", of="item"),
        ... ]
        >>> schema = Schema(features=features, tasks=[Task.binary("click")])
        >>> how_to_have(schema, "clicked", ["item", "click"])
        ": 'clicked' is a history; build it of the log with histories: [{feature: clicked, where: [click]}]"
    """
    feature = next((f for f in schema.features if f.rows_from == column), None)
    if feature is None:
        return _of_label(schema, column, there)
    if feature.kind == "history":
        built = feature.beside or feature.name
        events = [task.label_column for task in schema.tasks if task.kind == "binary" and task.label_column in there]
        where = f", where: [{events[0]}]" if events else ""
        what = f"is beside history {built!r}" if feature.beside else "is a history"
        return f": {column!r} {what}; build it of the log with histories: [{{feature: {built}{where}}}]"
    if feature.has_content and feature.column is None:
        keys, file = _keys_of(feature, schema)
        return (
            f": {feature.kind} feature {feature.name!r} needs column: the one with the keys of {file}, such as {keys}"
        )
    if nearest(column, there):
        return ""
    return ": features are columns of the log; join in first what a file of items or users says"


def _of_label(schema: Schema, column: str, there: Sequence[str]) -> str:
    of = column.removeprefix("next_")
    if column not in schema.label_columns() or (nearest(column, there) and of not in there):
        return ""
    if of != column and of in there:
        return f": make the label of the log with next_labels: [{{column: {column}, of: {of}}}]"
    return f"; a label that tells what comes next is made with next_labels: [{{column: {column}, of: COLUMN}}]"


def _keys_of(feature: Feature, schema: Schema) -> tuple[str, str]:
    """The key column of a content feature's file, or else the schema's item; and the file's name."""
    file = Path(str(feature.vectors or feature.codes))
    try:
        keys = [name for name in column_names(file) if name not in (VECTOR, CODES)]
    except DataError:
        keys = []
    return (keys[0] if len(keys) == 1 else schema.item or "item_id"), file.name
