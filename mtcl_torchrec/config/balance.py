"""How the tasks are balanced: by their losses, and by their gradients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtcl_torchrec.config.base import Part


class LossWeightingConfig(Part):
    """How the tasks' losses become one; see `mtcl_torchrec.modules.balance.weighting`."""

    kind: Literal["sum"] = "sum"


class SurgeryConfig(Part):
    """How the tasks' gradients of what they share become one; see `mtcl_torchrec.modules.balance.surgery`."""

    kind: Literal["none"] = "none"


class BalanceConfig(Part):
    """How the tasks are balanced.  The default is the weighted sum of their losses, and nothing else."""

    weighting: LossWeightingConfig = Field(default_factory=LossWeightingConfig)
    surgery: SurgeryConfig = Field(default_factory=SurgeryConfig)
