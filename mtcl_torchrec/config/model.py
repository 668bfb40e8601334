"""The model: trunk, towers, fused score."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from mtcl_torchrec.config.base import Fraction, Part


class TrunkConfig(Part):
    """The shared part of the model; see `mtcl_torchrec.modules.trunks`."""

    kind: Literal["shared_bottom", "mmoe", "ple", "single_task"] = "mmoe"
    expert_layers: Annotated[list[PositiveInt], Field(min_length=1)] = Field(default_factory=lambda: [128, 64])
    num_experts: PositiveInt = 4
    shared_experts: PositiveInt = 2
    task_experts: PositiveInt = 1
    levels: PositiveInt = 2
    dropout: Fraction = 0.0
    gate_dropout: Fraction = 0.0
    norm: Literal["layer", "rms", "none"] = "layer"

    @model_validator(mode="after")
    def _fitting(self) -> TrunkConfig:
        belongs = {"num_experts": {"mmoe"}, "shared_experts": {"ple"}, "task_experts": {"ple"}, "levels": {"ple"},
                   "gate_dropout": {"mmoe", "ple"}}  # fmt: skip
        for field, kinds in belongs.items():
            if field in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{field} belongs to {' and '.join(sorted(kinds))}, not to {self.kind}")
        return self


class ModelConfig(Part):
    """Everything between the embeddings and the predictions.

    Args:
        trunk: what the tasks share.
        tower_layers: widths of each task's own network on top of the trunk.
        cross_layers, cross_rank: low-rank cross layers (DCN v2) before the trunk; 0 layers is none.
        embedding_dropout: share of features whose whole embedding is left out of a row while training.
        dense_dropout, dense_noise: dropout of dense inputs, and standard deviation of noise added to them in training.
        tower_dropout: dropout in the towers.
    """

    trunk: TrunkConfig = Field(default_factory=TrunkConfig)
    tower_layers: list[PositiveInt] = Field(default_factory=lambda: [32])
    cross_layers: NonNegativeInt = 0
    cross_rank: PositiveInt = 64
    embedding_dropout: Fraction = 0.0
    dense_dropout: Fraction = 0.0
    dense_noise: NonNegativeFloat = 0.0
    tower_dropout: Fraction = 0.0


class FusionConfig(Part):
    """The fused score: a weighted mean of the tasks' predictions in [0, 1]."""

    weights: dict[str, float]

    @model_validator(mode="after")
    def _some_weight(self) -> FusionConfig:
        if not any(self.weights.values()):
            raise ValueError("the fused score needs at least one weight that is not 0")
        return self
