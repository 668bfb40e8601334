"""The trainings of `balance.py` as tables and as a picture: each method at its best rate, beside the twins."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from balance_methods import BY_NAME, TASKS, TWIN
from document import Line, Table
from measure import figure, save

COLOURS = {"architecture": "#4477aa", "loss weighting": "#ccbb44", "gradient surgery": "#aa3377"}


def best_rate(results: list[dict[str, Any]], data: str, name: str, only: str | None) -> float:
    """The rate with the best mean validation AUC."""
    fitting = [r for r in results if (r["data"], r["method"], r["only"]) == (data, name, only)]
    return max(fitting, key=lambda r: statistics.mean(r["val"].values()))["rate"]


def by_method(results: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each method's trainings at its best rate."""
    for name in [TWIN, *BY_NAME]:
        of = [r for r in results if r["method"] == name]
        if not of:
            continue
        first = min(r["seed"] for r in of)
        tried = [r for r in of if r["seed"] == first]
        best = {only: best_rate(tried, of[0]["data"], name, only) for only in {r["only"] for r in of}}
        yield name, [r for r in of if r["rate"] == best[r["only"]]]


def twin_aucs(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Task -> test AUC of its twins, one for each seed."""
    aucs: dict[str, list[float]] = {}
    for name, of in by_method(results):
        for r in of if name == TWIN else []:
            aucs.setdefault(r["only"], []).append(r["test"][r["only"]])
    return aucs


def gain(result: dict[str, Any], twins: dict[str, list[float]]) -> float:
    """Δm of one training, in percent."""
    gains = [(result["test"][t] - statistics.mean(a)) / (statistics.mean(a) - 0.5) for t, a in twins.items()]
    return 100 * statistics.mean(gains)


def rows_of(
    results: list[dict[str, Any]], data: str, steps: dict[str, dict[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of one set of data; `steps` is what `step_times` gave, or empty."""
    twins, tasks = twin_aucs(results), TASKS[data]
    rows = []
    for name, of in by_method(results):
        if name == TWIN:
            rows.append([name, *(_spread(twins[task], 4) for task in tasks), "", ""])
            continue
        below = ["↓" if _mean_below(of, twins, task) else "" for task in tasks]
        aucs = [_spread([r["test"][task] for r in of], 4) + mark for task, mark in zip(tasks, below, strict=True)]
        step = f"{steps[name]['ratio']:.2f}" if name in steps else ""
        rows.append([name, *aucs, _spread([gain(r, twins) for r in of], 2), step])
    return ["", *tasks, "Δm %", "step"], rows


def as_lines(results: list[dict[str, Any]]) -> list[Line]:
    """The trainings as the other benchmarks have their lines."""
    settings = ("data", "method", "only", "rate")
    return [
        {"what": {key: result[key] for key in settings}, "repeat": result["seed"],
         **{key: value for key, value in result.items() if key not in (*settings, "seed")}}
        for result in results
    ]  # fmt: skip


def by_data(lines: list[Line]) -> dict[str, list[dict[str, Any]]]:
    """Data -> trainings, each as its file has it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["what"]["data"], []).append({**line, **line["what"], "seed": line["repeat"]})
    return found


def tables(lines: list[Line], steps: dict[str, dict[str, float]]) -> list[Table]:
    """A table for each set of data; `steps` is what `step_times` gave, or empty."""
    title = "test AUC and Δm, mean ± standard deviation over seeds"
    return [Table(f"{data}: {title}", *rows_of(of, data, steps)) for data, of in by_data(lines).items()]


def draw(lines: list[Line], path: Path) -> None:
    """Δm of every method, a panel for each set of data."""
    sets = by_data(lines)
    drawn, panels = figure(wide=1 + 4 * len(sets), high=7, columns=len(sets), grid="x")
    from matplotlib.lines import Line2D

    for panel, (data, of_data) in zip(panels, sets.items(), strict=True):
        twins = twin_aucs(of_data)
        rows = [(n, [gain(r, twins) for r in of]) for n, of in by_method(of_data) if n != TWIN][::-1]
        for y, (name, gains) in enumerate(rows):
            error = statistics.stdev(gains) if len(gains) > 1 else 0
            panel.errorbar(statistics.mean(gains), y, xerr=error, fmt="o", color=COLOURS[BY_NAME[name].family])
        panel.set_yticks(range(len(rows)), [name for name, _ in rows])
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(data)
        panel.set_xlabel("Δm over single-task twins, %")
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=f) for f, c in COLOURS.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(drawn, path)


def _mean_below(of: list[dict[str, Any]], twins: dict[str, list[float]], task: str) -> bool:
    """Whether a task is below its twin by more than the twin's spread."""
    spread = statistics.stdev(twins[task]) if len(twins[task]) > 1 else 0.0
    return statistics.mean(r["test"][task] for r in of) < statistics.mean(twins[task]) - spread


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
