"""Tables of the page, as text: numbers as metrics.json has them, to four digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtcl_torchrec.evaluation.confidence import PLUS_MINUS, SURE, plain_number, plus_minus
from mtcl_torchrec.evaluation.naming import BASE, DECISIONS, OF_SHOWN, TASK_MEASURES, bounds_of, label_of, parts_of
from mtcl_torchrec.evaluation.rivals import HEAD, POPULARITY, sign_of, word_of
from mtcl_torchrec.report.contents import RunContents
from mtcl_torchrec.report.facts import Event, TaskFact, chosen_name, stored_error
from mtcl_torchrec.report.words import first_rows, rows_in_words

_TABLES = 10  # of a run that are named
_RULES = {"f1": "F1", "accuracy": "accuracy", "youden": "sensitivity + specificity (Youden)"}  # of thresholds
_OF_RULES = {
    "f1": "F1 looks for events: of a rare one, the best threshold says yes more often than it happens, and the "
    "accuracy is below that of always saying no; evaluation: {threshold: accuracy} in the run's YAML chooses by that.",
    "youden": "That looks for as large a share of the events as of the rest: of a rare event, the accuracy is below "
    "that of always saying no.",
}
_WHERE = "Where in a request the events are"
SURE_OF = (
    "auc",
    "gauc",
    "ne",
    "top1",
    "r2",
    "calibration",
)  # whose intervals are shown: of all is too much


@dataclass
class Table:
    """Rows of text under headings; the first column is what a row is about.

    Args:
        caption: above it, also for who hears the page.
        columns: headings.
        rows: cells, as many as headings.
        note: below it.
        tones: (row, column) -> how a cell is marked: ``"good"``, ``"bad"``, or ``"few"``, which is greyed.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    tones: dict[tuple[int, int], str] = field(default_factory=dict)


def number(value: Any, digits: int = 4) -> str:
    """A number as the page says it; see `mtcl_torchrec.evaluation.confidence.plain_number`."""
    return plain_number(value, digits)


def with_error(value: float | None, error: float | None, digits: int = 4, metric: str = "") -> str:
    """A number and half of its 95% interval, which does not pass the metric's bounds.

    Example:
        >>> with_error(0.7, 0.01), with_error(0.7, float("nan"))
        ('0.7000 ± 0.0196', '0.7000')
    """
    return plus_minus(value, None if error is None else SURE * error, digits, bounds_of(metric))


def task_tables(facts: Sequence[TaskFact], rule: str = "f1") -> list[Table]:
    """One for each kind of task; columns that no task has are left out.

    Args:
        rule: by which thresholds were chosen, see `mtcl_torchrec.evaluation.thresholds.best_threshold`.
    """
    tables = []
    for kind, shown in TASK_MEASURES.items():
        of_kind = [fact for fact in facts if fact.kind == kind]
        if not of_kind:
            continue
        there = [key for key in shown if any(key in fact.metrics for fact in of_kind)]
        rows = []
        for fact in of_kind:
            count = fact.metrics.get("count")
            cells = [
                with_error(
                    fact.metrics.get(key), fact.error(key) if key in SURE_OF and not fact.unsure else None, 4, key
                )
                for key in there
            ]
            rows.append(
                [fact.task, *cells, number(fact.metrics.get("base_rate")), "–" if count is None else f"{int(count):,}"]
            )
        columns = [f"{kind} task", *map(label_of, there), BASE[kind], "labels"]
        few = "".join(f"; none of {fact.task}: {fact.unsure}" for fact in of_kind if fact.unsure)
        note = f"{PLUS_MINUS}{few}." if any(fact.errors for fact in of_kind) else ""
        tables.append(Table(f"{kind.capitalize()} tasks", columns, rows, note))
        if kind == "binary":
            tables += _decisions(of_kind, rule)
    return tables


