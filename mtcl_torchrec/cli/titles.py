"""What items are called: a file beside the model, which knows them by id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mtcl_torchrec.data.columns import as_text
from mtcl_torchrec.data.source import read_rows
from mtcl_torchrec.schema import ConfigError, nearest

TITLE, NAME = "title", "name"
WIDTH = 36


def read_titles(path: Path, key: str) -> dict[str, str]:
    """Item, as text -> its title.

    Args:
        path: a CSV or Parquet file with the item column, and a column ``title`` or ``name``.
        key: the item column.

    Raises:
        ConfigError: a column is missing.
        DataError: the file cannot be read.
    """
    frame = read_rows([str(path)]).frame
    if key not in frame:
        raise ConfigError(f"--titles {path}: no column {key!r}{nearest(key, list(map(str, frame)))}")
    column = next((name for name in (TITLE, NAME) if name in frame), None)
    if column is None:
        raise ConfigError(f"--titles {path}: no column {TITLE!r} or {NAME!r}")
    known = frame[[key, column]].dropna()
    return dict(zip(as_text(known[key]).tolist(), known[column].map(str), strict=True))


def titles_of(items: Sequence[object], titles: dict[str, str]) -> list[str]:
    """The titles of N items, cut to 36 characters; of one without, nothing.

    Example:
        >>> titles_of([7, 9], {"7": "A boat"})
        ['A boat', '']
    """
    return [short(titles.get(text, "")) for text in as_text(pd.Series(list(items))).tolist()]


def short(title: str) -> str:
    """A title that leaves room for numbers beside it."""
    return title if len(title) <= WIDTH else title[: WIDTH - 1] + "…"
