"""How names from data are drawn by matplotlib."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_text() -> Iterator[None]:
    """Names of tasks and settings are drawn as they are: nothing between dollar signs is a formula, or ought to be one,
    and letters that the font lacks are boxes, without a warning for each of them in each picture.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from matplotlib.figure import Figure
        >>> with plain_text():
        ...     Figure().text(0.5, 0.5, "$a^^$").get_parse_math()
        False
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ", UserWarning)
        yield
