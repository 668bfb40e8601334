"""Fits a calibration on held-out rows in one pass, in a memory that does not grow with them, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from mtcl_torchrec.data.batch import EncodedRows, global_batches, iterate
from mtcl_torchrec.fusing.curves import (
    NotFittedError,
    cdf_knots,
    check_labels,
    isotonic_knots,
    platt_line,
    temperature_slope,
)
from mtcl_torchrec.fusing.histograms import Binned, Histogram, TemperatureSums, best_slope, sum_over_ranks
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.calibration import (
    Calibration,
    Curve,
    FittedPiece,
    IsotonicCalibration,
    PlattScaling,
    TemperatureScaling,
    UnitInterval,
    log_odds,
)
from mtcl_torchrec.modules.embeddings import single_value
from mtcl_torchrec.schema import Task

LOG_ODDS = 16.0  # histograms reach from minus to plus this
DEVIATIONS = 8.0  # likewise, in standard deviations of a regression's label


class CalibrationFitter:
    """Fits the pieces of a calibration from batches of raw predictions and their labels.

    Whatever the order of the batches, and on however many ranks they lie, the fit is the same, up to the last bits of
    sums of fractions.  `fit` says what came of it; a task of which nothing can be fitted is left as it is.

    Args:
        calibration: is filled by `fit`.
        device: where the sums are kept: where the predictions are.
        process_group: the ranks; None is the default group, or this process alone where there is none.

    Example:
        >>> from mtcl_torchrec.modules.calibration import PlattScaling
        >>> calibration = Calibration([Task.binary("click")], {"click": PlattScaling(min_rows=4)})
        >>> fitter = CalibrationFitter(calibration)
        >>> for _ in range(10):
        ...     fitter.update({"click": torch.tensor([0.5, 0.5, 0.8, 0.8])}, torch.tensor([[0.0], [0.0], [0.0], [1.0]]))
        >>> fitter.update({"click": torch.tensor([0.5])}, torch.tensor([[1.0]]))
        >>> fitter.fit()
        []
        >>> calibration.calibrate({"click": torch.tensor([0.5, 0.8])}, {})["click"]
        tensor([0.0476, 0.5000])
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        device: torch.device | str = "cpu",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.calibration = calibration
        self.device = torch.device(device)
        self.process_group = process_group
        self._fits: dict[int, _TaskFit] = {}  # task number -> its fit
        for i, task in enumerate(calibration.tasks):
            pieces = calibration.calibrated.get(task.name, [])
            if any(isinstance(piece, FittedPiece) for piece in pieces):
                self._fits[i] = _TaskFit(task, pieces, self.device)

    @torch.no_grad()
    def update(
        self,
        predictions: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        segments: Mapping[str, torch.Tensor] | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Count a batch of B rows.

        Args:
            predictions: task name -> (B,) or (B, C), not calibrated.
            labels: (B, T) in the order of the tasks; a missing one (NaN) counts nowhere.
            segments: id feature -> (B,) int64 row of its table, of those in `Calibration.segments`.
            weights: (B, T) of the rows, None is 1.
        """
        for i, fit in self._fits.items():
            segment = None if fit.segment is None else (segments or {})[fit.segment].to(self.device)
            weight = None if weights is None else weights[:, i].to(self.device)
            fit.add(predictions[fit.task.name].to(self.device), labels[:, i].to(self.device), segment, weight)

    def fit(self) -> list[str]:
        """Fill the calibration's buffers; every rank of the group calls it once, after its last batch.

        Returns:
            A line on each thing worth knowing: tasks left as they are and why, and how many values of a segment have
            parameters of their own.
        """
        sum_over_ranks([tensor for fit in self._fits.values() for tensor in fit.data.tensors], self.process_group)
        return [line for fit in self._fits.values() for line in fit.solve()]


class _TaskFit:
    """What is counted of one task, and how its pieces follow from it."""

    def __init__(self, task: Task, pieces: list, device: torch.device) -> None:
        self.task = task
        self.before = pieces[: next(i for i, piece in enumerate(pieces) if isinstance(piece, FittedPiece))]
        self.fitted: list[FittedPiece] = [piece for piece in pieces if isinstance(piece, FittedPiece)]
        self.segment = self.fitted[0].segment
        rows = self.fitted[0].rows
        self.data: Histogram | TemperatureSums
        if task.kind == "multiclass":
            self.data = TemperatureSums(rows, device)
        else:
            end = LOG_ODDS if task.kind == "binary" else DEVIATIONS
            self.data = Histogram(-end, end, rows, device)

    def add(
        self, predicted: torch.Tensor, label: torch.Tensor, segment: torch.Tensor | None, weight: torch.Tensor | None
    ) -> None:
        row = None if segment is None else self.fitted[0].row_of(segment)
        if self.task.kind == "multiclass":
            value = torch.log(predicted.clamp(min=1e-30))
        elif self.task.kind == "binary":
            value = log_odds(predicted)
            for piece in self.before:
                value = piece(value, {})
        else:
            value, label = self._standardised(predicted.double()), self._standardised(label.double())
        self.data.add(value, label, row, weight)

    def _standardised(self, value: torch.Tensor) -> torch.Tensor:
        return (value - (self.task.mean or 0.0)) / (self.task.std or 1.0)

    def solve(self) -> list[str]:
        """Fit what holds for all, then each value of the segment that has the rows for it."""
        counts = self.data.counts.cpu().numpy()
        total = self.data.sums.sum(1)
        lines = []
        values: dict[str, object] = {}
        for piece in self.fitted:
            what, rows, broken = f"calibration.{self.task.name}", int(counts.sum()), int(self.data.broken.item())
            try:
                if broken:
                    raise NotFittedError(
                        f"of {broken:,} labelled rows the prediction, label or weight is not finite, or out of range"
                    )
                if rows < piece.min_rows:
                    raise NotFittedError(f"{rows:,} labelled rows are fewer than min_rows ({piece.min_rows:,})")
                values, note = self._parameters(piece, total, rows, values)
            except NotFittedError as error:
                part = "its part of the fused score" if isinstance(piece, UnitInterval) else "it"
                lines.append(f"{what}: {error}; {part} is left as it is")
                continue
            piece.fill(slice(None), **values)
            if note:
                lines.append(f"{what}: {note}")
            if piece.segment is not None:
                lines.append(f"{what}: {self._solve_segments(piece, counts, total)}")
        return lines

    def _solve_segments(self, piece: FittedPiece, counts: np.ndarray, total: torch.Tensor) -> str:
        own = 0
        for row in range(1, piece.segment_rows):  # row 0 is unknown, the last holds what has no value
            if counts[row] < piece.min_rows:
                continue
            mixed = self.data.sums[:, row] + (piece.shrink / counts.sum()) * total
            try:
                values, _ = self._parameters(piece, mixed, int(counts[row]), {})
            except NotFittedError:
                continue
            piece.fill(row, **values)
            own += 1
        met = int((counts[1 : piece.segment_rows] > 0).sum())
        return f"{own} of {met} values of {piece.segment} have parameters of their own"

    def _parameters(
        self, piece: FittedPiece, sums: torch.Tensor, rows: int, earlier: dict[str, object]
    ) -> tuple[dict[str, object], str]:
        """A piece's buffers from the sums of some rows, and a note; `earlier` are those of the task's piece before, {}
        without one."""
        if isinstance(self.data, TemperatureSums):
            slope = best_slope(sums)
            if np.isnan(slope):
                raise NotFittedError("no temperature within 1/16 … 16 is the best")
            return {"slope": slope}, ""
        data = self.data.binned(sums)
        if isinstance(piece, PlattScaling):
            slope, intercept, note = platt_line(data)
            return {"slope": slope, "intercept": intercept}, note
        if isinstance(piece, TemperatureScaling):
            return {"slope": temperature_slope(data)}, ""
        assert isinstance(piece, Curve)
        if isinstance(piece, IsotonicCalibration):
            check_labels(data)
            x, y = isotonic_knots(data, piece.knots)
            least = 0.5 / rows  # where no event, or nothing else, was seen: half an event
            return {"x": x, "y": y.clip(least, 1 - least), "fitted": True}, ""
        return {**self._curve_of_value(piece, data, earlier), "fitted": True}, ""

    def _curve_of_value(self, piece: Curve, data: Binned, earlier: dict[str, object]) -> dict[str, object]:
        """Knots in the label's unit."""
        mean, std = self.task.mean or 0.0, self.task.std or 1.0
        values = mean + std * data.x
        if isinstance(piece, UnitInterval):
            if earlier:  # of what the isotonic regression makes of them
                values = np.interp(values, np.asarray(earlier["x"]), np.asarray(earlier["y"]))
            x, y = cdf_knots(values, data.weight, piece.knots)
            return {"x": x, "y": y}
        x, y = isotonic_knots(Binned(values, mean + std * data.y, data.weight), piece.knots)
        return {"x": x, "y": y}


@torch.no_grad()
def fit_calibration(
    model: MTCL,
    rows: EncodedRows,
    calibration: Calibration,
    *,
    batch_size: int = 8192,
    device: torch.device | None = None,
) -> list[str]:
    """Fit a calibration on held-out rows and give it to the model; every rank of the process group takes part.

    Args:
        model: plain or with sharded tables; what it was calibrated by before is replaced.
        rows: N labelled rows on which it was not trained.
        calibration: of the model's tasks.
        batch_size: rows a step and rank.
        device: where the model is; the default is the CPU.

    Returns:
        See `CalibrationFitter.fit`.
    """
    device = device or torch.device("cpu")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    fitter = CalibrationFitter(calibration.to(device), device=device)
    was_training = model.training
    model.eval()
    model.output.calibration = None
    try:
        for batch in iterate(rows, global_batches(len(rows), batch_size, rank=rank, world_size=world_size)):
            batch = batch.to(device)
            out = model(batch.dense_features, batch.sparse_features)
            segments = {name: single_value(batch.sparse_features, name) for name in calibration.segments}
            fitter.update(out, batch.labels, segments, batch.weights)
        lines = fitter.fit()
    finally:
        model.train(was_training)
    model.output.calibration = calibration.eval()
    return lines
