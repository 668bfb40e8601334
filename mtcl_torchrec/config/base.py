"""What every part of a run's configuration shares."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]


class Part(BaseModel):
    """A part of a run: keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
