"""How well each task is predicted for parts of the rows: cold items, new users, hours, and what else the rows tell."""

from __future__ import annotations

import math

import numpy as np

from mtcl_torchrec.evaluation.estimates import auc_estimate, clusters_of
from mtcl_torchrec.evaluation.predictions_file import PredictionsTable

FEWEST = 50  # rows of a segment that is shown
EVENTS = 10  # and as many others: of fewer, an AUC and its error say nothing
MOST = 24  # values of a column that are shown, the most frequent ones


def segment_masks(table: PredictionsTable) -> dict[str, dict[str, np.ndarray]]:
    """Heading -> value -> (N,) bool: the rows of each segment.

    Items by events in training (of the first binary task) and users by whether they were in it, where the table knows;
    and every ``segment.`` column.
    """
    frame = table.frame
    found: dict[str, dict[str, np.ndarray]] = {}
    if table.popularity is not None:
        event = next((task.name for task in table.tasks if task.kind == "binary"), "seen")
        masks = {"not in training": np.isnan(table.popularity)} if "item_seen" in frame else {}
        known = np.nan_to_num(table.popularity)
        some = known[known > 0]
        if len(some):
            low, high = (float(q) for q in np.quantile(some, [1 / 3, 2 / 3]))
            masks |= {
                f"never {event} in training": (known == 0) & ~masks.get("not in training", np.zeros(len(known), bool)),
                f"{event} {_times(low)}": (known > 0) & (known <= low),
                f"{event} up to {high:,.0f} times": (known > low) & (known <= high),
                "more often": known > high,
            }
        found["items"] = masks
    for column, heading, words in (("item_seen", "items", "not in training"), ("user_seen", "users", "new")):
        if column in frame:
            seen = frame[column].to_numpy(bool)
            found.setdefault(heading, {})[words] = ~seen
            if heading == "users":
                found[heading]["in training"] = seen
    for column in [c for c in map(str, frame) if c.startswith("segment.")]:
        values = frame[column]
        counts = values.value_counts()
        kept = sorted(counts.index[:MOST], key=lambda v: (isinstance(v, str), v))
        found[column.removeprefix("segment.")] = {
            _said(value): (values == value).to_numpy(bool, na_value=False) for value in kept
        }
    shown = {h: {v: m for v, m in masks.items() if m.sum() >= FEWEST} for h, masks in found.items()}
    return {heading: masks for heading, masks in shown.items() if len(masks) > 1}


def _times(most: float) -> str:
    return "once" if most <= 1 else f"1 to {most:,.0f} times"


def _said(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def segment_aucs(table: PredictionsTable, tasks: list[str], mask: np.ndarray) -> dict[str, tuple[float, float]]:
    """Binary task -> AUC and standard error on some rows; NaN where there are too few events."""
    clusters = clusters_of(None if table.users is None else table.users[mask], int(mask.sum()))
    found = {}
    for task in tasks:
        labels = table.labels(task)[mask]
        if min((labels > 0).sum(), (labels == 0).sum()) < EVENTS:
            found[task] = (math.nan, math.nan)
            continue
        e = auc_estimate(labels, table.predicted(task)[mask], clusters)
        found[task] = (e.value, e.error)
    return found
