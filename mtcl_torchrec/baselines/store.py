"""Baselines that are not done yet, in files: their trials so far, and for which run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mtcl_torchrec.baselines.keys import named
from mtcl_torchrec.baselines.search import Found, Predictions, Trial
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.judging import predictions_path, worth_of

FOLDER = "baselines"


def judged_by(run: RunConfig, fitted: str, instead: str = "") -> str:
    """Equal where the same predictions would be judged the same: by fused score, values, thresholds and K.

    Args:
        fitted: names the fused score that was fitted after training, see
            `mtcl_torchrec.training.fitted_fusion.fusion_fingerprint`.
        instead: what stands in for the fused score, see `mtcl_torchrec.baselines.fused.stand_in`.
    """
    config = run.evaluation
    fusion = fitted or (None if run.fusion is None else run.fusion.model_dump(mode="json"))
    numbers = None if run.fusion is None else run.fusion.numbers
    # Named only where there is any: what was judged without stays as it is.
    more = [what for what in (numbers, instead) if what]
    return named([fusion, worth_of(run), config.threshold, config.k, *more])


def save_part(path: Path, key: str, found: Found) -> None:
    """Keep what a search for some tasks has come to so far, whole or not at all."""
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


def found_before(entry: Mapping[str, Any], folder: Path, search: str, title: str, tasks: Sequence[str]) -> Found | None:
    """What a search that is done came to, to be gone on with by more trials; None where it was another search, or its
    predictions are gone.

    Args:
        entry: of ``baselines.json``.
        folder: of the baseline.
        search: names the search, whatever the number of its trials.
        title: of the tasks, as the entry has it.
        tasks: their names.
    """
    if entry.get("search") != search or title not in entry["searched"]:
        return None
    trials = [
        Trial(of["settings"], math.nan if of["quality"] is None else of["quality"], of["seconds"])
        for of in entry["searched"][title]
    ]
    best, predictions = entry["settings"][title], Predictions()
    quality = next((trial.quality for trial in trials if trial.settings == best), math.nan)
    try:
        for split in entry["metrics"]:
            table = read_predictions(predictions_path(folder, split))
            predictions[split] = {task: table.predicted(task).astype(np.float32) for task in tasks}
    except (DataError, OSError):
        return None
    return Found(best, quality, predictions, trials)


def load_part(path: Path, key: str) -> Found | None:
    """What `save_part` kept under the same key, or None where there is nothing, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            if about["key"] != key:
                return None
            found = Found(about["settings"], about["quality"], {}, [Trial(**trial) for trial in about["trials"]])
            for i, (split, task) in enumerate(about["names"]):
                found.predictions.setdefault(split, {})[task] = stored[str(i)]
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile):
        return None  # damaged: it is made anew
    return found
