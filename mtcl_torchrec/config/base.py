"""What every part of a run's configuration shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mtcl_torchrec.schema import nearest

Fraction = Annotated[float, Field(ge=0, lt=1)]


def as_list(value: Any) -> Any:
    """A list of one name, where a YAML gives the name alone; anything else as it is, for pydantic to judge."""
    return [value] if isinstance(value, str) else value


def known_kind(kind: str, kinds: Sequence[str], example: str) -> str:
    """A kind of ours, or the import path of one's own.

    Args:
        example: a name for the message.

    Raises:
        ValueError: it is neither.
    """
    module, colon, name = kind.partition(":")
    path = colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
    if kind not in kinds and not path:
        listed = ", ".join(repr(known) for known in kinds)
        raise ValueError(
            f"{kind!r} is none of {listed}, nor an import path such as 'my_package.my_module:{example}'"
            f"{nearest(kind, kinds)}"
        )
    return kind


Paths = Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]


class Part(BaseModel):
    """A part of a run: keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
