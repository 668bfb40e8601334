"""How sure a metric is: users are drawn with replacement, and each draw is measured.

Rows of one user are alike, so that users are drawn, not rows (cluster bootstrap; Field & Welsh, JRSS B 2007).  A draw
is how often each user was drawn, a weight, and every metric is a function of these weights: no row is copied.  The
interval is the estimate ± t · the standard deviation over the draws, with Student's t of (users - 1) degrees of
freedom: of the users who tell something of the metric, see `mtcl_torchrec.evaluation.confidence.Support`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.config.commands import DRAWS
from mtcl_torchrec.evaluation.confidence import Support, clipped
from mtcl_torchrec.evaluation.naming import bounds_of
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.progress import Progress, quiet

DRAWING = "making draws of users"
_NUMBERS_AT_ONCE = 10**7  # of weights
_DRAWS_AT_ONCE = 20  # more are no faster, and take their memory


@dataclass(frozen=True)
class Resampled:
    """Metrics as a function of how often each of U users is drawn.

    Args:
        names: of M metrics, each (task or ``"ranking"``, metric).
        of: weights (B, U) float64 -> (B, M) float64, NaN where one is not defined.
    """

    names: tuple[tuple[str, str], ...]
    of: Callable[[np.ndarray], np.ndarray]

    def estimate(self, users: int) -> np.ndarray:
        """(M,) float64: of every user once."""
        return self.of(np.ones((1, users)))[0]


@dataclass(frozen=True)
class Interval:
    """A metric and how sure it is.

    Args:
        value: of all rows.
        error: standard error.
        low, high: what contains the metric of all users there could be, in 95 of 100 such samples; within the metric's
            own bounds.
        unsure: why there is no interval, in a few words, such as too few events: error, low and high are NaN then.
    """

    value: float
    error: float
    low: float
    high: float
    unsure: str = ""

    @property
    def half(self) -> float:
        """Half of the interval, before a bound cuts it off."""
        return max(self.high - self.value, self.value - self.low)


def clusters_of(table: PredictionsTable) -> tuple[np.ndarray, int]:
    """(N,) int64, which rows are drawn together, and of how many clusters: those of a user, where it is known, else of
    a request, else the row alone.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"user": ["a", None, "a", None]})
        >>> clusters_of(PredictionsTable(frame, ()))
        (array([0, 1, 0, 2]), 3)
    """
    rows = len(table)
    keys = np.arange(rows, dtype=np.float64)
    for known in (table.requests, table.users):
        if known is not None:
            # Numbers of one kind of key stay apart from those of the other.
            keys = np.where(np.isnan(known), keys + np.nanmax(known, initial=0) + 1, known)
    once, clusters = np.unique(keys, return_inverse=True)
    return clusters, len(once)


def weights(users: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks (b, U) float64 of how often each user was drawn; the same for the same seed."""
    random = np.random.default_rng(seed)
    at_once = min(_DRAWS_AT_ONCE, max(1, _NUMBERS_AT_ONCE // max(users, 1)))
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        drawn = [np.bincount(random.integers(0, users, users), minlength=users) for _ in range(count)]
        yield np.stack(drawn).astype(np.float64)


def draw(
    parts: Sequence[Resampled], users: int, *, draws: int = DRAWS, seed: int = 0, progress: Progress = quiet
) -> np.ndarray:
    """(draws, M) float64: the metrics of all parts, one after the other, in each draw.

    Args:
        users: U.
        progress: told of the draws.
    """
    found, done = list[np.ndarray](), 0
    progress(DRAWING, 0, draws)
    for chunk in weights(users, draws, seed):
        found.append(np.concatenate([part.of(chunk) for part in parts], axis=1))
        done += len(chunk)
        progress(DRAWING, done, draws)
    return np.concatenate(found)


def spread(found: np.ndarray) -> np.ndarray:
    """(M,) standard deviation over the draws in which a metric is defined; NaN where that are fewer than two.

    Args:
        found: (draws, M).
    """
    known = ~np.isnan(found)
    count = known.sum(0)
    mean = np.where(known, found, 0).sum(0) / np.maximum(count, 1)
    squares = (np.where(known, found - mean, 0) ** 2).sum(0)
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def intervals(
    parts: Sequence[Resampled],
    users: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    support: Callable[[str, str], Support] | None = None,
    progress: Progress = quiet,
) -> dict[str, dict[str, Interval]]:
    """Task or ``"ranking"`` -> metric -> its interval.

    Args:
        parts: see `mtcl_torchrec.evaluation.resampled`.
        users: U.
        draws: how many times users are drawn.
        seed: the same seed draws the same users.
        support: (task or ``"ranking"``, metric) -> what it rests on; see `mtcl_torchrec.evaluation.supports`.  By
            default all users, alike.
        progress: told of the draws.

    Example:
        >>> heights = np.array([1.0, 2.0, 3.0, 4.0])
        >>> mean = Resampled((("height", "mean"),), lambda w: (w @ heights / w.sum(1))[:, None])
        >>> found = intervals([mean], 4, draws=1000)["height"]["mean"]
        >>> found.value, 0.6 < found.error < 0.7
        (2.5, True)
    """
    spreads = spread(draw(parts, users, draws=draws, seed=seed, progress=progress))
    values = np.concatenate([part.estimate(users) for part in parts])
    names = [name for part in parts for name in part.names]
    found: dict[str, dict[str, Interval]] = {}
    for (of, metric), value, over_draws in zip(names, values, spreads, strict=True):
        rests = Support(float(users)) if support is None else support(of, metric)
        if rests.unsure:
            sure = Interval(float(value), np.nan, np.nan, np.nan, rests.unsure)
        else:
            error = rests.error_of(float(over_draws))
            half = rests.quantile * error
            ends = clipped(float(value - half), float(value + half), bounds_of(metric))
            sure = Interval(float(value), error, *ends)
        found.setdefault(of, {})[metric] = sure
    return found
