"""What the service needs of a recommender, and many requests scored by it at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import pandas as pd

from mtcl_torchrec.data.catalogue import Catalogue, NothingLeftError
from mtcl_torchrec.schema import Schema
from mtcl_torchrec.serving.network import PART, SPREAD

J = TypeVar("J")


class Ranker(Protocol):
    """What the service needs; `mtcl_torchrec.serving.recommender.Recommender` is one.

    An attribute ``rows_alone`` that is True says that a row's score depends on that row alone: the rows of many
    ``/score`` requests are then scored together.  Without it, each request's rows are scored by themselves.
    """

    @property
    def catalogue(self) -> Catalogue:
        """Users, items, and the usual context."""
        ...

    @property
    def schema(self) -> Schema:
        """Features and tasks."""
        ...

    def recommend(
        self,
        users: Sequence[str | int],
        contexts: Sequence[Mapping[str, Any]] | None = None,
        *,
        candidates: Sequence[Sequence[Any] | None] | None = None,
        k: int = 10,
        seen: bool = False,
    ) -> pd.DataFrame:
        """The best k of each user's candidates (None: of all items): user, item, ``score``, a column for each task, and
        ``part:<task>`` where the score is a sum of parts.

        Each user's rows are best first.  A user for whom nothing is left has no row; where that is so for all of them,
        `NothingLeftError` may be raised.
        """
        ...

    def score(self, frame: pd.DataFrame) -> pd.DataFrame:
        """``score``, a column for each task and ``part:<task>``, for rows of every input column, in their order."""
        ...


@dataclass(frozen=True)
class Ask:
    """One user's request for a ranking; see `Ranker.recommend`."""

    user: str | int
    context: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Any, ...] | None = None
    k: int = 10
    seen: bool = False


def rank_together(ranker: Ranker, asks: Sequence[Ask]) -> list[pd.DataFrame | Exception]:
    """A ranking for each request, or why there is none; what is wrong with one request does not fail another.

    Requests are scored in one call of the ranker as far as they agree on `seen`; a user who asks twice at the same
    time is in two calls, as a ranking is known by its user.
    """
    calls: dict[Hashable, list[int]] = {}
    times: dict[Hashable, int] = {}
    for i, ask in enumerate(asks):
        asked = times[ask.user] = times.get(ask.user, 0) + 1
        calls.setdefault((ask.seen, asked), []).append(i)
    results: dict[int, pd.DataFrame | Exception] = {}
    for call in calls.values():
        results |= zip(call, _each([asks[i] for i in call], lambda some: _recommend(ranker, some)), strict=True)
    return [results[i] for i in range(len(asks))]


def score_together(ranker: Ranker, frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame | Exception]:
    """Scores for each frame of rows, or why there are none."""
    if not getattr(ranker, "rows_alone", False):
        return [result for frame in frames for result in _each([frame], lambda one: [ranker.score(one[0])])]
    return _each(frames, lambda some: _score(ranker, some))


def answers(frame: pd.DataFrame, tasks: Sequence[str], *, item: str | None = None) -> list[dict[str, Any]]:
    """Rows of a ranking, or of scores, as JSON holds them.

    Args:
        frame: what a ranker returned.
        tasks: names of the tasks.
        item: the item column, if the rows are to name it.

    Example:
        >>> ranked = pd.DataFrame({"sku": ["p1"], "score": [0.5], "buy": [0.25], "part:buy": [0.5]})
        >>> answers(ranked, ["buy"], item="sku")
        [{'item': 'p1', 'score': 0.5, 'predictions': {'buy': 0.25}, 'parts': {'buy': 0.5}}]
    """
    scores = frame["score"].tolist()  # Python's own numbers
    predictions = _records(frame, {task: task for task in tasks})
    parts = _records(frame, {task: PART + task for task in tasks})
    spread = _records(frame, {SPREAD: SPREAD})
    rows = [
        {"score": score, **apart, "predictions": predicted, "parts": part}
        for score, apart, predicted, part in zip(scores, spread, predictions, parts, strict=True)
    ]
    return rows if item is None else [{"item": i, **row} for i, row in zip(frame[item].tolist(), rows, strict=True)]


def _records(frame: pd.DataFrame, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Name -> value for each row, of the columns that are there."""
    there = {name: frame[column].tolist() for name, column in columns.items() if column in frame}
    if not there:
        return [{} for _ in range(len(frame))]
    return [dict(zip(there, values, strict=True)) for values in zip(*there.values(), strict=True)]


def _each(
    jobs: Sequence[J], together: Callable[[Sequence[J]], Iterable[pd.DataFrame]]
) -> list[pd.DataFrame | Exception]:
    """All jobs at once; if that fails, each by itself, so that only the one at fault fails."""
    try:
        return list(together(jobs))
    except Exception as error:
        if len(jobs) == 1:
            return [error]
    return [result for job in jobs for result in _each([job], together)]


def _recommend(ranker: Ranker, asks: Sequence[Ask]) -> list[pd.DataFrame]:
    users = [ask.user for ask in asks]
    candidates = None if all(ask.candidates is None for ask in asks) else [ask.candidates for ask in asks]
    try:
        ranked = ranker.recommend(
            users,
            [ask.context for ask in asks],
            candidates=candidates,
            k=max(ask.k for ask in asks),
            seen=asks[0].seen,
        )
    except NothingLeftError:
        return [pd.DataFrame({"score": [], str(ranker.schema.item): []}) for _ in asks]
    if len(asks) == 1 and (ranked[str(ranker.schema.user)] == users[0]).all():
        return [ranked.iloc[: asks[0].k]]
    of_user: dict[Any, list[int]] = {user: [] for user in users}
    for row, user in enumerate(ranked[str(ranker.schema.user)].tolist()):
        if user not in of_user:
            raise RuntimeError("the recommender answered for another user than was asked for")
        of_user[user].append(row)
    return [ranked.iloc[of_user[ask.user][: ask.k]] for ask in asks]


def _score(ranker: Ranker, frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    scored = ranker.score(pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0])
    parts, start = [], 0
    for frame in frames:
        parts.append(scored.iloc[start : start + len(frame)])
        start += len(frame)
    return parts
