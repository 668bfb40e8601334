"""Where baselines and a run differ beyond chance: the one family of comparisons that terminal and report conclude from.

What is concluded from is few and fixed: the main measure of each task and value@k, of all baselines beside the run.
These are tested together (Holm), so that a run with as many equal baselines as one likes is said to be beaten by one of
them in 5 of 100 cases, and not in half of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mtcl_torchrec.baselines.differences import Differences, differences
from mtcl_torchrec.evaluation.compare import corrected
from mtcl_torchrec.evaluation.naming import MAIN, parts_of
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.resampled import RANKING

# What is compared: (task or "ranking", metric).
Key = tuple[str, str]


def concluded_from(run: PredictionsTable, lengths: Sequence[int]) -> list[Key]:
    """The main measure of each task of a run, and value@k.

    Args:
        lengths: k, how many rows of a request are shown.

    Example:
        >>> import pandas as pd
        >>> from mtcl_torchrec.schema import Task
        >>> rows = pd.DataFrame({"label.like": [1.0], "label.stars": [4.0]})
        >>> concluded_from(PredictionsTable(rows, (Task.binary("like"), Task.regression("stars"))), [5])
        [('like', 'auc'), ('stars', 'r2'), ('ranking', 'value@5')]
    """
    return [*((task.name, MAIN[task.kind]) for task in run.tasks), *((RANKING, f"value@{k}") for k in lengths)]


def lengths_of(evaluation: Mapping[str, Any]) -> list[int]:
    """k of the value@k that an evaluation in metrics.json has.

    Example:
        >>> lengths_of({"ranking": {"fused": {"value@10": 1.0, "value@5": 0.8, "auc click": 0.7}}})
        [5, 10]
    """
    found = [parts_of(key) for key in (evaluation.get("ranking") or {}).get("fused") or {}]
    return sorted({int(parts.k) for parts in found if parts.measure == "value" and parts.k})


def against_run(
    run: PredictionsTable,
    baselines: Mapping[str, PredictionsTable],
    lengths: Sequence[int],
    *,
    also: Collection[Key] = (),
) -> dict[str, Differences]:
    """Baseline -> its differences to the run, paired; see `mtcl_torchrec.baselines.differences.differences`.

    Args:
        run: its predictions.
        baselines: all that are beside it, however many of them are shown: they are one family.
        lengths: k, see `concluded_from`.
        also: what further has an interval, but is not tested: its `p_holm` is NaN.

    Returns:
        `Difference.better` tells where the two differ beyond chance; `Difference.unsure` why that cannot be told, as
        where there are too few events: such a one is not tested, has no interval, and makes the others no less sure.
    """
    family = set(concluded_from(run, lengths))
    wanted = family | set(also)
    k = sorted({*lengths, *(int(parts_of(metric).k) for _, metric in wanted if parts_of(metric).k)})
    found = differences(run, baselines, only=lambda of, metric: (of, metric) in wanted, k=k, values=dict(run.values))
    tested = [(name, key) for name, of in found.items() for key in of if key in family]
    judged = dict(zip(tested, corrected([found[name][key] for name, key in tested]), strict=True))
    return {
        name: {key: judged.get((name, key)) or replace(of[key], p_holm=np.nan) for key in of}
        for name, of in found.items()
    }
