"""Parquet files of any size, read a few row groups at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from mtcl_torchrec.data.position import shuffled
from mtcl_torchrec.data.source import UNREADABLE, Rows, check_columns, find_files, joined, named, plain, to_pandas
from mtcl_torchrec.schema import DataError

WINDOW_ROWS = 262_144


@dataclass(frozen=True)
class RowGroup:
    """The smallest part of a Parquet file that can be read.

    Args:
        file: number of the file.
        number: of the row group in it.
        rows: in the group.
        start: number of its first row among the rows of all files.
    """

    file: int
    number: int
    rows: int
    start: int


@dataclass(frozen=True)
class ParquetWindow:
    """Row groups that are in memory together."""

    groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return sum(group.rows for group in self.groups)


class TableRows(Rows):
    """Rows of an Arrow table, of which a data frame is made only where one is asked for: that takes as long as decoding
    a few columns.

    Args:
        table: the columns, none of a dictionary.
        groups: where they come from, in order.
        files, starts: see `Rows`.

    Example:
        >>> table = pa.table({"a": [5, 6], "b": ["x", None]})
        >>> rows = TableRows(table, [RowGroup(file=0, number=1, rows=2, start=10)], ("x.parquet",), (0,))
        >>> rows.plain("a"), rows.plain("b"), rows.locate(1)
        (array([5, 6]), None, 'x.parquet, row 11')
    """

    _table: pa.Table
    _groups: tuple[RowGroup, ...]

    def __init__(self, table: pa.Table, groups: Sequence[RowGroup], files: tuple[str, ...], starts: tuple[int, ...]):
        self.__dict__.update(files=files, starts=starts, earlier={}, _table=table, _groups=tuple(groups))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All columns."""
        return to_pandas(self._table, shared=True).set_axis(self._index)

    @cached_property
    def _index(self) -> pd.Index:
        ends = [(group.start, group.start + group.rows) for group in self._groups] or [(0, 0)]
        if ends[-1][1] - ends[0][0] == len(self):
            return pd.RangeIndex(ends[0][0], ends[-1][1])
        return pd.Index(np.concatenate([np.arange(start, stop) for start, stop in ends]))

    def column(self, name: str) -> pd.Series:
        """A column as `frame` has it; a KeyError where there is none."""
        if "frame" in self.__dict__:
            return self.frame[name]
        plain = self.plain(name)
        if plain is not None:
            return pd.Series(plain, index=self._index, name=name, copy=False)
        return to_pandas(self._table.select([name]), shared=True).set_axis(self._index)[name]

    def plain(self, name: str) -> np.ndarray | None:
        """(N,) numbers or booleans as they lie in memory; see `Rows.plain`."""
        values = self._table[name]
        if pa.types.is_floating(values.type):
            return _as_numpy(values)
        whole = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
        return _as_numpy(values) if whole and not values.null_count else None


def _as_numpy(values: pa.ChunkedArray) -> np.ndarray:
    """The memory of a single chunk where nothing is missing; NaN where a floating-point number is."""
    if values.null_count and not pa.types.is_float16(values.type):
        values = values.fill_null(float("nan"))  # a third of the time that `to_numpy` takes for it
    return values.chunk(0).to_numpy(zero_copy_only=False) if values.num_chunks == 1 else values.to_numpy()


