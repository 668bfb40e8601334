"""Calibration as a step of a run: built from its configuration, fitted on the validation split, reported, stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mtcl_torchrec.config import CalibrationConfig, CalibratorConfig, RunConfig
from mtcl_torchrec.config.calibration import MAX_SEGMENT_ROWS
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.splits import Splits
from mtcl_torchrec.evaluation.calibration import CalibrationReport, report_calibration, request_groups
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.fusing.calibrate import fit_calibration
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.calibration import (
    Calibration,
    IsotonicCalibration,
    IsotonicValue,
    Piece,
    PlattScaling,
    PriorCorrection,
    TemperatureScaling,
    UnitInterval,
)
from mtcl_torchrec.schema import ConfigError, Task
from mtcl_torchrec.training.directory import CALIBRATION
from mtcl_torchrec.training.fitted import save_state
from mtcl_torchrec.training.history import finite
from mtcl_torchrec.training.sharding import Ranks

Say = Callable[[str], None]


def build_calibration(config: CalibrationConfig, encoder: FeatureEncoder) -> Calibration:
    """The calibration of a configuration, not fitted yet.

    Args:
        encoder: fitted; tells tasks and the tables of segments.

    Raises:
        ConfigError: the table of a segment is too large.
    """
    tasks = encoder.resolved_tasks()
    by_name = {task.name: task for task in tasks}
    return Calibration(
        tasks,
        {
            name: [_build_piece(piece, by_name[name], encoder) for piece in pieces]
            for name, pieces in config.pieces(tasks).items()
        },
    )


def _build_piece(config: CalibratorConfig, task: Task, encoder: FeatureEncoder) -> Piece:
    if config.kind == "prior":
        assert config.rate is not None
        return PriorCorrection(config.rate)
    if config.kind == "cdf":
        return UnitInterval(config.knots, min_rows=config.min_rows)
    options: dict[str, Any] = {"min_rows": config.min_rows, "shrink": config.shrink}
    if config.segment is not None:
        feature = next(f for f in encoder.schema.sparse_features if f.name == config.segment)
        rows = encoder.num_embeddings(feature.table_name)
        if rows > MAX_SEGMENT_ROWS:
            raise ConfigError(
                f"calibration.{task.name}.segment: the table of {config.segment!r} has {rows:,} rows; "
                f"there may be {MAX_SEGMENT_ROWS:,}"
            )
        options |= {"segment": config.segment, "segment_rows": rows}
    if config.kind == "isotonic":
        kind = IsotonicValue if task.kind == "regression" else IsotonicCalibration
        return kind(config.knots, **options)
    return PlattScaling(**options) if config.kind == "platt" else TemperatureScaling(**options)


@dataclass
class CalibrationResult:
    """What calibration came to.

    Args:
        notes: tasks that were left as they are and why, and values of segments that have parameters of their own.
        splits: split -> its report.
        before: split -> predictions before calibration, as `predict` returned them.
    """

    notes: list[str] = field(default_factory=list)
    splits: dict[str, CalibrationReport] = field(default_factory=dict)
    before: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it; what is not defined is null."""
        return finite({"notes": self.notes, "splits": {name: asdict(report) for name, report in self.splits.items()}})


def calibrate_run(
    run: RunConfig, folder: Path, model: MTCL, preprocessor: Preprocessor, splits: Splits, where: Ranks, say: Say
) -> CalibrationResult | None:
    """Fit the run's calibration, if it has one, on the validation split; give it to the model, and store it.

    Every rank takes part and gets the result.

    Args:
        model: with the weights that are kept.
        say: called with lines for the user.
    """
    if run.calibration is None:
        return None
    batch_size = run.training.eval_batch_size

    def predicted() -> dict[str, dict[str, np.ndarray]]:
        return {
            name: predict(model, rows, batch_size=batch_size, device=where.device)
            for name, rows in splits.encoded.items()
        }

    calibration = build_calibration(run.calibration, preprocessor.encoder)
    before = predicted()
    notes = fit_calibration(model, splits.encoded["val"], calibration, batch_size=batch_size, device=where.device)
    after = predicted()
    for note in notes:
        say(note)
    result = CalibrationResult(notes, before=before)
    for name, rows in splits.encoded.items():
        result.splits[name] = report_calibration(
            model.tasks,
            before[name],
            after[name],
            rows.labels.numpy(),
            request_groups(preprocessor.declared, splits.raw[name].frame),
            None if rows.weights is None else rows.weights.numpy(),
            only=_changed(calibration),
        )
    if where.first:
        save_state(folder / CALIBRATION, calibration, result.to_json())
    where.barrier()
    return result


def _changed(calibration: Calibration) -> list[str]:
    """The predictions that calibration may change: not those that only enter the fused score in another way."""
    names = [n for n, of in calibration.calibrated.items() if not all(isinstance(piece, UnitInterval) for piece in of)]
    for child, _ in calibration.links:
        task = calibration.tasks[child]
        names += [name for name in (task.name, task.conditional_name) if name is not None and name not in names]
    return names
