"""`mtcl fuse RUN --set ...` that is killed at its n-th step of writing, for every n, or every few.

test_killed.py runs this file with the run directory, a folder to work in, the weights, and the stride of n.  Each life
is a fork with a copy of the run: at its n-th change of that copy (a file opened for writing, renamed or removed; a
folder made or removed) it is killed, as `kill -9` does.  Prints a line for each: the copy, and how the life ended (-9,
or 0 where that step was never reached).
"""

import os
import shutil
import signal
import sys
from pathlib import Path

# Loaded once, and not in each life: what the command does comes after its libraries.
import mtcl_torchrec.baselines.run
import mtcl_torchrec.cli.commands
import mtcl_torchrec.cli.fitted
import mtcl_torchrec.training.rejudging  # noqa: F401
from mtcl_torchrec.cli import main

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def die_at(step: int, folder: Path) -> None:
    left = step

    def hook(event, args):
        nonlocal left
        writing = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        changes = writing or event in _CHANGES
        if changes and not isinstance(args[0], int) and os.fsdecode(args[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def life(step: int, folder: Path, weights: str) -> int:
    """How it ended: minus the signal, or the exit status."""
    child = os.fork()
    if child == 0:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        sys.argv = ["mtcl", "fuse", str(folder), "--set", weights]
        die_at(step, folder)
        try:
            main()
        except SystemExit as stopped:
            os._exit(int(stopped.code or 0))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    run, place, weights, stride = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    step, ended = 1 - stride, -9
    while ended == -9:
        step += stride
        folder = place / f"life-{step:03d}"
        shutil.copytree(run, folder)
        ended = life(step, folder, weights)
        print(folder, ended, flush=True)
