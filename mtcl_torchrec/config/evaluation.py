"""How a run is judged when its training has ended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from mtcl_torchrec.config.base import Part
from mtcl_torchrec.schema import Schema, nearest


class EvaluationConfig(Part):
    """How a run is judged when its training has ended.

    Args:
        k: lengths of what is shown, of value@k, NDCG@k and the like.
        values: task -> what its event is worth, or, below 0, costs (of a regression: each unit of its label), in
            value@k; the default is the weights of the fused score.  Where the fused score multiplies a task by a number
            of the item (`FusionConfig.numbers`), so does value@k: the value is that of each unit of it.
        threshold: by what the threshold of each binary task is chosen on the validation split: ``f1``, ``accuracy`` or
            ``youden``.
        segments: columns of the data, or ``item_seen``, ``user_seen``, ``hour_of_day``, whose values are also judged
            apart.
        bootstrap: draws of users for confidence intervals of the test split's metrics; 0 is none.
        save_predictions: whether the predictions for the validation and test split are kept in ``predictions/``: 4
            bytes a row for each label, prediction and class, before compression.

    Example:
        >>> EvaluationConfig(k=[5, 5])
        Traceback (most recent call last):
            ...
        pydantic_core._pydantic_core.ValidationError: 1 validation error for EvaluationConfig
        k
          Value error, 5 stands there twice ...
    """

    k: Annotated[list[PositiveInt], Field(min_length=1)] = Field(default_factory=lambda: [5, 10])
    values: dict[str, float] | None = None
    threshold: Literal["f1", "accuracy", "youden"] = "f1"
    segments: list[str] = Field(default_factory=list)
    bootstrap: NonNegativeInt = 0
    save_predictions: bool = True

    @field_validator("k", "segments")
    @classmethod
    def _once(cls, given: list) -> list:
        if twice := next((value for value in given if given.count(value) > 1), None):
            raise ValueError(f"{twice} stands there twice")
        return given

    @field_validator("bootstrap")
    @classmethod
    def _enough(cls, draws: int) -> int:
        if 0 < draws < MIN_DRAWS:
            raise ValueError(f"fewer than {MIN_DRAWS} draws say nothing of an interval; 0 is none")
        return draws

    def check(self, schema: Schema) -> None:
        """See that what is named here is in the schema.

        Raises:
            ValueError: naming the key and, if there is one, the nearest right name.
        """
        kinds = {task.name: task.kind for task in schema.tasks}
        for name in self.values or ():
            if name not in kinds:
                raise ValueError(f"evaluation.values: no task {name!r}{nearest(name, kinds)}")
            if kinds[name] == "multiclass":
                raise ValueError(f"evaluation.values: task {name!r} is multiclass, a class is worth nothing by itself")
        needs = {"item_seen": schema.item, "user_seen": schema.user, "hour_of_day": schema.time}
        for name in self.segments:
            if name in needs and needs[name] is None:
                raise ValueError(f"evaluation.segments: {name} needs schema.{_COLUMN_OF[name]}")

    def columns(self) -> list[str]:
        """Columns of the data that segments are read from."""
        return [name for name in self.segments if name not in _COLUMN_OF]


MIN_DRAWS = 20
_COLUMN_OF = {"item_seen": "item", "user_seen": "user", "hour_of_day": "time"}
