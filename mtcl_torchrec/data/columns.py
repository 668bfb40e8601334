"""Columns of rows as what the schema takes them for: ids in their own kind, bags, numbers; checked."""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, Feature, nearest

FLOAT32_MAX = float(np.finfo(np.float32).max)


def column_of(rows: Rows, column: str) -> pd.Series:
    """A column, or a DataError with the nearest name."""
    try:
        return rows.column(column)
    except KeyError:
        hint = nearest(column, map(str, rows.frame.columns))
        raise DataError(f"{rows.name}: no column {column!r}{hint}") from None


def plain_of(rows: Rows, column: str) -> np.ndarray | None:
    """As `Rows.plain`, or a DataError with the nearest name."""
    try:
        return rows.plain(column)
    except KeyError:
        column_of(rows, column)
        raise


def refuse(rows: Rows, wrong: np.ndarray, column: str, rule: str) -> None:
    """Raise DataError with file, row and value of the first row where `wrong` (N,) is true."""
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(f"{rows.locate(at)}: {column} = {shown(column_of(rows, column), at)}; {rule}")


def shown(values: pd.Series, at: int) -> str:
    """A value for a message, as its file has it: 7 and not np.int64(7)."""
    value = values.iloc[at]
    return repr(value.item() if isinstance(value, np.generic) else value)


def as_integers(values: pd.Series) -> np.ndarray | None:
    """(N,) int64 with 0 where a value is missing; None where they are no integers, or may not fit.

    Example:
        >>> as_integers(pd.Series([7, None], dtype="Int32")).tolist(), as_integers(pd.Series([7.0]))
        ([7, 0], None)
    """
    if values.dtype.kind not in "iu" or values.dtype in (np.dtype(np.uint64), pd.UInt64Dtype()):
        return None
    if isinstance(values.dtype, np.dtype):  # none is missing
        return values.to_numpy().astype(np.int64, copy=False)
    return values.to_numpy(dtype=np.int64, na_value=0) if values.hasnans else values.to_numpy(dtype=np.int64)


# ---------------------------------------------------------------------- ids


def ids_of(rows: Rows, column: str) -> pd.Series:
    """(N,) ids, one a row, in their own kind; a DataError where a row holds a list."""
    values = column_of(rows, column)
    if values.dtype == object:
        lists = values.map(lambda v: isinstance(v, (list, tuple, np.ndarray))).to_numpy(dtype=bool)
        refuse(rows, lists, column, "one value is expected; a column of lists is kind: bag")
    return canonical(values)


def canonical(values: pd.Series) -> pd.Series:
    """Ids in their own kind again: a reader turns them into floats or objects where some are missing.

    Example:
        >>> canonical(pd.Series([5.0, None])).tolist()
        [5, <NA>]
    """
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "iub":
        return values  # most columns: a window has many of them
    if isinstance(values.dtype, pd.CategoricalDtype):
        categories, codes = values.cat.categories, values.cat.codes.to_numpy()
        if pd.api.types.is_integer_dtype(categories):
            categories = categories.astype("Int64")
        taken = categories.take(codes, allow_fill=True, fill_value=None)
        values = pd.Series(taken, index=values.index)
    if values.dtype == object:
        kinds: dict[str, Any] = {"integer": "Int64", "boolean": "boolean", "decimal": "float64"}
        kind = kinds.get(pd.api.types.infer_dtype(values, skipna=True))
        with contextlib.suppress(OverflowError):  # beyond 64 bits: left as they are
            values = values.astype(kind) if kind else values
    if pd.api.types.is_float_dtype(values):
        present = values.dropna()
        if ((present == np.floor(present)) & (present.abs() < 2**63)).all():
            return values.astype("Int64")
    return values


