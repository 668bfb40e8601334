"""Which baselines there are, and what those that are done came to: an entry of baselines.json each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.directory import replace_file

FILE = "baselines.json"
INSTEAD = "ranked_by_instead"  # in an entry: what stood in for the run's fused score, in words; empty where nothing
TUNED = "tuned"  # in an entry: how its settings were found, in words
_NOTHING = "it has nothing to tune"
_ENTRY = ("trials", "seconds", "metrics")  # what each has at least
# Name -> what it is; in the order of what they know.
ABOUT = {
    "popularity": "what an item usually gets",
    "item_knn": "items like those that a user had the event with; implicit",
    "als": "matrix factorisation by least squares; implicit",
    "bpr": "matrix factorisation from pairs; implicit",
    "logistic_regression": "linear in one-hot features, ridge for a number; scikit-learn",
    "trees": "gradient-boosted, on target-encoded features; scikit-learn",
    "single_task": "the run's network once for each task",
    "unweighted": "the run's network, its tasks weighing the same",
}

NETWORKS = ("single_task", "unweighted")  # those whose trials are trainings


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
        for name, entry in entries.items():
            if lacking := [key for key in _ENTRY if key not in entry]:
                raise ValueError(f"{name} has no {lacking[0]}")
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it to begin anew") from None
    return entries


def said_of_score(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What stood in for the run's fused score when baselines were ranked, each once.

    Example:
        >>> said_of_score({"als": {INSTEAD: "the mean"}, "bpr": {INSTEAD: "the mean"}, "trees": {INSTEAD: ""}})
        ['the mean']
    """
    return list(dict.fromkeys(said for entry in entries.values() if (said := entry.get(INSTEAD))))


def how_tuned(trials: int, network: bool, each: bool, of_run: int = 0, *, more: bool = True) -> str:
    """How the settings of a baseline were found, in words.

    Args:
        trials: the most that were tried for a task.
        network: whether the first setting is the run's own.
        each: whether each task has its own trials.
        of_run: trials of the search that the run is the best of; 0 of none that is known.
        more: whether there are other settings than the usual one.

    Example:
        >>> how_tuned(8, network=False, each=True), how_tuned(1, network=True, each=True)
        ('the best of 8 trials for each task', "not tuned: the run's own settings")
    """
    if not more:
        return _NOTHING
    if trials > 1:
        return f"the best of {trials} trials" + " for each task" * each
    own = "not tuned: the run's own settings" if network else "not tuned: its usual settings"
    return own + f", which are the best of {of_run} trials for the run" * (network and of_run > 1)


def is_tuned(entry: Mapping[str, Any]) -> bool:
    """Whether more than one setting was tried for some task, or there is but one.

    Example:
        >>> is_tuned({"searched": {"click": [{}], "buy": [{}, {}]}}), is_tuned({"searched": {"all tasks": [{}]}})
        (True, False)
    """
    searched = entry.get("searched") or {}
    if entry.get(TUNED) == _NOTHING:
        return True
    if not searched:
        return (entry.get("budget") or {}).get("trials") != 1
    return any(len(trials) > 1 for trials in searched.values())


def write_entry(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Add or replace the entry of one baseline."""
    entries = read_entries(folder) | {name: entry}
    replace_file(folder / FILE, json.dumps(entries, indent=1))
