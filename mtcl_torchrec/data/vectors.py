"""Files with something of fixed width for each item: vectors (of its text, say), and codes (its semantic id).

A *vectors file* is Parquet with a key column, such as ``item_id``, and ``vector``: a list of d floats, the same d in
all rows.  A *codes file* has the key column and ``codes``: a list of L integers, and the sizes of the L levels in its
metadata (under ``mtcl_torchrec``, as JSON).  Any tool may write them; what is read is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from mtcl_torchrec.data.columns import as_text, canonical
from mtcl_torchrec.data.source import UNREADABLE, check_columns
from mtcl_torchrec.schema import DataError

METADATA = b"mtcl_torchrec"
VECTOR = "vector"
CODES = "codes"
ROWS_AT_ONCE = 65_536
_TOKENS = re.compile(r" \d+ tokens .*$", re.DOTALL)


@dataclass(frozen=True)
class ItemVectors:
    """What a vectors file holds.

    Args:
        key: name of the key column.
        keys: (V,) integers or text, each once.
        vectors: (V, d) float32 or float16, finite.
        about: what the writer said of them: the encoder, the text's columns; may be empty.
    """

    key: str
    keys: pd.Series
    vectors: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def encoder(self) -> str | None:
        """The identity of what made them, where that is known."""
        return _text_of(self.about, "encoder")

    @property
    def width(self) -> int:
        """d."""
        return self.vectors.shape[1]


@dataclass(frozen=True)
class ItemCodes:
    """What a codes file holds.

    Args:
        key: name of the key column.
        keys: (V,) integers or text, each once.
        codes: (V, L) int64; level l has codes from 0 to sizes[l] - 1.
        sizes: of the levels, (L,).
        about: what the writer said of them; may be empty.
    """

    key: str
    keys: pd.Series
    codes: np.ndarray
    sizes: tuple[int, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def codebook(self) -> str | None:
        """The identity of what made them, where that is known."""
        return _text_of(self.about, "codebook")


def same_space(one: str | None, other: str | None) -> bool:
    """Whether vectors of two encoders can be compared, as far as their identities tell (None tells nothing).

    A language model's vectors hardly depend on how many tokens it reads, its numbers' precision and the library's
    version, which an identity names at its end.

    Example:
        >>> same_space("model 5f mean 256 tokens torch.float32", "model 5f mean 512 tokens torch.bfloat16")
        True
        >>> same_space("tfidf word (8, 99) 5f", "tfidf word (8, 99) 77"), same_space(None, "wordllama 0.3 64")
        (False, True)
    """
    return one is None or other is None or _TOKENS.sub("", one) == _TOKENS.sub("", other)


def write_vectors(
    path: Path, keys: pd.Series, vectors: np.ndarray, *, key: str, about: Mapping[str, Any] | None = None
) -> None:
    """Write a vectors file; it appears under its name when it is whole.

    Args:
        keys: (V,) integers or text, none missing or twice.
        vectors: (V, d) float32 or float16, finite; may be a memory map: it is written some rows at a time.
        key: name of the key column.
        about: anything JSON can say of where they come from.

    Raises:
        DataError: keys or vectors are not so.
    """
    keys = checked_keys(keys, key, lambda row: f"{path}, row {row}")
    if vectors.ndim != 2 or len(vectors) != len(keys) or vectors.shape[1] < 1:
        raise DataError(f"{path}: {len(keys)} keys need vectors ({len(keys)}, d), not {vectors.shape}")
    kinds = {np.dtype(np.float32): pa.float32(), np.dtype(np.float16): pa.float16()}
    if vectors.dtype not in kinds:
        raise DataError(f"{path}: vectors are float32 or float16, not {vectors.dtype}")
    _write(path, keys, vectors, key, VECTOR, kinds[vectors.dtype], {"about": dict(about or {})})


def read_vectors(path: Path, key: str | None = None) -> ItemVectors:
    """Read and check a vectors file.

    Args:
        key: name of the key column; the default is the only column beside ``vector``.

    Raises:
        DataError: the file is missing, broken or empty, has no such columns, a key is missing or there twice, or a
            vector is missing, of another width than the first, or not finite.  The message names file, row and key.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "vectors.parquet"
        ...     write_vectors(path, pd.Series(["a", "b"]), np.float32([[1, 2], [3, 4]]), key="item_id")
        ...     read = read_vectors(path)
        >>> read.key, read.keys.tolist(), read.vectors.tolist()
        ('item_id', ['a', 'b'], [[1.0, 2.0], [3.0, 4.0]])
    """
    key, keys, column, said = _read(path, key, VECTOR)
    vectors = _matrix(column, path, VECTOR, keys, "fiu")
    if vectors.dtype != np.float16:
        vectors = vectors.astype(np.float32, copy=False)
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        finite = np.isfinite(vectors[start : start + ROWS_AT_ONCE]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(f"{path}, row {row} ({key} = {_shown(keys, row)}): {VECTOR} is not finite")
    return ItemVectors(key, keys, vectors, said.get("about", {}))


def write_codes(
    path: Path,
    keys: pd.Series,
    codes: np.ndarray,
    sizes: Sequence[int],
    *,
    key: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a codes file; it appears under its name when it is whole.

    Args:
        keys: (V,) integers or text, none missing or twice.
        codes: (V, L) integers, those of level l in [0, sizes[l]).
        sizes: (L,).
        key: name of the key column.

    Raises:
        DataError: keys or codes are not so.
    """
    keys = checked_keys(keys, key, lambda row: f"{path}, row {row}")
    sizes = tuple(map(int, sizes))
    if codes.shape != (len(keys), len(sizes)) or codes.dtype.kind not in "iu" or not sizes:
        raise DataError(f"{path}: {len(keys)} keys and {len(sizes)} levels need as many integers, not {codes.shape}")
    _check_codes(path, key, keys, codes, sizes)
    _write(path, keys, codes.astype(np.int32), key, CODES, pa.int32(),
           {"sizes": list(sizes), "about": dict(about or {})})  # fmt: skip


