"""What a run directory lacks of what a finished one has: of a run that is still being trained, or died."""

from __future__ import annotations

import time
from pathlib import Path

import yaml

from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.checkpoint.store import best_checkpoint
from mtcl_torchrec.training.directory import (
    CALIBRATION,
    CHECKPOINTS,
    MARKER,
    METRICS,
    PREDICTIONS,
    PREPROCESSING,
    readable_folder,
)


def lacking(folder: Path) -> list[str]:
    """Names of what is missing, in the order in which training writes it; empty of a finished run.

    Args:
        folder: the run directory.

    Example:
        >>> import tempfile
        >>> lacking(Path(tempfile.mkdtemp()))
        ['run.yaml', 'preprocessing/', 'checkpoints/ (no epoch is kept yet)', 'metrics.json']
    """
    config = _config(folder)
    evaluation = config.get("evaluation")
    keeps = not isinstance(evaluation, dict) or evaluation.get("save_predictions", True)
    finished = (folder / METRICS).is_file()
    there = {
        "run.yaml": (folder / "run.yaml").is_file(),
        f"{PREPROCESSING}/": readable_folder(folder / PREPROCESSING).is_dir(),
        f"{CHECKPOINTS}/ (no epoch is kept yet)": _keeps_an_epoch(folder),
        f"{CALIBRATION}/": not config.get("calibration") or readable_folder(folder / CALIBRATION).is_dir(),
        # Predictions come just before the metrics; of a finished run, that keeps none or was thinned out, none are due.
        f"{PREDICTIONS}/": finished or not keeps or not config or (folder / PREDICTIONS).is_dir(),
        METRICS: finished,
    }
    return [name for name, is_there in there.items() if not is_there]


def unfinished_line(folder: Path) -> str:
    """A line that says that training has not finished, what is missing, and when the run was last written to; empty of
    a finished run, or where there is none."""
    if (folder / METRICS).is_file() or not is_begun(folder):
        return ""
    return (
        f"training of {folder} has not finished: {', '.join(lacking(folder))} missing, last written to {_ago(folder)}; "
        f"if nothing trains it, `mtcl train RUN.yaml --out {folder} --resume` goes on with it"
    )


def is_begun(folder: Path) -> bool:
    """Whether a run stands there, or was begun."""
    return (folder / "run.yaml").is_file() or (folder / MARKER).is_file()


def _keeps_an_epoch(folder: Path) -> bool:
    try:
        return best_checkpoint(folder / CHECKPOINTS) is not None
    except DataError:  # damaged, or replaced just now
        return False


def _config(folder: Path) -> dict:
    try:
        found = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _ago(folder: Path) -> str:
    times = []
    for place in (folder, *folder.iterdir(), *(folder / CHECKPOINTS).glob("*")):
        try:
            times.append(place.stat().st_mtime)
        except OSError:  # gone meanwhile: the run goes on
            continue
    seconds = max(0.0, time.time() - max(times))
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
