"""`mtcl train`: from a YAML to a run directory and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mtcl_torchrec.cli.app import DeviceOption, app, check_files, screen
from mtcl_torchrec.cli.arguments import read_run_yaml
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import CHECKPOINTS, Existing, fresh_run_directory

if TYPE_CHECKING:
    from mtcl_torchrec.training.run import RunResult


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
    if out is None and (resume or overwrite):
        which, what = ("--resume", "go on with") if resume else ("--overwrite", "replace")
        raise ConfigError(f"{which} needs --out: the run directory to {what}")
    existing: Existing = "resume" if resume else "overwrite" if overwrite else "refuse"
    run = read_run_yaml(run_yaml, "train")
    check_files(run)
    from mtcl_torchrec.training.run import train_run
    from mtcl_torchrec.training.sharding import ranks

    with ranks(device) as where:
        folder = out or fresh_run_directory(run.name, where)
        if_stopped(lambda: _kept(folder, run_yaml))
        result = train_run(run, folder, existing=existing, device=device, console=console)
    if where.first:
        show(result, console)
        console.print(f"\nThe run is in {folder}.", highlight=False, soft_wrap=True)


def _kept(folder: Path, run_yaml: Path) -> str:
    """What is left of a run that was stopped."""
    if not any(folder.glob(f"{CHECKPOINTS}/step_*/state.json")):
        return f"{folder} holds no checkpoint yet, the same command begins anew"
    return f"the newest checkpoint is kept, this goes on: mtcl train {run_yaml} --out {folder} --resume"


def show(result: RunResult, console: Console) -> None:
    """The tables of a training's end: those of the test split, or of validation where there is no other."""
    from mtcl_torchrec.evaluation.calibration import print_calibration
    from mtcl_torchrec.evaluation.knowable import print_knowable
    from mtcl_torchrec.evaluation.report import print_evaluation

    kept = f"epoch {result.history.best_epoch} of {len(result.history.epochs)}"
    for split, evaluation in result.evaluations.items():
        if split == "test" or len(result.evaluations) == 1:
            console.print()
            print_evaluation(evaluation, f"{split} split, {kept}", console)
            print_knowable(evaluation.knowable, console)
            if result.calibration is not None:
                console.print()
                print_calibration(result.calibration.splits[split], f"{split} split", console)
