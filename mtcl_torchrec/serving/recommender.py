"""Rank a catalogue's items for one user by the fused score."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.data.catalogue import NothingLeftError
from mtcl_torchrec.schema import ConfigError, DataError, Schema
from mtcl_torchrec.training.finished import FinishedRun


class Recommender:
    """Recommends from a finished run.

    Args:
        run: a run whose schema names a user and an item column.

    Raises:
        ConfigError: the run knows no users or items.
    """

    def __init__(self, run: FinishedRun) -> None:
        if run.catalogue is None:
            raise ConfigError(
                "this run cannot recommend, it has no catalogue: its schema names no user or no item column, or it was "
                "trained on a stream or on a synthetic world"
            )
        self.run = run
        self.catalogue = run.catalogue

    @classmethod
    def load(cls, folder: str | Path) -> Recommender:
        """Read a run directory."""
        return cls(FinishedRun.load(folder))

    @property
    def schema(self) -> Schema:
        """Features and tasks as declared."""
        return self.run.config.data_schema

    @property
    def rows_alone(self) -> bool:
        """Whether a row's score depends on that row alone, so that rows of many requests may be scored at once."""
        return not getattr(self.run.model.output.fused_score, "needs_context", False)

    def recommend(
        self,
        users: str | int | Sequence[str | int],
        contexts: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        candidates: Sequence[Any] | Sequence[Sequence[Any] | None] | None = None,
        k: int = 10,
        seen: bool = False,
    ) -> pd.DataFrame:
        """The k items with the highest fused score, for one user or for each of several.

        Args:
            users: key of the user, as in the log, or a sequence of keys; an unknown one is a user without history.
            contexts: context column -> value, the same for all users, or a mapping for each of them; columns left out
                take their usual value.
            candidates: the items to rank; of several users, a sequence (or None) for each of them.  None: all items.
            k: how many.
            seen: whether items that the user has already met are offered too.

        Returns:
            One row per item, best first: the item, ``score``, and each task's prediction (of a multiclass task, the
            probability of the item's own class).  Of several users, in their order, with the user in the first column;
            one who has seen every candidate has no row.

        Raises:
            DataError: an unknown context column, a value of the wrong kind.
            NothingLeftError: no item is left, for any of the users.
            ValueError: k is not positive.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        if isinstance(users, (str, int)):
            assert contexts is None or isinstance(contexts, Mapping)
            frame = self._rows(users, contexts or {}, candidates, seen)
            return self._ranked(frame, self.score(frame), k)
        given = contexts if isinstance(contexts, Sequence) else [contexts or {}] * len(users)
        allowed = candidates if candidates is not None else [None] * len(users)
        frames = []
        for user, context, items in zip(users, given, allowed, strict=True):
            with contextlib.suppress(NothingLeftError):
                frames.append((user, self._rows(user, context, items, seen)))
        if not frames:
            raise NothingLeftError("these users have seen every candidate; allow seen items to rank them again")
        request = np.repeat(np.arange(len(frames)), [len(frame) for _, frame in frames])
        scored = self.score(pd.concat([frame for _, frame in frames], ignore_index=True), request=request)
        lists = []
        for i, (user, frame) in enumerate(frames):
            ranked = self._ranked(frame, scored[request == i], k)
            ranked.insert(0, str(self.schema.user), [user] * len(ranked), allow_duplicates=True)
            lists.append(ranked)
        return pd.concat(lists, ignore_index=True)

    def _rows(
        self, user: str | int, context: Mapping[str, Any], candidates: Sequence[Any] | None, seen: bool
    ) -> pd.DataFrame:
        """The input columns of one user's candidates."""
        known = self.catalogue.known_user(str(user))  # None: a user without history
        frame = self.catalogue.candidates(known, self._typed_context(context), seen=seen)
        if candidates is not None:
            frame = frame[frame[self.schema.item].isin(list(candidates))].reset_index(drop=True)
            if frame.empty:
                raise NothingLeftError(f"of the candidates, nothing is left that user {user!r} has not seen")
        for feature in self.schema.features:
            if feature.rows_from not in frame:
                frame[feature.rows_from] = None  # of a user and an item together: known of logged pairs only
        return frame

    def _ranked(self, frame: pd.DataFrame, scored: pd.DataFrame, k: int) -> pd.DataFrame:
        item = str(self.schema.item)
        ranked = scored.assign(**{item: frame[item].to_numpy()}).sort_values("score", ascending=False, kind="stable")
        return ranked[[item, "score", *(t.name for t in self.run.model.tasks)]].head(k).reset_index(drop=True)

    @torch.no_grad()
    def score(self, frame: pd.DataFrame, batch_size: int = 8192, *, request: np.ndarray | None = None) -> pd.DataFrame:
        """Score and predictions for rows that have every input column, in their order.

        Args:
            frame: N rows.
            request: (N,) integers, equal for rows that are ranked against each other; None: all rows are.
        """
        model, rows, parts = self.run.model, self.run.encode(frame), []
        indices = global_batches(len(rows), batch_size)
        of_request = None if request is None else torch.from_numpy(request)
        for index, batch in zip(indices, iterate(rows, indices), strict=True):
            asked = None if of_request is None else of_request[index]
            out = model(batch.dense_features, batch.sparse_features, asked)
            pieces = model.output.parts(out, batch.sparse_features)
            columns = {t.name: pieces[t.name] if t.kind == "multiclass" else out[t.name] for t in model.tasks}
            parts.append(pd.DataFrame({"score": out["score"].numpy(), **{n: c.numpy() for n, c in columns.items()}}))
        return pd.concat(parts, ignore_index=True)

    def _typed_context(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Context given as text, in the kind of value the log has."""
        typed = {}
        for name, value in context.items():
            usual = self.catalogue.context.get(name, "")  # an unknown name is refused with the others, below
            typed[name] = _like(usual, value, name) if isinstance(value, str) else value
        return typed


def _like(usual: Any, text: str, name: str) -> Any:
    """A context value given as text, in the kind of value that the log has."""
    if isinstance(usual, bool):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise DataError(f"context {name} = {text!r} is neither true nor false")
        return words[text.lower()]
    if not isinstance(usual, (int, float)):
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"context {name} = {text!r} is no number")
    if isinstance(usual, int) and number != int(number):
        raise DataError(f"context {name} = {text!r} is no whole number")
    return type(usual)(number)
