"""What an item usually gets: the one popularity that a run, its report, `mtcl fuse` and `mtcl baselines` speak of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.schema import Schema, Task

# Rows of the mean rate that each item is given besides its own.  On KuaiRand, 10 to 100 come to the same: within .002
# of AUC for events from 2 % to 44 %, so that there is nothing to tune.
SMOOTHING = 20.0
_RATES, _USUAL, _COUNTED, _KEY, _RATE = "rates.parquet", "usual_rates.json", "counted_by.json", "item", "rate."


@dataclass(frozen=True)
class Popularity:
    """How popular each item is for each event: (Σ wy + m·p̄) / (Σ w + m) over its training rows, m = `SMOOTHING`, with
    weights w as in the loss, 1 on average.

    A share, not a count: how often an item was shown says less of whether it is liked.  Of a regression it is the
    item's smoothed mean label.  No item is popular for a class: of a multiclass task, the shares p̄ hold for all items.
    An item without a training row gets p̄, the base rate of all rows, and so does an unknown one.

    Args:
        rates: (items, tasks) float64 by item and name of a binary or regression task.
        usual: task -> p̄, or the shares (C,) of the classes.
        feature: of a stream, whose rows `rates` go by instead of by items; see `mtcl_torchrec.data.item_totals`.
        counts: of a stream, how many counts there were: row r > 0 of the feature was counted as 1 + (r - 1) mod
            (counts - 1).

    Example:
        >>> labels = np.array([[1.0], [0.0], [1.0], [np.nan]])
        >>> found = Popularity.count(pd.Series(["a", "a", "b", "b"]), [Task.binary("click")], labels, smoothing=1)
        >>> found.of(pd.Series(["a", "b", "new"]))["click"].round(3)
        array([0.556, 0.833, 0.667], dtype=float32)
    """

    rates: pd.DataFrame
    usual: Mapping[str, float | Sequence[float]]
    feature: str | None = None
    counts: int = 0

    @classmethod
    def count(
        cls,
        items: pd.Series,
        tasks: Sequence[Task],
        labels: np.ndarray,
        weights: np.ndarray | None = None,
        smoothing: float = SMOOTHING,
    ) -> Popularity:
        """From training rows.

        Args:
            items: (N,) keys, missing where the item is not known; see `known_items`.
            tasks: in the order of the labels; multiclass ones with their number of classes.
            labels: (N, T) as tasks learn them: NaN where missing or masked out.
            weights: (N, T) of the rows in the losses, of which only their ratios count; None where all are alike.
            smoothing: m.
        """
        codes, keys = pd.factorize(items)
        rates, usual = dict[str, np.ndarray](), dict[str, float | Sequence[float]]()
        for column, task in enumerate(tasks):
            known = ~np.isnan(labels[:, column])
            label = labels[known, column].astype(np.float64)
            weight = np.ones(len(label)) if weights is None else weights[known, column].astype(np.float64)
            mean = usual_rate(task, label, weight)
            usual[task.name] = mean.tolist()
            if task.kind != "multiclass":
                weight = weight / (weight.mean() if weight.any() else 1.0)  # m is of rows as they are on average
                at = codes[known] + 1  # the first is no item
                sums, rows = (np.bincount(at, of, minlength=len(keys) + 1)[1:] for of in (weight * label, weight))
                rates[task.name] = (sums + smoothing * float(mean)) / (rows + smoothing)
        return cls(pd.DataFrame(rates, index=pd.Index(keys)), usual)

    def of_rows(self, items: pd.Series, encoded: EncodedRows) -> dict[str, np.ndarray]:
        """As `of`, of N rows that were encoded by the preprocessing that the training rows were.

        Args:
            items: (N,) their items.
            encoded: the same rows.
        """
        if self.feature is None:
            return self.of(items)
        return self.of(pd.Series(counted_as(encoded.first_values(self.feature), self.counts).numpy()))

    def of(self, items: pd.Series, tasks: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Binary and regression task -> (N,) float32 of the items of N rows.

        Args:
            tasks: these only.
        """
        place = pd.Series(np.arange(len(self.rates), dtype=np.float64), index=self.rates.index)
        at = items.map(place).astype("float64").fillna(-1).to_numpy().astype(np.int64)
        names = list(map(str, self.rates.columns)) if tasks is None else tasks
        means = {name: np.r_[self.rates[name].to_numpy(), np.array(self.usual[name])] for name in names}
        return {name: of[at].astype(np.float32) for name, of in means.items()}

    def save(self, folder: Path) -> None:
        """Write Parquet and JSON into a folder that is there."""
        kept = self.rates.add_prefix(_RATE).rename_axis(_KEY).reset_index()
        kept.to_parquet(folder / _RATES, index=False)
        (folder / _USUAL).write_text(json.dumps(dict(self.usual)))
        if self.feature is not None:
            (folder / _COUNTED).write_text(json.dumps({"feature": self.feature, "counts": self.counts}))

    @classmethod
    def load(cls, folder: Path) -> Popularity | None:
        """Read what `save` wrote; None where it wrote nothing."""
        if not (folder / _RATES).is_file():
            return None
        kept = pd.read_parquet(folder / _RATES).set_index(_KEY)
        kept.columns = pd.Index([name.removeprefix(_RATE) for name in kept.columns])
        by = json.loads((folder / _COUNTED).read_text()) if (folder / _COUNTED).is_file() else {}
        return cls(kept, json.loads((folder / _USUAL).read_text()), **by)


def counted_as(rows: torch.Tensor, counts: int) -> torch.Tensor:
    """(N,) int64: as which of so many counts rows of an item feature are counted; 0, of what is unknown, apart.

    Example:
        >>> counted_as(torch.tensor([0, 1, 2, 3, 4, -1]), 3)
        tensor([0, 1, 2, 1, 2, 0])
    """
    return torch.where(rows > 0, 1 + (rows - 1) % max(counts - 1, 1), 0)


def usual_rate(task: Task, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What is predicted of a row of which nothing is known: the mean label (), or the classes' shares (C,).

    A class that no row has still has a little, so that it is not impossible.  Without a label, an event is as likely
    as not.

    Args:
        labels, weights: (N,) of the training rows whose label is known.

    Example:
        >>> usual_rate(Task.binary("click"), np.array([1.0, 0.0]), np.array([3.0, 1.0]))
        array(0.75)
    """
    if task.kind == "multiclass":
        counts = np.bincount(labels.astype(np.int64), weights, minlength=task.out_features) + 1 / task.out_features
        return counts / counts.sum()
    if weights.sum() == 0:
        return np.array(0.5 if task.kind == "binary" else 0.0)
    return np.array(np.average(labels, weights=weights))


def known_items(schema: Schema, items: pd.Series) -> pd.Series:
    """Items of rows, missing where the schema's item feature says "unknown" (index 0): many items in one.

    Example:
        >>> from mtcl_torchrec.schema import Feature
        >>> item = Feature(name="item", group="item", encoding="index", vocabulary_size=5, embedding_dim=4)
        >>> schema = Schema(features=[item], tasks=[Task.binary("click")], item="item")
        >>> known_items(schema, pd.Series([3, 0])).tolist()
        [3.0, nan]
    """
    feature = next((f for f in schema.sparse_features if f.kind == "id" and f.rows_from == schema.item), None)
    return items.mask(items == 0) if feature is not None and feature.encoding == "index" else items
