"""How fast an epoch trains once it is under way: its first step, in which everything starts, does not count."""

from __future__ import annotations

import time
from collections.abc import Callable

TOLD_FROM = 0.2  # share of an epoch that went into its first step


class Pace:
    """Rows a second from the end of the first step on.

    The first step fills the pipeline and, where training is compiled, compiles: that takes the same time for a thousand
    rows and for a billion, and would hide how fast the rest is.

    Args:
        clock: seconds.

    Example:
        >>> at = iter([0.0, 40.0, 41.0, 42.0])
        >>> pace = Pace(clock=lambda: next(at))  # begins at 0
        >>> for rows in (1024, 1024, 512):
        ...     pace.step(rows)
        >>> pace.first_step_s, pace.samples_per_second
        (40.0, 768.0)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._first: float | None = None
        self._rows = 0

    def step(self, rows: int) -> None:
        """A step of so many rows is done."""
        self._last = self._clock()
        if self._first is None:
            self._first = self._last
        else:
            self._rows += rows

    @property
    def first_step_s(self) -> float | None:
        """Seconds until the first step was done; None before it."""
        return None if self._first is None else self._first - self._began

    @property
    def samples_per_second(self) -> float | None:
        """Rows a second after the first step; None where there is no second one."""
        if self._first is None or self._last <= self._first:
            return None
        return self._rows / (self._last - self._first)


def epoch_speed(seconds: float, samples_per_second: float | None, first_step_s: float | None) -> str:
    """What the line of an epoch says of its time and speed.

    Args:
        seconds: of the epoch's training.
        samples_per_second, first_step_s: as `Pace` has them.

    Example:
        >>> epoch_speed(4.9, 49_077.4, 0.02)
        'in 4.9 s, 49,077 samples/s'
        >>> epoch_speed(48.5, 91_200.0, 43.1)
        'in 48.5 s (the first step 43.1), then 91,200 samples/s'
        >>> epoch_speed(0.2, None, 0.2)
        'in 0.2 s'
    """
    took = f"in {seconds:.1f} s"
    if samples_per_second is None:
        return took
    speed = f"{samples_per_second:,.0f} samples/s"
    if first_step_s is not None and first_step_s > max(1.0, TOLD_FROM * seconds):
        return f"{took} (the first step {first_step_s:.1f}), then {speed}"
    return f"{took}, {speed}"
