"""Numbers and lists as sentences say them."""

from __future__ import annotations

from collections.abc import Sequence

from mtcl_torchrec.evaluation.confidence import SURE, plain_number, plus_minus


def listed(parts: Sequence[str]) -> str:
    """Parts as a sentence lists them.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    *front, last = parts
    return f"{', '.join(front)} and {last}" if front else last


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign.

    Example:
        >>> signed(-0.12, 2), signed(0.1, 2)
        ('−0.12', '+0.10')
    """
    return f"{value:+z.{digits}f}".replace("-", "−")


def signed_with_error(value: float, error: float, digits: int = 4) -> str:
    """A difference and half of its 95% interval.

    Example:
        >>> signed_with_error(0.01, 0.001), signed_with_error(0.01, float("nan"))
        ('+0.0100 ± 0.0020', '+0.0100')
    """
    half = SURE * error
    return signed(value, digits) + plus_minus(value, half, digits).removeprefix(plain_number(value, digits))
