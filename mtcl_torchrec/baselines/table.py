"""Baselines beside each other, and beside the run, as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mtcl_torchrec.baselines.differences import Differences, half_of, verdict
from mtcl_torchrec.baselines.entries import TUNED, read_entries, said_of_score
from mtcl_torchrec.baselines.family import Key, against_run, lengths_of
from mtcl_torchrec.baselines.keys import of_other_runs
from mtcl_torchrec.baselines.store import FOLDER
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.evaluation.compare import Difference
from mtcl_torchrec.evaluation.naming import MAIN, heading_of, label_of, parts_of, sign_of_better
from mtcl_torchrec.evaluation.plain_table import plain_table, print_columns
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.resampled import RANKING
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.directory import METRICS
from mtcl_torchrec.training.judging import predictions_path

THIS_RUN = "this run"
# Of a ranking; CTR and conversion of what is shown are rates.
_TOLD = ("auc ", "gauc ", "value@", "rate@")
_MISSING = "–"


def evaluations_of(entries: Mapping[str, dict[str, Any]], split: str, folder: Path | None = None) -> dict[str, Any]:
    """Baseline -> its evaluation of a split, and first that of the run in the folder, where there is one."""
    found = {}
    if folder is not None and (folder / METRICS).is_file():
        of_run = json.loads((folder / METRICS).read_text(encoding="utf-8"))["evaluations"]
        if split in of_run:
            found[THIS_RUN] = of_run[split]
    return found | {name: entry["metrics"][split] for name, entry in entries.items() if split in entry["metrics"]}


def print_baselines(
    entries: Mapping[str, dict[str, Any]],
    console: Console,
    *,
    split: str = "test",
    folder: Path | None = None,
    run_dir: Path | None = None,
    run: RunConfig | None = None,
) -> None:
    """Print what baselines reached: each task, within users, the fused score, who is ahead, and what the search cost.

    Beside a run, each figure has the paired difference to the run's below it.

    Args:
        entries: as in ``baselines.json``.
        split: of which; the validation split where no baseline has it.
        folder: where the baselines are.
        run_dir: the directory of the run they are compared with, where it is another; or None.
        run: its configuration: baselines in the folder that are of another one do not count; None takes all.
    """
    run_dir = run_dir or folder
    split = split if any(split in entry["metrics"] for entry in entries.values()) else "val"
    found = evaluations_of(entries, split, run_dir)
    kinds: dict[str, str] = {}
    for evaluation in found.values():
        kinds |= {task: kind for task, kind in evaluation["kinds"].items() if "|" not in task}
    quality = {(task, MAIN[kind]): heading_of(f"{MAIN[kind]} {task}") for task, kind in kinds.items()}
    within = {(task, "gauc"): heading_of(f"gauc {task}") for task, kind in kinds.items() if kind == "binary"}
    told = dict[Key, str]()
    for evaluation in found.values():
        for key in evaluation["ranking"].get("fused", {}):
            if key.startswith(_TOLD) and " half" not in key:
                told[(RANKING, key)] = heading_of(key)
    beside = {} if folder is None else read_entries(folder)
    others = [] if run is None else of_other_runs(beside, run)
    names = [name for name in {**beside, **entries} if name not in others]
    apart = _apart(names, folder, run_dir, split, found, {*quality, *within, *told})
    costs = {task for of in found.values() for task, value in (of.get("values") or {}).items() if value < 0}
    _print(console, f"{split} split: quality of each task", found, quality, apart)
    _print(console, f"{split} split: AUC within users", found, within, apart)
    _print(console, f"{split} split: all rows ranked by the fused score", found, told, apart, costs)
    lowest = [label_of("ne"), *(f"rankings of {task}" for task in kinds if task in costs)]
    notes = [f"* is the best of its column (of {', '.join(lowest)} the lowest)"]
    if apart:
        notes.append("below each figure, its difference to this run's: ± is half of a 95 % interval, paired over users")
        notes += [f"none of {heading}: {why}" for heading, why in _unsure(apart, {**quality, **within, **told})]
    console.print("; ".join(notes), highlight=False, soft_wrap=True)
    for line in [*said_of_score(entries), *_reasons(entries)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    values = {key: heading for key, heading in told.items() if key[1].startswith("value@")}
    shown_here = {name: apart[name] for name in entries if name in apart}
    lines = verdict(shown_here, {key: key[0] for key in quality} | values)
    if lines:
        console.print(
            "\n[bold]Who is ahead, beyond chance[/] (corrected for as many comparisons, Holm)", highlight=False
        )
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print()
    table = plain_table("What the search cost", ["baseline", "trials", "seconds", "training rows"])
    table.add_column("settings", overflow="fold")
    for name, entry in entries.items():
        table.add_row(
            name, str(entry["trials"]), f"{entry['seconds']:,.1f}", f"{entry['rows']:,}", entry.get(TUNED, "")
        )
    console.print(table)


def _apart(
    names: Sequence[str],
    folder: Path | None,
    run_dir: Path | None,
    split: str,
    found: Mapping[str, Any],
    keys: set[Key],
) -> dict[str, Differences]:
    """Baseline -> its differences to the run; nothing where there is no run with predictions.

    Args:
        names: of all baselines in the folder, so that showing fewer of them does not make a difference more sure.
    """
    if folder is None or run_dir is None:
        return {}
    own = _predictions(run_dir, split)
    if own is None:
        return {}
    theirs = {name: _predictions(folder / FOLDER / name, split) for name in names}
    there = {name: table for name, table in theirs.items() if table is not None}
    lengths = sorted({k for evaluation in found.values() for k in lengths_of(evaluation)})
    return against_run(own, there, lengths, also=keys)


def _unsure(apart: Mapping[str, Differences], shown: Mapping[Key, str]) -> list[tuple[str, str]]:
    """Of which metrics no difference is sure, and why."""
    why = {key: d.unsure for of in apart.values() for key, d in of.items() if d.unsure}
    return [(heading, why[key]) for key, heading in shown.items() if key in why]


def _predictions(folder: Path, split: str) -> PredictionsTable | None:
    try:
        return read_predictions(predictions_path(folder, split))
    except (DataError, OSError):
        return None


def _reasons(entries: Mapping[str, dict[str, Any]]) -> list[str]:
    """What there is to say of baselines, such as why one does not predict a task; each once."""
    said: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for note in entry.get("notes") or ():
            said.setdefault(note, []).append(name)
    return [f"{_MISSING} {', '.join(names)}: {note}" for note, names in said.items()]


def _print(
    console: Console,
    title: str,
    found: Mapping[str, Any],
    shown: Mapping[Key, str],
    apart: Mapping[str, Differences],
    costs: Collection[str] = (),
) -> None:
    """A row for each baseline, a column for each metric that one of them has.

    Args:
        costs: events that cost something: of a ranking, less of them is better.
    """
    columns = {key: {name: _value(of, key) for name, of in found.items()} for key in shown}
    columns = {key: column for key, column in columns.items() if any(not math.isnan(v) for v in column.values())}
    if not columns:
        return
    headings = [shown[key].replace(" ", "\n", 1) for key in columns]
    rows = [
        [
            name,
            *(_cell(column, name, _way(key, costs), apart.get(name, {}).get(key)) for key, column in columns.items()),
        ]
        for name in found
        if not all(math.isnan(column[name]) for column in columns.values())
    ]
    print_columns(console, title, ["baseline", *headings], rows)


def _value(evaluation: Mapping[str, Any], key: Key) -> float:
    of, metric = key
    at = evaluation["ranking"].get("fused", {}) if of == RANKING else evaluation["tasks"].get(of, {})
    value = at.get(metric)
    return math.nan if value is None else float(value)


def _way(key: Key, costs: Collection[str]) -> int:
    """1 where more is better, -1 where less is."""
    turned = key[0] == RANKING and parts_of(key[1]).of in costs
    return sign_of_better(key[1]) * (-1 if turned else 1)


def _cell(column: Mapping[str, float], name: str, way: int, apart: Difference | None) -> str:
    value = column[name]
    if math.isnan(value):
        return f"{_MISSING} "
    known = [v for v in column.values() if not math.isnan(v)]
    best = min(known) if way < 0 else max(known)
    shown = f"{value:.4f}*" if value == best else f"{value:.4f} "
    if apart is None or math.isnan(apart.difference):
        return shown
    if math.isnan(apart.low):
        return f"{shown}\n{apart.difference:+z.4f} "
    return f"{shown}\n{apart.difference:+z.4f} ± {half_of(apart):.4f} "
