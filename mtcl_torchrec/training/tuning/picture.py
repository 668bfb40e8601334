"""Trials as lines over parallel axes, one for each setting (Inselberg, *The Visual Computer*, 1985)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtcl_torchrec.drawing import plain_text
from mtcl_torchrec.training.tuning.objective import Objective
from mtcl_torchrec.training.tuning.space import Parameter, Space, Value, shown

if TYPE_CHECKING:
    from mtcl_torchrec.training.tuning.study import Finished

MOST = 12  # axes beside the objective's
_ABSENT = -0.1  # where a trial passes that has no such setting


def draw_parallel(
    path: Path,
    space: Space,
    objective: Objective,
    trials: Sequence[Finished],
    best: Finished,
    important: Sequence[str] = (),
) -> None:
    """Write the picture: the colour is the objective, the thick line the best, the dashed one the run as it was; trials
    that were given up are grey.

    Args:
        important: paths, those that matter most first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with plain_text():
        _draw(path, space, objective, trials, best, important)


def _draw(
    path: Path,
    space: Space,
    objective: Objective,
    trials: Sequence[Finished],
    best: Finished,
    important: Sequence[str],
) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown_trials = [t for t in trials if t.state != "failed"]
    order = [*important, *(p.path for p in space.parameters if p.path not in important)]
    by_path = {p.path: p for p in space.parameters}
    moved = [p for p in order if len({t.values.get(p) for t in shown_trials}) > 1][:MOST]
    values = [t.value for t in shown_trials if t.state == "complete" and t.value is not None]
    low, high = min(values), max(values)
    axes = [_Axis.of(by_path[p], shown_trials) for p in moved]
    axes.append(_Axis(objective.name, _linear(low, high), {_place(low, low, high): f"{low:.4f}", 1.0: f"{high:.4f}"}))
    figure = Figure(figsize=(2 + 1.35 * len(axes), 5.5), dpi=130, layout="constrained")
    plot = figure.add_subplot()
    colours = colormaps["viridis" if objective.direction == "maximize" else "viridis_r"]
    for trial in sorted(shown_trials, key=lambda t: (t is best, t.state == "complete", t.number)):
        value = trial.value if trial.state == "complete" else None
        points = [axis.at(trial.values.get(p)) for axis, p in zip(axes, moved, strict=False)]
        across = list(range(len(points)))
        if value is not None:
            points, across = [*points, axes[-1].at(value)], [*across, len(moved)]
        style: dict[str, Any] = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
        if value is not None:
            style = {"color": colours(_place(value, low, high)), "linewidth": 1.2, "alpha": 0.8, "zorder": 2}
        if trial.number == 0:
            style |= {"linestyle": "--", "color": "black", "label": "the run as it was", "zorder": 3, "linewidth": 1.6}
        if trial is best:
            style |= {"linewidth": 3.5, "alpha": 1.0, "label": f"best (trial {trial.number})", "zorder": 4}
        plot.plot(across, points, **style)
    for x, axis in enumerate(axes):
        plot.axvline(x, color="0.4", linewidth=0.8, zorder=0)
        for y, text in axis.ticks.items():
            box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            plot.annotate(
                text, (x, y), xytext=(4, 0), textcoords="offset points", fontsize=8, va="center", zorder=5, bbox=box
            )
    names = [axis.name.replace("schema.", "").replace("model.", "").replace("optimizers.", "") for axis in axes]
    plot.set_xticks(range(len(axes)), names, rotation=25, ha="right", fontsize=9)
    plot.set_yticks([])
    plot.set_ylim(-0.16, 1.08)
    plot.set_xlim(-0.15, len(axes) - 1 + 0.45)
    for side in ("top", "right", "left", "bottom"):
        plot.spines[side].set_visible(False)
    handles, labels = plot.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(
        f"{len(shown_trials)} trials, {objective.name} on the validation split", x=0.01, ha="left", fontsize=11
    )
    figure.savefig(path)


class _Axis:
    """Where the values of one setting stand, from 0 to 1, and what is written beside it."""

    def __init__(self, name: str, place: Callable[[Any], float], ticks: dict[float, str]) -> None:
        self.name, self._place, self.ticks = name, place, ticks

    def at(self, value: Value) -> float:
        """From 0 to 1, below for a setting that a trial does not have."""
        return _ABSENT if value is None else self._place(value)

    @classmethod
    def of(cls, parameter: Parameter, trials: Sequence[Finished]) -> _Axis:
        there = [t.values[parameter.path] for t in trials if parameter.path in t.values]
        absent = {_ABSENT: "–"} if len(there) < len(trials) else {}
        if parameter.config.bounds is None:
            options = [v for v in parameter.options if v in there]
            step = 1 / max(len(options) - 1, 1)
            places = {v: i * step for i, v in enumerate(options)}
            factor = "×" if parameter.config.times is not None else ""
            ticks = {place: f"{factor}{shown(v)}"[:24] for v, place in places.items()}
            return cls(parameter.path, places.__getitem__, ticks | absent)
        low, high = parameter.config.bounds
        is_log = parameter.config.log is not None
        place = _linear(math.log(low), math.log(high)) if is_log else _linear(low, high)
        middle = math.sqrt(low * high) if is_log else (low + high) / 2
        ticks = {0.0: f"{low:.3g}", 0.5: f"{middle:.3g}", 1.0: f"{high:.3g}"}
        return cls(parameter.path, (lambda v: place(math.log(v))) if is_log else place, ticks | absent)


def _linear(low: float, high: float) -> Callable[[Any], float]:
    return lambda value: _place(value, low, high)


def _place(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
