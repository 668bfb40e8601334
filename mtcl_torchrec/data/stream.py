"""Training rows that never are in memory together: read, shuffled and encoded window by window, ahead of training."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from mtcl_torchrec.data.batch import EncodedRows, MTBatch
from mtcl_torchrec.data.id_dropout import drop_ids
from mtcl_torchrec.data.item_totals import ItemTotals, Part
from mtcl_torchrec.data.position import Piece, Position, count, cut, pieces_left, shuffled
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.openmp import lone_workers

T = TypeVar("T")
_THREADS = "mtcl-data"


class Window(Protocol):
    """Rows that are read together."""

    @property
    def rows(self) -> int:
        """How many there are, at least one."""


W = TypeVar("W", bound=Window)


class WindowSource(Protocol[W]):
    """Rows in windows, such as `mtcl_torchrec.data.parquet.ParquetFiles`."""

    @property
    def fingerprint(self) -> str:
        """Equal for the same rows in the same windows."""

    def windows(self, seed: Sequence[int] | None = None) -> Sequence[W]:
        """All rows, once each, in an order that follows from the numbers of `seed`; None is their own order."""

    def read(self, window: W) -> Rows:
        """The rows of a window, always in the same order.  Called on several threads."""

    def empty(self) -> Rows:
        """No rows, with all columns."""


class StreamRows:
    """Rows of a source as `mtcl_torchrec.data.training_rows.TrainingRows`.

    An epoch is the source's windows in an order of its own, and the rows of each window shuffled.  What is left of it
    is cut into as many shares of consecutive rows as there are ranks, which differ by at most one row.  A rank reads
    the windows of its share only, on threads of its own, and holds at most ``workers + 1`` of them.

    Args:
        source: windows of rows.
        encode: rows to encoded rows; called on several threads.
        seed: of the shuffle and of dropped ids; the epoch is part of it.
        workers: threads that read and encode ahead of training.
        id_dropout: id feature -> share of the rows in which it is unknown; see `mtcl_torchrec.data.id_dropout`.

    Example:
        >>> import pandas as pd
        >>> import tempfile
        >>> from mtcl_torchrec.data.encoding import FeatureEncoder
        >>> from mtcl_torchrec.data.parquet import ParquetFiles
        >>> from mtcl_torchrec.schema import Feature, Schema, Task
        >>> schema = Schema(features=[Feature(name="user", group="user")], tasks=[Task.binary("click")])
        >>> frame = pd.DataFrame({"user": range(10), "click": [0, 1] * 5})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     frame.to_parquet(f"{folder}/a.parquet", row_group_size=2)
        ...     files = ParquetFiles.open([folder], window_rows=4)
        ...     stream = StreamRows(files, FeatureEncoder(schema).fit(Rows(frame)).encode, seed=0)
        ...     batches = list(stream.batches(Position(), rank=1, world_size=2, batch_size=4))
        >>> [len(batch.labels) for batch in batches]
        [4, 1]
    """

    def __init__(
        self,
        source: WindowSource[W],
        encode: Callable[[Rows], EncodedRows],
        *,
        seed: int,
        workers: int = 1,
        id_dropout: Mapping[str, float] | None = None,
    ) -> None:
        self.source: WindowSource[Any] = source
        self.encode = encode
        self.seed = seed
        self.workers = workers
        self.id_dropout = id_dropout or {}
        self._totals: ItemTotals | None = None

    def counted_by(self, totals: ItemTotals) -> StreamRows:
        """The same stream, whose rows are shown to `totals` with all their ids, in the order of the batches that they
        come in and before them."""
        counted = copy.copy(self)
        counted._totals = totals
        return counted

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the split, over all ranks."""
        return self.rows_left(Position())

    @property
    def fingerprint(self) -> str:
        """The windows and the seed."""
        return f"{self.source.fingerprint}, seed {self.seed}"

    def rows_left(self, position: Position) -> int:
        """Rows of the epoch, over all ranks, that were not taken yet."""
        return count(self._left(self._windows(position), position))

    def steps(self, position: Position, *, world_size: int, batch_size: int) -> int:
        """Batches that each rank gets from `position` to the end of the epoch."""
        largest = -(-self.rows_left(position) // world_size)
        return -(-largest // batch_size)

    def batches(self, position: Position, *, rank: int, world_size: int, batch_size: int) -> Iterator[MTBatch]:
        """The batches of one rank from `position` to the end of the epoch.

        Raises:
            DataError: where the rows that cannot be read or encoded would come.
        """
        windows = self._windows(position)
        shares = cut(self._left(windows, position), world_size)
        largest = max(map(count, shares))
        steps = -(-largest // batch_size)
        loads, taken = self._loads(windows, shares[rank], position.epoch, batch_size), 0
        with closing(in_order(loads, self.workers)) as encoded:
            for rows in in_batches(map(self._shown, encoded), batch_size):
                yield rows.batch().filled_up(min(batch_size, largest - taken * batch_size))
                taken += 1
        if taken < steps:
            blank = self.encode(self.source.empty())
            for _ in range(steps - taken):
                yield blank.blank()

    def _windows(self, position: Position) -> Sequence[Any]:
        return self.source.windows((self.seed, position.epoch))

    def _left(self, windows: Sequence[Any], position: Position) -> list[Piece]:
        return pieces_left([(i, 0, window.rows) for i, window in enumerate(windows)], position.taken)

    def _shown(self, loaded: tuple[Part | None, deque[EncodedRows]]) -> deque[EncodedRows]:
        part, rows = loaded
        if self._totals is not None and part is not None:
            self._totals.see(part)
        return rows

    def _loads(
        self, windows: Sequence[Any], share: Sequence[Piece], epoch: int, batch_size: int
    ) -> Iterator[Callable[[], tuple[Part | None, deque[EncodedRows]]]]:
        taken = 0
        for number, group in groupby(share, key=lambda piece: piece[0]):
            pieces, begun = list(group), taken % batch_size
            yield partial(self._load, windows[number], (self.seed, epoch, number), pieces, begun, batch_size)
            taken += count(pieces)

    def _load(
        self, window: Any, seed: Sequence[int], pieces: Sequence[Piece], begun: int, batch_size: int
    ) -> tuple[Part | None, deque[EncodedRows]]:
        """What is counted of a window, with all ids, and its rows as parts for `in_batches`.

        Args:
            begun: rows that the batch has before the first of these.
        """
        # Encoded in the order of the file, without a copy of its columns, and shuffled and cut in one go.
        encoded = self.encode(self.source.read(window))
        order = shuffled(window.rows, seed)
        order = torch.cat([order[start:stop] for _, start, stop in pieces])
        part = None if self._totals is None else self._totals.part_of(encoded, order)
        encoded = drop_ids(encoded, self.id_dropout, np.arange(len(encoded)), seed)
        return part, deque(encoded.parts(order.tensor_split(list(range(batch_size - begun, len(order), batch_size)))))


def in_batches(windows: Iterable[deque[EncodedRows]], batch_size: int) -> Iterator[EncodedRows]:
    """Rows, `batch_size` at a time; the last may be fewer.

    Args:
        windows: parts, one after the other, of which some end wherever a batch does.  They are taken out of the window,
            so that only those that were not taken yet stay in memory.
    """
    held, rows = list[EncodedRows](), 0
    for parts in windows:
        while parts:
            held.append(parts.popleft())
            rows += len(held[-1])
            if rows == batch_size:
                whole = EncodedRows.cat(held)
                held, rows = [], 0
                yield whole
                del whole  # it must not stay in memory while the next one is waited for
    if held:
        yield EncodedRows.cat(held)


def in_order(calls: Iterable[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    """The results of calls in their order, made ahead on threads.

    Of at most ``workers + 1`` calls the result is there at any time, that of the caller included.  What a call raises
    is raised in its place.  The threads end with the iterator: when it is exhausted, closed or collected.

    Example:
        >>> list(in_order([lambda: "a", lambda: "b"], workers=2))
        ['a', 'b']
    """
    waiting: deque[Future[T]] = deque()
    pool = lone_workers(workers, _THREADS)
    try:
        for call in calls:
            if len(waiting) == workers:
                result = waiting.popleft().result()
                waiting.append(pool.submit(call))
                yield result
                del result
            else:
                waiting.append(pool.submit(call))
        while waiting:
            yield waiting.popleft().result()
    finally:
        # No thread can wait for itself: Python may collect the iterator on one of these.
        here = threading.current_thread().name.startswith(_THREADS)
        pool.shutdown(wait=not here, cancel_futures=True)
