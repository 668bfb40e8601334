"""What items get, added up while training rows go by: the popularity of a split that is never in memory as a whole.

Nothing is counted ahead of training: what a checkpoint holds are the rows up to its position in the data, to the row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.popularity import SMOOTHING, Popularity, counted_as
from mtcl_torchrec.schema import Task

MOST_ITEMS = 1 << 20  # that are counted apart

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of N rows: as which item each is counted (N,), labels (N, T), and weights (N, T) or None where all are 1."""


class ItemTotals:
    """Sums of labels and weights by item, of the rows that training has taken: a `Popularity` follows from them.

    Rows are shown (`see`) in the order in which they become batches, some of them ahead of training; `take` says how
    many of them were trained on.  They are counted in bulk, a window at a time, and one after the other, so that an
    interruption changes no digit.  Memory: 16 bytes for each item and task, and the labels of the windows that are
    ahead; of more than `most` items, those that share a row number modulo that share their counts.

    Args:
        tasks: in the order of the labels; multiclass ones with their number of classes.
        feature: whose rows tell items apart.
        rows: R, how many there are, 0 ("unknown") among them.
        most: items that are counted apart.

    Example:
        >>> totals = ItemTotals([Task.binary("click")], "item", rows=4)
        >>> labels = torch.tensor([[1.0], [0.0], [float("nan")], [1.0]])
        >>> rows = EncodedRows(torch.empty(4, 0), ("item",), torch.tensor([[0], [1], [3], [3]]), labels.flip(0))
        >>> totals.see(totals.part_of(rows, torch.tensor([3, 2, 1, 0])))
        >>> totals.take(2)
        >>> totals.popularity(smoothing=1).rates
           click
        3    0.5
    """

    def __init__(self, tasks: Sequence[Task], feature: str, rows: int, most: int = MOST_ITEMS) -> None:
        self.tasks, self.feature = tuple(tasks), feature
        self.counts = min(rows, most + 1)
        by_item = [task.name for task in tasks if task.kind != "multiclass"]
        self._sums = {name: torch.zeros(self.counts, dtype=torch.float64) for name in by_item}
        self._weights = {name: torch.zeros(self.counts, dtype=torch.float64) for name in by_item}
        self._classes = {
            task.name: torch.zeros(task.out_features, dtype=torch.float64) for task in tasks if task.name not in by_item
        }
        self._known = torch.zeros(len(self.tasks), dtype=torch.float64)  # rows whose label is known
        self._ahead = deque[Part]()
        self._taken = 0  # rows of those that are ahead

    def part_of(self, rows: EncodedRows, order: torch.Tensor) -> Part:
        """What is counted of rows, copied, so that they themselves do not stay in memory for it; on any thread.

        Args:
            order: (N,) int64, which of the rows, one after the other.
        """
        codes = counted_as(rows.first_values(self.feature)[order], self.counts)
        return codes, rows.labels[order], None if rows.weights is None else rows.weights[order]

    def see(self, part: Part) -> None:
        """Rows that are going to be trained on, after those that were shown before."""
        if len(part[0]):
            self._ahead.append(part)

    def take(self, rows: int) -> None:
        """So many more of the rows that were shown have been trained on; blank ones at the end may be among them."""
        self._taken += rows
        if self._ahead and self._taken >= len(self._ahead[0][0]):
            self._settle()

    def _settle(self) -> None:
        """Count what was taken."""
        while self._ahead and self._taken:
            part = self._ahead.popleft()
            rows = min(self._taken, len(part[0]))
            self._taken -= rows
            now, later = (_cut(part, rows, to_end) for to_end in (False, True))
            self._count(*now)
            if len(later[0]):
                self._ahead.appendleft(later)
        self._taken = 0

    def _count(self, codes: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> None:
        for column, task in enumerate(self.tasks):
            label = labels[:, column].double()
            known = ~label.isnan()
            weight = known.double() if weights is None else torch.where(known, weights[:, column].double(), 0.0)
            label = label.nan_to_num(0.0)
            self._known[column] += int(known.sum())
            if task.kind == "multiclass":
                self._classes[task.name].index_add_(0, label.long(), weight)
            else:  # of one dimension, one row after the other: any cut of the rows gives the same sums to the bit
                self._sums[task.name].index_add_(0, codes, label * weight)
                self._weights[task.name].index_add_(0, codes, weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that was counted of the rows that were taken: float64, to be added to those of other ranks, or set."""
        self._settle()
        found = {"known": self._known}
        for kind, of in (("sum", self._sums), ("weight", self._weights), ("classes", self._classes)):
            found |= {f"{kind}.{name}": tensor for name, tensor in of.items()}
        return found

    def popularity(self, smoothing: float = SMOOTHING) -> Popularity:
        """What follows for all rows that were taken, on all ranks whose `tensors` were added up."""
        self._settle()
        rates, usual = dict[str, np.ndarray](), dict[str, float | Sequence[float]]()
        for column, task in enumerate(self.tasks):
            if task.kind == "multiclass":
                counts = self._classes[task.name].numpy() + 1 / task.out_features  # as `usual_rate` does
                usual[task.name] = (counts / counts.sum()).tolist()
                continue
            sums, weights = self._sums[task.name].numpy(), self._weights[task.name].numpy()
            total, known = float(weights.sum()), float(self._known[column])
            mean = float(sums.sum()) / total if total else (0.5 if task.kind == "binary" else 0.0)
            usual[task.name] = mean
            unit = total / known if total else 1.0  # m is of rows as they are on average
            rates[task.name] = (sums / unit + smoothing * mean) / (weights / unit + smoothing)
        there = [weights.numpy() > 0 for weights in self._weights.values()]
        kept = np.flatnonzero(np.logical_or.reduce(there)) if there else np.empty(0, np.int64)
        kept = kept[kept > 0]  # row 0 is many items in one
        frame = pd.DataFrame({name: of[kept] for name, of in rates.items()}, index=pd.Index(kept))
        return Popularity(frame, usual, feature=self.feature, counts=self.counts)


def _cut(part: Part, rows: int, to_end: bool) -> Part:
    codes, labels, weights = (None if t is None else (t[rows:] if to_end else t[:rows]) for t in part)
    assert codes is not None
    assert labels is not None
    return codes, labels, weights
