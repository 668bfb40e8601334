"""Rows from files: Parquet or CSV, only the columns asked for, split by time where the user has one log."""

from __future__ import annotations

import bisect
import dataclasses
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from mtcl_torchrec.config import DataConfig
from mtcl_torchrec.data.earlier import Earlier
from mtcl_torchrec.schema import DataError, nearest

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


class NoColumnError(DataError):
    """A file lacks a column.

    Args:
        path: the file.
        column: what is lacking.
        there: the columns that it has.
    """

    def __init__(self, path: Path, column: str, there: Sequence[str]) -> None:
        hint = nearest(column, there)
        if len(there) == 1 and (between := next((c for c in ";\t|" if c in there[0]), None)):
            hint = f"; it has one column only, {there[0]!r}: columns have commas between, not {between!r}"
        super().__init__(f"{path}: no column {column!r}{hint}")
        self.path, self.column, self.there = path, column, tuple(there)


@dataclass(frozen=True)
class Rows:
    """A data frame that still knows which file each row came from.

    `frame.index` counts the rows of all files from 0 and stays with a row through sorting and splitting.

    Args:
        frame: the columns.
        files: paths.
        starts: the number of each file's first row.
        earlier: column -> its lists, of histories that were built and are no column of the frame.
    """

    frame: pd.DataFrame
    files: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    earlier: Mapping[str, Earlier] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frame)

    def column(self, name: str) -> pd.Series:
        """A column of the frame; a KeyError where there is none."""
        return self.frame[name]

    def plain(self, name: str) -> np.ndarray | None:
        """(N,) a column of numbers or booleans as it lies in memory, not to be written to; None for other columns.

        A missing floating-point number is NaN; integers and booleans of which some are missing are no such column.

        Example:
            >>> rows = Rows(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
            >>> rows.plain("a"), rows.plain("b")
            (array([1, 2]), None)
        """
        values = self.column(name)
        return values.to_numpy() if isinstance(values.dtype, np.dtype) and values.dtype.kind in "iufb" else None

    def with_frame(self, frame: pd.DataFrame, earlier: Mapping[str, Earlier] | None = None) -> Rows:
        """The same rows with other columns, and other histories where they are given."""
        return Rows(frame, self.files, self.starts, self.earlier if earlier is None else earlier)

    def locate(self, position: int) -> str:
        """Where the row at `position` of the frame stands: file and row, counted from 0.

        Example:
            >>> rows = Rows(pd.DataFrame({"a": [1, 2, 3]}), files=("x.csv", "y.csv"), starts=(0, 2))
            >>> rows.locate(2)
            'y.csv, row 0'
        """
        if not self.files:
            return f"row {self.frame.index[position]}"
        row = int(self.frame.index[position])
        part = bisect.bisect_right(self.starts, row) - 1
        return f"{self.files[part]}, row {row - self.starts[part]}"

    def take(self, mask: np.ndarray) -> Rows:
        """The rows where `mask` is true."""
        return Rows(self.frame[mask], self.files, self.starts, {c: e.at(mask) for c, e in self.earlier.items()})

    def at(self, positions: np.ndarray) -> Rows:
        """The rows at `positions` of the frame, in their order.

        Example:
            >>> Rows(pd.DataFrame({"a": [5, 6, 7]})).at(np.array([2, 0])).frame["a"].tolist()
            [7, 5]
        """
        earlier = {c: e.at(positions) for c, e in self.earlier.items()}
        return Rows(self.frame.iloc[positions], self.files, self.starts, earlier)

    @property
    def name(self) -> str:
        """The files, for a message."""
        return named(self.files) or "the data frame"


def named(files: Sequence[str]) -> str:
    """Files for a message, the first three by name.

    Example:
        >>> named(["a.csv", "b.csv"]), named([f"{i}.csv" for i in range(9)])
        ('a.csv, b.csv', '0.csv, 1.csv, 2.csv and 6 more files')
    """
    more = f" and {len(files) - 3} more files" if len(files) > 4 else ""
    return ", ".join(files[:3] if more else files) + more


