"""Threads of a CPU's kernels: how many, how they wait for each other, and who has none.

libgomp, which torch's builds for Linux bring along, lets a thread that waits spin for milliseconds.  On an idle machine
that is the fastest way to wait.  Where another program takes one of the cores, all others spin while the one that they
wait for does not run: with a thread on each of two cores and one other busy program, training was measured to be up to
seven times slower than with one thread.  Spinning for a few thousand rounds, some microseconds, is as fast on the idle
machine and costs less than half on the busy one (benchmarks/NOTES.md).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

SPINS = 3_000  # rounds
_SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_briefly() -> None:
    """Let threads that wait spin briefly, then sleep, unless the environment says how they wait.

    It is read when torch is loaded, so it is for programs, such as ``mtcl train``, before they import it; in
    programs of your own, set ``GOMP_SPINCOUNT=3000``.
    """
    if not any(name in os.environ for name in _SAID):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def calm_threads() -> int:
    """How many threads a process has where ``OMP_NUM_THREADS`` does not say: its share of the cores.

    Where threads may spin for long (see `wait_briefly`), half of it, so that one that is held up holds up no others.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    share = len(os.sched_getaffinity(0)) // processes
    return max(1, share if any(name in os.environ for name in _SAID) else share // 2)


def lone_workers(workers: int, name: str) -> ThreadPoolExecutor:
    """Threads whose kernels run on themselves alone, and leave those of the caller as they are.

    A kernel on another thread brings OpenMP threads of its own: they take the cores of those that train, and as soon as
    there are more of them than cores, none spins any more, which was measured to cost training a fifth of its speed.

    Args:
        name: prefix of the threads' names.

    Example:
        >>> import torch
        >>> with lone_workers(2, "reading") as pool:
        ...     pool.submit(torch.get_num_threads).result()
        1
    """
    return ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=_alone)


def _alone() -> None:
    import torch
    from threadpoolctl import threadpool_limits

    torch.get_num_threads()  # a thread's first look at its number sets it, and would undo the next line
    threadpool_limits(1, user_api="openmp")  # of this thread; `torch.set_num_threads` would hold for those to come, too