def read_codes(path: Path, key: str | None = None) -> ItemCodes:
    """Read and check a codes file.

    Args:
        key: name of the key column; the default is the only column beside ``codes``.

    Raises:
        DataError: as of `read_vectors`; or a code is not in [0, size of its level).  A file of another tool, without
            sizes, has the sizes that its greatest codes need.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "codes.parquet"
        ...     write_codes(path, pd.Series([7, 9]), np.array([[0, 2], [1, 0]]), (4, 4), key="item_id")
        ...     read = read_codes(path)
        >>> read.keys.tolist(), read.codes.tolist(), read.sizes
        ([7, 9], [[0, 2], [1, 0]], (4, 4))
    """
    key, keys, column, said = _read(path, key, CODES)
    codes = _matrix(column, path, CODES, keys, "iu").astype(np.int64)
    sizes = said.get("sizes", np.maximum(codes.max(axis=0) + 1, 1).tolist())
    if not (isinstance(sizes, list) and all(type(s) is int and s > 0 for s in sizes) and len(sizes) == codes.shape[1]):
        raise DataError(f"{path}: {codes.shape[1]} levels of codes need as many positive sizes, not {sizes}")
    _check_codes(path, key, keys, codes, tuple(sizes))
    return ItemCodes(key, keys, codes, tuple(sizes), said.get("about", {}))


# ---------------------------------------------------------------------- what both have in common


def _write(
    path: Path, keys: pd.Series, values: np.ndarray, key: str, column: str, kind: pa.DataType, said: dict[str, Any]
) -> None:
    if key == column:
        raise DataError(f"{path}: the key column cannot be named {column!r}")
    width = values.shape[1]
    plain_keys = pa.array(keys.tolist())
    schema = pa.schema([pa.field(key, plain_keys.type), pa.field(column, pa.list_(kind, width))])
    schema = schema.with_metadata({METADATA: json.dumps(said)})
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with pa.parquet.ParquetWriter(unfinished, schema) as writer:
            for start in range(0, len(keys), ROWS_AT_ONCE):
                part = np.ascontiguousarray(values[start : start + ROWS_AT_ONCE])
                if part.dtype.kind == "f" and not np.isfinite(part).all():
                    row = start + int(np.argmin(np.isfinite(part).all(axis=1)))
                    raise DataError(f"{path}, row {row} ({key} = {_shown(keys, row)}): {column} is not finite")
                lists = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
                writer.write_table(pa.table([plain_keys[start : start + len(part)], lists], schema=schema))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read(path: Path, key: str | None, column: str) -> tuple[str, pd.Series, pa.ChunkedArray, dict[str, Any]]:
    """Key column's name, keys, the other column, and what the writer said."""
    try:
        file = pa.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names and CODES in names:
            raise DataError(f"{path}: no column {column!r}, but codes: they go under codes: of a semantic_id feature")
        if column not in names and VECTOR in names:
            raise DataError(f"{path}: no column {column!r}, but vectors: they go under vectors: of a vector feature")
        check_columns(path, names, [column])
        if key is None:
            others = [name for name in names if name != column]
            if len(others) != 1:
                raise DataError(f"{path}: which of the columns {others} is the key?")
            key = others[0]
        check_columns(path, names, [key])
        if file.metadata.num_rows == 0:
            raise DataError(f"{path}: no rows")
        table = file.read([key, column])
        said = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
    except (*UNREADABLE, json.JSONDecodeError) as error:
        if path.is_file() and "magic bytes" in str(error):
            what = "vectors, such as `mtcl embed`" if column == VECTOR else "codes, such as `mtcl semantic-ids`"
            raise DataError(f"{path}: cannot be read: this is no Parquet file of {what} writes") from None
        raise DataError(f"{path}: cannot be read ({error})") from None
    if pa.types.is_dictionary(table.schema.field(key).type):
        table = table.set_column(0, key, table[key].cast(table.schema.field(key).type.value_type))
    keys = pd.Series(table[key].to_pylist(), dtype=object)
    return (
        key,
        checked_keys(keys, key, lambda row: f"{path}, row {row}"),
        table[column],
        said if isinstance(said, dict) else {},
    )


