"""The command line: `mtcl ...` and `python -m mtcl_torchrec ...`, a file for each kind of command."""

from __future__ import annotations

import logging
import warnings

import typer

from mtcl_torchrec.cli import (  # noqa: F401  (each adds its commands)
    compare,
    embed,
    export,
    fuse,
    plan,
    prepare,
    recommend,
    serve,
    train,
)
from mtcl_torchrec.cli.app import app
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.finished import RunWarning

_as_python_does = warnings.formatwarning


def _quieten_libraries() -> None:
    """TorchRec, torch and FBGEMM warn about themselves; none of it is the user's to mend."""
    for name in (None, "torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|fbgemm).*")


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What concerns a run is said as the commands say it."""
    if issubclass(category, RunWarning):
        return f"mtcl: {message}\n"
    return _as_python_does(message, category, filename, lineno, line)


def main() -> None:
    """Run the command line; a mistake in data or configuration is one clear line and exit status 2."""
    _quieten_libraries()
    warnings.formatwarning = _warning
    try:
        app()
    except (ConfigError, DataError, FloatingPointError, OSError) as error:
        for line in str(error).splitlines():
            typer.echo(f"mtcl: {line}", err=True)
        raise SystemExit(2) from None
