"""How the tasks are balanced: by their losses, and by their gradients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mtcl_torchrec.config.base import Part


class LossWeightingConfig(Part):
    """How the tasks' losses become one; see `mtcl_torchrec.modules.balance.weighting`.

    Args:
        kind: ``sum`` weighs them as the tasks say (`Task.weight`).  Under ``uncertainty``, ``imtl_l``, ``famo`` and
            ``geometric_mean`` those weights cancel out, but for a weight of 0; training says so where they differ.
        temperature: of ``dwa``: the larger, the more alike the weights.
        window: of ``dwa``: batches over which losses are averaged before they are compared; an epoch in the paper.
        mu: of ``tchebycheff``: the smaller, the more the largest loss alone counts.
        lr: of the learnt weights of ``uncertainty`` and ``imtl_l`` (default: that of the dense optimizer), and of
            ``famo`` (default 0.025).
        weight_decay: of ``famo``, which pulls the weights back together.
        max_factor: weights are held within this factor of what equal tasks would get.
    """

    kind: Literal["sum", "uncertainty", "dwa", "imtl_l", "famo", "tchebycheff", "geometric_mean"] = "sum"
    temperature: PositiveFloat = 2.0
    window: PositiveInt = 200
    mu: PositiveFloat = 0.1
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 1e-3
    max_factor: Annotated[float, Field(ge=1)] = 100.0

    @model_validator(mode="after")
    def _fitting(self) -> LossWeightingConfig:
        belongs = {"temperature": ["dwa"], "window": ["dwa"], "mu": ["tchebycheff"],
                   "lr": ["uncertainty", "imtl_l", "famo"], "weight_decay": ["famo"]}  # fmt: skip
        for field, kinds in belongs.items():
            if field in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{field} belongs to {' and '.join(kinds)}, not to {self.kind}")
        if "max_factor" in self.model_fields_set and self.kind == "sum":
            raise ValueError("max_factor holds weights that move; those of sum do not")
        return self


class SurgeryConfig(Part):
    """How the tasks' gradients of what they share become one; see `mtcl_torchrec.modules.balance.surgery`."""

    kind: Literal["none"] = "none"


class BalanceConfig(Part):
    """How the tasks are balanced.  The default is the weighted sum of their losses, and nothing else."""

    weighting: LossWeightingConfig = Field(default_factory=LossWeightingConfig)
    surgery: SurgeryConfig = Field(default_factory=SurgeryConfig)
