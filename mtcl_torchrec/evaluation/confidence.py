"""How sure a number is, as it is said: one meaning of ±, what an interval rests on, and when nothing can be sure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.evaluation.significance import t_quantile

SURE = 1.96  # standard errors on either side of a 95 % interval of so many users that their number does not count
FEWEST = 20  # events, and rows without: of fewer, standard errors are too small, and nothing is sure
FEWEST_USERS = 10  # with an event, and with rows without
FEWEST_EFFECTIVE = 4  # of users, see `Support`
PLUS_MINUS = "± is half of a 95 % interval, over users"
TOO_FEW = "too few events"


@dataclass(frozen=True)
class Support:
    """What the standard error of a metric rests on.

    Users without an event add nothing to what is known of it, however many there are; and where most events are those
    of a few users, the others add little.  Kish's effective number of users (*Survey Sampling*, 1965), (Σ n)² / Σ n²
    of their events n, counts both, and is the number of users where all have equally many.

    Args:
        users: effective number.
        unsure: why nothing can be sure, in a few words; empty where it can.
    """

    users: float
    unsure: str = ""

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the standard error; NaN where nothing can be sure."""
        return math.nan if self.unsure else max(self.users - 1, 0.0)

    @property
    def quantile(self) -> float:
        """What the standard error is multiplied by, of half a 95 % interval; NaN where nothing can be sure.

        Example:
            >>> round(Support(20.0).quantile, 2), Support(20.0, "too few events (3)").quantile
            (2.09, nan)
        """
        return t_quantile(self.freedom)

    def error_of(self, spread: float) -> float:
        """Standard error, of the spread over draws of so many users, which is too small by √((n - 1) / n), as of a mean
        of n numbers (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993).

        Example:
            >>> round(Support(10.0).error_of(0.3), 4)
            0.3162
        """
        return spread * math.sqrt(self.users / (self.users - 1)) if self.users > 1 else math.nan


def support_of(labels: np.ndarray, clusters: np.ndarray, weights: np.ndarray | None = None) -> Support:
    """What a metric of an event rests on: rows with the event, and rows without, whichever are of fewer users.

    Args:
        labels: (N,) 0 or 1, NaN where missing.
        clusters: (N,) int, whose rows are drawn together, such as the user's.
        weights: (N,) of the rows.

    Example:
        >>> support_of(np.tile([1.0, 0.0], 50), np.arange(100) // 4)
        Support(users=25.0, unsure='')
        >>> support_of(np.array([1.0, 0.0, 0.0]), np.array([0, 1, 2])).unsure
        'too few events (1)'
        >>> support_of(np.tile([1.0, 0.0], 50), np.zeros(100, int)).unsure
        'a single user'
        >>> support_of(np.r_[np.ones(50), np.zeros(50)], np.r_[np.arange(50) % 3, np.arange(50)]).unsure
        'too few users with an event (3)'
    """
    known = ~np.isnan(labels)
    counts = known if weights is None else known & (weights > 0)
    size = np.ones(int(counts.sum())) if weights is None else weights[counts].astype(np.float64)
    happened, of = labels[counts] > 0, clusters[counts]
    sides = [(happened, "event"), (~happened, "other")]
    found = [rests_on(np.where(side, size, 0.0), of, called) for side, called in sides]
    return weakest(found)


def rests_on(amounts: np.ndarray, clusters: np.ndarray, of: str = "event") -> Support:
    """What a metric rests on that adds up something over rows.

    Args:
        amounts: (N,) what each row has of it, such as 1 where its event happened; 0 or NaN: nothing.
        clusters: (N,) int, whose rows are drawn together.
        of: ``"event"``; ``"other"``: a row without; ``"label"``; ``"request"``; ``"both"``: of users with and without.

    Example:
        >>> rests_on(np.ones(60), np.arange(60) % 30).users, rests_on(np.ones(60), np.arange(60) % 6).unsure
        (30.0, 'too few users with an event (6)')
        >>> rests_on(np.ones(60), np.maximum(np.arange(60) - 35, 0)).unsure
        'most events are of too few users (effectively 2.7)'
    """
    some = np.nan_to_num(amounts) != 0
    rows, owners = int(some.sum()), np.unique(clusters[some], return_inverse=True)[1]
    by_user = np.bincount(owners, np.abs(amounts[some])) if rows else np.zeros(0)
    effective = float(by_user.sum() ** 2 / (by_user**2).sum()) if rows else 0.0
    plural, one = _CALLED[of]
    if rows < FEWEST:
        return Support(effective, f"too few {plural} ({rows:,})")
    if len(by_user) < 2:
        return Support(effective, "a single user")
    if len(by_user) < FEWEST_USERS:
        return Support(effective, f"too few users with {one} ({len(by_user)})")
    if effective < FEWEST_EFFECTIVE:
        return Support(effective, f"most {plural} are of too few users (effectively {effective:.1f})")
    return Support(effective)


