"""What happened in a run's epochs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mtcl_torchrec.evaluation.metrics import Metrics


@dataclass
class TrainingHistory:
    """What happened.

    Args:
        epochs: validation metrics by task, of each epoch.
        best_epoch: counted from 1; 0 while there is none.
        best_auc: its mean validation AUC.
        best_step: the step after which it was evaluated.
        seconds: of each epoch's training, without evaluation.
        stopped_early: whether patience ran out.
        skipped_steps: batches that trained nothing because their loss was not finite.
    """

    epochs: list[dict[str, Metrics]] = field(default_factory=list)
    best_epoch: int = 0
    best_auc: float | None = None
    best_step: int = 0
    seconds: list[float] = field(default_factory=list)
    stopped_early: bool = False
    skipped_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; what is not defined is null."""
        return finite(asdict(self))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainingHistory:
        """Read what `to_json` wrote."""
        return cls(**content)


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
