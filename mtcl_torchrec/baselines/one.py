"""The search for one baseline's settings, and the entry that tells what it came to."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from mtcl_torchrec.baselines.entries import TUNED, how_tuned
from mtcl_torchrec.baselines.judge import Judge
from mtcl_torchrec.baselines.kinds import BASELINES, Baseline, Job
from mtcl_torchrec.baselines.progress import Course, Progress
from mtcl_torchrec.baselines.rows import Say
from mtcl_torchrec.baselines.search import Budget, Found, Predictions, Settings, candidates, search
from mtcl_torchrec.baselines.store import found_before, load_part, save_part
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.evaluation.metrics import mean_auc, stopping_tasks, task_metrics
from mtcl_torchrec.evaluation.naming import MAIN, label_of, sign_of_better
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.history import finite


@dataclass(frozen=True)
class Told:
    """Who is told of a baseline, and which of how many it is."""

    say: Say
    progress: Progress
    place: int
    places: int


def predicted_tasks(baseline: Baseline, job: Job) -> tuple[list[Task], list[str]]:
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


def find_one(
    name: str,
    job: Job,
    judge: Judge,
    budget: Budget,
    key: str,
    earlier_entry: dict[str, Any],
    run_trials: int,
    told: Told,
) -> dict[str, Any]:
    """Search for one baseline's settings, write its predictions, and make its entry.

    Args:
        key: names the search, whatever the number of its trials.
        earlier_entry: of ``baselines.json``; where it is of the same search, its trials are the first.
    """
    baseline, data = BASELINES[name], job.data
    tasks, notes = predicted_tasks(baseline, job)
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
    return mean_auc(stopping_tasks(unit, job.run.training.watch, job.data.unsure), metrics)


def _shown(unit: Sequence[Task], found: Found) -> str:
    main = MAIN[unit[0].kind]
    alone = "1 - " * (sign_of_better(main) < 0) + label_of(main)  # the higher the better
    what = alone if len(unit) == 1 else f"mean {label_of('auc')}"
    return f"{what} {found.quality:.4f} on val"


def _by_weight(tasks: Sequence[Task], fused: nn.Module) -> list[Task]:
    """Tasks in the order in which they get their share of the seconds: the largest weight in the fused score first."""
    weights = dict(zip(fused.tasks, getattr(fused, "weights", [1.0] * len(fused.tasks)), strict=True))  # type: ignore
    return sorted(tasks, key=lambda task: -abs(float(weights.get(task.name, 0.0))))
