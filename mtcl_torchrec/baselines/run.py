"""All baselines of a run: search, predictions, metrics; what was done before is not done again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mtcl_torchrec.baselines.entries import read_entries, write_entry
from mtcl_torchrec.baselines.fused import fused_score, score_of
from mtcl_torchrec.baselines.kinds import BASELINES, Baseline, Job
from mtcl_torchrec.baselines.rows import Say, load_data
from mtcl_torchrec.baselines.search import Budget, Found, Predictions, Settings, candidates, search
from mtcl_torchrec.baselines.store import FOLDER, key_of, load_part, save_part
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.config.commands import BASELINE_ROWS as MAX_ROWS
from mtcl_torchrec.data.files import files_fingerprint
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.metrics import mean_auc, task_metrics
from mtcl_torchrec.evaluation.predictions_file import PredictionsTable, write_predictions
from mtcl_torchrec.evaluation.thresholds import chosen_thresholds
from mtcl_torchrec.schema import ConfigError, Task, nearest
from mtcl_torchrec.training.directory import locked
from mtcl_torchrec.training.history import finite
from mtcl_torchrec.training.judging import evaluation_as_json, predictions_path, rows_predicted, worth_of
from mtcl_torchrec.training.run_data import RunData
from mtcl_torchrec.training.sharding import Device


def run_baselines(
    run: RunConfig,
    folder: Path,
    *,
    only: Sequence[str] = (),
    tasks: Sequence[str] = (),
    budget: Budget | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    device: Device = "auto",
    say: Say = print,
    data: RunData | None = None,
) -> dict[str, dict[str, Any]]:
    """Train and tune baselines on a run's data, and judge them by its validation and test split.

    Every baseline has the same budget.  One with a model for each task shares the seconds among its tasks, those of
    the largest weight in the fused score first.  Each writes ``baselines/NAME/predictions/SPLIT.parquet`` and its entry
    of ``baselines.json`` in the folder.  An interrupted one goes on after the last task that was done.

    Args:
        run: to be compared with; its paths are taken as they are.
        folder: may be the directory of the run.
        only: names of baselines; all that the schema has the columns for, where it is empty.
        tasks: those that a baseline with a model for each task predicts; all that it can, where it is empty.
        budget: of each baseline.
        seed: of samples, draws and folds.
        max_rows: of a larger training split, baselines other than networks learn from a sample.
        device: of networks.
        say: called with lines for the user.
        data: what `mtcl_torchrec.training.run_data.load_data` read for the run; None reads it.

    Returns:
        Baseline -> its entry in ``baselines.json``, of those asked for.

    Raises:
        ConfigError: no such baseline or task, one that lacks a library or a column of the schema, several processes, or
            another process at work in the folder.
        DataError: the data does not fit the schema.
    """
    budget = budget or Budget()
    names = _chosen(run, only, say)
    known = [task.name for task in run.data_schema.tasks]
    if unknown := next((task for task in tasks if task not in known), None):
        raise ConfigError(f"no task {unknown!r}{nearest(unknown, known)}; there are {', '.join(known)}")
    files = files_fingerprint(run)
    options: dict[str, Any] = {"budget": asdict(budget), "seed": seed, "max_rows": max_rows}
    options |= {"tasks": sorted(tasks)} if tasks else {}
    keys = {name: key_of(run, files, whole=BASELINES[name].network, name=name, **options) for name in names}
    entries = read_entries(folder)
    done = [name for name in names if entries.get(name, {}).get("key") == keys[name]]
    for name in done:
        say(f"{name}: done before, {entries[name]['seconds']:.0f} s")
    left = [name for name in names if name not in done]
    if left:
        with locked(folder / FOLDER, "mtcl baselines"):
            rows = load_data(run, max_rows=max_rows, seed=seed, say=say, loaded=data)
            job = Job(run, rows, folder / FOLDER, device, seed, tuple(tasks))
            _go_on(job, folder, left, keys, budget, say)
        entries = read_entries(folder)
    return {name: entries[name] for name in names}


def _go_on(job: Job, folder: Path, names: Sequence[str], keys: dict[str, str], budget: Budget, say: Say) -> None:
    """Those that are not done, one after the other."""
    fused, said = score_of(job.run, job.data.tasks)
    if said:
        say(said)
    for name in names:
        place = folder / FOLDER / name
        write_entry(folder, name, _one(name, replace(job, folder=place), fused, budget, keys[name], say))
        for rest in (place / "parts", *place.glob("network-*")):  # networks that were interrupted
            shutil.rmtree(rest, ignore_errors=True)


def _chosen(run: RunConfig, only: Sequence[str], say: Say) -> list[str]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("baselines run in one process: start them without torchrun")
    for name in only:
        if name not in BASELINES:
            raise ConfigError(f"no baseline {name!r}{nearest(name, BASELINES)}; there are {', '.join(BASELINES)}")
    names = [name for name in BASELINES if name in only or not only]
    for name in list(names):
        lacking = [key for key in BASELINES[name].needs if getattr(run.data_schema, key) is None]
        if lacking and only:
            raise ConfigError(f"{name} needs schema.{lacking[0]}, the column that names the {lacking[0]}")
        if lacking:
            say(f"{name}: left out, it needs schema.{lacking[0]}")
            names.remove(name)
    return names


def _one(name: str, job: Job, fused: nn.Module, budget: Budget, key: str, say: Say) -> dict[str, Any]:
    """Search for one baseline's settings, write its predictions, and make its entry."""
    baseline, data = BASELINES[name], job.data
    tasks, notes = list[Task](), list[str]()
    for task in _by_weight(data.tasks, fused):
        if job.tasks and task.name not in job.tasks and not baseline.joint:
            continue
        if reason := baseline.why_not(task, data):
            notes.append(reason)
        else:
            tasks.append(task)
    if not tasks:
        raise ConfigError(f"{name}: no task of the run is one that it predicts; leave it out with --only")
    units = [tasks] if baseline.joint else [[task] for task in tasks]
    began, searched, predictions = time.monotonic(), dict[str, Found](), Predictions()
    for i, unit in enumerate(units):
        title = "all tasks" if baseline.joint else unit[0].name
        until = float("inf") if budget.seconds is None else began + budget.seconds * (i + 1) / len(units)
        found = _searched(baseline, job, unit, candidates_of(baseline, budget, job.seed), until, i, key)
        searched[title] = found
        trials = f"{len(found.trials)} trial{'s' * (len(found.trials) != 1)}"
        say(f"{name}: {title}, {trials}, {found.seconds:.1f} s, {_shown(unit, found)}")
        for split, of_split in found.predictions.items():
            predictions.setdefault(split, {}).update(of_split)
    metrics, thresholds, lacking = dict[str, Any](), dict[str, float](), list[str]()
    for split, of_split in predictions.items():
        score, lacking = fused_score(fused, data, split, of_split)
        table = _table(job, split, of_split, score)
        if split == "val":
            thresholds = chosen_thresholds(table, job.run.evaluation.threshold)
        table = replace(table, thresholds=thresholds)
        write_predictions(predictions_path(job.folder, split), table)
        fused_tasks: Sequence[str] = fused.tasks  # type: ignore[assignment]
        metrics[split] = evaluation_as_json(evaluate_table(table, fused_tasks=fused_tasks, k=job.run.evaluation.k))
    if lacking:
        notes.append(f"in the fused score, {', '.join(lacking)} enters as the mean of the training rows")
    return {
        "key": key,
        "about": baseline.about,
        "settings": {title: found.settings for title, found in searched.items()},
        "trials": sum(len(found.trials) for found in searched.values()),
        "seconds": sum(found.seconds for found in searched.values()),
        "metrics": metrics,
        "budget": asdict(budget),
        "rows": data.total if baseline.network else len(data.train),
        "searched": {title: [finite(asdict(trial)) for trial in found.trials] for title, found in searched.items()},
        "notes": notes,
    }


