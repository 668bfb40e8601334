"""Tables of numbers on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_NARROWEST = 6  # letters of a name in a line


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


def print_columns(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, last: bool = False
) -> None:
    """Print a table; where it is wider than the screen, as several below each other, each with the first column.

    No figure is ever cut: where even one of them does not fit beside the names, these are told in several lines.

    Args:
        columns, rows: cells may have several lines.
        last: no empty line follows.

    Example:
        >>> print_columns(Console(width=20), "", ["task", "AUC", "NE"], [["click", "0.7123", "0.9512"]], last=True)
        task      AUC
        click  0.7123
        <BLANKLINE>
        task       NE
        click  0.9512
    """
    widths = [max(_width(name), *(_width(r[c]) for r in rows)) for c, name in enumerate(columns)]
    room = console.width - 2 - max(widths[1:], default=0)
    name_width = min(widths[0], max(room, _NARROWEST))
    start = 1
    while start < len(columns):
        end, width = start + 1, name_width + 2 + widths[start]
        while end < len(columns) and width + 2 + widths[end] <= console.width:
            width += 2 + widths[end]
            end += 1
        table = plain_table(title, [columns[0], *columns[start:end]])
        if name_width < widths[0]:
            names = table.columns[0]
            names.width, names.no_wrap, names.overflow = name_width, False, "fold"
        for row in rows:
            table.add_row(row[0], *row[start:end])
        if width <= (screen := console.width):
            console.print(table)
        else:  # beyond a screen that is narrower than a figure, rather than cut
            console.width = width
            console.print(table, crop=False)
            console.width = screen
        if not (last and end == len(columns)):
            console.print()
        title, start = "", end


def _width(cell: str | Text) -> int:
    return max((line.cell_len for line in (cell if isinstance(cell, Text) else Text(str(cell))).split()), default=0)