def as_text(values: pd.Series) -> pd.Series:
    """Values as text, the same for 5, 5.0 and "5"; missing ones stay missing.

    Example:
        >>> as_text(pd.Series([5.0, 2.5])).tolist(), as_text(pd.Series([5])).tolist()
        (['5', '2.5'], ['5'])
    """
    if isinstance(values.dtype, pd.StringDtype):
        return values
    if pd.api.types.is_integer_dtype(values):
        return values.astype(str).astype(object).where(values.notna())
    return values.astype(object).map(
        lambda x: str(int(x)) if isinstance(x, float) and x.is_integer() else str(x),
        na_action="ignore",
    )


def split_bag(feature: Feature, column: pd.Series) -> tuple[pd.Series, np.ndarray]:
    """All values of a bag column one after the other, and how many each row has, (N,) int64."""
    cells = canonical(column).tolist()
    kinds = set(map(type, cells))
    if not kinds <= {list, tuple} and not (kinds == {np.ndarray} and _alike(cells)):
        cells, kinds = [_members(feature, cell) for cell in cells], {list}
    lengths = np.fromiter(map(len, cells), np.int64, len(cells))
    values: Any
    if kinds == {np.ndarray}:
        whole = np.concatenate(cells)
        values = whole.astype(np.int64, copy=False) if whole.dtype.kind == "i" else whole.tolist()
    else:
        values = list(chain.from_iterable(cells))
    return canonical(pd.Series(values, dtype=None if len(values) else object)), lengths


def _alike(arrays: list[np.ndarray]) -> bool:
    """Whether arrays can be joined with each value as it is."""
    return len({(array.dtype, array.ndim) for array in arrays}) == 1 and arrays[0].ndim == 1


def _members(feature: Feature, cell: Any) -> list[Any]:
    """The values of one row's bag, in whatever form it comes."""
    if isinstance(cell, str):
        return [part for part in cell.split(feature.separator) if part]
    if isinstance(cell, np.ndarray):
        return cell.tolist()
    if isinstance(cell, (list, tuple)):
        return list(cell)
    # A file in which no row has two values is read as plain numbers: bags of one.
    return [] if pd.isna(cell) else [cell]


def hashed(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (V,) uint64 of the V values that occur, and which of them each row has (N,), -1 where it has none."""
    codes, once = pd.factorize(values)  # each value once: its text is hashed, and making that takes long
    texts = as_text(pd.Series(once)).to_numpy(dtype=object)
    return pd.util.hash_array(texts, categorize=False), codes


# ---------------------------------------------------------------------- numbers


def numbers(rows: Rows, column: str, what: str) -> np.ndarray:
    """(N,) float64, NaN where missing.

    Args:
        what: whose column it is, for a message.

    Raises:
        DataError: a value is no number.
    """
    plain = plain_of(rows, column)
    if plain is not None:
        return plain.astype(np.float64, copy=False)
    values = canonical(column_of(rows, column))
    if not pd.api.types.is_numeric_dtype(values):
        if pd.api.types.is_datetime64_any_dtype(values) or values.dtype.kind == "m":
            raise DataError(f"{rows.name}: column {column!r} holds times, no numbers ({what})")
        numeric = pd.to_numeric(values, errors="coerce")
        wrong = (numeric.isna() & values.notna()).to_numpy(dtype=bool)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(f"{rows.locate(at)}: {column} = {shown(values, at)} is no number ({what})")
        values = numeric
    return values.to_numpy(dtype=np.float64, na_value=np.nan)


def dense_values(feature: Feature, rows: Rows) -> np.ndarray:
    """(N,) float64: a dense feature after its transform and before it is standardised; NaN where missing.

    Raises:
        DataError: a value is no number, infinite, or outside of what the transform takes.
    """
    values = numbers(rows, feature.rows_from, f"dense feature {feature.name!r}")
    refuse(rows, np.isinf(values), feature.rows_from, "a dense value is finite")
    if feature.transform == "log":
        return np.sign(values) * np.log1p(np.abs(values))
    if feature.transform == "logit":
        refuse(rows, (values < 0) | (values > 1), feature.rows_from, "transform 'logit' takes rates from 0 to 1")
        rate = np.clip(values, 1e-6, 1 - 1e-6)
        return np.log(rate / (1 - rate))
    return values
