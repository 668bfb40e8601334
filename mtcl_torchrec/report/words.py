"""Numbers and lists as sentences say them."""

from __future__ import annotations

from collections.abc import Sequence

MOST = 8  # parts that a sentence lists: of more, it is not read
_OF_MORE = 6  # that are named then


def shortened(parts: Sequence[str]) -> list[str]:
    """Parts as a sentence can hold them: the first few, and how many more there are.

    Example:
        >>> shortened(["a", "b"]), shortened(list("abcdefghi"))[5:]
        (['a', 'b'], ['f', '3 more'])
    """
    return list(parts) if len(parts) <= MOST else [*parts[:_OF_MORE], f"{len(parts) - _OF_MORE} more"]


def listed(parts: Sequence[str]) -> str:
    """Parts as a sentence lists them, the first few of many.

    Example:
        >>> listed(["a", "b", "c"]), listed(list("abcdefghi"))
        ('a, b and c', 'a, b, c, d, e, f and 3 more')
    """
    *front, last = shortened(parts)
    return f"{', '.join(front)} and {last}" if front else last


def first_rows(k: int) -> str:
    """What is shown of a request.

    Example:
        >>> first_rows(1), first_rows(5)
        ('the first row', 'the first 5 rows')
    """
    return "the first row" if k == 1 else f"the first {k} rows"


def rows_in_words(k: int) -> str:
    """A number of rows.

    Example:
        >>> rows_in_words(1), rows_in_words(5)
        ('one row', '5 rows')
    """
    return "one row" if k == 1 else f"{k} rows"


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign.

    Example:
        >>> signed(-0.12, 2), signed(0.1, 2)
        ('−0.12', '+0.10')
    """
    return f"{value:+z.{digits}f}".replace("-", "−")
