"""The one form in which every benchmark leaves its results, and how tables are shown: printed, or as Markdown.

A script keeps each measurement as a line of ``NAME.jsonl`` (see `measure.sweep`).  What they say together is
``NAME.json``: who measured, the figures of each setting with their spread, and the tables made of them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mtcl_torchrec.evaluation.plain_table import plain_table

Line = dict[str, Any]
DISTURBED = 0.15  # of the cores, at work for others
CONSOLE = Console(highlight=False, soft_wrap=True, width=240)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        heads: of the columns; the first column names the row.
        rows: as many cells each.
        note: what must be said with it.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""

    def print(self) -> None:
        """On the console."""
        table = plain_table(self.title, self.heads)
        for row in self.rows:
            table.add_row(*row)
        CONSOLE.print(table, "")
        if self.note:
            CONSOLE.print(self.note, "", markup=False)

    def markdown(self) -> str:
        """As Markdown, the title in bold."""
        lines = [f"**{_escaped(self.title)}**", ""]
        lines += [f"| {' | '.join(map(_escaped, row))} |" for row in (self.heads, *self.rows)]
        lines.insert(3, f"|---|{'---:|' * (len(self.heads) - 1)}")
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


# ---------------------------------------------------------------------- figures of several repeats


def figures(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each setting once: what was measured, how often, and median, least and most of every number.

    Numbers inside of others are named ``outer.inner``; text, lists and what is not defined (NaN) are left out.
    """
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(json.dumps(line["what"], sort_keys=True), []).append(line)
    return [
        {"what": of[0]["what"], "repeats": len(of), "figures": {name: spread(v) for name, v in _numbers(of).items()}}
        for of in groups.values()
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ranged(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the least and the most where they differ from it.

    Example:
        >>> ranged([3.0, 1.0, 2.0]), ranged([1.0])
        ('2.00 (1.00–3.00)', '1.00')
    """
    if not values:
        return ""
    shown = [f"{v:{form}}" for v in spread(values).values()]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} ({shown[1]}–{shown[2]})"


def median(lines: Iterable[Line], figure: str) -> float:
    """Of a figure of several lines."""
    return statistics.median(line[figure] for line in lines)


def ratios(ours: Iterable[Line], others: Iterable[Line], figure: str) -> list[float]:
    """Ours over the others', repeat by repeat, of those that both have: what disturbs a round disturbs both."""
    of = {line["repeat"]: line[figure] for line in others}
    return [line[figure] / of[line["repeat"]] for line in ours if of.get(line["repeat"])]


def _numbers(lines: Sequence[Line]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in lines:
        own = {name: value for name, value in line.items() if name not in ("what", "repeat", "about")}
        for name, value in _flat(own):
            found.setdefault(name, []).append(value)
    return found


def _flat(of: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in of.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
            yield before + name, value


# ---------------------------------------------------------------------- who measured, and all of it in a file


def said(lines: Sequence[Line]) -> str:
    """Machine, versions, commit and dates of the lines that a table shows."""
    if not lines:
        return "nothing was measured"
    abouts = [line["about"] for line in lines if line.get("about")]
    if not abouts:
        return "who measured was not kept"
    machine = abouts[-1]
    commits = ", ".join(dict.fromkeys(str(of["commit"]) for of in abouts))
    unknown = f"; of {len(lines) - len(abouts)} of {len(lines)} lines it was not kept" * (len(abouts) < len(lines))
    dates = sorted(of["date"] for of in abouts)
    load = statistics.median(of["load"][0] for of in abouts)
    others = [of["cores_of_others"] for of in abouts if of.get("cores_of_others") is not None]
    beside = f"; others meanwhile, median {statistics.median(others):.1f} cores" if others else ""
    versions = ", ".join(f"{name} {of}" for name, of in machine["versions"].items())
    return (
        f"{machine['gpu'] or machine['machine']}, {machine['cores']} cores, {machine['capability']}; {versions}; "
        f"commit {commits}; {dates[0][:16]} to {dates[-1][:16]}; load before a measurement, median {load:.1f}"
        f"{beside}{unknown}"
    )


def disturbed(lines: Sequence[Line]) -> str:
    """A warning where others were at work while lines were measured; empty where not, and where it was not kept."""
    found = [line["about"] for line in lines if (line.get("about") or {}).get("cores_of_others") is not None]
    busy = [of for of in found if of["cores_of_others"] > DISTURBED * of["cores"]]
    if not busy:
        return ""
    most, cores = max(of["cores_of_others"] for of in busy), busy[-1]["cores"]
    return (
        f"WARNING: during {len(busy)} of {len(lines)} measurements others kept cores at work, up to {most:.1f} of "
        f"{cores}: times are too long then, and ratios are not those of an idle machine (threads that wait for one "
        "that was held up lose the most); stop what else runs and measure with --again"
    )


def written(
    path: Path, lines: Sequence[Line], tables: Sequence[Table], *, complete: bool | None, picture: Path | None = None
) -> None:
    """Write the document of a benchmark.

    Args:
        path: ``NAME.json``.
        complete: nothing is missing; None where nobody knows.
        picture: that was drawn of it; a path, of which the name is kept.
    """
    document = {
        "benchmark": path.stem,
        "complete": complete,
        "about": next((line["about"] for line in reversed(lines) if line.get("about")), None),
        "commands": list(dict.fromkeys(line["about"]["command"] for line in lines if line.get("about"))),
        "measured": said(lines),
        "results": figures(lines),
        "tables": [asdict(table) for table in tables],
        "picture": picture.name if picture else None,
    }
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def tables_of(document: Mapping[str, Any]) -> list[Table]:
    """The tables that `written` has kept."""
    return [Table(**table) for table in document["tables"]]
