"""Several runs side by side, in the look of a report: `mtcl compare --html`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtcl_torchrec.evaluation.compare import Difference
from mtcl_torchrec.evaluation.confidence import SURE, support_of
from mtcl_torchrec.evaluation.estimates import Estimate, auc_estimate, clusters_of
from mtcl_torchrec.evaluation.naming import label_of, main_metric
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.report.contents import RunContents, read_contents
from mtcl_torchrec.report.facts import same_rows
from mtcl_torchrec.report.fusion_pictures import dots
from mtcl_torchrec.report.knowable import known_of_all
from mtcl_torchrec.report.layout import Section
from mtcl_torchrec.report.page import render
from mtcl_torchrec.report.studio import DASHES, MARKERS, Colours, Picture, Studio, ticks
from mtcl_torchrec.report.tables import Table, cost_tables, number
from mtcl_torchrec.report.verdict import Answer, in_doubt
from mtcl_torchrec.report.words import listed
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COUNTS = ("count", "base_rate")
_CURVES = 4  # runs that are told apart in one picture


@dataclass(frozen=True)
class Compared:
    """One number of R runs, and what each run after the first gains on the first.

    Args:
        name: what it is of: a task, or ``"ranking"``.
        metric: such as ``"AUC"`` or ``"NDCG@10"``.
        values: (R,) NaN where a run has none.
        differences: (R - 1,) difference to the first run, and the ends of its 95% interval (NaN: not known); None
            where there is none.
        more_is_better: whether a positive difference is a gain.
        signs: (R - 1,) 1 where a run is clearly better than the first, -1 worse, 0 too close to call; by default, what
            the intervals say.
        unsure: why no difference could be sure, in a few words, such as too few events; empty where one could.
    """

    name: str
    metric: str
    values: Sequence[float]
    differences: Sequence[tuple[float, float, float] | None] = ()
    more_is_better: bool = True
    signs: Sequence[int] | None = None
    unsure: str = ""

    def sign(self, run: int) -> int:
        """1 where the run (counted from 1) is clearly better than the first, -1 worse, 0 too close to call.

        Example:
            >>> Compared("click", "AUC", [0.7, 0.72], [(0.02, 0.01, 0.03)]).sign(1)
            1
        """
        if self.unsure:
            return 0
        if self.signs is not None:
            return self.signs[run - 1]
        found = self.differences[run - 1] if run <= len(self.differences) else None
        if found is None or not (found[1] > 0 or found[2] < 0):
            return 0
        return 1 if (found[0] > 0) == self.more_is_better else -1


def from_differences(by_run: Sequence[Sequence[Difference]]) -> list[Compared]:
    """What `compare_html` takes, of the differences of each further run to the first.

    Args:
        by_run: a list for each run after the first; metrics that some lack are kept.
    """
    tables = [{(m.of, m.metric): m for m in found} for found in by_run]
    compared = []
    for key in dict.fromkeys(key for of in tables for key in of):
        met = [of.get(key) for of in tables]
        first = next(m.a for m in met if m is not None)
        costs = any(m is not None and m.unwanted for m in met)
        compared.append(
            Compared(
                key[0],
                label_of(key[1]) + ", less is better" * costs,
                [first, *(math.nan if m is None else m.b for m in met)],
                [None if m is None else (m.difference, m.low, m.high) for m in met],
                signs=[0 if m is None or m.better is None else 1 if m.better == "b" else -1 for m in met],
                unsure=next((m.unsure for m in met if m is not None), ""),
            )
        )
    return compared


def compared_aucs(runs: Sequence[RunContents]) -> list[Compared]:
    """Each binary task's AUC on the split that the first run is judged by, row by row where the rows are the same."""
    tables = [run.predictions.get(runs[0].split) for run in runs]
    found = []
    for task in [t for t, kind in runs[0].kinds.items() if kind == "binary"]:
        if tables[0] is None or task not in tables[0].predicted_names:
            continue
        first = _task_auc(tables[0], task)
        support = support_of(tables[0].labels(task), clusters_of(tables[0].users, len(tables[0])))
        values: list[float] = [first.value]
        differences: list[tuple[float, float, float] | None] = []
        for table in tables[1:]:
            if table is None or task not in table.predicted_names:
                values.append(math.nan)
                differences.append(None)
                continue
            other = _task_auc(table, task)
            gained, error = other.minus(first, paired=same_rows(tables[0], table, task))
            values.append(other.value)
            half = support.quantile * error
            differences.append((gained, gained - half, gained + half))
        found.append(Compared(task, label_of("auc"), values, differences, unsure=support.unsure))
    return found


