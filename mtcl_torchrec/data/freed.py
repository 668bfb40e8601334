"""Memory that was freed goes back to the operating system."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, where that is what the process allocates with."""
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return trim


def give_back() -> bool:
    """Let the allocator hand its free pages to the operating system.

    glibc keeps what threads have freed in arenas of theirs and gives back the top of an arena only.  Tables that are
    read and encoded window by window on threads leave holes between what lives on, and a process that streams a long
    log grows although it holds no more than a few windows.

    Returns:
        Whether there was something to give back; False also where the C library is another one.

    Example:
        >>> give_back() in (True, False)
        True
    """
    trim = _trim()
    return bool(trim(0)) if trim is not None else False
