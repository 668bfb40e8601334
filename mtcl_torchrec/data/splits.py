"""The splits of a run: rows to train on, in memory or as a stream, and encoded rows to be judged by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, read_splits
from mtcl_torchrec.data.training_rows import MemoryRows, TrainingRows

QUIET_SECONDS = 20.0  # counting that takes longer says which keys are done

Say = Callable[[str], None]


@dataclass(frozen=True)
class Splits:
    """What a run trains on and is judged by.

    Args:
        train: the training split.
        raw: split (val, test) -> its rows as they were read.
        encoded: the same splits, encoded.
        catalogue: what the log says of users and items, or None.
    """

    train: TrainingRows
    raw: dict[str, Rows]
    encoded: dict[str, EncodedRows]
    catalogue: Catalogue | None = None


def load_splits(
    run: RunConfig, preprocessor: Preprocessor, *, grown_from: FeatureEncoder | None = None, say: Say
) -> Splits:
    """Read a run's splits and fit its preprocessing; every rank of a process group calls this.

    Args:
        run: its paths are taken as they are.
        preprocessor: is fitted on the training split.
        grown_from: an earlier run's encoder, whose rows and scales stay as they are.
        say: called with lines for the user.

    Raises:
        DataError: the data does not fit the schema.
    """
    return _in_memory(run, preprocessor, grown_from, say)


def _in_memory(run: RunConfig, preprocessor: Preprocessor, grown_from: FeatureEncoder | None, say: Say) -> Splits:
    raw = read_splits(run.data, preprocessor.columns(), run.data_schema.time)
    say("read " + ", ".join(f"{len(rows):,} rows of {name}" for name, rows in raw.items()))
    keys = sum(len(block.keys) for block in run.statistics if block.prepared is None)
    if keys:
        say(f"counting what came before each row, by {keys} key{'s' if keys > 1 else ''}")
    started = time.monotonic()

    def progress(key: str) -> None:
        if time.monotonic() - started > QUIET_SECONDS:
            say(f"  {key}")

    train = preprocessor.fit(raw["train"], progress, grown_from=grown_from)
    later = {name: preprocessor.conform(rows) for name, rows in raw.items() if name != "train"}
    catalogue = None
    if run.data_schema.user is not None and run.data_schema.item is not None:
        catalogue = Catalogue.build(run.data_schema, preprocessor.groups, raw["train"].frame, later["val"].frame)
    return Splits(
        train=MemoryRows(train, seed=run.training.seed),
        raw=later,
        encoded={name: preprocessor.encode(rows) for name, rows in later.items()},
        catalogue=catalogue,
    )
