"""The command line: `mtcl ...` and `python -m mtcl_torchrec ...`, a file for each kind of command.

Help, a first YAML, and mistakes in what was asked for are answered without torch, which takes seconds to load: the
files of commands import at their top only what options need, and each command imports what does its work when it comes
to that.
"""

from __future__ import annotations

from mtcl_torchrec.cli.stopping import stoppable
from mtcl_torchrec.openmp import wait_briefly


def main() -> None:
    """Run the command line; a mistake in data or configuration is one clear line and exit status 2."""
    wait_briefly()
    with stoppable():
        from mtcl_torchrec.cli.commands import run

        run()
