"""Memory of the process: what a step lets go of is kept for the next one, and how much there was at most."""

from __future__ import annotations

import ctypes
import os
import resource
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


def peak_memory() -> int:
    """The most memory that this process has had, bytes; what it shares with others counts, too.

    Not ``ru_maxrss`` where Linux tells better: that begins, after fork and exec, with the peak of whoever started the
    process, so that a small run that a large program starts seems to be large.

    Example:
        >>> peak_memory() > 1_000_000
        True
    """
    try:
        with open("/proc/self/status") as file:
            peak = next(line.split()[1] for line in file if line.startswith("VmHWM:"))
        return int(peak) * 1024
    except (OSError, StopIteration):  # another system, or a sandbox that does not tell
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
