"""What baselines came to, in files: an entry of baselines.json each, and tasks that are done of one that is not."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mtcl_torchrec.baselines.search import Found, Trial
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.source import find_files
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.directory import replace_file

FILE = "baselines.json"
FOLDER = "baselines"
_FORMAT = 1  # part of every key: what another version found is searched for again
_EDGE = 65_536  # bytes of each end of a file; the footer of Parquet, at its end, has the extremes of all columns


def files_fingerprint(run: RunConfig) -> str:
    """Equal for the same files of data, vectors and codes, wherever they stand: their sizes, and both ends of each.

    Raises:
        DataError: a file is missing.
    """
    digest = sha256()
    named = [getattr(run.data, split) or [] for split in ("train", "val", "test", "log")]
    paths = [path for paths in named for path in find_files(paths)]
    for feature in run.data_schema.features:
        paths += [Path(path) for path in (feature.vectors, feature.codes) if path is not None]
    for path in paths:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(repr((path.name, size)).encode() + file.read(_EDGE))
                file.seek(max(0, size - _EDGE))
                digest.update(file.read())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
    return digest.hexdigest()[:16]


def key_of(run: RunConfig, files: str, *, whole: bool, **options: Any) -> str:
    """Equal for a baseline that would come to the same: by configuration, data and options.

    Args:
        files: their fingerprint.
        whole: whether all of the configuration counts; otherwise what it says of data, labels and the fused score.
        options: whatever else counts.
    """
    counts = run.model_dump(mode="json", by_alias=True, exclude={"name", "evaluation"})
    for part in [] if whole else ["model", "optimizers", "training", "balance", "sharding", "calibration"]:
        counts.pop(part)
    for split in ("train", "val", "test", "log"):
        counts["data"].pop(split)  # paths, whose files count
    for feature in counts["schema"]["features"]:
        feature["vectors"] = feature["codes"] = None
    for block in (*counts["statistics"], *counts["histories"]):
        block["prepared"] = block["prepared"] is not None
    said = json.dumps([_FORMAT, counts, files, options], sort_keys=True, default=str)
    return sha256(said.encode()).hexdigest()[:16]


def read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Baseline -> its entry: key, about, settings, trials, seconds, metrics, searched, notes and rows.

    Raises:
        DataError: the file does not hold that.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("no entries by baseline")
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it to begin anew") from None
    return entries


def write_entry(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Add or replace the entry of one baseline."""
    entries = read_entries(folder) | {name: entry}
    replace_file(folder / FILE, json.dumps(entries, indent=1))


def save_part(path: Path, key: str, found: Found) -> None:
    """Keep what a search for some tasks came to, whole or not at all."""
    arrays, names = dict[str, np.ndarray](), list[tuple[str, str]]()
    for split, of_split in found.predictions.items():
        for task, predicted in of_split.items():
            arrays[str(len(names))] = predicted.astype(np.float32)
            names.append((split, task))
    about = {
        "key": key, "names": names, "settings": found.settings, "quality": found.quality,
        "trials": [asdict(trial) for trial in found.trials],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".writing")
    with fresh.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    fresh.replace(path)


def load_part(path: Path, key: str) -> Found | None:
    """What `save_part` kept under the same key, or None."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        about = json.loads(str(stored["about"]))
        if about["key"] != key:
            return None
        found = Found(about["settings"], about["quality"], {}, [Trial(**trial) for trial in about["trials"]])
        for i, (split, task) in enumerate(about["names"]):
            found.predictions.setdefault(split, {})[task] = stored[str(i)]
    return found