def checked_keys(keys: pd.Series, key: str, locate: Callable[[int], str]) -> pd.Series:
    """Keys of items as int64 or text, in the order they had.

    Args:
        keys: (V,).
        key: name of their column.
        locate: where a row stands, for a message.

    Raises:
        DataError: one is missing, is there twice, or is neither.
    """
    keys = canonical(keys.reset_index(drop=True))
    missing = keys.isna().to_numpy(dtype=bool)
    if missing.any():
        raise DataError(f"{locate(int(np.argmax(missing)))}: key {key!r} is missing")
    keys = _whole(keys)
    if pd.api.types.is_float_dtype(keys):
        at = int(np.argmax((keys != keys.round()).to_numpy()))
        raise DataError(f"{locate(at)}: {key} = {_shown(keys, at)} is a decimal number; keys are integers or text")
    if pd.api.types.is_bool_dtype(keys) or not (pd.api.types.is_integer_dtype(keys) or _all_text(keys)):
        raise DataError(f"{locate(0)}: keys {key!r} are integers or text, which {_shown(keys, 0)} is not")
    keys = keys.astype(np.int64) if pd.api.types.is_integer_dtype(keys) else keys.astype(object)
    twice = keys.duplicated().to_numpy()
    if twice.any():
        row = int(np.argmax(twice))
        first = int(np.argmax((keys == keys[row]).to_numpy()))
        raise DataError(f"{locate(row)}: {key} = {_shown(keys, row)} is there already, in {locate(first)}")
    return keys


def _whole(keys: pd.Series) -> pd.Series:
    """Numbers as integers where all are whole, as pandas makes floats of ids beside a missing one."""
    if not all(isinstance(key, (int, float)) and not isinstance(key, bool) for key in keys):
        return keys
    numbers = keys.astype("float64")
    if pd.api.types.is_integer_dtype(keys) or not (np.abs(numbers) < 2**53).all():
        return keys
    return keys.astype("int64") if (numbers == numbers.round()).all() else numbers


def _text_of(about: Any, name: str) -> str | None:
    said = about.get(name) if isinstance(about, Mapping) else None
    return said if isinstance(said, str) else None


def _all_text(keys: pd.Series) -> bool:
    return isinstance(keys.dtype, pd.StringDtype) or all(isinstance(k, str) for k in keys)


def _matrix(column: pa.ChunkedArray, path: Path, name: str, keys: pd.Series, kinds: str) -> np.ndarray:
    """(V, width): lists of one length as an array."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{path}: column {name!r} holds {kind}, no lists of one length")
    parts, width, start = [], None, 0
    for chunk in column.chunks:
        lengths = pa.compute.list_value_length(chunk).fill_null(-1).to_numpy(zero_copy_only=False)
        if len(lengths) == 0:
            continue
        width = int(lengths[0]) if width is None else width
        wrong = (lengths != width) | (lengths < 1)
        if wrong.any():
            row = int(np.argmax(wrong))
            has = "is missing" if lengths[row] < 1 else f"has {lengths[row]} values, the first row {width}"
            raise DataError(f"{path}, row {start + row} (key {_shown(keys, start + row)}): {name} {has}")
        values = chunk.flatten()
        if values.null_count:
            row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // width
            raise DataError(f"{path}, row {start + row} (key {_shown(keys, start + row)}): {name} has a missing value")
        array = values.to_numpy(zero_copy_only=False)
        if array.dtype.kind not in kinds:
            wanted = "numbers" if "f" in kinds else "integers"
            raise DataError(f"{path}: column {name!r} holds lists of {kind.value_type}, not of {wanted}")
        parts.append(array.reshape(-1, width))
        start += len(chunk)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_codes(path: Path, key: str, keys: pd.Series, codes: np.ndarray, sizes: Sequence[int]) -> None:
    wrong = ((codes < 0) | (codes >= np.asarray(sizes))).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{path}, row {row} ({key} = {_shown(keys, row)}): codes {codes[row].tolist()} are outside of the levels, "
            f"whose sizes are {list(sizes)}"
        )


def _shown(keys: pd.Series, row: int) -> str:
    return repr(as_text(keys.iloc[row : row + 1]).iloc[0])
