"""Predictions of a split as one Parquet file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from pydantic import ValidationError

from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.schema import DataError, Task

FORMAT = 2  # in 1, `popular` was that of the first event
METADATA = b"mtcl_torchrec"  # key of what stands beside the columns
ROWS_AT_ONCE = 262_144  # of a row group
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError)


def write_predictions(path: str | Path, table: PredictionsTable) -> None:
    """Write a table, whole or not at all; a folder that is missing is made.

    Example:
        >>> import tempfile
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"label.click": [1.0], "p.click": [0.5]}, dtype="float32")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_predictions(f"{folder}/test.parquet", PredictionsTable(frame, (Task.binary("click"),)))
        ...     read_predictions(f"{folder}/test.parquet").predicted("click")
        array([0.5])
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "format": FORMAT,
        "split": table.split,
        "tasks": [task.model_dump(mode="json", exclude_defaults=True) for task in table.tasks],
        "fingerprint": table.fingerprint,
        "thresholds": dict(table.thresholds),
        "values": dict(table.values),
        "fused": list(table.fused),
    }
    schema = _arrow(table, slice(0, 0)).schema.with_metadata({METADATA: json.dumps(about).encode()})
    fresh = path.with_name(path.name + ".writing")
    try:
        with pa.parquet.ParquetWriter(fresh, schema, compression="zstd") as writer:
            for start in range(0, max(len(table), 1), ROWS_AT_ONCE):
                rows = _arrow(table, slice(start, start + ROWS_AT_ONCE))
                writer.write_table(rows.cast(schema), row_group_size=ROWS_AT_ONCE)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _arrow(table: PredictionsTable, rows: slice) -> pa.Table:
    """Some rows, with the class probabilities as lists of one length."""
    kinds = pa.Schema.from_pandas(table.frame, preserve_index=False)
    arrow = pa.Table.from_pandas(table.frame.iloc[rows], schema=kinds, preserve_index=False)
    for column, values in table.classes.items():
        flat = pa.array(np.ascontiguousarray(values[rows], dtype=np.float32).reshape(-1))
        arrow = arrow.append_column(column, pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
    return arrow.replace_schema_metadata(None)


def is_predictions(path: Path) -> bool:
    """Whether a file is one that `write_predictions` wrote."""
    try:
        return METADATA in (pa.parquet.read_schema(path).metadata or {})
    except _UNREADABLE:
        return False


def read_predictions(path: str | Path, *, columns: Sequence[str] | None = None) -> PredictionsTable:
    """Read what `write_predictions` wrote.

    Args:
        columns: only these, beside the labels.

    Raises:
        DataError: there is no such file, or it is none of predictions.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of predictions")
    try:
        with pa.parquet.ParquetFile(path) as file:
            about = _about(path, file.schema_arrow.metadata)
            names = file.schema_arrow.names
            wanted = None if columns is None else [n for n in names if n.startswith("label.") or n in columns]
            arrow = file.read(wanted)
        if about["format"] == 1 and "popular" in arrow.column_names:
            arrow = arrow.drop_columns(["popular"])  # of the first event, which the others are not held against
        lists = [f.name for f in arrow.schema if pa.types.is_fixed_size_list(f.type)]
        classes = {
            name: arrow[name].combine_chunks().flatten().to_numpy().reshape(arrow.num_rows, -1) for name in lists
        }
        frame = arrow.drop_columns(lists).to_pandas(ignore_metadata=True)
        tasks = tuple(Task(**task) for task in about["tasks"])
        thresholds, values = (
            {str(name): float(number) for name, number in about[of].items()} for of in ("thresholds", "values")
        )
        fused = tuple(about.get("fused", ()))
        return PredictionsTable(frame, tasks, about["split"], classes, thresholds, values, fused)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (*_UNREADABLE, ValidationError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: no file of predictions, or a damaged one ({why})") from None


def _about(path: Path, metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    if not metadata or METADATA not in metadata:
        raise ValueError("it says nothing of tasks")
    about = json.loads(metadata[METADATA])
    if about["format"] > FORMAT:
        raise ValueError(f"of format {about['format']}, and this version reads up to {FORMAT}")
    return about
