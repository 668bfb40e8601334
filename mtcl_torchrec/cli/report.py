"""`mtcl report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mtcl_torchrec.cli.app import app, say_unfinished
from mtcl_torchrec.cli.arguments import check_run
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.unfinished import is_begun


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="What `mtcl train` or `mtcl demo` wrote, finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file; RUN_DIR/report.html by default.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Also write each picture into this folder.")] = None,
    baselines: Annotated[
        Path | None, typer.Option("--baselines", help="Where baselines.json is, if not in RUN_DIR.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write what a run is worth as one HTML file: a verdict in plain words, pictures, tables.

    The file loads nothing from elsewhere and reads on a phone, by light and by dark.  What a run lacks (baselines, a
    fitted fusion, calibration) is said there, with the command that makes it.
    """
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name the file, such as {out / 'report.html'}")
    if not is_begun(run_dir):
        check_run(run_dir, "report")
    if (run_dir / "run.yaml").is_file():
        say_unfinished(run_dir, "the report is of what there is")
    path = _written(run_dir, Console(stderr=True), out, png=png, baselines=baselines)
    typer.echo(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)" + (f"; pictures in {png}" if png else ""))
    if open_:
        typer.launch(str(path))


def _written(run_dir: Path, console: Console, out: Path | None = None, **options: Any) -> Path:
    """Write the report; on a terminal, a line says what is being done."""
    from mtcl_torchrec.report import write_report

    with console.status("a report") as status:
        return write_report(run_dir, out, say=lambda doing: status.update(Text(f"report: {doing}")), **options)


def report_of_demo(folder: Path, console: Console) -> None:
    """Write the report and say where it is; without what it is drawn with, say what to install."""
    try:
        said = f"\nThe report, to be opened in a browser: {_written(folder, console)}"
    except ConfigError as error:
        said = f"\nNo report was written: {error}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
