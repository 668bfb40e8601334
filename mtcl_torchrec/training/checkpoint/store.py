"""A folder of checkpoints: written in the background, complete or not there, the newest few and the best kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mtcl_torchrec.openmp import lone_workers
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.sharding import Ranks

ABOUT = "state.json"
UNFINISHED = ".writing"
_NAME = re.compile(r"step_(\d+)")


class CheckpointStore:
    """Writes a run's checkpoints, each a folder ``step_N`` with torch's files and ``state.json``.

    A checkpoint is written beside its place and renamed when it is complete, so that a crash or a full disk leaves the
    ones before untouched.  Every rank makes the store and calls its methods, in the same order.

    Args:
        folder: on a file system that all ranks share.
        where: this process among the ranks.
        keep: how many of the newest stay, beside the best.
    """

    def __init__(self, folder: Path, where: Ranks, *, keep: int = 2) -> None:
        self.folder, self.where, self.keep = folder, where, keep
        # What is written in the background talks over a group of its own: training's messages must not meet it.
        self._group = dist.new_group(backend="gloo") if where.world_size > 1 else None
        self._writer = lone_workers(1, "checkpoint")
        self._pending: Future | None = None
        if where.first:
            folder.mkdir(parents=True, exist_ok=True)
            for rest in folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(rest, ignore_errors=True)
        where.barrier()

    def save(self, tensors: dict[str, Any], about: dict[str, Any], *, background: bool = False) -> None:
        """Write a checkpoint; on several ranks, each writes its part.

        Args:
            tensors: name -> tensor; not to be changed before the checkpoint is written.
            about: what JSON can hold; ``about["step"]`` names the checkpoint, ``about["history"]["best_step"]`` the one
                to keep.
            background: return at once; `failure` tells later if it went wrong.

        Raises:
            OSError: it could not be written (only where `background` is False); earlier ones are untouched.
        """
        self.wait()
        fresh = self.folder / f"{checkpoint_name(about['step'])}{UNFINISHED}"
        failed: object = None
        if self.where.first:
            try:
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir(parents=True)
            except OSError as error:
                failed = self._what_failed(about, error)
        failed = self.where.broadcast(failed)
        if failed is not None:
            self._pending = Future()
            self._pending.set_result(failed)
        else:
            self._pending = self._writer.submit(self._write, tensors, about, fresh)
        if not background:
            failed = self.where.broadcast(self.failure(wait=True))
            if failed:
                raise OSError(failed)

    def failure(self, *, wait: bool = False) -> str | None:
        """Why the last checkpoint could not be written, told once; None where it was, or is still being written."""
        if self._pending is None or not (wait or self._pending.done()):
            return None
        failed: str | None = self._pending.result()
        self._pending = None
        return failed

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._pending is not None:
            self._pending.exception()

    def close(self) -> None:
        """Wait, and end the background thread."""
        self._writer.shutdown(wait=True)

    def _write(self, tensors: dict[str, Any], about: dict[str, Any], fresh: Path) -> str | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save(tensors, storage_writer=FileSystemWriter(fresh), process_group=self._group)
            if self.where.first:
                _write_synced(fresh / ABOUT, json.dumps(about, indent=1))
                final = self.folder / checkpoint_name(about["step"])
                shutil.rmtree(final, ignore_errors=True)
                fresh.rename(final)
                self._prune(about)
        except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
            if self.where.first:
                shutil.rmtree(fresh, ignore_errors=True)
            return self._what_failed(about, error)
        return None

    def _what_failed(self, about: dict[str, Any], error: BaseException) -> str:
        last = newest_checkpoint(self.folder)
        kept = f"the last good one is {last.name}" if last else "there is none before it"
        room = f"{shutil.disk_usage(self.folder).free / 1e9:.1f} GB are free there" if self.folder.is_dir() else "gone"
        return f"{self.folder / checkpoint_name(about['step'])} could not be written ({_reason(error)}; {room}); {kept}"

    def _prune(self, about: dict[str, Any]) -> None:
        complete = _complete(self.folder)
        best = about.get("history", {}).get("best_step", 0)
        for step, folder in complete[: -self.keep]:
            if step != best:
                shutil.rmtree(folder, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder."""
    complete = _complete(folder)
    return complete[-1][1] if complete else None


def best_checkpoint(folder: Path) -> Path | None:
    """The best epoch's checkpoint in a folder, as far as training came; None before the first epoch was kept."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    best = folder / checkpoint_name(read_about(newest)["history"]["best_step"])
    return best if (best / ABOUT).is_file() else None


def read_about(checkpoint: Path) -> dict[str, Any]:
    """What stands beside a checkpoint's tensors.

    Raises:
        DataError: it cannot be read.
    """
    try:
        about = json.loads((checkpoint / ABOUT).read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise TypeError("an object is expected")
        return about
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{checkpoint}: damaged checkpoint ({error})") from None


def _reason(error: BaseException) -> str:
    """The last line of an error of torch, which hides what the operating system said."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    found = [(m, p) for p in folder.glob("step_*") if (m := _NAME.fullmatch(p.name)) and (p / ABOUT).is_file()]
    return sorted((int(m[1]), p) for m, p in found)


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after a step."""
    return f"step_{step:09d}"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
