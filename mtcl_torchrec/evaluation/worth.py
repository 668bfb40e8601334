"""What a ranking is worth in value@k: which events count, and whether the fused score brings more than simpler orders.

Terminal, fit and report draw their words from one `Verdict`, so that they never say different things of the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mtcl_torchrec.evaluation.bootstrap import clusters_of
from mtcl_torchrec.evaluation.confidence import Support
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranked import RankedRows, reward_of
from mtcl_torchrec.evaluation.ranking import mean_and_error
from mtcl_torchrec.evaluation.supports import RANKING, supports_of

POPULARITY = "popularity"


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
class Rival:
    """What the fused score is compared with.

    Args:
        name: ``"head like"``, or ``"popularity"``.
        worth: what ranking by it brings.
        ahead: by how much the fused score brings more.
        half: half of the 95 % interval of that; NaN where it is not known.
    """

    name: str
    worth: float
    ahead: float
    half: float

    @property
    def sign(self) -> int:
        """1 where the fused score is better, -1 where it is worse, 0 where the interval holds 0 or is not known.

        Example:
            >>> [Rival("popularity", 2.0, ahead, 0.1).sign for ahead in (0.2, 0.05, -0.2)]
            [1, 0, -1]
        """
        return int(np.sign(self.ahead)) if abs(self.ahead) > self.half else 0

    @property
    def per_cent(self) -> tuple[float, float] | None:
        """The lead and half of its interval in per cent of what the rival brings; None where that brings nothing."""
        return None if self.worth == 0 else (100 * self.ahead / abs(self.worth), 100 * self.half / abs(self.worth))

    @property
    def head(self) -> str:
        """The task whose head it is; empty of popularity."""
        return self.name.removeprefix("head ") if self.name.startswith("head ") else ""


@dataclass(frozen=True)
class Verdict:
    """Whether fusing pays.

    Args:
        measure: what was compared, such as ``"value@5"``.
        worth: what ranking by the fused score brings.
        rivals: the best single head, and popularity where it is known.
        paired: what the differences are taken over: ``"users"``, ``"requests"`` or ``"folds"``.
        unsure: why no difference can be sure, in a few words, such as too few events; empty where one can.
    """

    measure: str
    worth: float
    rivals: tuple[Rival, ...]
    paired: str
    unsure: str = ""

    @property
    def word(self) -> str:
        """``"yes"``: better than all; ``"no"``: worse than one; ``"not shown"``: no difference that counts to some."""
        signs = [rival.sign for rival in self.rivals]
        return "no" if -1 in signs else "not shown" if 0 in signs else "yes"

    def to_json(self) -> dict[str, Any]:
        """For the file of the fit; NaN is left to the writer."""
        rivals = [
            asdict(rival) | {"sign": rival.sign, "per_cent": None if rival.per_cent is None else rival.per_cent[0]}
            for rival in self.rivals
        ]
        return {"measure": self.measure, "worth": self.worth, "paired": self.paired, "word": self.word,
                "unsure": self.unsure, "rivals": rivals}  # fmt: skip


def does_fusing_pay(
    measure: str,
    worth_of: Callable[[np.ndarray], np.ndarray],
    scores: np.ndarray,
    heads: Mapping[str, np.ndarray],
    popularity: np.ndarray | None,
    values: Mapping[str, float],
    *,
    clusters: np.ndarray | None = None,
    paired: str = "users",
    support: Support | None = None,
) -> Verdict:
    """Compare a fused score with the best single head and with popularity: each request (or fold) is ranked by both,
    and the differences are averaged.

    The best head is the one that is best on these very rows, which flatters it a little, not the fused score.  The head
    of what costs something ranks the other way round.

    Args:
        measure: what `worth_of` tells, such as ``"value@5"``.
        worth_of: scores (N,) -> what ranking by them is worth: of each request (R,), of each fold, or of all rows ().
        scores: (N,) fused.
        heads: task -> (N,) what it gives the score.
        popularity: (N,), or None where it is not known.
        values: task -> what its event is worth.
        clusters: (R,) of which user each request is; None: none depends on another.
        paired: see `Verdict`.
        support: what a difference rests on; by default all users, requests or folds, alike.

    Example:
        >>> request, clicks = np.repeat(np.arange(30), 2), np.tile([0.0, 1.0], 30)
        >>> def clicks_at_1(ranked_by):
        ...     return clicks.reshape(30, 2)[np.arange(30), ranked_by.reshape(30, 2).argmax(1)]
        >>> heads = {"click": np.tile([0.2, 0.3], 30), "like": np.tile([0.9, 0.1, 0.1, 0.9, 0.1, 0.9], 10)}
        >>> found = does_fusing_pay("value@1", clicks_at_1, heads["click"], {"like": heads["like"]}, None, {})
        >>> found.worth, found.rivals[0].name, round(found.rivals[0].ahead, 4), found.word
        (1.0, 'head like', 0.3333, 'yes')
    """
    own = np.asarray(worth_of(scores), np.float64)
    rests = support or Support(float(np.size(own) if clusters is None else len(np.unique(clusters))))

    def rival(name: str, ranked_by: np.ndarray) -> Rival:
        theirs = np.asarray(worth_of(ranked_by), np.float64)
        if np.ndim(own) == 0:
            return Rival(name, float(theirs), float(own - theirs), math.nan)
        ahead, error = mean_and_error(own - theirs, clusters)
        return Rival(name, mean_and_error(theirs)[0], ahead, rests.quantile * error)

    alone = [rival(f"head {t}", (-1.0 if values.get(t, 0.0) < 0 else 1.0) * part) for t, part in heads.items()]
    alone = [head for head in alone if not np.isnan(head.worth)]
    rivals = [max(alone, key=lambda head: head.worth)] if alone else []
    if popularity is not None:
        rivals.append(rival(POPULARITY, popularity))
    worth = float(own) if np.ndim(own) == 0 else mean_and_error(own)[0]
    return Verdict(measure, worth, tuple(rivals), paired, rests.unsure)


def verdict_of(table: PredictionsTable, lengths: Sequence[int]) -> Verdict | None:
    """Whether fusing pays on the rows of a table: in value@k of the shortest length that leaves some request a choice.

    Args:
        table: with a score, keys of requests or users, and what events are worth.
        lengths: rows of a request that are shown.

    Returns:
        None where values, score or keys are missing, or no request has more rows than the shortest length.

    Example:
        >>> import pandas as pd
        >>> from mtcl_torchrec.schema import Task
        >>> rows = {"user": [1, 1, 2, 2], "label.click": [0, 1.0, 1, 0], "score": [0.1, 0.9, 0.8, 0.3]}
        >>> rows |= {"popular": [0.4, 0.3, 0.5, 0.6], "popularity": [1.0, 1, 1, 1]}
        >>> table = PredictionsTable(pd.DataFrame(rows), (Task.binary("click"),), values={"click": 1.0})
        >>> found = verdict_of(table, [1])
        >>> found.worth, found.rivals[0].worth, found.unsure
        (1.0, 0.0, 'too few events (2)')
    """
    if table.score is None or table.requests is None or not any(table.values.values()):
        return None
    rows = RankedRows(table) if not np.isnan(table.requests).all() else None
    k = None if rows is None else next((k for k in sorted(lengths) if (rows.rows_of_request > k).any()), None)
    if rows is None or k is None:
        return None
    reward = reward_of(table, table.values)[rows.known]
    tasks = table.fused or [task.name for task in table.tasks]
    heads = {task: part for task in tasks if (part := table.part(task)) is not None}
    return does_fusing_pay(
        f"value@{k}",
        lambda ranked_by: RankedRows(table, ranked_by).ranking.value_at_k(reward, k),
        table.score,
        heads,
        table.popular,
        table.values,
        clusters=rows.users_of_requests(),
        paired="requests" if table.users is None else "users",
        support=supports_of(table, clusters_of(table), values=table.values, paired=True)(RANKING, f"value@{k}"),
    )


def verdict_lines(verdict: Verdict, of: str, asked: str = "Does fusing pay?") -> list[str]:
    """Whether fusing pays, in a line for the answer and what is said of it, and one for what ± is.

    Args:
        of: what rows, such as ``"on folds left out"``.
        asked: the question that they answer.

    Example:
        >>> found = Verdict("value@5", 2.312, (Rival("head click", 2.293, 0.019, 0.012),), "users")
        >>> for line in verdict_lines(found, "on folds left out"):
        ...     print(line)
        Does fusing pay?  Yes: value@5 2.3120 on folds left out, +0.8 % ± 0.5 % on the best head, click (2.2930)
        ± is half of a 95 % interval, paired over users
    """
    if not verdict.rivals or math.isnan(verdict.worth):
        return []
    parts = []
    for rival in verdict.rivals:
        other = f"the best head, {rival.head}" if rival.head else rival.name
        if rival.ahead == 0 and not rival.half > 0:
            parts.append(f"the same as {other}")
            continue
        unsure = f", {verdict.unsure or 'how sure is not known'}" if math.isnan(rival.half) else NO_DIFFERENCE
        parts.append(f"{lead_of(rival)} on {other} ({rival.worth:.4f})" + unsure * (rival.sign == 0))
    word = {"yes": "Yes", "no": "No", "not shown": "Not shown"}[verdict.word]
    lines = [f"{asked}  {word}: {verdict.measure} {verdict.worth:.4f} {of}, {'; '.join(parts)}"]
    known = any(not math.isnan(rival.half) for rival in verdict.rivals)
    return [*lines, f"± is half of a 95 % interval, paired over {verdict.paired}"] if known else lines


NO_DIFFERENCE = ", no difference that counts"


def lead_of(rival: Rival) -> str:
    """By how much the fused score is ahead, in per cent where that can be said, and half of its interval.

    Example:
        >>> lead_of(Rival("popularity", 2.0, 0.1, 0.05)), lead_of(Rival("popularity", 0.0, -0.1, float("nan")))
        ('+5.0 % ± 2.5 %', '-0.1000')
    """
    (lead, half), unit = (rival.per_cent, " %") if rival.per_cent else ((rival.ahead, rival.half), "")
    digits = 1 if unit and half >= 0.05 else 2 if unit else 4
    said = f"{lead:+z.{digits}f}{unit}"
    return said if math.isnan(half) else f"{said} ± {half:.{digits}f}{unit}"
