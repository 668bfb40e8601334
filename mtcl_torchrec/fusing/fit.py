"""Fit a fused score on held-out predictions: try combiners, judge each on rows it was not fitted on, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mtcl_torchrec.evaluation.ranking import mean_and_error
from mtcl_torchrec.fusing.combiners import Combiner, Setting, Weights, resolved
from mtcl_torchrec.fusing.fitted import FittedFusion, Tried
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.learned import train_setting
from mtcl_torchrec.fusing.pareto import pareto_front
from mtcl_torchrec.fusing.search import Problem, Search, search_weights, unit
from mtcl_torchrec.fusing.targets import Constraint, OfRows, Target, parse_constraints, parse_target
from mtcl_torchrec.fusing.weights import (
    NoWeightsError,
    check_influence,
    influence_of,
    stacked_weights,
    weights_of_influence,
)
from mtcl_torchrec.schema import ConfigError, nearest

Progress = Callable[[int, int, str], object]
_VALUE_MODELS = ("weighted_mean", "expected_value")  # kinds whose weights are what events are worth


def _quiet(done: int, total: int, doing: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class _Candidate:
    """One way to come to weights, and to what else a combiner has, by a method."""

    combiner: Combiner
    method: str
    fit: Callable[[HeldOut], Setting]

    @property
    def name(self) -> str:
        return f"{self.combiner.name}, {self.method}"


def fit_fusion(
    held_out: HeldOut,
    *,
    values: Mapping[str, float] | None = None,
    target: str | OfRows = "value@5",
    combiners: Sequence[str | Combiner] | None = None,
    tasks: Sequence[str] | None = None,
    folds: int = 5,
    search: Search = "auto",
    trials: int = 100,
    constraints: Sequence[str] = (),
    influence: Mapping[str, float] | None = None,
    front_points: int = 100,
    seed: int = 0,
    progress: Progress = _quiet,
) -> FittedFusion:
    """The fused score that ranks best, fitted by cross-validation over users (or requests), never over rows.

    For each combiner these are tried: all weights alike; the values as weights (the value model, right where the parts
    are calibrated); stacking, in closed form; a search on the target itself, also of thresholds, exponents and the
    like, where a combiner has them; training, where it learns.  Beside them stand each task's own head alone and the
    other rankings of `held_out`.  Each is fitted on all folds but one and judged on that one; the one of the best mean
    that keeps to the constraints is then fitted on all rows.  Values that are given are only left for weights that are
    better by more than two standard errors, request by request (by ``auc`` and ``gauc``, fold by fold): a smaller lead
    is mostly noise.  A method that finds no weights on some fold, such as stacking where nothing happened in it, is
    left out; ``about["left_out"]`` says why.

    Args:
        held_out: predictions for rows that the model was not trained on.
        values: task -> what its event is worth; needed by ``value@K`` and ``ndcg@K``.  A task of negative value gets no
            positive weight from a search.
        target: see `mtcl_torchrec.fusing.targets.parse_target`; or a function of one's own, (held-out rows, scores
            (N,)) -> a number, or (R,) numbers by request.
        combiners: kinds by name, a `Combiner`, or ``"all"``; the default is
            `mtcl_torchrec.fusing.combiners.resolved`'s, which are quick.
        tasks: those that enter the score; by default those of `values`, `influence` and constrained weights, or,
            without values, all.
        folds: of the cross-validation.
        search: ``"auto"``, ``"tpe"``, ``"cma"``, or ``"none"``; see `search_weights`.
        trials: of each search, in each fold.
        constraints: such as ``"auc:like >= 0.8"``; see `parse_constraints`.
        influence: task -> its share of the ranking; see `weights_of_influence`.  Combiners of which the influence
            cannot be told are left out then, and where a constraint asks for it.
        front_points: rankings drawn for the Pareto front; 0 for none.
        seed: of folds, search and front: equal arguments give an equal result.
        progress: called with (done, total, what is done now).

    Returns:
        The fused score with its weights, their spread over the folds, everything tried, and the Pareto front.

    Raises:
        ConfigError: an option that does not fit; or no combiner keeps to the constraints, and then how far the nearest
            came.

    Example:
        >>> import torch
        >>> from mtcl_torchrec.data.impressions import draw_impressions
        >>> rows = draw_impressions(200, 10)
        >>> held_out = HeldOut(rows.probability, rows.labels, rows.request)
        >>> fitted = fit_fusion(held_out, values=rows.values, search="none", front_points=0)
        >>> fitted.method, fitted.fused_score({task: torch.full((1,), 0.5) for task in fitted.weights}).shape
        ('values', torch.Size([1]))
    """
    entering = _entering(held_out, tasks, values, influence, constraints)
    goal = parse_target(target, values, held_out.labels)
    kinds = resolved(combiners, held_out)
    _check_rewards(held_out, values, target)
    check_influence(influence or {}, entering)
    if influence or any(text.strip().startswith("share:") for text in constraints):
        kinds = [c for c in kinds if c.feature is not None]
        if not kinds:
            raise ConfigError("influence: of none of the combiners can the influence of a task be told")
    signs = {task: int(np.sign(values.get(task, 0.0))) if values else 0 for task in entering}
    candidates: list[_Candidate] = []
    kept_to: dict[str, list[Constraint]] = {}
    work = _Work(progress, 0)
    if weighed := [text for text in constraints if text.strip().startswith("weight:")]:
        if all(combiner.learns for combiner in kinds):
            raise ConfigError(f"constraint {weighed[0]!r}: a {kinds[0].name} has no weights that stay the same")
        kinds = [combiner for combiner in kinds if not combiner.learns]
    for combiner in kinds:
        share = partial(_share, combiner)
        kept_to[combiner.name] = parse_constraints(constraints, values, held_out, entering, share)
        problem = Problem(combiner, signs, goal, kept_to[combiner.name], _adjustment(combiner, influence, signs))
        candidates += _candidates(problem, held_out, values, target, influence, search, trials, seed, work)
    searches = sum(c.method == "search" for c in candidates)
    work.total = (folds + 1) * (len(candidates) + searches * trials) + front_points
    fold = held_out.folds(folds, seed=seed)
    tried, left_out = list[Tried](), dict[str, str]()
    for candidate in candidates:
        try:
            tried.append(_try(candidate, held_out, fold, goal, kept_to[candidate.combiner.name], work))
        except NoWeightsError as error:
            left_out[candidate.name] = str(error)
    if not tried:
        raise ConfigError(next(iter(left_out.values())))
    tried += [_as_it_is(name, scores, held_out, fold, goal) for name, scores in held_out.rankings.items()]
    best, left_for_values = _best(tried, kept_to, held_out, goal)
    assert best.setting is not None
    combiner = best.setting.combiner
    heads = [t for t in tried if t.method.startswith("head ")]
    for one in tried:
        if heads:
            head = max(heads, key=lambda t: t.mean)
            one.against = head.method.removeprefix("head ")
            one.better, one.better_error = _ahead(one, head, held_out, goal)
    fitted = FittedFusion(
        combiner=combiner,
        method=best.method,
        weights=best.weights,
        weights_std=best.weights_std,
        fused_score=best.setting.fused_score,
        target=goal,
        tried=tried,
        influence=None if combiner.feature is None else _influence(combiner, held_out, best.weights),
        values=dict(values or {}),
        seed=seed,
        folds=folds,
        left_for_values=left_for_values,
        about={
            "rows": len(held_out), "requests": held_out.requests, "requests_are": held_out.requests_are,
            "users": None if held_out.user is None else len(np.unique(held_out.user)),
            "search": search, "trials": trials, "influence": dict(influence or {}), "constraints": list(constraints),
            "left_out": left_out,
        },
    )  # fmt: skip
    if front_points:
        work.doing = "the Pareto front"
        fitted.front = pareto_front(held_out, fitted, signs, points=front_points, seed=seed, progress=work.step)
    return fitted


class _Work:
    """How far it is."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done, self.doing = progress, total, 0, ""

    def step(self) -> None:
        """One more piece is done."""
        self.done += 1
        self.progress(self.done, self.total, self.doing)