def find_files(paths: Sequence[str]) -> list[Path]:
    """Every Parquet or CSV file that the paths, folders and patterns name, sorted within each.

    Raises:
        DataError: a path names nothing, or a file of another kind.
    """
    files: list[Path] = []
    for path in paths:
        if Path(path).is_dir():
            kinds = (".parquet", ".csv")
            found = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in kinds and p.is_file())
        elif Path(path).is_file():
            found = [Path(path)]
        else:
            found = sorted(Path(p) for p in glob.glob(path))
        if not found:
            raise DataError(f"no Parquet or CSV file at {path}")
        for file in found:
            if file.suffix.lower() not in (".parquet", ".csv"):
                raise DataError(f"{file}: expected a file that ends in .parquet or .csv")
        files += found
    return files


def column_names(path: Path) -> list[str]:
    """The columns of a file, without reading its rows."""
    try:
        if path.suffix.lower() == ".parquet":
            return list(pa.parquet.read_schema(path).names)
        with pa.csv.open_csv(path) as reader:
            return list(reader.schema.names)
    except UNREADABLE as error:
        remedy = f"; {_as_utf8(path)}" if "utf" in str(error).lower() else ""
        raise DataError(f"{path}: cannot be read ({error}){remedy}") from None


def read_rows(paths: Sequence[str], columns: Sequence[str] | None = None) -> Rows:
    """Read the named columns of every file, in order.  Other columns are never decoded.

    Raises:
        DataError: a file is missing, broken or empty, or lacks a column (the nearest name is suggested).
    """
    tables, names, starts, total = [], [], [], 0
    wanted = None if columns is None else list(dict.fromkeys(columns))
    for path in find_files(paths):
        there = column_names(path)
        check_columns(path, there, there if wanted is None else wanted)
        try:
            table = _read_table(path, wanted)
        except UNREADABLE as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        tables.append(table)
        names.append(str(path))
        starts.append(total)
        total += table.num_rows
    if total == 0:
        raise DataError(f"{named(names) or 'no file'}: no rows")
    return Rows(to_pandas(joined(tables, names)), tuple(names), tuple(starts))


