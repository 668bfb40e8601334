"""All baselines of a run: search, predictions, metrics; what was done before is not done again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtcl_torchrec.baselines.entries import read_entries, write_entry
from mtcl_torchrec.baselines.fused import numbers_of, score_of, stand_in
from mtcl_torchrec.baselines.judge import JUDGED_BY, Judge
from mtcl_torchrec.baselines.keys import CONFIGURATION, FILES, KEY, TRAIN_ROWS, configuration_of, key_of, of_other_runs
from mtcl_torchrec.baselines.kinds import BASELINES, Job
from mtcl_torchrec.baselines.networks import total_weight
from mtcl_torchrec.baselines.one import Told, find_one, predicted_tasks
from mtcl_torchrec.baselines.progress import Progress, quiet
from mtcl_torchrec.baselines.rows import Say, load_data
from mtcl_torchrec.baselines.search import Budget
from mtcl_torchrec.baselines.store import FOLDER, judged_by
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.config.commands import BASELINE_ROWS as MAX_ROWS
from mtcl_torchrec.data.files import files_fingerprint
from mtcl_torchrec.evaluation.predictions_file import is_predictions
from mtcl_torchrec.schema import ConfigError, nearest
from mtcl_torchrec.training.directory import locked
from mtcl_torchrec.training.fitted_fusion import fusion_fingerprint
from mtcl_torchrec.training.judging import predictions_path
from mtcl_torchrec.training.run_data import RunData
from mtcl_torchrec.training.sharding import Device

# Name and reason; raises where the baseline was asked for by name.
LeaveOut = Callable[[str, str], None]


def run_baselines(
    run: RunConfig,
    folder: Path,
    *,
    run_dir: Path | None = None,
    only: Sequence[str] = (),
    tasks: Sequence[str] = (),
    budget: Budget | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    device: Device = "auto",
    say: Say = print,
    progress: Progress = quiet,
    data: RunData | None = None,
    run_trials: int = 0,
    left_out: Callable[[str, str], object] = lambda name, reason: None,
) -> dict[str, dict[str, Any]]:
    """Train and tune baselines on a run's data, and judge them by its validation and test split.

    Every baseline has the same budget, but for networks, whose trials are trainings.  One with a model for each task
    shares the seconds among its tasks, those of the largest weight in the fused score first.  Each writes
    ``baselines/NAME/predictions/SPLIT.parquet`` and its entry of ``baselines.json`` in the folder.  An interrupted one
    goes on after the last trial that was done, and one that was done with fewer trials after those.  All rank by the
    fused score that the run has now; entries of before that were ranked by another, or
    judged by other values, are judged anew by the predictions that they keep.

    Args:
        run: to be compared with; its paths are taken as they are.
        folder: to write to; may be the directory of the run.
        run_dir: the directory of the run, where it is another.
        only: names of baselines; all that the schema has the columns for, where it is empty.
        tasks: those that a baseline with a model for each task predicts, but for popularity; all that it can, where it
            is empty.
        budget: of each baseline.
        seed: of samples, draws and folds.
        max_rows: of a larger training split, baselines other than networks learn from a sample.
        device: of networks.
        say: called with lines for the user.
        progress: told of each trial that begins.
        data: what `mtcl_torchrec.training.run_data.load_data` read for the run; None reads it.
        run_trials: of the search that the run is the best of, see `mtcl_torchrec.baselines.beside.search_of`; 0 of none
            that is known.
        left_out: told of each baseline that is left out, and why.

    Returns:
        Baseline -> its entry in ``baselines.json``, of those asked for.  Without `only`, one that is of no use beside
        this run, or lacks a library, is left out; `say` and `left_out` are told why.

    Raises:
        ConfigError: no such baseline or task, one of `only` that is of no use beside this run, or lacks a library,
            several processes, or another process at work in the folder.
        DataError: the data does not fit the schema.
    """
    budget = budget or Budget()

    def leave_out(name: str, reason: str) -> None:
        if only:
            raise ConfigError(f"{name}: {reason}; leave it out of --only")
        say(f"{name}: skipped: {reason}")
        left_out(name, reason)

    names = _chosen(run, only, leave_out)
    known = [task.name for task in run.data_schema.tasks]
    if unknown := next((task for task in tasks if task not in known), None):
        raise ConfigError(f"no task {unknown!r}{nearest(unknown, known)}; there are {', '.join(known)}")
    files = files_fingerprint(run)
    options: dict[str, Any] = {"seconds": budget.seconds, "seed": seed, "max_rows": max_rows}
    options |= {"tasks": sorted(tasks)} if tasks else {}
    keys, searches = dict[str, str](), dict[str, str]()
    trains = any(BASELINES[name].network for name in names)
    total = total_weight(run, run_dir or folder) if trains else None
    for name in names:
        network = BASELINES[name].network
        counts = options | ({"total": total} if network else {})
        searches[name] = key_of(run, files, whole=network, name=name, **counts)
        keys[name] = key_of(run, files, whole=network, name=name, trials=budget.trials_of(network), **counts)
    by = _judged_by(run, run_dir or folder)
    entries = read_entries(folder)
    done = [n for n in names if entries.get(n, {}).get(KEY) == keys[n] and _is_kept(folder, n, entries)]
    for name in done:
        say(f"{name}: done before, {entries[name]['seconds']:.0f} s")
        if CONFIGURATION not in entries[name]:  # of an older version, but the same by all that it says
            write_entry(folder, name, entries[name] | {CONFIGURATION: configuration_of(run, name), FILES: files})
    entries = read_entries(folder)
    left = _installed([name for name in names if name not in done], leave_out)
    others = [name for name in of_other_runs(entries, run, files=files) if name not in left]
    if others:
        say(f"{', '.join(others)}: not of this configuration and data, as far as known: left out until trained anew")
    stale = [name for name in _judged_otherwise(entries, by) if name not in (*left, *others)]
    if left or stale:
        with locked(folder / FOLDER, "mtcl baselines"):
            rows = load_data(run, max_rows=max_rows, seed=seed, say=say, loaded=data)
            job = Job(run, rows, folder / FOLDER, device, seed, tuple(tasks), total)
            left = _of_use(job, left, leave_out)
            fused, said = score_of(run, rows.tasks, folder=run_dir or folder, encoder=rows.encoder)
            if said:
                say(said)
            judge = Judge(run, rows, fused, by, said, numbers_of(run, run_dir or folder, rows.encoder))
            if stale:
                say("the run ranks, or is judged, otherwise than when its baselines were")
            _judge_anew(judge, folder, stale, say)
            of = {name: {KEY: keys[name], FILES: files} for name in left}
            _go_on(job, judge, folder, left, of, searches, budget, run_trials, say, progress)
        entries = read_entries(folder)
    return {name: entries[name] for name in names if name in done or name in left}


def rank_anew(run: RunConfig, folder: Path, *, say: Say = print) -> None:
    """Let the baselines beside a run rank by the fused score that it has now, without training; nothing happens where
    they do so already.

    Args:
        run: with paths as seen from here.
        folder: the directory of the run, where the baselines are.
        say: called with lines for the user.

    Raises:
        ConfigError: another process is at work on them.
        DataError: the rows cannot be read.
    """
    by, entries = _judged_by(run, folder), read_entries(folder)
    others = of_other_runs(entries, run)
    stale = [name for name in _judged_otherwise(entries, by) if name not in others]
    if stale:
        with locked(folder / FOLDER, "mtcl baselines"):
            rows = load_data(run, max_rows=MAX_ROWS, seed=0, say=lambda line: None)
            fused, said = score_of(run, rows.tasks, folder=folder, encoder=rows.encoder)
            if said:
                say(said)
            judge = Judge(run, rows, fused, by, said, numbers_of(run, folder, rows.encoder))
            _judge_anew(judge, folder, stale, say)


def _is_kept(folder: Path, name: str, entries: dict[str, dict[str, Any]]) -> bool:
    """Whether the predictions that an entry is of are there, and whole."""
    return all(is_predictions(predictions_path(folder / FOLDER / name, split)) for split in entries[name]["metrics"])


def _judged_by(run: RunConfig, run_dir: Path) -> str:
    return judged_by(run, fusion_fingerprint(run_dir), stand_in(run, run_dir))


def _judged_otherwise(entries: dict[str, dict[str, Any]], by: str) -> list[str]:
    return [name for name, entry in entries.items() if entry.get(JUDGED_BY) != by]


def _judge_anew(judge: Judge, folder: Path, names: Sequence[str], say: Say) -> None:
    """Those that were judged by another fused score, other values or thresholds."""
    entries, fresh = read_entries(folder), dict[str, dict[str, Any]]()
    for name in names:
        if (entry := judge.entry_anew(folder / FOLDER / name, entries[name])) is not None:
            fresh[name] = entry
            write_entry(folder, name, entry)
        else:
            say(f"{name}: stands there as it was ranked before: it was judged by other rows than the run's")
    if fresh:
        say(f"baselines that rank by it now, too, without training: {', '.join(fresh)}")


def _go_on(
    job: Job,
    judge: Judge,
    folder: Path,
    names: Sequence[str],
    of: dict[str, dict[str, str]],
    searches: dict[str, str],
    budget: Budget,
    run_trials: int,
    say: Say,
    progress: Progress,
) -> None:
    """Those that are not done, one after the other."""
    for number, name in enumerate(names, 1):
        place = folder / FOLDER / name
        told = Told(say, progress, number, len(names))
        earlier = read_entries(folder).get(name, {})
        entry = find_one(name, replace(job, folder=place), judge, budget, searches[name], earlier, run_trials, told)
        is_of = {CONFIGURATION: configuration_of(job.run, name), TRAIN_ROWS: job.data.splits.train.fingerprint}
        write_entry(folder, name, of[name] | is_of | entry)
        for rest in (place / "parts", *place.glob("network-*")):  # networks that were interrupted
            shutil.rmtree(rest, ignore_errors=True)


def _chosen(run: RunConfig, only: Sequence[str], leave_out: LeaveOut) -> list[str]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("baselines run in one process: start them without torchrun")
    for name in only:
        if name not in BASELINES:
            raise ConfigError(f"no baseline {name!r}{nearest(name, BASELINES)}; there are {', '.join(BASELINES)}")
    names = [name for name in BASELINES if name in only or not only]
    for name in list(names):
        if reason := BASELINES[name].why_not_in(run):
            leave_out(name, reason)
            names.remove(name)
    if not names:
        raise ConfigError("no baseline is of use beside this run")
    return names


def _installed(names: Sequence[str], leave_out: LeaveOut) -> list[str]:
    """Those whose library is there."""
    found = []
    for name in names:
        if lacking := BASELINES[name].lacks():
            leave_out(name, lacking)
        else:
            found.append(name)
    return found


def _of_use(job: Job, names: Sequence[str], leave_out: LeaveOut) -> list[str]:
    """Those that predict some task from this data, before any is trained."""
    found = []
    for name in names:
        tasks, reasons = predicted_tasks(BASELINES[name], job)
        if tasks:
            found.append(name)
        else:
            leave_out(name, reasons[0] if reasons else "predicts none of the tasks asked for")
    return found
