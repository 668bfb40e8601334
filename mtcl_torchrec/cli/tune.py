"""`mtcl tune`: better settings for a run, found on its validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from mtcl_torchrec.cli.app import DeviceOption, app, screen
from mtcl_torchrec.cli.arguments import read_run_yaml
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.config.commands import Pruner


@app.command()
def tune(
    run_yaml: Annotated[Path, typer.Argument(help="The run: trial 0 trains it as it is.")],
    trials: Annotated[int, typer.Option(min=1, help="How many there are to be in all, earlier calls included.")] = 20,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the search; runs/NAME-tuning by default.")
    ] = None,
    space: Annotated[Path | None, typer.Option(help="YAML of path: values, in place of the run's `tuning`.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="mean_skill (over training.watch; the default), or a metric and its task: ne:like, auc:click."
        ),
    ] = None,
    pruner: Annotated[Pruner, typer.Option(help="How trials that lag behind are given up after an epoch.")] = "median",
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which no trial is begun.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Forget the search in --out, instead of going on with it.")] = False,
    show_space: Annotated[
        bool, typer.Option("--show-space", help="Print what would be searched, as YAML to edit, and end.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Search for settings of a run that are better on its validation split; the test split is not looked at.

    Trains the run as it is, then with other settings that TPE (optuna) proposes.  The same command again goes on where
    it was, also after a kill; with more --trials, it searches on.  In the end --out holds **best.yaml** for `mtcl
    train`, tuning.json, parallel.png, and metrics and log of every trial.

    What is searched stands in the run under `tuning`, or in --space; without either, learning rates, widths of
    embeddings and their L2, trunk, dropout and loss weights around what the run has (--show-space prints it).  Any key
    of the run may be named:

        tuning:
          optimizers.dense.lr: {log: [1e-4, 1e-2]}
          model.tower_dropout: {uniform: [0, 0.4]}
          model.trunk.kind: [mmoe, ple]
          model.trunk.num_experts: {choices: [2, 4, 8], when: {model.trunk.kind: mmoe}}
          model.cross_layers: {integer: [0, 3]}
          schema.features.*.embedding_dim: {times: [0.5, 1, 2]}
          schema.tasks.like.weight: {log: [0.5, 8]}
          objective: auc:click

    Trials are ranked by **mean_skill** of the epoch that they keep: the mean over the tasks of 2·AUC - 1 (binary), 1 -
    NE (multiclass) or R² (regression), which are 1 for a perfect prediction and 0 for one that knows nothing of the
    row.  Events that validation has too few of do not take part, unless `training.watch` names them: noise would
    decide.  `objective`, there or as an option, names another.

    A trial whose loss is not finite, or that does not fit into memory, is recorded as failed, and the search goes on.
    Several processes: **torchrun --nproc_per_node 2 -m mtcl_torchrec tune run.yaml**.
    """
    from mtcl_torchrec.training.tuning import Space, default_space, read_space

    run = read_run_yaml(run_yaml, "tune")
    tuning = read_space(space) if space is not None else run.tuning
    values = tuning.space if tuning is not None else {}
    named = objective or (tuning.objective if tuning is not None else None)
    searched = Space.of(run, values or default_space(run))  # a mistake in it is told before torch is loaded
    if show_space:
        found = ({"objective": named} if named else {}) | searched.as_json()
        typer.echo(yaml.safe_dump({"tuning": found}, sort_keys=False, default_flow_style=None, width=110), nl=False)
        return
    console, folder = screen(), out or _folder(run_yaml, f"{run.name}-tuning")
    from mtcl_torchrec.training.sharding import ranks
    from mtcl_torchrec.training.tuning import print_tuning, tune_run

    if_stopped(f"what was tried is kept in {folder}, the same command goes on")
    with ranks(device) as where:
        result = tune_run(
            run, folder, trials=trials, space=values, objective=named, pruner=pruner, timeout=timeout,
            overwrite=overwrite, device=device, console=console,
        )  # fmt: skip
    if where.first:
        print_tuning(result, console)


def _folder(run_yaml: Path, name: str) -> Path:
    """Where a search goes: under runs/ here, but on where it stands under runs/ beside the YAML, as the same command
    given from another folder is to go on with it."""
    here, there = (folder / "runs" / name for folder in (Path(), run_yaml.parent))
    return there if there.is_dir() and not here.exists() else here
