"""The command line: `mtcl ...` and `python -m mtcl_torchrec ...`."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.data import kuairand
from mtcl_torchrec.data.draft import draft_run
from mtcl_torchrec.data.prepare import prepare_files
from mtcl_torchrec.data.source import read_rows
from mtcl_torchrec.data.synthetic import write_parquet
from mtcl_torchrec.data.worlds import ready_world, world_run
from mtcl_torchrec.evaluation.report import plain_table, print_evaluation
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.directory import Existing, claim_run_directory, fresh_run_directory
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.planning.hardware import KNOWN
from mtcl_torchrec.training.planning.offline import parse_rows, plan_offline
from mtcl_torchrec.training.planning.report import print_plan
from mtcl_torchrec.training.run import RunResult, evaluate_rows, train_run
from mtcl_torchrec.training.sharding import Device, ranks

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Multi-task collaborative learning on TorchRec: predict many events of a recommender at once, fuse the "
        "predictions into one score in [0, 1], rank by it.\n\n"
        "Start with **mtcl demo**, or with **mtcl init my_log.parquet > run.yaml** and **mtcl train run.yaml**.\n\n"
        "Several processes: **torchrun --nproc_per_node 2 -m mtcl_torchrec train run.yaml**."
    ),
)
WorldName = Literal["shop", "social", "video", "courses", "health"]
DeviceOption = Annotated[Device, typer.Option(help="auto takes CUDA where the machine has it; or cpu, cuda.")]


def _console() -> Console:
    """A console wide enough for the tables when the output is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=110)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Run directory; a fresh one under runs/ by default.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that stands in --out.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Fewer or more epochs than the demo's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another random seed.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train on real short-video impressions (KuaiRand) that ship with the package, and rank videos for one user.

    Prints one table of all tasks on the test split, the fused score beside a popularity baseline on the same
    impressions, and the top 10 videos of one user.  Takes a few minutes on two cores.
    """
    console = _console()
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
    _show(result, console)
    recommender = Recommender.load(folder)
    seen = recommender.catalogue.seen
    user = int(seen.loc[seen["user_id"] != 0, "user_id"].value_counts().index[0])
    _print_recommendations(recommender, user, {}, 10, False, console)
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
    out: Annotated[Path | None, typer.Option(help="Run directory; a fresh one under runs/ by default.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that stands in --out.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out as if never stopped, or begin it.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train what a YAML file describes; keep the best epoch; evaluate it on the validation and test split.

    The run directory holds checkpoints (torch.distributed.checkpoint), all that preprocessing learnt, metrics.json, and
    TensorBoard scalars.  After an interruption, --resume goes on where the newest checkpoint stands; ranks that
    `torchrun --max-restarts` starts again do so by themselves.  `mtcl init` writes a first YAML for a file of yours.
    """
    console = _console()
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
        _show(result, console)
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
    _note_if_unfinished(run, run_dir)
    rows = run.preprocessor.encode(raw)
    result = evaluate_rows(run.model, run.preprocessor, raw, rows, run.catalogue, batch_size=batch_size)
    print_evaluation(result, ", ".join(data), _console())


