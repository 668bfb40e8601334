"""How well each task is predicted for parts of the rows: cold items, new users, hours, and what else the rows tell."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mtcl_torchrec.evaluation.confidence import PLUS_MINUS, plus_minus
from mtcl_torchrec.evaluation.naming import bounds_of
from mtcl_torchrec.evaluation.predictions_file import PredictionsTable
from mtcl_torchrec.evaluation.segments import of_segment, rows_of
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.tables import Table

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


def segment_tables(run: RunContents, tasks: list[str]) -> list[Table]:
    """Quality of tasks on parts of the rows, a table for each way to part them: those of metrics.json, and what else
    the predictions tell.

    Args:
        tasks: binary ones, in the order of the columns.
    """
    judged: Mapping[str, Any] = run.evaluation.get("segments") or {}
    tables = []
    for heading, parts in judged.items():
        rows = {str(value): (int(of.get("rows") or 0), _quality(of)) for value, of in parts.items()}
        tables.append(_table(heading, rows, tasks))
    if run.table is None or not tasks:
        return tables
    for heading, masks in segment_masks(run.table, judged).items():
        found = {v: (int(mask.sum()), of_segment(rows_of(run.table, mask))) for v, mask in masks.items()}
        tables.append(_table(heading, found, tasks))
    return tables


def _quality(of: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """As metrics.json has it; of a run that kept no intervals, the AUC alone."""
    return of.get("quality") or {task: {"value": m.get("auc"), "unsure": ""} for task, m in of["tasks"].items()}


def _table(heading: str, parts: Mapping[str, tuple[int, Mapping[str, Any]]], tasks: list[str]) -> Table:
    rows: list[list[str]] = []
    tones: dict[tuple[int, int], str] = {}
    for value, (count, quality) in parts.items():
        cells = []
        for c, task in enumerate(tasks, 2):
            of = quality.get(task) or {}
            said, unsure = plus_minus(of.get("value"), of.get("half"), 3, bounds_of("auc")), bool(of.get("unsure"))
            events = f"{int(of['events']):,}" if of.get("events") is not None else ""
            more = ": ".join(part for part in (events, "unsure" * (unsure and said != "–")) if part)
            cells.append(f"{said} ({more})" if more else said)
            if unsure:
                tones[len(rows), c] = "few"
        rows.append([value, f"{count:,}", *cells])
    few = "; unsure (grey): too few events, or too few rows without one" if tones else ""
    note = f"AUC; {PLUS_MINUS}; in brackets, how many events{few}."
    return Table(f"AUC by {heading}", [heading, "rows", *tasks], rows, note, tones)
