"""After the score of a run has changed: its predictions, figures and baselines, judged by the one that it has now."""

from __future__ import annotations

import warnings
from pathlib import Path

from rich.console import Console
from rich.status import Status

from mtcl_torchrec.baselines.entries import FILE as BASELINES
from mtcl_torchrec.config import load_run
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import METRICS, PREDICTIONS, RunWarning


def judge_anew(folder: Path, console: Console) -> None:
    """Bring predictions and metrics.json up to the score that the run has now, or say why they are not."""
    from mtcl_torchrec.training.rejudging import rejudge as rejudge_run

    with (
        Status("judging the run by the score that it has now", console=Console(stderr=True)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RunWarning)
        try:
            splits = rejudge_run(folder)
        except (ConfigError, DataError, OSError) as error:
            said = f"{METRICS} and {PREDICTIONS}/ still hold the score before: {error}"
        else:
            said = f"judged by it: {METRICS} and {PREDICTIONS}/ of {' and '.join(splits)}" if splits else ""
    lines = [said] if said else []
    lines += _rank_baselines_anew(folder)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _rank_baselines_anew(folder: Path) -> list[str]:
    """Baselines rank as the run does; of one that is not in memory, `mtcl baselines` sees to that."""
    if not (folder / BASELINES).is_file():
        return []
    from mtcl_torchrec.baselines.run import rank_anew

    run, lines = load_run(folder / "run.yaml"), list[str]()
    if run.data.stream or run.data.synthetic is not None:
        return [f"{folder / BASELINES} ranks by the score before, until `mtcl baselines {folder}` is called"]
    try:
        with Status("ranking the baselines by it, too", console=Console(stderr=True)):
            rank_anew(run, folder, say=lines.append)
    except (ConfigError, DataError, OSError) as error:
        lines.append(f"{folder / BASELINES} still ranks by the score before: {error}")
    return lines
