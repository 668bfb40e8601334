"""`mtcl init`: a first YAML, for a file of one's own or for a synthetic world."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mtcl_torchrec.cli.app import app, screen
from mtcl_torchrec.config.commands import WORLD_SIZE, WorldName
from mtcl_torchrec.schema import ConfigError


@app.command()
def init(
    files: Annotated[
        list[str] | None, typer.Argument(help="A log of events: Parquet or CSV, files or a folder.", show_default=False)
    ] = None,
    world: Annotated[
        WorldName | None, typer.Option(help="A synthetic world instead of files: shop, social, video, courses, health.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=10, help="With --world: rows to train on; a tenth more validates, and tests.")
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="With --world: how many users there are.")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="With --world: how many items there are.")] = None,
    user: Annotated[str | None, typer.Option(help="The user column, where the guess is wrong.")] = None,
    item: Annotated[str | None, typer.Option(help="The item column.")] = None,
    time: Annotated[str | None, typer.Option(help="The time column.")] = None,
    request: Annotated[
        str | None, typer.Option(help="The column that names rows offered together: a request, visit or session.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="A 0/1 column to predict; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; the screen by default.")] = None,
) -> None:
    """Write a commented YAML for a file of yours, guessed from its columns, or for a synthetic world.

    `mtcl init my_log.parquet > run.yaml`, read it, then `mtcl train run.yaml`.  Or without data:
    `mtcl init --world shop --rows 200000 --users 5000 --items 1000 > shop.yaml`.
    """
    from mtcl_torchrec.data.draft import draft_run
    from mtcl_torchrec.data.worlds import world_run

    if (world is None) == (not files):
        raise ConfigError("give either files to draft a run for, or --world")
    of_file = {"--user": user, "--item": item, "--time": time, "--request": request, "--label": label}
    of_world = {"--rows": rows, "--users": users, "--items": items}
    foreign, other = (of_world, "--world") if world is None else (of_file, "a file")
    if given := next((option for option, value in foreign.items() if value is not None), None):
        raise ConfigError(f"{given} belongs to {other}")
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already; nothing was written")
    if world is not None:
        num_users, num_items = users or WORLD_SIZE, items or WORLD_SIZE
        text = world_run(world, rows=rows or 1_000_000, log=None, num_users=num_users, num_items=num_items)
    else:
        assert files is not None
        # Paths in a YAML start at its own folder.
        paths = files if out is None else [os.path.relpath(f, out.resolve().parent) for f in files]
        text = draft_run(files, written_as=paths, user=user, item=item, time=time, request=request, labels=label or [])
    for line in text.splitlines():
        if "CHECK THIS" in line or "CHANGE THIS" in line:  # what stands in a file is easily overlooked
            typer.echo(f"mtcl: {' '.join(line.split())}", err=True)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        screen().print(f"wrote {out}; read it, then: mtcl train {out}", highlight=False)
