"""A catalogue encoded once, and one user's candidates put together from it without touching a data frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.columns import split_bag
from mtcl_torchrec.data.earlier import log_buckets
from mtcl_torchrec.data.histories import History
from mtcl_torchrec.data.jagged import Bag
from mtcl_torchrec.data.key_index import KeyIndex
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, nearest

Side = Literal["user", "item", "context", "pair"]


@dataclass
class _Key:
    """One key of the statistics: which rows it has, and what they give.

    Args:
        index: of the key.
        features: the dense features that it makes.
        values: (K + 1, C) float32, encoded; the last row is that of an unknown key.
        columns: of the key, by side.
    """

    index: KeyIndex
    features: tuple[str, ...]
    values: torch.Tensor
    columns: dict[Side, list[str]]


@dataclass
class _Encoded:
    """N rows of one side.

    Args:
        rows: dense (N, d) and ids (N, i) in the order of `dense` and `ids`, and bags.
        parts: number of a mixed key -> (N,) what this side adds to its code, -1 where unknown.
    """

    rows: EncodedRows
    parts: dict[int, np.ndarray]


class CandidateEncoder:
    """Encodes users, items and statistics of a catalogue at once, and then joins them.

    A row of the model's input is made of columns of the user, of the item, of the context, of user and item together
    (missing here: they are known of logged pairs only), and of statistics, whose keys may take columns of several
    sides.  All but the last are looked up by row number; the code of a key is a sum of its sides' codes.

    Args:
        preprocessor: fitted.
        catalogue: what is encoded.  It is not watched: make another encoder of another catalogue.
    """

    def __init__(self, preprocessor: Preprocessor, catalogue: Catalogue) -> None:
        self._preprocessor, self._catalogue = preprocessor, catalogue
        self._side: dict[str, Side] = {
            **dict.fromkeys(catalogue.items.columns, "item"),
            **dict.fromkeys(catalogue.users.columns, "user"),
            **dict.fromkeys(catalogue.context, "context"),
        }
        encoder = preprocessor.encoder
        self._keys, self._mixed = list[_Key](), list[_Key]()
        for block in preprocessor.statistics:
            for index, frame in block.frozen():
                values = encoder.only(frame.columns).encode(Rows(frame), with_labels=False).dense
                of_side: dict[Side, list[str]] = {}
                for column in index.columns:
                    of_side.setdefault(self._side[column], []).append(column)
                key = _Key(index, tuple(frame.columns), values, of_side)
                (self._keys if len(of_side) == 1 else self._mixed).append(key)
        nobody = pd.DataFrame({column: [None] for column in catalogue.users.columns})
        pairs = {f.rows_from: [None] for f in preprocessor.declared.features if f.rows_from not in self._side}
        users, stranger = self._encode("user", catalogue.users), self._encode("user", nobody)
        self._users = _Encoded(
            EncodedRows.cat([users.rows, stranger.rows]),
            {number: np.r_[part, stranger.parts[number]] for number, part in users.parts.items()},
        )
        self._items = self._encode("item", catalogue.items)
        self._pair = self._encode("pair", pd.DataFrame(pairs, index=[0]))
        self._clock = _Clock.of(preprocessor, catalogue)
        self._remembered_context = lru_cache(maxsize=1024)(lambda given: self._context_row({c: v for c, _, v in given}))
        self._usual = self._encode_context({})
        self._dense_at, self._ids_at = self._places()
        self._seen_starts, self._seen_items = _seen_items(catalogue)

    # ------------------------------------------------------------------ once, for the whole catalogue

    def _names(self, side: Side) -> list[str]:
        """The declared features of a side."""
        return [f.name for f in self._preprocessor.declared.features if self._side.get(f.rows_from, "pair") == side]

    def _encode(self, side: Side, frame: pd.DataFrame) -> _Encoded:
        frame = self._preprocessor.conform(Rows(frame.reset_index(drop=True))).frame
        rows = self._preprocessor.encoder.only(self._names(side)).encode(Rows(frame), with_labels=False)
        own = [key.values[key.index.lookup(frame)] for key in self._keys if side in key.columns]
        parts = {
            number: key.index.part(frame, key.columns[side])
            for number, key in enumerate(self._mixed)
            if side in key.columns
        }
        dense = torch.cat([rows.dense, *own], dim=1)
        return _Encoded(EncodedRows(dense, rows.keys, rows.ids, torch.empty(len(rows), 0), rows.bags), parts)

    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the model's dense columns and ids lie in those of all sides, one side after the other."""
        encoder, dense, ids = self._preprocessor.encoder, list[str](), list[str]()
        for side, encoded in self._sides(self._usual):
            dense += encoder.only(self._names(side)).dense_columns()
            dense += [name for key in self._keys if side in key.columns for name in key.features]
            ids += [name for name in encoded.rows.keys if name not in encoded.rows.bags]
        dense += [name for key in self._mixed for name in key.features]
        wanted = [name for name in encoder.keys if name in ids]
        return _places(dense, encoder.dense_columns()), _places(ids, wanted)

    def _sides(self, context: _Encoded) -> tuple[tuple[Side, _Encoded], ...]:
        return ("user", self._users), ("item", self._items), ("context", context), ("pair", self._pair)

    # ------------------------------------------------------------------ for each request

    def positions(self, user: int, candidates: np.ndarray | None, *, seen: bool) -> np.ndarray:
        """Rows of the items that are offered to a user, in the order given, or of the catalogue.

        Args:
            user: row of the user in the catalogue, -1 for one it does not know.
            candidates: rows of items; None is all.
            seen: whether those that the user has met are offered, too.
        """
        offered = np.arange(len(self._items.rows)) if candidates is None else candidates
        if seen or user < 0:
            return offered
        met = np.zeros(len(self._items.rows), bool)
        met[self._seen_items[self._seen_starts[user] : self._seen_starts[user + 1]]] = True
        return offered[~met[offered]]

    def unknown(self, context: Mapping[str, Any]) -> list[str]:
        """Context columns whose value no training row had, so that it is taken as an unknown one."""
        rows = self._encode_context(context).rows
        row_of = dict(zip((key for key in rows.keys if key not in rows.bags), rows.ids[0].tolist(), strict=True))
        known = {f.name: f.rows_from for f in self._preprocessor.declared.features if f.encoding == "vocabulary"}
        found = (known[name] for name, row in row_of.items() if row == 0 and name in known)
        return [column for column in dict.fromkeys(found) if context.get(column) is not None]

    def rows(self, user: int, items: np.ndarray, context: Mapping[str, Any]) -> EncodedRows:
        """One user's candidates, encoded.

        Args:
            user: row in the catalogue, -1 for a user it does not know.
            items: (n,) rows in the catalogue.
            context: overrides of the usual context; the time of the request, by which the ages in histories are
                reckoned, is one where there are such ages.  A time before the log's end makes no age negative.

        Returns:
            n rows, without labels.

        Raises:
            DataError: a context column that does not exist, or a value that does not fit.
        """
        of_context = self._encode_context(context)
        n, at_item = len(items), torch.from_numpy(items)
        at_user, zero = torch.full((n,), user % len(self._users.rows)), torch.zeros(n, dtype=torch.int64)
        at: dict[Side, torch.Tensor] = {"user": at_user, "item": at_item, "context": zero, "pair": zero}
        dense, ids, bags = list[torch.Tensor](), list[torch.Tensor](), dict[str, Bag]()
        for side, encoded in self._sides(of_context):
            dense.append(encoded.rows.dense[at[side]])
            ids.append(encoded.rows.ids[at[side]])
            for name, bag in encoded.rows.bags.items():
                bags[name] = Bag.of(*bag.take(at[side]))
        if self._clock is not None and self._clock.column in context:
            bags |= self._clock.ages(context[self._clock.column], at_user)
        for number, key in enumerate(self._mixed):
            dense.append(self._of_key(number, key, user, items, of_context).expand(n, -1))
        return EncodedRows(
            dense=torch.cat(dense, dim=1)[:, self._dense_at],
            keys=self._preprocessor.encoder.keys,
            ids=torch.cat(ids, dim=1)[:, self._ids_at],
            labels=torch.empty(n, 0),
            bags=bags,
        )

    def _of_key(self, number: int, key: _Key, user: int, items: np.ndarray, context: _Encoded) -> torch.Tensor:
        """Encoded columns (n, C), or (1, C) where the key has no column of the item."""
        parts = []
        if "user" in key.columns:
            parts.append(self._users.parts[number][[user]])
        if "item" in key.columns:
            parts.append(self._items.parts[number][items])
        if "context" in key.columns:
            parts.append(context.parts[number])
        code, known = parts[0], parts[0] >= 0
        for part in parts[1:]:
            code, known = code + part, known & (part >= 0)
        return key.values[torch.from_numpy(key.index.find(np.where(known, code, -1)))]

    def _encode_context(self, context: Mapping[str, Any]) -> _Encoded:
        for column in context:
            if column not in self._catalogue.context:
                there = ", ".join(self._catalogue.context) or "none"
                if (whose := self._side.get(column)) is not None:
                    raise DataError(
                        f"{column!r} is a column of the {whose}, and what the log says of it counts; rows with other "
                        f"values go to Recommender.score or POST /score (context: {there})"
                    )
                hint = nearest(column, self._catalogue.context)
                raise DataError(f"no context column {column!r}{hint}; there are: {there}")
        if self._clock is not None and not self._clock.is_input:
            context = {c: v for c, v in context.items() if c != self._clock.column}
        try:
            # With the kinds: True, 1 and 1.0 are one key of a dict.
            return self._remembered_context(tuple((c, type(v), v) for c, v in sorted(context.items())))
        except TypeError:  # a list cannot be a key
            return self._context_row(context)

    def _context_row(self, context: Mapping[str, Any]) -> _Encoded:
        frame = {column: [context.get(column, usual)] for column, usual in self._catalogue.context.items()}
        return self._encode("context", pd.DataFrame(frame, index=[0]))


