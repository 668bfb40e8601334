"""How well each task is predicted for parts of the rows: cold items, new users, hours, and what else the rows tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mtcl_torchrec.evaluation.confidence import PLUS_MINUS, plus_minus
from mtcl_torchrec.evaluation.naming import bounds_of, label_of
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.segments import BESIDE, QUALITY, of_segment, rows_of
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.tables import Table

Parts = Mapping[str, tuple[int, Mapping[str, Mapping[str, Any]]]]
"""Value of a segment -> its rows, and task -> what `of_segment` says of it."""

FEWEST = 50  # rows of a segment that is shown by itself
REST = "(the rest)"  # segments of fewer rows, together
MOST = 24  # values of a column that are shown, the most frequent ones


def segment_masks(table: PredictionsTable, judged: Collection[str] = ()) -> dict[str, dict[str, np.ndarray]]:
    """Heading -> value -> (N,) bool: the rows of each segment, but of those in `judged`, which are known already.

    Items by events in training (of the first binary task) and users by whether they were in it, where the table knows;
    and every ``segment.`` column.
    """
    frame = table.frame
    found: dict[str, dict[str, np.ndarray]] = {}
    if table.popularity is not None:
        event = next((task.name for task in table.tasks if task.kind == "binary"), "seen")
        masks = {"not in training": np.isnan(table.popularity)} if "item_seen" in frame else {}
        known = np.nan_to_num(table.popularity)
        some = known[known > 0]
        if len(some):
            low, high = (float(q) for q in np.quantile(some, [1 / 3, 2 / 3]))
            masks |= {
                f"never {event} in training": (known == 0) & ~masks.get("not in training", np.zeros(len(known), bool)),
                f"{event} {_times(low)}": (known > 0) & (known <= low),
                f"{event} up to {high:,.0f} times": (known > low) & (known <= high),
                "more often": known > high,
            }
        found["items"] = masks
    for column, heading, words in (("item_seen", "items", "not in training"), ("user_seen", "users", "new")):
        if column in judged:
            found.get(heading, {}).pop(words, None)
        elif column in frame:
            seen = frame[column].to_numpy(bool)
            found.setdefault(heading, {})[words] = ~seen
            if heading == "users":
                found[heading]["in training"] = seen
    for column in [c for c in map(str, frame) if c.startswith("segment.")]:
        if column.removeprefix("segment.") in judged:
            continue
        values = frame[column]
        counts = values.value_counts()
        kept = sorted(counts.index[:MOST], key=lambda v: (isinstance(v, str), v))
        found[column.removeprefix("segment.")] = {
            _said(value): (values == value).to_numpy(bool, na_value=False) for value in kept
        }
    shown = {heading: _grouped(masks) for heading, masks in found.items()}
    return {heading: masks for heading, masks in shown.items() if len(masks) > 1}


def _grouped(masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With those of few rows taken together."""
    small = [mask for mask in masks.values() if 0 < mask.sum() < FEWEST]
    rest = {REST: np.logical_or.reduce(small)} if small else {}
    return {value: mask for value, mask in masks.items() if mask.sum() >= FEWEST} | rest


def _times(most: float) -> str:
    return "once" if most <= 1 else f"1 to {most:,.0f} times"


def _said(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def segment_tables(run: RunContents, tasks: Mapping[str, Sequence[str]]) -> list[Table]:
    """Quality of tasks on parts of the rows, a table for each way to part them and each kind of task: those of
    metrics.json, and what else the predictions tell.

    Args:
        tasks: kind -> those that are shown, in the order of the columns.
    """
    judged: Mapping[str, Any] = run.evaluation.get("segments") or {}
    parted: dict[str, Parts] = {}
    for heading, parts in judged.items():
        parted[heading] = {str(value): (int(of.get("rows") or 0), _quality(of)) for value, of in parts.items()}
    tables = [_table(heading, parts, kind, of) for heading, parts in parted.items() for kind, of in tasks.items()]
    if run.table is None or not any(tasks.values()):
        return tables
    for heading, masks in segment_masks(run.table, judged).items():
        found = {v: (int(mask.sum()), of_segment(rows_of(run.table, mask))) for v, mask in masks.items()}
        tables += [_table(heading, found, kind, of) for kind, of in tasks.items()]
    return tables


def _quality(of: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """As metrics.json has it; of a run that kept no intervals, the metrics alone."""
    if "quality" in of:
        return of["quality"]
    first = {
        task: next((m[metric] for metric in QUALITY.values() if metric in m), None) for task, m in of["tasks"].items()
    }
    return {task: {"value": value, "unsure": ""} for task, value in first.items()}


def _table(heading: str, parts: Parts, kind: str, tasks: Sequence[str]) -> Table:
    """Of the tasks of one kind: a column each for what the kind is told by, and for what it is told by as well."""
    metrics = [QUALITY[kind], *([BESIDE[kind]] if kind in BESIDE else [])]
    columns = [(task, metric) for task in tasks for metric in metrics]
    rows: list[list[str]] = []
    tones: dict[tuple[int, int], str] = {}
    for value, (count, quality) in parts.items():
        cells = []
        for c, (task, metric) in enumerate(columns, 2):
            of = quality.get(task) or {}
            unsure = bool(of.get("unsure"))
            told = of if metric == metrics[0] else (of.get("beside") or {}).get(metric) or {}
            said = plus_minus(told.get("value"), told.get("half"), 3, bounds_of(metric))
            counted = metric == metrics[0] and of.get("events") is not None
            events = f"{int(of['events']):,}" if counted else ""
            more = ": ".join(part for part in (events, "unsure" * (unsure and said != "–")) if part)
            cells.append(f"{said} ({more})" if more else said)
            if unsure:
                tones[len(rows), c] = "few"
        rows.append([value, f"{count:,}", *cells])
    what = "events" if kind == "binary" else "labels"
    few = f"; unsure (grey): too few {what}{', or too few rows without one' * (kind == 'binary')}" if tones else ""
    named = " and ".join(label_of(metric) for metric in metrics)
    heads = list(tasks) if len(metrics) == 1 else [f"{task} {label_of(metric)}" for task, metric in columns]
    note = f"{named}; {PLUS_MINUS}; in brackets, how many {what}{few}."
    return Table(f"{named} by {heading}", [heading, "rows", *heads], rows, note, tones)
