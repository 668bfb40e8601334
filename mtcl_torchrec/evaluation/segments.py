"""Rows told apart by a column: cold items, new users, hours, whatever the data has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from mtcl_torchrec.data.columns import as_text, canonical
from mtcl_torchrec.evaluation.bootstrap import clusters_of
from mtcl_torchrec.evaluation.estimates import Estimate, task_estimates
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.supports import supports_of
from mtcl_torchrec.schema import DataError, nearest

DERIVED = ("item_seen", "user_seen", "hour_of_day")  # beside the columns of the data
MOST_VALUES = 24  # of a segment; more are cut at quantiles, or the rarer ones taken together
QUANTILES = 5
OTHER, MISSING = "(other)", "(missing)"
# A time column of numbers is taken for seconds, milli-, micro- or nanoseconds since 1970, by its size.
TIME_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3), (1e8, 1.0))  # from which size on, units in a second


def segment_values(table: PredictionsTable, name: str) -> pd.Series:
    """(N,) the segment of each row, as text.

    Args:
        name: a column that the table was made with (``segment.NAME``, or a key), or one that is derived:
            ``item_seen`` and ``user_seen`` (whether it is in the training split: cold items, new users) and
            ``hour_of_day`` (of the time column, UTC).

    Returns:
        An ordered categorical.  Numbers of more than 24 different values are cut at quintiles; of other values, the
        23 most frequent stay, and the rest is ``"(other)"``.  Missing values are ``"(missing)"``.

    Raises:
        DataError: the table has no such column.

    Example:
        >>> frame = pd.DataFrame({"label.a": np.zeros(100), "segment.price": np.arange(100.0)})
        >>> table = PredictionsTable(frame, ())
        >>> segment_values(table, "price").value_counts(sort=False).to_dict()
        {'0 to 19': 20, '20 to 39': 20, '40 to 59': 20, '60 to 79': 20, '80 to 99': 20}
    """
    frame = table.frame
    column = next((c for c in (f"segment.{name}", name) if c in frame), None)
    if column is None and name == "hour_of_day" and "time" in frame:
        return _named(hours_of_day(frame["time"]))
    if column is None or column.startswith(("label.", "p.", "uncalibrated.")):
        if name == "hour_of_day":
            raise DataError("segments: hour_of_day needs the column of schema.time")
        kept = [str(c).removeprefix("segment.") for c in frame if "." not in str(c) or str(c).startswith("segment.")]
        kept += ["hour_of_day"] if "time" in frame else []
        raise DataError(f"segments: no column {name!r} beside the predictions{nearest(name, kept)}; {there_are(kept)}")
    values = canonical(frame[column])
    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if values.nunique() <= MOST_VALUES:
        return _named(values)
    return _quantiles(values) if is_number else _frequent(values)


def hours_of_day(times: pd.Series) -> pd.Series:
    """(N,) the hour, 0 to 23, in UTC; of numbers, which are seconds to nanoseconds since 1970 by their size.

    Raises:
        DataError: the numbers are too small to be times, or the texts are none.

    Example:
        >>> hours_of_day(pd.Series([1_700_000_000, 1_700_003_600])).tolist()
        [22, 23]
    """
    if not pd.api.types.is_numeric_dtype(times):
        try:
            return pd.to_datetime(times, utc=True).dt.hour
        except (ValueError, TypeError, OverflowError) as error:
            raise DataError(f"segments: hour_of_day: the time column holds what is no time ({error})") from None
    if times.isna().all():
        return pd.Series(pd.NA, times.index, "Int64")
    size = float(times.abs().median())
    per_second = next((units for least, units in TIME_UNITS if size >= least), None)
    if per_second is None:
        raise DataError("segments: hour_of_day: the time column holds numbers too small to be seconds since 1970")
    return (times // (3600 * per_second) % 24).astype("Int64")


def there_are(columns: Iterable[str], most: int = 20) -> str:
    """The columns that rows can be told apart by, for a message.

    Example:
        >>> there_are(["hour", "shop"]), there_are("abc", most=2)
        ('there are hour, shop', 'there are a, b and 1 more')
    """
    names = list(columns)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"there are {', '.join(names[:most])}{more}"


def split_by_segment(table: PredictionsTable, name: str) -> Iterator[tuple[str, PredictionsTable]]:
    """The values of a segment, in their order, and the rows of each; see `segment_values`."""
    values = segment_values(table, name)
    codes = values.cat.codes.to_numpy()
    for i, value in enumerate(values.cat.categories):
        rows = codes == i
        if rows.any():
            yield str(value), rows_of(table, rows)


QUALITY = {"binary": "auc", "multiclass": "ne", "regression": "r2"}  # what a segment is told by
BESIDE = {"multiclass": "top1", "regression": "mae"}  # and what it is told by as well, in the labels' own terms


def of_segment(rows: PredictionsTable) -> dict[str, dict[str, Any]]:
    """Task -> how well it is predicted on some rows, and how sure that is.

    Returns:
        ``value`` of `QUALITY` of its kind, ``half`` of its 95 % interval over users, ``events`` (of a binary task; else
        labels), and ``unsure``, why nothing can be sure here; ``""`` where it can.  Of classes and numbers, also
        ``beside``: a value and half of `BESIDE`, under the metric's name.

    Example:
        >>> from mtcl_torchrec.schema import Task
        >>> frame = pd.DataFrame({"label.a": np.arange(100) % 2.0, "p.a": np.arange(100) % 2 * 0.5})
        >>> of_segment(PredictionsTable(frame, (Task.binary("a"),)))["a"]["events"]
        50
    """
    clusters = clusters_of(rows)
    support, found = supports_of(rows, clusters), {}
    for name in rows.predicted_names:
        kind, labels = rows.task(name).kind, rows.labels(name)
        estimates, known = task_estimates(rows, name, *clusters), ~np.isnan(labels)

        def told(metric: str, of: str = name, estimates: Mapping[str, Estimate] = estimates) -> dict[str, Any]:
            if (estimate := estimates.get(metric)) is None:
                return {"value": np.nan, "half": np.nan}
            return {"value": estimate.value, "half": support(of, metric).quantile * estimate.error}

        events = int((labels[known] > 0).sum()) if kind == "binary" else int(known.sum())
        found[name] = {**told(QUALITY[kind]), "events": events, "unsure": support(name, QUALITY[kind]).unsure}
        if kind in BESIDE:
            found[name]["beside"] = {BESIDE[kind]: told(BESIDE[kind])}
    return found


def rows_of(table: PredictionsTable, rows: np.ndarray) -> PredictionsTable:
    """The rows of a table where `rows` (N,) is true."""
    classes = {name: values[rows] for name, values in table.classes.items()}
    return replace(table, frame=table.frame[rows].reset_index(drop=True), classes=classes)


def _named(values: pd.Series) -> pd.Series:
    """Few values, each by its name, in their own order."""
    codes, once = pd.factorize(values, sort=True)
    return _categorical(codes, as_text(pd.Series(once)).astype(str).tolist())


def _frequent(values: pd.Series) -> pd.Series:
    codes, once = pd.factorize(values)
    counts = np.bincount(codes[codes >= 0])
    most = np.argsort(-counts, kind="stable")[: MOST_VALUES - 1]
    place = np.full(len(once) + 1, len(most))
    place[most] = np.arange(len(most))
    place[-1] = -1  # of missing ones
    return _categorical(place[codes], [*as_text(pd.Series(once)).astype(str).iloc[most], OTHER])


def _quantiles(values: pd.Series) -> pd.Series:
    x = values.to_numpy(dtype=np.float64, na_value=np.nan)
    finite = x[np.isfinite(x)]  # between two infinities nothing can be interpolated
    within = np.clip(x, finite.min(), finite.max())
    edges = np.unique(np.nanquantile(within, np.arange(1, QUANTILES) / QUANTILES))
    bins = np.where(np.isnan(x), -1, np.searchsorted(edges, x, side="right"))
    there = np.unique(bins[bins >= 0])
    ends = [(x[bins == b].min(), x[bins == b].max()) for b in there]
    for digits in range(6, 18):  # as many as tell the parts apart: times need ten
        names = [f"{low:.{digits}g} to {high:.{digits}g}" for low, high in ends]
        if len({end for name in names for end in name.split(" to ")}) == len({end for pair in ends for end in pair}):
            break
    return _categorical(np.where(bins < 0, -1, np.searchsorted(there, bins)), names)


def _categorical(codes: np.ndarray, names: Sequence[Any]) -> pd.Series:
    names = list(names)
    if (codes < 0).any():
        codes, names = np.where(codes < 0, len(names), codes), [*names, MISSING]
    once = list(dict.fromkeys(names))  # 1 and "1" read alike, and a value may be called "(other)"
    codes = np.array([once.index(name) for name in names], np.int64)[codes]
    return pd.Series(pd.Categorical.from_codes(codes, categories=pd.Index(once), ordered=True))
