"""Which run directory holds the run that a YAML describes, and which search it is the best of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtcl_torchrec.config import RunConfig, parse_run
from mtcl_torchrec.data.files import files_fingerprint, without_paths
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import METRICS
from mtcl_torchrec.training.tuning.outcome import BEST, SUMMARY


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
            same = _plain(other, run) == _plain(run) and files_fingerprint(other) == files_fingerprint(run)
        except (ConfigError, DataError, OSError, ValueError):
            continue  # another's run, or one whose files are gone
        if same:
            found.append(folder)
    return max(found, key=lambda folder: (folder / METRICS).stat().st_mtime, default=None)


def search_of(run: RunConfig, folders: Iterable[Path]) -> tuple[Path, int] | None:
    """The search of `mtcl tune` that found a run, and how many trials it had; None where no such search stands there.

    Args:
        run: as it was trained, or is to be.
        folders: in which searches stand.
    """
    for path in [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob(f"*/{BEST}"))]:
        try:
            best = parse_run(path.read_text(encoding="utf-8"), name=str(path), folder=path.parent)
            trials = len(json.loads((path.parent / SUMMARY).read_text(encoding="utf-8"))["trials"])
        except (ConfigError, DataError, OSError, ValueError, KeyError, TypeError):
            continue  # damaged, or not over
        if _plain(run, best) == _plain(best):
            return path.parent, trials
    return None


def _plain(run: RunConfig, other: RunConfig | None = None) -> dict[str, Any]:
    """What two runs have in common that are the same.

    Args:
        other: where its precision is ``auto``, so is that of a run, whatever it was on the machine that trained it.
    """
    plain = without_paths(run.model_dump(mode="json", by_alias=True, exclude={"name", "tuning"}))
    if other is not None and other.training.precision == "auto":
        plain["training"]["precision"] = "auto"
    return plain
