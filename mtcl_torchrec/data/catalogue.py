"""What a run knows of its users, items and contexts, so that it can rank without the log: kept with the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mtcl_torchrec.data.source import time_values
from mtcl_torchrec.schema import ConfigError, DataError, Group, Schema, nearest


class NothingLeftError(DataError):
    """A user has seen every item that could be offered."""


@dataclass
class Catalogue:
    """Latest known columns of each user and item, the usual context, what each user has seen, how popular items are.

    Args:
        users, items: one row per user / item, the key column first.
        context: context column -> most frequent value (of a number: the median) in the training split.
        seen: user and item columns, one row per pair in the log.
        popularity: item -> positive labels of the first binary task in the training split.
    """

    users: pd.DataFrame
    items: pd.DataFrame
    context: dict[str, Any]
    seen: pd.DataFrame
    popularity: pd.Series

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
            labels = pd.to_numeric(train[first.label_column], errors="coerce")
            popularity = labels.groupby(train[schema.item]).sum()
        return cls(
            users=latest(schema.user, "user"),
            items=latest(schema.item, "item"),
            context=context,
            seen=log[[schema.user, schema.item]].dropna().drop_duplicates().reset_index(drop=True),
            popularity=popularity.astype("float64").rename("popularity"),
        )

    def candidates(self, user: object, context: dict[str, Any], *, seen: bool = False) -> pd.DataFrame:
        """One row per item for a user in a context, with all input columns.

        Args:
            user: key of a known user; any other is a user of whom nothing is known.
            context: overrides of the usual context.
            seen: whether items the user has already met are offered too.

        Raises:
            DataError: a context column that does not exist.
            NothingLeftError: there is nothing to rank.
        """
        for column in context:
            if column not in self.context:
                there = ", ".join(self.context) or "none"
                raise DataError(f"no context column {column!r}{nearest(column, self.context)}; there are: {there}")
        key, item = self.seen.columns
        items = self.items
        if not seen:
            met = self.seen.loc[(self.seen[key] == user).fillna(False).to_numpy(dtype=bool), item]
            items = items[~items[item].isin(met)]
        if items.empty:
            raise NothingLeftError(f"user {user!r} has seen every item; allow seen items to rank them again")
        rows = items.reset_index(drop=True)
        about = self.users[(self.users[key] == user).fillna(False).to_numpy(dtype=bool)]
        for column in self.users.columns:
            value = about[column].iloc[0] if len(about) else None
            filled = pd.Series([value] * len(rows), index=rows.index)
            rows[column] = filled.astype(self.users[column].dtype) if len(about) else filled
        for column, usual in self.context.items():
            rows[column] = [context.get(column, usual)] * len(rows)
        return rows

    def known_user(self, text: str) -> object | None:
        """The user whose key reads as `text`, or None."""
        keys = self.users.iloc[:, 0]
        found = keys[keys.astype(str) == text]
        return _plain(found.iloc[0]) if len(found) else None

    def save(self, folder: Path) -> None:
        """Write Parquet and JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        self.users.to_parquet(folder / "users.parquet", index=False)
        self.items.to_parquet(folder / "items.parquet", index=False)
        self.seen.to_parquet(folder / "seen.parquet", index=False)
        self.popularity.reset_index().to_parquet(folder / "popularity.parquet", index=False)
        (folder / "context.json").write_text(json.dumps(self.context, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """Read what `save` wrote."""
        popularity = pd.read_parquet(folder / "popularity.parquet")
        return cls(
            users=pd.read_parquet(folder / "users.parquet"),
            items=pd.read_parquet(folder / "items.parquet"),
            context=json.loads((folder / "context.json").read_text()),
            seen=pd.read_parquet(folder / "seen.parquet"),
            popularity=popularity.set_index(popularity.columns[0])["popularity"],
        )


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        return value.item()
    return value if isinstance(value, (int, float, str, bool)) else str(value)
