"""How far `mtcl baselines` is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Doing:
    """A trial that begins.

    Args:
        baseline: its name.
        place, places: which of how many baselines, from 1.
        title: the task, or ``"all tasks"``.
        trial, trials: which of how many of these, from 1.
        done, total: trials of this baseline, of all tasks, that are done, and that there may be.
        seconds: what the rest of this baseline will probably take; None where nothing is known yet.
    """

    baseline: str
    place: int
    places: int
    title: str
    trial: int
    trials: int
    done: int
    total: int
    seconds: float | None

    @property
    def line(self) -> str:
        """For the user.

        Example:
            >>> Doing("als", 3, 8, "like", 2, 8, 9, 24, 75.0).line
            'als (3 of 8): like, trial 2 of 8; als takes 1 min 15 s more, if trials go on as before'
        """
        left = (
            ""
            if self.seconds is None
            else f"; {self.baseline} takes {span(self.seconds)} more, if trials go on as before"
        )
        return (
            f"{self.baseline} ({self.place} of {self.places}): {self.title}, trial {self.trial} of {self.trials}{left}"
        )


Progress = Callable[[Doing], object]


def quiet(doing: Doing) -> None:
    """Say nothing."""


def span(seconds: float) -> str:
    """A time in words.

    Example:
        >>> span(4.2), span(75), span(7300)
        ('4 s', '1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


class Course:
    """The trials of one baseline, and what they take.

    Args:
        baseline, place, places: as of `Doing`.
        trials: of each of its tasks (or once, of all together).
        seconds: that it may take; None is no limit.
        progress: is told of each trial that begins.
    """

    def __init__(
        self, baseline: str, place: int, places: int, trials: dict[str, int], seconds: float | None, progress: Progress
    ) -> None:
        self.baseline, self.place, self.places = baseline, place, places
        self.trials, self.seconds, self.progress = trials, seconds, progress
        self.taken: list[float] = []
        self.done = 0

    def begins(self, title: str, trial: int) -> None:
        """A trial of a task, counted from 1, begins."""
        total = sum(self.trials.values())
        left = None
        if self.taken:
            left = (total - self.done) * sum(self.taken) / len(self.taken)
            left = left if self.seconds is None else min(left, max(self.seconds - sum(self.taken), 0.0))
        self.progress(
            Doing(self.baseline, self.place, self.places, title, trial, self.trials[title], self.done, total, left)
        )

    def ended(self, seconds: float) -> None:
        """It took so many seconds; also of one that was done before an interruption."""
        self.taken.append(seconds)
        self.done += 1

    def passed_over(self, trials: int) -> None:
        """Trials of a task that do not begin, as its seconds are spent."""
        self.done += trials
