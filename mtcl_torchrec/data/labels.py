"""What a row is to teach: labels of the tasks and their weights, the request it belongs to, a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mtcl_torchrec.data.columns import FLOAT32_MAX, hashed, ids_of, numbers, plain_of, refuse
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, Task, chain_links


def labels_of(
    rows: Rows, tasks: Sequence[Task], classes: Callable[[Rows, Task], np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Labels (N, T) float32, NaN where missing or masked out, and sample weights (N, T), None where all are 1.

    Args:
        classes: the label (N,) of a multiclass task whose classes are the values of a feature.

    Raises:
        DataError: names the file, row and column of the first value that is no label, or no weight.
    """
    labels, weights = [], []
    any_weight = any(task.sample_weight for task in tasks)
    for task in tasks:
        labels.append(classes(rows, task) if task.item_class is not None else _label32(rows, task))
        if task.sample_weight is not None:
            given = numbers(rows, task.sample_weight, f"sample weight of task {task.name!r}")
            rule = "a sample weight is a number of at least 0"
            refuse(rows, ~((given >= 0) & (given <= FLOAT32_MAX)), task.sample_weight, rule)
            weights.append(given.astype(np.float32))
        elif any_weight:
            weights.append(np.ones(len(rows), np.float32))
    fill_known_zeros(rows, tasks, labels)
    return torch.from_numpy(np.stack(labels, 1)), torch.from_numpy(np.stack(weights, 1)) if any_weight else None


def requests_of(rows: Rows, column: str | None) -> torch.Tensor | None:
    """(N,) int64 keys of the requests, the same in whatever part of the data a request is met, -1 where missing."""
    if column is None:
        return None
    hashes, codes = hashed(ids_of(rows, column))
    return torch.from_numpy(np.r_[(hashes >> np.uint64(1)).astype(np.int64), -1][codes])


def rewards_of(rows: Rows, column: str | None) -> torch.Tensor | None:
    """(N,) float32: what the fused score is trained against, NaN where it is not known."""
    if column is None:
        return None
    given = numbers(rows, column, "reward")
    refuse(rows, (given < 0) | (given > 1), column, "a reward is a number from 0 to 1")
    return torch.from_numpy(given.astype(np.float32))


def _label32(rows: Rows, task: Task) -> np.ndarray:
    """(N,) float32: as `label_of`, with fewer passes where the file has integers that all count and fit."""
    if task.mask is None and task.kind != "regression":
        found = plain_of(rows, task.label_column)
        most = 1 if task.kind == "binary" else task.out_features - 1
        if found is not None and found.dtype.kind in "iub" and len(found) and found.min() >= 0 and found.max() <= most:
            return found.astype(np.float32)
    return label_of(rows, task).astype(np.float32)


def label_of(rows: Rows, task: Task) -> np.ndarray:
    """(N,) float64: a task's label, NaN where missing or masked out.

    Raises:
        DataError: a label that counts is none of this kind of task.
    """
    what = f"label of task {task.name!r}"
    if task.kind == "multiclass":
        what += "; classes that are text are values of an id feature: item_class: FEATURE"
    label = numbers(rows, task.label_column, what)
    if task.mask is not None:
        label = np.where(unmasked(rows, task), label, np.nan)
    present = ~np.isnan(label)
    if task.kind == "binary":
        fits, rule = (label == 0) | (label == 1), f"a label of binary task {task.name!r} is 0 or 1"
    elif task.kind == "multiclass":
        fits = (label >= 0) & (label < task.out_features) & (label == np.floor(label))
        rule = f"a label of multiclass task {task.name!r} is an integer from 0 to {task.out_features - 1}"
    else:
        fits, rule = np.abs(label) <= FLOAT32_MAX, "a regression label is finite"
    refuse(rows, present & ~fits, task.label_column, rule)
    return label


def unmasked(rows: Rows, task: Task) -> np.ndarray:
    """(N,) bool: where the task's label counts."""
    if task.mask is None:
        return np.ones(len(rows), bool)
    return np.nan_to_num(numbers(rows, task.mask, f"mask of task {task.name!r}")) != 0


def fill_known_zeros(rows: Rows, tasks: Sequence[Task], labels: list[np.ndarray]) -> None:
    """In place: a label of a chain is 0 where the event before it did not happen, instead of missing.

    Args:
        tasks: all tasks.
        labels: (N,) of each, NaN where missing or masked out.

    Raises:
        DataError: an event is said to have happened without the one before it.
    """
    links = dict(chain_links(tasks))
    if not links:
        return
    never = [label == 0 for label in labels]
    for child, parent in links.items():
        alone = never[parent] & (labels[child] == 1)
        if alone.any():
            at, before = int(np.argmax(alone)), parent
            while before in links and never[links[before]][at]:  # its own 0 may be one that was filled in
                before = links[before]
            task, missing = tasks[child], tasks[before]
            raise DataError(
                f"{rows.locate(at)}: {task.label_column} = 1 and {missing.label_column} = 0; task {task.name!r} comes "
                f"after {missing.name!r} and cannot happen without it"
            )
        labels[child] = np.where(np.isnan(labels[child]) & never[parent], 0.0, labels[child]).astype(
            labels[child].dtype
        )
        never[child] |= never[parent]
