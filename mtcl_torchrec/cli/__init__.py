"""The command line: `mtcl ...` and `python -m mtcl_torchrec ...`, a file for each kind of command."""

from __future__ import annotations

import logging
import warnings

import typer

from mtcl_torchrec.cli import (  # noqa: F401  (each adds its commands)
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


def _quieten_libraries() -> None:
    """TorchRec, torch and FBGEMM warn about themselves; none of it is the user's to mend."""
    for name in (None, "torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|fbgemm).*")


def main() -> None:
    """Run the command line; a mistake in data or configuration is one clear line and exit status 2."""
    _quieten_libraries()
    try:
        app()
    except (ConfigError, DataError, FloatingPointError, OSError) as error:
        for line in str(error).splitlines():
            typer.echo(f"mtcl: {line}", err=True)
        raise SystemExit(2) from None
