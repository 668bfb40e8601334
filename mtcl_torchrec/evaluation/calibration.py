"""How far predictions are from what happens, before and after calibration: all rows, and those that would be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from rich.console import Console

from mtcl_torchrec.evaluation.metrics import BINS, Metrics, expected_calibration_error, mass_edges
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.evaluation.report import user_groups
from mtcl_torchrec.schema import Schema, Task, chain_links


@dataclass
class CalibrationReport:
    """Calibration of one split.

    Args:
        tasks: task, or ``"buy|click"`` on the rows where ``click`` happened -> ``"before"`` and ``"after"`` -> numbers
            on all rows, see `calibration_numbers`.
        shown: the same on the rows among the first `k` of their request, ranked by the fused score after calibration;
            empty where there is no score or no request is known.
        k: how many of a request are shown.
        rows: how many there are.
    """

    tasks: dict[str, dict[str, Metrics]]
    shown: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    k: int = 10
    rows: int = 0


def calibration_numbers(
    task: Task, labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None = None
) -> Metrics:
    """Calibration over the rows whose label is present.

    Args:
        labels: (N,) float, NaN where missing.
        predicted: (N,) probability or value, or (N, C) class probabilities: then the probability of the most probable
            class is compared with whether it is the right one.
        weights: (N,) sample weights, None is 1.

    Returns:
        ratio: Σ predicted / Σ labels.  ece_mass, ece_width: expected calibration error in 15 bins that hold equally
        many rows, and, of probabilities, in 15 equally wide ones.  labels: how many there are.
    """
    y, p = labels.astype(np.float64), predicted.astype(np.float64)
    if p.ndim == 2:
        y, p = np.where(np.isnan(y), np.nan, p.argmax(1) == y), p.max(1)
    weights = np.ones(len(y)) if weights is None else weights.astype(np.float64)
    present = ~np.isnan(y) & (weights > 0)
    y, p, weights = y[present], p[present], weights[present]
    numbers: Metrics = {"labels": float(len(y)), "ratio": np.nan, "ece_mass": np.nan, "ece_width": np.nan}
    if len(y) == 0:
        return numbers
    happened = float((weights * y).sum())
    numbers["ratio"] = float((weights * p).sum()) / happened if happened else np.nan
    numbers["ece_mass"] = expected_calibration_error(y, p, weights, mass_edges(p))
    if task.kind != "regression":
        numbers["ece_width"] = expected_calibration_error(y, p, weights, np.arange(1, BINS) / BINS)
    return numbers


def shown_rows(scores: np.ndarray, requests: np.ndarray, k: int) -> np.ndarray:
    """(N,) bool: the k rows of each request with the highest scores; among equal ones, the first.

    Args:
        scores: (N,).
        requests: (N,) keys; rows of no known request (NaN) are not shown.

    Example:
        >>> shown_rows(np.array([0.2, 0.9, 0.9, 0.1]), np.array([1.0, 1.0, 1.0, 2.0]), 1)
        array([False,  True, False,  True])
    """
    frame = pd.DataFrame({"request": requests, "score": scores})
    rank = frame.groupby("request")["score"].rank(method="first", ascending=False)
    return (rank <= k).to_numpy()


def request_groups(schema: Schema, frame: pd.DataFrame) -> np.ndarray | None:
    """Keys of the rows that are ranked against each other: the request's column, else the user's; None without both."""
    if schema.request not in (None, schema.user) and schema.request in frame:
        codes = pd.factorize(frame[schema.request])[0].astype(np.float64)
        codes[codes < 0] = np.nan
        return codes
    return user_groups(schema, frame)


def report_calibration(
    tasks: Sequence[Task],
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    labels: np.ndarray,
    requests: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    *,
    only: Sequence[str] | None = None,
    k: int = 10,
) -> CalibrationReport:
    """Compare predictions before and after calibration.

    Args:
        before, after: what `mtcl_torchrec.evaluation.predict.predict` returned; the scores after decide what is shown.
        labels: (N, T) in the order of `tasks`.
        requests: (N,) from `request_groups`.
        weights: (N, T) sample weights.
        only: names of the tasks, and of conditional predictions, to report; None is all.
        k: how many rows of a request are shown.
    """
    columns = {task.name: (i, task, labels[:, i]) for i, task in enumerate(tasks)}
    for child, parent in chain_links(tasks):
        name = tasks[child].conditional_name
        if name is not None:
            columns[name] = (child, tasks[child], np.where(labels[:, parent] == 1, labels[:, child], np.nan))

    def numbers(of: np.ndarray | slice) -> dict[str, dict[str, Metrics]]:
        return {
            name: {
                when: calibration_numbers(task, label[of], out[name][of], None if weights is None else weights[of, i])
                for when, out in (("before", before), ("after", after))
            }
            for name, (i, task, label) in columns.items()
            if only is None or name in only
        }

    known = "score" in after and requests is not None
    shown = numbers(shown_rows(after["score"], requests, k)) if known and requests is not None else {}
    return CalibrationReport(numbers(slice(None)), shown, k, len(labels))


def print_calibration(report: CalibrationReport, title: str, console: Console | None = None) -> None:
    """Print the numbers as tables: all rows, then those that are shown."""
    console = console or Console()
    parts = [(f"Calibration, {title}: all {report.rows:,} rows", report.tasks)]
    parts += [(f"The first {report.k} of each request by the fused score", report.shown)]
    for heading, numbers in parts:
        if not numbers:
            continue
        columns = ["ratio", "after", "ECE mass", "after", "ECE width", "after", "labels"]
        table = plain_table(heading, ["task", *columns])
        for name, of in numbers.items():
            cells = [cell(of[when][key]) for key in ("ratio", "ece_mass", "ece_width") for when in ("before", "after")]
            table.add_row(name, *cells, f"{int(of['after']['labels']):,}")
        console.print(table, "")


def cell(value: float) -> str:
    """A number of four digits; a dash where it is not known."""
    return "–" if np.isnan(value) else f"{value:.4f}"
