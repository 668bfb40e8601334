"""What the fused score does: who decides the ranking, what each event gains and loses, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtcl_torchrec.evaluation.confidence import SURE, clipped
from mtcl_torchrec.evaluation.naming import bounds_of
from mtcl_torchrec.report.facts import chosen_name
from mtcl_torchrec.report.studio import MARKERS, Colours, Picture, Studio, roles_of, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LETTER = 0.078  # inches, of a name beside an axis

Dots = Mapping[str, tuple[float, float]]  # name -> value and its standard error, NaN where it is not known


def share(value: float) -> str:
    """A share in words.

    Example:
        >>> share(0.374), share(-0.002), share(-0.05)
        ('37%', '0%', '−5%')
    """
    return f"{round(100 * value)}%".replace("-", "−")


def bars(studio: Studio, name: str, title: str, values: Mapping[str, float], label: str, *, percent: bool) -> Picture:
    """A bar for each task, negative ones to the left.

    Args:
        label: of the axis.
        percent: whether values are shares.
    """
    texts = {task: share(v) if percent else f"{v:.4g}".replace("-", "−") for task, v in values.items()}
    left = 0.2 + _LETTER * max(map(len, values))
    size = (left + 2.7, 0.62 + 0.27 * len(values))

    def paint(axes: Axes, c: Colours) -> None:
        most, least = max(0.0, *values.values()), min(0.0, *values.values())
        room = 0.22 * ((most - least) or 1.0)
        for y, (task, value) in enumerate(values.items()):
            axes.barh(y, value, height=0.62, color=c["a"] if value >= 0 else c["b"])
            side = "right" if texts[task].startswith("−") else "left"
            axes.annotate(
                texts[task], (value, y), xytext=(3 if side == "left" else -3, 0), textcoords="offset points", ha=side,
                va="center", color=c["ink"], fontsize=8,
            )  # fmt: skip
        axes.axvline(0, color=c["muted"], linewidth=0.8)
        axes.set(xlim=(least - room * (least < 0), most + room), ylim=(len(values) - 0.5, -0.5), xlabel=label)
        axes.set_yticks(range(len(values)), list(values))
        ticks(axes.xaxis, 5)
        if percent:
            axes.xaxis.set_major_formatter(lambda value, _: share(value))

    said = ", ".join(f"{task} {text}" for task, text in texts.items())
    return studio.draw(name, title, f"{title}: {said}.", paint, size=size, margins=(left, 0.12, 0.44, 0.06))


def dots(
    studio: Studio, name: str, title: str, label: str, rows: Mapping[str, Dots], *, guess: float, metric: str = "auc"
) -> Picture:
    """A line for each event or model, a mark with its 95% interval for each way to rank.

    Args:
        rows: what stands at the left -> way to rank -> value and standard error; the first row that has a way decides
            its place in the legend.
        guess: what guessing gives, a line.
        metric: of the values: no interval passes its bounds.
    """
    ways = list(dict.fromkeys(way for of in rows.values() for way in of))
    left = 0.2 + _LETTER * max(map(len, rows))
    above = 0.06 + (0.2 * math.ceil(len(ways) / 2) if len(ways) > 1 else 0)
    size = (left + 2.9, 0.5 + above + (0.14 + 0.16 * len(ways)) * len(rows))

    def paint(axes: Axes, c: Colours) -> None:
        axes.axvline(guess, color=c["muted"], linewidth=0.8)
        for line in range(1, len(rows)):
            axes.axhline(line - 0.5, color=c["grid"], linewidth=0.8)
        for way, role in roles_of(ways).items():
            shift = 0.0 if len(ways) == 1 else 0.22 * (2 * ways.index(way) / (len(ways) - 1) - 1)
            there = [(y + shift, *of[way]) for y, of in enumerate(rows.values()) if way in of]
            axes.errorbar(
                [v for _, v, _ in there], [y for y, _, _ in there],
                xerr=np.array([ends_of(v, e, metric) for _, v, e in there]).T,
                color=c[role], marker=MARKERS[role], markersize=5, linestyle="none", elinewidth=1.4, label=way,
            )  # fmt: skip
        axes.grid(visible=False, axis="y")
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
        axes.set_yticks(range(len(rows)), list(rows))
        ticks(axes.xaxis, 5)
        if len(ways) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, handletextpad=0.3, columnspacing=1.0)

    said = "; ".join(f"{row}: " + ", ".join(f"{way} {v:.4f}" for way, (v, _) in of.items()) for row, of in rows.items())
    return studio.draw(name, title, f"{label}. {said}.", paint, size=size, margins=(left, 0.12, 0.44, above))


def ends_of(value: float, error: float, metric: str) -> tuple[float, float]:
    """How far a 95% interval reaches below and above a value, within the metric's bounds; 0 where it is not known.

    Example:
        >>> [round(end, 4) for end in ends_of(0.99, 0.01, "auc")]
        [0.0196, 0.01]
    """
    if math.isnan(error):
        return 0.0, 0.0
    low, high = clipped(value - SURE * error, value + SURE * error, bounds_of(metric))
    return max(value - low, 0.0), max(high - value, 0.0)


def pareto_pictures(studio: Studio, fitted: Mapping[str, Any]) -> list[Picture]:
    """A picture for each task: what its ranking loses under many weights, against the target.

    Args:
        fitted: fusion/report.json, whose ``front`` is that of `mtcl_torchrec.fusing.pareto.pareto_front`.
    """
    front: Sequence[Mapping[str, Any]] = fitted.get("front") or []
    if not front:
        return []
    chosen, pictures = chosen_name(fitted), []
    for task in [key.removeprefix("loss ") for key in front[0] if key.startswith("loss ")]:
        lines = [of for of in front if of.get(f"loss {task}") is not None and of.get("target") is not None]
        if lines:
            pictures.append(_pareto(studio, task, lines, chosen, str(fitted.get("target", "target"))))
    return pictures


def _pareto(studio: Studio, task: str, lines: Sequence[Mapping[str, Any]], chosen: str, target: str) -> Picture:
    points = [(float(of[f"loss {task}"]), float(of["target"]), str(of["name"])) for of in lines]
    groups = {
        "drawn at random": [p for p in points if not p[2]],
        "one head alone": [p for p in points if p[2].startswith("head ") and p[2] != chosen],
        "other weights tried": [p for p in points if p[2] and not p[2].startswith("head ") and p[2] != chosen],
        "chosen": [p for p in points if p[2] == chosen],
    }
    best: list[tuple[float, float]] = []
    for loss, value, _ in sorted(points):
        best.append((loss, max(value, best[-1][1] if best else -math.inf)))

    def paint(axes: Axes, c: Colours) -> None:
        axes.axvline(0, color=c["muted"], linewidth=0.8)
        axes.step([x for x, _ in best], [y for _, y in best], where="post", color=c["a"], linewidth=1.1)
        styles = [("muted", ".", 4), ("c", "s", 5), ("d", "^", 6), ("b", "*", 12)]
        for (label, of), (role, marker, size) in zip(groups.items(), styles, strict=True):
            if of:
                axes.plot(
                    [p[0] for p in of], [p[1] for p in of], marker, color=c[role], markersize=size, label=label,
                    markeredgewidth=0, linestyle="none",
                )  # fmt: skip
        axes.set(xlabel=f"GAUC of {task} lost against its own head", ylabel=target)
        for axis in (axes.xaxis, axes.yaxis):
            ticks(axis, 5)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.2, 1.0), ncols=2, handletextpad=0.1, columnspacing=0.8)

    at = "".join(f" Chosen: {value:.4f} at a loss of {loss:.4f}." for loss, value, _ in groups["chosen"])
    return studio.draw(
        f"pareto {task}",
        f"Pareto front: {task}",
        f"{target} against what the ranking of {task} loses under many weights.{at}", paint,
        size=(3.3, 3.0), margins=(0.66, 0.12, 0.44, 0.46),
    )  # fmt: skip
