"""What a fusion is fitted for, and what it must keep to: `value@5`, `ndcg@10`, `gauc:like`; `auc:like >= 0.8`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtcl_torchrec.evaluation.confidence import Support, rests_on, support_of
from mtcl_torchrec.evaluation.ranking import auc_by_request, auc_of, mean_and_error, ndcg_at_k, value_at_k
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.schema import ConfigError, nearest

OfRows = Callable[[HeldOut, np.ndarray], "float | np.ndarray"]
Values = Mapping[str, float]

_KINDS = ("value@K", "ndcg@K", "gauc:TASK", "auc:TASK")


@dataclass(frozen=True)
class Target:
    """What a ranking is judged by, the higher the better.

    Args:
        name: such as ``"value@5"``.
        of: function of held-out rows and their scores (N,): one number, or (R,) one for each request, NaN where it is
            not defined; the mean counts then.
        reward: of held-out rows, (N,) what each brought, where that is what `of` adds up.
        labels: of held-out rows, (N,) 1 where the event happened by which `of` judges an order of all rows.
    """

    name: str
    of: OfRows
    reward: Callable[[HeldOut], np.ndarray] | None = None
    labels: Callable[[HeldOut], np.ndarray] | None = None

    def __call__(self, held_out: HeldOut, scores: np.ndarray) -> float:
        """The number for all rows."""
        found = np.asarray(self.of(held_out, scores), dtype=np.float64)
        return float(found) if found.ndim == 0 else mean_and_error(found)[0]

    def with_error(self, held_out: HeldOut, scores: np.ndarray) -> tuple[float, float]:
        """The number and its standard error, over users where they are known; NaN where it is no mean over requests."""
        found = np.asarray(self.of(held_out, scores), dtype=np.float64)
        return (float(found), float("nan")) if found.ndim == 0 else mean_and_error(found, held_out.clusters)

    def difference(self, held_out: HeldOut, scores: np.ndarray, others: np.ndarray) -> tuple[float, float]:
        """By how much `scores` are better than `others`, request by request, and the standard error of that."""
        a, b = (np.asarray(self.of(held_out, s), dtype=np.float64) for s in (scores, others))
        return (float(a - b), float("nan")) if a.ndim == 0 else mean_and_error(a - b, held_out.clusters)

    def support(self, held_out: HeldOut, folds: int = 0, *, paired: bool = False) -> Support:
        """What a number of these rows rests on: users (without them requests) to whom something happened that counts.

        Args:
            folds: over which the standard error is, where the target is no mean over requests; 0: it is one.
            paired: of a difference, which only requests tell something of that leave a choice.
        """
        owner = held_out.clusters[held_out.numbers]
        if self.reward is None:
            many = Support(float(folds or len(np.unique(held_out.clusters))))
            unsure = "" if self.labels is None else support_of(self.labels(held_out), owner).unsure
            return replace(many, unsure=unsure)
        least = 1 if self.name.startswith("ndcg") else int(self.name.partition("@")[2])
        counts = held_out.rows_of_requests > (least if paired else 0)
        return rests_on(np.where(counts[held_out.numbers], self.reward(held_out), 0.0), owner)


def parse_target(target: str | OfRows, values: Values | None, tasks: Iterable[str]) -> Target:
    """A target from its name, or from a function of one's own.

    - ``value@5``: the mean over requests of Σ valueᵢ · labelᵢ over the 5 best rows;
    - ``ndcg@5``: normalised discounted cumulative gain of the same sum, where it is positive;
    - ``gauc:like``: AUC of the ranking for one task's labels within requests, weighted by their rows;
    - ``auc:like``: over all rows.

    Args:
        values: task -> what its event is worth; of ``value@K`` and ``ndcg@K``.
        tasks: those with labels.

    Raises:
        ConfigError: no such target, task, or no values.

    Example:
        >>> parse_target("value@five", None, ["click"])
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: no target 'value@five'; there are value@K, ndcg@K, gauc:TASK,
        auc:TASK
    """
    if not isinstance(target, str):
        return Target(getattr(target, "__name__", "target"), target)
    if found := re.fullmatch(r"(value|ndcg)@([1-9]\d*)", target):
        if not values:
            raise ConfigError(f"target {target} needs values: what each task's event is worth, such as click=1 like=8")
        at_k, k, worth = value_at_k if found[1] == "value" else ndcg_at_k, int(found[2]), dict(values)
        if found[1] == "ndcg" and not any(v > 0 for v in worth.values()):
            raise ConfigError(f"target {target} needs a positive value: a gain below 0 counts as 0")
        return Target(target, lambda h, scores: at_k(h.numbers, scores, h.reward(worth), k), lambda h: h.reward(worth))
    if found := re.fullmatch(r"(gauc|auc):(.+)", target):
        kind, task = found[1], found[2].strip()
        _check_task(target, task, tasks)
        return Target(target, lambda h, scores: ranking_auc(h, scores, task, kind), labels=lambda h: _events(h, task))
    raise ConfigError(f"no target {target!r}; there are {', '.join(_KINDS)}")


def ranking_auc(held_out: HeldOut, scores: np.ndarray, task: str, kind: str = "gauc") -> float:
    """AUC of a ranking for one task's binary labels; other labels count as whether they are above 0.

    Args:
        kind: ``"gauc"`` within requests, ``"auc"`` over all rows.
    """
    labels = _events(held_out, task)
    if kind == "auc":
        return auc_of(scores, labels)
    found, rows = auc_by_request(held_out.numbers, scores, labels)
    both = ~np.isnan(found)
    return float(np.average(found[both], weights=rows[both])) if both.any() else float("nan")


def _events(held_out: HeldOut, task: str) -> np.ndarray:
    """(N,) 1 where the label is above 0, 0 where it is not, NaN where it is missing."""
    labels = held_out.labels[task]
    return np.where(np.isnan(labels), np.nan, (labels > 0).astype(float))


def check_choice(held_out: HeldOut, target: Target) -> None:
    """See that K leaves a choice: a request of at most K rows is worth the same in any order.

    Raises:
        ConfigError: no request has more than K rows; with a K that would do.
    """
    found = re.fullmatch(r"value@(\d+)", target.name)
    if found is None or (longest := int(held_out.rows_of_requests.max())) > int(found[1]):
        return
    each = f"no request has more than {'one row' if longest == 1 else f'{longest} rows'}, and those are all shown"
    usable = longest_with_choice(held_out.rows_of_requests)
    way = f"take value@{usable}, or longer requests" if usable else "take longer requests"
    raise ConfigError(f"target {target.name}: {each}, in whatever order: {way} (--session-minutes)")


def longest_with_choice(rows_of_requests: np.ndarray, share: float = 0.2) -> int:
    """The largest K such that a share of the requests have more than K rows; where that is none, such that one has; 0
    where every request is a single row.

    Args:
        rows_of_requests: (R,) at least 1.

    Example:
        >>> longest_with_choice(np.array([1, 1, 4, 9])), longest_with_choice(np.array([1] * 9 + [3]))
        (8, 2)
    """
    longer = np.sort(rows_of_requests)[::-1]
    at = max(int(np.ceil(share * len(longer))) - 1, 0)
    return int(longer[at]) - 1 or int(longer[0]) - 1


def _check_task(what: str, task: str, tasks: Iterable[str]) -> None:
    if task not in (known := list(tasks)):
        raise ConfigError(f"{what}: no task {task!r} with labels{nearest(task, known)}")


@dataclass(frozen=True)
class Constraint:
    """What a fused ranking must keep to.

    Args:
        text: as it was given, such as ``"auc:like >= 0.8"``.
        at_least: whether `bound` is a lower one.
        bound: the number on the right.
        of: what must keep to it, from rows, scores, and the weights, of absolute sum 1.
    """

    text: str
    at_least: bool
    bound: float
    of: Callable[[HeldOut, np.ndarray, Values], float]

    def violation(self, found: float) -> float:
        """By how much a number misses the bound; 0 where it keeps to it."""
        if np.isnan(found):
            return float("inf")
        return max(0.0, self.bound - found if self.at_least else found - self.bound)


def parse_constraints(
    texts: Sequence[str], values: Values | None, held_out: HeldOut, tasks: Sequence[str], share: Callable[..., float]
) -> list[Constraint]:
    """Constraints from their texts: a target, or ``weight:TASK`` or ``share:TASK``, then ``>=`` or ``<=`` and a number.

    ``weight:report <= -0.5``: of all weights, divided by the sum of their absolute values.  ``share:long_view >= 0.3``:
    of the task's influence on the ranking, see `mtcl_torchrec.fusing.weights.influence_of`.

    Args:
        tasks: those that enter the score.
        share: (held-out rows, weights, task) -> the task's influence.

    Raises:
        ConfigError: naming the constraint.
    """
    return [_constraint(text, values, held_out, tasks, share) for text in texts]


def _constraint(
    text: str, values: Values | None, held_out: HeldOut, tasks: Sequence[str], share: Callable[..., float]
) -> Constraint:
    found = re.fullmatch(r"\s*(\S+?)\s*(>=|<=)\s*([-+.\deE]+)\s*", text)
    try:
        bound = float(found[3]) if found else None
    except ValueError:
        bound = None
    if found is None or bound is None:
        raise ConfigError(f"constraint {text!r}: expected such as 'auc:like >= 0.8' or 'weight:report <= -0.5'")
    what, at_least = found[1], found[2] == ">="
    kind, _, task = what.partition(":")
    if kind in ("weight", "share"):
        if task not in tasks:
            raise ConfigError(f"constraint {text!r}: no task {task!r} in the score{nearest(task, tasks)}")
        if kind == "weight":
            return Constraint(text, at_least, bound, lambda h, scores, weights: weights.get(task, 0.0))
        return Constraint(text, at_least, bound, lambda h, scores, weights: share(h, weights, task))
    try:
        target = parse_target(what, values, held_out.labels)
    except ConfigError as error:
        raise ConfigError(f"constraint {text!r}: {error}") from None
    return Constraint(text, at_least, bound, lambda h, scores, weights: target(h, scores))