def _task_auc(table: PredictionsTable, task: str) -> Estimate:
    return auc_estimate(table.labels(task), table.predicted(task), clusters_of(table.users, len(table)))


def compare_html(
    runs: Sequence[str | Path], statistics: Sequence[Compared] | None, out: str | Path, *,
    png: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write several runs side by side.

    Args:
        runs: run directories, two or more; the others are held against the first.
        statistics: what they are compared by, such as paired bootstraps; None: each binary task's AUC, paired by row
            with the standard error over users.
        out: the HTML file.
        png: a folder into which the pictures also go.

    Returns:
        The file.

    Raises:
        ConfigError: fewer than two runs, or matplotlib or Jinja2 is not installed.
        DataError: a folder holds no run.
    """
    if len(runs) < 2:
        raise ConfigError("to compare takes two runs or more")
    studio = Studio(None if png is None else Path(png))
    contents = [read_contents(folder) for folder in runs]
    names = run_names([run.folder for run in contents])
    found = compared_aucs(contents) if statistics is None else list(statistics)
    answers = _in_doubt(names, contents, _answers(names, found))
    page = render(
        "compare.html", names=names, answers=answers, split=contents[0].split,
        sections=_sections(contents, names, found, studio),
        notes=list(dict.fromkeys(f"{n}: {m}" for n, run in zip(names, contents, strict=True) for m in _lacks(run))),
    )  # fmt: skip
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return path


def _lacks(run: RunContents) -> list[str]:
    anew = "its fused score was changed after its rows were judged: `mtcl fuse RUN_DIR --rejudge` judges them by it."
    return [*run.missing, *([anew] if run.fused_anew else [])]


def run_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart.

    Example:
        >>> run_names([Path("a/run"), Path("b/run"), Path("c")])
        ['a/run', 'b/run', 'c']
    """
    parts = [folder.resolve().parts for folder in folders]
    short = [str(Path(*p[-1:])) for p in parts]
    for depth in range(2, 4):  # a longer name would not fit a picture
        if len(set(short)) == len(short):
            break
        doubled = {name for name in short if short.count(name) > 1}
        short = [str(Path(*p[-depth:])) if name in doubled else name for name, p in zip(short, parts, strict=True)]
    return [f"{name} ({n})" if short.count(name) > 1 else name for n, name in enumerate(short, 1)]


def _answers(names: Sequence[str], found: Sequence[Compared]) -> list[Answer]:
    answers = []
    for r, name in enumerate(names[1:], 1):
        question = f"Is {name} better than {names[0]}?"
        judged = [c for c in found if r <= len(c.differences) and c.differences[r - 1] is not None]
        if not judged:
            answers.append(Answer(question, "Not known", "unknown", ["There is nothing to compare them by."]))
            continue
        signs = {1: "better", -1: "worse", 0: "too close to call"}
        groups = {s: [f"{c.name} ({c.metric})" for c in judged if c.sign(r) == s and not c.unsure] for s in signs}
        lines = [f"{word.capitalize()}: {listed(groups[s])}." for s, word in signs.items() if groups[s]]
        if rare := list(dict.fromkeys(f"{c.name} ({c.metric}), {c.unsure}" for c in judged if c.unsure)):
            lines.append(f"Cannot be sure: {listed(rare)}.")
        judged = [c for c in judged if not c.unsure]
        better, worse = len(groups[1]), len(groups[-1])
        if better and not worse:
            answers.append(Answer(question, f"Yes, on {better} of {len(judged)}", "good", lines))
        elif worse and not better:
            answers.append(Answer(question, f"No, worse on {worse} of {len(judged)}", "bad", lines))
        elif rare and not judged:
            answers.append(Answer(question, "Not known: too few events", "unknown", lines))
        elif better:
            answers.append(Answer(question, f"Better on {better}, worse on {worse}", "mixed", lines))
        else:
            answers.append(Answer(question, "No difference that counts", "mixed", lines))
    return answers


def _in_doubt(names: Sequence[str], runs: Sequence[RunContents], answers: Sequence[Answer]) -> list[Answer]:
    """The answers, after what puts the figures of the first run or of the one in question in doubt."""
    doubts = [[f"{name}: {line}" for line in run.doubts] for name, run in zip(names, runs, strict=True)]
    return [in_doubt(answer, [*doubts[0], *of]) for answer, of in zip(answers, doubts[1:], strict=True)]


def _sections(
    runs: Sequence[RunContents], names: Sequence[str], found: Sequence[Compared], studio: Studio
) -> list[Section]:
    compared = Section("compared", "What differs, and by how much")
    if found:
        compared.tables.append(_compared_table(names, found))
        for c in found:
            values = list(enumerate(zip(names, c.values, strict=True)))
            rows = {n: {c.metric: (float(v), _error(c, r))} for r, (n, v) in values if math.isfinite(v)}
            if rows and c.metric.lower() == "auc":
                compared.pictures.append(
                    dots(studio, f"compared {c.name}", f"AUC of {c.name}", f"AUC of {c.name}", rows, guess=0.5)
                )
        if compared.pictures:
            compared.text.append(
                f"Bars, of the runs after {names[0]}, are 95% intervals of their difference to it, drawn around them."
            )
    else:
        compared.missing.append("There are no predictions of the same task in these runs: nothing was compared.")
    tasks = Section(
        "tasks", "The tasks side by side", tables=_metric_tables(runs, names) + _knowable_tables(runs, names)
    )
    learning = Section("learning", "How training went", pictures=_curves(runs, names, studio))
    if not learning.pictures:
        learning.missing.append("No epoch was evaluated.")
    settings = Section("settings", "What was set differently", tables=[_settings_table(runs, names)])
    if not settings.tables[0].rows:
        settings = Section("settings", "What was set differently", missing=["Their YAML is the same."])
    costs = [(name, table) for name, run in zip(names, runs, strict=True) for table in cost_tables(run)[:1]]
    cost = Section("cost", "What they cost", tables=[Table(f"{t.caption} of {n}", t.columns, t.rows) for n, t in costs])
    return [compared, tasks, learning, settings, cost]


def _error(c: Compared, run: int) -> float:
    found = c.differences[run - 1] if 0 < run <= len(c.differences) else None
    return math.nan if found is None else (found[2] - found[1]) / (2 * SURE)


def _compared_table(names: Sequence[str], found: Sequence[Compared]) -> Table:
    rows: list[list[str]] = []
    tones: dict[tuple[int, int], str] = {}
    for r, c in enumerate(found):
        cells = [number(v) for v in c.values]
        for run in range(1, len(names)):
            gained = c.differences[run - 1] if run <= len(c.differences) else None
            span = "" if gained is None or math.isnan(gained[1]) else f" ({number(gained[1])} to {number(gained[2])})"
            cells.append("–" if gained is None else f"{number(gained[0])}{span}")
            if c.unsure:
                cells[-1] += f" ({c.unsure})"
                tones[r, 1 + len(names) + run] = "few"
            elif sign := c.sign(run):
                tones[r, 1 + len(names) + run] = "good" if sign > 0 else "bad"
        rows.append([c.name, c.metric, *cells])
    gains = [f"{name} less {names[0]}" for name in names[1:]]
    tested = ", all tested together (Holm)" * any(c.signs is not None for c in found)
    note = f"With 95% intervals. ▲ is better than the first run, ▼ worse{tested}; the rest is too close to call."
    if any(c.unsure for c in found):
        note += " Grey: too few events to be sure."
    return Table("Compared", ["of", "metric", *names, *gains], rows, note, tones)


def _metric_tables(runs: Sequence[RunContents], names: Sequence[str]) -> list[Table]:
    tables = []
    for task in dict.fromkeys(task for run in runs for task in run.of_tasks):
        of = [run.of_tasks.get(task) or {} for run in runs]
        keys = [k for k in dict.fromkeys(k for m in of for k in m) if k not in _COUNTS]
        rows = [[name, *(number(m.get(k)) for k in keys)] for name, m in zip(names, of, strict=True)]
        if keys:
            tables.append(Table(task, ["run", *map(label_of, keys)], rows))
    return tables


def _knowable_tables(runs: Sequence[RunContents], names: Sequence[str]) -> list[Table]:
    """Of runs on synthetic worlds: a line for each task, and for the fused score."""
    known = [known_of_all(run) for run in runs]
    of = list(dict.fromkeys(name for shares in known for name in shares))
    rows = [[name, *("–" if name not in shares else f"{shares[name]:.1%}" for shares in known)] for name in of]
    return [Table("Known, of what is knowable", ["of", *names], rows)] if rows else []


def _curves(runs: Sequence[RunContents], names: Sequence[str], studio: Studio) -> list[Picture]:
    pictures = []
    for task in dict.fromkeys(task for run in runs for task in run.kinds):
        lines: dict[str, list[float]] = {}
        label = ""
        for name, run in zip(names[:_CURVES], runs, strict=False):
            epochs = [epoch.get(task) or {} for epoch in run.history.get("epochs") or []]
            metric = next((m for epoch in epochs if (m := main_metric(epoch))), None)
            if metric and label in ("", label_of(metric)):
                label = label_of(metric)
                lines[name] = [np.nan if e.get(metric) is None else float(e[metric]) for e in epochs]
        if not lines:
            continue

        def paint(axes: Axes, c: Colours, lines: dict[str, list[float]] = lines, label: str = label) -> None:
            for role, (name, values) in zip("abcd", lines.items(), strict=False):
                axes.plot(
                    range(1, len(values) + 1), values, color=c[role], linestyle=DASHES[role], marker=MARKERS[role],
                    markersize=3.5, label=name,
                )  # fmt: skip
            axes.set(xlabel="epoch", ylabel=f"{label} on validation")
            axes.legend()
            ticks(axes.xaxis, 6, integer=True)

        said = "; ".join(f"{n} ends at {v[-1]:.4f}" for n, v in lines.items())
        alt = f"{label} of {task} on validation by epoch: {said}."
        pictures.append(studio.draw(f"learning {task}", task, alt, paint, margins=(0.66, 0.12, 0.44, 0.1)))
    return pictures


def _settings_table(runs: Sequence[RunContents], names: Sequence[str]) -> Table:
    flat = [_flat(run.config) for run in runs]
    keys = list(dict.fromkeys(k for of in flat for k in of))
    rows = [
        [key, *(str(of.get(key, "–")) for of in flat)] for key in keys if len({str(of.get(key)) for of in flat}) > 1
    ]
    return Table("Keys of the YAML whose values differ", ["key", *names], rows)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a YAML by dotted key; lists by number, or by their parts' names."""
    if isinstance(value, Mapping):
        pairs = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, (Mapping, list)) for v in value):
        pairs = [(str(v.get("name", n)) if isinstance(v, Mapping) else str(n), v) for n, v in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return found