def _decisions(facts: Sequence[TaskFact], rule: str) -> list[Table]:
    there = [key for key in DECISIONS if any(key in fact.metrics for fact in facts)]
    if not there:
        return []
    rows = [[fact.task, *(number(fact.metrics.get(key)) for key in there)] for fact in facts]
    caption = f"Yes or no, from the threshold on that had the best {_RULES[rule]} on validation"
    note = _OF_RULES.get(rule, "")
    return [Table(caption, ["binary task", *map(label_of, there)], rows, note)]


def event_table(events: Sequence[Event]) -> Table | None:
    """The fused ranking beside each event's own head and popularity."""
    if not events:
        return None
    ways = list(dict.fromkeys(way for e in events for way in e.rankings))
    rows: list[list[str]] = []
    tones: dict[tuple[int, int], str] = {}
    for r, e in enumerate(events):
        name = ", ".join((e.task, *e.others)) + " (lowers the score)" * e.unwanted
        sure = not any(gap.unsure for gap in e.gaps)
        numbers = {way: (value, error if sure else math.nan) for way, (value, error) in e.rankings.items()}
        cells = [with_error(*numbers[way], metric=e.metric.lower()) if way in numbers else "–" for way in ways]
        against = {gap.against: gap for gap in e.gaps}
        for c, other in enumerate((HEAD, POPULARITY)):
            cells.append(word_of(against[other]) if other in against else "–")
            if other in against and (sign := sign_of(against[other])):
                tones[r, 2 + len(ways) + c] = "good" if sign > 0 else "bad"
        rows.append([name, e.metric, *cells])
    columns = ["event", "metric", *ways, "fused against own head", "fused against popularity"]
    return Table("The same rows in the order of the fused score, of the event's own head, and by popularity",
                 columns, rows, f"{PLUS_MINUS}; differences are of the same rows.", tones)  # fmt: skip


def shown_tables(run: RunContents) -> list[Table]:
    """What the first k rows of each request bring, by the fused score and by what it is compared with: a table for
    each k, and one for what is of no length."""
    ranking = {rule: of for rule, of in (run.evaluation.get("ranking") or {}).items() if of}
    measures: dict[str, list[tuple[str, str]]] = {}
    for key in dict.fromkeys(key for of in ranking.values() for key in of):
        parts = parts_of(key)
        if parts.measure in OF_SHOWN and parts.of != "half" and parts.of not in run.same_event:
            measures.setdefault(parts.k, []).append((key, label_of(key.replace(f"@{parts.k}", ""))))
    tables = []
    for k, found in measures.items():
        title = f"What {first_rows(int(k))} of each request bring{'s' * (k == '1')}" if k else _WHERE
        rows = []
        for key, label in found:
            halves = {rule: of.get(f"{key} half") for rule, of in ranking.items()}
            if not math.isnan(of_bootstrap := stored_error(run, "ranking", key)):
                halves["fused"] = SURE * of_bootstrap
            bounds = bounds_of(key)
            rows.append([label, *(plus_minus(of.get(key), halves[rule], 4, bounds) for rule, of in ranking.items())])
        choice = next((of.get(f"choice@{k}") for of in ranking.values()), None)
        note = (
            ""
            if choice is None
            else f"{choice:.0%} of the requests have more than {rows_in_words(int(k))} to choose from. "
        )
        note += f"{PLUS_MINUS}." if any("±" in cell for row in rows for cell in row) else ""
        tables.append(Table(title, ["measure", *ranking], rows, note))
    return tables


def tried_table(fitted: Mapping[str, Any]) -> Table | None:
    """What a fusion fitted after training was chosen from, on folds left out; None where none was fitted."""
    tried = [of for of in fitted.get("tried") or [] if isinstance(of, dict)]
    if not tried:
        return None
    target, chosen = str(fitted.get("target", "target")), chosen_name(fitted)
    rows = []
    for of in tried:
        name = f"{of['name']} (chosen)" if of["name"] == chosen else str(of["name"])
        numbers = [plus_minus(of.get("target"), of.get("half")), plus_minus(of.get("better"), of.get("better_half"))]
        rows.append([name, *numbers, str(of.get("broken") or "")])
    return Table(f"What was tried for {target}", ["ranked by", target, "better than the best head", "breaks"], rows,
                 f"On folds left out; {PLUS_MINUS}.")  # fmt: skip


