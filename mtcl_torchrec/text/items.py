"""Items' texts from files: the named columns of each row as one text, read a part at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from mtcl_torchrec.config.commands import MAX_CHARS
from mtcl_torchrec.data.columns import as_text
from mtcl_torchrec.data.source import UNREADABLE, Rows, check_columns, find_files
from mtcl_torchrec.data.vectors import checked_keys
from mtcl_torchrec.schema import ConfigError, DataError, nearest

MAX_FIT = 200_000
BLOCK_BYTES = 64 * 2**20  # of a CSV that are in memory at once; a row has to fit in


@dataclass(frozen=True)
class TextPart:
    """Some rows.

    Args:
        start: number of the first row among those of all files.
        texts: of each row; empty where it has none.
        cut: (n,) bool, where more text was there than is taken.
    """

    start: int
    texts: list[str]
    cut: np.ndarray


@dataclass(frozen=True)
class ItemTexts:
    """The texts of items in files; only their keys are in memory.

    A row's text is ``prefix + "COLUMN. COLUMN"`` of the columns that are not missing: white space as single spaces, the
    values of a list with commas between, numbers as text; at most `max_chars` characters, the rest is not looked at.

    Args:
        files: Parquet or CSV.
        columns: that make up the text.
        keys: (V,) of each row, integers or text, each once.
        key: name of their column.
        encoding: of CSV files.
        prefix: what some models want before each text, such as ``"passage: "``.
        max_chars: of a text.
        starts: number of each file's first row.
        numeric: those of `columns` that hold numbers in every file.
    """

    files: tuple[Path, ...]
    columns: tuple[str, ...]
    keys: pd.Series
    key: str
    encoding: str = "utf-8"
    prefix: str = ""
    max_chars: int = MAX_CHARS
    starts: tuple[int, ...] = (0,)
    numeric: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        paths: Sequence[str],
        columns: Sequence[str],
        key: str,
        *,
        encoding: str = "utf-8",
        prefix: str = "",
        max_chars: int = MAX_CHARS,
    ) -> ItemTexts:
        """Find the files, read and check the keys.

        Raises:
            ConfigError: no column, or an unknown encoding.
            DataError: a file is missing, broken or in another encoding, lacks a column, or there are no rows; a key is
                missing or there twice.
        """
        if not columns:
            raise ConfigError("name at least one column of text")
        if max_chars < 1:
            raise ConfigError(f"max_chars is at least 1, not {max_chars}")
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ConfigError(f"no encoding {encoding!r}; such as utf-8, latin-1, cp1252, utf-16, gb18030") from None
        columns = tuple(dict.fromkeys(columns))
        files = tuple(find_files(paths))
        found = [_keys(path, key, columns, encoding) for path in files]
        counts = [len(keys) for keys in found]
        starts = tuple(int(n) for n in np.cumsum([0, *counts[:-1]]))
        if not sum(counts):
            raise DataError(f"{', '.join(map(str, files))}: no rows")
        rows = Rows(pd.DataFrame(index=range(sum(counts))), tuple(map(str, files)), starts)
        keys = checked_keys(pd.concat(_of_one_kind(found), ignore_index=True), key, rows.locate)
        numbers = set.intersection(*(_numeric(path, encoding) for path in files))
        numeric = tuple(column for column in columns if column in numbers)
        return cls(files, columns, keys, key, encoding, prefix, max_chars, starts, numeric)

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, row: int) -> str:
        """File, row and key of a row, for a message."""
        rows = Rows(pd.DataFrame(index=range(len(self))), tuple(map(str, self.files)), self.starts)
        return f"{rows.locate(row)} ({self.key} = {as_text(self.keys.iloc[row : row + 1]).iloc[0]!r})"

    def parts(self, rows: int = 1024) -> Iterator[TextPart]:
        """The texts of all rows in their order, at most so many rows at a time.

        Raises:
            DataError: a column holds no text, or a file is broken or in another encoding.
        """
        start = 0
        for path in self.files:
            try:
                for batch in _batches(path, self.columns, self.encoding, rows):
                    for at in range(0, batch.num_rows, rows):
                        texts, cut = self._composed(batch.slice(at, rows), path, start)
                        yield TextPart(start, texts, cut)
                        start += len(texts)
            except UNREADABLE as error:
                raise _unreadable(path, self.encoding, error) from None

    def sample(self, most: int = MAX_FIT) -> Iterator[str]:
        """Texts that are not empty, evenly over all rows, about `most` of them if there are more."""
        step = max(1, -(-len(self) // most))
        for part in self.parts():
            first = -part.start % step
            yield from (text for text in part.texts[first::step] if text)

    def _composed(self, batch: pa.RecordBatch, path: Path, start: int) -> tuple[list[str], np.ndarray]:
        cut = np.zeros(batch.num_rows, bool)
        pieces: list[list[str]] = [[] for _ in range(batch.num_rows)]
        for column in self.columns:
            for row, cell in enumerate(_cells(batch.column(column), path, column, start - self._start_of(path))):
                text = cell if isinstance(cell, str) else _as_text(cell)
                cut[row] |= len(text) > self.max_chars
                if piece := " ".join(text[: self.max_chars].split()):
                    pieces[row].append(piece)
        texts = [". ".join(of_row) for of_row in pieces]
        cut |= np.fromiter((len(text) > self.max_chars for text in texts), bool, len(texts))
        return [self.prefix + text[: self.max_chars] if text else "" for text in texts], cut

    def _start_of(self, path: Path) -> int:
        return self.starts[self.files.index(path)]


def _as_text(cell: Any) -> str:
    """A value as text; empty where it is missing."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (list, tuple)):
        return ", ".join(text for text in map(_as_text, cell) if text)
    if isinstance(cell, float):
        return "" if cell != cell else str(int(cell)) if cell.is_integer() else str(cell)
    return str(cell)


