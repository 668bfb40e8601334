"""What a run keeps of its files of item vectors and codes: whose they are, row by row, and how they may grow.

A vector is scaled to length √d when it is read, so that its numbers are of the size of standardised ones whatever the
encoder's unit was; with unit vectors of a language model, only their direction says something anyway.  An item whose
vector is all zero, as encoders give for an empty text, has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from mtcl_torchrec.data.columns import as_text, shown
from mtcl_torchrec.data.prefixes import Prefixes
from mtcl_torchrec.data.source import Rows, column_names
from mtcl_torchrec.data.vectors import (
    ItemCodes,
    ItemVectors,
    read_codes,
    read_vectors,
    same_space,
    write_codes,
    write_vectors,
)
from mtcl_torchrec.data.vocabulary import table_rows
from mtcl_torchrec.schema import ConfigError, DataError, Feature

ROWS_AT_ONCE = 65_536
SAME = 0.05  # two vectors of length √d of one item, made on two machines, differ less in every number
FEW = 0.5  # share of rows with content below which keys are doubted
_KEY = "key"  # name of the key column in the run's own files


@dataclass(frozen=True)
class VectorRows:
    """Vectors by row: row 0 is that of items without one, row i that of the i-th key.

    Args:
        keys: (V,) integers or text.
        vectors: (V + 1, d) float32 or float16, row 0 zero; None where they are part of a network that serves.
        encoder: identity of what made them, where that is known.
    """

    keys: pd.Index
    vectors: np.ndarray | None
    encoder: str | None = None

    @classmethod
    def read(cls, feature: Feature) -> VectorRows:
        """From a feature's vectors file.

        Raises:
            ConfigError: the file is not there.
            DataError: it does not hold vectors by key (see `read_vectors`), or nothing but zeros.
        """
        path = _there(feature, "vectors", feature.vectors)
        read = _naming(feature, lambda: read_vectors(path, _key(path, feature)))
        return cls.of(read, feature.data_type, f"{path}: no item has a vector other than zero")

    @classmethod
    def of(cls, read: ItemVectors, data_type: str = "fp32", nothing: str = "all vectors are zero") -> VectorRows:
        """Of vectors in memory.

        Raises:
            DataError: no vector has a direction: all are zero.

        Example:
            >>> read = ItemVectors("item", pd.Series(["a", "b"]), np.float32([[3, 4], [0, 0]]))
            >>> rows = VectorRows.of(read)
            >>> rows.keys.tolist(), rows.vectors.round(2).tolist()
            (['a'], [[0.0, 0.0], [0.8500000238418579, 1.1299999952316284]])
        """
        kept = np.concatenate([part.any(axis=1) for part in _parts(read.vectors)])
        if not kept.any():
            raise DataError(nothing)
        vectors = np.zeros((int(kept.sum()) + 1, read.width), np.float16 if data_type == "fp16" else np.float32)
        at = 1
        for part, there in zip(_parts(read.vectors), _parts(kept), strict=True):
            wide = part[there].astype(np.float64)
            wide /= np.abs(wide).max(axis=1, keepdims=True)  # squares of what is left neither vanish nor overflow
            wide *= np.sqrt(read.width) / np.linalg.norm(wide, axis=1, keepdims=True)
            vectors[at : at + len(wide)] = wide
            at += len(wide)
        return cls(pd.Index(read.keys[kept]), vectors, read.encoder)

    def __len__(self) -> int:
        """V."""
        return len(self.keys)

    def rows(self, values: pd.Series) -> np.ndarray:
        """(N,) int64: the row of each item's vector, 0 where it has none."""
        return table_rows(self.keys, values)

    def grown(self, newer: VectorRows, name: str) -> VectorRows:
        """With the vectors of more items, in rows after the old ones, whose vectors stay.

        Args:
            newer: read from a newer file.  Items that it has no more keep their vector.
            name: of the feature, for a message.

        Raises:
            ConfigError: vectors of another width or encoder, or of an old item another vector.
        """
        if self.vectors is None or newer.vectors is None:
            raise ConfigError(f"feature {name!r}: its vectors are part of an exported model; export the run again")
        width, now = self.vectors.shape[1], newer.vectors.shape[1]
        if width != now:
            raise ConfigError(
                f"feature {name!r}: vectors had {width} numbers and now have {now}; begin a new run, or keep "
                "the encoder"
            )
        if not same_space(self.encoder, newer.encoder):
            raise ConfigError(
                f"feature {name!r}: vectors were made by {_short(self.encoder)} and now by {_short(newer.encoder)}, "
                "whose numbers mean something else; begin a new run, or keep the encoder (tfidf: --encoder FITTED.npz)"
            )
        keys, at = _together(self.keys, newer.keys)
        for start in range(0, len(newer), ROWS_AT_ONCE):
            of = at[start : start + ROWS_AT_ONCE]
            old = (of <= len(self)).nonzero()[0]
            there = newer.vectors[1 + start + old].astype(np.float32)
            other = np.abs(there - self.vectors[of[old]].astype(np.float32)).max(axis=1, initial=0) > SAME
            if other.any():
                key = newer.keys[start + old[int(np.argmax(other))]]
                raise ConfigError(
                    f"feature {name!r}: the vector of {key!r} is another than the one the run was trained with; begin "
                    "a new run, or keep the encoder"
                )
        fresh = newer.vectors[1:][at > len(self)].astype(newer.vectors.dtype)
        vectors = np.concatenate([self.vectors.astype(newer.vectors.dtype), fresh])
        return VectorRows(keys, vectors, self.encoder or newer.encoder)

    def digest(self) -> str:
        """Tells these keys and vectors from any others."""
        seen = hashlib.blake2b(_as_bytes(self.keys), digest_size=16)
        for part in () if self.vectors is None else _parts(self.vectors):
            seen.update(np.ascontiguousarray(part).data)
        return seen.hexdigest()

    def save(self, path: Path, *, keys_only: bool = False) -> None:
        """Write a vectors file, or a file of the keys alone."""
        if keys_only or self.vectors is None:
            pd.DataFrame({_KEY: self.keys}).to_parquet(path, index=False)
        else:
            write_vectors(path, pd.Series(self.keys), self.vectors[1:], key=_KEY, about={"encoder": self.encoder})

    @classmethod
    def load(cls, path: Path) -> VectorRows:
        """Read what `save` wrote."""
        if "vector" not in column_names(path):
            return cls(pd.Index(pd.read_parquet(path)[_KEY]), None)
        read = read_vectors(path, _KEY)
        vectors = np.concatenate([np.zeros_like(read.vectors[:1]), read.vectors])
        return cls(pd.Index(read.keys), vectors, read.encoder)


