"""`mtcl fuse`: fit what a finished run ranks by, or set it, without training."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mtcl_torchrec.cli.app import app, note_if_unfinished, screen
from mtcl_torchrec.config import load_run
from mtcl_torchrec.data.source import Rows, read_rows
from mtcl_torchrec.evaluation.report import plain_table
from mtcl_torchrec.fusing.combiners import ALL, USUAL, Combiner, known_kinds, signed_weights
from mtcl_torchrec.fusing.fit import fit_fusion
from mtcl_torchrec.fusing.fitted import FittedFusion, compare
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.search import Search
from mtcl_torchrec.fusing.targets import parse_target
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import FUSION, readable_folder
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fitted_fusion import DECLARED, PICTURE, reset_fusion, save_fusion, set_weights
from mtcl_torchrec.training.held_out import SESSION_MINUTES, columns_needed, gate_of, held_out_of, rows_of_split

_FITTING = ("--combiner", "--constraint", "--influence", "--data", "--feature")
_TELL_EVERY = 10.0  # seconds, where stderr is no terminal
_GATED = "context_gated_mean"


@app.command()
def fuse(
    run_dir: Annotated[Path, typer.Argument(help="What `mtcl train` or `mtcl demo` wrote.")],
    target: Annotated[
        str,
        typer.Option(
            help="What the ranking shall be best at: value@K (mean over requests of the values of what happened to the "
            "K best rows), ndcg@K, gauc:TASK, auc:TASK."
        ),
    ] = "value@5",
    value: Annotated[
        list[str] | None,
        typer.Option(
            help="task=number: what its event is worth, or, below 0, costs (of a regression: each unit of its label); "
            "may be repeated.  Default: the weights of the run's `fusion`."
        ),
    ] = None,
    combiner: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A kind to try; may be repeated.  One of {', '.join(known_kinds())}; or all.  Default: "
            f"{', '.join(USUAL)}, and expected_value where a task's label counts after another's event, or a price."
        ),
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="What the weights of a context_gated_mean depend on; may be repeated.  Default: all features of user "
            "and context."
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            help="What to keep to, such as 'auc:like >= 0.8', 'weight:report <= -0.5' (of all weights), "
            "'share:long_view >= 0.3' (of the influence); may be repeated."
        ),
    ] = None,
    influence: Annotated[
        list[str] | None,
        typer.Option(
            help="task=share: how much of the ranking it shall decide, such as long_view=0.5; may be repeated."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="task=weight,...: take these weights as they are, those not named as they were; nothing is fitted or "
            "searched.",
        ),
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Back to the fusion of run.yaml; what was fitted is kept in fusion/former.")
    ] = False,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation, over users (or requests).")] = 5,
    search: Annotated[Search, typer.Option(help="How to search: tpe, cma (CMA-ES), none, or what suits.")] = "auto",
    trials: Annotated[int, typer.Option(min=1, help="Of each search, in each fold.")] = 100,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Fit on these rows instead of the validation split; Parquet or CSV, may be repeated."),
    ] = None,
    session_minutes: Annotated[
        float,
        typer.Option(
            min=0,
            help="Without schema.request, a user's rows up to so many minutes apart are one request; 0: all of them.",
        ),
    ] = SESSION_MINUTES,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same weights.")] = 0,
    test: Annotated[
        bool, typer.Option("--test", help="Then judge by the test split, which nothing was fitted on.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what comes of it; write nothing.")] = False,
) -> None:
    """Find the weights by which a finished run ranks, on rows that it was not trained on.  Nothing is trained.

    Tries each combiner with several ways to weights, judges each by cross-validation, takes the best that keeps to the
    constraints, and writes it into RUN_DIR/fusion, whence `recommend`, `evaluate`, `export` and `serve` take it,
    whatever the `fusion` of RUN_DIR/run.yaml says.  What was there before is kept in RUN_DIR/fusion/former, whither
    training on (`mtcl train --resume`) moves the whole: it was fitted for other predictions.

    **By what events are worth:** mtcl fuse RUN_DIR --target value@5 --value click=1 --value like=8 --value report=-60

    **By hand, at once:** mtcl fuse RUN_DIR --set click=0.5,like=2

    **Back to run.yaml:** mtcl fuse RUN_DIR --reset

    **With a floor:** mtcl fuse RUN_DIR --target auc:click --constraint 'auc:like >= 0.8'
    """
    console = screen()
    fitting = dict(zip(_FITTING, (combiner, constraint, influence, data, feature), strict=True))
    if reset:
        more = fitting | {"--set": set_, "--value": value, "--test": test}
        if clash := next((name for name, given in more.items() if given), None):
            raise ConfigError(f"--reset goes back to run.yaml and does nothing else: leave {clash} out")
        _reset(run_dir, console, dry_run)
        return
    if set_ and (clash := next((name for name, given in fitting.items() if given), None)):
        raise ConfigError(f"--set takes the weights as they are, and {clash} says how to fit them: give one of them")
    run = FinishedRun.load(run_dir)
    note_if_unfinished(run, run_dir)
    before = run.model.output.fused_score
    values, whence = _values(run, value, target)
    if set_:
        _set_weights(run, run_dir, task_numbers(set_, "--set"), console, dry_run)
        if whence and test:
            console.print(whence, highlight=False, soft_wrap=True)
    else:
        if whence:
            console.print(whence, highlight=False, soft_wrap=True)
        kinds = _combiners(run, combiner, feature)
        context = any(not isinstance(kind, str) for kind in kinds or ())
        held_out = _held_out(run, run_dir, data, "val", session_minutes, context=context)
        fitted = _fit_with_bar(
            held_out,
            values=values or None,
            target=target,
            combiners=kinds,
            folds=folds,
            search=search,
            trials=trials,
            constraints=constraint or [],
            influence=task_numbers(influence or [], "--influence") or None,
            seed=seed,
        )
        run.model.output.fused_score = fitted.fused_score
        _print_fitted(fitted, held_out, console)
        if not dry_run:
            _save(fitted, run, run_dir, console)
    if test:
        reads_context = getattr(before, "needs_context", False)
        judged = _held_out(run, run_dir, None, "test", session_minutes, context=reads_context)
        if before is not None:
            judged.rankings["as it was"] = judged.scores(before)
        _print_test(run, judged, values, target, console)
    if not dry_run:
        console.print(
            "\nNext:" + ("" if test else f"\n  mtcl fuse {run_dir} --set ... --test    judge weights by the test split")
            + f"\n  mtcl recommend {run_dir} --user USER",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _values(run: FinishedRun, given: list[str] | None, target: str) -> tuple[dict[str, float], str]:
    """What events are worth, and a line that says so where it was not given."""
    if given:
        return task_numbers(given, "--value"), ""
    if "@" not in target:
        return {}, ""
    if run.config.fusion is None or not run.config.fusion.weights:
        raise ConfigError(f"--target {target} needs --value: what each task's event is worth, such as --value like=8")
    values = dict(run.config.fusion.weights)
    counted = {task.name for task in run.config.data_schema.tasks if task.kind == "regression"}
    shown = ", ".join(f"{task} {v:g}" + " for each unit of its label" * (task in counted) for task, v in values.items())
    return values, f"values are the weights of the run's fusion: {shown}  (--value TASK=NUMBER for others)"


def task_numbers(pairs: list[str], option: str) -> dict[str, float]:
    """task=number pairs, each option one or several with commas between."""
    numbers: dict[str, float] = {}
    for pair in (p.strip() for text in pairs for p in text.split(",")):
        name, _, text = pair.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise ConfigError(f"{option} takes task=number, such as like=8, not {pair!r}")
        if name.strip() in numbers:
            raise ConfigError(f"{option}: {name.strip()!r} is given twice")
        numbers[name.strip()] = number
    return numbers


def _combiners(run: FinishedRun, kinds: list[str] | None, features: list[str] | None) -> list[str | Combiner] | None:
    """What is tried; a context-gated mean with the features that it reads."""
    if features and not {_GATED, ALL} & set(kinds or ()):
        raise ConfigError(f"--feature says what the weights of a {_GATED} depend on: it needs --combiner {_GATED}")
    if not kinds:
        return None
    gated = [gate_of(run, features or ())] if _GATED in kinds or ALL in kinds else []
    return [*(kind for kind in kinds if kind != _GATED), *gated]


def _held_out(
    run: FinishedRun, folder: Path, data: list[str] | None, split: str, session_minutes: float, *, context: bool
) -> HeldOut:
    columns = columns_needed(run)
    rows: Rows = read_rows(data, columns) if data else rows_of_split(load_run(folder / "run.yaml"), columns, split)
    return held_out_of(run, rows, session_minutes=session_minutes, context=context)


def _fit_with_bar(held_out: HeldOut, **options: Any) -> FittedFusion:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    err = Console(stderr=True)
    told = time.monotonic()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("fitting", total=None)

        def progress(done: int, total: int, doing: str) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total, description=doing)
            if not err.is_terminal and time.monotonic() - told >= _TELL_EVERY:
                told = time.monotonic()
                typer.echo(f"mtcl: {done / max(total, 1):.0%} fitted, now {doing}", err=True)

        return fit_fusion(held_out, **options, progress=progress)


def _reset(folder: Path, console: Console, dry_run: bool) -> None:
    fitted = readable_folder(folder / FUSION) / DECLARED
    if not (folder / "run.yaml").is_file():
        raise DataError(f"{folder}: no run here (run.yaml is missing)")
    if not fitted.is_file():
        raise ConfigError(f"--reset: {folder} ranks by the fusion of its run.yaml already, no other was fitted")
    kept = None if dry_run else reset_fusion(folder)
    said = f"; {fitted.parent} is kept as {kept}" if kept else ""
    console.print(f"{folder} ranks by the fusion of its run.yaml again{said}", highlight=False, soft_wrap=True)


def _set_weights(run: FinishedRun, folder: Path, weights: dict[str, float], console: Console, dry_run: bool) -> None:
    try:
        config = set_weights(run.model, run.fusion, weights, run.preprocessor.encoder)
    except ConfigError as error:
        raise ConfigError(f"--set: {error}") from None
    shown = ", ".join(f"{task} {w:g}" for task, w in signed_weights(config).items())
    console.print(f"{config.kind}: {shown}", highlight=False, soft_wrap=True)
    if not dry_run:
        about = {"combiner": config.kind, "method": "set", "weights": config.weights}
        where = save_fusion(folder, run.model, config, about)
        console.print(f"written to {where}", highlight=False, soft_wrap=True)


def _save(fitted: FittedFusion, run: FinishedRun, folder: Path, console: Console) -> None:
    assert fitted.config is not None  # combiners given by name have one
    try:
        import matplotlib  # noqa: F401

        draw = fitted.plot
    except ImportError:
        draw = None
        console.print("no picture of the Pareto front: pip install 'mtcl_torchrec[plots]' to have it", markup=False)
    where = save_fusion(folder, run.model, fitted.config, fitted.report(), draw=draw)
    picture = f"; what each task loses is drawn in {PICTURE} there" if draw else ""
    console.print(f"written to {where}{picture}", highlight=False, soft_wrap=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plus_minus(mean: float, error: float, digits: int = 4) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def _print_fitted(fitted: FittedFusion, held_out: HeldOut, console: Console) -> None:
    heads = next((t.against for t in fitted.tried if t.against), "")
    title = (
        f"{fitted.target.name} on folds left out: {len(held_out):,} rows, {held_out.requests:,} requests "
        f"(each a {held_out.requests_are}), {fitted.folds} folds"
    )
    console.print()
    against = [f"better than {heads} alone"] if heads else []
    console.print(f"[bold]{title}[/]", highlight=False, soft_wrap=True)
    table = plain_table("", ["ranked by", fitted.target.name, "± folds", *against])
    lines = fitted.table()
    for line in lines.to_dict("records"):
        mark = "  ← chosen" if line["name"] == fitted.chosen.name else ""
        if line["broken"]:
            mark = f"  breaks {line['broken']}"
        table.add_row(
            f"{line['name']}{mark}", _plus_minus(float(line["target"]), float(line["error"])), f"{line['std']:.4f}",
            *([_plus_minus(float(line["better"]), float(line["better_error"]))] if heads else []),
        )  # fmt: skip
    console.print(table)
    if fitted.left_for_values is not None:
        name, ahead, error = fitted.left_for_values
        console.print(
            f"the values stay the weights: {name} is better by {_plus_minus(ahead, error)}, which is no more than two "
            "standard errors",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for name, why in fitted.about["left_out"].items():
        console.print(f"{name} is left out: {why}", highlight=False, markup=False, soft_wrap=True)
    _warn_of_short_requests(fitted, held_out, console)
    console.print()
    weight = "starts at" if fitted.combiner.learns else "weight"
    table = plain_table(f"Chosen: {fitted.chosen.name}", ["task", weight, "± folds", "of the ranking"])
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


def _warn_of_short_requests(fitted: FittedFusion, held_out: HeldOut, console: Console) -> None:
    """A request of at most K rows is worth the same in any order."""
    name, _, k = fitted.target.name.partition("@")
    if name != "value" or not k.isdigit():
        return
    longer = float((held_out.rows_of_requests > int(k)).mean())
    if longer < 0.2:
        console.print(
            f"only {longer:.1%} of the requests have more than {k} rows; the others are worth the same in any order: "
            "take a smaller K, or longer requests (--session-minutes)",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _print_losses(losses: pd.DataFrame, console: Console) -> None:
    headers = [c for c in losses.columns if c != "task"]
    table = plain_table(
        "What each task's own ranking would be",
        ["task", *(h.replace("auc", "AUC").replace("gAUC", "GAUC") for h in headers)],
    )
    for line in losses.to_dict("records"):
        table.add_row(str(line["task"]), *(_plus_minus(float(line[h]), math.nan) for h in headers))
    console.print(table)


def _print_test(run: FinishedRun, held_out: HeldOut, values: dict[str, float], target: str, console: Console) -> None:
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
        gain = "" if line["name"] == "fused" else _plus_minus(float(line["better"]), float(line["better_error"]))
        table.add_row(str(line["name"]), _plus_minus(float(line["target"]), float(line["error"])), gain)
    console.print(table)
