"""Ctrl-C: one line that says what is kept and how to go on, and exit status 130 (128 + SIGINT), wherever it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

STATUS = 130
BEGINS_ANEW = "nothing is kept, the same command begins anew"
_state: dict[str, Callable[[], str]] = {}
_came: list[int] = []


def if_stopped(kept: Callable[[], str] | str) -> None:
    """Set what is said where the command is stopped from now on: what is kept, and how to go on.

    Args:
        kept: the words after "stopped; ", or what finds them when it comes to that.
    """
    _state["kept"] = kept if callable(kept) else lambda: kept


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Run a command; where it is stopped, say so and exit.

    An error that follows from an interrupt counts as one, too: of ranks that wait for each other, one is interrupted
    and the others lose their connection to it.

    Raises:
        SystemExit: 130, stopped.
    """
    _state.clear()
    _came.clear()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as of a command that a shell runs in the background
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            yield
            return
        except KeyboardInterrupt:
            pass
        except SystemExit as error:  # typer makes one of an interrupt
            if error.code != STATUS:
                raise
        except Exception:
            if not _came:
                raise
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience is no reason for a traceback
        _say()
        if "RANK" in os.environ:  # threads of a process group whose other ranks are gone would wait for them
            os._exit(STATUS)
        raise SystemExit(STATUS)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _came.append(number)
    raise KeyboardInterrupt


def _say() -> None:
    if os.environ.get("RANK", "0") == "0":
        kept = _state["kept"]() if "kept" in _state else BEGINS_ANEW
        print(f"mtcl: stopped; {kept}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
