"""Rows and items of a synthetic world as Parquet files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mtcl_torchrec.data.synthetic import World
from mtcl_torchrec.data.synthetic_labels import tag_lists
from mtcl_torchrec.schema import DataError

Table = Callable[[int, int], pa.Table]  # of the rows from one number to before another


def write_parquet(
    world: World,
    path: str | Path,
    rows: int,
    *,
    start: int = 0,
    as_of: int | None = None,
    row_group_size: int = 131_072,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write rows `start` … `start + rows - 1` of a world to one Parquet file.

    The memory needed is that of one row group, however many rows there are.  The file appears under its name once it is
    complete; a run that is broken off leaves nothing there.

    Args:
        path: of the file; its folder must exist, and a file of that name is replaced.
        as_of: the log as it was at this time, see `World.rows`.
        row_group_size: rows of a row group.
        progress: called after each row group with the number of rows written so far.

    Raises:
        DataError: `rows` or `row_group_size` is below 1, the folder does not exist, or a row comes after `as_of`.
    """
    lists = pa.array(map(list, tag_lists()), pa.list_(pa.int32()))

    def table(first: int, last: int) -> pa.Table:
        columns = world.columns(np.arange(first, last), as_of=as_of)
        arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
        arrays[world.tags] = lists.take(pa.array(columns[world.tags]))
        return pa.table(arrays)

    _write(Path(path), table, start, rows, row_group_size, progress)


def write_items(world: World, path: str | Path, *, row_group_size: int = 131_072) -> None:
    """Write all items of a world to one Parquet file, see `World.items`: what ``mtcl embed`` reads titles from.

    Args:
        path, row_group_size: as for `write_parquet`.

    Raises:
        DataError: the folder does not exist.
    """

    def table(first: int, last: int) -> pa.Table:
        frame = world.items(np.arange(first, last))
        lists = {world.tags: pa.array(map(list, frame[world.tags]), pa.list_(pa.int32()))}
        return pa.table({name: pa.array(frame[name]) for name in frame} | lists)

    _write(Path(path), table, 1, world.num_items, row_group_size, None)


def _write(
    path: Path, table: Table, start: int, rows: int, row_group_size: int, progress: Callable[[int], object] | None
) -> None:
    if rows < 1 or row_group_size < 1:
        raise DataError(f"{path}: rows and row_group_size are at least 1, not {rows:,} and {row_group_size:,}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: no such folder")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.writing")
    writer = None
    try:
        for first in range(start, start + rows, row_group_size):
            last = min(first + row_group_size, start + rows)
            part = table(first, last)
            writer = writer or pa.parquet.ParquetWriter(unfinished, part.schema)
            writer.write_table(part, row_group_size=row_group_size)
            if progress is not None:
                progress(last - start)
        assert writer is not None
        writer.close()
        unfinished.replace(path)
    except BaseException:
        if writer is not None:
            with contextlib.suppress(OSError):  # such as a disk that is full
                writer.close()
        unfinished.unlink(missing_ok=True)
        raise
