"""Baselines beside each other, and beside the run, as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.training.directory import METRICS

THIS_RUN = "this run"
_QUALITY = {"binary": ("auc", "AUC"), "multiclass": ("ne", "NE"), "regression": ("r2", "R²")}
_LOW_IS_GOOD = {"ne"}
# Of a ranking; CTR and conversion of what is shown are rates.
_TOLD = ("auc ", "gauc ", "value@", "rate@")
_PER_TABLE = 8  # columns that a screen holds
_MISSING = "–"

# A column: its heading, and baseline -> number.
Column = tuple[str, dict[str, float | None]]


def evaluations_of(entries: Mapping[str, dict[str, Any]], split: str, folder: Path | None = None) -> dict[str, Any]:
    """Baseline -> its evaluation of a split, and that of the run in the folder, where there is one."""
    found = {name: entry["metrics"][split] for name, entry in entries.items() if split in entry["metrics"]}
    if folder is not None and (folder / METRICS).is_file():
        of_run = json.loads((folder / METRICS).read_text(encoding="utf-8"))["evaluations"]
        if split in of_run:
            found[THIS_RUN] = of_run[split]
    return found


def print_baselines(
    entries: Mapping[str, dict[str, Any]], console: Console, *, split: str = "test", folder: Path | None = None
) -> None:
    """Print what baselines reached: each task, within users, the fused score, and what the search cost.

    The best of each column has a star.

    Args:
        entries: as in ``baselines.json``.
        split: of which; the validation split where no baseline has it.
        folder: the directory of the run they are compared with, or None.
    """
    split = split if any(split in entry["metrics"] for entry in entries.values()) else "val"
    found = evaluations_of(entries, split, folder)
    kinds: dict[str, str] = {}
    for evaluation in found.values():
        kinds |= {task: kind for task, kind in evaluation["kinds"].items() if "|" not in task}
    quality = [_of_task(found, task, *_QUALITY[kind]) for task, kind in kinds.items()]
    _print(console, f"{split} split: quality of each task", found, quality)
    within = [_of_task(found, task, "gauc", "GAUC") for task, kind in kinds.items() if kind == "binary"]
    _print(console, f"{split} split: AUC within users", found, within)
    rankings = {name: evaluation["ranking"].get("fused", {}) for name, evaluation in found.items()}
    told = (key for ranking in rankings.values() for key in ranking if key.startswith(_TOLD) and " error" not in key)
    keys = list(dict.fromkeys(told))
    fused = [(key.replace("gauc", "GAUC").replace("auc ", "AUC "), _at(rankings, key)) for key in keys]
    _print(console, f"{split} split: all rows ranked by the fused score", found, fused)
    table = plain_table("What the search cost", ["baseline", "trials", "seconds", "training rows"])
    for name, entry in entries.items():
        table.add_row(name, str(entry["trials"]), f"{entry['seconds']:,.1f}", f"{entry['rows']:,}")
    console.print(table)


def _at(of: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float | None]:
    return {name: values.get(key) for name, values in of.items()}


def _of_task(found: Mapping[str, Any], task: str, key: str, heading: str) -> Column:
    of_task = {name: evaluation["tasks"].get(task, {}) for name, evaluation in found.items()}
    return f"{heading} {task}", _at(of_task, key)


def _print(console: Console, title: str, names: Sequence[str] | Mapping[str, Any], columns: list[Column]) -> None:
    columns = [(heading, values) for heading, values in columns if any(_known(v) for v in values.values())]
    for start in range(0, len(columns), _PER_TABLE):
        part = columns[start : start + _PER_TABLE]
        table = plain_table(
            title if start == 0 else "", ["baseline", *(heading.replace(" ", "\n", 1) for heading, _ in part)]
        )
        best = [_best(heading, values) for heading, values in part]
        for name in names:
            cells = [_cell(values.get(name), top) for (_, values), top in zip(part, best, strict=True)]
            if any(cell.strip() != _MISSING for cell in cells):
                table.add_row(name, *cells)
        console.print(table, "")


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _best(heading: str, values: Mapping[str, float | None]) -> float:
    known = [v for v in values.values() if v is not None and _known(v)]
    return min(known) if heading.split(" ")[0].lower() in _LOW_IS_GOOD else max(known)


def _cell(value: float | None, best: float) -> str:
    if value is None or not _known(value):
        return f"{_MISSING} "
    return f"{value:.4f}*" if value == best else f"{value:.4f} "
