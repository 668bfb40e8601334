"""`mtcl demo`, `train`, `evaluate`: from a YAML to a run directory and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtcl_torchrec.cli.app import DeviceOption, app, note_if_unfinished, screen
from mtcl_torchrec.cli.recommend import print_recommendations
from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.data import kuairand
from mtcl_torchrec.data.source import column_names, find_files, read_rows
from mtcl_torchrec.evaluation.calibration import print_calibration
from mtcl_torchrec.evaluation.knowable import print_knowable
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.predictions_file import read_thresholds, write_predictions
from mtcl_torchrec.evaluation.report import print_evaluation
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.directory import Existing, claim_run_directory, fresh_run_directory
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.judging import evaluate_rows, predictions_path, rows_predicted, uncalibrated
from mtcl_torchrec.training.oracle import knowable_of, truth_columns
from mtcl_torchrec.training.run import RunResult, train_run
from mtcl_torchrec.training.sharding import ranks


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; a fresh one under runs/ by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that stands in --out.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Fewer or more epochs than the demo's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another random seed.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train on real short-video impressions (KuaiRand) that ship with the package, and rank videos for one user.

    Prints one table of all tasks on the test split, the fused score beside a popularity baseline on the same
    impressions, and the top 10 videos of one user.  Takes a few minutes on two cores.
    """
    console = screen()
    with ranks(device) as where:
        folder = out or fresh_run_directory("kuairand", where)
        claim_run_directory(folder, where, existing="overwrite" if overwrite else "refuse")
        if where.first:
            kuairand.write(folder / "data")
        where.barrier()
        run = parse_run(kuairand.example_run(), name="the demo's run", folder=folder)
        if epochs is not None:
            run.training.epochs = epochs
        if seed is not None:
            run.training.seed = seed
        existing: Existing = "overwrite" if overwrite else "refuse"
        result = train_run(run, folder, existing=existing, device=device, console=console)
    if not where.first:
        return
    show(result, console)
    recommender = Recommender.load(folder)
    seen = recommender.catalogue.seen
    user = int(seen.loc[seen["user_id"] != 0, "user_id"].value_counts().index[0])
    print_recommendations(recommender, user, {}, 10, False, console)
    console.print(
        f"\nThe run is in {folder}.  Next:\n"
        f"  mtcl recommend {folder} --user 42 --context hour=20 --top 10\n"
        f"  mtcl evaluate {folder} --data {folder}/data/test.parquet\n"
        f"  tensorboard --logdir {folder}/tensorboard",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def train(
    run_yaml: Annotated[Path, typer.Argument(help="The run: data, schema, model, optimizers, training, fusion.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run directory; a fresh one under runs/ by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that stands in --out.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out as if never stopped, or begin it.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train what a YAML file describes; keep the best epoch; evaluate it on the validation and test split.

    The run directory holds checkpoints (torch.distributed.checkpoint), all that preprocessing learnt, metrics.json, and
    TensorBoard scalars.  After an interruption, --resume goes on where the newest checkpoint stands; ranks that
    `torchrun --max-restarts` starts again do so by themselves.  `mtcl init` writes a first YAML for a file of yours.
    """
    console = screen()
    if resume and overwrite:
        raise ConfigError("--resume goes on with the run in --out, --overwrite replaces it: give one of them")
    if resume and out is None:
        raise ConfigError("--resume needs --out: the run directory to go on with")
    existing: Existing = "resume" if resume else "overwrite" if overwrite else "refuse"
    run = load_run(run_yaml)
    with ranks(device) as where:
        folder = out or fresh_run_directory(run.name, where)
        result = train_run(run, folder, existing=existing, device=device, console=console)
    if where.first:
        show(result, console)
        console.print(f"\nThe run is in {folder}.", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="What `mtcl train` or `mtcl demo` wrote.")],
    data: Annotated[list[str], typer.Option(help="Parquet or CSV with inputs and labels; may be repeated.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 8192,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the predictions to this Parquet file, for `mtcl compare`.")
    ] = None,
) -> None:
    """Evaluate a finished run on other rows: each task, and the fused score beside popularity."""
    run = FinishedRun.load(run_dir)
    there = set.intersection(*(set(column_names(file)) for file in find_files(data)))
    wanted = [c for c in (run.preprocessor.declared.time, *truth_columns(run.config)) if c in there]
    columns = list(dict.fromkeys([*run.preprocessor.columns(statistics=False), *wanted]))
    raw = run.preprocessor.conform(read_rows(data, columns))
    note_if_unfinished(run, run_dir)
    rows = run.preprocessor.encode(raw)
    predictions = predict(run.model, rows, batch_size=batch_size)
    result = evaluate_rows(run.model, run.preprocessor, raw, rows, run.catalogue, predictions=predictions)
    result.knowable = knowable_of(run.config, run.model, raw, rows, predictions)
    print_evaluation(result, ", ".join(data), screen())
    if result.knowable is not None:
        print_knowable(result.knowable, screen())
    elif run.config.data.synthetic is not None:
        screen().print("\nthe rows are not of the run's world: what is knowable of them is not known", highlight=False)
    if save is not None:
        thresholds = read_thresholds(predictions_path(run_dir, "val"))
        before = uncalibrated(run.model, rows, batch_size=batch_size)
        table = rows_predicted(
            run.model.tasks, run.preprocessor, raw, rows, run.catalogue, predictions, uncalibrated=before,
            split=", ".join(data), thresholds=thresholds,
        )  # fmt: skip
        write_predictions(save, table)


def show(result: RunResult, console: Console) -> None:
    kept = f"epoch {result.history.best_epoch} of {len(result.history.epochs)}"
    for split, evaluation in result.evaluations.items():
        if split == "test" or len(result.evaluations) == 1:
            console.print()
            print_evaluation(evaluation, f"{split} split, {kept}", console)
            if evaluation.knowable is not None:
                print_knowable(evaluation.knowable, console)
            if result.calibration is not None:
                console.print()
                print_calibration(result.calibration.splits[split], f"{split} split", console)
