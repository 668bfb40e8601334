"""All baselines of a run: search, predictions, metrics; what was done before is not done again."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from mtcl_torchrec.baselines.entries import TUNED, how_tuned, read_entries, write_entry
from mtcl_torchrec.baselines.fused import numbers_of, score_of, stand_in
from mtcl_torchrec.baselines.judge import JUDGED_BY, Judge
from mtcl_torchrec.baselines.kinds import BASELINES, Baseline, Job
from mtcl_torchrec.baselines.networks import total_weight
from mtcl_torchrec.baselines.progress import Course, Progress, quiet
from mtcl_torchrec.baselines.rows import Say, load_data
from mtcl_torchrec.baselines.search import Budget, Found, Predictions, Settings, candidates, search
from mtcl_torchrec.baselines.store import FOLDER, found_before, judged_by, key_of, load_part, save_part
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.config.commands import BASELINE_ROWS as MAX_ROWS
from mtcl_torchrec.data.files import files_fingerprint
from mtcl_torchrec.evaluation.metrics import deciding, mean_auc, task_metrics
from mtcl_torchrec.evaluation.naming import MAIN, label_of, sign_of_better
from mtcl_torchrec.evaluation.predictions_file import is_predictions
from mtcl_torchrec.schema import ConfigError, Task, nearest
from mtcl_torchrec.training.directory import locked
from mtcl_torchrec.training.fitted_fusion import fusion_fingerprint
from mtcl_torchrec.training.history import finite
from mtcl_torchrec.training.judging import predictions_path
from mtcl_torchrec.training.run_data import RunData
from mtcl_torchrec.training.sharding import Device


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

    Returns:
        Baseline -> its entry in ``baselines.json``, of those asked for.  Without `only`, one that is of no use beside
        this run is left out, and `say` is told why.

    Raises:
        ConfigError: no such baseline or task, one of `only` that is of no use beside this run, or lacks a library,
            several processes, or another process at work in the folder.
        DataError: the data does not fit the schema.
    """
    budget = budget or Budget()
    names = _chosen(run, only, say)
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
    done = [
        name for name in names if entries.get(name, {}).get("key") == keys[name] and _is_kept(folder, name, entries)
    ]
    for name in done:
        say(f"{name}: done before, {entries[name]['seconds']:.0f} s")
    left = [name for name in names if name not in done]
    stale = [name for name, entry in entries.items() if name not in left and entry.get(JUDGED_BY) != by]
    if left or stale:
        with locked(folder / FOLDER, "mtcl baselines"):
            rows = load_data(run, max_rows=max_rows, seed=seed, say=say, loaded=data)
            job = Job(run, rows, folder / FOLDER, device, seed, tuple(tasks), total)
            left = _of_use(job, left, bool(only), say)
            fused, said = score_of(run, rows.tasks, folder=run_dir or folder, encoder=rows.encoder)
            if said:
                say(said)
            judge = Judge(run, rows, fused, by, said, numbers_of(run, run_dir or folder, rows.encoder))
            if stale:
                say("the run ranks, or is judged, otherwise than when its baselines were")
            _judge_anew(judge, folder, stale, say)
            _go_on(job, judge, folder, left, keys, searches, budget, run_trials, say, progress)
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
    stale = [name for name, entry in entries.items() if entry.get(JUDGED_BY) != by]
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
    keys: dict[str, str],
    searches: dict[str, str],
    budget: Budget,
    run_trials: int,
    say: Say,
    progress: Progress,
) -> None:
    """Those that are not done, one after the other."""
    for number, name in enumerate(names, 1):
        place = folder / FOLDER / name
        told = _Told(say, progress, number, len(names))
        earlier = read_entries(folder).get(name, {})
        entry = _one(name, replace(job, folder=place), judge, budget, searches[name], earlier, run_trials, told)
        write_entry(folder, name, {"key": keys[name], **entry})
        for rest in (place / "parts", *place.glob("network-*")):  # networks that were interrupted
            shutil.rmtree(rest, ignore_errors=True)


@dataclass(frozen=True)
class _Told:
    """Who is told of a baseline, and which of how many it is."""

    say: Say
    progress: Progress
    place: int
    places: int


