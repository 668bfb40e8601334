"""Does fusing pay?  The fused score against the best single head, and against popularity, on rows it was not fitted on.

All of it is paired: each request is ranked by both, and the differences are averaged, with standard errors over users.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mtcl_torchrec.evaluation.bootstrap import quantile_of
from mtcl_torchrec.evaluation.ranking import mean_and_error
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.targets import Target, parse_target

POPULARITY = "popularity"  # among `HeldOut.rankings`


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


@dataclass(frozen=True)
class Verdict:
    """Whether fusing pays.

    Args:
        measure: what was compared, such as ``"value@5"``.
        worth: what ranking by the fused score brings.
        rivals: the best single head, and popularity where it is known.
        paired: what the differences are taken over: ``"users"``, ``"requests"`` or ``"folds"``.
    """

    measure: str
    worth: float
    rivals: tuple[Rival, ...]
    paired: str

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
                "rivals": rivals}  # fmt: skip


def does_fusing_pay(
    held_out: HeldOut,
    scores: np.ndarray,
    tasks: Sequence[str],
    target: Target,
    values: Mapping[str, float],
    *,
    fold: np.ndarray | None = None,
) -> Verdict:
    """Compare a fused score with the best single head and with popularity.

    They are compared by the realised value@K where values are known (K is the target's, or 5), else by the target.  The
    best head is the one that is best on these very rows, which flatters it a little, not the fused score.

    Args:
        scores: (N,) fused, of each row by weights that were not fitted on it.
        tasks: whose heads are meant; the head of what costs something ranks the other way round.
        target: what was fitted for.
        values: task -> what its event is worth.
        fold: (N,) of the cross-validation that the scores are from: a target that is no mean over requests is then
            compared fold by fold.

    Example:
        >>> rows = HeldOut(
        ...     parts={"click": np.array([0.2, 0.1, 0.1, 0.3]), "like": np.array([0.0, 0.9, 0.8, 0.1])},
        ...     labels={"click": np.array([1.0, 0.0, 0.0, 1.0]), "like": np.array([0.0, 1.0, 1.0, 0.0])},
        ...     request=np.array([1, 1, 2, 2]),
        ... )
        >>> worth = {"click": 1.0, "like": 8.0}
        >>> found = does_fusing_pay(rows, rows.parts["like"], ["click"], parse_target("value@1", worth, worth), worth)
        >>> found.worth, found.rivals[0].name, found.rivals[0].ahead, found.word
        (8.0, 'head click', 7.0, 'yes')
    """
    measure = _measure(held_out, target, values)
    by_request = np.ndim(measure.of(held_out, scores)) > 0
    folds = None if fold is None or by_request else [held_out.take(fold == n) for n in range(int(fold.max()) + 1)]

    def worth_of(ranked_by: np.ndarray) -> np.ndarray:
        """(R,), (folds,) or ()."""
        if folds is None:
            return np.asarray(measure.of(held_out, ranked_by), np.float64)
        assert fold is not None
        return np.array([measure(rows, ranked_by[fold == n]) for n, rows in enumerate(folds)])

    own = worth_of(scores)
    clusters = held_out.clusters if by_request else None
    paired = "folds" if not by_request else "requests" if held_out.user is None else "users"
    count = len(np.unique(held_out.clusters)) if by_request else np.size(own)

    def rival(name: str, ranked_by: np.ndarray) -> Rival:
        theirs = worth_of(ranked_by)
        if np.ndim(own) == 0:
            return Rival(name, float(theirs), float(own - theirs), float("nan"))
        ahead, error = mean_and_error(own - theirs, clusters)
        return Rival(name, mean_and_error(theirs)[0], ahead, quantile_of(count) * error)

    heads = [rival(f"head {t}", (-1.0 if values.get(t, 0.0) < 0 else 1.0) * held_out.parts[t]) for t in tasks]
    heads = [head for head in heads if not np.isnan(head.worth)]
    rivals = [max(heads, key=lambda head: head.worth)] if heads else []
    if POPULARITY in held_out.rankings:
        rivals.append(rival(POPULARITY, held_out.rankings[POPULARITY]))
    return Verdict(measure.name, float(own) if np.ndim(own) == 0 else mean_and_error(own)[0], tuple(rivals), paired)


def _measure(held_out: HeldOut, target: Target, values: Mapping[str, float]) -> Target:
    if target.name.startswith("value@") or not any(values.values()) or not set(values) <= set(held_out.labels):
        return target
    asked = re.fullmatch(r"ndcg@(\d+)", target.name)
    return parse_target(f"value@{asked[1] if asked else 5}", values, held_out.labels)
