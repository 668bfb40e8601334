"""What `mtcl tune` may change in a run, and in which range."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, model_validator

from mtcl_torchrec.config.base import Part

_FORMS = ("choices", "uniform", "log", "integer", "times")


class ParameterConfig(Part):
    """The values that one key of a run may take.  Exactly one of the first five; a list alone is its `choices`.

    Args:
        choices: any values of the key; whole mappings, too.
        uniform: lowest and highest of a number.
        log: the same, searched on a logarithmic scale.
        integer: lowest and highest of a whole number.
        times: factors of what the run itself has there: a number, or a list of them.  Whole numbers stay whole, and
            multiples of 4 stay such.
        when: path -> value, or list of values, that this key needs; elsewhere it is left alone.

    Example:
        >>> ParameterConfig(log=(1e-4, 1e-2)).form
        'log'
    """

    choices: Annotated[list[Any], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None
    log: tuple[PositiveFloat, PositiveFloat] | None = None
    integer: tuple[int, int] | None = None
    times: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None
    when: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> ParameterConfig:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"say one of {', '.join(_FORMS)} (found: {found})")
        bounds = self.bounds
        if bounds is not None and bounds[0] >= bounds[1]:
            raise ValueError(f"{self.form}: the first number is the lowest (given: {list(bounds)})")
        return self

    @property
    def form(self) -> str:
        """Which of the five it is."""
        return next(name for name in _FORMS if getattr(self, name) is not None)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest; None of choices and factors."""
        return self.uniform or self.log or self.integer


def _as_choices(value: Any) -> Any:
    return {"choices": value} if isinstance(value, list) else value


_Values = Annotated[ParameterConfig, BeforeValidator(_as_choices)]
# Path in the run -> its values.  A path names the elements of a list by their name, and all of them by `*`.
SpaceConfig = dict[str, _Values]


class TuningConfig(Part):
    """What is searched, path by path, and by what it is judged.

    Args:
        objective: ``mean_skill`` (the default), of the tasks of ``training.watch`` or else all of which the validation
            split tells enough, or a metric and its task, such as ``auc:click``; see
            `mtcl_torchrec.training.tuning.objective.Objective`.
        others: path -> its values.

    Example:
        >>> tuning = TuningConfig.model_validate({"objective": "ne:like", "optimizers.dense.lr": {"log": [1e-4, 1e-2]}})
        >>> tuning.objective, list(tuning.space)
        ('ne:like', ['optimizers.dense.lr'])
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: SpaceConfig = Field(init=False)

    objective: str | None = None

    @property
    def space(self) -> SpaceConfig:
        """Path -> its values; empty where only the objective is named."""
        return dict(self.__pydantic_extra__)
