"""What a run knows of its users, items and contexts, so that it can rank without the log: kept with the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtcl_torchrec.data.columns import as_text, canonical, column_of
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.data.source import Rows, time_values
from mtcl_torchrec.data.vectors import checked_keys
from mtcl_torchrec.schema import ConfigError, DataError, Group, Schema


class NothingLeftError(DataError):
    """A user has seen every item that could be offered."""


@dataclass
class Catalogue:
    """Latest known columns of each user and item, the usual context, what each user has seen, how popular items are.

    Args:
        users, items: one row per user / item, the key column first.  A history is as of the end of the log where it
            was built from the log (``histories:``), else that of their last row.
        context: context column -> most frequent value (of a number: the median) in the training split.
        seen: user and item columns, one row per pair in the log.
        popularity: item -> positive labels of the first binary task in the training split, of which novelty is
            reckoned, and segments; without a binary task, its rows.
        end: time of the log's last row, which the ages in histories are reckoned from; None where there are none.
        trained_users: users of the training split, (U,); None where that was not kept.
        joined: the last so many items came by `with_items`.
        repeated: keys of items that `with_items` was given and the catalogue had already.
        rates: what ranks by popularity, of each event; None where that was not kept.
    """

    users: pd.DataFrame
    items: pd.DataFrame
    context: dict[str, Any]
    seen: pd.DataFrame
    popularity: pd.Series
    end: int | float | str | None = None
    trained_users: np.ndarray | None = None
    joined: int = 0
    repeated: tuple[Any, ...] = ()
    rates: Popularity | None = None

    @classmethod
    def build(cls, schema: Schema, groups: dict[str, Group], train: pd.DataFrame, later: pd.DataFrame) -> Catalogue:
        """From the training rows and later ones (validation), by time where the schema names one.

        Args:
            groups: input column -> group.
            later: rows after the training split; they may bring new users and items, but no popularity.

        Raises:
            ConfigError: the schema names no user or item column.
        """
        if schema.user is None or schema.item is None:
            raise ConfigError("recommending needs schema.user and schema.item")
        log = pd.concat([train, later])
        if schema.time is not None:
            log = log.assign(**{schema.time: time_values(log, schema.time)}).sort_values(schema.time, kind="stable")

        def latest(key: str, group: Group) -> pd.DataFrame:
            columns = [key, *(c for c, g in groups.items() if g == group and c != key)]
            return log[columns].dropna(subset=key).drop_duplicates(key, keep="last").reset_index(drop=True)

        context = {}
        dense = {f.rows_from for f in schema.dense_features}
        for column in (c for c, g in groups.items() if g == "context"):
            present = train[column].dropna()
            if present.empty:
                raise DataError(f"context column {column!r} holds no value at all")
            if not isinstance(present.iloc[0], str) and hasattr(present.iloc[0], "__len__"):
                present = present.map(tuple)
            usual = present.median() if column in dense else present.mode().iloc[0]
            context[column] = _plain(usual)
        first = next((t for t in schema.tasks if t.kind == "binary"), None)
        if first is None:
            popularity = train.groupby(schema.item).size()
        else:
            popularity = pd.to_numeric(train[first.label_column], errors="coerce").groupby(train[schema.item]).sum()
        return cls(
            users=latest(schema.user, "user"),
            items=latest(schema.item, "item"),
            context=context,
            seen=log[[schema.user, schema.item]].dropna().drop_duplicates().reset_index(drop=True),
            popularity=popularity.astype("float64").rename("popularity"),
            trained_users=train[schema.user].dropna().drop_duplicates().to_numpy(),
        )

    def with_items(self, rows: Rows) -> Catalogue:
        """With further items after the old ones, which stay as they are; nobody has met them yet.

        Args:
            rows: every column of `items`, in the kinds that the log has; items that are known already are left out.

        Raises:
            DataError: a column is missing or holds something else than in the log, or an item's key is missing or
                there twice.

        Example:
            >>> items = pd.DataFrame({"item": ["a"], "genre": ["x"]})
            >>> catalogue = Catalogue(pd.DataFrame(), items, {}, pd.DataFrame(), pd.Series(dtype=float))
            >>> more = pd.DataFrame({"genre": ["y", "z"], "item": ["a", "b"], "title": ["A", "B"]})
            >>> catalogue.with_items(Rows(more)).items.to_dict("list")
            {'item': ['a', 'b'], 'genre': ['x', 'z']}
        """
        key, *rest = self.items.columns
        more = pd.DataFrame({column: _like(rows, column, self.items[column]) for column in (key, *rest)})
        checked_keys(more[key], key, rows.locate)
        new = self.item_positions(more[key].tolist()) < 0
        items = pd.concat([self.items, more[new]], ignore_index=True) if new.any() else self.items
        return replace(self, items=items, joined=int(new.sum()), repeated=tuple(more[key][~new].tolist()))

    def known_user(self, text: str) -> object | None:
        """The user whose key reads as `text`, or None."""
        at = int(self.user_positions([text])[0])
        return None if at < 0 else _plain(self.users.iloc[at, 0])

    def user_positions(self, keys: Sequence[Any]) -> np.ndarray:
        """(N,) row of each user in `users`, -1 where it is unknown; keys may be given as text."""
        return self._users.positions(keys)

    def item_positions(self, keys: Sequence[Any]) -> np.ndarray:
        """(N,) row of each item in `items`, -1 where it is unknown; keys may be given as text."""
        return self._items.positions(keys)

    @cached_property
    def _users(self) -> _Keys:
        return _Keys(self.users.iloc[:, 0])

    @cached_property
    def _items(self) -> _Keys:
        return _Keys(self.items.iloc[:, 0])

    def save(self, folder: Path) -> None:
        """Write Parquet and JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        self.users.to_parquet(folder / "users.parquet", index=False)
        self.items.to_parquet(folder / "items.parquet", index=False)
        self.seen.to_parquet(folder / "seen.parquet", index=False)
        self.popularity.to_frame().reset_index().to_parquet(folder / "popularity.parquet", index=False)
        if self.rates is not None:
            self.rates.save(folder)
        (folder / "context.json").write_text(json.dumps(self.context, indent=1))
        if self.trained_users is not None:
            pd.DataFrame({"user": self.trained_users}).to_parquet(folder / "trained_users.parquet", index=False)
        if self.end is not None:
            (folder / "end.json").write_text(json.dumps(self.end))

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """Read what `save` wrote."""
        popularity, end = pd.read_parquet(folder / "popularity.parquet"), folder / "end.json"
        trained = folder / "trained_users.parquet"
        popularity = popularity.set_index(popularity.columns[0])
        return cls(
            users=pd.read_parquet(folder / "users.parquet"),
            items=pd.read_parquet(folder / "items.parquet"),
            context=json.loads((folder / "context.json").read_text()),
            seen=pd.read_parquet(folder / "seen.parquet"),
            popularity=popularity["popularity"],
            end=json.loads(end.read_text()) if end.is_file() else None,
            trained_users=pd.read_parquet(trained)["user"].to_numpy() if trained.is_file() else None,
            rates=Popularity.load(folder),
        )