@dataclass(frozen=True)
class CodeRows:
    """Semantic ids: an item's code, and the numbers of its prefixes in the table.

    Args:
        keys: (V,) integers or text.
        codes: (V, L) int64.
        prefixes: those that have a row in the table.
        codebook: identity of what made them, where that is known.
    """

    keys: pd.Index
    codes: np.ndarray
    prefixes: Prefixes
    codebook: str | None = None

    @classmethod
    def read(cls, feature: Feature) -> CodeRows:
        """From a feature's codes file, whose prefixes are the dictionary.

        Raises:
            ConfigError: the file is not there.
            DataError: it does not hold codes by key (see `read_codes`).
        """
        path = _there(feature, "codes", feature.codes)
        read: ItemCodes = _naming(feature, lambda: read_codes(path, _key(path, feature)))
        return cls(pd.Index(read.keys), read.codes, Prefixes.of(read.codes, read.sizes), read.codebook)

    def __len__(self) -> int:
        """P, how many prefixes there are."""
        return len(self.prefixes)

    def jagged(self, values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the prefixes of each item's code, one item after the other, and how many each has; (·,) and (N,)
        int64.

        An item without a code has none, one whose code has a prefix that is not known has those before it.
        """
        numbers = self._numbers[table_rows(self.keys, values)]
        known = numbers > 0
        return numbers[known], known.sum(axis=1)

    @cached_property
    def _numbers(self) -> np.ndarray:
        """(V + 1, L): the prefixes of each row, 0 where there is none."""
        return np.concatenate([np.zeros((1, self.prefixes.levels), np.int64), self.prefixes.numbers(self.codes)])

    def grown(self, newer: CodeRows, name: str, *, new_prefixes: bool = True) -> CodeRows:
        """With the codes of more items; old prefixes keep their rows.

        Args:
            newer: read from a newer file.  Items that it has no more keep their code.
            name: of the feature, for a message.
            new_prefixes: False where the table cannot grow: an item then has the longest prefix that is known.

        Raises:
            ConfigError: another number or size of levels, another codebook, or of an old item another code.
        """
        if self.prefixes.sizes != newer.prefixes.sizes:
            raise ConfigError(
                f"feature {name!r}: levels had {list(self.prefixes.sizes)} codes and now have "
                f"{list(newer.prefixes.sizes)}; begin a new run, or keep the codebook"
            )
        if None not in (self.codebook, newer.codebook) and self.codebook != newer.codebook:
            raise ConfigError(
                f"feature {name!r}: these codes are of another codebook than the run's and mean something else; begin "
                "a new run, or keep the codebook (mtcl semantic-ids --codebook)"
            )
        keys, at = _together(self.keys, newer.keys)
        old = at <= len(self.keys)
        other = (newer.codes[old] != self.codes[at[old] - 1]).any(axis=1)
        if other.any():
            key = newer.keys[old][int(np.argmax(other))]
            raise ConfigError(
                f"feature {name!r}: the code of {key!r} is another than the one the run was trained with; begin a new "
                "run, or keep the codebook"
            )
        prefixes = self.prefixes.grown(newer.codes) if new_prefixes else self.prefixes
        return replace(self, keys=keys, codes=np.concatenate([self.codes, newer.codes[~old]]), prefixes=prefixes)

    def digest(self) -> str:
        """Tells these keys, codes and prefixes from any others."""
        seen = hashlib.blake2b(_as_bytes(self.keys), digest_size=16)
        for part in (self.codes, self.prefixes.keys):
            seen.update(np.ascontiguousarray(part).data)
        return seen.hexdigest()

    def save(self, path: Path) -> None:
        """Write a codes file, and the prefixes beside it."""
        about = {"codebook": self.codebook}
        write_codes(path, pd.Series(self.keys), self.codes, self.prefixes.sizes, key=_KEY, about=about)
        pd.DataFrame({"prefix": self.prefixes.keys}).to_parquet(_prefixes_beside(path), index=False)

    @classmethod
    def load(cls, path: Path) -> CodeRows:
        """Read what `save` wrote."""
        read = read_codes(path, _KEY)
        known = pd.read_parquet(_prefixes_beside(path))["prefix"].to_numpy(dtype=np.int64)
        return cls(pd.Index(read.keys), read.codes, Prefixes(read.sizes, known), read.codebook)


Contents = VectorRows | CodeRows


def read_contents(feature: Feature) -> Contents:
    """What a feature's file holds."""
    return VectorRows.read(feature) if feature.kind == "vector" else CodeRows.read(feature)


def _there(feature: Feature, field: str, path: str | None) -> Path:
    assert path is not None
    if not Path(path).is_file():
        raise ConfigError(f"feature {feature.name!r}: {field}: no such file: {path}")
    return Path(path)


def _key(path: Path, feature: Feature) -> str | None:
    """The key column's name where the file has it under the name of the log; else there must be but one."""
    return feature.rows_from if feature.rows_from in column_names(path) else None


def _naming(feature: Feature, read):  # type: ignore[no-untyped-def]
    try:
        return read()
    except DataError as error:
        raise DataError(f"feature {feature.name!r}: {error}") from None


def _together(old: pd.Index, new: pd.Index) -> tuple[pd.Index, np.ndarray]:
    """Old keys and then the new ones, in the kind of the old where they can be; and the row of each of `new`."""
    at = table_rows(old, pd.Series(new))
    fresh = at == 0
    at[fresh] = len(old) + 1 + np.arange(int(fresh.sum()))
    more = new[fresh]
    if len(more) and pd.api.types.is_numeric_dtype(old) != pd.api.types.is_numeric_dtype(more):
        old, more = (pd.Index(as_text(pd.Series(part)).astype(object)) for part in (old, more))
    return (old.append(more) if len(more) else old), at


def _as_bytes(keys: pd.Index) -> bytes:
    return "\0".join(as_text(pd.Series(keys)).tolist()).encode()


def _short(identity: str | None) -> str:
    """An identity with its digest cut."""
    return " ".join(word[:12] for word in str(identity).split())


def _prefixes_beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}_prefixes.parquet")


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))


def said_of_coverage(found: Sequence[tuple[Feature, np.ndarray]], split: str, rows: Rows) -> list[str]:
    """Lines that tell how many rows of a split have content, and a key that has none.

    Args:
        found: features, and which rows have something, (N,) bool.
        split: its name.
        rows: its rows, with the features' columns.

    Raises:
        DataError: no row at all has, so that the keys of log and file cannot mean the same.
    """
    lines = []
    for feature, there in found:
        what, file = ("vector", feature.vectors) if feature.kind == "vector" else ("code", feature.codes)
        column = feature.rows_from
        if len(there) and not there.any():
            raise DataError(
                f"feature {feature.name!r}: no row of {split} has a {what}: the keys in column {column!r} "
                f"are not those of {file}"
            )
        share = float(there.mean()) if len(there) else 1.0
        line = f"{feature.name}: {share:.1%} of the rows of {split} have a {what}"
        if share < 1 and column in rows.frame:
            line += f"; {column} = {shown(rows.frame[column], int(np.argmin(there)))} has none"
        lines.append(f"{line}: do the keys of log and {file} mean the same?" if share < FEW else line)
    return lines