@app.command()
def recommend(
    run_dir: Annotated[Path, typer.Argument(help="What `mtcl train` or `mtcl demo` wrote.")],
    user: Annotated[str, typer.Option(help="The user's id, as in the log.  An unknown one has no history.")],
    context: Annotated[
        list[str] | None,
        typer.Option(help="column=value, such as hour=20; may be repeated.  The rest takes its usual value."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    seen: Annotated[bool, typer.Option(help="Offer items that the user has already met, too.")] = False,
) -> None:
    """Rank the run's items for one user: the fused score, and each task's prediction behind it."""
    given: dict[str, Any] = {}
    for pair in context or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--context takes column=value, such as hour=20, not {pair!r}")
        given[name.strip()] = value.strip()
    recommender = Recommender.load(run_dir)
    _note_if_unfinished(recommender.run, run_dir)
    _print_recommendations(recommender, user, given, top, seen, _console())


@app.command()
def init(
    files: Annotated[
        list[str] | None, typer.Argument(help="A log of events: Parquet or CSV, files or a folder.", show_default=False)
    ] = None,
    world: Annotated[
        WorldName | None, typer.Option(help="A synthetic world instead of files: shop, social, video, courses, health.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="The user column, where the guess is wrong.")] = None,
    item: Annotated[str | None, typer.Option(help="The item column.")] = None,
    time: Annotated[str | None, typer.Option(help="The time column.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="A 0/1 column to predict; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; the screen by default.")] = None,
) -> None:
    """Write a commented YAML for a file of yours, guessed from its columns, or for a synthetic world.

    `mtcl init my_log.parquet > run.yaml`, read it, then `mtcl train run.yaml`.  Or without data:
    `mtcl init --world shop > shop.yaml`.
    """
    if (world is None) == (not files):
        raise ConfigError("give either files to draft a run for, or --world")
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already; nothing was written")
    if world is not None:
        text = world_run(world)
    else:
        assert files is not None
        # Paths in a YAML start at its own folder.
        paths = files if out is None else [os.path.relpath(f, out.resolve().parent) for f in files]
        text = draft_run(files, written_as=paths, user=user, item=item, time=time, labels=label or [])
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        _console().print(f"wrote {out}; read it, then: mtcl train {out}", highlight=False)


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    world: Annotated[WorldName, typer.Option(help="shop, social, video, courses or health.")] = "shop",
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 1_000_000,
    start: Annotated[int, typer.Option(min=0, help="The first row; the next file goes on where this one ends.")] = 0,
    horizon: Annotated[int | None, typer.Option(min=1, help="Rows of all files together; start + rows.")] = None,
    users: Annotated[int, typer.Option(min=1)] = 100_000,
    items: Annotated[int, typer.Option(min=2)] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another world.")] = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A dial, such as missing=0.1 or conflict=0.8; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT.")] = False,
) -> None:
    """Write rows of a synthetic world, whose true probabilities are known, to a Parquet file.

    Each row follows from the seed and its number alone: `--start` goes on with the same world in another file, when
    both are given the same `--horizon`.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists already; --overwrite replaces it")
    dials = dict(_dial(pair) for pair in set_ or [])
    made = ready_world(world, **{"num_users": users, "num_items": items, "seed": seed, **dials},
                       horizon=horizon or start + rows)  # fmt: skip
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(str(out), total=rows)
        write_parquet(made, out, rows, start=start, progress=lambda done: bar.update(task, completed=done))
    _console().print(f"wrote {rows:,} rows of world {world!r} to {out}", highlight=False, soft_wrap=True)


def _dial(pair: str) -> tuple[str, Any]:
    name, _, value = pair.partition("=")
    if name.strip() == "rates":
        raise ConfigError("--set takes dial=number; rates of single tasks stand in a YAML: data.synthetic.rates")
    try:
        return name.strip(), float(value) if "." in value or "e" in value else int(value)
    except ValueError:
        raise ConfigError(f"--set takes dial=number, such as missing=0.1, not {pair!r}") from None


@app.command()
def prepare(
    run_yaml: Annotated[Path, typer.Argument(help="A run with a `statistics` part.")],
    out: Annotated[Path, typer.Option(help="Folder for the prepared files.")],
) -> None:
    """Compute the run's causal counts and rates once, and write them beside the data.

    Writes train / val / test as Parquet with the new columns, the statistics themselves, and a run.yaml that uses both:
    `mtcl train OUT/run.yaml` then gives the same model as the original YAML without counting again.
    """
    console = _console()
    prepare_files(load_run(run_yaml), out, lambda text: console.print(text, highlight=False))
    console.print(f"wrote {out}; train with: mtcl train {out}/run.yaml", highlight=False, soft_wrap=True)


@app.command()
def plan(
    run_yaml: Annotated[Path, typer.Argument(help="The run; its `sharding` part says what the planner may do.")],
    world_size: Annotated[int, typer.Option(min=1, max=8192, help="Ranks: one for each GPU.")],
    device: Annotated[str, typer.Option(help=f"One of {', '.join(KNOWN)}.")] = "h200",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a step and rank; the run's by default.")] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="table=N, for a table whose rows would be learnt from the data; may be repeated."),
    ] = None,
    fitted: Annotated[Path | None, typer.Option(help="A trained run that knows the rows of its tables.")] = None,
    ranks_per_host: Annotated[int | None, typer.Option(min=1, help="The run's, or 8, by default.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which no better plan is sought.")] = 120,
    out: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file, too.")] = None,
) -> None:
    """Say where a run's tables would go on a cluster that is not there, and whether they fit.

    Needs no GPU and no data.  Memory and times are estimates from datasheets.  Exit status 1: it does not fit.
    """
    console = _console()
    run = load_run(run_yaml)
    encoder = None if fitted is None else FinishedRun.load(fitted).preprocessor.encoder
    with console.status(f"planning {len(run.data_schema.tables())} tables for {world_size} ranks …"):
        report = plan_offline(
            run, world_size, device, batch_size=batch_size, num_rows_of=parse_rows(rows or []),
            ranks_per_host=ranks_per_host, fitted=encoder, timeout_s=timeout,
        )  # fmt: skip
    print_plan(report, console)
    if out is not None:
        out.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    if not report.fits:
        raise typer.Exit(1)


def _note_if_unfinished(run: FinishedRun, folder: Path) -> None:
    if not run.finished:
        typer.echo(f"mtcl: training of {folder} did not finish; this is its best epoch so far", err=True)


def _show(result: RunResult, console: Console) -> None:
    kept = f"epoch {result.history.best_epoch} of {len(result.history.epochs)}"
    for split, evaluation in result.evaluations.items():
        if split == "test" or len(result.evaluations) == 1:
            console.print()
            print_evaluation(evaluation, f"{split} split, {kept}", console)


def _print_recommendations(
    recommender: Recommender, user: str | int, context: dict[str, Any], top: int, seen: bool, console: Console
) -> None:
    ranked = recommender.recommend(user, context, k=top, seen=seen)
    known = recommender.catalogue.known_user(str(user)) is not None
    usual = {**recommender.catalogue.context, **context}
    about = ", ".join(f"{k}={v}" for k, v in usual.items())
    console.print()
    if not known:
        console.print(f"User {user} is not in the log: ranked without history.", highlight=False)
    title = f"Top {len(ranked)} for user {user}" + (f" ({about})" if about else "")
    table = plain_table(title, ["#", *(str(c).replace("_", "\n") for c in ranked.columns)])
    for place, row in enumerate(ranked.itertuples(index=False), start=1):
        table.add_row(str(place), *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    console.print(table)


def _quieten_libraries() -> None:
    """TorchRec, torch and FBGEMM warn about themselves; none of it is the user's to mend."""
    for name in (None, "torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|fbgemm).*")


def main() -> None:
    """Run the command line; a mistake in data or configuration is one clear line and exit status 2."""
    _quieten_libraries()
    try:
        app()
    except (ConfigError, DataError, FloatingPointError, OSError) as error:
        for line in str(error).splitlines():
            typer.echo(f"mtcl: {line}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