class _Keys:
    """Finds keys in a column by value, or by how they read."""

    def __init__(self, column: pd.Series) -> None:
        self._by_text = {text: at for at, text in enumerate(as_text(column).tolist())}
        # Most keys are given as they are, and making text of 500 takes longer than finding them.
        self._by_value = {key: at for at, key in enumerate(column.tolist()) if type(key) in (int, str)}

    def positions(self, keys: Sequence[Any]) -> np.ndarray:
        if len(kinds := set(map(type, keys))) == 1 and kinds <= {int, str}:
            by_value = self._by_value
            found = [by_value.get(key, -1) for key in keys]
            if -1 not in found:
                return np.array(found, np.int64)
        return np.fromiter((self._by_text.get(_text(key), -1) for key in keys), np.int64, len(keys))


def _like(rows: Rows, column: str, known: pd.Series) -> pd.Series:
    """A column in the kind (text, numbers, lists) that the log has it in."""
    values = column_of(rows, column)
    was, now = _kind(known), _kind(values)
    if was == "text" and now == "numbers":
        return as_text(canonical(values))  # text of digits, which CSV shows as numbers
    if was != now and "nothing" not in (was, now):
        raise DataError(f"{rows.name}: column {column!r} holds {now}, and {was} in the log")
    return values


def _kind(values: pd.Series) -> str:
    there = values.dropna()
    if there.empty:
        return "nothing"
    if pd.api.types.is_numeric_dtype(canonical(there)):
        return "numbers"
    return "text" if isinstance(there.iloc[0], str) else "lists" if hasattr(there.iloc[0], "__len__") else "times"


def _text(key: Any) -> str:
    """A key as `as_text` writes it."""
    return str(int(key)) if isinstance(key, float) and key.is_integer() else str(key)


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, (int, float, str, bool)) else str(value)
