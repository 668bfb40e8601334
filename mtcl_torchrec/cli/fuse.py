"""`mtcl fuse`: fit what a finished run ranks by, or set it, without training."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from mtcl_torchrec.baselines.entries import FILE as BASELINES
from mtcl_torchrec.cli.app import app, note_if_unfinished, screen
from mtcl_torchrec.cli.arguments import check_run
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.config import RunConfig, load_run
from mtcl_torchrec.config.commands import SESSION_MINUTES, USUAL_COMBINERS, Search
from mtcl_torchrec.config.fusion import KINDS
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import FUSION, METRICS, PREDICTIONS, RunWarning, readable_folder

if TYPE_CHECKING:
    from mtcl_torchrec.data.source import Rows
    from mtcl_torchrec.fusing.combiners import Combiner
    from mtcl_torchrec.fusing.fitted import FittedFusion
    from mtcl_torchrec.fusing.held_out import HeldOut
    from mtcl_torchrec.training.finished import FinishedRun

_FITTING = ("--combiner", "--constraint", "--influence", "--data", "--feature")
_TELL_EVERY = 10.0  # seconds, where stderr is no terminal
_GATED = "context_gated_mean"


@app.command()
def fuse(
    run_dir: Annotated[Path, typer.Argument(help="What `mtcl train` or `mtcl demo` wrote.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="What the ranking shall be best at: value@K (mean over requests of the values of what happened to the "
            "K best rows), ndcg@K, gauc:TASK, auc:TASK.  Default: value@K of --k."
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many rows are shown.  Default: the shortest of the run's `evaluation.k`, as in its report."
        ),
    ] = None,
    value: Annotated[
        list[str] | None,
        typer.Option(
            help="task=number: what its event is worth, or, below 0, costs (of a regression: each unit of its label); "
            "may be repeated.  Default: the run's `evaluation.values`, or else what its `fusion.weights` say of events."
        ),
    ] = None,
    combiner: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A kind to try; may be repeated.  One of {', '.join(KINDS)}; or all.  Default: "
            f"{', '.join(USUAL_COMBINERS)}, and expected_value where a task's label counts after another's event, or a "
            "price."
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
    rejudge: Annotated[
        bool,
        typer.Option(
            "--rejudge",
            help="Fit nothing: judge the run by the score that it has now, as after fusion.yaml was edited.",
        ),
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

    **Values and weights** are two things.  Values say what an event is worth to you, and judge: `evaluation.values` in
    run.yaml, by which value@k counts wherever it is printed, or `--value` here, for this fit alone.  Weights make the
    score: `fusion.weights` in run.yaml, until what is fitted here takes their place.  Without values, the weights stand
    for them, of binary tasks; with calibrated predictions, the values themselves are good weights, and are kept unless
    others are better by more than chance.

    **By what events are worth:** mtcl fuse RUN_DIR --target value@5 --value click=1 --value like=8 --value report=-60

    **By hand, at once:** mtcl fuse RUN_DIR --set click=0.5,like=2

    **Back to run.yaml:** mtcl fuse RUN_DIR --reset

    **With a floor:** mtcl fuse RUN_DIR --target auc:click --constraint 'auc:like >= 0.8'
    """
    console = screen()
    fitting = dict(zip(_FITTING, (combiner, constraint, influence, data, feature), strict=True))
    more = fitting | {"--set": set_, "--value": value, "--test": test, "--target": target, "--k": k}
    if reset:
        _refuse_more(more | {"--rejudge": rejudge}, "--reset goes back to run.yaml")
        _reset(run_dir, console, dry_run)
        return
    if rejudge:
        _refuse_more(more | {"--dry-run": dry_run}, "--rejudge judges the run by the score that it has")
        _judge_anew(run_dir, console)
        return
    if set_ and (clash := next((name for name, given in fitting.items() if given), None)):
        raise ConfigError(f"--set takes the weights as they are, and {clash} says how to fit them: give one of them")
    check_run(run_dir, "fuse")
    if_stopped(f"{run_dir} ranks as before")
    from mtcl_torchrec.cli.fitted import print_fitted, print_former, print_test
    from mtcl_torchrec.training.finished import FinishedRun

    run = FinishedRun.load(run_dir)
    note_if_unfinished(run, run_dir)
    before = run.model.output.fused_score
    target = _target(run, target, k)
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
            values=(_with_weighed(values, run, held_out) if whence else values) or None,
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
        print_fitted(fitted, held_out, console)
        print_former(run_dir, fitted, console)
        if not dry_run:
            _save(fitted, run, run_dir, console)
    if test:
        reads_context = getattr(before, "needs_context", False)
        judged = _held_out(run, run_dir, None, "test", session_minutes, context=reads_context)
        if before is not None:
            judged = judged.with_ranking("as it was", judged.scores(before))
        if run.model.output.fused_score is not None:
            judged = judged.with_popularity(run.model.output.fused_score)
        print_test(run, judged, values, target, console)
    if not dry_run:
        _judge_anew(run_dir, console)
        console.print(
            "\nNext:" + ("" if test else f"\n  mtcl fuse {run_dir} --set ... --test    judge weights by the test split")
            + f"\n  mtcl recommend {run_dir} --user USER",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _target(run: FinishedRun, target: str | None, k: int | None) -> str:
    """What is fitted for: by default, what the run's report begins with."""
    if target is None:
        return f"value@{k or min(run.config.evaluation.k)}"
    if k is not None:
        raise ConfigError(f"--k says how many rows are shown, and so does --target {target}: give one of them")
    return target


def _values(run: FinishedRun, given: list[str] | None, target: str) -> tuple[dict[str, float], str]:
    """What events are worth, and a line that says so where it was not given."""
    if given:
        return task_numbers(given, "--value"), ""
    if "@" not in target:
        return {}, ""
    from mtcl_torchrec.training.fused import numbers_named
    from mtcl_torchrec.training.judging import worth_of

    values = dict(worth_of(run.config))
    if not values:
        raise ConfigError(f"--target {target} needs --value: what each task's event is worth, such as --value like=8")
    by_unit = {task.name for task in run.config.data_schema.tasks if task.kind == "regression"}
    unit = dict.fromkeys(by_unit, " for each unit of its label")
    unit |= {task: f" · {feature}" for task, feature in numbers_named(run.config.fusion, run.fusion).items()}
    shown = ", ".join(f"{task} {value:g}{unit.get(task, '')}" for task, value in values.items())
    whence = "evaluation.values of the run"
    if run.config.evaluation.values is None:
        whence = "the weights of the run's fusion"
        if left := [task for task in _weighed(run) if task not in values]:
            shown += f"; nothing is counted for {', '.join(left)}, as in the run's own value@k"
    return values, f"values are {whence}: {shown}  (--value TASK=NUMBER for others)"


def _with_weighed(values: dict[str, float], run: FinishedRun, held_out: HeldOut) -> dict[str, float]:
    """What counts for nothing, such as a class, may be worth a weight all the same: it stays in the score."""
    entering = [task for task in _weighed(run) if task in held_out.parts and task in held_out.labels]
    return dict.fromkeys(entering, 0.0) | values


def _weighed(run: FinishedRun) -> list[str]:
    """The tasks that run.yaml gives a weight in the score."""
    return list((run.config.fusion.weights or {}) if run.config.fusion is not None else {})


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
    from mtcl_torchrec.fusing.combiners import ALL
    from mtcl_torchrec.training.held_out import gate_of

    if features and not {_GATED, ALL} & set(kinds or ()):
        raise ConfigError(f"--feature says what the weights of a {_GATED} depend on: it needs --combiner {_GATED}")
    if not kinds:
        return None
    gated = [gate_of(run, features or ())] if _GATED in kinds or ALL in kinds else []
    return [*(kind for kind in kinds if kind != _GATED), *gated]


def _held_out(
    run: FinishedRun, folder: Path, data: list[str] | None, split: str, session_minutes: float, *, context: bool
) -> HeldOut:
    from mtcl_torchrec.data.source import read_rows
    from mtcl_torchrec.training.held_out import columns_needed, held_out_of, rows_of_split

    columns, config = columns_needed(run), load_run(folder / "run.yaml")
    rows = _unseen(config, read_rows(data, columns)) if data else rows_of_split(config, columns, split)
    return held_out_of(run, rows, session_minutes=session_minutes, context=context)


def _unseen(config: RunConfig, rows: Rows) -> Rows:
    """The rows of --data without those that the run was trained on, where that can be told."""
    from mtcl_torchrec.training.known_rows import trained_on

    seen = trained_on(config, rows)
    if seen is None or not seen.any():
        return rows
    what = f"--data: {seen.sum():,} of {len(rows):,} rows are rows that the run was trained on"
    if seen.all():
        raise ConfigError(f"{what}, and weights fitted on those are too good to be true: give rows of later")
    typer.echo(f"mtcl: {what}; they are left out, as weights fitted on them would be too good to be true", err=True)
    return rows.take(~seen)


def _refuse_more(given: dict[str, Any], what: str) -> None:
    if clash := next((name for name, value in given.items() if value), None):
        raise ConfigError(f"{what} and does nothing else: leave {clash} out")


def _judge_anew(folder: Path, console: Console) -> None:
    """Bring predictions and metrics.json up to the score that the run has now, or say why they are not."""
    from mtcl_torchrec.training.rejudging import rejudge as rejudge_run

    with (
        Status("judging the run by the score that it has now", console=Console(stderr=True)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RunWarning)
        try:
            splits = rejudge_run(folder)
        except (ConfigError, DataError, OSError) as error:
            said = f"{METRICS} and {PREDICTIONS}/ still hold the score before: {error}"
        else:
            said = f"judged by it: {METRICS} and {PREDICTIONS}/ of {' and '.join(splits)}" if splits else ""
    lines = [said] if said else []
    lines += _rank_baselines_anew(folder)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _rank_baselines_anew(folder: Path) -> list[str]:
    """Baselines rank as the run does; of one that is not in memory, `mtcl baselines` sees to that."""
    if not (folder / BASELINES).is_file():
        return []
    from mtcl_torchrec.baselines.run import rank_anew

    run, lines = load_run(folder / "run.yaml"), list[str]()
    if run.data.stream or run.data.synthetic is not None:
        return [f"{folder / BASELINES} ranks by the score before, until `mtcl baselines {folder}` is called"]
    try:
        with Status("ranking the baselines by it, too", console=Console(stderr=True)):
            rank_anew(run, folder, say=lines.append)
    except (ConfigError, DataError, OSError) as error:
        lines.append(f"{folder / BASELINES} still ranks by the score before: {error}")
    return lines


def _fit_with_bar(held_out: HeldOut, **options: Any) -> FittedFusion:
    from mtcl_torchrec.fusing.fit import fit_fusion

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
    from mtcl_torchrec.training.fitted_fusion import DECLARED, reset_fusion

    fitted = readable_folder(folder / FUSION) / DECLARED
    check_run(folder, "fuse")
    if not fitted.is_file():
        raise ConfigError(f"--reset: {folder} ranks by the fusion of its run.yaml already, no other was fitted")
    kept = None if dry_run else reset_fusion(folder)
    said = f"; {fitted.parent} is kept as {kept}" if kept else ""
    console.print(f"{folder} ranks by the fusion of its run.yaml again{said}", highlight=False, soft_wrap=True)
    if not dry_run:
        _judge_anew(folder, console)


def _set_weights(run: FinishedRun, folder: Path, weights: dict[str, float], console: Console, dry_run: bool) -> None:
    from mtcl_torchrec.fusing.combiners import signed_weights
    from mtcl_torchrec.training.fitted_fusion import save_fusion, set_weights

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
    from mtcl_torchrec.training.fitted_fusion import PICTURE, save_fusion

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