def candidates_of(baseline: Baseline, budget: Budget, seed: int) -> list[Settings]:
    """The settings that a baseline tries."""
    return candidates(baseline.usual, baseline.space, budget.trials, seed)


def _searched(
    baseline: Baseline, job: Job, unit: Sequence[Task], settings: Sequence[Settings], until: float, i: int, key: str
) -> Found:
    path = job.folder / "parts" / f"{i}.npz"
    if (before := load_part(path, key)) is not None:
        return before

    def attempt(setting: Settings) -> tuple[Predictions, float]:
        predictions = baseline.fit(job, unit, setting)
        return predictions, _quality(job, unit, predictions["val"])

    found = search(settings, attempt, until=until)
    save_part(path, key, found)
    return found


def _quality(job: Job, unit: Sequence[Task], predictions: dict[str, Any]) -> float:
    """On the validation split: AUC, 1 - NE or R² of a task; of several, the mean of those that the run watches."""
    watched = [task for task in unit if task.name in job.run.training.watch] or list(unit)
    rows = job.data.held_out["val"]
    metrics = {t.name: task_metrics(t, rows.labels[:, job.data.column(t)], predictions[t.name]) for t in watched}
    return mean_auc(watched, metrics)


def _shown(unit: Sequence[Task], found: Found) -> str:
    what = {"binary": "AUC", "multiclass": "1 - NE", "regression": "R²"}[unit[0].kind] if len(unit) == 1 else "mean AUC"
    return f"{what} {found.quality:.4f} on val"


def _by_weight(tasks: Sequence[Task], fused: nn.Module) -> list[Task]:
    """Tasks in the order in which they get their share of the seconds: the largest weight in the fused score first."""
    weights = dict(zip(fused.tasks, getattr(fused, "weights", [1.0] * len(fused.tasks)), strict=True))  # type: ignore
    return sorted(tasks, key=lambda task: -abs(float(weights.get(task.name, 0.0))))


def _table(job: Job, split: str, predictions: dict[str, Any], score: np.ndarray) -> PredictionsTable:
    """The predictions for one split, as those of a run."""
    data = job.data
    return rows_predicted(
        data.tasks, data.preprocessor, data.raw[split], data.encoded[split], data.catalogue,
        {**predictions, "score": score}, split=split, values=worth_of(job.run),
    )  # fmt: skip
