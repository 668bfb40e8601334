"""How the tasks are balanced: by their losses, and by their gradients."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from mtcl_torchrec.config.base import Fraction, Part
from mtcl_torchrec.schema import check_unique


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
    """How the tasks' gradients of what they share become one; see `mtcl_torchrec.modules.balance.surgery`.

    Args:
        kind: ``"none"``; ``"measure"`` changes nothing and counts conflicts; the others combine the gradients.
        cut: where: ``"trunk"``, where the tasks part, costs least.
        groups: features whose tables get weights of their own, at ``embeddings`` or ``both``; the rest is one more.
        min_weight, max_weight: clamps around the weights, whose mean or natural size is 1.
        c: of cagrad: how far from the mean gradient; 0.4 where it is left out.
        alpha: of fairgrad, its fairness (1 where it is left out); of gradnorm, how strongly lagging tasks are favoured
            (1.5).
        beta: of gradvac, the share of the newest step in the usual cosine (0.01); of db_mtl, that of the past in a
            norm (0.9).
        lr: of gradnorm's weights (0.025).
    """

    kind: Literal[
        "none", "measure", "upgrad", "mgda", "imtl_g", "aligned_mtl", "fairgrad", "pcgrad", "gradvac", "cagrad",
        "nash_mtl", "gradnorm", "db_mtl",
    ] = "none"  # fmt: skip
    cut: Literal["trunk", "embeddings", "both", "tables"] = "trunk"
    groups: list[Annotated[list[str], Field(min_length=1)]] = Field(default_factory=list)
    min_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    max_weight: Annotated[float, Field(ge=1)] = 10.0
    c: Fraction | None = None
    alpha: PositiveFloat | None = None
    beta: Fraction | None = None
    lr: PositiveFloat | None = None

    @field_validator("groups", mode="before")
    @classmethod
    def _lists_of_features(cls, value: Any) -> Any:
        if isinstance(value, list) and any(not isinstance(group, list) for group in value):
            raise ValueError(f"each group is a list of features, such as [[user_id, age], [item_id]] (given: {value})")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> SurgeryConfig:
        belongs = {"c": {"cagrad"}, "alpha": {"fairgrad", "gradnorm"}, "beta": {"db_mtl", "gradvac"},
                   "lr": {"gradnorm"}}  # fmt: skip
        for field, kinds in belongs.items():
            if getattr(self, field) is not None and self.kind not in kinds:
                raise ValueError(f"{field} belongs to {' and '.join(sorted(kinds))}, not to {self.kind}")
        if self.kind == "none" and self.model_fields_set - {"kind"}:
            raise ValueError(f"{min(self.model_fields_set - {'kind'})} does nothing without a kind of surgery")
        if self.kind == "measure" and (given := self.model_fields_set & {"min_weight", "max_weight"}):
            raise ValueError(f"{min(given)} clamps weights that move; measure leaves them at 1")
        if self.groups and self.cut not in ("embeddings", "both"):
            raise ValueError(f"groups belong to cut: embeddings and both, not to {self.cut}")
        check_unique("grouped feature", [feature for group in self.groups for feature in group])
        return self

    def options(self) -> dict[str, float]:
        """The options of the kind that were given."""
        given = {"c": self.c, "alpha": self.alpha, "beta": self.beta, "lr": self.lr}
        return {name: value for name, value in given.items() if value is not None}


class BalanceConfig(Part):
    """How the tasks are balanced.  The default is the weighted sum of their losses, and nothing else."""

    weighting: LossWeightingConfig = Field(default_factory=LossWeightingConfig)
    surgery: SurgeryConfig = Field(default_factory=SurgeryConfig)

    def begins_anew(self, before: BalanceConfig) -> dict[str, str]:
        """What a run that was begun with `before` and goes on with this cannot take over.

        Returns:
            ``"weighting"`` and ``"surgery"``, where the state is one of another kind, cut or grouping -> what it was.

        Example:
            >>> now = BalanceConfig(surgery=SurgeryConfig(kind="cagrad", c=0.2))
            >>> now.begins_anew(BalanceConfig()), now.begins_anew(BalanceConfig(surgery=SurgeryConfig(kind="cagrad")))
            ({'surgery': 'none'}, {})
        """
        found: dict[str, str] = {}
        if self.weighting.kind != before.weighting.kind:
            found["weighting"] = before.weighting.kind
        now, then = self.surgery, before.surgery
        if (now.kind, now.cut, now.groups) != (then.kind, then.cut, then.groups):
            found["surgery"] = then.kind if then.kind == "none" else f"{then.kind} at {then.cut}"
        return found
