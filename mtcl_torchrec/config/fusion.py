"""The fused score: how the tasks' predictions become one, and what it learns from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mtcl_torchrec.config.base import Part, known_kind
from mtcl_torchrec.schema import Schema, nearest

FusionKind = Literal[
    "weighted_mean", "weighted_geometric_mean", "power_product", "expected_value", "soft_voting", "hard_voting",
    "top_k_voting", "borda", "reciprocal_rank", "stacking", "monotone_network", "context_gated_mean",
]  # fmt: skip
KINDS: tuple[FusionKind, ...] = get_args(FusionKind)
WITHIN_REQUEST: tuple[FusionKind, ...] = ("top_k_voting", "borda", "reciprocal_rank")
LEARNED: tuple[FusionKind, ...] = ("stacking", "monotone_network", "context_gated_mean")
_WEIGHTED = {str(kind) for kind in KINDS} - {"monotone_network"}

# Options that only some kinds have.  A kind given by its import path has `options` instead.
_BELONGS: dict[str, set[str]] = {
    "weights": _WEIGHTED,
    "signs": {"monotone_network"},
    "floor": {"weighted_geometric_mean"},
    "bases": {"power_product"},
    "exponents": {"power_product"},
    "given": {"expected_value"},
    "numbers": {"expected_value"},
    "scale": {"expected_value"},
    "thresholds": {"soft_voting", "hard_voting"},
    "temperature": {"soft_voting", "top_k_voting"},
    "k": {"top_k_voting", "reciprocal_rank"},
    "hidden": {"monotone_network", "context_gated_mean"},
    "features": {"context_gated_mean"},
}

Unit = Annotated[float, Field(ge=0, le=1)]


class FusedLossConfig(Part):
    """What the fused score learns from; see `mtcl_torchrec.modules.fusion.FusedLoss`.

    Args:
        reward: task -> what its event is worth (``{click: 1, like: 8, report: -60}``); or the name of a task, or of a
            column that holds a number in [0, 1], empty where it is not known.
        weight: of this loss beside the tasks' losses.
        heads: ``detach`` trains the fused score alone, ``through`` the whole model too.
        loss: ``bce`` learns what a row is worth, ``pairwise`` the order within a request.
        missing: whether a row counts that lacks the label of a rewarded task: ``mask`` leaves it out, ``zero`` takes
            the label as 0.
    """

    reward: dict[str, float] | Annotated[str, Field(min_length=1)]
    weight: PositiveFloat = 1.0
    heads: Literal["detach", "through"] = "detach"
    loss: Literal["bce", "pairwise"] = "bce"
    missing: Literal["mask", "zero"] = "mask"

    @model_validator(mode="after")
    def _fitting(self) -> FusedLossConfig:
        if isinstance(self.reward, dict) and not any(self.reward.values()):
            raise ValueError("a reward needs at least one value that is not 0")
        return self

    def column(self, schema: Schema) -> str | None:
        """The column that holds the reward; None where it is made of tasks' labels."""
        return self.reward if isinstance(self.reward, str) and self.reward not in _names(schema) else None

    def values(self, schema: Schema) -> dict[str, float] | None:
        """Task -> what its event is worth; None where a column says it."""
        if self.column(schema) is not None:
            return None
        return {self.reward: 1.0} if isinstance(self.reward, str) else self.reward

    def check(self, schema: Schema) -> None:
        """See that the reward can be read.

        Raises:
            ValueError: naming the key.
        """
        if "missing" in self.model_fields_set and self.column(schema) is not None:
            raise ValueError("fusion.train.missing: a reward of one column has no missing parts")
        kinds = {task.name: task.kind for task in schema.tasks}
        for name in self.values(schema) or ():
            if name not in kinds:
                raise ValueError(f"fusion.train.reward: no task {name!r}{nearest(name, kinds)}")
            if kinds[name] == "multiclass":
                raise ValueError(
                    f"fusion.train.reward: task {name!r} is multiclass, a class is worth nothing by itself"
                )


