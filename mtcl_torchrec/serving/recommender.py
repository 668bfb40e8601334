"""Rank a catalogue's items for users by the fused score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import NothingLeftError
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import ConfigError, DataError, Schema
from mtcl_torchrec.serving.artefact import Artefact
from mtcl_torchrec.serving.candidates import CandidateEncoder
from mtcl_torchrec.serving.network import Network, named_outputs, network_inputs, serving_network
from mtcl_torchrec.serving.new_items import said_of_new_items
from mtcl_torchrec.training.ensemble import load_ensemble
from mtcl_torchrec.training.finished import FinishedRun

MAX_ROWS = 8192  # that go through the network at once


class Recommender:
    """Recommends from a finished run, or from what `mtcl_torchrec.serving.export.export_run` wrote.

    Users, items and the statistics' keys are encoded once, when it is made.  Several threads may use it.

    Args:
        model: a run whose schema names a user and an item column, or an exported one.

    Raises:
        ConfigError: the run knows no users or items.

    Attributes:
        catalogue: users, items, usual context.
        schema: features and tasks as declared.
        run: the run; None where the model was exported.
        rows_alone: whether a row's score depends on that row alone, so that rows of many requests may be scored at
            once.
    """

    def __init__(self, model: FinishedRun | Artefact) -> None:
        if model.catalogue is None:
            raise ConfigError(
                "this run cannot recommend, it has no catalogue: its schema names no user or no item column, or it was "
                "trained on a stream or on a synthetic world"
            )
        self.run = None if isinstance(model, Artefact) else model
        self.catalogue, self._preprocessor = model.catalogue, model.preprocessor
        self.schema: Schema = model.preprocessor.declared
        self._network: Network
        if isinstance(model, Artefact):
            self.tasks, self._network = model.tasks, model.network
            self._features, self._inputs, within = model.features, model.inputs, model.within_request
            self._histories = model.histories
        else:
            network = serving_network(model.model).eval()
            self.tasks, self._network = model.model.tasks, network
            self._features, self._inputs, within = network.features, network.inputs, network.within_request
            self._histories = network.histories
        self.rows_alone = not within
        self._candidates = CandidateEncoder(model.preprocessor, model.catalogue)

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path],
        *,
        contents: Mapping[str, str | Path] | None = None,
        items: Sequence[str | Path] = (),
    ) -> Recommender:
        """Read a run directory, an exported model, or several run directories as a deep ensemble.

        Args:
            path: of it.
            contents: of a run, newer files of vectors or codes by feature, with items that it did not know; see
                `FinishedRun.load`.
            items: of a run, files of new items, which are then recommended, too.

        A run's trunk may be imported by name, and an exported model is a program: load either from where you take code.

        Raises:
            ConfigError: newer files for an exported model, which holds its own.
        """
        if not isinstance(path, (str, Path)):
            if len(path) > 1:
                return cls(load_ensemble(path, contents=contents, items=items))
            (path,) = path
        if Path(path).is_dir():
            return cls(FinishedRun.load(path, contents=contents, items=items))
        if contents or items:
            raise ConfigError(
                f"{path}: an exported model holds its items and vectors; export the run again with newer files"
            )
        return cls(Artefact.load(path))

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
            candidates: keys of the items to rank; of several users, also a sequence (or None) for each of them.  An
                item that is named twice is ranked once.  None: all items.
            k: how many for each user.
            seen: whether items that the user has already met are offered too.

        Returns:
            One row per item, each user's best first, the users in their order: the user as given, the item, ``score``
            (of an ensemble also ``score_std``, how far its members are apart), each task's prediction (of a multiclass
            task, the probability of the item's own class), and, where the fused score tells it, ``part:<task>``, what
            the task adds to the score.  Of several users, one for whom nothing is left has no row.

        Raises:
            DataError: an unknown context column, a value of the wrong kind, or a candidate that the catalogue does not
                know; rows of new items, with their columns, go to `score`.
            NothingLeftError: no item is left, for any of the users.
            ValueError: k is not positive, or there are not as many contexts or candidates as users.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        asked: list[str | int] = [users] if isinstance(users, (str, int, np.integer)) else list(users)
        rows: list[tuple[str | int, np.ndarray, EncodedRows]] = []
        at_user = self.catalogue.user_positions(asked)
        wanted = zip(
            asked, at_user.tolist(), _for_each(contexts, asked), self._for_each(candidates, asked), strict=True
        )
        for user, at, context, given in wanted:
            items = self._candidates.positions(at, given, seen=seen)
            if len(items):
                rows.append((user, items, self._candidates.rows(at, items, self._typed_context(context))))
        if not rows:
            of = f"user {asked[0]!r} has" if len(asked) == 1 else "these users have"
            what = "every item" if candidates is None else "every candidate"
            raise NothingLeftError(f"{of} seen {what}; allow seen items to rank them again")
        return self._ranked(rows, k)

    def new_items(self, contents: Mapping[str, Any] | None = None) -> list[str]:
        """Lines that tell what the model has of the items that joined the catalogue after training.

        Args:
            contents: as it was given to `load`.
        """
        return said_of_new_items(self.catalogue, self._preprocessor, contents)

    def unknown_context(self, context: Mapping[str, Any]) -> list[str]:
        """Context columns whose value the training split did not have: the model takes it as an unknown one.

        Args:
            context: as of `recommend`.

        Raises:
            DataError: as `recommend`.
        """
        return self._candidates.unknown(self._typed_context(context))

    def _ranked(self, rows: Sequence[tuple[str | int, np.ndarray, EncodedRows]], k: int) -> pd.DataFrame:
        """The best k of each user's rows."""
        request = np.repeat(np.arange(len(rows)), [len(items) for _, items, _ in rows])
        out = self._scored(EncodedRows.cat([encoded for _, _, encoded in rows]), request, request)
        score = out.get("score")
        if score is None:
            raise ConfigError("this model has no fused score to rank by")
        best, start, number = list[np.ndarray](), 0, list[int]()
        for _, items, _ in rows:
            order = np.argsort(-score[start : start + len(items)], kind="stable")[:k]
            best.append(start + order)
            number.append(len(order))
            start += len(items)
        chosen, items = np.concatenate(best), np.concatenate([items for _, items, _ in rows])
        users = [user for (user, _, _), n in zip(rows, number, strict=True) for _ in range(n)]
        # All numbers as one block: a data frame made column by column takes several times as long.
        ranked = pd.DataFrame(np.stack([value[chosen] for value in out.values()], axis=1), columns=list(out))
        ranked.insert(0, str(self.schema.item), self.catalogue.items.iloc[:, 0].array.take(items[chosen]))
        ranked.insert(0, str(self.schema.user), users)
        return ranked

    def score(self, frame: pd.DataFrame, *, request: np.ndarray | None = None) -> pd.DataFrame:
        """``score``, predictions and parts, as `recommend`, for rows that have every input column, in their order.

        Args:
            frame: N rows; statistics are looked up where it has not their columns.
            request: (N,) integers, equal for rows that are ranked against each other, where the fused score compares
                rows; None: all rows are.
        """
        rows = self._preprocessor.encode(Rows(frame.reset_index(drop=True)), with_labels=False)
        return pd.DataFrame(self._scored(rows, np.zeros(len(rows), np.int64) if request is None else request))

    @torch.inference_mode()
    def _scored(self, rows: EncodedRows, request: np.ndarray, alike: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Outputs (N,) by name.

        Args:
            request: (N,) integers.
            alike: (N,) ascending integers, equal for rows with the same user and context.
        """
        step = MAX_ROWS if self.rows_alone else max(len(rows), 1)
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(rows), step):
            cut = slice(start, start + step)
            inputs = network_inputs(
                rows if len(rows) <= step else rows.slice(start, min(start + step, len(rows))),
                self._features,
                self._inputs,
                histories=self._histories,
                request=torch.from_numpy(request[cut].astype(np.int64)),
                alike=None if alike is None else torch.from_numpy(alike[cut] - alike[start]),
            )
            for name, value in named_outputs(self.tasks, self._network(**inputs)):
                parts.setdefault(name, []).append(value.numpy())
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _for_each(self, candidates: Any, users: Sequence[Any]) -> Iterator[np.ndarray | None]:
        """Rows of each user's candidates in the catalogue."""
        several = candidates is not None and any(c is None or _is_sequence(c) for c in candidates)
        if several and len(candidates) != len(users):
            raise ValueError(f"{len(candidates)} lists of candidates for {len(users)} users")
        common = None if candidates is None or several else self._item_positions(candidates)
        for number in range(len(users)):
            own = candidates[number] if several else None
            yield common if own is None else self._item_positions(own)

    def _item_positions(self, keys: Iterable[Any]) -> np.ndarray:
        keys = list(keys)
        found = self.catalogue.item_positions(keys)
        if (found < 0).any():
            unknown = [repr(key) for key, at in zip(keys, found, strict=True) if at < 0]
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise DataError(f"the catalogue knows no item {', '.join(unknown[:5])}{more}")
        return found[np.sort(np.unique(found, return_index=True)[1])]

    def _typed_context(self, context: Mapping[str, Any]) -> dict[str, Any]:
        """Context given as text, in the kind of value the log has."""
        typed = {}
        for name, value in context.items():
            usual = self.catalogue.context.get(name, "")  # an unknown name is refused with the others, later
            typed[name] = _like(usual, value, name) if isinstance(value, str) else value
        return typed


def _for_each(contexts: Any, users: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    """The context of each user."""
    if contexts is None or isinstance(contexts, Mapping):
        return [contexts or {}] * len(users)
    if len(contexts) != len(users):
        raise ValueError(f"{len(contexts)} contexts for {len(users)} users")
    return [context or {} for context in contexts]


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray, pd.Series, pd.Index))


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
