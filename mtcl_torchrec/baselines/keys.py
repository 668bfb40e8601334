"""What the predictions of a baseline hang on, as a few letters: equal where they would be the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from mtcl_torchrec.baselines.entries import NETWORKS
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.files import without_paths

KEY = "key"  # in an entry: see `key_of`
CONFIGURATION = "configuration"  # in an entry: see `configuration_of`
FILES = "files"  # in an entry: the fingerprint of the run's files
TRAIN_ROWS = "train_rows"  # in an entry: the fingerprint of the training rows, as checkpoints have it
_FORMAT = 4  # part of every key: what another version found is searched for again
# Of a configuration, what no prediction of a baseline hangs on: networks are trained without it, too.
_JUDGES = {"name", "evaluation", "fusion", "calibration", "balance"}
_OF_TRAINING = ("model", "optimizers", "training", "sharding")


def key_of(run: RunConfig, files: str, *, whole: bool, **options: Any) -> str:
    """Equal for a baseline that would predict the same: by configuration, data and options.

    Args:
        files: their fingerprint.
        whole: whether all that trains a network counts; otherwise what is said of data and labels.
        options: whatever else counts.
    """
    return named([_counts(run, whole), files, options])


def configuration_of(run: RunConfig, name: str) -> str:
    """Equal for runs beside which a baseline would be the same, whatever options it was searched with.

    The precision does not count: a YAML may leave it open, which the run made of it then settles.

    Args:
        name: of the baseline.
    """
    counts = _counts(run, name in NETWORKS)
    counts.pop("tuning", None)
    counts.get("training", {}).pop("precision", None)
    return named(counts)


def of_other_runs(
    entries: Mapping[str, Mapping[str, Any]], run: RunConfig, *, files: str = "", train_rows: str = ""
) -> list[str]:
    """The baselines whose entries are not of a run as it is now, but of another configuration or other rows.

    An entry that `mtcl baselines` of an older version wrote does not say what it is of, and so is one of them; one that
    somebody else wrote is taken as it is.

    Args:
        entries: of ``baselines.json``.
        files: their fingerprint, where it is known.
        train_rows: the fingerprint of the rows that the run was trained on, where it is known.
    """
    return [name for name, entry in entries.items() if KEY in entry and _is_other(entry, name, run, files, train_rows)]


def _is_other(entry: Mapping[str, Any], name: str, run: RunConfig, files: str, train_rows: str) -> bool:
    if entry.get(CONFIGURATION) != configuration_of(run, name):
        return True
    return any(now and entry.get(key) != now for key, now in ((FILES, files), (TRAIN_ROWS, train_rows)))


def named(what: Any) -> str:
    """A few letters for what JSON can hold; equal for what is equal."""
    said = json.dumps([_FORMAT, what], sort_keys=True, default=str)
    return sha256(said.encode()).hexdigest()[:16]


def _counts(run: RunConfig, whole: bool) -> dict[str, Any]:
    counts = run.model_dump(mode="json", by_alias=True, exclude=_JUDGES)
    for part in () if whole else _OF_TRAINING:
        counts.pop(part)
    return without_paths(counts)
