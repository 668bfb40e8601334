"""Tasks that are predicted too well to be true, and the features that tell them alone: mostly known only afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.leakage import ALMOST, above_median, auc_alone, codes_of_numbers, some_rows
from mtcl_torchrec.evaluation.confidence import too_few_to_judge
from mtcl_torchrec.schema import Task

PERFECT = {"auc": 0.98, "r2": 0.98, "ne": 0.05}  # from which on a task is predicted too well, whatever tells it
LOOKED_INTO = 0.9  # AUC below which no feature can tell an event almost by itself: the model would, too
_MOST_ROWS = 20_000  # that features are tried on
_NAMED = 3  # features of a task

Metrics = Mapping[str, "float | None"]
Codes = tuple[np.ndarray, "np.ndarray | None"]


def too_good(
    tasks: Sequence[Task], kept: Mapping[str, Metrics], encoder: FeatureEncoder, rows: EncodedRows
) -> list[str]:
    """A line about each task that is predicted too well to be true.

    Args:
        tasks: of the model.
        kept: validation metrics by task, of the kept epoch.
        encoder: of the rows.
        rows: of the validation split, encoded, with labels.
    """
    lines, features = list[str](), dict[str, Codes]()
    for number, task in enumerate(tasks):
        found = kept.get(task.name, {})
        metric = {"binary": "auc", "regression": "r2", "multiclass": "ne"}[task.kind]
        value = found.get(metric)
        if value is None or not np.isfinite(value) or too_few_to_judge(found):
            continue
        perfect = value <= PERFECT[metric] if metric == "ne" else value >= PERFECT[metric]
        if not perfect and (metric != "auc" or value < LOOKED_INTO):
            continue
        at = some_rows(len(rows), _MOST_ROWS)
        features = features or dict(_features(encoder, rows, at))
        event = _event(task, rows.labels[at, number].numpy().astype(np.float64))
        groups = {feature.name: feature.group for feature in encoder.schema.features}
        alone = {
            name: auc_alone(event, *codes) for name, codes in features.items() if set(groups[name]) <= set(task.inputs)
        }
        telling = sorted((name for name in alone if alone[name] >= ALMOST), key=lambda name: -alone[name])
        if perfect or telling:
            lines.append(_line(task.name, metric, value, telling, alone))
    return lines


def _line(task: str, metric: str, value: float, telling: Sequence[str], alone: Mapping[str, float]) -> str:
    said = {"auc": f"AUC {value:.4f}", "r2": f"R² {value:.4f}", "ne": f"NE {value:.4f}"}[metric]
    start = f"{task} is predicted too well to be true (validation {said})"
    if not telling and all(np.isnan(value) for value in alone.values()):
        return f"{start}: is every feature known before the event?"
    if not telling:
        return f"{start}, though no single feature tells it: look for what is known only after the event"
    named = [f"{name} (AUC {alone[name]:.3f})" for name in telling[:_NAMED]]
    if len(telling) > _NAMED:
        named.append(f"{len(telling) - _NAMED} more")
    listed = f"{', '.join(named[:-1])} and {named[-1]}" if len(named) > 1 else named[0]
    tells, it = ("each tell", "they") if len(telling) > 1 else ("tells", "it")
    return f"{start}: {listed} {tells} it almost alone; {'are' if it == 'they' else 'is'} {it} known before the event?"


def _event(task: Task, labels: np.ndarray) -> np.ndarray:
    """(N,) 0 or 1, NaN where not known: the event, a number above its median, or the most frequent class."""
    if task.kind == "regression":
        return above_median(labels)
    if task.kind == "binary":
        return labels
    known = ~np.isnan(labels)
    classes, counts = np.unique(labels[known], return_counts=True)
    return np.where(known, labels == classes[counts.argmax()], np.nan)


def _features(encoder: FeatureEncoder, rows: EncodedRows, at: np.ndarray) -> Iterator[tuple[str, Codes]]:
    """Each feature as `auc_alone` takes it, of some rows."""
    index, column = torch.from_numpy(at), 0
    for key in rows.keys:
        if key in rows.bags:
            values, lengths = rows.bags[key].take(index)
            yield key, (_renumbered(values), lengths.numpy())
        else:
            yield key, (_renumbered(rows.ids[index, column]), None)
            column += 1
    dense, columns = rows.dense[index].numpy(), encoder.dense_columns()
    for name in dict.fromkeys(columns):
        first = columns.index(name)
        numbers = dense[:, first].astype(np.float64)
        if columns.count(name) == 2:  # the second marks what is missing
            numbers[dense[:, first + 1] > 0] = np.nan
        yield name, (codes_of_numbers(numbers), None)


def _renumbered(rows_of_a_table: torch.Tensor) -> np.ndarray:
    """From 0 without gaps: a table may have many rows that none of these meets."""
    return np.unique(rows_of_a_table.numpy(), return_inverse=True)[1]
