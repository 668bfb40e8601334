"""`mtcl baselines`: what a run must beat, tuned as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtcl_torchrec.baselines.entries import ABOUT, FILE, read_entries
from mtcl_torchrec.cli.app import DeviceOption, app, screen
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.config import load_run
from mtcl_torchrec.config.commands import BASELINE_ROWS


@app.command()
def baselines(
    run_yaml: Annotated[Path, typer.Argument(help="The run to compare with: its YAML, or its directory.")],
    only: Annotated[str | None, typer.Option(help=f"Some of them, separated by commas: {', '.join(ABOUT)}.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings that each baseline tries, for each task.")] = 8,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds that each baseline may take, beyond the first setting for each task."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where to write; the run's directory by default, or runs/NAME-baselines for a YAML."
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(min=100, help="Baselines other than networks learn from a sample of a larger training split.")
    ] = BASELINE_ROWS,
    seed: Annotated[int, typer.Option(min=0, help="Of the search, of samples and of what draws.")] = 0,
    list_: Annotated[
        bool, typer.Option("--list", help="Show which baselines there are and which are done; do nothing.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train and tune what a run is to be compared with, on the same rows, features and labels.

    Popularity; item-kNN, ALS and BPR of `implicit` (`pip install 'mtcl_torchrec[baselines]'`); logistic regression and
    gradient-boosted trees of scikit-learn; and the run's own network, once for each task alone, and once with a plain
    sum of the losses.  Each tries as many settings and keeps those best on the validation split; all rank by the run's
    fused score.

    Writes baselines/NAME/predictions and baselines.json.  What is done is not done again, as long as data, run and
    options stay.
    """
    console = screen()
    is_run = run_yaml.is_dir()
    run = load_run(run_yaml / "run.yaml" if is_run else run_yaml)
    folder = out or (run_yaml if is_run else Path("runs") / f"{run.name}-baselines")
    if list_:
        _list(folder, console)
        return
    from mtcl_torchrec.baselines import Budget, print_baselines, run_baselines

    if_stopped(f"what is done is kept in {folder}, the same command goes on")
    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    entries = run_baselines(
        run, folder, only=names, budget=Budget(trials, budget), seed=seed, max_rows=max_rows, device=device,
        say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )  # fmt: skip
    console.print()
    print_baselines(entries, console, folder=folder)
    console.print(f"\nThe baselines are in {folder / FILE}.", highlight=False, soft_wrap=True)


def _list(folder: Path, console: Console) -> None:
    """What there is, and what was done in a folder."""
    from mtcl_torchrec.evaluation.plain_table import plain_table

    entries = read_entries(folder)
    table = plain_table(f"Baselines; those done are in {folder / FILE}", ["baseline", "trials", "seconds"])
    table.add_column("what it is")
    for name, about in ABOUT.items():
        entry = entries.get(name)
        cost = [str(entry["trials"]), f"{entry['seconds']:,.1f}"] if entry else ["–", "–"]
        table.add_row(name, *cost, about)
    console.print(table)
