"""A synthetic world as a run's data: its rows are computed while they are trained on, or to be judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.config import SyntheticConfig
from mtcl_torchrec.data.position import shuffled
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.synthetic import World
from mtcl_torchrec.data.worlds import ready_world
from mtcl_torchrec.schema import ConfigError


def world_of(config: SyntheticConfig) -> World:
    """The world of a run.

    Raises:
        ConfigError: a dial is out of range, or does not go with another.
    """
    return ready_world(config.world, **config.dials())


def recorded_by(config: SyntheticConfig, world: World) -> int | None:
    """The moment at which a run learns from its log, the end of val; None where all events are recorded at once."""
    return world.time_of(config.rows + config.val_rows - 1) if world.delay else None


def world_split(config: SyntheticConfig, split: str) -> Rows:
    """The rows of ``"val"`` or ``"test"``.  Where events are recorded with a delay, val is as it was when it ended, and
    test is what has come of it.

    Raises:
        ConfigError: there are none.

    Example:
        >>> config = SyntheticConfig(world="shop", rows=100, val_rows=20, test_rows=30)
        >>> len(world_split(config, "val")), len(world_split(config, "test"))
        (20, 30)
    """
    start, count = config.rows, config.val_rows
    if split == "test":
        start, count = start + count, config.test_rows
    if count == 0:
        raise ConfigError(f"the run has no {split} split (data.synthetic.{split}_rows is 0)")
    world = world_of(config)
    return Rows(
        world.rows(np.arange(start, start + count), as_of=recorded_by(config, world) if split == "val" else None)
    )


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
        as_of: a time: labels as they were recorded then, see `World.rows`.

    Example:
        >>> from mtcl_torchrec.data.worlds import ready_world
        >>> source = WorldWindows(ready_world("shop", num_users=100, num_items=50), 1000, 400)
        >>> [(w.start, w.rows) for w in source.windows()], len(source.read(source.windows()[2]))
        ([(0, 400), (400, 400), (800, 200)], 200)
    """

    world: World
    total: int
    window_rows: int
    as_of: int | None = None

    @property
    def fingerprint(self) -> str:
        """The world's dials, and how it is cut."""
        when = "" if self.as_of is None else f", as of {self.as_of}"
        return f"{self.world!r}, {self.total} rows in windows of {self.window_rows}{when}"

    def windows(self, seed: Sequence[int] | None = None) -> list[WorldWindow]:
        """All windows, in an order that follows from the numbers of `seed`; None is their own order."""
        starts = range(0, self.total, self.window_rows)
        cut = [WorldWindow(start, min(self.window_rows, self.total - start)) for start in starts]
        return cut if seed is None else [cut[i] for i in shuffled(len(cut), seed).tolist()]

    def read(self, window: WorldWindow) -> Rows:
        """The rows of a window."""
        return Rows(self.world.rows(np.arange(window.start, window.start + window.rows), as_of=self.as_of))

    def empty(self) -> Rows:
        """No rows, with all columns."""
        return Rows(self.world.rows(np.arange(0)))
