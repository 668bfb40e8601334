"""Run a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# Forked from a server that has imported the package: ranks start in a fraction of a second.
_context.set_forkserver_preload(["mtcl_torchrec.training.run"])


def _main(fn: Callable, rank: int, world_size: int, port: int, args: tuple, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    try:
        pipe.send(("done", fn(*args)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def run_ranks(fn: Callable, world_size: int, *args: Any, timeout: float = 180) -> list[Any]:
    """The result of ``fn(*args)`` on each rank.

    `fn` is a module-level function; it makes its own process group, as it would under torchrun.

    Raises:
        AssertionError: a rank failed, died or did not finish in time; the message holds its traceback.
    """
    # As torchrun does: a store that stands before the ranks start, on a port that nobody else can take.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(world_size):
        here, there = _context.Pipe()
        process = _context.Process(target=_main, args=(fn, rank, world_size, store.port, args, there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results = []
    try:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout), f"rank {rank} of {world_size} gave no answer in {timeout} s"
            try:
                state, value = pipe.recv()
            except EOFError:
                processes[rank].join(10)
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            assert state == "done", f"rank {rank} of {world_size}:\n{value}"
            results.append(value)
        for process in processes:
            process.join(30)
            assert process.exitcode == 0, f"a rank ended with exit code {process.exitcode} after its work was done"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return results
