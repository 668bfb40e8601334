"""`mtcl prepare`: what is counted over the log, once, in files beside the data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtcl_torchrec.cli.app import app, check_files, screen
from mtcl_torchrec.cli.arguments import read_run_yaml


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
    console, run = screen(), read_run_yaml(run_yaml, "prepare")
    check_files(run)
    from mtcl_torchrec.data.prepare import prepare_files

    prepare_files(run, out, lambda text: console.print(text, highlight=False))
    console.print(f"wrote {out}; train with: mtcl train {out}/run.yaml", highlight=False, soft_wrap=True)