@dataclass(frozen=True)
class ParquetFiles:
    """The rows of Parquet files, of which only the footers have been read; see `open`.

    Args:
        files: paths.
        sizes: bytes of each, to notice a file that changes meanwhile.
        footers: digest of each file's footer, which holds the sizes and, mostly, least and largest values of its parts.
        groups: the row groups of each file, empty ones too.
        schema: of the wanted columns; a column has the same kind in the rows of all files.
        window_rows: row groups are put together until they have this many rows.
    """

    files: tuple[str, ...]
    sizes: tuple[int, ...]
    footers: tuple[str, ...]
    groups: tuple[tuple[RowGroup, ...], ...]
    schema: pa.Schema
    window_rows: int = WINDOW_ROWS

    @classmethod
    def open(
        cls, paths: Sequence[str], columns: Sequence[str] | None = None, *, window_rows: int = WINDOW_ROWS
    ) -> ParquetFiles:
        """Read the footers of files, folders of them, and patterns.

        Args:
            columns: the only ones that are ever decoded; the default is all.
            window_rows: rows that are in memory and shuffled together.  A row group that has more is read whole: files
                that are to be streamed need row groups of a moderate size.

        Raises:
            DataError: a file is missing, broken or no Parquet, or lacks a column (the nearest name is suggested), a
                column differs in kind between files, or there are no rows.
        """
        files = find_files(paths)
        sizes, footers, groups, schemas, start = [], [], [], dict[pa.Schema, str](), 0
        for number, path in enumerate(files):
            if path.suffix.lower() != ".parquet":
                raise DataError(f"{path}: only Parquet files can be streamed")
            sizes.append(path.stat().st_size)
            counts, schema, digest = _footer(path, columns)
            footers.append(digest)
            starts = list(accumulate(counts, initial=start))
            groups.append(tuple(RowGroup(number, i, n, starts[i]) for i, n in enumerate(counts)))
            start = starts[-1]
            schemas.setdefault(schema, str(path))
        names = tuple(map(str, files))
        if start == 0:
            raise DataError(f"{named(names)}: no rows")
        schema = joined([plain(schema.empty_table()) for schema in schemas], list(schemas.values())).schema
        return cls(names, tuple(sizes), tuple(footers), tuple(groups), schema, window_rows)

    @property
    def name(self) -> str:
        """The files, for a message."""
        return named(self.files)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(group.rows for groups in self.groups for group in groups)

    @property
    def fingerprint(self) -> str:
        """Equal for the same files in the same order, wherever they stand, and the same windows."""
        digest = sha256(repr((self.sizes, self.footers, self.window_rows)).encode()).hexdigest()
        return f"parquet, {self.rows} rows in {digest[:16]}"

    def only(self, columns: Sequence[str]) -> ParquetFiles:
        """The same files; of the columns, only these are decoded.

        Raises:
            DataError: there is no such column.
        """
        check_columns(Path(self.name), self.schema.names, columns)
        return replace(self, schema=pa.schema([self.schema.field(c) for c in dict.fromkeys(columns)]))

    def windows(self, seed: Sequence[int] | None = None) -> list[ParquetWindow]:
        """All row groups, put together to windows of at least `window_rows` rows; the last may have fewer.

        Args:
            seed: numbers that shuffle the row groups of all files; None keeps their order.
        """
        groups = [group for of_file in self.groups for group in of_file if group.rows]
        if seed is not None:
            groups = [groups[i] for i in shuffled(len(groups), seed).tolist()]
        windows, window, rows = [], list[RowGroup](), 0
        for group in groups:
            window.append(group)
            rows += group.rows
            if rows >= self.window_rows:
                windows.append(ParquetWindow(tuple(window)))
                window, rows = [], 0
        return [*windows, ParquetWindow(tuple(window))] if window else windows

    def read(self, window: ParquetWindow) -> Rows:
        """The rows of a window: file by file, in the order of each file.

        Raises:
            DataError: a file cannot be read, or is not the one whose footer was read.
        """
        groups = sorted(window.groups, key=lambda group: group.start)
        tables = [
            self._read_groups(Path(self.files[file]), self.sizes[file], list(of_file))
            for file, of_file in groupby(groups, key=lambda group: group.file)
        ]
        if len(tables) > 1 or tables[0].schema != self.schema:
            tables = [joined([self.schema.empty_table(), *tables], self.files)]
        return TableRows(tables[0], groups, self.files, self._starts)

    def empty(self) -> Rows:
        """No rows, with all columns."""
        return TableRows(self.schema.empty_table(), (), self.files, self._starts)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate((sum(g.rows for g in of_file) for of_file in self.groups[:-1]), initial=0))

    def _read_groups(self, path: Path, size: int, groups: Sequence[RowGroup]) -> pa.Table:
        try:
            # Threads are for windows (`stream.in_order`), not for the columns of one: as many as were asked for.
            metadata, counts = _metadata(path, _version(path))
            with pa.parquet.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as opened:
                if path.stat().st_size != size or counts != tuple(g.rows for g in self.groups[groups[0].file]):
                    raise DataError(f"{path}: the file has changed since training began to read it")
                return plain(opened.read_row_groups([g.number for g in groups], self.schema.names, use_threads=False))
        except UNREADABLE as error:
            raise DataError(f"{path}: cannot be read ({error})") from None


def _version(path: Path) -> tuple[int, ...]:
    """Other numbers once a file is written anew, or over."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@lru_cache(maxsize=16)
def _metadata(path: Path, version: tuple[int, ...]) -> tuple[pa.parquet.FileMetaData, tuple[int, ...]]:
    """What a file's footer says, and the rows of each row group; parsing it takes a tenth of reading a narrow window.

    Args:
        version: see `_version`; a file with another one is read again.
    """
    with pa.parquet.ParquetFile(path) as opened:
        metadata = opened.metadata
        return metadata, tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def _footer(path: Path, columns: Sequence[str] | None) -> tuple[list[int], pa.Schema, str]:
    """Rows of each row group, the schema of the wanted columns, and a digest of the footer."""
    try:
        with pa.parquet.ParquetFile(path) as opened:
            schema, metadata = opened.schema_arrow.remove_metadata(), opened.metadata
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        with path.open("rb") as raw:  # a file ends in its footer, the footer's length in 4 bytes, and 4 letters
            raw.seek(-8 - metadata.serialized_size, os.SEEK_END)
            digest = sha256(raw.read()).hexdigest()
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    wanted = schema.names if columns is None else list(dict.fromkeys(columns))
    check_columns(path, schema.names, wanted)
    return counts, pa.schema([schema.field(name) for name in wanted]), digest