_CALLED = {
    "event": ("events", "an event"),
    "other": ("rows without the event", "a row without the event"),
    "label": ("labels", "a label"),
    "request": ("requests", "a request"),
    "both": ("rows", "and without an event"),
}


def weakest(found: Iterable[Support]) -> Support:
    """Of what a metric rests on alike: the first that makes nothing sure, else the one of the fewest users.

    Example:
        >>> weakest([Support(30.0), Support(20.0)]).users, weakest([Support(9.0), Support(30.0, "why")]).unsure
        (20.0, 'why')
    """
    found = list(found)
    return next((of for of in found if of.unsure), None) or min(found, key=lambda of: of.users)


def too_few_to_judge(metrics: Mapping[str, float | None]) -> str:
    """Why a task cannot be judged by its metrics on a split, in a few words, from how many labels they are of; empty
    where it can.  `FEWEST` of each, as in `support_of`.

    Args:
        metrics: as of `mtcl_torchrec.evaluation.metrics.task_metrics`; None and NaN alike are what is not defined.

    Example:
        >>> too_few_to_judge({"auc": 0.7, "count": 6196.0, "base_rate": 15 / 6196})
        '15 events'
        >>> too_few_to_judge({"auc": 0.7, "count": 6196.0, "base_rate": 0.3}), too_few_to_judge({"count": 0.0})
        ('', 'no label')
    """
    count = metrics.get("count")
    if count is None:
        return ""
    if count == 0:
        return "no label"
    if "auc" in metrics and "r2" not in metrics:  # of a binary task
        events = round(count * (metrics.get("base_rate") or 0.0))
        others = round(count) - events
        if events < FEWEST:
            return _number(events, "event", "no event")
        return "" if others >= FEWEST else _number(others, "row without it", "no row without it", "rows without it")
    if count < FEWEST:
        return _number(round(count), "label", "no label")
    known = [value for name in ("r2", "ne") if (value := metrics.get(name)) is not None and math.isfinite(value)]
    return "" if known else "one label throughout"


def _number(count: int, one: str, none: str, several: str = "") -> str:
    if count == 0:
        return none
    return f"1 {one}" if count == 1 else f"{count} {several or f'{one}s'}"


def clipped(low: float, high: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """An interval that does not pass the metric's own bounds.

    Example:
        >>> clipped(0.9, 1.02, (0.0, 1.0))
        (0.9, 1.0)
    """
    return max(low, bounds[0]), min(high, bounds[1])


def plain_number(value: float | None, digits: int = 4) -> str:
    """A number; a dash where it is not defined, and no −0.

    Example:
        >>> plain_number(0.12345), plain_number(None), plain_number(-1e-9, 2)
        ('0.1235', '–', '0.00')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:z,.{digits}f}".replace("-", "−")


def plus_minus(
    value: float | None, half: float | None, digits: int = 4, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> str:
    """A number and half of its 95 % interval; where that would pass the metric's bounds, the interval's ends.

    Args:
        half: of the interval; None or NaN where it is not known.

    Example:
        >>> plus_minus(0.7, 0.0196), plus_minus(0.99, 0.03, 2, (0.0, 1.0)), plus_minus(-1e-9, 1e-9)
        ('0.7000 ± 0.0196', '0.99 (0.96 to 1.00)', '0.0000 ± <0.0001')
    """
    said = plain_number(value, digits)
    if value is None or half is None or not math.isfinite(value) or not math.isfinite(half) or half == 0:
        return said
    if value - half < bounds[0] or value + half > bounds[1]:
        low, high = clipped(value - half, value + half, bounds)
        return f"{said} ({plain_number(low, digits)} to {plain_number(high, digits)})"
    smallest = 10.0**-digits
    return f"{said} ± " + (plain_number(half, digits) if half >= smallest / 2 else f"<{smallest:.{digits}f}")
