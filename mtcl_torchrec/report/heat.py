"""How tasks share: heat maps of the experts that their gates use, and of how their gradients agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtcl_torchrec.report.studio import Colours, Picture, Studio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL, _LOW = 0.62, 0.3  # inches: width and height of a cell
_LETTER = 0.075  # inches, of a name beside it


def expert_use(studio: Studio, gates: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """A picture for each level of the trunk: the mean weight that each gate gives each expert.

    Args:
        gates: ``balance.gates`` of metrics.json; see `mtcl_torchrec.training.balance.GateUse`.
    """
    pictures = []
    most_of_all = max((w or 0.0 for use in gates for w in use["weights"]), default=1.0)
    levels = sorted({int(use["level"]) for use in gates})
    for level in levels:
        uses = [use for use in gates if use["level"] == level]
        values = [list(use["weights"]) for use in uses]
        texts = [
            ["" if w is None else f"{w:.2f}" + "+" * (e in use.get("native", [])) for e, w in enumerate(use["weights"])]
            for use in uses
        ]
        most = [max(((w or 0.0), e) for e, w in enumerate(row)) for row in values]
        said = "; ".join(f"{u['gate']} most expert {e} ({w:.2f})" for u, (w, e) in zip(uses, most, strict=True))
        columns = [f"expert {e}" if len(values[0]) <= 6 else str(e) for e in range(len(values[0]))]
        title = f"Level {level}" if len(levels) > 1 else "How much each gate uses each expert"
        pictures.append(
            _heat(studio, f"experts level {level}", title, f"Expert use of each gate: {said}.",
                  [str(u["gate"]) for u in uses], columns, values, texts, full=most_of_all)
        )  # fmt: skip
    return pictures


def task_conflicts(studio: Studio, gradients: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """A picture for each cut: mean cosine between the tasks' gradients.

    Args:
        gradients: ``balance.gradients`` of metrics.json; see `mtcl_torchrec.training.balance.GradientAgreement`.
    """
    pictures = []
    for seen in gradients:
        tasks, cosine = [str(t) for t in seen["tasks"]], seen["cosine"]
        values = [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(cosine)]
        texts = [["" if v is None else f"{v:+.2f}".replace("-", "−") for v in row] for row in values]
        pairs = [
            (v, tasks[i], tasks[j]) for i, row in enumerate(values) for j, v in enumerate(row[:i]) if v is not None
        ]
        said = "no two tasks had a gradient in one step"
        if pairs:
            (low, a, b), (high, x, y) = min(pairs), max(pairs)
            said = f"least alike are {b} and {a} ({low:+.2f}), most alike {y} and {x} ({high:+.2f})"
        pictures.append(
            _heat(studio, f"conflicts {seen['cut']}", f"Cosine of the tasks' gradients at the {seen['cut']}",
                  f"Cosine between the gradients of each two tasks at the {seen['cut']}: {said}.",
                  tasks, tasks, values, texts, full=max([0.2, *(abs(v) for v, _, _ in pairs)]))
        )  # fmt: skip
    return pictures


def _heat(
    studio: Studio, name: str, title: str, alt: str, rows: list[str], columns: list[str],
    values: list[list[float | None]], texts: list[list[str]], *, full: float,
) -> Picture:  # fmt: skip
    """Cells whose colour shows through by their size, all of it at `full`: blue above 0, orange below it; the text on
    them reads on a light page and on a dark one."""
    turned = max(map(len, columns)) * _LETTER > _CELL * 1.15
    left = 0.2 + _LETTER * max(map(len, rows))
    above = 0.12 + (_LETTER * max(map(len, columns)) if turned else 0.16)
    size = (left + 0.1 + _CELL * len(columns), above + 0.1 + _LOW * len(rows))

    def paint(axes: Axes, c: Colours) -> None:
        from matplotlib.patches import Rectangle

        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = c["grid"] if value is None else c["warm"] if value >= 0 else c["cold"]
                share = 0.35 if value is None else min(1.0, abs(value) / (full or 1.0))
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, alpha=share, linewidth=0))
                axes.text(x, y, texts[y][x], ha="center", va="center", color=c["ink"], fontsize=8)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xticks(range(len(columns)), columns, rotation=90 if turned else 0)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)

    return studio.draw(name, title, alt, paint, size=size, margins=(left, 0.1, 0.1, above))
