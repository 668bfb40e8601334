"""What `training.py` and `scaling.py` show of the settings that they have measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from document import Table, median, ranged, ratios
from measure import Line, figure, save
from step_parts import PARTS


def by_setting(lines: list[Line]) -> dict[tuple[str, int], dict[int, list[Line]]]:
    """(input, vocabulary) -> ranks -> repeats."""
    groups: dict[tuple[str, int], dict[int, list[Line]]] = {}
    for line in lines:
        what = line["what"]
        of = groups.setdefault((what["setting"]["input"], what["setting"]["vocabulary"]), {})
        of.setdefault(what["ranks"], []).append(line)
    return groups


def tables(lines: list[Line]) -> list[Table]:
    """A table for each input and vocabulary, with a column for each number of ranks."""
    found = []
    for (source, vocabulary), of in by_setting(lines).items():
        first = of[min(of)]

        def row(name: str, shown: Callable[[Line], float], form: str, of: dict[int, list[Line]] = of) -> list[str]:
            return [name, *(f"{statistics.median(map(shown, repeated)):{form}}" for repeated in of.values())]

        rows = [
            [f"samples/s over {min(of)} rank", *(ranged(ratios(r, first, "samples_per_s")) for r in of.values())],
            ["samples/s", *(f"{median(r, 'samples_per_s'):,.0f}" for r in of.values())],
            *(row(f"step, {key}, ms", lambda r, key=key: r["step_ms"][key], ",.1f")  # type: ignore[misc]
              for key in ("mean", "median", "p90", "waiting for input")),
            *(row("the step taken apart, ms" if part == "step" else f"  {part}",
                  lambda r, part=part: r["apart_ms"][part], ",.1f")  # type: ignore[misc]
              for part in ("step", *PARTS)),
            row("sent between ranks, MB a step", lambda r: sum(r["sent_bytes"].values()) / 1e6, ",.2f"),
            row("tables, all ranks, GB", lambda r: r["table_bytes"] / 1e9, ".2f"),
            row("peak memory, a rank, GB", lambda r: r["peak_rss_bytes"] / 1e9, ".2f"),
            row("peak on the GPU, GB", lambda r: (r["peak_cuda_bytes"] or 0) / 1e9, ".2f"),
            row("data ready after, s", lambda r: r["setup_s"]["data"], ".1f"),
            row("model ready after, s", lambda r: r["setup_s"]["model"], ".1f"),
        ]  # fmt: skip
        heads = ["", *(f"{n} rank{'s' * (n > 1)}" for n in of)]
        found.append(Table(f"training: {vocabulary:,} users and as many items, input: {source}", heads, rows))
    return found


def stacked(axis: Any, bars: Mapping[str, Mapping[str, float]]) -> None:
    """A bar of each step that was taken apart, as high as the step; parts too small to be seen are one, at its top.

    Args:
        bars: name -> ``step`` and each of `PARTS`, ms.
    """
    names, steps = list(bars), [of["step"] for of in bars.values()]
    below = [0.0] * len(bars)
    for part in PARTS:
        heights = [of[part] for of in bars.values()]
        if part != "other" and max(heights) > 0.02 * max(steps):
            axis.bar(names, heights, bottom=below, label=part, width=0.6)
            below = [at + height for at, height in zip(below, heights, strict=True)]
    rest = [max(step - at, 0.0) for step, at in zip(steps, below, strict=True)]
    axis.bar(names, rest, bottom=below, label="all others", width=0.6, color="lightgrey")


def _short(size: int) -> str:
    """Such as 30 M."""
    unit, name = next(((unit, name) for unit, name in ((1_000_000, " M"), (1_000, " k")) if size >= unit), (1, ""))
    return f"{size / unit:g}{name}"


def draw(lines: list[Line], path: Path) -> None:
    """Samples a second by the size of the tables, and each setting's step taken apart, a bar for each setting."""
    drawn, (speeds, parts) = figure(wide=9.6, high=3.8, columns=2)
    groups = by_setting(lines)
    for n in sorted({line["what"]["ranks"] for line in lines}):
        points = sorted((size, median(of[n], "samples_per_s")) for (_, size), of in groups.items() if n in of)
        speeds.plot(*zip(*points, strict=True), marker="o", label=f"{n} rank{'s' * (n > 1)}")
    highest = max(median(repeated, "samples_per_s") for of in groups.values() for repeated in of.values())
    speeds.set(xscale="log", ylim=(0, 1.15 * highest), xlabel="users, and as many items", ylabel="samples/s")
    speeds.legend(fontsize=8, frameon=False, loc="lower right")
    several = len({source for source, _ in groups}) > 1
    bars = {
        f"{_short(size)}\n{n} rank{'s' * (n > 1)}" + f"\n{source}" * several: [line["apart_ms"] for line in repeated]
        for (source, size), of in groups.items() for n, repeated in of.items()
    }  # fmt: skip
    stacked(parts, {name: {part: median(of, part) for part in ("step", *PARTS)} for name, of in bars.items()})
    parts.set_ylabel("ms of a step, nothing overlapping")
    parts.tick_params(axis="x", labelsize=8)
    handles, names = parts.get_legend_handles_labels()
    parts.legend(handles[::-1], names[::-1], fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(drawn, path)
