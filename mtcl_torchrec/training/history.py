"""What happened in a run's epochs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ConfigDict, NonNegativeInt, TypeAdapter

from mtcl_torchrec.training.balance import Balance


@dataclass
class TrainingHistory:
    """What happened.

    Args:
        epochs: validation metrics by task, of each epoch; None where one is not defined.
        best_epoch: counted from 1; 0 while there is none.
        best_auc: its mean validation AUC.
        best_step: the step after which it was evaluated.
        seconds: of each epoch's training, without evaluation.
        samples_per_second: of each epoch's training after its first step, all ranks together (`pace.Pace`); None where
            an epoch has no second one.
        first_step: seconds that each epoch's first step took, in which a compiled run compiles.
        waiting: share of each epoch's training in which the rank that reads slowest waited for its data.
        stopped_early: whether patience ran out, or every task is frozen.
        frozen: task -> the first epoch in which it was frozen.
        skipped_steps: batches that trained nothing because their loss was not finite.
        unsure: task -> why the validation split is too small to be sure of it, so that it decides nothing; see
            `mtcl_torchrec.evaluation.supports.unsure_tasks`.
        balance: how the tasks get along, after the newest reading.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    epochs: list[dict[str, dict[str, float | None]]] = field(default_factory=list)
    best_epoch: NonNegativeInt = 0
    best_auc: float | None = None
    best_step: NonNegativeInt = 0
    seconds: list[float] = field(default_factory=list)
    samples_per_second: list[float | None] = field(default_factory=list)
    first_step: list[float | None] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    stopped_early: bool = False
    frozen: dict[str, NonNegativeInt] = field(default_factory=dict)
    skipped_steps: NonNegativeInt = 0
    unsure: dict[str, str] = field(default_factory=dict)
    balance: Balance = field(default_factory=Balance)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; what is not defined is null."""
        return finite(asdict(self))

    @classmethod
    def from_json(cls, content: Any) -> TrainingHistory:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it holds something else.
        """
        return TypeAdapter(cls).validate_python(content)


def finite(value: Any) -> Any:
    """The value with None for every number that JSON does not know.

    Example:
        >>> finite({"auc": float("nan"), "count": [1, 2.5]})
        {'auc': None, 'count': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
