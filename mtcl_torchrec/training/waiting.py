"""How long training waits for its data: what faster disks, more reading threads or prepared files could save."""

from __future__ import annotations

import time
from collections.abc import Iterator

from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.training.sharding import Ranks

TOLD_FROM = 0.05  # share of an epoch


class TimedBatches(Iterator[MTBatch]):
    """Batches, and how long they were waited for: what reading ahead on other threads does not hide.

    A GPU works on what it was given while its host waits here, so that there it is an upper bound.

    Example:
        >>> batches = TimedBatches(iter([]))
        >>> list(batches), batches.seconds < 1
        ([], True)
    """

    def __init__(self, batches: Iterator[MTBatch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __next__(self) -> MTBatch:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started


def share_waited(waited: float, seconds: float, where: Ranks) -> float:
    """Share of an epoch in which its slowest reader waited, for whom all others do; every rank calls it.

    Args:
        waited, seconds: of this rank.
    """
    return max(where.gather(min(waited / max(seconds, 1e-9), 1.0)))


def waiting_lines(share: float, *, streams: bool) -> list[str]:
    """What is told of it at the end of an epoch; nothing where it is little.

    Args:
        streams: whether rows are read while they are trained on, or lie in memory.

    Example:
        >>> waiting_lines(0.312, streams=True)
        ['31 % of the epoch went into waiting for data: raise data.workers']
        >>> waiting_lines(0.312, streams=False)
        ['31 % of the epoch went into putting batches together: larger ones (training.batch_size) cost less a row']
        >>> waiting_lines(0.05, streams=True)
        []
    """
    if share <= TOLD_FROM:
        return []
    went = f"{100 * share:.0f} % of the epoch went into"
    if streams:
        return [f"{went} waiting for data: raise data.workers"]
    return [f"{went} putting batches together: larger ones (training.batch_size) cost less a row"]