def _entering(
    held_out: HeldOut,
    tasks: Sequence[str] | None,
    values: Mapping[str, float] | None,
    influence: Mapping[str, float] | None,
    constraints: Sequence[str],
) -> list[str]:
    """The tasks that enter the score, in the order of the parts."""
    weighed = [c.split(">")[0].split("<")[0].strip().removeprefix("weight:") for c in constraints if "weight:" in c]
    # Without values, nothing says what may stay out.
    by_default = [*values, *(influence or {}), *weighed] if values else []
    named = by_default if tasks is None else list(tasks)
    whence = {"values": values or (), "influence": influence or (), "constraints": weighed, "tasks": named}
    for task in named:
        if task not in held_out.parts:
            where = next(where for where, of in whence.items() if task in of)
            there = nearest(task, held_out.parts) or f"; there are: {', '.join(held_out.parts)}"
            raise ConfigError(f"{where}: no task {task!r} has predictions{there}")
    worth = np.array(list((values or {}).values()), np.float64)
    if not np.isfinite(worth).all() or np.abs(worth).sum() > 1e12 or (worth.any() and np.abs(worth).max() < 1e-12):
        raise ConfigError(f"values are finite numbers of a size between 1e-12 and 1e12: {dict(values or {})}")
    return [task for task in held_out.parts if task in named] if named else list(held_out.parts)


