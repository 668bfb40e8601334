"""What `mtcl fuse` fits for, with and on: the target, the values of events, the kinds of score and the rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mtcl_torchrec.cli.arguments import task_numbers
from mtcl_torchrec.config import RunConfig, load_run
from mtcl_torchrec.schema import ConfigError

if TYPE_CHECKING:
    from mtcl_torchrec.data.source import Rows
    from mtcl_torchrec.fusing.combiners import Combiner
    from mtcl_torchrec.fusing.held_out import HeldOut
    from mtcl_torchrec.training.finished import FinishedRun

_GATED = "context_gated_mean"


def target_of(run: FinishedRun, target: str | None, k: int | None) -> str:
    """What is fitted for: by default, what the run's report begins with.

    Raises:
        ConfigError: a target, and a number of rows beside it.
    """
    if target is None:
        return f"value@{k or min(run.config.evaluation.k)}"
    if k is not None:
        raise ConfigError(f"--k says how many rows are shown, and so does --target {target}: give one of them")
    return target


def values_of(run: FinishedRun, given: list[str] | None, target: str) -> tuple[dict[str, float], str]:
    """What events are worth, and a line that says so where it was not given.

    Raises:
        ConfigError: the target needs values, and there are none.
    """
    if given:
        return task_numbers(given, "--value"), ""
    if "@" not in target:
        return {}, ""
    from mtcl_torchrec.training.fused import numbers_named
    from mtcl_torchrec.training.judging import worth_of

    values = dict(worth_of(run.config))
    if not values:
        raise ConfigError(f"--target {target} needs --value: what each task's event is worth, such as --value like=8")
    by_unit = {task.name for task in run.config.data_schema.tasks if task.kind == "regression"}
    unit = dict.fromkeys(by_unit, " for each unit of its label")
    unit |= {task: f" · {feature}" for task, feature in numbers_named(run.config.fusion, run.fusion).items()}
    shown = ", ".join(f"{task} {value:g}{unit.get(task, '')}" for task, value in values.items())
    whence = "evaluation.values of the run"
    if run.config.evaluation.values is None:
        whence = "the weights of the run's fusion"
        if left := [task for task in _weighed(run) if task not in values]:
            shown += f"; nothing is counted for {', '.join(left)}, as in the run's own value@k"
    return values, f"values are {whence}: {shown}  (--value TASK=NUMBER for others)"


def with_weighed(values: dict[str, float], run: FinishedRun, held_out: HeldOut) -> dict[str, float]:
    """What counts for nothing, such as a class, may be worth a weight all the same: it stays in the score."""
    entering = [task for task in _weighed(run) if task in held_out.parts and task in held_out.labels]
    return dict.fromkeys(entering, 0.0) | values


def combiners_of(run: FinishedRun, kinds: list[str] | None, features: list[str] | None) -> list[str | Combiner] | None:
    """What is tried, None for the usual ones; a context-gated mean with the features that it reads.

    Raises:
        ConfigError: features, and no context-gated mean that would read them.
    """
    from mtcl_torchrec.fusing.combiners import ALL
    from mtcl_torchrec.training.held_out import gate_of

    if features and not {_GATED, ALL} & set(kinds or ()):
        raise ConfigError(f"--feature says what the weights of a {_GATED} depend on: it needs --combiner {_GATED}")
    if not kinds:
        return None
    gated = [gate_of(run, features or ())] if _GATED in kinds or ALL in kinds else []
    return [*(kind for kind in kinds if kind != _GATED), *gated]


def held_out_rows(
    run: FinishedRun, folder: Path, data: list[str] | None, split: str, session_minutes: float, *, context: bool
) -> HeldOut:
    """What a run predicts of rows that it was not trained on.

    Args:
        folder: the run directory.
        data: files to take in place of a split.
        context: whether a combiner reads the rows' features, too.

    Raises:
        ConfigError: all rows of `data` are rows that the run was trained on.
    """
    from mtcl_torchrec.data.source import read_rows
    from mtcl_torchrec.training.held_out import columns_needed, held_out_of, rows_of_split

    columns, config = columns_needed(run), load_run(folder / "run.yaml")
    rows = _unseen(config, read_rows(data, columns)) if data else rows_of_split(config, columns, split)
    return held_out_of(run, rows, session_minutes=session_minutes, context=context)


def _unseen(config: RunConfig, rows: Rows) -> Rows:
    """The rows of --data without those that the run was trained on, where that can be told."""
    from mtcl_torchrec.training.known_rows import trained_on

    seen = trained_on(config, rows)
    if seen is None or not seen.any():
        return rows
    what = f"--data: {seen.sum():,} of {len(rows):,} rows are rows that the run was trained on"
    if seen.all():
        raise ConfigError(f"{what}, and weights fitted on those are too good to be true: give rows of later")
    typer.echo(f"mtcl: {what}; they are left out, as weights fitted on them would be too good to be true", err=True)
    return rows.take(~seen)


def _weighed(run: FinishedRun) -> list[str]:
    """The tasks that run.yaml gives a weight in the score."""
    return list((run.config.fusion.weights or {}) if run.config.fusion is not None else {})
