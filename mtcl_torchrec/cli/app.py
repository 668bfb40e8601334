"""The command line's root, and what its commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.config.commands import Device
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.unfinished import unfinished_line

if TYPE_CHECKING:
    from mtcl_torchrec.training.finished import FinishedRun

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
DeviceOption = Annotated[Device, typer.Option(help="auto takes CUDA where the machine has it; or cpu, cuda.")]

ContentsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FEATURE=FILE",
        help="A newer file of vectors or codes for a vector or semantic_id feature, with new items; may be repeated.",
    ),
]
ItemsOption = Annotated[
    list[Path] | None,
    typer.Option(help="New items, with the item's columns of the log: rank them, too.  May be repeated."),
]


def newer_files(contents: list[str] | None, items: list[Path] | None) -> dict[str, Any]:
    """What the two options say, as `FinishedRun.load` takes it.

    Raises:
        ConfigError: a pair is none, or a feature is given twice.
    """
    files: dict[str, Path] = {}
    for pair in contents or ():
        feature, equals, file = (part.strip() for part in pair.partition("="))
        if not (feature and equals and file):
            raise ConfigError(f"--contents takes FEATURE=FILE, such as text=newer.parquet, not {pair!r}")
        if feature in files:
            raise ConfigError(f"--contents: {feature!r} is given twice")
        files[feature] = Path(file)
    return {"contents": files, "items": items or []}


def check_target(path: Path | None, option: str, is_ours: Callable[[Path], bool]) -> None:
    """See that the file an option names may be written, before time is spent on what goes into it; its folder is made.

    Args:
        is_ours: whether a file that stands there is such a one, which may be replaced.

    Raises:
        ConfigError: something else stands there, or nothing can be written.
    """
    if path is None:
        return
    if path.is_dir() or (path.exists() and not is_ours(path)):
        raise ConfigError(f"{option}: {path} is something else, and is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}: nothing may be written to {path.parent}")


def holds_json_with(*keys: str) -> Callable[[Path], bool]:
    """Whether a file holds a JSON mapping with these keys, for `check_target`."""

    def is_one(path: Path) -> bool:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and set(keys) <= content.keys()

    return is_one


def check_files(run: RunConfig) -> None:
    """See that the run's rows are there, before torch is loaded.

    Raises:
        DataError: a path names nothing.
    """
    named = [path for split in ("train", "val", "test", "log") for path in getattr(run.data, split) or ()]
    if named:
        from mtcl_torchrec.data.source import find_files

        find_files(named)


def screen() -> Console:
    """A console as wide as the terminal, or as COLUMNS says; wide enough for most tables when the output is a file or a
    pipe."""
    told = os.environ.get("COLUMNS", "").isdigit()
    return Console() if told or sys.stdout.isatty() else Console(width=110)


def note_if_unfinished(run: FinishedRun, *folders: Path) -> None:
    """Say so on stderr, of the runs that the run was read of."""
    for folder in folders if not run.finished else ():
        say_unfinished(folder, "this is its best epoch so far")


def say_unfinished(folder: Path, meanwhile: str) -> None:
    """Say on stderr that training of a run has not finished, where that is so.

    Args:
        meanwhile: what is shown for the time being.
    """
    if line := unfinished_line(folder):
        typer.echo(f"mtcl: {line}; {meanwhile}", err=True)
