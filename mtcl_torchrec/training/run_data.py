"""What a run is trained on and judged by: its splits, and what was learnt to encode them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.contents import said_of_coverage
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.splits import Splits, load_splits
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.directory import PREPROCESSING, readable_folder
from mtcl_torchrec.training.known_rows import known_line
from mtcl_torchrec.training.sharding import Ranks

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunData:
    """What a run is trained on and judged by, and what made it of the files; see `load_data`."""

    preprocessor: Preprocessor
    splits: Splits
    doubts: tuple[str, ...] = ()  # lines about splits that hold training rows


def load_data(run: RunConfig, where: Ranks, *, grown_from: FeatureEncoder | None = None, say: Say) -> RunData:
    """Read a run's splits and fit its preprocessing; every rank calls it.

    Args:
        grown_from: an earlier run's encoder, whose rows and scales stay as they are.
        say: called with lines for the user.

    Raises:
        DataError: the data does not fit the schema, or is not the same on every rank.
    """
    preprocessor = Preprocessor(run.data_schema, run.statistics, run.histories, run.next_labels)
    splits = load_splits(run, preprocessor, grown_from=grown_from, say=say)
    for line in said_of_coverage(preprocessor.encoder.covered(splits.encoded["val"]), "val", splits.raw["val"]):
        say(line)
    if len(set(where.gather(splits.train.fingerprint))) > 1:
        raise DataError("the ranks do not see the same training files")
    found = [known_line(run, name, rows) for name, rows in splits.raw.items()] if where.first else []
    doubts: list[str] = where.broadcast([line for line in found if line])  # type: ignore[assignment]
    for line in doubts:
        say(f"WARNING: {line}")
    return RunData(preprocessor, splits, tuple(doubts))


def earlier_encoder(folder: Path) -> FeatureEncoder:
    """What the run in the folder has learnt: a known id keeps its row, whatever data comes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return FeatureEncoder.load(readable_folder(folder / PREPROCESSING) / "encoder")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: the run directory is damaged ({error})") from None
