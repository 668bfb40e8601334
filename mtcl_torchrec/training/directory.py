"""The run directory: who may write to it, and how a restarted run finds its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from mtcl_torchrec.schema import ConfigError

if TYPE_CHECKING:
    from mtcl_torchrec.training.sharding import Ranks

CHECKPOINTS = "checkpoints"
MARKER = ".mtcl-run"  # this folder is a run directory, whatever else it holds yet; in it, which launch wrote the run
WEIGHTS_PREFIX = "model."  # of MTCL inside MTCLTrain

PREPROCESSING = "preprocessing"
CATALOGUE = "catalogue"
POPULARITY = "popularity"  # of a stream or a world; of rows in memory, the catalogue has it
CALIBRATION = "calibration"  # what training ends with, on the validation split
METRICS = "metrics.json"  # written last
PREDICTIONS = "predictions"  # for the rows of val and test
FUSION = "fusion"  # what `mtcl fuse` found

Existing = Literal["refuse", "overwrite", "resume"]


class RunWarning(UserWarning):
    """Something in a run directory that does not act as it reads."""


def claim_run_directory(folder: Path, where: Ranks, *, existing: Existing = "refuse") -> bool:
    """Make sure that a run may be written to `folder`; nothing in it is touched yet.

    Where ``torchrun`` starts its ranks again after a failure, the run that they had begun is resumed whatever
    `existing` says.

    Args:
        existing: what to do with a run that stands there.

    Returns:
        Whether a run stands there and is to be resumed.

    Raises:
        FileExistsError: it holds a run and `existing` is "refuse", or it is a folder of something else.
    """
    state = where.broadcast(_state_of(folder) if where.first else None)
    restarted = where.broadcast(_restarted(folder) if where.first else None)
    if state == "run" and existing == "refuse" and not restarted:
        raise FileExistsError(f"{folder} holds a run already; resume it, overwrite it, or choose another folder")
    if state == "other":
        raise FileExistsError(f"{folder} is not empty and no run directory; choose a new folder")
    if where.first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
    where.barrier()
    return state == "run" and bool(restarted or existing == "resume")


def sign_run_directory(folder: Path) -> None:
    """Note that what the folder holds from now on is of this launch."""
    replace_file(folder / MARKER, _launch())


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder anew; whenever that is interrupted, `readable_folder` finds the old one or the new one, whole.

    Args:
        write: is given the folder to write to.
    """
    fresh, old = folder.with_name(folder.name + ".writing"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def readable_folder(folder: Path) -> Path:
    """The folder, or after an interruption of `replace_folder` the one before it."""
    old = folder.with_name(folder.name + ".old")
    return old if old.is_dir() and not folder.is_dir() else folder


def locked(folder: Path, who: str, *, name: str = ".lock") -> IO[str]:
    """A folder, made where it is missing, locked until the file that is returned is closed, or this process ends,
    however it ends.

    Args:
        who: the command, for the message.
        name: of the file.

    Raises:
        ConfigError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / name).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"another {who} is at work in {folder}") from None
    return lock


def replace_file(path: Path, text: str) -> None:
    """Write a file anew, whole or not at all."""
    fresh = path.with_name(path.name + ".writing")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def fresh_run_directory(name: str, where: Ranks) -> Path:
    """runs/NAME, or runs/NAME-2 and so on where that one exists; the same on every rank.

    After a restart by ``torchrun``, the folder that was made before it.
    """
    folder = Path(str(where.broadcast(str(_fresh_folder(name)) if where.first else None)))
    claim_run_directory(folder, where)
    return folder


def _fresh_folder(name: str) -> Path:
    folder, number = Path("runs") / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            sign_run_directory(folder)
            return folder
        except FileExistsError:
            if _restarted(folder):
                return folder
            number += 1
            folder = Path("runs") / f"{name}-{number}"


def _restarted(folder: Path) -> bool:
    """Whether this process was started again by the launcher whose run the folder holds.

    The launcher's count of restarts does not tell: it leaves out those that a rank on another host was the cause of.
    """
    launch, marker = _launch(), folder / MARKER
    return bool(launch) and marker.is_file() and marker.read_text() == launch


def _launch() -> str:
    """Names the launcher of this process: it stays the same when it starts its ranks again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    launcher = os.getppid()
    started = Path(f"/proc/{launcher}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    return f"{socket.gethostname()} {launcher} {started} {os.environ['TORCHELASTIC_RUN_ID']}"


def _state_of(folder: Path) -> str:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "free"
    if not (folder / MARKER).is_file():
        return "other"
    from mtcl_torchrec.training.checkpoint.store import newest_checkpoint  # loads torch; the names above do not

    return "run" if newest_checkpoint(folder / CHECKPOINTS) else "free"
