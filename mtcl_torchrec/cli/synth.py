"""`mtcl synth`: rows of a synthetic world in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from mtcl_torchrec.cli.app import app, screen
from mtcl_torchrec.config.commands import WORLD_SIZE, WorldName
from mtcl_torchrec.schema import ConfigError


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The Parquet file to write.")],
    world: Annotated[WorldName, typer.Option(help="shop, social, video, courses or health.")] = "shop",
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 1_000_000,
    start: Annotated[int, typer.Option(min=0, help="The first row; the next file goes on where this one ends.")] = 0,
    horizon: Annotated[int | None, typer.Option(min=1, help="Rows of all files together; start + rows.")] = None,
    users: Annotated[int, typer.Option(min=1)] = WORLD_SIZE,
    items: Annotated[int, typer.Option(min=2)] = WORLD_SIZE,
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

    Beside `shop.parquet` it writes `shop.run.yaml`, which trains on it.

    Each row follows from the seed and its number alone: `--start` goes on with the same world in another file, when
    both are given the same `--horizon`.  Titles (`--set text=0.5`), positions (`--set position_bias=1`) and events that
    arrive late (`--set delay=2`, in days; `delay_spread=1` makes the delays log-normal) are dials, too.
    """
    from mtcl_torchrec.data.synthetic_files import write_items, write_parquet
    from mtcl_torchrec.data.worlds import ready_world, world_run

    if catalogue is not None and catalogue.resolve() == out.resolve():
        raise ConfigError(f"--catalogue: {catalogue} is where the rows go; choose another file")
    settings = out.with_suffix(".run.yaml") if start == 0 and not out.is_dir() else None
    for file in (out, catalogue, settings):
        if file is not None and file.is_dir():
            raise ConfigError(f"{file} is a folder; name a Parquet file")
        if file is not None and file.exists() and not overwrite:
            raise ConfigError(f"{file} exists already; --overwrite replaces it")
    dials = {"num_users": users, "num_items": items, "seed": seed} | dict(_dial(pair) for pair in set_ or [])
    made = ready_world(world, **dials, horizon=horizon or start + rows)
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
    if settings is not None:
        settings.write_text(world_run(world, log=out.name, rows=rows, **dials), encoding="utf-8")
        screen().print(f"wrote {settings}, which trains on it: mtcl train {settings}", highlight=False, soft_wrap=True)
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
