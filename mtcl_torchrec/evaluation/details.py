"""The rest of an evaluation as tables: decisions, what is shown, segments; and runs compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from mtcl_torchrec.evaluation.compare import Difference
from mtcl_torchrec.evaluation.confidence import PLUS_MINUS, plus_minus
from mtcl_torchrec.evaluation.metrics import Metrics
from mtcl_torchrec.evaluation.naming import bounds_of, label_of, parts_of
from mtcl_torchrec.evaluation.plain_table import print_columns
from mtcl_torchrec.evaluation.report import Evaluation, cell, ranked_events, told
from mtcl_torchrec.evaluation.resampled import RANKING
from mtcl_torchrec.evaluation.segments import BESIDE, QUALITY

_PROBABILITIES = ("pr_auc", "base_rate", "brier", "ece")
_DECISIONS = ("threshold", "accuracy", "majority", "precision", "recall", "f1", "f1_all_yes")
_SHOWN = ("rate", "ndcg", "recall", "hit")
_PLACES = ("mrr", "map")
_LONG = 12  # values of a segment: from there on its table is kept narrow, a row a value


def print_details(evaluation: Evaluation, console: Console, k: Sequence[int]) -> None:
    """Print what `mtcl_torchrec.evaluation.report.print_evaluation` leaves out of tasks and ranking."""
    binary = {n: m for n, m in evaluation.tasks.items() if evaluation.kinds[n] == "binary" and "brier" in m}
    _print_metrics(
        "Probabilities, and how rare the event is", "binary task", binary, _PROBABILITIES, evaluation, console
    )
    decided = {n: m for n, m in binary.items() if "threshold" in m}
    title = "A yes from the threshold on that was best on validation; majority and all yes: what knowing nothing gets"
    _print_metrics(title, "binary task", decided, _DECISIONS, evaluation, console)
    for kind, keys in (("multiclass", ("ece",)), ("regression", ("xauc", "calibration"))):
        of_kind = {n: m for n, m in evaluation.tasks.items() if evaluation.kinds[n] == kind}
        _print_metrics("", f"{kind} task", of_kind, keys, evaluation, console)
    for n in k:
        _print_shown(evaluation, n, console)
    _print_places(evaluation, console)


def _print_metrics(
    title: str, first: str, rows: Mapping[str, Metrics], keys: Sequence[str], evaluation: Evaluation, console: Console
) -> None:
    if not rows:
        return
    cells = [[name, *(told(evaluation, name, key, of.get(key)) for key in keys)] for name, of in rows.items()]
    print_columns(console, title, [first, *(label_of(key, short=True) for key in keys)], cells)


def _of_rule(rule: str) -> str:
    return "ranking" if rule == "fused" else ""  # intervals are of the fused score


def _print_shown(evaluation: Evaluation, k: int, console: Console) -> None:
    rules = [rule for rule, metrics in evaluation.ranking.items() if f"choice@{k}" in metrics]
    if not rules:
        return
    first = evaluation.ranking[rules[0]]
    requests, more = int(first["requests"]), first[f"choice@{k}"]
    title = f"Shown: the first {k} of each of {requests:,} requests, of which {more:.0%} have more"
    headers = [label_of(m, short=True) if rule == rules[0] else rule for m in _SHOWN for rule in rules]
    judged = [n.removeprefix(f"rate@{k} ") for n in first if n.startswith(f"rate@{k} ")]
    rows = []
    for name, heading in ranked_events(evaluation, judged).items():
        keys = [(rule, f"{m}@{k} {name}") for m in _SHOWN for rule in rules]
        rows.append([heading, *(told(evaluation, _of_rule(r), key, evaluation.ranking[r].get(key)) for r, key in keys)])
    if rows:
        print_columns(console, title, ["event", *headers], rows)
    for measure in ("value", "coverage", "novelty"):
        said = []
        for rule in rules:
            metric, metrics = f"{measure}@{k}", evaluation.ranking[rule]
            if (value := metrics.get(metric)) is not None:
                sure = evaluation.intervals.get(_of_rule(rule), {}).get(metric)
                half = metrics.get(f"{metric} half") if sure is None else sure.half
                said.append(f"{plus_minus(value, half, bounds=bounds_of(metric))} ({rule})")
        if said:
            console.print(f"{label_of(f'{measure}@{k}')}: {', '.join(said)}", highlight=False)
    if any(f"value@{k} half" in evaluation.ranking[rule] for rule in rules):
        console.print(_what_counts(evaluation.values), highlight=False, markup=False, soft_wrap=True)
    console.print()


def _what_counts(values: Mapping[str, float]) -> str:
    said = ", ".join(f"{task} {value:g}" for task, value in values.items())
    return f"value: what happened to the rows, worth {said}; {PLUS_MINUS}."


def _print_places(evaluation: Evaluation, console: Console) -> None:
    """Of what has no length: MRR and MAP."""
    rules = [rule for rule, metrics in evaluation.ranking.items() if any(m.startswith("mrr ") for m in metrics)]
    if not rules:
        return
    judged = [n.removeprefix("mrr ") for n in evaluation.ranking[rules[0]] if n.startswith("mrr ")]
    rows = []
    for name, heading in ranked_events(evaluation, judged).items():
        keys = [(rule, f"{m} {name}") for m in _PLACES for rule in rules]
        rows.append([heading, *(told(evaluation, _of_rule(r), key, evaluation.ranking[r].get(key)) for r, key in keys)])
    headers = [f"{label_of(m)} {rule}" for m in _PLACES for rule in rules]
    print_columns(console, "Where in a request the events are", ["event", *headers], rows)


def print_segments(evaluation: Evaluation, console: Console) -> None:
    """Print, by segment, the quality of each task with half of its interval, and of how many events that is; of classes
    and numbers also what `mtcl_torchrec.evaluation.segments.BESIDE` says."""
    if not evaluation.segments:
        return
    keys = [QUALITY[kind] for kind in dict.fromkeys(evaluation.kinds.values())]
    what = ", ".join(label_of(key) for key in dict.fromkeys(keys))
    for name, values in evaluation.segments.items():
        short = len(values) > _LONG
        tasks = list(dict.fromkeys(task for of in values.values() for task in of["quality"]))
        columns = [
            (t, metric) for t in tasks for metric in ("", BESIDE.get(evaluation.kinds.get(t, ""))) if metric is not None
        ]
        rows: list[list[str | Text]] = []
        for value, of in values.items():
            cells = [_of_segment(of["quality"].get(t), evaluation.kinds[t], metric, short) for t, metric in columns]
            rows.append([value, f"{of['rows']:,}", *cells])
        heads = [f"{t} {label_of(metric)}" if metric else t if short else f"{t} (events)" for t, metric in columns]
        print_columns(console, f"By {name}: {what}", [name, "rows", *heads], rows)
    console.print(
        f"{PLUS_MINUS}; in brackets events (of classes and numbers: labels); ?: too few of them to be sure.\n",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _of_segment(of: Mapping[str, Any] | None, kind: str, beside: str, short: bool) -> str | Text:
    """A cell; of a table of many rows, as narrow as can be.

    Args:
        beside: the metric beside the first that is told; empty for that one.
    """
    if of is None:
        return "–"
    told, metric = of["beside"][beside] if beside else of, beside or QUALITY[kind]
    said = plus_minus(told["value"], told["half"], 2 if short else 3, bounds_of(metric))
    if short:
        said = said.replace(" ± ", "±")
    elif not beside:
        said = f"{said} ({of['events']:,})"
    return Text(f"{said} ?", style="dim") if of["unsure"] else said


def print_differences(differences: Sequence[Difference], names: tuple[str, str], console: Console) -> None:
    """Print what `mtcl_torchrec.evaluation.compare.compare_tables` found."""
    heads = ["A", "B", "B - A", "p (Holm)", "better"]
    title = f"{names[1]} (B) against {names[0]} (A), on the same rows"
    for ranked, first in ((False, "task"), (True, "ranked by the fused score")):
        of_kind = [d for d in differences if (d.of == RANKING) == ranked]
        rows = [[Text(cell, style="dim" if d.unsure or d.equal else "") for cell in _told(d)] for d in of_kind]
        if rows:
            print_columns(console, title, [first, *heads], rows)
            title = ""
    few: dict[str, list[str]] = {}
    for d in differences:
        if d.unsure:
            few.setdefault(d.unsure, []).append(_name(d))
    for why, of in few.items():
        console.print(f"unsure: {why}, of {', '.join(of)}", highlight=False, markup=False, soft_wrap=True)
    costs = dict.fromkeys(parts_of(d.metric).of for d in differences if d.unwanted)
    if costs:
        console.print(
            f"{', '.join(costs)}: worth less than nothing; of a ranking, less of it is better.",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    known = sum(d.p == d.p and not d.equal for d in differences)
    if not known and any(d.equal for d in differences):
        console.print(
            f"{names[0]} and {names[1]} say the same of every row, as far as these metrics go.", highlight=False
        )
        return
    console.print(
        f"{PLUS_MINUS}.  {known} metrics are compared: of so many without any difference, {0.05 * known:.1f} would "
        "have p < 0.05 by chance.  p (Holm) allows for that; better: where it is below 0.05.  What is equal by "
        "construction, as where all rows of a request are shown, is left out.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _name(d: Difference) -> str:
    return label_of(d.metric) if d.of == RANKING else f"{d.of} {label_of(d.metric)}"


def _told(d: Difference) -> list[str]:
    apart = "–" if d.difference != d.difference else f"{d.difference:+z.4f}"
    if d.low == d.low and not d.equal:
        apart += f" ± {(d.high - d.low) / 2:.4f}"
    better = "unsure" if d.unsure else "equal" if d.equal else "" if d.better is None else d.better.upper()
    return [_name(d), cell(d.a), cell(d.b), apart, cell(d.p_holm), better]
