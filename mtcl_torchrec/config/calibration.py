"""How the tasks' predictions are calibrated on the validation split."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, RootModel, model_validator

from mtcl_torchrec.config.base import Part
from mtcl_torchrec.schema import Schema, Task, nearest

EVERY = "*"  # every binary task that is not named itself
MAX_SEGMENT_ROWS = 2**15  # values of a segment; its histograms share a fixed memory

# The kinds that each option of a piece belongs to, and the kinds of task that each kind of piece does.
_OPTIONS = {
    "rate": ("prior",),
    "segment": ("platt", "temperature", "isotonic"),
    "shrink": ("platt", "temperature", "isotonic"),
    "knots": ("isotonic", "cdf"),
    "min_rows": ("platt", "temperature", "isotonic", "cdf"),
}
_KINDS = {
    "binary": ("prior", "platt", "temperature", "isotonic"),
    "multiclass": ("temperature",),
    "regression": ("isotonic", "cdf"),
}


class CalibratorConfig(Part):
    """One piece of a task's calibration; see `mtcl_torchrec.modules.calibration`.

    Args:
        kind: ``prior`` (a known rate of down-sampling), ``platt``, ``temperature``, ``isotonic`` (of a regression, of
            its value), or ``cdf`` (of a regression: its part of the fused score).
        rate: of prior: the share of the negatives that is in the data.
        segment: id feature (no bag) of whose values each has parameters of its own.
        knots: of a curve.
        min_rows: with fewer labelled rows a task stays uncalibrated, and a value of the segment takes what holds for
            all.
        shrink: rows of the whole split that are mixed to those of each value of the segment; 0 leaves them alone.

    Example:
        >>> CalibratorConfig(kind="platt", knots=8)
        Traceback (most recent call last):
            ...
        pydantic_core._pydantic_core.ValidationError: 1 validation error for CalibratorConfig
          Value error, knots belongs to isotonic and cdf, not to platt ...
    """

    kind: Literal["prior", "platt", "temperature", "isotonic", "cdf"]
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    segment: str | None = None
    knots: Annotated[int, Field(ge=2, le=4096)] = 64
    min_rows: PositiveInt = 200
    shrink: NonNegativeFloat = 100.0

    @model_validator(mode="after")
    def _fitting(self) -> CalibratorConfig:
        for option, kinds in _OPTIONS.items():
            if option in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{option} belongs to {' and '.join(kinds)}, not to {self.kind}")
        if self.kind == "prior" and self.rate is None:
            raise ValueError("prior needs rate, the share of the negatives that is in the data")
        if "shrink" in self.model_fields_set and self.segment is None:
            raise ValueError("shrink draws the values of a segment to the whole; it needs segment")
        return self


class CalibrationConfig(RootModel[dict[str, Annotated[list[CalibratorConfig], Field(min_length=1)]]]):
    """Task -> the pieces of its calibration, applied one after the other; at most one of them is fitted.

    A kind alone stands for a piece without options, a piece for a list of one.  ``"*"`` is every binary task that is
    not named; a kind or a list in the place of the whole mapping is that.

    Example:
        >>> config = CalibrationConfig.model_validate({"click": "platt", "like": [{"kind": "prior", "rate": 0.1}]})
        >>> {task: [piece.kind for piece in pieces] for task, pieces in config.root.items()}
        {'click': ['platt'], 'like': ['prior']}
        >>> tasks = [Task.binary("click"), Task.binary("like"), Task.regression("seconds")]
        >>> list(CalibrationConfig.model_validate("platt").pieces(tasks))
        ['click', 'like']
    """

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        if isinstance(value, (str, list)):
            value = {EVERY: value}
        if not isinstance(value, dict):
            return value
        return {task: _as_pieces(given) for task, given in value.items()}

    @model_validator(mode="after")
    def _one_fit(self) -> CalibrationConfig:
        for task, pieces in self.root.items():
            kinds = [piece.kind for piece in pieces]
            if "cdf" in kinds[:-1]:
                raise ValueError(f"{task}: cdf comes last")
            fitted = [kind for kind in kinds if kind not in ("prior", "cdf")]
            if len(fitted) > 1:
                raise ValueError(f"{task}: {' and '.join(fitted)} would both have to be fitted; take one of them")
        return self

    def pieces(self, tasks: Iterable[Task]) -> dict[str, list[CalibratorConfig]]:
        """Task -> its pieces, of those that are calibrated, in the order of the tasks."""
        found = {}
        for task in tasks:
            pieces = self.root.get(task.name, self.root.get(EVERY) if task.kind == "binary" else None)
            if pieces is not None:
                found[task.name] = pieces
        return found

    def check(self, schema: Schema) -> None:
        """See that what is named here is in the schema, and that each kind fits its task.

        Raises:
            ValueError: naming the key and, if there is one, the nearest right name.
        """
        names = [task.name for task in schema.tasks]
        for name in self.root:
            if name not in names and name != EVERY:
                raise ValueError(f"calibration: no task {name!r}{nearest(name, names)}")
        if EVERY in self.root and not any(task.kind == "binary" for task in schema.tasks):
            raise ValueError("calibration: no task is binary; name those that are to be calibrated")
        kind_of = {task.name: task.kind for task in schema.tasks}
        features = {feature.name: feature for feature in schema.sparse_features}
        for name, pieces in self.pieces(schema.tasks).items():
            for piece in pieces:
                allowed = _KINDS[kind_of[name]]
                if piece.kind not in allowed:
                    raise ValueError(
                        f"calibration.{name}: {piece.kind} is nothing for a {kind_of[name]} task; take "
                        f"{' or '.join(allowed)}"
                    )
                _check_segment(f"calibration.{name}.segment", piece.segment, features)


def _as_pieces(given: Any) -> Any:
    pieces = given if isinstance(given, list) else [given]
    return [{"kind": piece} if isinstance(piece, str) else piece for piece in pieces]


def _check_segment(key: str, segment: str | None, features: dict[str, Any]) -> None:
    if segment is None:
        return
    if segment not in features:
        raise ValueError(f"{key}: no id feature {segment!r}{nearest(segment, features)}")
    feature = features[segment]
    if feature.has_content:
        raise ValueError(f"{key}: {segment!r} is a {feature.kind} feature, whose rows are items; name an id feature")
    if feature.kind != "id":
        raise ValueError(f"{key}: {segment!r} is a bag, and a row has one value of a segment")
    if feature.vocabulary_size is not None and feature.vocabulary_size > MAX_SEGMENT_ROWS:
        raise ValueError(f"{key}: the table of {segment!r} has more than {MAX_SEGMENT_ROWS:,} rows")
