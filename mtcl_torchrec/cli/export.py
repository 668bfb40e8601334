"""`mtcl export`: a run as one file to serve from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtcl_torchrec.cli.app import ContentsOption, ItemsOption, app, newer_files, note_if_unfinished
from mtcl_torchrec.cli.arguments import check_model
from mtcl_torchrec.config.commands import Compile, TablePrecision
from mtcl_torchrec.schema import ConfigError


@app.command()
def export(
    run_dir: Annotated[
        list[Path], typer.Argument(help="What `mtcl train` or `mtcl demo` wrote; several runs are one deep ensemble.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, such as model.mtcl.")],
    tables: Annotated[TablePrecision, typer.Option(help="How embeddings are stored.")] = "fp32",
    compiled: Annotated[
        Compile, typer.Option(help="Machine code beside the portable graph; auto: where there is a C++ compiler.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace a file that stands at --out.")] = False,
    contents: ContentsOption = None,
    items: ItemsOption = None,
) -> None:
    """Write a run as one file: tables, trunk, heads, calibration and fused score as one graph, and what fills its
    inputs.

    The graph takes any number of rows and runs wherever torch does, without this package; see manifest.json in the
    file, which is a ZIP.  **mtcl recommend model.mtcl --user 42** reads it, too.

    **A deep ensemble:** mtcl export RUN_A RUN_B RUN_C --out ensemble.mtcl  (the mean of what they say, and `score_std`)
    """
    if out.exists() and (out.is_dir() or not overwrite):
        raise ConfigError(f"{out} stands there already; choose another name" + (" or --overwrite" * out.is_file()))
    newer = newer_files(contents, items)
    check_model(run_dir, "export")
    from mtcl_torchrec.serving.export import export_run
    from mtcl_torchrec.training.ensemble import load_ensemble
    from mtcl_torchrec.training.finished import FinishedRun

    run = FinishedRun.load(run_dir[0], **newer) if len(run_dir) == 1 else load_ensemble(run_dir, **newer)
    note_if_unfinished(run, *run_dir)
    if compiled != "no":
        typer.echo("machine code takes a minute or several; --compiled no does without", err=True)
    made = export_run(run, out, tables=tables, compiled=compiled)
    most = max(made.difference, key=lambda name: made.difference[name])
    typer.echo(
        f"{made.path}: {made.bytes / 1e6:,.1f} MB, {tables} tables, "
        f"{'with machine code for this machine' if made.compiled else 'portable graph'}\n"
        f"largest difference from the run: {made.difference[most]:.2g} ({most})\n"
        f"sha256 {made.sha256}"
    )
