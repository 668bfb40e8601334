"""How often each event happens in the training rows, which is where the heads of a model start.

A head that starts at even odds spends its first steps learning that a like is rare, and its gradient drowns that of
the rest meanwhile; so the last bias starts at the log-odds of the event (Lin et al., *Focal Loss for Dense Object
Detection*, ICCV 2017, section 3.3: "a prior for the rare class at the start of training").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mtcl_torchrec.data.fitting import summarise
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.stream import Window, WindowSource
from mtcl_torchrec.schema import Task, chain_links

PRIOR = 0.5  # rows of each class beside those that were counted (Krichevsky and Trofimov, 1981)
SAMPLE_ROWS = 2_000_000  # of a stream; a share of .005 is then known to one part in a hundred

BaseRates = dict[str, float | tuple[float, ...]]
Labels = tuple[torch.Tensor, torch.Tensor | None]


class LabelTotals:
    """Counts of the labels that train each task, weighted as its loss weights them.

    A missing or masked label counts nowhere, a row as much as its sample weight says; the child of a chain is counted
    where its parent's event happened.  `Task.negative_rate` and `Task.pos_weight` change nothing: the loss undoes them,
    so that a model's logits are those of all rows.  Nor does a regression task: its label is standardised.

    Args:
        tasks: all tasks, in the order of the label columns, multiclass ones with their number of classes.

    Example:
        >>> totals = LabelTotals([Task.binary("click"), Task.binary("buy", after="click"), Task.regression("seconds")])
        >>> totals.add((torch.tensor([[1.0, 1.0, 9.0], [1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [float("nan")] * 3]), None))
        >>> totals.counts[0].tolist(), totals.counts[1].tolist()
        ([1.0, 2.0], [1.0, 1.0])
        >>> totals.base_rates()
        {'click': 0.625, 'buy': 0.3125}
    """

    complete = False  # further rows always tell more

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)
        self._parents = dict(chain_links(tasks))
        kinds = {"binary": 2, "regression": 0}
        self.counts = [np.zeros(kinds.get(task.kind, task.out_features)) for task in tasks]
        self.rows = np.zeros(len(tasks), dtype=np.int64)

    def add(self, labels: Labels) -> None:
        """Count some rows.

        Args:
            labels: (N, T) float32, NaN where missing or masked out, with the zeros that chains imply; and sample
                weights (N, T), or None where all are 1.
        """
        of, given = labels
        for i, counts in enumerate(self.counts):
            column = of[:, i].numpy()
            counted = ~np.isnan(column)
            if given is not None:
                counted &= given[:, i].numpy() > 0
            if i in self._parents:
                counted &= of[:, self._parents[i]].numpy() == 1
            if len(counts) == 0 or not counted.any():
                continue
            weights = None if given is None else given[:, i].numpy()[counted].astype(np.float64)
            counts += np.bincount(column[counted].astype(np.int64), weights, minlength=len(counts))
            self.rows[i] += np.count_nonzero(counted)

    def merge(self, other: LabelTotals) -> None:
        """Count the rows that `other` counted, too."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.rows = self.rows + other.rows

    def base_rates(self) -> BaseRates:
        """Task -> probability of its event over all rows, or of each class; never 0 or 1, as half a row of each kind
        is added to those that were counted.  A task without a label that counts is left out, and so is what comes after
        it in a chain.
        """
        rates: BaseRates = {}
        in_order = [i for i in range(len(self.tasks)) if i not in self._parents] + list(self._parents)
        for i in in_order:
            task, counts = self.tasks[i], self.counts[i]
            if len(counts) == 0 or self.rows[i] == 0:
                continue
            prior = PRIOR * counts.sum() / self.rows[i]  # in the unit of the weights
            shares = (counts + prior) / (counts + prior).sum()
            if task.kind == "multiclass":
                rates[task.name] = tuple(shares.tolist())
            elif task.after is None:
                rates[task.name] = float(shares[1])
            elif isinstance(of_parent := rates.get(task.after), float):
                rates[task.name] = of_parent * float(shares[1])
        return rates


@dataclass(frozen=True)
class _LabelWindows:
    """Windows of a source of which only labels are made, on the threads that read."""

    source: WindowSource
    chosen: Sequence[Window]
    labels: Callable[[Rows], Labels]

    def windows(self) -> Sequence[Window]:
        return self.chosen

    def read(self, window: Window) -> Labels:
        return self.labels(self.source.read(window))


def stream_totals(
    source: WindowSource,
    tasks: Sequence[Task],
    labels: Callable[[Rows], Labels],
    *,
    workers: int = 1,
    sample_rows: int = SAMPLE_ROWS,
) -> LabelTotals:
    """Totals of a stream, from evenly spaced windows of it that hold `sample_rows` or a few more, or all there are.

    In a process group every rank calls this, reads its part, and gets the whole.

    Args:
        source: of the tasks' columns.
        labels: rows to labels and sample weights, see `LabelTotals.add`; called on several threads.
        workers: threads that read ahead.

    Raises:
        DataError: what a rank found wrong, on every rank.
    """
    windows = source.windows()
    rows = sum(window.rows for window in windows)
    wanted = min(len(windows), max(1, -(-sample_rows * len(windows) // max(rows, 1))))
    chosen = [windows[i * len(windows) // wanted] for i in range(wanted)] if windows else []
    return summarise(LabelTotals(tasks), _LabelWindows(source, chosen, labels), workers)
