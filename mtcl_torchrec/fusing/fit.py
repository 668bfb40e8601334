"""Fit a fused score on held-out predictions: try combiners, judge each on rows it was not fitted on, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from mtcl_torchrec.fusing.combiners import Combiner, Setting, Weights, resolved
from mtcl_torchrec.fusing.cross_validation import (
    VALUE_MODELS,
    Candidate,
    Progress,
    Work,
    ahead_of,
    as_it_is,
    best_of,
    sure_of,
    try_on_folds,
)
from mtcl_torchrec.fusing.fitted import FittedFusion, Tried
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.learned import train_setting
from mtcl_torchrec.fusing.pareto import pareto_front
from mtcl_torchrec.fusing.rivals import verdict_in_target, verdict_on
from mtcl_torchrec.fusing.search import Problem, Search, search_weights, unit
from mtcl_torchrec.fusing.targets import Constraint, OfRows, check_choice, parse_constraints, parse_target
from mtcl_torchrec.fusing.weights import (
    NoWeightsError,
    check_influence,
    influence_of,
    stacked_weights,
    weights_of_influence,
)
from mtcl_torchrec.schema import ConfigError, nearest


def _quiet(done: int, total: int, doing: str) -> None:
    """Say nothing."""


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
    that keeps to the constraints is then fitted on all rows.  Values that are given are only left for weights whose
    lead has a 95 % interval that leaves out 0, request by request (by ``auc`` and ``gauc``, fold by fold): a smaller
    lead is mostly noise.  A method that finds no weights on some fold, such as stacking where nothing happened in it,
    is left out; ``about["left_out"]`` says why.

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
        ConfigError: an option that does not fit; a K that leaves no choice; or no combiner keeps to the constraints,
            and then how far the nearest came.

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
    check_choice(held_out, goal)
    if influence or any(text.strip().startswith("share:") for text in constraints):
        kinds = [c for c in kinds if c.feature is not None]
        if not kinds:
            raise ConfigError("influence: of none of the combiners can the influence of a task be told")
    signs = {task: int(np.sign(values.get(task, 0.0))) if values else 0 for task in entering}
    candidates: list[Candidate] = []
    kept_to: dict[str, list[Constraint]] = {}
    work = Work(progress, 0)
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
            tried.append(try_on_folds(candidate, held_out, fold, goal, kept_to[candidate.combiner.name], work))
        except NoWeightsError as error:
            left_out[candidate.name] = str(error)
    if not tried:
        raise ConfigError(next(iter(left_out.values())))
    best, left_for_values = best_of(tried, kept_to, held_out, goal)
    assert best.setting is not None
    held_out = held_out.with_popularity(best.setting.fused_score)  # the fair rival is fused by the same rule
    tried += [as_it_is(name, scores, held_out, fold, goal) for name, scores in held_out.rankings.items()]
    combiner = best.setting.combiner
    heads = [t for t in tried if t.method.startswith("head ")]
    for one in tried:
        if heads:
            head = max(heads, key=lambda t: t.mean)
            one.against = head.method.removeprefix("head ")
            one.better, one.better_error = ahead_of(one, head, held_out, goal)
            one.better_half = sure_of(held_out, one.of_fold, goal, paired=True).quantile * one.better_error
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
        pays=verdict_on(held_out, best.scores, entering, goal, values or {}, fold=fold),
        pays_in_target=verdict_in_target(held_out, best.scores, entering, goal, values or {}, fold=fold),
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
    work: Work,
) -> list[Candidate]:
    """What is tried of one combiner."""
    combiner, signs, feature = problem.combiner, problem.signs, problem.combiner.feature
    tasks = list(signs)
    is_mean = combiner.name in VALUE_MODELS
    alike = {task: float(signs[task] or 1) for task in tasks}
    found: dict[str, Callable[[HeldOut], Weights]] = {"all alike": partial(_given, alike)}
    if values and any(values.get(task) for task in tasks):
        worth = {task: float(values.get(task, 0.0)) for task in tasks}
        found["values"] = partial(_given, worth if is_mean else unit(worth))
        if unit(worth) == unit(alike):
            del found["all alike"]  # the same ranking
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

        return [Candidate(combiner, "trained", trained)]
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

    candidates = [Candidate(combiner, method, partial(set_to, of)) for method, of in found.items()]
    if search != "none" and len(tasks) > 1:

        def searched(rows: HeldOut) -> Setting:
            starts = [of(rows) for of in found.values()] + [{task: alike[task]} for task in tasks]
            return search_weights(problem, rows, starts, search=search, trials=trials, seed=seed, progress=work.step)

        candidates.append(Candidate(combiner, "search", searched))
    if combiner.name == "weighted_mean" and not influence:
        heads: dict[str, Weights] = {task: {task: alike[task]} for task in tasks}
        candidates += [Candidate(combiner, f"head {t}", partial(set_to, partial(_given, heads[t]))) for t in tasks]
    return candidates


def _given(weights: Weights, held_out: HeldOut) -> Weights:
    return weights
