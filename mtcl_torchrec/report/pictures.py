"""What each task learnt: learning curves, ROC and precision-recall curves, reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtcl_torchrec.evaluation.confidence import SURE
from mtcl_torchrec.evaluation.naming import label_of, main_metric, sign_of_better
from mtcl_torchrec.report.curves import (
    Reliability,
    point_at,
    precision_recall_points,
    reliability,
    roc_points,
)
from mtcl_torchrec.report.studio import DASHES, MARKERS, Colours, Picture, Studio, roles_of, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curves(studio: Studio, history: Mapping[str, Any], tasks: Sequence[str]) -> list[Picture]:
    """A picture for each task that has a metric in some epoch: validation by epoch, the kept one marked."""
    epochs, best = history.get("epochs") or [], history.get("best_epoch") or 0
    pictures = []
    for task in tasks:
        key = next((m for epoch in epochs if (m := main_metric(epoch.get(task) or {}))), None)
        if key is None:
            continue
        label = label_of(key)
        values = [np.nan if (v := (epoch.get(task) or {}).get(key)) is None else float(v) for epoch in epochs]
        known = [(n, v) for n, v in enumerate(values, 1) if np.isfinite(v)]
        top = (min if sign_of_better(key) < 0 else max)(known, key=lambda of: of[1])
        kept = f"; {values[best - 1]:.4f} in the kept epoch {best}" if 0 < best <= len(values) else ""
        alt = (
            f"{label} of {task} on validation by epoch: {known[0][1]:.4f} in epoch {known[0][0]}, best {top[1]:.4f} in "
            f"epoch {top[0]}{kept}."
        )

        def paint(axes: Axes, c: Colours, values: list[float] = values, label: str = label) -> None:
            numbers = np.arange(1, len(values) + 1)
            mark = "o" if len(values) <= 40 else None
            axes.plot(numbers, values, color=c["a"], marker=mark, markersize=4)
            if 0 < best <= len(values) and np.isfinite(values[best - 1]):
                axes.plot(
                    best, values[best - 1], "o", color=c["b"], markersize=9, fillstyle="none", markeredgewidth=1.8
                )
            axes.set_xlabel("epoch")
            axes.set_ylabel(f"{label} on validation")
            axes.margins(x=0.08, y=0.15)
            ticks(axes.xaxis, 6, integer=True)
            ticks(axes.yaxis, 5)

        pictures.append(studio.draw(f"learning {task}", task, alt, paint, margins=(0.66, 0.12, 0.44, 0.1)))
    return pictures


def ranking_curves(
    studio: Studio, task: str, labels: np.ndarray, rankings: Mapping[str, np.ndarray], threshold: float | None
) -> list[Picture]:
    """ROC and precision-recall of one binary task's event.

    Args:
        labels: (N,) 0 or 1, NaN where missing.
        rankings: name -> (N,) scores; the first is the task's own prediction, which `threshold` is of.
    """
    rocs = {name: points for name, s in rankings.items() if (points := roc_points(labels, s)) is not None}
    pulls = {name: p for name, s in rankings.items() if (p := precision_recall_points(labels, s)) is not None}
    if not rocs:
        return []
    own, base = next(iter(rankings)), float(np.nanmean(labels))
    point = None if threshold is None else point_at(labels, rankings[own], threshold)
    at = "" if point is None else f" At the threshold chosen on validation: recall {point[1]:.3f}, "

    def roc(axes: Axes, c: Colours) -> None:
        axes.plot([0, 1], [0, 1], color=c["muted"], linewidth=0.8)
        _curves(axes, c, rocs)
        if point is not None:
            axes.plot(point[0], point[1], "o", color=c["a"], markersize=6, markeredgecolor=c["surface"])
        axes.set(xlabel="share of non-events taken", ylabel="share of events taken", xlim=(-0.01, 1.01), ylim=(0, 1.02))
        axes.legend(loc="lower right")

    def precision(axes: Axes, c: Colours) -> None:
        axes.axhline(base, color=c["muted"], linewidth=0.8)
        _curves(axes, c, pulls)
        if point is not None:
            axes.plot(point[1], point[2], "o", color=c["a"], markersize=6, markeredgecolor=c["surface"])
        top = max(float(y.max()) for _, y in pulls.values())
        axes.set(xlabel="recall: share of events taken", ylabel="precision", xlim=(-0.01, 1.01))
        axes.set_ylim(0, min(1.02, 1.25 * max(top, base)))
        axes.legend(loc="upper right")

    others = ", ".join(name for name in rocs if name != own)
    beside = f" beside {others}" if others else ""
    return [
        studio.draw(
            f"roc {task}", f"{task}: ROC",
            f"ROC curve of {task}: {own}{beside}; the diagonal is guessing."
            + (f"{at}false positive rate {point[0]:.3f}." if point else ""), roc,
        ),
        studio.draw(
            f"precision recall {task}", f"{task}: precision and recall",
            f"Precision against recall of {task}: {own}{beside}; the line is the base rate {base:.4f}."
            + (f"{at}precision {point[2]:.3f}." if point else ""), precision,
        ),
    ]  # fmt: skip


def _curves(axes: Axes, c: Colours, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    roles = roles_of(curves)
    for name, (x, y) in curves.items():
        axes.plot(x, y, color=c[roles[name]], linestyle=DASHES[roles[name]], label=name)


def reliability_diagram(
    studio: Studio, task: str, kind: str, labels: np.ndarray, predicted: Mapping[str, np.ndarray]
) -> Picture | None:
    """What happened where so much was predicted.

    Args:
        labels: (N,) NaN where missing.
        predicted: name -> (N,) or (N, C), such as ``"before"`` and ``"after"`` calibration.
    """
    found = {name: r for name, p in predicted.items() if (r := reliability(labels, p)) is not None}
    if not found:
        return None
    names = {
        "binary": ("predicted probability", "share that happened"),
        "multiclass": ("probability of the top class", "share that was right"),
        "regression": ("predicted", "mean label"),
    }[kind]
    ends = [np.r_[r.predicted, r.happened - SURE * r.error, r.happened + SURE * r.error] for r in found.values()]
    low, high = float(np.concatenate(ends).min()), float(np.concatenate(ends).max())
    room = 0.06 * max(high - low, 1e-6)
    if kind == "binary":
        low = 0.0

    def paint(axes: Axes, c: Colours) -> None:
        axes.plot([low, high], [low, high], color=c["muted"], linewidth=0.8)
        for (name, r), role in zip(found.items(), roles_of(found).values(), strict=True):
            axes.errorbar(
                r.predicted, r.happened, SURE * r.error, color=c[role], linestyle=DASHES[role], marker=MARKERS[role],
                markersize=3.5, elinewidth=0.9, linewidth=1.2, label=name,
            )  # fmt: skip
        axes.set(xlabel=names[0], ylabel=names[1], xlim=(low - room, high + room), ylim=(low - room, high + room))
        for axis in (axes.xaxis, axes.yaxis):
            ticks(axis, 5)
        if len(found) > 1:
            axes.legend(loc="upper left")

    return studio.draw(f"reliability {task}", task, _said(task, found), paint, margins=(0.62, 0.12, 0.44, 0.1))


def _said(task: str, found: Mapping[str, Reliability]) -> str:
    gaps = [f"{name} {float(np.abs(r.predicted - r.happened).mean()):.4f}" for name, r in found.items()]
    return (
        f"Reliability of {task}: predicted against what happened, in bins of equally many rows; mean gap "
        f"{', '.join(gaps)}."
    )
