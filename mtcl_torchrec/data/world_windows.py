"""A synthetic world as a source of windows: its rows are computed while they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.data.position import shuffled
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.synthetic import World


@dataclass(frozen=True)
class WorldWindow:
    """Rows ``start`` to ``start + rows`` of a world."""

    start: int
    rows: int


@dataclass(frozen=True)
class WorldWindows:
    """The first rows of a synthetic world as a source of windows for `StreamRows`.

    Args:
        world: the world.
        total: how many rows.
        window_rows: rows of a window; the last may be shorter.

    Example:
        >>> from mtcl_torchrec.data.worlds import ready_world
        >>> source = WorldWindows(ready_world("shop", num_users=100, num_items=50), 1000, 400)
        >>> [(w.start, w.rows) for w in source.windows()], len(source.read(source.windows()[2]))
        ([(0, 400), (400, 400), (800, 200)], 200)
    """

    world: World
    total: int
    window_rows: int

    @property
    def fingerprint(self) -> str:
        """The world's dials, and how it is cut."""
        return f"{self.world!r}, {self.total} rows in windows of {self.window_rows}"

    def windows(self, seed: Sequence[int] | None = None) -> list[WorldWindow]:
        """All windows, in an order that follows from the numbers of `seed`; None is their own order."""
        starts = range(0, self.total, self.window_rows)
        cut = [WorldWindow(start, min(self.window_rows, self.total - start)) for start in starts]
        return cut if seed is None else [cut[i] for i in shuffled(len(cut), seed).tolist()]

    def read(self, window: WorldWindow) -> Rows:
        """The rows of a window."""
        return Rows(self.world.rows(np.arange(window.start, window.start + window.rows)))

    def empty(self) -> Rows:
        """No rows, with all columns."""
        return Rows(self.world.rows(np.arange(0)))
