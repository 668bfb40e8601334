"""Memory that a step lets go of is kept for the next one."""

from __future__ import annotations

import ctypes
import os
import sys

# Of malloc.h; glibc's own largest threshold for what is mapped by itself, on 64 bits.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_MAPPED = -1, -3, 32 << 20
KEPT = 1 << 30  # bytes; of free memory at the heap's end, and of one tensor


def keep_freed_memory() -> bool:
    """Let the C library keep what training frees, so that the next step need not ask the kernel for it again.

    Every step allocates the same tensors.  By default glibc gives larger ones, and what is free at the end of its heap,
    back to the kernel at once, and each page of the next step's is zeroed and mapped anew: some 6,000 page faults and
    an eighth of a step on a CPU (benchmarks/NOTES.md).  The process may hold up to `KEPT` bytes more than it uses.

    It holds for the whole process, so it is for programs, such as ``mtcl train``, not for libraries.  What the
    environment says (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``) stays.

    Returns:
        Whether it was done; nothing is changed under another C library or allocator.
    """
    said = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ)
    if not sys.platform.startswith("linux") or said:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = mallopt(_M_MMAP_THRESHOLD, KEPT) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAPPED)
    return bool(mapped and mallopt(_M_TRIM_THRESHOLD, KEPT))
