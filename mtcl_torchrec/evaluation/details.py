"""The rest of an evaluation as tables: decisions, what is shown, segments, confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from mtcl_torchrec.evaluation.bootstrap import Interval
from mtcl_torchrec.evaluation.compare import Difference
from mtcl_torchrec.evaluation.metrics import Metrics, task_quality
from mtcl_torchrec.evaluation.report import Evaluation, cell, plain_table, ranked_events
from mtcl_torchrec.schema import Task

_PROBABILITIES = {"PR-AUC": "pr_auc", "base rate": "base_rate", "Brier": "brier", "ECE": "ece"}
_DECISIONS = {
    "from": "threshold", "accuracy": "accuracy", "majority": "majority", "precis.": "precision", "recall": "recall",
    "F1": "f1", "all yes": "f1_all_yes",
}  # fmt: skip
_SHOWN = {"rate": "rate", "NDCG": "ndcg", "recall": "recall", "hit": "hit"}


def print_details(evaluation: Evaluation, console: Console, k: Sequence[int]) -> None:
    """Print what `mtcl_torchrec.evaluation.report.print_evaluation` leaves out of tasks and ranking."""
    binary = {n: m for n, m in evaluation.tasks.items() if evaluation.kinds[n] == "binary" and "brier" in m}
    _print_metrics("Probabilities, and how rare the event is", "binary task", binary, _PROBABILITIES, console)
    decided = {n: m for n, m in binary.items() if "threshold" in m}
    title = "A yes from the threshold on that was best on validation; majority and all yes: what knowing nothing gets"
    _print_metrics(title, "binary task", decided, _DECISIONS, console)
    for kind, columns in (("multiclass", {"ECE": "ece"}), ("regression", {"XAUC": "xauc", "calib.": "calibration"})):
        of_kind = {n: m for n, m in evaluation.tasks.items() if evaluation.kinds[n] == kind}
        _print_metrics("", f"{kind} task", of_kind, columns, console)
    for n in k:
        _print_shown(evaluation, n, console)


def _print_metrics(
    title: str, first: str, rows: Mapping[str, Metrics], columns: Mapping[str, str], console: Console
) -> None:
    if not rows:
        return
    table = plain_table(title, [first, *columns])
    for name, metrics in rows.items():
        table.add_row(name, *(cell(metrics.get(key)) for key in columns.values()))
    console.print(table, "")


def _print_shown(evaluation: Evaluation, k: int, console: Console) -> None:
    rules = [rule for rule, metrics in evaluation.ranking.items() if f"choice@{k}" in metrics]
    if not rules:
        return
    first = evaluation.ranking[rules[0]]
    requests, more = int(first["requests"]), first[f"choice@{k}"]
    title = f"Shown: the first {k} of each of {requests:,} requests, of which {more:.0%} have more"
    headers = [name if rule == rules[0] else rule for name in _SHOWN for rule in rules]
    table = plain_table(title, ["event", *headers])
    judged = [n.removeprefix(f"rate@{k} ") for n in first if n.startswith(f"rate@{k} ")]
    for name, heading in ranked_events(evaluation, judged).items():
        cells = [evaluation.ranking[rule][f"{m}@{k} {name}"] for m in _SHOWN.values() for rule in rules]
        table.add_row(heading, *map(cell, cells))
    console.print(table)
    sure = False
    for name in ("value", "coverage", "novelty"):
        told = []
        for rule in rules:
            metrics = evaluation.ranking[rule]
            if (value := metrics.get(f"{name}@{k}")) is not None:
                error = metrics.get(f"{name}@{k} error")
                told.append(f"{cell(value)}{'' if error is None else f' ± {cell(error)}'} ({rule})")
        if told:
            console.print(f"{name}@{k}: {', '.join(told)}", highlight=False)
            sure = sure or any("±" in of for of in told)
    console.print("± is one standard error.\n" if sure else "", highlight=False)


def print_segments(evaluation: Evaluation, console: Console) -> None:
    """Print, by segment, the quality of each task: AUC, 1 - NE of a multiclass one, R² of a regression."""
    tasks = [Task(name=n, kind="binary" if k == "multiclass" else k) for n, k in evaluation.kinds.items()]
    for name, values in evaluation.segments.items():
        table = plain_table(
            f"By {name}: AUC (multiclass: 1 - NE; regression: R²)", [name, "rows", *(task.name for task in tasks)]
        )
        for value, of in values.items():
            cells = []
            for task in tasks:
                metrics = of["tasks"].get(task.name, {})
                known = 1 - metrics["ne"] if evaluation.kinds[task.name] == "multiclass" and "ne" in metrics else None
                cells.append(cell(known if known is not None else task_quality(task, metrics)))
            table.add_row(value, f"{of['rows']:,}", *cells)
        console.print(table, "")


def print_intervals(intervals: Mapping[str, Mapping[str, Interval]], console: Console) -> None:
    """Print metrics with their 95 % intervals."""
    table = plain_table("95 % intervals, over users", ["of", "metric", "value", "from", "to"])
    for of, metrics in intervals.items():
        for metric, sure in metrics.items():
            table.add_row(of, metric, *map(cell, (sure.value, sure.low, sure.high)))
    console.print(table)


def print_differences(differences: Sequence[Difference], names: tuple[str, str], console: Console) -> None:
    """Print what `mtcl_torchrec.evaluation.compare.compare_tables` found."""
    table = plain_table(
        f"{names[1]} (B) against {names[0]} (A), on the same rows",
        ["of", "metric", "A", "B", "B - A", "95 % interval", "p", "p (Holm)", "better"],
    )
    for d in differences:
        interval = f"{d.low:+.4f} … {d.high:+.4f}" if d.low == d.low else "–"
        better = "" if d.better is None else d.better.upper()
        cells = [cell(d.a), cell(d.b), "–" if d.difference != d.difference else f"{d.difference:+.4f}", interval]
        table.add_row(d.of, d.metric, *cells, cell(d.p), cell(d.p_holm), better)
    console.print(table)
    known = sum(d.p == d.p for d in differences)
    if known and all(d.difference == 0 and d.low == d.high for d in differences if d.p == d.p):
        console.print(
            f"{names[0]} and {names[1]} say the same of every row, as far as these metrics go.", highlight=False
        )
        return
    console.print(
        f"{known} metrics are compared: of so many without any difference, {0.05 * known:.1f} would have p < 0.05 by "
        "chance.  p (Holm) allows for that; better: where it is below 0.05.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