class FusionConfig(Part):
    """The fused score, which ranks; see `mtcl_torchrec.modules.fusion`.

    Args:
        kind: one of ours, or the import path of an `nn.Module` of your own, such as ``my_package.my_module:MyScore``,
            made with `options`; it is imported whenever the model is built.
        weights: task -> weight; negative where the event speaks against the item.  Of ``stacking``, the coefficients
            to begin with (default: all tasks alike); of ``context_gated_mean``, the value model to begin with.
        signs: of ``monotone_network``: task -> 1 or -1.
        floor: of ``weighted_geometric_mean``: a part of 0 counts as this; 10⁻⁶.
        bases, exponents: of ``power_product``, ∏ (base + weight · p)^exponent: by task; 1 where they are left out.
        given: of ``expected_value``: task -> the task whose event must happen first, where the task predicts its
            probability given that.
        numbers: of ``expected_value``: task -> the dense feature that its value is multiplied by, such as a price; in
            value@k, too.
        scale: of ``expected_value``: the value that scores in the middle; the default is a typical one.
        thresholds: of ``soft_voting`` and ``hard_voting``: by task; 0.5 where they are left out.
        temperature: of ``soft_voting``: of the votes, 0.1; of ``top_k_voting``: makes votes smooth.
        k: of ``top_k_voting``: how many are voted for (10); of ``reciprocal_rank``: the constant of its formula (60).
        hidden: of ``monotone_network``: widths of its layers ([16]); of ``context_gated_mean``: one width.
        features: of ``context_gated_mean``: the features that the weights depend on.
        options: of a fused score of your own: arguments of its constructor.
        train: trains the fused score along with the model; kinds that learn need it, kinds without gradient (votes
            without temperature, rank fusion) cannot have it.  It learns from predictions before calibration, which is
            only fitted afterwards: with `calibration` in the run, ``mtcl fuse`` fits the same kinds on calibrated ones.
    """

    kind: str = "weighted_mean"
    weights: dict[str, float] | None = None
    signs: dict[str, Literal[-1, 1]] | None = None
    floor: Annotated[float, Field(gt=0, lt=1)] | None = None
    bases: dict[str, PositiveFloat] | None = None
    exponents: dict[str, float] | None = None
    given: dict[str, str] | None = None
    numbers: dict[str, str] | None = None
    scale: PositiveFloat | None = None
    thresholds: dict[str, Unit] | None = None
    temperature: PositiveFloat | None = None
    k: PositiveInt | None = None
    hidden: list[PositiveInt] | None = None
    features: Annotated[list[str], Field(min_length=1)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    train: FusedLossConfig | None = None

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        return known_kind(kind, KINDS, "MyScore")

    @model_validator(mode="after")
    def _fitting(self) -> FusionConfig:
        for field, kinds in _BELONGS.items():
            if getattr(self, field) is not None and self.kind not in kinds:
                own = "; give a fused score of your own its arguments as options" if self.import_path else ""
                raise ValueError(f"{field} belongs to {_either(kinds)}, not to {self.kind}{own}")
        if self.options and not self.import_path:
            raise ValueError(f"options belong to a fused score given by its import path, not to {self.kind}")
        if self.weights is None and self.kind in _WEIGHTED - {"stacking"}:
            raise ValueError(f"{self.kind} needs weights")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("the fused score needs at least one weight that is not 0")
        if self.kind == "monotone_network" and not self.signs:
            raise ValueError("monotone_network needs signs: 1 for a task that speaks for an item, -1 for the others")
        if self.kind == "context_gated_mean" and self.features is None:
            raise ValueError("context_gated_mean needs features that the weights depend on")
        if self.kind == "context_gated_mean" and self.hidden is not None and len(self.hidden) != 1:
            raise ValueError("hidden: a context-gated mean has one hidden layer")
        for field in ("bases", "exponents", "given", "numbers", "thresholds"):
            for name in getattr(self, field) or ():
                if name not in (self.weights or {}):
                    raise ValueError(f"{field}: task {name!r} has no weight{nearest(name, self.weights or {})}")
        for name in (self.given or {}).values():
            if name not in (self.weights or {}):
                raise ValueError(f"given: task {name!r} has no weight, of which 0 will do")
        self._check_factors()
        self._check_training()
        return self

    def _check_factors(self) -> None:
        for name, weight in (self.weights or {}).items() if self.kind == "power_product" else ():
            base = (self.bases or {}).get(name, 1.0)
            if base + weight <= 0:
                raise ValueError(
                    f"weights: with base {base:g}, weight {weight:g} makes a factor of {name!r} that is not above 0; "
                    "what lowers the score has a positive weight and a negative exponent"
                )

    def _check_training(self) -> None:
        if self.train is None or self.import_path is not None:
            return
        if self.kind == "top_k_voting" and self.temperature is not None:
            raise ValueError(
                "train: top_k_voting compares all candidates of a request, and training batches hold some of them"
            )
        if self.kind in (*WITHIN_REQUEST, "hard_voting"):
            raise ValueError(f"train: {self.kind} has no gradient, so that it cannot be trained")
        if self.train.heads == "detach" and self.kind not in LEARNED:
            raise ValueError(
                f"train.heads: {self.kind} has no parameters, so that detach leaves nothing to train; take through"
            )

    @property
    def import_path(self) -> str | None:
        """Where a fused score of one's own is, None for a kind of ours."""
        return self.kind if ":" in self.kind else None

    @property
    def needs_requests(self) -> bool:
        """Whether rows of one request are compared."""
        return self.kind in WITHIN_REQUEST or (self.train is not None and self.train.loss == "pairwise")

    def check(self, schema: Schema) -> None:
        """See that what is named here is in the schema.

        Raises:
            ValueError: naming the key and, if there is one, the nearest right name.
        """
        for field in ("weights", "signs"):
            for name in getattr(self, field) or ():
                if name not in _names(schema):
                    raise ValueError(f"fusion.{field}: no task {name!r}{nearest(name, _names(schema))}")
        after = {task.name for task in schema.tasks if task.after is not None}
        for name in self.given or ():
            if name in after:
                raise ValueError(
                    f"fusion.given: task {name!r} comes after another in the schema, so that it predicts the "
                    "probability of both already"
                )
        dense = {feature.name for feature in schema.dense_features}
        for name in (self.numbers or {}).values():
            if name not in dense:
                raise ValueError(f"fusion.numbers: no dense feature {name!r}{nearest(name, dense)}")
        features = [feature.name for feature in schema.features]
        for name in self.features or ():
            if name not in features:
                raise ValueError(f"fusion.features: no feature {name!r}{nearest(name, features)}")
        if self.needs_requests and (schema.request or schema.user) is None:
            why = f"fusion.kind {self.kind}" if self.kind in WITHIN_REQUEST else "fusion.train.loss pairwise"
            raise ValueError(f"{why} compares rows of one request: schema.request or schema.user must name its column")
        if self.kind in LEARNED and self.train is None:
            raise ValueError(f"fusion: {self.kind} learns from a reward, and train says none")
        if self.train is not None:
            self.train.check(schema)

    def completed(self, schema: Schema) -> Schema:
        """The schema with the columns that this needs to be read besides: of the request, and of the reward."""
        more: dict[str, str | None] = {}
        if self.needs_requests and schema.request is None:
            more["request"] = schema.user
        column = None if self.train is None else self.train.column(schema)
        if column is not None:
            more["reward"] = column
        return schema.model_copy(update=more) if more else schema


def _names(schema: Schema) -> list[str]:
    return [task.name for task in schema.tasks]


def _either(kinds: Iterable[str]) -> str:
    """Kinds for a message; all but one of them are told by the one."""
    kinds = sorted(kinds)
    return " and ".join(kinds) if len(kinds) < len(KINDS) - 1 else "kinds with weights"
