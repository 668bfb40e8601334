"""How far an evaluation is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], object]
"""Called with what is being done, how much of it is done, and of how much; of 0, where that is not known."""


def quiet(doing: str, done: int, total: int) -> None:
    """Say nothing."""
