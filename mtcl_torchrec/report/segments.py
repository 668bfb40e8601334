"""How well each task is predicted for parts of the rows: cold items, new users, hours, and what else the rows tell."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from mtcl_torchrec.evaluation.predictions_file import PredictionsTable
from mtcl_torchrec.report.errors import auc_estimate, clusters_of

FEWEST = 50  # rows of a segment that is shown
MOST = 24  # values of a column that are shown, the most frequent ones


def segment_masks(table: PredictionsTable) -> dict[str, dict[str, np.ndarray]]:
    """Heading -> value -> (N,) bool: the rows of each segment.

    Items by clicks in training and users by whether they were in it, where the table knows; and every ``segment.``
    column.
    """
    frame, found = table.frame, {}
    if table.popularity is not None:
        clicks = table.popularity
        masks = {"not in training": np.isnan(clicks)} if "item_seen" in frame else {}
        known = np.nan_to_num(clicks)
        some = known[known > 0]
        if len(some):
            low, high = (float(q) for q in np.quantile(some, [1 / 3, 2 / 3]))
            masks |= {
                "no click in training": (known == 0) & ~masks.get("not in training", np.zeros(len(known), bool)),
                f"1 to {low:,.0f} clicks": (known > 0) & (known <= low),
                f"up to {high:,.0f}": (known > low) & (known <= high),
                "more": known > high,
            }
        found["items"] = masks
    for column, heading, words in (("item_seen", "items", "not in training"), ("user_seen", "users", "new")):
        if column in frame:
            seen = frame[column].to_numpy(bool)
            found.setdefault(heading, {})[words] = ~seen
            if heading == "users":
                found[heading]["in training"] = seen
    for column in [c for c in frame if str(c).startswith("segment.")]:
        values = frame[column]
        counts = values.value_counts()
        kept = sorted(counts.index[:MOST], key=lambda v: (isinstance(v, str), v))
        found[str(column).removeprefix("segment.")] = {_said(v): (values == v).to_numpy(bool) for v in kept}
    shown = {h: {v: m for v, m in masks.items() if m.sum() >= FEWEST} for h, masks in found.items()}
    return {heading: masks for heading, masks in shown.items() if len(masks) > 1}


def _said(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if not pd.isna(value) else "unknown"


def segment_aucs(table: PredictionsTable, tasks: list[str], mask: np.ndarray) -> dict[str, tuple[float, float]]:
    """Binary task -> AUC and standard error on some rows; NaN where only one class is there."""
    clusters = clusters_of(None if table.users is None else table.users[mask], int(mask.sum()))
    found = {}
    for task in tasks:
        e = auc_estimate(table.labels(task)[mask], table.predicted(task)[mask], clusters)
        found[task] = (e.value, e.error if not math.isnan(e.value) else math.nan)
    return found
