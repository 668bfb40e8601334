"""Columns to tensors: rows of tables, numbers, labels, by what was learnt on the training split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.columns import (
    as_integers,
    column_of,
    dense_values,
    hashed,
    ids_of,
    plain_of,
    refuse,
    shown,
    split_bag,
)
from mtcl_torchrec.data.contents import VectorRows
from mtcl_torchrec.data.earlier import Earlier
from mtcl_torchrec.data.jagged import Bag, Jagged
from mtcl_torchrec.data.labels import labels_of, requests_of, rewards_of, unmasked
from mtcl_torchrec.data.learning import Learnt
from mtcl_torchrec.data.list_histories import Listed, age_rows, listed_histories
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.spans import ages_of, spans_of
from mtcl_torchrec.data.vocabulary import table_rows
from mtcl_torchrec.schema import DataError, Feature, Task


class FeatureEncoder(Learnt):
    """Turns rows of a schema's columns into `EncodedRows`.

    Sparse features become row numbers of embedding tables; 0 is the row of unknown and missing values.  Dense features
    are transformed, standardised with the training split's mean and standard deviation and clipped; a missing value
    becomes 0 (the mean), and features that were missing anywhere in the training split get a second column that marks
    it.

    Example:
        >>> from mtcl_torchrec.schema import Schema
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

    def encode(self, rows: Rows, *, with_labels: bool = True, with_rewards: bool = True) -> EncodedRows:
        """Encode rows.

        Args:
            rows: the schema's columns.
            with_labels: False for rows to be scored: labels are all NaN then.
            with_rewards: False for rows to be evaluated: what the fused score is trained against is not read then.

        Raises:
            DataError: names the column, and the file and row, of the first value that does not fit.
        """
        ids, bags = list[np.ndarray](), dict[str, Jagged]()
        features = {f.name: f for f in self.schema.sparse_features}
        lists = listed_histories(rows, self.schema)
        for key in self.keys:
            feature = features[key]
            if feature.kind == "id":
                ids.append(self._id_rows(feature, rows))
            elif feature.kind == "history":
                bags[key] = self._history(feature, rows, lists[key])
            elif feature.has_content:
                contents, values = self._contents[key], ids_of(rows, feature.rows_from)
                if isinstance(contents, VectorRows):
                    ids.append(contents.rows(values))
                else:
                    numbers, lengths = contents.jagged(values)
                    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
                    bags[key] = Bag(torch.from_numpy(numbers), torch.from_numpy(offsets))
            else:
                values, lengths = split_bag(feature, column_of(rows, feature.rows_from))
                owner = np.repeat(np.arange(len(rows)), lengths)
                offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
                found = torch.from_numpy(self._row_numbers(feature, values, rows, owner))
                bags[key] = Bag(found, torch.from_numpy(offsets))
        labels, weights = self.labels(rows) if with_labels else (self._no_labels(len(rows)), None)
        return EncodedRows(
            dense=torch.from_numpy(self._dense_rows(rows)),
            keys=self.keys,
            # Column by column, as a batch has them; (N, F) all the same.
            ids=torch.from_numpy(np.stack(ids)).T if ids else torch.empty(len(rows), 0, dtype=torch.int64),
            bags=bags,
            labels=labels,
            weights=weights,
            requests=requests_of(rows, self.schema.request_column) if with_labels else None,
            rewards=rewards_of(rows, self.schema.reward) if with_labels and with_rewards else None,
        )

    def labels(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Labels (N, T) float32, NaN where missing or masked out, and sample weights (N, T), None where all are 1.

        Args:
            rows: at least the columns of `Schema.label_columns`.

        Raises:
            DataError: as `encode`.
        """
        return labels_of(rows, self.schema.tasks, self._label_classes)

    def _history(self, feature: Feature, rows: Rows, lists: Listed | Earlier) -> Jagged:
        """A history's or companion's values as row numbers."""
        size = self._table_size(feature)
        if isinstance(lists, Earlier):
            if lists.values is None:
                return ages_of(lists, size)
            return spans_of(lists, self._row_numbers(feature, lists.values, rows, lists.first_owner()))
        if feature.encoding == "log_bucket":
            found = age_rows(feature, lists, rows, size)
        else:
            found = self._row_numbers(feature, lists.values, rows, lists.owner)
        return Bag.of(torch.from_numpy(found), torch.from_numpy(lists.lengths))

    def coverage(self, rows: EncodedRows) -> list[tuple[Feature, float]]:
        """Each feature with content, and the share of encoded rows that have some."""
        covered = self.covered(rows)
        return [(feature, float(there.mean()) if len(rows) else 1.0) for feature, there in covered]

    def covered(self, rows: EncodedRows) -> list[tuple[Feature, np.ndarray]]:
        """Each feature with content, and which of the encoded rows have some, (N,) bool."""
        found, single = [], [key for key in rows.keys if key not in rows.bags]
        for feature in (f for f in self.schema.features if f.has_content):
            if feature.name in rows.bags:
                there = rows.bags[feature.name].all()[1] > 0
            else:
                there = rows.ids[:, single.index(feature.name)] > 0
            found.append((feature, there.numpy()))
        return found

    def _id_rows(self, feature: Feature, rows: Rows) -> np.ndarray:
        """(N,) int64; it may share the memory of the column."""
        if feature.encoding == "index":
            plain = plain_of(rows, feature.rows_from)
            if plain is not None and plain.dtype.kind in "iu" and plain.dtype != np.uint64:
                whole = plain.astype(np.int64, copy=False)
                # Without a sign the negative ones are the largest.
                if whole.view(np.uint64).max(initial=0) < self._table_size(feature):
                    return whole
        return self._row_numbers(feature, ids_of(rows, feature.rows_from), rows)

    def _row_numbers(
        self, feature: Feature, values: pd.Series, rows: Rows, owner: np.ndarray | None = None
    ) -> np.ndarray:
        """(N,) int64."""
        size = self._table_size(feature)
        if feature.encoding == "vocabulary":
            return table_rows(self._vocabularies[feature.table_name], values)
        if feature.encoding == "hash":
            hashes, codes = hashed(values)
            return np.r_[(hashes % np.uint64(size - 1)).astype(np.int64) + 1, 0][codes]
        whole = as_integers(values)
        if whole is not None and (len(whole) == 0 or (whole.min() >= 0 and whole.max() < size)):
            return np.array(whole)
        missing = values.isna().to_numpy(dtype=bool)
        plain = pd.to_numeric(values, errors="coerce").astype("Float64")
        index = plain.to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~missing & ~((index >= 0) & (index < size) & (index == np.floor(index)))
        if wrong.any():
            at = int(np.argmax(wrong))
            row = at if owner is None else int(owner[at])
            raise DataError(
                f"{rows.locate(row)}: {feature.rows_from} = {shown(values, at)} lies outside its table of {size:,} "
                f"rows (encoding 'index' takes integers from 0 to {size - 1:,})"
            )
        return np.where(missing, 0, index).astype(np.int64)

    def _dense_rows(self, rows: Rows) -> np.ndarray:
        """(N, D) float32: dense features, standardised and clipped, and marks of missing values."""
        # A cache line apart, or columns of 2**16 rows share their places in a cache and push each other out of it.
        columns = np.empty((len(self.dense_columns()), len(rows) + 16), np.float32)[:, : len(rows)]
        at = 0
        for feature in self.schema.dense_features:
            mean, std, marks_missing = self._dense[feature.name]
            values = dense_values(feature, rows) - mean
            values /= std
            missing = np.isnan(values)
            np.copyto(values, 0.0, where=missing)
            columns[at] = np.clip(values, -feature.clip, feature.clip, out=values)
            if marks_missing:
                columns[at + 1] = missing
            at += 2 if marks_missing else 1
        return np.ascontiguousarray(columns.T)

    def _label_classes(self, rows: Rows, task: Task) -> np.ndarray:
        """(N,) float32: the row that the item's own class would have; NaN for row 0, unknown, which is no label."""
        own = next(f for f in self.schema.sparse_features if f.name == task.item_class)
        feature = own.model_copy(update={"column": task.label_column})
        classes = self._row_numbers(feature, ids_of(rows, feature.rows_from), rows)
        if task.num_classes is not None:
            refuse(rows, classes >= task.num_classes, feature.rows_from,
                    f"its row lies outside the {task.num_classes} classes of task {task.name!r}")  # fmt: skip
        counts = (classes > 0) & unmasked(rows, task)
        return np.where(counts, classes, np.nan).astype(np.float32)

    def _no_labels(self, n: int) -> torch.Tensor:
        return torch.full((n, len(self.schema.tasks)), float("nan"))
