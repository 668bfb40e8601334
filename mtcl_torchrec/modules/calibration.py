"""Calibration: predictions that mean what they say, from buffers that a fit on held-out rows fills.

Each task has a few pieces, applied one after the other, on its log-odds z:

| piece | of | what it does | parameters |
|---|---|---|---|
| `PriorCorrection` | binary | z + log r | the known rate r |
| `PlattScaling` | binary | a z + b | a > 0, b |
| `TemperatureScaling` | binary, multiclass | a z, or softmax(a log p); a = 1/T | a > 0 |
| `IsotonicCalibration` | binary | a rising curve from log-odds to probability | knots |
| `IsotonicValue` | regression | a rising curve from the predicted value to the mean label | knots |
| `UnitInterval` | regression | a rising curve from the value into [0, 1], for the fused score alone | knots |

Sources: Platt, *Probabilistic Outputs for Support Vector Machines*, 1999; Zadrozny and Elkan, *Transforming Classifier
Scores into Accurate Multiclass Probability Estimates*, KDD 2002; Guo et al., *On Calibration of Modern Neural
Networks*, ICML 2017.

All of them keep a task's order; the curves make predictions alike where they are flat.  A piece by segment has
parameters for each value of an id feature, which keeps the order within a value only.

**Chains.**  Of ``buy`` after ``click``, the probability of ``buy`` over all rows is what is calibrated.  So that no
event comes out likelier than the one before it, a child is cut at its calibrated parent: p'(buy) = min(p̂(buy),
p'(click)).  ``buy|click`` is then p'(buy) / p'(click), so that the product of the two stays the third.  This holds as
soon as one task of the chain is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.modules.embeddings import single_value
from mtcl_torchrec.modules.heads import in_unit_interval
from mtcl_torchrec.schema import Task, chain_links, nearest

Predictions = dict[str, torch.Tensor]
Segments = Mapping[str, torch.Tensor]

_TINY = 1e-30


def log_odds(probability: torch.Tensor) -> torch.Tensor:
    """log p - log(1 - p), finite at 0 and 1, too.

    Example:
        >>> log_odds(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-69.0776,   0.0000,  16.6355])
    """
    p = probability.clamp(_TINY, 1 - 2**-24)
    return torch.log(p) - torch.log1p(-p)


class PriorCorrection(nn.Module):
    """z + log r: undoes that only a share r of the negatives is in the data, which makes odds 1/r times too large.

    (`Task.negative_rate` needs none of it: there, the loss has corrected what training left out.)  Put before a fitted
    piece where the held-out rows hold all negatives, after it where they lack the same share.

    Args:
        rate: r in (0, 1].

    Raises:
        ValueError: r lies outside.

    Example:
        >>> torch.sigmoid(PriorCorrection(0.1)(torch.zeros(1), {}))  # 1 : 1 among a tenth is 1 : 10
        tensor([0.0909])
    """

    shift: torch.Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"the rate of a prior correction lies in (0, 1], not at {rate}")
        self.register_buffer("shift", torch.tensor(math.log(rate)))

    def forward(self, z: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(B,) log-odds."""
        return z + self.shift


class FittedPiece(nn.Module):
    """A piece whose parameters `mtcl_torchrec.fusing.calibrate.CalibrationFitter` finds; before, it does nothing.

    Its buffers have one row for all, or with a segment one for each row of that feature's table and, last, one for all:
    the values that are unknown (row 0), missing or too rare have the parameters of the last row.

    Args:
        segment: id feature.
        segment_rows: rows of its table, row 0 (unknown) included.
        min_rows: with fewer labelled rows it stays as it is; a value of the segment takes what holds for all.
        shrink: rows of the whole data that are mixed to those of each value of the segment, as a prior.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, *, segment: str | None = None, segment_rows: int = 0, min_rows: int = 200, shrink: float = 100.0
    ) -> None:
        super().__init__()
        if (segment is None) != (segment_rows == 0):
            raise ValueError("a calibration by segment needs the feature and the rows of its table")
        if min_rows < 1 or shrink < 0:
            raise ValueError("min_rows is at least 1 and shrink at least 0")
        self.segment, self.segment_rows = segment, segment_rows
        self.min_rows, self.shrink = min_rows, shrink
        self.rows = segment_rows + 1

    def row_of(self, segment: torch.Tensor) -> torch.Tensor:
        """(B,) row of the buffers for each value (B,) int64 of the segment."""
        return torch.where((segment > 0) & (segment < self.segment_rows), segment, self.segment_rows)

    def parameters_of(self, buffer: torch.Tensor, segments: Segments) -> torch.Tensor:
        """A buffer's row for each of B rows, (B, ...), or the only one, (1, ...)."""
        return buffer if self.segment is None else buffer[self.row_of(segments[self.segment])]

    @torch.no_grad()
    def fill(self, row: int | slice, **values: object) -> None:
        """Set the buffers' rows, in place."""
        for name, value in values.items():
            buffer = getattr(self, name)
            buffer[row] = torch.as_tensor(value, dtype=buffer.dtype, device=buffer.device)


