"""All commands, and what holds for each of them: how warnings and mistakes are said."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import typer

from mtcl_torchrec.cli import (  # noqa: F401  (each adds its commands)
    baselines,
    compare,
    demo,
    embed,
    evaluate,
    export,
    fuse,
    init,
    plan,
    prepare,
    recommend,
    report,
    serve,
    synth,
    train,
    tune,
)
from mtcl_torchrec.cli.app import app
from mtcl_torchrec.lazy import TORCH, explained
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import RunWarning

_as_python_does = warnings.formatwarning
_PACKAGE = Path(__file__).parents[1]


def _quieten_libraries() -> None:
    """TorchRec, torch and FBGEMM warn about themselves; none of it is the user's to mend."""
    for name in (None, "torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|fbgemm).*")


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What the package warns of concerns the run, and is said as the commands say it."""
    ours = category is UserWarning and Path(filename).is_relative_to(_PACKAGE)
    if ours or issubclass(category, RunWarning):
        return f"mtcl: {message}\n"
    return _as_python_does(message, category, filename, lineno, line)


def run() -> None:
    """Run the command that this process was called with.

    Raises:
        SystemExit: it is done; 2 where it was asked for something that cannot be.
    """
    _quieten_libraries()
    warnings.formatwarning = _warning
    try:
        app()
    except (ConfigError, DataError, FloatingPointError, OSError) as error:
        said = str(error)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in TORCH:
            raise
        said = str(explained(error))
    for line in said.splitlines():
        typer.echo(f"mtcl: {line}", err=True)
    raise SystemExit(2)
