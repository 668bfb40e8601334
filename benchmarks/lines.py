"""The file in which a benchmark keeps its measurements: JSON lines, of one script, written by one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from document import Line

BESIDE = {".json": "the document", ".png": "the picture", ".unfinished": "what is being written"}  # of NAME.jsonl


def read(path: Path) -> list[Line]:
    """The lines of a results file; one that was cut off while it was written is left out."""
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            of = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(of, dict):
            found.append(of)
    return found


def appended(path: Path, line: Line) -> None:
    """Write a line to the end of a results file, on a line of its own even where the last one was cut off.

    Raises:
        SystemExit: it cannot be written; the message says what is lost.
    """
    try:
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut_off = file.read(1) != b"\n"
            else:
                cut_off = False
            file.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")
    except OSError as error:
        lost = line.get("what", "the last result")
        raise SystemExit(f"{path}: {error.strerror or error}; lost, to be measured again: {lost}") from None


def latest(lines: Iterable[Line]) -> list[Line]:
    """Of each repeat of each measurement the newest line."""
    return list(
        {key(line["what"], line["repeat"]): line for line in lines if {"what", "repeat"} <= line.keys()}.values()
    )


def key(what: Line, repeat: int) -> str:
    """What a measurement is known again by."""
    return json.dumps([what, repeat], sort_keys=True)


@contextmanager
def kept_alone(path: Path) -> Iterator[None]:
    """Nobody else measures into this file while the block runs: two would disturb each other, and measure all twice.

    Raises:
        BlockingIOError: somebody does.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends
        except BlockingIOError:
            raise BlockingIOError(
                0, "another process measures into this file; wait, or name another", str(path)
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def wrong_file(path: Path, script: str) -> str:
    """Why a script must not measure into this file or show it; empty where it may."""
    if path.suffix in BESIDE:
        return f"is the name of {BESIDE[path.suffix]} beside the measurements; they are in {path.with_suffix('.jsonl')}"
    if path.exists() and not path.is_file():
        return "is no file"  # and may be read without end
    with suppress(OSError):  # nothing that may be read: who opens it says so
        others = {of for line in read(path) if (of := script_of(line))} - {script}
        if others:
            return f"holds what {', '.join(sorted(others))} has measured, and this is {script}; name another file"
        if path.exists() and path.read_bytes().strip() and not read(path):
            return "holds no measurements (JSON lines)"
    return ""


def script_of(line: Line) -> str | None:
    """The script that has measured a line, by its command; None where it was not kept."""
    words: Sequence[str] = str((line.get("about") or {}).get("command", "")).split()
    return Path(words[1]).name if len(words) > 1 else None
