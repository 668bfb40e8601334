"""What each task's ranking loses to the fused one, over many weights: the Pareto front, and its picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mtcl_torchrec.drawing import plain_text
from mtcl_torchrec.fusing.combiners import Setting, combiner_of
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.targets import ranking_auc
from mtcl_torchrec.schema import ConfigError

if TYPE_CHECKING:
    from mtcl_torchrec.fusing.fitted import FittedFusion


def pareto_front(
    held_out: HeldOut,
    fitted: FittedFusion,
    signs: Mapping[str, int],
    *,
    points: int = 100,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """What each task loses under the weights that were chosen, those tried, and as many `points` drawn at random (of a
    weighted mean, where what was chosen is no matter of weights).

    A task's loss is the grouped AUC of its own head less that of the fused ranking, for the same labels; of a task
    whose event costs something, both count the other way round.  Weights are drawn evenly over all shares of the
    score's spread (a Dirichlet law), so that the corners, where one task has all, are there too.

    Args:
        signs: task -> 1, -1 or 0, as in the search; 0 counts as 1.
        progress: called for each of the points.

    Returns:
        A line each: ``name`` (empty for random weights), ``target``, ``loss <task>``, ``weight <task>`` (of absolute
        sum 1), and ``front``: whether no other line loses less of one task and no more of any.
    """
    tasks = list(fitted.weights)
    judged = [task for task in tasks if task in held_out.labels]
    sign = {task: -1.0 if signs.get(task, 0) < 0 else 1.0 for task in tasks}
    drawn_of = combiner_of("weighted_mean") if fitted.combiner.learns else fitted.combiner
    scale = drawn_of.scales(held_out, tasks)
    own = {task: ranking_auc(held_out, held_out.parts[task], task) for task in judged}
    judged = [task for task in judged if not math.isnan(own[task])]
    rng = np.random.default_rng(seed)
    shares = np.vstack([np.eye(len(tasks)), rng.dirichlet(np.full(len(tasks), 0.7), points)])
    drawn = [("", dict(zip(tasks, row, strict=True))) for row in shares]
    lines = []
    kinds = (fitted.combiner.name, drawn_of.name)
    tried = [(t.name, t.setting) for t in fitted.tried if t.setting is not None and t.combiner in kinds]
    settings = ((name, {t: sign[t] * x[t] * scale[t] for t in tasks}) for name, x in drawn)
    random = ((name, Setting(drawn_of, weights, drawn_of.build(weights))) for name, weights in settings)
    for name, setting in [*tried, *random]:
        weights = setting.weights
        size = sum(abs(w) for w in weights.values()) or 1.0
        scores = held_out.scores(setting.fused_score)
        line: dict[str, object] = {"name": name, "target": fitted.target(held_out, scores)}
        for task in judged:
            found = ranking_auc(held_out, scores, task)
            # A head that foresees what is unwanted is right where the fused ranking puts it last.
            line[f"loss {task}"] = own[task] - (found if sign[task] > 0 else 1 - found)
        line |= {f"weight {task}": weights.get(task, 0.0) / size for task in tasks}
        lines.append(line)
        if len(lines) > len(tried) + len(tasks):
            progress()
    frame = pd.DataFrame(lines)
    frame["front"] = not_dominated(frame[[f"loss {task}" for task in judged]].to_numpy(dtype=np.float64))
    return frame


def not_dominated(losses: np.ndarray) -> np.ndarray:
    """Rows (N, T) that no other row beats: none is at most as high everywhere and lower somewhere.

    Example:
        >>> not_dominated(np.array([[0.0, 2.0], [1.0, 1.0], [1.0, 2.0], [2.0, 0.0]]))
        array([ True,  True, False,  True])
    """
    at_most = (losses[:, None, :] <= losses[None, :, :]).all(axis=2)
    lower = (losses[:, None, :] < losses[None, :, :]).any(axis=2)
    return np.logical_not((at_most & lower).any(axis=0))


def draw_front(fitted: FittedFusion, path: str | Path) -> None:
    """A panel for each task: its loss to the right, the target upwards, and the front of the two.

    Raises:
        ConfigError: there is no front, or matplotlib is not installed.
    """
    if fitted.front is None:
        raise ConfigError("no Pareto front was computed: front_points was 0")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'mtcl_torchrec[plots]'") from None
    with plain_text():
        _draw(fitted, fitted.front, path)


def _draw(fitted: FittedFusion, frame: pd.DataFrame, path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [column.removeprefix("loss ") for column in frame.columns if column.startswith("loss ")]
    columns = 2 if len(tasks) in (2, 4) else min(len(tasks), 3) or 1
    rows = math.ceil(len(tasks) / columns) or 1
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.4 * rows + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    chosen = frame["name"] == fitted.chosen.name
    heads = frame["name"].str.startswith("head ")
    groups: list[tuple[str, pd.Series, dict[str, Any]]] = [
        ("weights drawn at random", frame["name"] == "", {"color": "0.75", "s": 12}),
        ("one head alone", heads & ~chosen, {"color": "tab:green", "marker": "s", "s": 28}),
        ("other weights tried", (frame["name"] != "") & ~chosen & ~heads,
         {"color": "tab:orange", "marker": "^", "s": 36}),
        ("chosen", chosen, {"color": "tab:red", "marker": "*", "s": 170, "edgecolors": "white", "linewidths": 0.6}),
    ]  # fmt: skip
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        line = frame.sort_values(f"loss {task}")
        axes.step(
            line[f"loss {task}"], line["target"].cummax(), where="post", color="tab:blue", linewidth=1.2, zorder=1,
            label="the most to be had for this loss" if number == 0 else None,
        )  # fmt: skip
        for label, mask, style in groups:
            axes.scatter(
                frame.loc[mask, f"loss {task}"], frame.loc[mask, "target"],
                label=label if number == 0 and mask.any() else None, zorder=3 if label == "chosen" else 2, **style,
            )  # fmt: skip
        for name, x, y in frame.loc[heads, ["name", f"loss {task}", "target"]].itertuples(index=False):
            axes.annotate(
                name.removeprefix("head "), (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7,
                color="tab:green",
            )  # fmt: skip
        axes.set_title(task, fontsize=11)
        axes.set_xlabel("GAUC lost against its own head", fontsize=9)
        if number % columns == 0:
            axes.set_ylabel(fitted.target.name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    figure.suptitle(f"{fitted.target.name} and what each task's ranking loses", fontsize=12)
    figure.legend(loc="outside lower center", ncols=min(5, 2 * columns), fontsize=8, frameon=False)
    figure.savefig(str(path), dpi=130)
