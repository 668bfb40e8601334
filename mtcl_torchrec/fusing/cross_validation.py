"""The cross-validation of a fused score: candidates are judged on folds that they were not fitted on; one is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.evaluation.confidence import Support
from mtcl_torchrec.evaluation.ranking import mean_and_error
from mtcl_torchrec.fusing.combiners import Combiner, Setting
from mtcl_torchrec.fusing.fitted import Tried
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.search import unit
from mtcl_torchrec.fusing.targets import Constraint, Target
from mtcl_torchrec.schema import ConfigError

Progress = Callable[[int, int, str], object]
VALUE_MODELS = ("weighted_mean", "expected_value")  # kinds whose weights are what events are worth


@dataclass(frozen=True)
class Candidate:
    """One way to come to weights, and to what else a combiner has, by a method."""

    combiner: Combiner
    method: str
    fit: Callable[[HeldOut], Setting]

    @property
    def name(self) -> str:
        """What tables and messages call it."""
        return f"{self.combiner.name}, {self.method}"


class Work:
    """How far it is."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done, self.doing = progress, total, 0, ""

    def step(self) -> None:
        """One more piece is done."""
        self.done += 1
        self.progress(self.done, self.total, self.doing)


def try_on_folds(
    candidate: Candidate, held_out: HeldOut, fold: np.ndarray, goal: Target, constraints: list[Constraint], work: Work
) -> Tried:
    """Fit on all folds but one, judge on that one; then fit on all rows."""
    scores, of_fold, by_fold = np.empty(len(held_out)), [], []
    for number in range(int(fold.max()) + 1):
        work.doing = f"{candidate.name}, fold {number + 1}"
        setting = candidate.fit(held_out.take(fold != number))
        left_out = held_out.take(fold == number)
        found = left_out.scores(setting.fused_score)
        scores[fold == number] = found
        of_fold.append(goal(left_out, found))
        by_fold.append(unit(setting.weights))
        work.step()
    work.doing = f"{candidate.name}, all rows"
    setting = candidate.fit(held_out)
    work.step()
    weights = setting.weights
    size = sum(abs(w) for w in weights.values())
    final = held_out.scores(setting.fused_score)
    mean, error = _of_all(held_out, scores, of_fold, goal)
    return Tried(
        combiner=candidate.combiner.name,
        method=candidate.method,
        mean=mean,
        std=_std(of_fold),
        error=error,
        half=sure_of(held_out, of_fold, goal).quantile * error,
        scores=scores,
        of_fold=np.array(of_fold),
        setting=setting,
        weights_std={t: _spread([w[t] for w in by_fold]) * size for t in weights},
        kept={c.text: c.of(held_out, final, unit(weights)) for c in constraints},
        broken=[c.text for c in constraints if c.violation(c.of(held_out, final, unit(weights))) > 0],
    )


def _of_all(held_out: HeldOut, scores: np.ndarray, of_fold: list[float], goal: Target) -> tuple[float, float]:
    """The target on the folds left out, and its standard error: the mean over all their requests, of which folds have
    not equally many; where it is no mean over requests, that over folds, without one."""
    found, error = goal.with_error(held_out, scores)
    return (found, error) if np.ndim(goal.of(held_out, scores)) else (_mean(of_fold), math.nan)


def _spread(weights: list[float]) -> float:
    """Their standard deviation; 0 where they differ by rounding alone."""
    return 0.0 if np.ptp(weights) < 1e-12 else float(np.std(weights, ddof=1))


def _mean(values: list[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def _std(values: list[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")


def as_it_is(name: str, scores: np.ndarray, held_out: HeldOut, fold: np.ndarray, goal: Target) -> Tried:
    """Another ranking, which has nothing to fit."""
    of_fold = [goal(held_out.take(fold == n), scores[fold == n]) for n in range(int(fold.max()) + 1)]
    mean, error = _of_all(held_out, scores, of_fold, goal)
    return Tried(
        combiner="", method=name, mean=mean, std=_std(of_fold), error=error,
        half=sure_of(held_out, of_fold, goal).quantile * error, scores=scores, of_fold=np.array(of_fold),
    )  # fmt: skip


def ahead_of(one: Tried, other: Tried, held_out: HeldOut, goal: Target) -> tuple[float, float]:
    """By how much one is better than the other, and the standard error of that: request by request, or, where the
    target is no mean over requests, fold by fold (scores of two folds are of other weights, and have no common AUC)."""
    if np.ndim(goal.of(held_out, one.scores)):
        return goal.difference(held_out, one.scores, other.scores)
    return mean_and_error(one.of_fold - other.of_fold)


def sure_of(held_out: HeldOut, of_fold: Sequence[float] | np.ndarray, goal: Target, *, paired: bool = False) -> Support:
    """What a number of the folds left out rests on: users (or requests); where the target is no mean over requests,
    folds."""
    by_request = np.ndim(goal.of(held_out, np.zeros(len(held_out)))) > 0
    return goal.support(held_out, 0 if by_request else len(of_fold), paired=paired)


def best_of(
    tried: list[Tried], constraints: dict[str, list[Constraint]], held_out: HeldOut, goal: Target
) -> tuple[Tried, tuple[str, float, float] | None]:
    """The one of the best mean on rows left out, among those that keep to the constraints; the value model, where that
    is as good but for chance (its interval of 95 % holds 0, or there are too few events for one; after the
    one-standard-error rule, Breiman et al., CART, 1984), and then what was left for it, its lead, and half of that
    interval.

    Raises:
        ConfigError: none keeps to the constraints, or these rows cannot judge by the target.
    """
    able = [t for t in tried if t.combiner and np.isfinite(t.mean)]
    if not able:
        raise ConfigError("the target is not defined on these rows: there is no request, or no event, to judge by")
    if feasible := [t for t in able if not t.broken]:
        best = max(feasible, key=lambda t: t.mean)
        value_models = [t for t in feasible if t.method == "values" and t.combiner in VALUE_MODELS]
        by_values = max(value_models, key=lambda t: t.mean, default=best)
        ahead, error = ahead_of(best, by_values, held_out, goal)
        half = sure_of(held_out, best.of_fold, goal, paired=True).quantile * error
        if best is by_values or ahead > half:
            return best, None
        return by_values, (best.name, ahead, half)

    def missed(one: Tried) -> float:
        return sum(c.violation(one.kept[c.text]) / (abs(c.bound) or 1.0) for c in constraints[one.combiner])

    nearest_one = min(able, key=missed)
    came = "; ".join(f"{text} came to {nearest_one.kept[text]:.4g}" for text in nearest_one.broken)
    raise ConfigError(f"no weights keep to all constraints; the nearest, {nearest_one.name}: {came}")