class PlattScaling(FittedPiece):
    """a z + b, by maximum likelihood.

    Args:
        segment, segment_rows, min_rows, shrink: see `FittedPiece`.

    Example:
        >>> piece = PlattScaling()
        >>> piece.fill(0, slope=2.0, intercept=-1.0)
        >>> piece(torch.tensor([0.0, 1.0]), {})
        tensor([-1.,  1.])
    """

    slope: torch.Tensor
    intercept: torch.Tensor

    def __init__(
        self, *, segment: str | None = None, segment_rows: int = 0, min_rows: int = 200, shrink: float = 100.0
    ) -> None:
        super().__init__(segment=segment, segment_rows=segment_rows, min_rows=min_rows, shrink=shrink)
        self.register_buffer("slope", torch.ones(self.rows))
        self.register_buffer("intercept", torch.zeros(self.rows))

    def forward(self, z: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(B,) log-odds."""
        return self.parameters_of(self.slope, segments) * z + self.parameters_of(self.intercept, segments)


class TemperatureScaling(FittedPiece):
    """a z, the temperature being 1/a, by maximum likelihood; of class probabilities, softmax(a log p).

    Args:
        segment, segment_rows, min_rows, shrink: see `FittedPiece`.

    Example:
        >>> piece = TemperatureScaling()
        >>> piece.fill(0, slope=0.5)
        >>> piece(torch.tensor([0.0, 1.0]), {})
        tensor([0.0000, 0.5000])
    """

    slope: torch.Tensor

    def __init__(
        self, *, segment: str | None = None, segment_rows: int = 0, min_rows: int = 200, shrink: float = 100.0
    ) -> None:
        super().__init__(segment=segment, segment_rows=segment_rows, min_rows=min_rows, shrink=shrink)
        self.register_buffer("slope", torch.ones(self.rows))

    def forward(self, z: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(B,) log-odds, or (B, C) log-probabilities."""
        slope = self.parameters_of(self.slope, segments)
        return slope * z if z.dim() == 1 else torch.log_softmax(slope.unsqueeze(1) * z, dim=1)


class Curve(FittedPiece):
    """A rising curve through knots, straight between them and flat beyond.

    Args:
        knots: K, how many there are.
        segment, segment_rows, min_rows, shrink: see `FittedPiece`.

    Raises:
        ValueError: fewer than two knots.
    """

    x: torch.Tensor
    y: torch.Tensor
    fitted: torch.Tensor

    def __init__(
        self,
        knots: int = 64,
        *,
        segment: str | None = None,
        segment_rows: int = 0,
        min_rows: int = 200,
        shrink: float = 100.0,
    ) -> None:
        super().__init__(segment=segment, segment_rows=segment_rows, min_rows=min_rows, shrink=shrink)
        if knots < 2:
            raise ValueError("a curve has at least 2 knots")
        self.knots = knots
        self.register_buffer("x", torch.zeros(self.rows, knots))
        self.register_buffer("y", torch.zeros(self.rows, knots))
        self.register_buffer("fitted", torch.zeros(self.rows, dtype=torch.bool))

    def curve(self, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        """The curve at each value (B,).

        It is a sum of steps that each rise with the value, so no rounding makes it fall; knots that follow each other
        at one place are a jump there.
        """
        x, y = self.parameters_of(self.x, segments), self.parameters_of(self.y, segments)
        step = (value.unsqueeze(1) - x[:, :-1]) / (x[:, 1:] - x[:, :-1]).clamp(min=_TINY)
        return y[:, 0] + (step.clamp(0, 1) * (y[:, 1:] - y[:, :-1])).sum(1)


class IsotonicCalibration(Curve):
    """The rising curve from log-odds to probability that is nearest to the labels.

    Args:
        knots, segment, segment_rows, min_rows, shrink: see `Curve`.

    Example:
        >>> piece = IsotonicCalibration(knots=3)
        >>> piece.fill(0, x=[-1.0, 0.0, 1.0], y=[0.1, 0.2, 0.8], fitted=True)
        >>> torch.sigmoid(piece(torch.tensor([-5.0, -1.0, 0.5, 7.0]), {}))
        tensor([0.1000, 0.1000, 0.5000, 0.8000])
    """

    def forward(self, z: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(B,) log-odds."""
        return torch.where(self.parameters_of(self.fitted, segments), log_odds(self.curve(z, segments)), z)


class IsotonicValue(Curve):
    """The rising curve from a predicted value to the mean label that is nearest to the labels.

    Args:
        knots, segment, segment_rows, min_rows, shrink: see `Curve`.

    Example:
        >>> piece = IsotonicValue(knots=2)
        >>> piece.fill(0, x=[0.0, 10.0], y=[2.0, 4.0], fitted=True)
        >>> piece(torch.tensor([-1.0, 5.0]), {})
        tensor([2., 3.])
    """

    def forward(self, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        """(B,) in the label's unit."""
        return torch.where(self.parameters_of(self.fitted, segments), self.curve(value, segments), value)


class UnitInterval(Curve):
    """The share of held-out predictions below a predicted value: what the regression is in the fused score.

    It goes on beyond the largest and smallest of them by their range, so that values out there still differ.

    Args:
        knots, min_rows: see `Curve`.

    Example:
        >>> piece = UnitInterval(knots=2)
        >>> piece.fill(0, x=[0.0, 10.0], y=[0.0, 1.0], fitted=True)
        >>> piece(torch.tensor([2.5]), torch.tensor([0.9]))
        tensor([0.2500])
    """

    def __init__(self, knots: int = 64, *, min_rows: int = 200) -> None:
        super().__init__(knots, min_rows=min_rows)  # by segment, the shares of two segments would not compare

    def forward(self, value: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """(B,) in [0, 1]; `otherwise` (B,) before it is fitted."""
        return torch.where(self.fitted, self.curve(value, {}).clamp(0, 1), otherwise)


Piece = PriorCorrection | PlattScaling | TemperatureScaling | IsotonicCalibration | IsotonicValue | UnitInterval
PIECES_OF: dict[str, tuple[type[nn.Module], ...]] = {
    "binary": (PriorCorrection, PlattScaling, TemperatureScaling, IsotonicCalibration),
    "multiclass": (TemperatureScaling,),
    "regression": (IsotonicValue, UnitInterval),
}


class Calibration(nn.Module):
    """Calibrates the predictions of some tasks.

    Args:
        tasks: all tasks of the model.
        pieces: task name -> what is applied to its prediction, one after the other; at most one piece of them is
            fitted, but for a `UnitInterval` after an `IsotonicValue`.

    Attributes:
        calibrated: name of the task -> its pieces.

    Raises:
        ValueError: an unknown task, pieces that do not belong to a task of its kind, or two fitted ones.

    Example:
        >>> tasks = [Task.binary("click"), Task.binary("buy", after="click")]
        >>> calibration = Calibration(tasks, {"click": [PriorCorrection(0.1), PlattScaling()]})
        >>> raw = {"click": torch.tensor([0.5]), "buy": torch.tensor([0.2]), "buy|click": torch.tensor([0.4])}
        >>> calibration.calibrate(raw, {})
        {'click': tensor([0.0909]), 'buy': tensor([0.0909]), 'buy|click': tensor([1.])}
    """

    def __init__(self, tasks: Sequence[Task], pieces: Mapping[str, Sequence[Piece] | Piece]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        number = {task.name: i for i, task in enumerate(tasks)}
        self._pieces = nn.ModuleDict()  # by number: a name may hold what torch takes in none
        for name, of in pieces.items():
            if name not in number:
                raise ValueError(f"calibration: no task {name!r}{nearest(name, number)}")
            listed = [of] if isinstance(of, nn.Module) else list(of)
            _check_pieces(tasks[number[name]], listed)
            self._pieces[str(number[name])] = nn.ModuleList(listed)
        touched = {number[name] for name in pieces}
        self.links: list[tuple[int, int]] = []  # (child, parent) of the chains that calibration changes
        for child, parent in chain_links(tasks):
            if child in touched or parent in touched:
                self.links.append((child, parent))
                touched.add(child)

    @property
    def calibrated(self) -> dict[str, list[Piece]]:
        """Task name -> its pieces."""
        return {self.tasks[int(i)].name: list(of) for i, of in self._pieces.items()}  # type: ignore[call-overload]

    @property
    def segments(self) -> tuple[str, ...]:
        """The id features that pieces depend on."""
        all_of = (getattr(piece, "segment", None) for of in self.calibrated.values() for piece in of)
        return tuple(dict.fromkeys(segment for segment in all_of if segment is not None))

    def forward(self, predictions: Predictions, sparse_features: KeyedJaggedTensor) -> Predictions:
        """Calibrated predictions.

        Args:
            predictions: task name -> (B,) or (B, C), and the conditional ones of chains; others are left alone.
            sparse_features: of the same B rows; the first value of a segment counts.
        """
        return self.calibrate(predictions, {name: single_value(sparse_features, name) for name in self.segments})

    def calibrate(self, predictions: Predictions, segments: Segments) -> Predictions:
        """The same, of the segments' values (B,) int64 by feature."""
        out = dict(predictions)
        for i, pieces in self._pieces.items():
            task = self.tasks[int(i)]
            out[task.name] = _applied(task, pieces, out[task.name], segments)  # type: ignore[arg-type]
        for child, parent in self.links:
            task, before = self.tasks[child], out[self.tasks[parent].name]
            out[task.name] = torch.minimum(out[task.name], before)
            if task.conditional_name in out:
                out[task.conditional_name] = (out[task.name] / before.clamp(min=_TINY)).clamp(max=1)
        return out

    def unit_interval(self, task: Task, predicted: torch.Tensor) -> torch.Tensor:
        """A regression's calibrated prediction (B,) as a number in [0, 1] that grows with it, for the fused score."""
        logistic = in_unit_interval(task, predicted)
        last = self.calibrated.get(task.name, [None])[-1]
        return last(predicted, logistic) if isinstance(last, UnitInterval) else logistic


def _check_pieces(task: Task, pieces: Sequence[nn.Module]) -> None:
    for piece in pieces:
        if not isinstance(piece, PIECES_OF[task.kind]):
            names = ", ".join(kind.__name__ for kind in PIECES_OF[task.kind])
            raise ValueError(
                f"calibration of {task.name!r}: {type(piece).__name__} is nothing for a {task.kind} task; there are "
                f"{names}"
            )
    if not pieces:
        raise ValueError(f"calibration of {task.name!r}: it has no piece")
    fitted = [piece for piece in pieces if isinstance(piece, FittedPiece)]
    last = len(pieces) - 1
    if any(isinstance(piece, UnitInterval) and i < last for i, piece in enumerate(pieces)):
        raise ValueError(f"calibration of {task.name!r}: UnitInterval comes last")
    if sum(not isinstance(piece, UnitInterval) for piece in fitted) > 1:
        raise ValueError(f"calibration of {task.name!r}: more than one piece would have to be fitted")


def _applied(task: Task, pieces: Sequence[nn.Module], p: torch.Tensor, segments: Segments) -> torch.Tensor:
    if task.kind == "regression":
        for piece in pieces:
            p = p if isinstance(piece, UnitInterval) else piece(p, segments)
        return p
    z = log_odds(p) if task.kind == "binary" else torch.log(p.clamp(min=_TINY))
    for piece in pieces:
        z = piece(z, segments)
    return torch.sigmoid(z) if task.kind == "binary" else torch.softmax(z, dim=1)
