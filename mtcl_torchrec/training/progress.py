"""What a person sees while training: a bar on a terminal, plain lines elsewhere, TensorBoard scalars."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from mtcl_torchrec.evaluation.naming import label_of, main_metric

LINE_EVERY_S = 15.0


class _BarAndLosses(Progress):
    """The bar, and below it a line of its own for speed and losses."""

    info = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Bar and line."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.info)


class TrainingProgress:
    """Reports steps, losses and speed.  Only rank 0 reports; elsewhere every call does nothing.

    Args:
        active: whether this process reports.
        total_steps: over all epochs.
        log_dir: folder of the TensorBoard event file, or None.
        console: where to print.
        done: steps that a resumed run has behind it.
    """

    def __init__(
        self,
        *,
        active: bool,
        total_steps: int,
        log_dir: Path | None = None,
        console: Console | None = None,
        done: int = 0,
    ) -> None:
        self.active, self.total_steps = active, total_steps
        self.console = console or Console()
        self.writer = _summary_writer(log_dir) if active and log_dir is not None else None
        if active and log_dir is not None and self.writer is None:
            self.console.print(
                "no TensorBoard scalars: pip install 'mtcl_torchrec[tensorboard]' to have them", markup=False
            )
        self._started = self._last_line = time.perf_counter()
        self._rows, self._counted_from = 0, done
        self._under_way = False
        self._metrics: dict[str, dict[str, float]] = {}
        self._bar: _BarAndLosses | None = None
        self._bar_task: TaskID | None = None
        if active and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = _BarAndLosses(*columns, console=self.console)
            self._bar_task = self._bar.add_task("training", total=total_steps, completed=done)

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.writer is not None:
            self.writer.close()

    def step(
        self,
        *,
        epoch: int,
        step: int,
        rows: int,
        losses: dict[str, float] | None,
        scalars: dict[str, float] | None = None,
        metrics: dict[str, dict[str, float]] | None = None,
    ) -> None:
        """One step is done.

        Args:
            epoch: counted from 1.
            step: counted from 1 over all epochs.
            rows: of the global batch.
            losses: by task and ``"total"``, or None in steps that read none.
            scalars: what else was read, for TensorBoard.
            metrics: task -> metric -> value of what the training steps predicted, or None in steps that read none.
        """
        if not self.active:
            return
        if self._under_way:
            self._rows += rows
        else:  # the first step starts everything, and compiles: it says nothing of those to come
            self._under_way, self._started, self._counted_from = True, time.perf_counter(), step
        if metrics is not None:
            self._metrics = metrics
            if self.writer is not None:
                for name, value in metric_scalars(metrics).items():
                    self.writer.add_scalar(name, value, step)
        if self.writer is not None and losses is not None:
            for name, value in ({f"loss/{n}": v for n, v in losses.items()} | (scalars or {})).items():
                self.writer.add_scalar(name, value, step)
        if self._bar is not None:
            assert self._bar_task is not None
            self._bar.update(self._bar_task, completed=step, description=f"epoch {epoch}")
            if losses is not None:
                self._bar.info = self._info(losses)
        elif losses is not None and time.perf_counter() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.perf_counter()
            done, spent = step - self._counted_from, self._last_line - self._started
            left = f" {spent / done * (self.total_steps - step) / 60:.1f} min left" if done else ""
            self.line(f"epoch {epoch} step {step}/{self.total_steps} {self._info(losses)}{left}")

    def _info(self, losses: dict[str, float] | None) -> str:
        parts = " ".join(f"{name} {value:.4f}{self._metric_of(name)}" for name, value in (losses or {}).items())
        if not self._rows:
            return parts
        return f"{self._rows / max(time.perf_counter() - self._started, 1e-9):,.0f} samples/s {parts}"

    def _metric_of(self, task: str) -> str:
        """The one that says most, in brackets behind the task's loss."""
        of = self._metrics.get(task, {})
        shown = main_metric(of)
        return "" if shown is None else f" ({label_of(shown)} {of[shown]:.4f})"

    def epoch(self, *, step: int, scalars: dict[str, float], line: str) -> None:
        """An epoch was evaluated."""
        if not self.active:
            return
        self.line(line)
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        if self.active:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def metric_scalars(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """By name, as TensorBoard groups them.

    Example:
        >>> metric_scalars({"click": {"count": 300.0, "auc": 0.7}})
        {'train/auc/click': 0.7}
    """
    return {f"train/{name}/{task}": v for task, of in metrics.items() for name, v in of.items() if name != "count"}


def _summary_writer(log_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(log_dir))
