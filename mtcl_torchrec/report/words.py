"""Numbers and lists as sentences say them."""

from __future__ import annotations

from collections.abc import Sequence


def listed(parts: Sequence[str]) -> str:
    """Parts as a sentence lists them.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    *front, last = parts
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
