"""`mtcl baselines`: what a run must beat, tuned as it should be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtcl_torchrec.baselines.entries import ABOUT, FILE, NETWORKS, read_entries
from mtcl_torchrec.cli.app import DeviceOption, app, screen
from mtcl_torchrec.cli.arguments import check_run, read_run_yaml
from mtcl_torchrec.cli.stopping import if_stopped
from mtcl_torchrec.config.commands import BASELINE_ROWS
from mtcl_torchrec.schema import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from mtcl_torchrec.baselines.progress import Doing
    from mtcl_torchrec.config import RunConfig

_RUNS = Path("runs")
_TELL_EVERY = 10.0  # seconds, where stderr is no terminal


@app.command()
def baselines(
    run_yaml: Annotated[
        Path | None, typer.Argument(help="The run to compare with: its YAML, or its directory.", show_default=False)
    ] = None,
    only: Annotated[str | None, typer.Option(help=f"Some of them, separated by commas: {', '.join(ABOUT)}.")] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Settings that each baseline tries, for each task; not of networks.")
    ] = 8,
    network_trials: Annotated[
        int,
        typer.Option(
            min=1,
            help="The same, of single_task and unweighted, where each is a training: 1 takes the run's own settings, "
            "untuned; more draw other learning rates, penalties on embeddings and weight decay.",
        ),
    ] = 1,
    budget: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds that each baseline may take, beyond the first setting for each task."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o",
            help="Where to write; by default the run's directory, of a YAML too if runs/ holds its run, or else "
            "runs/NAME-baselines.",
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
) -> None:  # fmt: skip
    """Train and tune what a run is to be compared with, on the same rows, features and labels.

    Popularity; item-kNN, ALS and BPR of `implicit` (`pip install 'mtcl_torchrec[baselines]'`); logistic regression and
    gradient-boosted trees of scikit-learn; and the run's own network, once for each task alone, and once with a plain
    sum of the losses.  Each keeps the settings that are best on the validation split; all rank by the fused score that
    the run has now, also after `mtcl fuse`.

    Writes baselines/NAME/predictions and baselines.json.  What is done is not done again, as long as data, run and
    options stay; what was interrupted goes on after its last trial, and a larger --trials after those that were done.
    """
    console = screen()
    if list_ and run_yaml is None:
        _list(out, None, console)
        return
    if run_yaml is None:
        raise ConfigError("which run is it to be compared with?  mtcl baselines run.yaml, or mtcl baselines RUN_DIR")
    is_run = run_yaml.is_dir()
    if is_run:
        check_run(run_yaml, "baselines")
    run = read_run_yaml(run_yaml / "run.yaml" if is_run else run_yaml, "baselines")
    if list_:
        _list(out or (run_yaml if is_run else _alone(run)), run, console)
        return
    from mtcl_torchrec.baselines import Budget, print_baselines, run_baselines

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    run_dir = run_yaml if is_run else _found(run, run_yaml, out, say)
    folder = out or run_dir or _alone(run)
    if_stopped(f"what is done is kept in {folder}, the same command goes on")
    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    run_trials = _run_trials(run, run_dir, network_trials, say) if not names or set(names) & set(NETWORKS) else 0
    skipped: dict[str, list[str]] = {}  # reason -> baselines
    with _Bar() as bar:
        entries = run_baselines(
            run, folder, run_dir=run_dir, only=names, budget=Budget(trials, budget, network_trials), seed=seed,
            max_rows=max_rows, device=device, say=say, progress=bar.tell, run_trials=run_trials,
            left_out=lambda name, reason: skipped.setdefault(reason, []).append(name),
        )  # fmt: skip
    console.print()
    print_baselines(entries, console, folder=folder, run_dir=run_dir, run=run)
    console.print()
    for reason, of in skipped.items():
        say(f"Skipped: {', '.join(of)}: {reason}")
    say(f"The baselines are in {folder / FILE}.")


def _alone(run: RunConfig) -> Path:
    """Where the baselines of a YAML stand that was not trained."""
    return _RUNS / f"{run.name}-baselines"


def _found(run: RunConfig, run_yaml: Path, out: Path | None, say: Any) -> Path | None:
    """The directory of the run that a YAML describes; where there is none, that is said."""
    from mtcl_torchrec.baselines.beside import run_directory_of

    found = run_directory_of(run, _RUNS)
    if found is not None:
        say(f"{run_yaml} is the run in {found}: the baselines are set beside it")
        return found
    where = out or _alone(run)
    say(
        f"{_RUNS}/ holds no finished run of {run_yaml} as it stands: the baselines stand alone in {where}; after "
        f"`mtcl train {run_yaml}`, `mtcl baselines RUN_DIR --out {where}` sets them beside it, without doing them again"
    )
    return None


def _run_trials(run: RunConfig, run_dir: Path | None, network_trials: int, say: Any) -> int:
    """How many trials the run itself had, 0 where that is not known; what the networks would need is said."""
    from mtcl_torchrec.baselines.beside import search_of

    searched = search_of(run, [_RUNS, *([run_dir.parent] if run_dir is not None else [])])
    if searched is None:
        return 0
    folder, trials = searched
    if network_trials < trials:
        have = "1 trial, the run's own settings" if network_trials == 1 else f"{network_trials} trials"
        say(
            f"the run is the best of {trials} trials of mtcl tune ({folder}); {' and '.join(NETWORKS)} have {have}: "
            f"--network-trials {trials} gives them as many"
        )
    return trials


class _Bar:
    """Says which trial runs, and how long it will take: in one line of a terminal, or a line from time to time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.status import Status

        self.err = Console(stderr=True)
        self.status = Status("reading the data", console=self.err) if self.err.is_terminal else None
        self.told = time.monotonic()

    def __enter__(self) -> _Bar:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def tell(self, doing: Doing) -> None:
        if self.status is not None:
            self.status.update(doing.line)
        elif time.monotonic() - self.told >= _TELL_EVERY:
            self.told = time.monotonic()
            typer.echo(f"mtcl: {doing.line}", err=True)


def _list(folder: Path | None, run: RunConfig | None, console: Console) -> None:
    """What there is, and what was done in a folder; for another configuration than the run's is not done."""
    from mtcl_torchrec.baselines.keys import of_other_runs
    from mtcl_torchrec.evaluation.plain_table import plain_table

    entries = {} if folder is None else read_entries(folder)
    done = "" if folder is None else f"; those done are in {folder / FILE}"
    table = plain_table(f"Baselines{done}", ["baseline", "trials", "seconds"])
    table.add_column("what it is", overflow="fold")
    others = [] if run is None else of_other_runs(entries, run)
    for name, about in ABOUT.items():
        entry = entries.get(name) if name not in others else None
        cost = [str(entry["trials"]), f"{entry['seconds']:,.1f}"] if entry else ["–", "–"]
        table.add_row(name, *cost, about + "; done for another configuration" * (name in others))
    console.print(table)
