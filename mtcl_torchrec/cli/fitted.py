"""What came of fitting a fusion, as tables: what was tried, what was chosen, how it does on the test split."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from mtcl_torchrec.evaluation.naming import heading_of
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.evaluation.worth import Verdict, verdict_lines
from mtcl_torchrec.fusing.fitted import FittedFusion, compare
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.rivals import verdict_in_target, verdict_on
from mtcl_torchrec.fusing.targets import longest_with_choice, parse_target
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import FUSION, readable_folder
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fitted import REPORT
from mtcl_torchrec.training.fitted_fusion import DECLARED


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plus_minus(mean: float, half: float, digits: int = 4) -> str:
    """A number and half of its interval; what would round to nothing has other digits.

    Example:
        >>> _plus_minus(0.12, 0.01), _plus_minus(-0.00001, 0.00002), _plus_minus(0.0, 0.0)
        ('0.1200 ± 0.0100', '-1e-05 ± 2e-05', '0')
    """
    if math.isnan(mean):
        return "–"
    if mean == 0 and half == 0:
        return "0"
    nothing = 0.5 * 10**-digits
    if half > 0 and abs(mean) < nothing and half < nothing:
        return f"{mean:.1g} ± {half:.1g}"
    return f"{mean:z.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def print_fitted(fitted: FittedFusion, held_out: HeldOut, console: Console) -> None:
    """What was tried on the folds, how each did, and what was chosen: tables and the verdict on fusing."""
    heads = next((t.against for t in fitted.tried if t.against), "")
    title = (
        f"{fitted.target.name} on folds left out: {len(held_out):,} rows, {held_out.requests:,} requests "
        f"(each a {held_out.requests_are}), {fitted.folds} folds"
    )
    console.print()
    against = [f"better than {heads} alone"] if heads else []
    console.print(f"[bold]{title}[/]", highlight=False, soft_wrap=True)
    table = plain_table("", ["ranked by", fitted.target.name, "sd of folds", *against])
    lines = fitted.table()
    for line in lines.to_dict("records"):
        mark = "  ← chosen" if line["name"] == fitted.chosen.name else ""
        if line["broken"]:
            mark = f"  breaks {line['broken']}"
        table.add_row(
            f"{line['name']}{mark}", _plus_minus(float(line["target"]), float(line["half"])),
            f"{line['std']:.4f}",
            *([_lead(str(line["name"]), heads, line["better"], line["better_half"])] if heads else []),
        )  # fmt: skip
    console.print(table)
    if fitted.left_for_values is not None:
        name, ahead, half = fitted.left_for_values
        console.print(
            f"the values stay the weights: {name} is better by {_plus_minus(ahead, half)}, which may be chance",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for name, why in fitted.about["left_out"].items():
        console.print(f"{name} is left out: {why}", highlight=False, markup=False, soft_wrap=True)
    costs = [t for t in held_out.tasks if fitted.values.get(t, 0.0) < 0 and f"head {t}" in set(lines["name"])]
    if costs:
        said = ", ".join(f"head {task}" for task in costs)
        console.print(
            f"{said}: reversed, the least likely first, as the event costs something",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    _warn_of_short_requests(fitted, held_out, console)
    _print_verdicts((fitted.pays, fitted.pays_in_target), "on folds left out", console)
    console.print()
    weight = "starts at" if fitted.combiner.learns else "weight"
    table = plain_table(f"Chosen: {fitted.chosen.name}", ["task", weight, "sd of folds", "of the ranking"])
    for task, number in fitted.weights.items():
        share = "–" if fitted.influence is None else f"{fitted.influence.get(task, 0.0):.0%}"
        table.add_row(task, f"{number:.4g}", f"{fitted.weights_std[task]:.2g}", share)
    console.print(table)
    for name, option in fitted.options.items():
        shown = ", ".join(f"{k} {_short(v)}" for k, v in option.items()) if isinstance(option, dict) else _short(option)
        console.print(f"{name}: {shown}", highlight=False, markup=False, soft_wrap=True)
    for text, found in fitted.chosen.kept.items():
        console.print(f"{text}: {found:.4g}", highlight=False, markup=False)
    console.print()
    _print_losses(fitted.task_losses(held_out), console)


def _lead(name: str, head: str, better: float, half: float) -> str:
    """By how much a line is better than the best head; of that head itself there is nothing to say."""
    return "" if name == f"head {head}" else _gain(better, half)


def _gain(better: float, half: float) -> str:
    return "the same" if better == 0 and half == 0 else _plus_minus(better, half)


def _warn_of_short_requests(fitted: FittedFusion, held_out: HeldOut, console: Console) -> None:
    """A request of at most K rows is worth the same in any order."""
    name, _, k = fitted.target.name.partition("@")
    if name != "value" or not k.isdigit():
        return
    longer = float((held_out.rows_of_requests > int(k)).mean())
    if longer < 0.2:
        console.print(
            f"only {longer:.1%} of the requests have more than {k} rows; the others are worth the same in any order: "
            f"take value@{longest_with_choice(held_out.rows_of_requests)}, or longer requests (--session-minutes)",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _print_losses(losses: pd.DataFrame, console: Console) -> None:
    headers = [c for c in losses.columns if c != "task"]
    table = plain_table(
        "What each task's own ranking would be",
        ["task", *map(heading_of, headers)],
    )
    for line in losses.to_dict("records"):
        table.add_row(str(line["task"]), *(_plus_minus(float(line[h]), math.nan) for h in headers))
    console.print(table)


def print_test(run: FinishedRun, held_out: HeldOut, values: dict[str, float], target: str, console: Console) -> None:
    """How the score that a run has now ranks the test split, beside what it had before and single heads.

    Raises:
        ConfigError: the run has no fused score.
    """
    fused = run.model.output.fused_score
    if fused is None:
        raise ConfigError("this run has no fused score")
    goal = parse_target(target, values or None, held_out.labels)
    tasks = [task for task in getattr(fused, "tasks", held_out.tasks) if task in held_out.parts]
    lines = compare(held_out, fused, goal, tasks, values)
    title = f"test split: {len(held_out):,} rows, {held_out.requests:,} requests (each a {held_out.requests_are})"
    console.print(f"\n[bold]{title}[/]", highlight=False, soft_wrap=True)
    table = plain_table("", ["ranked by", goal.name, "fused is better by"])
    for line in lines.to_dict("records"):
        gain = "" if line["name"] == "fused" else _gain(float(line["better"]), float(line["better_half"]))
        table.add_row(str(line["name"]), _plus_minus(float(line["target"]), float(line["half"])), gain)
    console.print(table)
    found = [say(held_out, held_out.scores(fused), tasks, goal, values) for say in (verdict_on, verdict_in_target)]
    _print_verdicts(found, "on the test split", console)


def _print_verdicts(found: Iterable[Verdict | None], of: str, console: Console) -> None:
    """Whether fusing pays in what it is worth, and in what was targeted where that is something else."""
    for verdict, asked in zip(found, ("Does fusing pay?", "And in what was targeted?"), strict=True):
        for said in [] if verdict is None else verdict_lines(verdict, of, asked):
            console.print(said, highlight=False, markup=False, soft_wrap=True)


def print_former(folder: Path, fitted: FittedFusion, console: Console) -> None:
    """Say what a fit is to replace, and what that was worth on rows left out; nothing where none stands there.

    Args:
        folder: the run directory.
        fitted: what is to stand there.
    """
    there = readable_folder(folder / FUSION)
    if not (there / DECLARED).is_file():
        return
    before: dict[str, Any] = json.loads((there / REPORT).read_text()) if (there / REPORT).is_file() else {}
    name = f"{before.get('combiner', 'another')}, {before.get('method', 'edited')}"
    head = str(before.get("method", "")).startswith("head ")
    of_name = {str(of["name"]): of for of in before.get("tried") or []}
    found = of_name.get(str(before.get("method")) if head else name, {})
    now, stood = fitted.chosen, f"in its place stood {name}"
    if found.get("target") is None:
        weights = ", ".join(f"{task} {weight:.4g}" for task, weight in (before.get("weights") or {}).items())
        line = f"{stood}{f' ({weights})' if weights else ''}, which was not judged on folds left out"
    else:
        was = _plus_minus(float(found["target"]), _number(found.get("half")))
        line = f"{stood}: {before['target']} {was} on folds left out"
        same = all(before.get(key) == value for key, value in _judged_on(fitted).items())
        if not same:
            line += ", of other rows, requests or another target: the two do not compare"
        else:
            ahead = now.mean - float(found["target"])
            line += f"; the new one: {_plus_minus(now.mean, now.half)}, {'better' if ahead > 0 else 'no better'}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    if found.get("target") is not None and "as it was" in {t.name for t in fitted.tried}:
        console.print(
            'the line "as it was" is of all rows that it may have been fitted on, so it flatters it',
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _judged_on(fitted: FittedFusion) -> Mapping[str, Any]:
    about = {key: fitted.about[key] for key in ("rows", "requests", "requests_are")}
    return {"target": fitted.target.name, "folds": fitted.folds, "seed": fitted.seed, "values": fitted.values, **about}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
