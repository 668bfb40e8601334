"""How well rows are ranked by how much was known of them: of known and new items, of known and new users."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from rich.console import Console

from mtcl_torchrec.data.cold_split import SEGMENTS
from mtcl_torchrec.data.popularity import SMOOTHING, Popularity
from mtcl_torchrec.evaluation.metrics import auc
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.schema import Task

NEW_USERS = "new users"
EXPLAINED = f"{', '.join(SEGMENTS)}: items as training met them, for known users; {NEW_USERS}: known items only"


def smoothed_popularity(items: pd.Series, labels: pd.Series, smoothing: float = SMOOTHING) -> pd.Series:
    """Item -> what ranks by popularity; see `mtcl_torchrec.data.popularity.Popularity`.

    Args:
        items: (N,) of the training rows.
        labels: (N,) 0 or 1.

    Example:
        >>> smoothed_popularity(pd.Series([1, 1, 2]), pd.Series([1, 1, 1]), smoothing=1).tolist()
        [1.0, 1.0]
    """
    event = Task.binary("event")
    return Popularity.count(items, [event], labels.to_numpy(np.float64)[:, None], smoothing=smoothing).rates["event"]


def segment_masks(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """(N,) bool by segment: known users and items of each of `mtcl_torchrec.data.cold_split.SEGMENTS`; and new users
    with known items.

    Args:
        rows: the test rows of `mtcl_torchrec.data.cold_split.cold_split`.

    Example:
        >>> rows = pd.DataFrame({"item_segment": ["head", "never seen", "tail"], "new_user": [False, False, True]})
        >>> {name: mask.sum().item() for name, mask in segment_masks(rows).items()}
        {'head': 1, 'tail': 0, 'never seen': 1, 'new users': 1}
    """
    new, segment = rows["new_user"].to_numpy(dtype=bool), rows["item_segment"].to_numpy()
    masks: dict[str, np.ndarray] = {name: ~new & (segment == name) for name in SEGMENTS}
    return {**masks, NEW_USERS: new & (segment != SEGMENTS[-1])}


def print_segments(
    title: str,
    labels: np.ndarray,
    rankings: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    console: Console,
) -> None:
    """Print the AUC of each ranking on the rows of each segment.

    Args:
        labels: (N,) 0 or 1.
        rankings: what ranks -> (N,) scores.
        masks: segment -> (N,) bool.
    """
    table = plain_table(title, ["ranked by", *masks])
    for name, scores in rankings.items():
        of_segments = (auc(labels[mask], scores[mask]) for mask in masks.values())
        table.add_row(name, *("–" if np.isnan(value) else f"{value:.4f}" for value in of_segments))
    table.add_row("rows", *(f"{int(mask.sum()):,}" for mask in masks.values()))
    console.print(table)
