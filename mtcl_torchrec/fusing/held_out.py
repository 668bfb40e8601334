"""What a fusion is fitted on: predictions for rows that the model was not trained on, labels, and requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from mtcl_torchrec.evaluation.ranking import rows_by_request
from mtcl_torchrec.evaluation.worth import POPULARITY
from mtcl_torchrec.modules.fusion import ContextGatedMean, DenseNumber, RowContext, WeightedMean, fuse
from mtcl_torchrec.modules.fusion.value import amounts_of
from mtcl_torchrec.schema import ConfigError, DataError, nearest

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class HeldOut:
    """N rows with each task's part, the labels, and which rows are ranked against each other.

    Args:
        parts: task -> (N,) in [0, 1], what it contributes to a fused score.
        labels: task -> (N,) float, what happened; NaN where it is not known.  Of a multiclass task: whether the class
            was the candidate's own.
        request: (N,) integers, equal for rows of one request.
        user: (N,) integers, or None.  Folds are over users, and standard errors allow for the requests of one user
            being alike; without users, both take every request for one of its own.
        dense_features: (N, D), for a fused score that depends on the context.
        embeddings: sparse feature -> (N, dim), likewise.
        rankings: name -> (N,) scores of other rules to compare with, such as popularity.
        popular: task -> (N,) in [0, 1], as `parts`, were it predicted by how popular the item is for its event.
        requests_are: what a request is, in words.
        given: task -> the task whose event must happen first, where the task's part is the probability given that.
        item_numbers: task -> the number that its value is multiplied by (the item's price), read from `dense_features`.

    Raises:
        DataError: arrays of different lengths, no row, a part that is no number in [0, 1], a request of two users.

    Example:
        >>> rows = HeldOut(
        ...     parts={"click": np.array([0.2, 0.6, 0.4]), "like": np.array([0.1, 0.0, 0.3])},
        ...     labels={"click": np.array([0.0, 1.0, 1.0]), "like": np.array([0.0, np.nan, 1.0])},
        ...     request=np.array([1, 1, 2]),
        ... )
        >>> len(rows), rows.requests, rows.reward({"click": 1.0, "like": 8.0})
        (3, 2, array([0., 1., 9.]))
    """

    parts: Arrays
    labels: Arrays
    request: np.ndarray
    user: np.ndarray | None = None
    dense_features: np.ndarray | None = None
    embeddings: Arrays = field(default_factory=dict)
    rankings: Arrays = field(default_factory=dict)
    popular: Arrays = field(default_factory=dict)
    requests_are: str = "request"
    given: Mapping[str, str] = field(default_factory=dict)
    item_numbers: Mapping[str, DenseNumber] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts or len(self.request) == 0:
            raise DataError("held-out predictions need at least one task and one row")
        for what in ("parts", "labels", "embeddings", "rankings", "popular"):
            for name, values in getattr(self, what).items():
                if len(values) != len(self.request):
                    raise DataError(f"{what} of {name!r}: {len(values):,} rows, but there are {len(self.request):,}")
        for name, part in self.parts.items():
            if not bool(np.all((part >= 0) & (part <= 1))):
                raise DataError(f"parts of {name!r} are not all in [0, 1]")
        for name, label in self.labels.items():
            if np.isinf(label).any():
                raise DataError(f"labels of {name!r} are not all finite (or NaN, where missing)")
        if self.item_numbers and self.dense_features is None:
            raise DataError("item_numbers are read from the dense features, and there are none")
        if self.user is not None:
            first = np.full(self.requests, -1, np.int64)
            users = rows_by_request(self.user)[0]
            first[self.numbers] = users
            if not np.array_equal(first[self.numbers], users):
                raise DataError("some request has rows of two users")

    def __len__(self) -> int:
        return len(self.request)

    @cached_property
    def numbers(self) -> np.ndarray:
        """(N,) the requests, numbered from 0."""
        return rows_by_request(self.request)[0]

    @property
    def rows_of_requests(self) -> np.ndarray:
        """(R,) how many rows each request has."""
        return np.bincount(self.numbers)

    @property
    def requests(self) -> int:
        """R, how many requests there are."""
        return int(self.numbers.max()) + 1

    @cached_property
    def clusters(self) -> np.ndarray:
        """(R,) the user of each request, or the request itself."""
        clusters = np.empty(self.requests, np.int64)
        clusters[self.numbers] = self.numbers if self.user is None else self.user
        return clusters

    @cached_property
    def _happened(self) -> Arrays:
        return {task: np.nan_to_num(label) for task, label in self.labels.items()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that have a part."""
        return tuple(self.parts)

    def take(self, mask: np.ndarray) -> HeldOut:
        """The rows where `mask` (N,) is true."""

        def cut(value: object) -> object:
            if isinstance(value, dict):
                return {name: v[mask] if isinstance(v, np.ndarray) else v for name, v in value.items()}
            return value[mask] if isinstance(value, np.ndarray) else value

        return HeldOut(**{f.name: cut(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def with_parts(self, parts: Mapping[str, np.ndarray]) -> HeldOut:
        """The same rows with other parts, such as calibrated ones."""
        return replace(self, parts=dict(parts))

    def with_ranking(self, name: str, scores: np.ndarray) -> HeldOut:
        """The same rows with one more rule to compare with."""
        return replace(self, rankings={**self.rankings, name: scores})

    def with_popularity(self, fused_score: nn.Module) -> HeldOut:
        """The same rows, and in `rankings` the popularities of the events, fused by a module as the parts are; nothing
        more where they are not known.  One that reads embeddings gives way to the weighted mean of its weights.

        Example:
            >>> from mtcl_torchrec.modules.fusion import WeightedMean
            >>> part, popular = {"click": np.zeros(2)}, {"click": np.array([0.25, 0.5])}
            >>> rows = HeldOut(part, {}, np.zeros(2, np.int64), popular=popular)
            >>> rows.with_popularity(WeightedMean({"click": 1.0})).rankings["popularity"]
            array([0.25, 0.5 ])
        """
        if not set(fused_score.tasks) <= set(self.popular):  # type: ignore[arg-type]
            return self
        if isinstance(fused_score, ContextGatedMean):
            fused_score = WeightedMean(dict(zip(fused_score.tasks, fused_score.weights.tolist(), strict=True)))
        return self.with_ranking(POPULARITY, self.with_parts(self.popular).scores(fused_score))

    @cached_property
    def amounts(self) -> Arrays:
        """Task -> (N,) the number of the item that its value is multiplied by, at least 0; of tasks that have one."""
        if self.dense_features is None:
            return {}
        found = amounts_of(self.item_numbers, torch.from_numpy(np.asarray(self.dense_features)))
        return {task: amount.numpy() for task, amount in found.items()}

    def reward(self, values: Mapping[str, float]) -> np.ndarray:
        """(N,) Σ valueᵢ · labelᵢ: what each row brought; times the item's number, where the value is for a unit of it.
        A label that is not known brings nothing.

        Raises:
            ConfigError: a task without labels.
        """
        for task in values:
            if task not in self.labels:
                raise ConfigError(f"values: no labels of a task {task!r}{nearest(task, self.labels)}")
        return np.sum([v * self.amounts.get(task, 1.0) * self._happened[task] for task, v in values.items()], axis=0)

    def folds(self, count: int, *, seed: int = 0) -> np.ndarray:
        """(N,) which of `count` folds a row is in; all rows of a user (without users: of a request) are in one.

        Raises:
            ConfigError: fewer than two folds, or fewer users than folds.

        Example:
            >>> rows = HeldOut({"a": np.zeros(4)}, {}, request=np.array([5, 5, 6, 7]))
            >>> folds = rows.folds(3)
            >>> folds[0] == folds[1], sorted(set(folds.tolist()))
            (np.True_, [0, 1, 2])
        """
        of_row = rows_by_request(self.request if self.user is None else self.user)[0]
        there = int(of_row.max()) + 1
        if not 2 <= count <= there:
            what = "requests" if self.user is None else "users"
            raise ConfigError(
                f"folds: {count} folds over {there:,} {what}; at least 2 are needed, and one in each fold"
            )
        fold = np.arange(there) % count
        np.random.default_rng(seed).shuffle(fold)
        return fold[of_row]

    @cached_property
    def tensors(self) -> tuple[dict[str, torch.Tensor], RowContext]:
        """Parts (N,) by task in float32, and the context of the rows."""
        parts = {name: torch.from_numpy(np.asarray(part, np.float32)) for name, part in self.parts.items()}
        dense = np.zeros((len(self), 0)) if self.dense_features is None else self.dense_features
        embeddings = {n: torch.from_numpy(np.asarray(e, np.float32)) for n, e in self.embeddings.items()}
        return parts, RowContext(
            torch.from_numpy(np.asarray(dense, np.float32)), embeddings, torch.from_numpy(self.numbers)
        )

    @torch.no_grad()
    def scores(self, fused_score: nn.Module) -> np.ndarray:
        """(N,) float64 scores of a module of the signature in `mtcl_torchrec.modules.fusion`, computed in float32 as
        in the model."""
        parts, context = self.tensors
        return fuse(fused_score, parts, context).double().numpy()


def sessions(users: np.ndarray, times: np.ndarray, gap: float) -> np.ndarray:
    """Sessions, numbered: rows of one user with never more than `gap` between one and the next.

    Args:
        users: (N,) keys.
        times: (N,) numbers.
        gap: in the unit of `times`.

    Returns:
        (N,) int64.

    Example:
        >>> sessions(np.array([1, 2, 1, 1]), np.array([0, 5, 10, 99]), 30)
        array([0, 2, 0, 1])
    """
    order = np.lexsort((times, users))
    u, t = users[order], times[order]
    new = np.r_[True, (u[1:] != u[:-1]) | (t[1:] - t[:-1] > gap)]
    numbers = np.empty(len(users), np.int64)
    numbers[order] = np.cumsum(new) - 1
    return numbers