def _check_rewards(held_out: HeldOut, values: Mapping[str, float] | None, target: str | OfRows) -> None:
    """Raise ConfigError where all rankings are worth the same."""
    if isinstance(target, str) and "@" in target:
        reward = held_out.reward(values or {})
        if reward.min() == reward.max():
            raise ConfigError(
                f"target {target}: each of these {len(held_out):,} rows brought the same ({reward[0]:g}), so that all "
                "rankings are worth the same"
            )


def _influence(combiner: Combiner, held_out: HeldOut, weights: Mapping[str, float]) -> Weights:
    assert combiner.feature is not None
    return influence_of(combiner.seen(held_out), weights, combiner.feature)


def _share(combiner: Combiner, held_out: HeldOut, weights: Mapping[str, float], task: str) -> float:
    if combiner.feature is None:
        raise ConfigError(f"share:{task}: the influence of a task in a {combiner.name} cannot be told")
    return _influence(combiner, held_out, weights).get(task, 0.0)


def _adjustment(
    combiner: Combiner, influence: Mapping[str, float] | None, signs: Mapping[str, int]
) -> Callable[[HeldOut, Weights], Weights]:
    def adjusted(held_out: HeldOut, weights: Weights) -> Weights:
        if not influence or combiner.feature is None:
            return weights
        signed = {task: weights.get(task, 0.0) or float(signs[task] or 1) for task in influence}
        return weights_of_influence(combiner.seen(held_out), {**weights, **signed}, influence, combiner.feature)

    return adjusted


def _candidates(
    problem: Problem,
    held_out: HeldOut,
    values: Mapping[str, float] | None,
    target: str | OfRows,
    influence: Mapping[str, float] | None,
    search: Search,
    trials: int,
    seed: int,
    work: _Work,
) -> list[_Candidate]:
    """What is tried of one combiner."""
    combiner, signs, feature = problem.combiner, problem.signs, problem.combiner.feature
    tasks = list(signs)
    is_mean = combiner.name in _VALUE_MODELS
    alike = {task: float(signs[task] or 1) for task in tasks}
    found: dict[str, Callable[[HeldOut], Weights]] = {"all alike": partial(_given, alike)}
    if values and any(values.get(task) for task in tasks):
        worth = {task: float(values.get(task, 0.0)) for task in tasks}
        found["values"] = partial(_given, worth if is_mean else unit(worth))
    task = str(target).partition(":")[2] if isinstance(target, str) and not values else ""

    def reward_of(rows: HeldOut) -> np.ndarray:
        return (rows.labels[task] > 0).astype(float) + 0 * rows.labels[task] if task else rows.reward(values or {})

    if combiner.learns:
        if not (values or task):
            raise ConfigError(
                f"{combiner.name} learns from what a row brought: give values, or a target such as auc:like"
            )
        start = next(of for name, of in reversed(found.items()))
        over_all_rows = isinstance(target, str) and target.startswith("auc:")

        def trained(rows: HeldOut) -> Setting:
            return train_setting(combiner, start(rows), rows, reward_of(rows), within=not over_all_rows, seed=seed)

        return [_Candidate(combiner, "trained", trained)]
    if feature is not None and (values or task):

        def stacked(rows: HeldOut) -> Weights:
            weights = stacked_weights(combiner.seen(rows), tasks, feature, reward_of(rows), binary=bool(task))
            return weights if combiner.name == "weighted_mean" else unit(weights)

        found["stacking"] = stacked

    def set_to(of: Callable[[HeldOut], Weights], rows: HeldOut) -> Setting:
        weights, made = problem.adjust(rows, of(rows)), combiner.at(rows, tasks)
        try:
            return Setting(made, weights, made.build(weights))
        except ValueError as error:  # they make no score
            raise NoWeightsError(str(error)) from None

    candidates = [_Candidate(combiner, method, partial(set_to, of)) for method, of in found.items()]
    if search != "none" and len(tasks) > 1:

        def searched(rows: HeldOut) -> Setting:
            starts = [of(rows) for of in found.values()] + [{task: alike[task]} for task in tasks]
            return search_weights(problem, rows, starts, search=search, trials=trials, seed=seed, progress=work.step)

        candidates.append(_Candidate(combiner, "search", searched))
    if combiner.name == "weighted_mean" and not influence:
        heads: dict[str, Weights] = {task: {task: alike[task]} for task in tasks}
        candidates += [_Candidate(combiner, f"head {t}", partial(set_to, partial(_given, heads[t]))) for t in tasks]
    return candidates


