"""What a search came to: the best run as YAML, a table, a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from mtcl_torchrec.config import run_as_data, run_from_data, with_paths_from
from mtcl_torchrec.config.paths import value_at
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import replace_file
from mtcl_torchrec.training.history import finite
from mtcl_torchrec.training.tuning.hints import enough, hints
from mtcl_torchrec.training.tuning.noise import half_of_lead
from mtcl_torchrec.training.tuning.objective import Objective, said_of
from mtcl_torchrec.training.tuning.picture import draw_parallel
from mtcl_torchrec.training.tuning.space import Parameter, Space, Value, plain, shown

if TYPE_CHECKING:
    from mtcl_torchrec.training.tuning.study import Finished, Study

TRIALS = "trials"
BEST, SUMMARY, PICTURE = "best.yaml", "tuning.json", "parallel.png"
_OF_KIND = {"binary": ("auc", "gauc", "ne"), "multiclass": ("ne", "top1"), "regression": ("r2", "mse")}


@dataclass
class TuningResult:
    """What a search came to.

    Args:
        folder: of the search.
        objective: its name.
        trials: all that are over.
        best: the best of them.
        own: the run as it was; None where it failed.
        importances: path -> share of what the objective varies by.
        changes: path -> what the best run has there, and what it was; of the settings that were searched.
        kinds: task -> its kind.
        hints: what to do next, a line each.
        half: of the 95 % interval of the best trial's lead on the run as it was; None where that is not known.
    """

    folder: Path
    objective: str
    trials: list[Finished]
    best: Finished
    own: Finished | None
    importances: dict[str, float]
    changes: dict[str, str]
    kinds: dict[str, str]
    hints: list[str]
    half: float | None = None

    @property
    def best_yaml(self) -> Path:
        """The best run, to be trained."""
        return self.folder / BEST


def short(path: str) -> str:
    """The last two parts of a path.

    Example:
        >>> short("schema.tasks.click.weight")
        'click.weight'
    """
    return ".".join(path.split(".")[-2:])


def best_of(trials: Sequence[Finished], objective: Objective) -> Finished | None:
    """The best of the trials that came to their end, the first of equal ones."""
    sign = 1 if objective.direction == "maximize" else -1
    complete = [t for t in trials if t.state == "complete" and t.value is not None]
    return max(complete, key=lambda t: (sign * (t.value or 0.0), -t.number), default=None)


def outcome(folder: Path, space: Space, objective: Objective, study: Study, say: Callable[[str], None]) -> TuningResult:
    """Write what a search came to.

    Raises:
        ConfigError: no trial came to its end.
    """
    trials = study.finished()
    best = best_of(trials, objective)
    if best is None:
        why = next((f": {t.error}" for t in trials if t.error), "")
        raise ConfigError(f"{folder}: no trial came to its end{why}")
    write_best(folder, space, objective, trials)
    own = next((t for t in trials if t.number == 0 and t.state == "complete"), None)
    told = sum(t.state == "complete" for t in trials) >= enough(len(space.parameters))
    half = None
    if own is not None and best is not own:
        one, other = (folder / TRIALS / f"{trial.number:04d}" for trial in (own, best))
        half = half_of_lead(one, other, objective, without=best.left_out)
    result = TuningResult(
        folder=folder,
        objective=objective.name,
        trials=trials,
        best=best,
        own=own,
        importances=study.importances() if told else {},
        changes=_changes(space, best),
        kinds={task.name: task.kind for task in space.run.data_schema.tasks},
        hints=hints(space, trials, best),
        half=half,
    )
    content = {
        "objective": objective.name,
        "direction": objective.direction,
        "space": space.as_json(),
        "own": space.own(),
        "best": best.number,
        "half_of_lead": half,
        "left_out": best.left_out,
        "importances": result.importances,
        "hints": result.hints,
        "trials": [asdict(trial) for trial in trials],
    }
    replace_file(folder / SUMMARY, json.dumps(finite(content), indent=1))
    try:
        draw_parallel(folder / PICTURE, space, objective, trials, best, list(result.importances))
    except ImportError:
        say("no picture of the trials: pip install 'mtcl_torchrec[plots]' to have one")
    return result


def write_best(folder: Path, space: Space, objective: Objective, trials: Sequence[Finished]) -> None:
    """The best run so far as YAML, which says where it comes from."""
    best = best_of(trials, objective)
    if best is None:
        return
    own = next((t for t in trials if t.number == 0 and t.value is not None), None)
    run = space.with_values(best.values if best.number else {})
    data = run_as_data(with_paths_from(run_from_data(plain(run)), folder))  # without what tells how to tune it
    was = "" if own is None or own is best else f"; the run as it was: {own.value:.5f}"
    lines = [
        f"Found by mtcl tune: {objective.name} {best.value:.5f} on the validation split (trial {best.number} of "
        f"{len(trials)}){was}.",
        "The best of many trials looks better on that split than it is; the test split was not looked at.",
        f"Train it: mtcl train {BEST}",
    ]
    changes = _changes(space, best)
    if best.left_out:
        lines.append(f"{objective.name} is without {said_of(best.left_out)} in validation.")
    lines += ["What is other than it was:", *(f"  {path}: {change}" for path, change in changes.items())] * bool(
        changes
    )
    head = "".join(f"# {line}\n" for line in lines)
    # What holds no other mapping or list stands in one line, as a person would write it.
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    replace_file(folder / BEST, head + text)


def _changes(space: Space, best: Finished) -> dict[str, str]:
    """Path -> before and after, where they differ."""
    found = {}
    for parameter in space.parameters if best.number else ():
        if parameter.path in best.values and best.values[parameter.path] != parameter.own:
            found[parameter.path] = _change(space, parameter, best.values[parameter.path])
    return found


def _change(space: Space, parameter: Parameter, value: Value) -> str:
    before = value_at(space.whole, parameter.places[0])
    if parameter.config.times is not None:
        return f"times {shown(value)}" + (f", was {before}" if len(parameter.places) == 1 else "")
    return f"{shown(value)}, was {_text(before)}"


def _text(value: Any) -> str:
    return shown(value) if isinstance(value, (str, int, float, type(None))) else json.dumps(value)


def _lead(result: TuningResult, own: Finished) -> str:
    """How far the best trial is ahead, and whether that is more than chance."""
    ahead = (result.best.value or 0.0) - (own.value or 0.0)
    lead = f"{result.objective} {ahead:+.4f}"
    if result.half is None:
        return f"{lead}: how sure that is is not known (no predictions of both trials are kept)"
    said = f"{lead} ± {result.half:.4f} (half of a 95 % interval, over users of the validation split)"
    if abs(ahead) <= result.half:
        return f"{said}: within noise, the best is not shown to be better than the run as it is"
    return f"{said}: more than noise for these two; the best of many trials is a little flattered all the same"


def print_tuning(result: TuningResult, console: Console) -> None:
    """Print the best beside the run as it was, and what mattered."""
    best, own = result.best, result.own
    count = {state: sum(t.state == state for t in result.trials) for state in ("complete", "pruned", "failed")}
    console.print(
        f"\n{len(result.trials)} trials: {count['complete']} complete, {count['pruned']} given up on the way, "
        f"{count['failed']} failed", highlight=False,
    )  # fmt: skip
    if own is not None:
        table = plain_table("Validation", ["metric", "the run", f"best (trial {best.number})", "difference"])
        rows = [(result.objective, own.value, best.value)]
        for task, kind in result.kinds.items():
            for metric in _OF_KIND[kind]:
                pair = [of.metrics.get(task, {}).get(metric) for of in (own, best)]
                rows.append((f"{task} {metric}", pair[0], pair[1]))
        for name, before, after in rows:
            if before is not None and after is not None:
                table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        console.print(table, "")
        if best.left_out:
            console.print(
                f"{result.objective} is without {said_of(best.left_out)}: on so little in validation, noise would "
                "decide (training.watch names what counts).", highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
        if best is not own:
            console.print(_lead(result, own), highlight=False, markup=False, soft_wrap=True)
    if result.changes or result.importances:
        table = plain_table("Settings", ["path", "best", *(["importance"] if result.importances else [])])
        paths = [*result.importances, *(p for p in result.changes if p not in result.importances)]
        for path in paths:
            share = result.importances.get(path)
            told = ["–" if share is None else f"{share:.2f}"] if result.importances else []
            table.add_row(path, result.changes.get(path, "as it was"), *told)
        console.print(table, "")
    if best is own or best.number == 0:
        console.print("No trial was better than the run as it is.", highlight=False)
    for hint in result.hints:
        console.print(f"- {hint}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"The best run: {result.best_yaml}.  Its figure is the best of many on one split, and so a little too good; "
        f"the test split was not looked at:\n  mtcl train {result.best_yaml}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
