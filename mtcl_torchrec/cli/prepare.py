"""`mtcl init`, `synth`, `prepare`: from a log, or from nothing, to a YAML and its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from mtcl_torchrec.cli.app import app, screen
from mtcl_torchrec.config import load_run
from mtcl_torchrec.data.draft import draft_run
from mtcl_torchrec.data.prepare import prepare_files
from mtcl_torchrec.data.synthetic_files import write_items, write_parquet
from mtcl_torchrec.data.worlds import ready_world, world_run
from mtcl_torchrec.schema import ConfigError

WorldName = Literal["shop", "social", "video", "courses", "health"]


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
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; the screen by default.")] = None,
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
        screen().print(f"wrote {out}; read it, then: mtcl train {out}", highlight=False)


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
    as_of: Annotated[
        float | None,
        typer.Option(min=0, help="The log as of so many days after row 0: no later rows, events yet to come are 0."),
    ] = None,
    catalogue: Annotated[
        Path | None, typer.Option(help="Write all items, with their titles, to this Parquet file, too.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT, and the catalogue.")] = False,
) -> None:
    """Write rows of a synthetic world, whose true probabilities are known, to a Parquet file.

    Each row follows from the seed and its number alone: `--start` goes on with the same world in another file, when
    both are given the same `--horizon`.  Titles (`--set text=0.5`), positions (`--set position_bias=1`) and events that
    arrive late (`--set delay=2`, in days; `delay_spread=1` makes the delays log-normal) are dials, too.
    """
    if catalogue is not None and catalogue.resolve() == out.resolve():
        raise ConfigError(f"--catalogue: {catalogue} is where the rows go; choose another file")
    for file in (out, catalogue):
        if file is not None and file.is_dir():
            raise ConfigError(f"{file} is a folder; name a Parquet file")
        if file is not None and file.exists() and not overwrite:
            raise ConfigError(f"{file} exists already; --overwrite replaces it")
    dials = dict(_dial(pair) for pair in set_ or [])
    made = ready_world(world, **{"num_users": users, "num_items": items, "seed": seed, **dials},
                       horizon=horizon or start + rows)  # fmt: skip
    moment = None if as_of is None else made.moment(as_of)
    if moment is not None:
        rows = min(rows, made.rows_by(moment) - start)
        if rows < 1:
            raise ConfigError(f"--as-of {as_of:g}: row {start:,} comes after that; the horizon spans {made.days} days")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(str(out), total=rows)
        write_parquet(
            made, out, rows, start=start, as_of=moment, progress=lambda done: bar.update(task, completed=done)
        )
    screen().print(f"wrote {rows:,} rows of world {world!r} to {out}", highlight=False, soft_wrap=True)
    if catalogue is not None:
        write_items(made, catalogue)
        screen().print(f"wrote its {made.num_items:,} items to {catalogue}", highlight=False, soft_wrap=True)


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
    run_yaml: Annotated[Path, typer.Argument(help="A run with a `statistics`, `histories` or `next_labels` part.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the prepared files.")],
) -> None:
    """Compute the run's causal counts and rates, histories and next labels once, and write them beside the data.

    Writes train / val / test as Parquet with the new columns (a history is a column of lists), the statistics and the
    histories' events themselves, and a run.yaml that uses both: `mtcl train OUT/run.yaml` then gives the same model as
    the original YAML without counting again, also as a stream (data: {stream: true}).
    """
    console = screen()
    prepare_files(load_run(run_yaml), out, lambda text: console.print(text, highlight=False))
    console.print(f"wrote {out}; train with: mtcl train {out}/run.yaml", highlight=False, soft_wrap=True)
