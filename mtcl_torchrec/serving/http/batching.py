"""Requests that arrive together are worked on together, in one thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")


@dataclass(eq=False)
class _Waiting(Generic[J]):
    job: J
    rows: int
    arrived: float
    alone: bool
    answer: asyncio.Future[Any]


class Batcher(Generic[J, R]):
    """Gathers jobs and gives them to a function in a thread of its own, a batch at a time.

    A job waits for others at most `wait_s`, counted from its arrival, and not at all if it is alone: nothing is being
    worked on, and nothing came in the `wait_s` before.  Jobs that arrive while a batch is worked on are the next batch.

    Args:
        work: jobs -> a result, or the exception that says why there is none, for each.
        wait_s: 0 gathers nothing: each job is a batch.
        max_rows: a batch is complete when the rows of its jobs reach this; one larger job is a batch of its own.

    Example:
        >>> async def ask() -> list[int]:
        ...     batcher = Batcher(lambda jobs: [job * len(jobs) for job in jobs], wait_s=0.02, max_rows=100)
        ...     async with batcher:
        ...         return await asyncio.gather(*(batcher.submit(job, rows=1) for job in (5, 6)))
        >>> asyncio.run(ask())
        [10, 12]
    """

    def __init__(self, work: Callable[[Sequence[J]], Sequence[R | Exception]], *, wait_s: float, max_rows: int) -> None:
        self._work, self._wait_s, self._max_rows = work, wait_s, max_rows
        self._waiting: deque[_Waiting[J]] = deque()
        self._open: set[asyncio.Future[Any]] = set()  # what is not answered yet
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._task: asyncio.Task | None = None
        self._latest = -float("inf")  # when the latest job arrived

    def __len__(self) -> int:
        """Jobs that wait, without those that are worked on."""
        return len(self._waiting)

    async def __aenter__(self) -> Batcher[J, R]:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Finish what waits, then end."""
        assert self._task is not None
        if self._open:
            await asyncio.wait(self._open)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, job: J, *, rows: int) -> R:
        """The result of a job.

        Args:
            rows: how much it adds to a batch.

        Raises:
            Exception: what the work raised, or returned, for this job.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        alone, self._latest = not self._open and now - self._latest > self._wait_s, now
        waiting = _Waiting(job, rows, now, alone, loop.create_future())
        self._open.add(waiting.answer)
        waiting.answer.add_done_callback(self._open.discard)
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [w for w in await self._gather() if not w.answer.done()]  # done: nobody waits for it any more
            if not batch:
                continue
            try:
                results = await loop.run_in_executor(self._thread, self._work, [w.job for w in batch])
            except Exception as error:
                results = [error] * len(batch)
            for waiting, result in zip(batch, results, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(result, Exception):
                    waiting.answer.set_exception(result)
                else:
                    waiting.answer.set_result(result)

    async def _gather(self) -> list[_Waiting[J]]:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        if self._wait_s <= 0 or (len(self._waiting) == 1 and self._waiting[0].alone):
            return [self._waiting.popleft()]
        ready = self._waiting[0].arrived + self._wait_s
        while sum(w.rows for w in self._waiting) < self._max_rows:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(ready):
                    await self._arrived.wait()
            except TimeoutError:
                break
        batch = [self._waiting.popleft()]
        rows = batch[0].rows
        while self._waiting and rows + self._waiting[0].rows <= self._max_rows:
            rows += self._waiting[0].rows
            batch.append(self._waiting.popleft())
        return batch