def _given(weights: Weights, held_out: HeldOut) -> Weights:
    return weights


def _try(
    candidate: _Candidate, held_out: HeldOut, fold: np.ndarray, goal: Target, constraints: list[Constraint], work: _Work
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
    return Tried(
        combiner=candidate.combiner.name,
        method=candidate.method,
        mean=_mean(of_fold),
        std=_std(of_fold),
        error=goal.with_error(held_out, scores)[1],
        scores=scores,
        of_fold=np.array(of_fold),
        setting=setting,
        weights_std={t: _spread([w[t] for w in by_fold]) * size for t in weights},
        kept={c.text: c.of(held_out, final, unit(weights)) for c in constraints},
        broken=[c.text for c in constraints if c.violation(c.of(held_out, final, unit(weights))) > 0],
    )


def _spread(weights: list[float]) -> float:
    """Their standard deviation; 0 where they differ by rounding alone."""
    return 0.0 if np.ptp(weights) < 1e-12 else float(np.std(weights, ddof=1))


def _mean(values: list[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.mean(known)) if known else float("nan")


def _std(values: list[float]) -> float:
    known = [v for v in values if np.isfinite(v)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")


def _as_it_is(name: str, scores: np.ndarray, held_out: HeldOut, fold: np.ndarray, goal: Target) -> Tried:
    """Another ranking, which has nothing to fit."""
    of_fold = [goal(held_out.take(fold == n), scores[fold == n]) for n in range(int(fold.max()) + 1)]
    return Tried(
        combiner="", method=name, mean=_mean(of_fold), std=_std(of_fold),
        error=goal.with_error(held_out, scores)[1], scores=scores, of_fold=np.array(of_fold),
    )  # fmt: skip


def _ahead(one: Tried, other: Tried, held_out: HeldOut, goal: Target) -> tuple[float, float]:
    """By how much one is better than the other, and the standard error of that: request by request, or, where the
    target is no mean over requests, fold by fold (scores of two folds are of other weights, and have no common AUC)."""
    if np.ndim(goal.of(held_out, one.scores)):
        return goal.difference(held_out, one.scores, other.scores)
    return mean_and_error(one.of_fold - other.of_fold)


def _best(
    tried: list[Tried], constraints: dict[str, list[Constraint]], held_out: HeldOut, goal: Target
) -> tuple[Tried, tuple[str, float, float] | None]:
    """The one of the best mean on rows left out, among those that keep to the constraints; the value model, where that
    is as good within two standard errors (after the one-standard-error rule; Breiman et al., CART, 1984), and then
    what was left for it, and its lead."""
    able = [t for t in tried if t.combiner and np.isfinite(t.mean)]
    if not able:
        raise ConfigError("the target is not defined on these rows: there is no request, or no event, to judge by")
    if feasible := [t for t in able if not t.broken]:
        best = max(feasible, key=lambda t: t.mean)
        value_models = [t for t in feasible if t.method == "values" and t.combiner in _VALUE_MODELS]
        by_values = max(value_models, key=lambda t: t.mean, default=best)
        ahead, error = _ahead(best, by_values, held_out, goal)
        if best is by_values or ahead > (0.0 if np.isnan(error) else 2 * error):
            return best, None
        return by_values, (best.name, ahead, error)

    def missed(one: Tried) -> float:
        return sum(c.violation(one.kept[c.text]) / (abs(c.bound) or 1.0) for c in constraints[one.combiner])

    nearest_one = min(able, key=missed)
    came = "; ".join(f"{text} came to {nearest_one.kept[text]:.4g}" for text in nearest_one.broken)
    raise ConfigError(f"no weights keep to all constraints; the nearest, {nearest_one.name}: {came}")
