"""Does fusing pay, on held-out rows?  As `mtcl_torchrec.evaluation.worth` judges tables of predictions, too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mtcl_torchrec.evaluation.ranking import auc_by_request
from mtcl_torchrec.evaluation.worth import POPULARITY, Verdict, does_fusing_pay
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.targets import Target, parse_target


def verdict_on(
    held_out: HeldOut,
    scores: np.ndarray,
    tasks: Sequence[str],
    target: Target,
    values: Mapping[str, float],
    *,
    fold: np.ndarray | None = None,
) -> Verdict:
    """Compare a fused score with the best single head and with popularity.

    They are compared by the realised value@K where values are known (K is the target's, or 5), else by the target.

    Args:
        scores: (N,) fused, of each row by weights that were not fitted on it.
        tasks: whose heads are meant.
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
        >>> found = verdict_on(rows, rows.parts["like"], ["click"], parse_target("value@1", worth, worth), worth)
        >>> found.worth, found.rivals[0].name, found.rivals[0].ahead, found.unsure
        (8.0, 'head click', 7.0, 'too few events (4)')
    """
    return _verdict(held_out, scores, tasks, _measure(held_out, target, values), values, fold)


def verdict_in_target(
    held_out: HeldOut,
    scores: np.ndarray,
    tasks: Sequence[str],
    target: Target,
    values: Mapping[str, float],
    *,
    fold: np.ndarray | None = None,
) -> Verdict | None:
    """The same comparison in what was fitted for, such as ``gauc:like``; None where `verdict_on` is of that already.

    Without folds, the differences of a GAUC are paired over users, as those of a ratio of sums over requests.

    Args:
        held_out, scores, tasks, target, values, fold: as of `verdict_on`.
    """
    if _measure(held_out, target, values).name == target.name:
        return None
    return _verdict(held_out, scores, tasks, target if fold is not None else _by_request(target), values, fold)


def _verdict(
    held_out: HeldOut,
    scores: np.ndarray,
    tasks: Sequence[str],
    measure: Target,
    values: Mapping[str, float],
    fold: np.ndarray | None,
) -> Verdict:
    by_request = np.ndim(measure.of(held_out, scores)) > 0
    folds = None if fold is None or by_request else [held_out.take(fold == n) for n in range(int(fold.max()) + 1)]

    def worth_of(ranked_by: np.ndarray) -> np.ndarray:
        """(R,), (folds,) or ()."""
        if folds is None:
            return np.asarray(measure.of(held_out, ranked_by), np.float64)
        assert fold is not None
        return np.array([measure(rows, ranked_by[fold == n]) for n, rows in enumerate(folds)])

    return does_fusing_pay(
        measure.name,
        worth_of,
        scores,
        {task: held_out.parts[task] for task in tasks},
        held_out.rankings.get(POPULARITY),
        values,
        clusters=held_out.clusters if by_request else None,
        paired="folds" if not by_request else "requests" if held_out.user is None else "users",
        support=measure.support(held_out, len(folds or ()), paired=True),
    )


def _measure(held_out: HeldOut, target: Target, values: Mapping[str, float]) -> Target:
    if target.name.startswith("value@") or not any(values.values()) or not set(values) <= set(held_out.labels):
        return target
    asked = re.fullmatch(r"ndcg@(\d+)", target.name)
    return parse_target(f"value@{asked[1] if asked else 5}", values, held_out.labels)


def _by_request(target: Target) -> Target:
    """A GAUC as numbers of requests (R,) whose mean it is: v + n (a - v) / n̄ of a request of n rows and AUC a, where v
    is the GAUC and n̄ the mean of n.  Their spread is that of a ratio of sums (delta method)."""
    labels = target.labels
    if labels is None or not target.name.startswith("gauc:"):
        return target

    def of(held_out: HeldOut, ranked_by: np.ndarray) -> np.ndarray:
        areas, rows = auc_by_request(held_out.numbers, ranked_by, labels(held_out))
        both = ~np.isnan(areas)
        if not both.any():
            return areas
        gauc = np.average(areas[both], weights=rows[both])
        return gauc + rows * (areas - gauc) / rows[both].mean()

    return replace(target, of=of)