@dataclass(frozen=True)
class _Clock:
    """Ages in histories that were built, which grow until a request comes.

    Args:
        column: of the time.
        is_input: whether the model reads the time besides.
        end: the time from which ages are reckoned in the catalogue.
        seconds: age feature -> its history, the rows of its table, and the ages of each user, and last of nobody.
    """

    column: str
    is_input: bool
    end: Any
    seconds: dict[str, tuple[History, int, Bag]]

    @classmethod
    def of(cls, preprocessor: Preprocessor, catalogue: Catalogue) -> _Clock | None:
        """None where no history that was built has ages."""
        seconds: dict[str, tuple[History, int, Bag]] = {}
        for history in preprocessor.histories:
            for feature in history.ages:
                values, lengths = split_bag(feature, catalogue.users[feature.rows_from])
                ages = torch.from_numpy(values.to_numpy(dtype=np.float64, na_value=np.nan))
                size = preprocessor.encoder.num_embeddings(feature.table_name)
                seconds[feature.name] = history, size, Bag.of(ages, torch.from_numpy(np.r_[lengths, 0]))
        if not seconds:
            return None
        declared, time = preprocessor.declared, str(preprocessor.declared.time)
        inputs = [f.rows_from for f in declared.features]
        inputs += [c for block in preprocessor.config for key in block.keys for c in key]
        return cls(time, time in inputs, catalogue.end, seconds)

    def ages(self, when: Any, users: torch.Tensor) -> dict[str, Bag]:
        """Encoded ages at a time, of some users."""
        found = dict[str, Bag]()
        for name, (history, size, seconds) in self.seconds.items():
            before, lengths = seconds.take(users)
            passed = history.seconds_after(self.end, when)
            found[name] = Bag.of(torch.from_numpy(log_buckets(np.maximum(before.numpy() + passed, 0), size)), lengths)
        return found


def _places(there: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    """Where each of `wanted` stands; a name that stands there twice is wanted twice, in that order."""
    places: dict[str, list[int]] = {}
    for at, name in enumerate(there):
        places.setdefault(name, []).append(at)
    return torch.tensor([places[name].pop(0) for name in wanted], dtype=torch.int64)


def _seen_items(catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """What each user has met: rows of items, and where those of each user start (U + 1,)."""
    user, item = (catalogue.seen.iloc[:, i].tolist() for i in (0, 1))
    users, items = catalogue.user_positions(user), catalogue.item_positions(item)
    known = (users >= 0) & (items >= 0)
    users, items = users[known], items[known]
    starts = np.r_[0, np.bincount(users, minlength=len(catalogue.users)).cumsum()]
    return starts, items[np.argsort(users, kind="stable")]
