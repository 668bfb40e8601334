"""Which rows a run was trained on, among rows that it is given: nothing may be fitted on those."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.columns import as_text, canonical
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.source import Rows, read_rows, read_splits
from mtcl_torchrec.schema import DataError

MOST = 20_000_000  # training rows of a stream that are looked through
MOST_AT_START = 5_000_000  # the same before training, of which this is a small part
MOST_OF_A_STREAM = 500_000  # the same of a stream, which is read because its rows shall not all be in memory
_ODD = np.uint64(0x9E3779B97F4A7C15)
MANY, MANY_BY_CHANCE = 0.01, 0.1  # share of rows: that user, item and time tell apart, or all columns together


def trained_on(config: RunConfig, rows: Rows, *, most: int = MOST) -> np.ndarray | None:
    """(N,) bool: the rows whose user, item and time are those of a training row.

    Args:
        config: of the run, with paths as seen from here, see `mtcl_torchrec.config.load_run`.
        rows: with the columns of user, item and time.
        most: training rows of a stream that are looked through.

    Returns:
        None where it cannot be told: the schema does not name all three, the data are of a synthetic world, or the
        training rows are gone or too many.
    """
    schema = config.data_schema
    keys = [schema.user, schema.item, schema.time]
    if config.data.synthetic is not None or not all(key in rows.frame for key in keys):
        return None
    columns = [str(key) for key in keys]
    train = _training_rows(config, columns, most)
    if train is None:
        return None
    return np.isin(*_hashes(rows.frame, train.frame, columns))


def known_line(config: RunConfig, split: str, rows: Rows) -> str:
    """A line where many rows of a split given as files of its own are training rows, too; empty where they are not.

    Where the schema does not name user, item and time, rows are the same if all columns that the run reads are; as many
    as come twice within the training rows are chance.

    Args:
        config: see `trained_on`.
        rows: of the split, as they were read.
    """
    if config.data.train is None:
        return ""
    most = MOST_OF_A_STREAM if config.data.stream else MOST_AT_START
    seen, by_chance, many = trained_on(config, rows, most=most), 0.0, MANY
    if seen is None:
        columns = [column for column in _plain_columns(config) if column in rows.frame]
        train = _training_rows(config, columns, most)
        if train is None:
            return ""
        mine, known = _hashes(rows.frame, train.frame, columns)
        seen, many = np.isin(mine, known), MANY_BY_CHANCE
        by_chance = float(pd.Series(known).duplicated(keep=False).mean())
    if seen.mean() - by_chance < many:
        return ""
    return f"data.{split}: {said_of_known(seen)}"


def said_of_known(seen: np.ndarray) -> str:
    """That a run was trained on some of the rows that it is judged by.

    Example:
        >>> said_of_known(np.array([True, False]))
        '1 of 2 rows are rows that the run was trained on; what follows is too good to be true'
    """
    trained = f"{seen.sum():,} of {len(seen):,} rows are rows that the run was trained on"
    return f"{trained}; what follows is too good to be true"


def _training_rows(config: RunConfig, columns: list[str], most: int) -> Rows | None:
    """Some columns of the training rows; None where they are gone, or too many to be looked through."""
    data = config.data
    try:
        if data.log is not None:
            return read_splits(data, columns, config.data_schema.time)["train"]
        if data.train is None or (data.stream and ParquetFiles.open(data.train, columns).rows > most):
            return None
        return read_rows(data.train, columns)
    except (DataError, OSError):
        return None


def _plain_columns(config: RunConfig) -> list[str]:
    """What a run reads of a row, without lists and what it builds itself."""
    schema = config.data_schema
    built = {block.column for block in config.next_labels}
    features = [f.rows_from for f in schema.features if f.kind not in ("bag", "history")]
    roles = [column for column in (schema.user, schema.item, schema.time) if column is not None]
    return [c for c in dict.fromkeys([*roles, *features, *schema.label_columns()]) if c not in built]


def _hashes(one: pd.DataFrame, other: pd.DataFrame, columns: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (M,) uint64 of some columns of two tables: equal where all values are, 5, 5.0 and "5" being the same, as
    files of several kinds hold one key."""
    found = np.zeros(len(one), np.uint64), np.zeros(len(other), np.uint64)
    for column in columns:
        for hashes, values in zip(found, _comparable(one[column], other[column]), strict=True):
            hashes *= _ODD  # the order of columns counts
            hashes ^= pd.util.hash_pandas_object(values, index=False).to_numpy()
    return found


def _comparable(one: pd.Series, other: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Two columns as numbers where both are, which takes a tenth of the time, else as text."""
    kinds = {column.dtype.kind if isinstance(column.dtype, np.dtype) else "O" for column in (one, other)}
    if kinds <= set("iub"):
        return one.astype(np.int64), other.astype(np.int64)
    if kinds <= set("iubf"):
        return one.astype(np.float64) + 0.0, other.astype(np.float64) + 0.0  # -0.0 becomes 0.0
    return as_text(canonical(one)), as_text(canonical(other))
