"""Rank a catalogue's items for one user by the fused score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.evaluation.predict import compares_candidates
from mtcl_torchrec.schema import ConfigError, DataError
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

    @torch.no_grad()
    def recommend(
        self, user: str | int, context: Mapping[str, Any] | None = None, *, k: int = 10, seen: bool = False
    ) -> pd.DataFrame:
        """The k items with the highest fused score.

        Args:
            user: key of the user, as in the log; an unknown one is a user without history.
            context: context column -> value; the others take their usual value.
            k: how many.
            seen: whether items that the user has already met are offered too.

        Returns:
            One row per item, best first: the item, ``score``, and each task's prediction (of a multiclass task, the
            probability of the item's own class).

        Raises:
            DataError: an unknown context column, a value of the wrong kind, or no item left.
            ValueError: k is not positive.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        known = self.catalogue.known_user(str(user))  # None: a user without history
        frame = self.catalogue.candidates(known, self._typed_context(context or {}), seen=seen)
        for feature in self.run.config.data_schema.features:
            if feature.rows_from not in frame:
                frame[feature.rows_from] = None  # of a user and an item together: known of logged pairs only
        scored = self.score(frame)
        item = self.run.config.data_schema.item
        assert item is not None
        ranked = scored.assign(**{item: frame[item].to_numpy()}).sort_values("score", ascending=False, kind="stable")
        return ranked[[item, "score", *(t.name for t in self.run.model.tasks)]].head(k).reset_index(drop=True)

    @torch.no_grad()
    def score(self, frame: pd.DataFrame, batch_size: int = 8192) -> pd.DataFrame:
        """Score and predictions for rows that have every input column, in their order.

        Where the fused score compares the candidates of a request, the rows are taken for one request.
        """
        model, rows, parts = self.run.model, self.run.encode(frame), []
        size = len(rows) if compares_candidates(model) else batch_size
        for batch in iterate(rows, global_batches(len(rows), size)):
            out = model(batch.dense_features, batch.sparse_features)
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
