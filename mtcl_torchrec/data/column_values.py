"""What the values of a column are, whatever it is called and before there is a schema: times, lists, texts, 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import pandas as pd

SEPARATORS = "|;,"
_REPEATS = 0.98  # of the groups within which a property is the same


def comes_again(column: pd.Series) -> bool:
    """Whether its values come again in other rows, and there are several."""
    values = hashable(column.dropna())
    distinct = values.nunique()
    return 1 < distinct < 0.95 * len(values)


def why_useless(column: pd.Series) -> str:
    """Why there is nothing to be learnt of a column; empty where there may be.

    Example:
        >>> why_useless(pd.Series([3] * 90)), why_useless(pd.Series(range(90)))
        ('always 3', 'another value in each row')
    """
    values = hashable(column.dropna())
    if values.empty:
        return "no value at all"
    distinct = values.nunique()
    if distinct == 1 and len(values) == len(column):
        return f"always {values.iloc[0]!s:.40}"
    if distinct == len(values) >= 50 and not pd.api.types.is_float_dtype(values) and not is_timestamp(column):
        return "another value in each row"
    return ""


def is_timestamp(column: pd.Series) -> bool:
    """Whether it holds times, also as ISO text."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    sample = column.dropna().head(100)
    if sample.empty or not sample.map(lambda v: isinstance(v, str) and re.match(r"\d{4}-\d{2}-\d{2}", v)).all():
        return False
    return bool(pd.to_datetime(sample, errors="coerce", format="ISO8601", utc=True).notna().all())


def is_binary(column: pd.Series) -> bool:
    """Whether it holds 0 and 1 only, or nothing."""
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
        return False
    return set(column.dropna().unique()) <= {0, 1}


def is_list(column: pd.Series) -> bool:
    """Whether its values are lists."""
    first = column.dropna().head(1)
    return len(first) == 1 and not isinstance(first.iloc[0], str) and hasattr(first.iloc[0], "__len__")


def often_missing(column: pd.Series) -> bool:
    """Whether it is known of some rows only."""
    return bool(column.isna().mean() > 0.05)


def separator_of(column: pd.Series) -> str | None:
    """What stands between the parts of texts that are lists; None where they are none.

    Parts come again in other rows, or it would be prose with commas.

    Example:
        >>> separator_of(pd.Series(["jazz|folk", "folk", "jazz|rock|folk", "rock|jazz"]))
        '|'
        >>> separator_of(pd.Series(["New York", "Rome"]))
    """
    sample = column.dropna().head(1000)
    if sample.empty or not sample.map(lambda v: isinstance(v, str)).all():
        return None
    for separator in SEPARATORS:
        parts = [part.strip() for text in sample for part in text.split(separator)]
        whole = sample.nunique()
        several = sample.str.contains(separator, regex=False).mean() > 0.2
        if several and len(set(parts)) < len(parts) / 2 and len(set(parts)) <= max(whole, 20):
            return separator
    return None


def is_prose(column: pd.Series) -> bool:
    """Whether its values are texts of several words, most of them found once."""
    sample = column.dropna().head(1000)
    if sample.empty or not sample.map(lambda v: isinstance(v, str)).all():
        return False
    return bool(sample.str.split().map(len).mean() >= 3)


def constant_within(values: pd.Series, key: pd.Series) -> bool:
    """Whether rows of one key hold one value: it is a property of the key.

    Some keys with several values are mistakes of the log.  Where no key comes twice, nothing is known, and it is False.

    Example:
        >>> users = pd.Series(list("aabb"))
        >>> constant_within(pd.Series([1, 1, 2, 2]), users), constant_within(pd.Series([1, 2, 1, 2]), users)
        (True, False)
    """
    by_key = values.groupby(key)
    several = by_key.size() > 1
    return bool(several.any()) and bool((by_key.nunique()[several] <= 1).mean() > _REPEATS)


def hashable(column: pd.Series) -> pd.Series:
    """A column with its lists as tuples, so that they can be counted and grouped; any other as it is."""
    return column.map(_as_key, na_action="ignore") if is_list(column) else column


def _as_key(value: Any) -> Hashable:
    """A list as what tells it from others; its text is made, which takes ten times as long, only where lists nest."""
    flat = not isinstance(value, dict) and all(isinstance(part, Hashable) for part in value)
    return tuple(value) if flat else str(value)
