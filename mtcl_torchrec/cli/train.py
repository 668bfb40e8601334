"""`mtcl train`, `evaluate`: from a YAML to a run directory and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtcl_torchrec.cli.app import DeviceOption, app, note_if_unfinished, screen
from mtcl_torchrec.config import load_run
from mtcl_torchrec.data.source import read_rows
from mtcl_torchrec.evaluation.calibration import print_calibration
from mtcl_torchrec.evaluation.report import print_evaluation
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import Existing, fresh_run_directory
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.run import RunResult, evaluate_rows, train_run
from mtcl_torchrec.training.sharding import ranks


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
) -> None:
    """Evaluate a finished run on other rows: each task, and the fused score beside popularity."""
    run = FinishedRun.load(run_dir)
    columns = run.preprocessor.columns(statistics=False)
    raw = run.preprocessor.conform(read_rows(data, columns))
    note_if_unfinished(run, run_dir)
    rows = run.preprocessor.encode(raw)
    result = evaluate_rows(run.model, run.preprocessor, raw, rows, run.catalogue, batch_size=batch_size)
    print_evaluation(result, ", ".join(data), screen())


def show(result: RunResult, console: Console) -> None:
    kept = f"epoch {result.history.best_epoch} of {len(result.history.epochs)}"
    for split, evaluation in result.evaluations.items():
        if split == "test" or len(result.evaluations) == 1:
            console.print()
            print_evaluation(evaluation, f"{split} split, {kept}", console)
            if result.calibration is not None:
                console.print()
                print_calibration(result.calibration.splits[split], f"{split} split", console)
