"""Columns to tensors: vocabularies, hashing, numbers, labels.  Learnt on the training split, stored with the model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import Bag, EncodedRows
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, Feature, Group, Schema, Task, nearest

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class FeatureEncoder:
    """Turns rows of a schema's columns into `EncodedRows`.

    Sparse features become row numbers of embedding tables; 0 is the row of unknown and missing values.  Dense features
    are transformed, standardised with the training split's mean and standard deviation and clipped; a missing value
    becomes 0 (the mean), and features that were missing anywhere in the training split get a second column that marks
    it.

    Example:
        >>> schema = Schema(
        ...     features=[Feature(name="city", group="user"), Feature(name="age", group="user", kind="dense")],
        ...     tasks=[Task.binary("click")],
        ... )
        >>> train = pd.DataFrame({"city": ["Rome", "Oslo"], "age": [20.0, 40.0], "click": [0, 1]})
        >>> encoder = FeatureEncoder(schema).fit(Rows(train))
        >>> rows = encoder.encode(Rows(pd.DataFrame({"city": ["Oslo", "Bern"], "age": [30.0, None], "click": [1, 0]})))
        >>> rows.ids.tolist(), rows.dense.tolist(), rows.labels.tolist()
        ([[1], [0]], [[0.0], [0.0]], [[1.0], [0.0]])
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._vocabularies: dict[str, pd.Index] = {}
        self._dense: dict[str, tuple[float, float, bool]] = {}
        self._label_scale: dict[str, tuple[float, float]] = {}

    # ------------------------------------------------------------------ what the model needs to know

    @property
    def keys(self) -> tuple[str, ...]:
        """The sparse features in the order of the KeyedJaggedTensor: table by table."""
        return tuple(f.name for features in self.schema.tables().values() for f in features)

    def num_embeddings(self, table: str) -> int:
        """Rows of an embedding table, row 0 included."""
        feature = self.schema.tables()[table][0]
        if table in self._vocabularies and feature.vocabulary_size is None:
            return len(self._vocabularies[table]) + 1
        assert feature.vocabulary_size is not None
        return feature.vocabulary_size

    @property
    def dense_groups(self) -> tuple[tuple[Group, ...], ...]:
        """The groups of each dense column."""
        groups: list[tuple[Group, ...]] = []
        for feature in self.schema.dense_features:
            groups += [feature.group] * (2 if self._dense[feature.name][2] else 1)
        return tuple(groups)

    def resolved_tasks(self) -> tuple[Task, ...]:
        """The schema's tasks; regression tasks with the mean and spread of their training labels, multiclass tasks with
        their number of classes."""
        tasks = []
        features = {f.name: f for f in self.schema.sparse_features}
        for task in self.schema.tasks:
            if task.kind == "multiclass" and task.num_classes is None:
                assert task.item_class is not None
                rows = self.num_embeddings(features[task.item_class].table_name)
                if rows < 2:
                    raise DataError(f"task {task.name!r}: column {task.item_class!r} holds no class at all")
                task = task.model_copy(update={"num_classes": rows})
            if task.name in self._label_scale:
                mean, std = self._label_scale[task.name]
                task = task.model_copy(update={"mean": mean, "std": std})
            tasks.append(task)
        return tuple(tasks)

    # ------------------------------------------------------------------ learning from the training split

    def fit(self, rows: Rows) -> FeatureEncoder:
        """Learn vocabularies and scales from the training split.

        Raises:
            DataError: a vocabulary is larger than its table, or a column does not hold what the schema says.
        """
        for table, features in self.schema.tables().items():
            if features[0].encoding == "vocabulary":
                self._vocabularies[table] = self._build_vocabulary(table, features, rows)
        for feature in self.schema.dense_features:
            values = _transformed(feature, rows)
            missing = feature.mark_missing and bool(np.isnan(values).any())
            if np.isnan(values).all():
                raise DataError(f"{rows.name}: dense column {feature.rows_from!r} holds no value at all")
            self._dense[feature.name] = (*_mean_and_std(values), missing)
        for task in self.schema.tasks:
            if task.kind == "regression":
                label = _label(rows, task)
                if np.isnan(label).all():
                    raise DataError(f"{rows.name}: label column {task.label_column!r} holds no value at all")
                mean, std = _mean_and_std(label)
                self._label_scale[task.name] = (
                    task.mean if task.mean is not None else mean,
                    task.std if task.std is not None else std,
                )
        return self

    def _build_vocabulary(self, table: str, features: Sequence[Feature], rows: Rows) -> pd.Index:
        parts = []
        for feature in features:
            column = _column(rows, feature.rows_from)
            parts.append(_split_bag(feature, column)[0] if feature.kind == "bag" else canonical(column))
        if len({pd.api.types.is_numeric_dtype(part) for part in parts if part.notna().any()}) > 1:
            parts = [as_text(part) for part in parts]
        values = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
        if pd.api.types.infer_dtype(values, skipna=True).startswith("mixed"):
            values = as_text(values)
        counts = values.dropna().value_counts()
        known = counts.index[counts.to_numpy() >= features[0].min_count]
        known = pd.Index(sorted(known)) if not known.empty else known
        size = features[0].vocabulary_size
        if size is not None and len(known) + 1 > size:
            raise DataError(
                f"table {table!r}: the training split has {len(known):,} values, vocabulary_size {size:,} holds "
                f"{size - 1:,} beside 'unknown'; raise it, set min_count, or use encoding: hash"
            )
        return known

    # ------------------------------------------------------------------ encoding

    def encode(self, rows: Rows, *, with_labels: bool = True) -> EncodedRows:
        """Encode rows.

        Args:
            rows: the schema's columns.
            with_labels: False for rows to be scored: labels are all NaN then.

        Raises:
            DataError: names the column, and the file and row, of the first value that does not fit.
        """
        ids, bags = [], {}
        features = {f.name: f for f in self.schema.sparse_features}
        for key in self.keys:
            feature = features[key]
            column = _column(rows, feature.rows_from)
            if feature.kind == "id":
                _refuse_lists(rows, feature.rows_from)
                ids.append(self._row_numbers(feature, canonical(column), rows))
            else:
                values, lengths = _split_bag(feature, column)
                owner = np.repeat(np.arange(len(rows)), lengths)
                numbers = self._row_numbers(feature, values, rows, owner)
                offsets = np.r_[0, np.cumsum(lengths)]
                bags[key] = Bag(torch.from_numpy(numbers), torch.from_numpy(offsets.astype(np.int64)))
        dense = [c for f in self.schema.dense_features for c in self._dense_columns(f, rows)]
        labels, weights = self._labels(rows) if with_labels else (self._no_labels(len(rows)), None)
        return EncodedRows(
            dense=torch.from_numpy(np.stack(dense, 1)) if dense else torch.empty(len(rows), 0),
            keys=self.keys,
            ids=torch.from_numpy(np.stack(ids, 1)) if ids else torch.empty(len(rows), 0, dtype=torch.int64),
            bags=bags,
            labels=labels,
            weights=weights,
        )

    def _row_numbers(
        self, feature: Feature, values: pd.Series, rows: Rows, owner: np.ndarray | None = None
    ) -> np.ndarray:
        missing = values.isna().to_numpy(dtype=bool)
        size = self.num_embeddings(feature.table_name)
        if feature.encoding == "vocabulary":
            vocabulary = self._vocabularies[feature.table_name]
            return vocabulary.get_indexer(pd.Index(_like(values, vocabulary))).astype(np.int64) + 1
        if feature.encoding == "hash":
            hashed = pd.util.hash_array(as_text(values).to_numpy(dtype=object)) % np.uint64(size - 1)
            return np.where(missing, 0, hashed.astype(np.int64) + 1)
        plain = pd.to_numeric(values, errors="coerce").astype("Float64")
        numbers = plain.to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~missing & ~((numbers >= 0) & (numbers < size) & (numbers == np.floor(numbers)))
        if wrong.any():
            at = int(np.argmax(wrong))
            row = at if owner is None else int(owner[at])
            raise DataError(
                f"{rows.locate(row)}: {feature.rows_from} = {_shown(values, at)} lies outside its table of {size:,} "
                f"rows (encoding 'index' takes integers from 0 to {size - 1:,})"
            )
        return np.where(missing, 0, numbers).astype(np.int64)

    def _dense_columns(self, feature: Feature, rows: Rows) -> list[np.ndarray]:
        mean, std, marks_missing = self._dense[feature.name]
        values = (_transformed(feature, rows) - mean) / std
        missing = np.isnan(values)
        values = np.clip(np.where(missing, 0.0, values), -feature.clip, feature.clip).astype(np.float32)
        return [values, missing.astype(np.float32)] if marks_missing else [values]

    def _labels(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        labels, weights = [], []
        for task in self.schema.tasks:
            if task.item_class is not None:
                labels.append(self._classes(rows, task))
            else:
                labels.append(_label(rows, task).astype(np.float32))
            weight = np.ones(len(rows), np.float32)
            if task.sample_weight is not None:
                what = f"sample weight of task {task.name!r}"
                given = _numbers(rows, task.sample_weight, what)
                _refuse(rows, ~((given >= 0) & (given <= _FLOAT32_MAX)), task.sample_weight,
                        "a sample weight is a number of at least 0")  # fmt: skip
                weight = given.astype(np.float32)
            weights.append(weight)
        any_weight = any(task.sample_weight for task in self.schema.tasks)
        return (
            torch.from_numpy(np.stack(labels, 1)),
            torch.from_numpy(np.stack(weights, 1)) if any_weight else None,
        )

    def _classes(self, rows: Rows, task: Task) -> np.ndarray:
        """A multiclass label as the row that the item's own class would have; row 0, unknown, is no label."""
        own = next(f for f in self.schema.sparse_features if f.name == task.item_class)
        feature = own.model_copy(update={"column": task.label_column})
        _refuse_lists(rows, feature.rows_from)
        numbers = self._row_numbers(feature, canonical(_column(rows, feature.rows_from)), rows)
        if task.num_classes is not None:
            _refuse(rows, numbers >= task.num_classes, feature.rows_from,
                    f"its row lies outside the {task.num_classes} classes of task {task.name!r}")  # fmt: skip
        counts = (numbers > 0) & _unmasked(rows, task)
        return np.where(counts, numbers, np.nan).astype(np.float32)

    def _no_labels(self, n: int) -> torch.Tensor:
        return torch.full((n, len(self.schema.tasks)), float("nan"))

    # ------------------------------------------------------------------ stored with the model

    def save(self, folder: Path) -> None:
        """Write the schema, the scales (JSON) and the vocabularies (Parquet)."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "schema": self.schema.model_dump(mode="json", exclude_unset=True),
            "dense": self._dense,
            "label_scale": self._label_scale,
            "vocabularies": list(self._vocabularies),
        }
        (folder / "encoder.json").write_text(json.dumps(about, indent=1))
        for i, vocabulary in enumerate(self._vocabularies.values()):
            pd.DataFrame({"value": vocabulary}).to_parquet(folder / f"vocabulary_{i}.parquet")

    @classmethod
    def load(cls, folder: Path) -> FeatureEncoder:
        """Read what `save` wrote."""
        about = json.loads((folder / "encoder.json").read_text())
        self = cls(Schema.model_validate(about["schema"]))
        self._dense = {k: (v[0], v[1], v[2]) for k, v in about["dense"].items()}
        self._label_scale = {k: (v[0], v[1]) for k, v in about["label_scale"].items()}
        for i, table in enumerate(about["vocabularies"]):
            self._vocabularies[table] = pd.Index(pd.read_parquet(folder / f"vocabulary_{i}.parquet")["value"])
        return self


def _column(rows: Rows, column: str) -> pd.Series:
    if column not in rows.frame:
        raise DataError(f"{rows.name}: no column {column!r}{nearest(column, map(str, rows.frame.columns))}")
    return rows.frame[column]


def _refuse_lists(rows: Rows, column: str) -> None:
    values = _column(rows, column)
    if values.dtype == object:
        lists = values.map(lambda v: isinstance(v, (list, tuple, np.ndarray))).to_numpy(dtype=bool)
        _refuse(rows, lists, column, "one value is expected; a column of lists is kind: bag")


def canonical(values: pd.Series) -> pd.Series:
    """Ids in their own kind again: a reader turns them into floats or objects where some are missing."""
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
    """Values as text, the same for 5, 5.0 and "5"; missing ones stay missing."""
    if isinstance(values.dtype, pd.StringDtype):
        return values
    if pd.api.types.is_integer_dtype(values):
        return values.astype(str).astype(object).where(values.notna())
    return values.astype(object).map(
        lambda x: str(int(x)) if isinstance(x, float) and x.is_integer() else str(x),
        na_action="ignore",
    )


def _like(values: pd.Series, vocabulary: pd.Index) -> pd.Series:
    """Values in the vocabulary's kind, so that "12" finds 12 and 12 finds "12"."""
    if pd.api.types.is_numeric_dtype(vocabulary.dtype):
        if pd.api.types.is_numeric_dtype(values):
            return values
        # Without the missing ones: beside them large integers would become inexact floats.
        present = pd.to_numeric(values[values.notna()], errors="coerce")
        return present.convert_dtypes().reindex(values.index)
    textual = pd.api.types.infer_dtype(vocabulary) == "string"
    return as_text(values) if textual else values


def _split_bag(feature: Feature, column: pd.Series) -> tuple[pd.Series, np.ndarray]:
    """All values of a bag column one after the other, and how many each row has."""

    def parts(row: Any) -> list[Any]:
        if isinstance(row, str):
            return [part for part in row.split(feature.separator) if part]
        if isinstance(row, np.ndarray):
            return row.tolist()
        if isinstance(row, (list, tuple)):
            return list(row)
        # A file in which no row has two values is read as plain numbers: bags of one.
        return [] if pd.isna(row) else [row]

    lists = [parts(row) for row in canonical(column).tolist()]
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    values = list(chain.from_iterable(lists))
    return canonical(pd.Series(values, dtype=None if values else object)), lengths


def _mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Of the values that are present; a constant has no spread, whatever its rounding error."""
    mean, std = float(np.nanmean(values)), float(np.nanstd(values))
    rounding = np.count_nonzero(~np.isnan(values)) * np.finfo(np.float64).eps * abs(mean)
    return mean, std if std > max(rounding, np.finfo(np.float64).tiny) else 1.0


def _label(rows: Rows, task: Task) -> np.ndarray:
    """(N,) float64, NaN where missing or masked out; what counts is checked."""
    label = _numbers(rows, task.label_column, f"label of task {task.name!r}")
    label = np.where(_unmasked(rows, task), label, np.nan)
    present = ~np.isnan(label)
    if task.kind == "binary":
        fits, rule = (label == 0) | (label == 1), f"a label of binary task {task.name!r} is 0 or 1"
    elif task.kind == "multiclass":
        fits = (label >= 0) & (label < task.out_features) & (label == np.floor(label))
        rule = f"a label of multiclass task {task.name!r} is an integer from 0 to {task.out_features - 1}"
    else:
        fits, rule = np.abs(label) <= _FLOAT32_MAX, "a regression label is finite"
    _refuse(rows, present & ~fits, task.label_column, rule)
    return label


def _unmasked(rows: Rows, task: Task) -> np.ndarray:
    """(N,) bool: where the task's label counts."""
    if task.mask is None:
        return np.ones(len(rows), bool)
    return np.nan_to_num(_numbers(rows, task.mask, f"mask of task {task.name!r}")) != 0


def _numbers(rows: Rows, column: str, what: str) -> np.ndarray:
    values = canonical(_column(rows, column))
    if not pd.api.types.is_numeric_dtype(values):
        if pd.api.types.is_datetime64_any_dtype(values) or values.dtype.kind == "m":
            raise DataError(f"{rows.name}: column {column!r} holds times, no numbers ({what})")
        numeric = pd.to_numeric(values, errors="coerce")
        wrong = (numeric.isna() & values.notna()).to_numpy(dtype=bool)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(f"{rows.locate(at)}: {column} = {_shown(values, at)} is no number ({what})")
        values = numeric
    return values.to_numpy(dtype=np.float64, na_value=np.nan)


def _transformed(feature: Feature, rows: Rows) -> np.ndarray:
    values = _numbers(rows, feature.rows_from, f"dense feature {feature.name!r}")
    _refuse(rows, np.isinf(values), feature.rows_from, "a dense value is finite")
    if feature.transform == "log":
        return np.sign(values) * np.log1p(np.abs(values))
    if feature.transform == "logit":
        _refuse(rows, (values < 0) | (values > 1), feature.rows_from, "transform 'logit' takes rates from 0 to 1")
        rate = np.clip(values, 1e-6, 1 - 1e-6)
        return np.log(rate / (1 - rate))
    return values


def _shown(values: pd.Series, at: int) -> str:
    """A value for a message, as its file has it: 7 and not np.int64(7)."""
    value = values.iloc[at]
    return repr(value.item() if isinstance(value, np.generic) else value)


def _refuse(rows: Rows, wrong: np.ndarray, column: str, rule: str) -> None:
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(f"{rows.locate(at)}: {column} = {_shown(rows.frame[column], at)}; {rule}")
