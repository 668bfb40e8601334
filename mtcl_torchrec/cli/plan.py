"""`mtcl plan`: what a run would need on a cluster that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mtcl_torchrec.cli.app import app, screen
from mtcl_torchrec.cli.arguments import read_run_yaml
from mtcl_torchrec.training.planning.hardware import KNOWN


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
    console = screen()
    run = read_run_yaml(run_yaml, "plan")
    from mtcl_torchrec.training.finished import FinishedRun
    from mtcl_torchrec.training.planning.offline import parse_rows, plan_offline
    from mtcl_torchrec.training.planning.report import print_plan

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
