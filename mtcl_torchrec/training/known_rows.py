"""Which rows a run was trained on, among rows that it is given: nothing may be fitted on those."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.columns import as_text, canonical
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.source import Rows, read_rows, read_splits
from mtcl_torchrec.schema import DataError

MOST = 20_000_000  # training rows that are looked through


def trained_on(config: RunConfig, rows: Rows) -> np.ndarray | None:
    """(N,) bool: the rows whose user, item and time are those of a training row.

    Args:
        config: of the run, with paths as seen from here, see `mtcl_torchrec.config.load_run`.
        rows: with the columns of user, item and time.

    Returns:
        None where it cannot be told: the schema does not name all three, the data are of a synthetic world, or the
        training rows are gone or too many.
    """
    schema, data = config.data_schema, config.data
    keys = [schema.user, schema.item, schema.time]
    if data.synthetic is not None or not all(key in rows.frame for key in keys):
        return None
    columns = [str(key) for key in keys]
    try:
        if data.log is not None:
            train = read_splits(data, columns, schema.time)["train"]
        elif data.train is None or (data.stream and ParquetFiles.open(data.train, columns).rows > MOST):
            return None
        else:
            train = read_rows(data.train, columns)
    except (DataError, OSError):
        return None
    return np.isin(_hashes(rows.frame, columns), _hashes(train.frame, columns))


def _hashes(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """(N,) uint64 of some columns, the same for 5, 5.0 and "5", as files of several kinds hold one key."""
    texts = pd.DataFrame({column: as_text(canonical(frame[column])) for column in columns})
    return pd.util.hash_pandas_object(texts, index=False).to_numpy()
