"""What `article_claims.py` measured, as tables and a picture: each system's mean over seeds, beside what is claimed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from document import Line, Table
from measure import figure, save

NETWORKS = ("one task", "several tasks", "several tasks, fused")
FUSED_FILTER = "matrix factorisation, fused"
FILTERS = ("collaborative filtering", "matrix factorisation", FUSED_FILTER)
SYSTEMS = ("random order", *FILTERS, *NETWORKS)
COLUMNS = {
    "accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "auc": "AUC", "gauc": "GAUC",
    "ctr": "CTR@{k}", "conversion": "conversion@{k}",
}  # fmt: skip
SETTINGS = ("data", "trials", "worth", "k", "small")
DRAWN = ("accuracy", "auc", "ctr", "conversion")
OURS, OTHERS = "#1f77b4", "#7f7f7f"  # networks, and the rest
CLAIMS = {"accuracy": "70 % → 85 %: +21 %", "ctr": "+15 %", "conversion": "+20 %"}


def of_systems(results: Sequence[dict[str, Any]]) -> list[Line]:
    """A line for each system of each seed, as the other benchmarks have theirs."""
    return [
        {"what": {**{key: result[key] for key in SETTINGS}, "system": system}, "repeat": result["seed"], **figures,
         "about": result.get("about")}
        for result in results for system, figures in result["systems"].items()
    ]  # fmt: skip


def by_data(lines: Sequence[Line]) -> dict[tuple[Any, ...], dict[str, dict[int, Line]]]:
    """Settings -> system -> seed -> line; of the seeds of which all systems are there, and settings that have some."""
    found: dict[tuple[Any, ...], dict[str, dict[int, Line]]] = {}
    for line in lines:
        of = found.setdefault(tuple(line["what"][key] for key in SETTINGS), {system: {} for system in SYSTEMS})
        if line["what"]["system"] in of:
            of[line["what"]["system"]][line["repeat"]] = line
    for settings, of in list(found.items()):
        seeds = set.intersection(*(set(seeds) for seeds in of.values()))
        found[settings] = {system: {seed: lines[seed] for seed in sorted(seeds)} for system, lines in of.items()}
        if not seeds:
            del found[settings]
    return found


def named(settings: tuple[Any, ...]) -> str:
    """A set of data, with what is not as usual."""
    data, trials, worth, _, small = settings
    return (
        f"{data}{f', a conversion worth {worth:g}' if worth else ''}{f', {trials} trials' if trials != 8 else ''}"
        + (", small" if small else "")
    )


def tables(lines: list[Line]) -> list[Table]:
    """A table for each set of data: mean ± standard deviation over seeds, and gains over the filters."""
    found = []
    for settings, of in by_data(lines).items():
        repeats = list(of[SYSTEMS[0]].values())
        majority = statistics.mean(line["majority"] for line in repeats)
        title = f"{named(settings)}, {len(repeats)} seed{'s' if len(repeats) > 1 else ''}"
        title += f"; always the majority: accuracy {majority:.3f}"
        heads = ["ranks by", *(heading.format(k=settings[SETTINGS.index("k")]) for heading in COLUMNS.values())]
        rows = [[system, *(cell(of[system], key) for key in COLUMNS)] for system in SYSTEMS]
        for base in FILTERS:
            rows += [[f"{system}: gain over {base}", *(gain(of[system], of[base], key) for key in COLUMNS)]
                     for system in (NETWORKS[-1:] if base == FUSED_FILTER else NETWORKS)]  # fmt: skip
        rows.append(["claimed gain", *(CLAIMS.get(key, "") for key in COLUMNS)])
        found.append(Table(title, heads, rows))
    return found


def cell(of: dict[int, Line], key: str) -> str:
    """Mean ± standard deviation over seeds."""
    values = [line[key] for line in of.values()]
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def gain(ours: dict[int, Line], theirs: dict[int, Line], key: str) -> str:
    """Relative gain over another system, paired by seed; of AUC and GAUC, of what is above 0.5."""
    less = 0.5 if key in ("auc", "gauc") else 0.0
    values = [(line[key] - less) / (theirs[seed][key] - less) - 1 for seed, line in ours.items()]
    return f"{statistics.mean(values):+.1%}" + (f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else "")


def draw(lines: list[Line], path: Path) -> None:
    """A row of panels for each set of data: each system's mean, its standard deviation, and each seed."""
    groups = by_data(lines)
    drawn, axes = figure(wide=12, high=0.6 + 2.4 * len(groups), columns=len(DRAWN), rows=len(groups), grid="x")
    for row, (settings, of) in zip(axes, groups.items(), strict=True):
        for axis, key in zip(row, DRAWN, strict=True):
            for y, (system, repeated) in enumerate(of.items()):
                values = [line[key] for line in repeated.values()]
                colour = OURS if system in NETWORKS else OTHERS
                axis.plot(values, [-y] * len(values), "|", color=colour, alpha=0.6)
                spread = statistics.stdev(values) if len(values) > 1 else None
                axis.errorbar(statistics.mean(values), -y, xerr=spread, fmt="o", color=colour)
            if key == "accuracy":
                majority = statistics.mean(line["majority"] for line in of[SYSTEMS[0]].values())
                axis.axvline(majority, color="grey", linestyle="--", linewidth=1, label="always the majority")
                axis.legend(fontsize=7, frameon=False)
            axis.set_yticks([-y for y in range(len(of))], list(of) if axis is row[0] else [], fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
            axis.locator_params(axis="x", nbins=5)
            axis.set_xlabel(COLUMNS[key].format(k=settings[SETTINGS.index("k")]), fontsize=8)
        row[0].set_title(named(settings), fontsize=9, loc="left")
    save(drawn, path)
