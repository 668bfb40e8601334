"""Which run directory holds the run that a YAML describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtcl_torchrec.config import RunConfig, parse_run
from mtcl_torchrec.data.files import files_fingerprint, without_paths
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import METRICS


def run_directory_of(run: RunConfig, runs: Path) -> Path | None:
    """The finished run of a configuration and its files, whatever it is called; the newest of several, None of none.

    Args:
        run: with paths as seen from here.
        runs: the folder of run directories.
    """
    found = []
    for path in runs.glob("*/run.yaml"):
        folder = path.parent
        if not (folder / METRICS).is_file():
            continue
        try:
            other = parse_run(path.read_text(encoding="utf-8"), name=str(path), folder=folder)
            if run.training.precision == "auto":  # whatever it was on the machine that trained it
                other.training.precision = "auto"
            same = _plain(other) == _plain(run) and files_fingerprint(other) == files_fingerprint(run)
        except (ConfigError, DataError, OSError, ValueError):
            continue  # another's run, or one whose files are gone
        if same:
            found.append(folder)
    return max(found, key=lambda folder: (folder / METRICS).stat().st_mtime, default=None)


def _plain(run: RunConfig) -> dict[str, Any]:
    return without_paths(run.model_dump(mode="json", by_alias=True, exclude={"name"}))
