"""How pictures look, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from document import CONSOLE


def figure(
    *, wide: float = 7.0, high: float = 3.6, columns: int = 1, rows: int | None = None, grid: Literal["x", "y"] = "y"
) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, in the style of all pictures here.

    Args:
        rows: of panels; None is one row, whose axes are returned as (columns,), else (rows, columns).
        grid: the axis whose values have lines: those that are measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows or 1, columns, figsize=(wide, high), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis=grid, alpha=0.3)
        axis.set_axisbelow(True)
    return drawn, axes if rows else axes[0]


def save(drawn: Any, path: Path) -> None:
    """Write a picture and let go of it."""
    from matplotlib import pyplot

    drawn.savefig(path, dpi=130)
    pyplot.close(drawn)
    CONSOLE.print(f"wrote {path}")