def cost_tables(run: RunContents) -> list[Table]:
    """Speed, memory and size of a run, and its largest tables."""
    cost, seconds = run.metrics.get("cost") or {}, [s for s in run.history.get("seconds") or [] if s is not None]
    sizes = table_sizes(run)
    rows = []
    if seconds:
        rows.append(["training", f"{sum(seconds):,.1f} s in {len(seconds)} epoch{'s' * (len(seconds) > 1)}"])
        rows.append(["seconds per epoch", ", ".join(number(s, 1) for s in _some(seconds))])
    for key, label, digits, unit in (
        ("samples_per_second", "samples per second", 0, ""),
        ("first_step_s", "first step, not counted in them", 1, " s"),
        ("peak_memory_gb", "peak memory of a rank", 2, " GB"),
        ("peak_device_memory_gb", "peak memory of its GPU", 2, " GB"),
        ("dense_parameters", "dense parameters", 0, ""),
    ):
        if cost.get(key) is not None:
            rows.append([label, number(cost[key], digits) + unit])
    if cost.get("device"):
        ranks = int(cost.get("ranks") or 1)
        threads = f" of {cost['threads']} thread{'s' * (cost['threads'] > 1)}" if cost.get("threads") else ""
        rows.append(["ran on", f"{ranks} rank{'s' * (ranks > 1)}{threads} on {cost['device']}"])
    if cost.get("precision"):
        compiled = "" if cost.get("compile", "none") == "none" else ", compiled"
        rows.append(["computed", f"{cost['precision']}{compiled}, batches of {cost['batch_size']:,} rows a rank"])
    if sizes:
        total = sum(r * d for r, d in sizes.values())
        rows.append(["embedding tables", f"{len(sizes)} with {sum(r for r, _ in sizes.values()):,} rows"])
        rows.append(["parameters in tables", f"{total:,} ({total * 4 / 1e6:,.1f} MB as float32)"])
    tables = [Table("Cost", ["what", "how much"], rows)] if rows else []
    if sizes:
        largest = sorted(sizes.items(), key=lambda of: -of[1][0] * of[1][1])
        body = [[name, f"{r:,}", str(d), f"{r * d:,}"] for name, (r, d) in largest[:_TABLES]]
        note = f"and {len(largest) - _TABLES} smaller ones" if len(largest) > _TABLES else ""
        tables.append(Table("The largest tables", ["table", "rows", "dimensions", "parameters"], body, note))
    return tables


def _some(seconds: list[float], most: int = 12) -> list[float]:
    return seconds[:most]


def table_sizes(run: RunContents) -> dict[str, tuple[int, int]]:
    """Table -> rows and dimensions, of the sharding plan in the checkpoint; a shard of two ranks counts once."""
    sizes = {}
    for name, of in (run.about.get("plan") or {}).items():
        shards = of.get("shards") or [] if isinstance(of, dict) else []
        if shards:
            rows = max(int(s["row"]) + int(s["rows"]) for s in shards)
            sizes[str(name)] = (rows, max(int(s["column"]) + int(s["columns"]) for s in shards))
    return sizes


def origin_table(run: RunContents) -> Table:
    """What the run was made of and with."""
    about = run.about
    rows = [[name, str(v)] for name, v in (about.get("versions") or {}).items() if v is not None]
    if about.get("rows"):
        rows.append(["training data", str(about["rows"])])
    for split, table in run.predictions.items():
        rows.append([f"{split} split", f"{len(table):,} rows, {table.fingerprint}"])
    for key, label in (("ranks", "ranks"), ("batch_size", "batch size, rows a rank"), ("step", "steps")):
        if about.get(key) is not None:
            rows.append([label, f"{about[key]:,}"])
    if run.history.get("skipped_steps"):
        rows.append(["batches that trained nothing", f"{run.history['skipped_steps']:,}"])
    return Table("Versions and data", ["what", "which"], rows)
