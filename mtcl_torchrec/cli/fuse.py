"""`mtcl fuse`: fit what a finished run ranks by, or set it, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mtcl_torchrec.cli.app import app, note_if_unfinished, screen
from mtcl_torchrec.cli.arguments import check_run, task_numbers
from mtcl_torchrec.cli.fuse_inputs import combiners_of, held_out_rows, target_of, values_of, with_weighed
from mtcl_torchrec.cli.judge_anew import judge_anew
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.config.commands import SESSION_MINUTES, USUAL_COMBINERS, Search
from mtcl_torchrec.config.fusion import KINDS
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import FUSION, readable_folder

if TYPE_CHECKING:
    from mtcl_torchrec.fusing.fitted import FittedFusion
    from mtcl_torchrec.fusing.held_out import HeldOut
    from mtcl_torchrec.training.finished import FinishedRun

_FITTING = ("--combiner", "--constraint", "--influence", "--data", "--feature")
_TELL_EVERY = 10.0  # seconds, where stderr is no terminal


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
            help="Without schema.request, a user's rows up to so many minutes apart are one request; 0: all of them, "
            "as in `mtcl evaluate` and the report.",
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
        judge_anew(run_dir, console)
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
    target = target_of(run, target, k)
    values, whence = values_of(run, value, target)
    if set_:
        _set_weights(run, run_dir, task_numbers(set_, "--set"), console, dry_run)
        if whence and test:
            console.print(whence, highlight=False, soft_wrap=True)
    else:
        if whence:
            console.print(whence, highlight=False, soft_wrap=True)
        kinds = combiners_of(run, combiner, feature)
        context = any(not isinstance(kind, str) for kind in kinds or ())
        held_out = held_out_rows(run, run_dir, data, "val", session_minutes, context=context)
        fitted = _fit_with_bar(
            held_out,
            values=(with_weighed(values, run, held_out) if whence else values) or None,
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
        judged = held_out_rows(run, run_dir, None, "test", session_minutes, context=reads_context)
        if before is not None:
            judged = judged.with_ranking("as it was", judged.scores(before))
        if run.model.output.fused_score is not None:
            judged = judged.with_popularity(run.model.output.fused_score)
        print_test(run, judged, values, target, console)
    if not dry_run:
        judge_anew(run_dir, console)
        console.print(
            "\nNext:" + ("" if test else f"\n  mtcl fuse {run_dir} --set ... --test    judge weights by the test split")
            + f"\n  mtcl recommend {run_dir} --user USER",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _refuse_more(given: dict[str, Any], what: str) -> None:
    if clash := next((name for name, value in given.items() if value), None):
        raise ConfigError(f"{what} and does nothing else: leave {clash} out")


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
        judge_anew(folder, console)


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
