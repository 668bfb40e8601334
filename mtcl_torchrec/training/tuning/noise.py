"""Whether the best trial is better than the run as it is by more than chance, on the validation split."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from mtcl_torchrec.evaluation.bootstrap import clusters_of, draw, spread
from mtcl_torchrec.evaluation.compare import check_same_rows
from mtcl_torchrec.evaluation.confidence import weakest
from mtcl_torchrec.evaluation.naming import MAIN
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.evaluation.resampled import resampled_metrics
from mtcl_torchrec.evaluation.supports import supports_of
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.judging import predictions_path
from mtcl_torchrec.training.tuning.objective import Objective

DRAWS = 200
_OF_SKILL = {"auc": 2.0, "ne": -1.0, "r2": 1.0}  # by how much the skill changes with the metric


def half_of_lead(
    own: Path, best: Path, objective: Objective, seed: int = 0, *, without: Collection[str] = ()
) -> float | None:
    """Half of the 95 % interval of the difference between two trials in the objective, over the users of the
    validation split, the same ones drawn for both; None where that is not known.

    It says how sure the difference of these two is, and not that the better one is the best of many.

    Args:
        own, best: run directories of the two trials, with predictions.
        without: tasks that do not count in the objective.
    """
    try:
        a, b = (read_predictions(predictions_path(folder, "val")) for folder in (own, best))
        check_same_rows(a, b)
    except (DataError, OSError):
        return None
    of = {(t.name, objective.metric or MAIN[t.kind]): t for t in objective.tasks if t.name not in without}
    clusters = clusters_of(a)
    drawn = []
    for table in (a, b):
        parts = resampled_metrics(table, clusters, k=[1], values={}, only=lambda task, metric: (task, metric) in of)
        names = [name for part in parts for name in part.names]
        if set(names) != set(of):
            return None
        found = draw(parts, clusters[1], draws=DRAWS, seed=seed)[:, [names.index(name) for name in of]]
        factors = [1.0 if objective.metric else _OF_SKILL[metric] for _, metric in of]
        drawn.append((found * factors).mean(1, keepdims=True))
    support = weakest(map(supports_of(a, clusters, paired=True), *zip(*of, strict=True)))
    half = support.quantile * support.error_of(float(spread(drawn[1] - drawn[0])[0]))
    return half if np.isfinite(half) and not support.unsure else None