def _chosen(run: RunConfig, only: Sequence[str], say: Say) -> list[str]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("baselines run in one process: start them without torchrun")
    for name in only:
        if name not in BASELINES:
            raise ConfigError(f"no baseline {name!r}{nearest(name, BASELINES)}; there are {', '.join(BASELINES)}")
    names = [name for name in BASELINES if name in only or not only]
    for name in list(names):
        if reason := BASELINES[name].why_not_in(run):
            _leave_out(name, reason, bool(only), say)
            names.remove(name)
    if not names:
        raise ConfigError("no baseline is of use beside this run")
    return names


def _of_use(job: Job, names: Sequence[str], named: bool, say: Say) -> list[str]:
    """Those that predict some task from this data, before any is trained.

    Args:
        named: whether they were asked for by name.
    """
    found = []
    for name in names:
        tasks, reasons = _predicted(BASELINES[name], job)
        if tasks:
            found.append(name)
        else:
            _leave_out(name, reasons[0] if reasons else "predicts none of the tasks asked for", named, say)
    return found


def _leave_out(name: str, reason: str, named: bool, say: Say) -> None:
    if named:
        raise ConfigError(f"{name}: {reason}; leave it out of --only")
    say(f"{name}: skipped: {reason}")


def _predicted(baseline: Baseline, job: Job) -> tuple[list[Task], list[str]]:
    """The tasks that a baseline predicts, and why not the others."""
    tasks, reasons = list[Task](), list[str]()
    for task in job.data.tasks:
        if job.tasks and task.name not in job.tasks and not (baseline.joint or baseline.whole):
            continue
        if reason := baseline.why_not(task, job.data):
            reasons.append(reason)
        else:
            tasks.append(task)
    return tasks, reasons


def _one(
    name: str,
    job: Job,
    judge: Judge,
    budget: Budget,
    key: str,
    earlier_entry: dict[str, Any],
    run_trials: int,
    told: _Told,
) -> dict[str, Any]:
    """Search for one baseline's settings, write its predictions, and make its entry.

    Args:
        key: names the search, whatever the number of its trials.
        earlier_entry: of ``baselines.json``; where it is of the same search, its trials are the first.
    """
    baseline, data = BASELINES[name], job.data
    tasks, notes = _predicted(baseline, job)
    tasks = _by_weight(tasks, judge.fused)
    units = {"all tasks": tasks} if baseline.joint else {task.name: [task] for task in tasks}
    settings = candidates_of(baseline, job.run, budget, job.seed)
    # By the task's place among all, not among these: their order is that of weights, which may change meanwhile.
    parts = {title: job.folder / "parts" / f"{data.column(unit[0])}.npz" for title, unit in units.items()}
    before = {title: Found() for title in units}
    for title, unit in units.items():
        # An interrupted search knows more than the one before it that was done.
        done = found_before(earlier_entry, job.folder, key, title, [task.name for task in unit])
        done = done if done is not None and _is_whole(job, unit, done) else None
        found_so_far = [of for of in (load_part(parts[title], key), done) if _is_of(of, settings)]
        before[title] = max(found_so_far, key=lambda of: len(of.trials), default=Found())
    course = Course(
        name, told.place, told.places, dict.fromkeys(units, len(settings)), budget.seconds, told.progress
    )  # fmt: skip
    if earlier := [trial.seconds for found in before.values() for trial in found.trials]:
        there = f"{len(earlier)} trial{'s' * (len(earlier) != 1)}"
        told.say(f"{name}: goes on after {there} done before, which took {sum(earlier):.0f} s")
        for seconds in earlier:
            course.ended(seconds)
    began, searched, predictions = time.monotonic() - sum(earlier), dict[str, Found](), Predictions()
    for i, (title, unit) in enumerate(units.items()):
        until = float("inf") if budget.seconds is None else began + budget.seconds * (i + 1) / len(units)
        found = _searched(baseline, job, unit, settings, until, before[title], parts[title], key, course)
        searched[title] = found
        trials = f"{len(found.trials)} trial{'s' * (len(found.trials) != 1)}"
        own = " (not tuned: the run's own settings)" * (baseline.network and len(found.trials) == 1)
        told.say(f"{name}: {title}, {trials}, {found.seconds:.1f} s, {_shown(unit, found)}{own}")
        for split, of_split in found.predictions.items():
            predictions.setdefault(split, {}).update(of_split)
    return {
        "search": key,
        "about": baseline.about,
        "settings": {title: found.settings for title, found in searched.items()},
        "trials": sum(len(found.trials) for found in searched.values()),
        "seconds": sum(found.seconds for found in searched.values()),
        "budget": {"trials": budget.trials_of(baseline.network), "seconds": budget.seconds},
        TUNED: how_tuned(
            max(len(found.trials) for found in searched.values()),
            baseline.network,
            not baseline.joint,
            run_trials,
            more=bool(baseline.settings_in(job.run)[1]),
        ),
        "rows": data.total if baseline.network else len(data.train),
        "searched": {title: [finite(asdict(trial)) for trial in found.trials] for title, found in searched.items()},
        **judge.entry(job.folder, predictions, notes),
    }