def _cells(column: pa.Array, path: Path, name: str, start: int) -> list[Any]:
    """The values of some rows of a column."""
    inner = column.type
    while pa.types.is_list(inner) or pa.types.is_large_list(inner) or pa.types.is_fixed_size_list(inner):
        inner = inner.value_type
    if pa.types.is_binary(inner) or pa.types.is_large_binary(inner) or pa.types.is_nested(inner):
        raise DataError(f"{path}: column {name!r} holds {column.type}, no text")
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(column)):
            try:
                column[row].as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {start + row}: {name} is no UTF-8 text ({error.reason})") from None
        raise


# ---------------------------------------------------------------------- files


def _keys(path: Path, key: str, columns: Sequence[str], encoding: str) -> pd.Series:
    """(n,) of one file, in whatever kind they are there."""
    try:
        if path.suffix.lower() == ".parquet":
            file = pa.parquet.ParquetFile(path)
            _check_names(path, file.schema_arrow.names, key, columns)
            column = file.read([key])[key]
        else:
            # Inferred from the whole column, as it is where a log is read: 7 is a number in both, or in neither.
            with _open_csv(path, encoding, None) as reader:
                _check_names(path, reader.schema.names, key, columns)
            convert = pa.csv.ConvertOptions(
                include_columns=[key], strings_can_be_null=True, quoted_strings_can_be_null=False
            )
            read, parse = _csv_options(encoding)
            column = pa.csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)[key]
            if pa.types.is_binary(column.type):
                raise pa.ArrowInvalid(f"column {key!r} is no text")
    except UNREADABLE as error:
        raise _unreadable(path, encoding, error) from None
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return pd.Series(column.to_pylist(), dtype=object)


def _numeric(path: Path, encoding: str) -> set[str]:
    """The columns of numbers; of a CSV, by its first rows."""
    if path.suffix.lower() == ".parquet":
        schema = pa.parquet.read_schema(path)
    else:
        with _open_csv(path, encoding, None) as reader:
            schema = reader.schema
    return {f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)}


def _check_names(path: Path, there: list[str], key: str, columns: Sequence[str]) -> None:
    if key not in there:
        hint = nearest(key, there) or f", but {', '.join(there)}"
        raise DataError(f"{path}: no column {key!r}{hint}; --key names the one that says which item it is")
    check_columns(path, there, [key, *columns])


def _of_one_kind(found: list[pd.Series]) -> list[pd.Series]:
    """Keys that are text in one file and numbers in another become text in all."""
    kinds = {type(value) for keys in found for value in keys.dropna()}
    return [as_text(keys) for keys in found] if str in kinds and len(kinds) > 1 else found


def _batches(path: Path, columns: Sequence[str], encoding: str, rows: int) -> Iterator[pa.RecordBatch]:
    if path.suffix.lower() == ".parquet":
        yield from pa.parquet.ParquetFile(path).iter_batches(batch_size=rows, columns=list(columns))
    else:
        with _open_csv(path, encoding, columns) as reader:
            yield from reader


def _csv_options(encoding: str) -> tuple[pa.csv.ReadOptions, pa.csv.ParseOptions]:
    read = pa.csv.ReadOptions(encoding=codecs.lookup(encoding).name.replace("utf-8", "utf8"), block_size=BLOCK_BYTES)
    return read, pa.csv.ParseOptions(newlines_in_values=True)


def _open_csv(path: Path, encoding: str, columns: Sequence[str] | None) -> pa.csv.CSVStreamingReader:
    read, parse = _csv_options(encoding)
    convert = pa.csv.ConvertOptions(
        include_columns=list(columns or []), column_types={c: pa.string() for c in columns or ()}, null_values=[""],
        strings_can_be_null=True,
    )  # fmt: skip
    return pa.csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert)


def _unreadable(path: Path, encoding: str, error: Exception) -> DataError:
    """One line, which names the first byte that is none of the encoding, if that is what is wrong."""
    if path.suffix.lower() == ".csv" and path.is_file() and (wrong := _wrong_byte(path, encoding)):
        return DataError(
            f"{path}: {wrong}; is the file in another encoding?  Name it: --encoding cp1252, latin-1, utf-16, ..."
        )
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "straddling" in said:
        said = f"a row has more than {BLOCK_BYTES >> 20} MiB, or a quote is never closed"
    return DataError(f"{path}: cannot be read ({said[:200]})")


def _wrong_byte(path: Path, encoding: str) -> str | None:
    """Line (from 1) and byte (from 0) of the first that is no text, if there is one."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line = 0, 1
    with path.open("rb") as file:
        while True:
            block = file.read(2**20)
            waiting = decoder.getstate()[0]  # the beginning of a character, from the block before
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                before, wrong = error.object[: error.start], error.object[error.start]
                line += before.decode(encoding, errors="replace").count("\n")
                at = offset - len(waiting) + error.start
                return f"line {line}, byte {at}: 0x{wrong:02x} is no {encoding.upper()} text"
            except UnicodeError as error:
                return str(error)
            if not block:
                return None
            offset += len(block)
