"""What a ranking is worth in value@k: which events count, and what the fused score gains on simpler orders."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.evaluation.confidence import FEWEST, SURE
from mtcl_torchrec.evaluation.estimates import ratio_estimate
from mtcl_torchrec.evaluation.predictions_file import PredictionsTable
from mtcl_torchrec.evaluation.ranked import RankedRows, reward_of


def values_of_events(
    values: Mapping[str, float] | None, weights: Mapping[str, float] | None, binary: Collection[str]
) -> dict[str, float]:
    """Task -> what its event is worth in value@k, the one definition of all commands.

    Args:
        values: `evaluation.values` of the run, which counts as it is: of a regression, each unit of its label.
        weights: of the fused score, which count where there are no values, and of binary tasks alone: the weight of a
            regression or of a class is that of a part in [0, 1], and no price of a label's unit.
        binary: names of the binary tasks.

    Example:
        >>> values_of_events(None, {"click": 1.0, "minutes": 2.0}, ["click"])
        {'click': 1.0}
        >>> values_of_events({"click": 1.0, "minutes": 0.1}, None, ["click"])
        {'click': 1.0, 'minutes': 0.1}
    """
    if values is not None:
        return dict(values)
    return {task: weight for task, weight in (weights or {}).items() if task in binary}


@dataclass(frozen=True)
class Gain:
    """What the fused score's first rows bring, over what another order's do.

    Args:
        against: task whose head alone ranks, or ``"popularity"``.
        k: rows of a request that are shown.
        ratio: the gain, of the other's value: 0.1 is 10 % more.
        error: its standard error over users; NaN where it is not known.
    """

    against: str
    k: int
    ratio: float
    error: float = math.nan

    @property
    def sure(self) -> bool:
        """Whether the gain or loss is beyond its interval."""
        return not math.isnan(self.error) and abs(self.ratio) > SURE * self.error


POPULARITY = "popularity"


def gains(table: PredictionsTable, k: int) -> list[Gain]:
    """Of the fused score on the best single head, and on popularity, in value@k of the same requests.

    The best head is that which brings most on these very rows, so the gain on it is rather too small than too large.
    The head of an event that costs something ranks by falling probability.

    Args:
        table: with a score, keys of requests or users, and what events are worth.
        k: rows of a request that are shown.

    Returns:
        None where values, score or keys are missing, no request has more than k rows, or an order brings nothing.

    Example:
        >>> import pandas as pd
        >>> from mtcl_torchrec.schema import Task
        >>> rows = {"user": [1, 1, 2, 2], "label.click": [0, 1.0, 1, 0], "score": [0.1, 0.9, 0.8, 0.3]}
        >>> rows |= {"popular": [0.4, 0.3, 0.5, 0.6], "popularity": [1.0, 1, 1, 1]}
        >>> table = PredictionsTable(pd.DataFrame(rows), (Task.binary("click"),), values={"click": 1.0})
        >>> gains(table, 1)  # popularity brings nothing here, so that nothing can be said in per cent of it
        []
    """
    if table.score is None or table.requests is None or not table.values or np.isnan(table.requests).all():
        return []
    orders = {"": table.score}
    for name, value in table.values.items():
        if name in table.predicted_names and value:
            orders[name] = math.copysign(1.0, value) * table.predicted(name)
    if table.popular is not None:
        orders[POPULARITY] = table.popular
    rows = {name: RankedRows(table, scores) for name, scores in orders.items()}
    fused = rows[""]
    if not (fused.rows_of_request > k).any():
        return []
    reward = reward_of(table, table.values)[fused.known]
    found = {name: of.ranking.value_at_k(reward, k) for name, of in rows.items()}
    users = fused.users_of_requests()
    clusters = np.unique(users, return_inverse=True)[1]
    heads = [name for name in found if name not in ("", POPULARITY)]
    best = max(heads, key=lambda name: float(found[name].sum()), default=None)
    events = int(np.count_nonzero(reward))
    told = []
    for name in ([] if best is None else [best]) + [POPULARITY]:
        if name not in found or found[name].sum() <= 0:
            continue
        ratio = ratio_estimate(found[""] - found[name], found[name], clusters)
        told.append(Gain(name, k, ratio.value, ratio.error if events >= FEWEST else math.nan))
    return told
