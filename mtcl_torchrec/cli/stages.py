"""How far a command is that goes through rows: a bar on a terminal, a line every so often elsewhere, both on stderr."""

from __future__ import annotations

import time
from types import TracebackType

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from mtcl_torchrec.baselines.progress import span

TELL_EVERY = 10.0  # seconds, where stderr is no terminal


class Stages:
    """A `mtcl_torchrec.evaluation.progress.Progress` that a person sees; what was shown goes when the block is left.

    Example:
        >>> with Stages() as stages:
        ...     stages("predicting rows", 0, 1_000_000)
        ...     stages("predicting rows", 8192, 1_000_000)
    """

    def __init__(self) -> None:
        err = Console(stderr=True)
        self._bar: Progress | None = None
        if err.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
                       MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())  # fmt: skip
            self._bar = Progress(*columns, console=err, transient=True)
            self._task = self._bar.add_task("reading rows", total=None, speed="")
        self._stage, self._done = "", 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Stages:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """So much of a stage is done, of so much; of 0, where that is not known.

        Args:
            doing: two words at least, such as "predicting rows": the second is what is counted.
        """
        now = time.monotonic()
        if doing != self._stage or done < self._done:
            self._began = now
            if self._bar is not None:
                self._bar.reset(self._task, total=total or None, description=doing, speed="")
        self._stage, self._done = doing, done
        speed = done / max(now - self._began, 1e-9)
        said = f"{speed:,.0f} {doing.split()[1]}/s" if done else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total or None, speed=said)
        elif now - self._told >= TELL_EVERY:
            self._told = now
            left = f", {said}, {span((total - done) / speed)} left" if done else ""
            typer.echo(f"mtcl: {doing}" + (f": {done:,} of {total:,}{left}" if total else ""), err=True)
