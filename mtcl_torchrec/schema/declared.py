"""What all declarations have in common: names, groups of features, and what is said of a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

Group = Literal["user", "item", "context"]
GROUPS: tuple[Group, ...] = ("user", "item", "context")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(dict.fromkeys(value)) if isinstance(value, list) else value


GroupSet = Annotated[tuple[Group, ...], BeforeValidator(_as_tuple)]


class DataError(ValueError):
    """The data does not fit the schema; the message names the column, row or label."""


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key and, if there is one, the nearest right one."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint for a mistyped name.

    Example:
        >>> nearest("is_clik", ["is_click", "long_view"])
        " (did you mean 'is_click'?)"
    """
    found = difflib.get_close_matches(name, [str(c) for c in candidates], n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def check_unique(what: str, names: Sequence[str]) -> None:
    """Raise ValueError if a name occurs twice.

    Example:
        >>> check_unique("task", ["click", "click"])
        Traceback (most recent call last):
            ...
        ValueError: task 'click' is declared twice
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} is declared twice")
        seen.add(name)


class Declared(BaseModel):
    """Base of what a schema declares: fixed, without fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
