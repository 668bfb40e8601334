"""Tables of numbers on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


class _PlainTable(Table):
    """A name in brackets is a name, and no style; the heading above is as wide as the screen, not as the table."""

    heading: Text | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading is not None:
            yield self.heading
        yield from super().__rich_console__(console, options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def plain_table(title: str, columns: list[str]) -> Table:
    """A table of numbers that fits a terminal of 80 columns; the first column is text."""
    table = _PlainTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.heading = Text(title, style="bold") if title else None
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i == 0 else "right", no_wrap=True)
    return table