def _is_of(found: Found | None, settings: Sequence[Settings]) -> TypeGuard[Found]:
    """Whether the trials of a search are the first of these settings."""
    tried = [] if found is None else [trial.settings for trial in found.trials]
    return found is not None and tried == list(settings[: len(tried)])


def _is_whole(job: Job, unit: Sequence[Task], found: Found) -> bool:
    """Whether the predictions beside an entry are those of its best trial, and not of a search that was interrupted."""
    rows = {split: len(of[unit[0].name]) for split, of in found.predictions.items()}
    if rows != {split: len(of) for split, of in job.data.held_out.items()}:
        return False
    return math.isclose(_quality(job, unit, found.predictions["val"]), found.quality, abs_tol=1e-4)


def candidates_of(baseline: Baseline, run: RunConfig, budget: Budget, seed: int) -> list[Settings]:
    """The settings that a baseline tries beside a run."""
    return candidates(*baseline.settings_in(run), budget.trials_of(baseline.network), seed)


def _searched(
    baseline: Baseline,
    job: Job,
    unit: Sequence[Task],
    settings: Sequence[Settings],
    until: float,
    before: Found,
    path: Path,
    key: str,
    course: Course,
) -> Found:
    title = "all tasks" if baseline.joint else unit[0].name
    number = len(before.trials)

    def attempt(setting: Settings) -> tuple[Predictions, float]:
        nonlocal number
        number += 1
        course.begins(title, number)
        predictions = baseline.fit(job, unit, setting)
        return predictions, _quality(job, unit, predictions["val"])

    def keep(found: Found) -> None:
        course.ended(found.trials[-1].seconds)
        save_part(path, key, found)

    found = search(settings, attempt, until=until, before=before, keep=keep)
    course.passed_over(len(settings) - len(found.trials))
    return found


def _quality(job: Job, unit: Sequence[Task], predictions: dict[str, Any]) -> float:
    """On the validation split: AUC, 1 - NE or R² of a task; of several, the mean of those that the run watches."""
    rows = job.data.held_out["val"]
    metrics = {t.name: task_metrics(t, rows.labels[:, job.data.column(t)], predictions[t.name]) for t in unit}
    return mean_auc([t for t in unit if t.name in job.run.training.watch] or deciding(unit, metrics), metrics)


def _shown(unit: Sequence[Task], found: Found) -> str:
    main = MAIN[unit[0].kind]
    alone = "1 - " * (sign_of_better(main) < 0) + label_of(main)  # the higher the better
    what = alone if len(unit) == 1 else f"mean {label_of('auc')}"
    return f"{what} {found.quality:.4f} on val"


def _by_weight(tasks: Sequence[Task], fused: nn.Module) -> list[Task]:
    """Tasks in the order in which they get their share of the seconds: the largest weight in the fused score first."""
    weights = dict(zip(fused.tasks, getattr(fused, "weights", [1.0] * len(fused.tasks)), strict=True))  # type: ignore
    return sorted(tasks, key=lambda task: -abs(float(weights.get(task.name, 0.0))))