def check_columns(path: Path, there: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise DataError if a wanted column is not there, with the nearest name, or is there twice."""
    for column in wanted:
        if column not in there:
            raise NoColumnError(path, column, there)
        if there.count(column) > 1:
            raise DataError(f"{path}: {there.count(column)} columns are named {column!r}")


def _read_table(path: Path, columns: list[str] | None) -> pa.Table:
    if path.suffix.lower() == ".parquet":
        table = pa.parquet.read_table(path, columns=columns)
    else:
        options = pa.csv.ConvertOptions(
            include_columns=columns or [], strings_can_be_null=True, quoted_strings_can_be_null=False
        )
        table = pa.csv.read_csv(path, convert_options=options)
        for field in table.schema:
            if pa.types.is_binary(field.type):
                row = _first_undecodable(table[field.name])
                raise DataError(f"{path}, row {row}: column {field.name!r} is no UTF-8 text; {_as_utf8(path)}")
        table = table if columns is None else table.select(columns)
    return plain(table)


def _first_undecodable(column: pa.ChunkedArray) -> int:
    """Number of the first value that is no UTF-8 text."""
    for row, value in enumerate(column):
        try:
            (value.as_py() or b"").decode()
        except UnicodeDecodeError:
            return row
    return 0


def _as_utf8(path: Path) -> str:
    """What to do with a CSV in another encoding."""
    return f"is it in another encoding?  iconv -f cp1252 -t utf-8 {path.name} > utf8_{path.name} converts it"


def plain(table: pa.Table) -> pa.Table:
    """Values instead of dictionaries, which differ between files, and of decimals, which become Python objects."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table[i].cast(field.type.value_type))
        elif pa.types.is_decimal(field.type):
            table = table.set_column(i, field.name, table[i].cast(pa.float64()))
    return table.replace_schema_metadata(None)


def joined(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    """The rows of plain tables, one after the other, each column in one kind.

    Args:
        names: the files, for a message.

    Raises:
        DataError: columns of one name differ in kind.
    """
    try:
        return pa.concat_tables(_of_one_kind(tables), promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{named(names)}: columns differ in kind ({error})") from None


def _of_one_kind(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """A column that is text in one file and something else in another becomes text in all."""
    texts = {
        field.name: field.type
        for table in tables
        for field in table.schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    }
    uniform = []
    for table in tables:
        for i, field in enumerate(table.schema):
            if field.name in texts and field.type != texts[field.name]:
                table = table.set_column(i, field.name, table[i].cast(texts[field.name]))
        uniform.append(table)
    return uniform


def to_pandas(table: pa.Table, *, shared: bool = False) -> pd.DataFrame:
    """A frame; integers and booleans with missing values stay what they are (pandas' nullable kinds).

    Args:
        shared: columns of one chunk without missing values share the table's memory and cannot be written to.  Else
            columns of one kind lie together, which is faster where rows are picked out of many of them.
    """
    nullable = {
        pa.bool_(): pd.BooleanDtype(),
        pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(),
        pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype(),
        pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype(),
        pa.uint32(): pd.UInt32Dtype(), pa.uint64(): pd.UInt64Dtype(),
    }  # fmt: skip
    frame = table.to_pandas(ignore_metadata=True, split_blocks=shared)
    for field in table.schema:
        if field.type in nullable and table[field.name].null_count:
            frame[field.name] = table[field.name].to_pandas(types_mapper=nullable.get)
    return frame


def time_values(frame: pd.DataFrame, column: str, rows: Rows | None = None) -> np.ndarray:
    """The time column as int64 or float64; timestamps become nanoseconds.

    Args:
        frame: holds the column.
        column: its name.
        rows: what the frame belongs to, so that an error can name the file.

    Raises:
        DataError: the column holds a missing or infinite value, or no time.
    """
    times = frame[column]
    if times.isna().any():
        where = (rows or Rows(frame)).locate(int(np.argmax(times.isna().to_numpy())))
        raise DataError(f"{where}: time {column!r} is missing")
    if pd.api.types.is_numeric_dtype(times):
        found = times.to_numpy(dtype=np.int64 if pd.api.types.is_integer_dtype(times) else np.float64)
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            where = (rows or Rows(frame)).locate(int(np.argmin(np.isfinite(found))))
            raise DataError(f"{where}: time {column!r} is infinite")
        return found
    try:
        return pd.to_datetime(times, utc=True).astype("datetime64[ns, UTC]").astype("int64").to_numpy()
    except (ValueError, TypeError):
        lost = pd.to_datetime(times.astype("str"), utc=True, errors="coerce", format="ISO8601").isna().to_numpy()
        at = int(np.argmax(lost))
        raise DataError(
            f"time column {column!r} holds neither numbers nor timestamps such as 2025-03-31 21:17:14: "
            f"{(rows or Rows(frame)).locate(at)} has {str(times.iloc[at])!r}"
        ) from None


def split_by_time(rows: Rows, time: str, val_fraction: float, test_fraction: float) -> dict[str, Rows]:
    """Earliest rows train, the next validate, the latest test; rows of one moment stay together.

    Example:
        >>> rows = Rows(pd.DataFrame({"t": range(10)}))
        >>> {k: len(v) for k, v in split_by_time(rows, "t", 0.2, 0.2).items()}
        {'train': 6, 'val': 2, 'test': 2}
    """
    times = time_values(rows.frame, time, rows)
    ordered = np.sort(times)
    n = len(ordered)
    val_from = ordered[min(n - 1, round(n * (1 - val_fraction - test_fraction)))]
    test_from = ordered[min(n - 1, round(n * (1 - test_fraction)))]
    if test_fraction == 0:
        parts = {"train": times < val_from, "val": times >= val_from}
    else:
        parts = {
            "train": times < val_from,
            "val": (times >= val_from) & (times < test_from),
            "test": times >= test_from,
        }
    for name, mask in parts.items():
        if not mask.any():
            raise DataError(f"splitting {rows.name} by {time!r} leaves no row for {name}: too few distinct times")
    return {name: rows.take(mask) for name, mask in parts.items()}


def read_splits(data: DataConfig, columns: Sequence[str], time: str | None) -> dict[str, Rows]:
    """The rows of each split that `data` names: train, val, and test where there is one."""
    if data.log is not None:
        assert time is not None
        return split_by_time(read_rows(data.log, columns), time, data.val_fraction, data.test_fraction)
    named = {"train": data.train, "val": data.val, "test": data.test}
    return {split: read_rows(paths, columns) for split, paths in named.items() if paths is not None}
