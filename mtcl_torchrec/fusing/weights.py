"""Weights in closed form: stacking, and targets of influence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from mtcl_torchrec.fusing.combiners import Feature, Weights
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.schema import ConfigError, nearest

_ROUNDS = 10_000


class NoWeightsError(ConfigError):
    """Rows of which a method makes no weights: the method is left out."""


def stacked_weights(
    held_out: HeldOut, tasks: list[str], feature: Feature, reward: np.ndarray, *, binary: bool, ridge: float = 1.0
) -> Weights:
    """Coefficients of a regression of the reward on f(partᵢ) (stacking; Wolpert 1992, Breiman 1996).

    A ridge regression in two rounds: rare events of high value make the reward far noisier where they are probable, so
    the second weighs each row by one over the variance that the first leaves (feasible generalised least squares).
    With f(p) = p and calibrated p, the coefficients of Σ vᵢ yᵢ are estimates of the values vᵢ.

    Args:
        reward: (N,); NaN is left out.
        binary: whether the reward is 0 or 1: a logistic regression then.
        ridge: penalty on the coefficients of the standardised features, against that of one row in N.

    Raises:
        NoWeightsError: the reward, or each part, is the same in all rows.

    Example:
        >>> p = np.linspace(0, 1, 200)
        >>> rows = HeldOut({"a": p, "b": 1 - p**2}, {}, request=np.arange(200))
        >>> found = stacked_weights(rows, ["a", "b"], lambda part: part, 3 * p - 2 * (1 - p**2), binary=False, ridge=0)
        >>> {task: round(w, 3) for task, w in found.items()}
        {'a': 3.0, 'b': -2.0}
    """
    known = ~np.isnan(reward)
    x = np.stack([feature(held_out.parts[task])[known] for task in tasks], axis=1)
    y = reward[known]
    if len(y) == 0 or y.min() == y.max():
        raise NoWeightsError("stacking: the reward is the same in all rows")
    scale = np.maximum(x.std(axis=0), 1e-12)
    z = (x - x.mean(axis=0)) / scale
    if binary:
        model = LogisticRegression(C=1 / max(ridge, 1e-9), max_iter=1000).fit(z, (y > 0).astype(int))
        found = model.coef_[0] / scale
    else:
        found = Ridge(alpha=ridge).fit(z, y, sample_weight=precision_of_rows(z, y, ridge=ridge)).coef_ / scale
    if not found.any():
        raise NoWeightsError("stacking: nothing in the parts tells the reward")
    return dict(zip(tasks, found.tolist(), strict=True))


def precision_of_rows(x: np.ndarray, reward: np.ndarray, *, ridge: float = 1.0) -> np.ndarray:
    """(N,) one over the variance of each row's reward, of mean 1: what a ridge regression leaves, regressed in turn.

    Args:
        x: (N, T) what the reward is regressed on.
        reward: (N,).
    """
    z = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-12)
    left = (reward - Ridge(alpha=ridge).fit(z, reward).predict(z)) ** 2
    spread = np.abs(z - z.min(axis=0))  # a variance grows from its least
    variance = LinearRegression(positive=True).fit(spread, left).predict(spread)
    precision = 1 / np.maximum(variance, max(1e-3 * float(left.mean()), 1e-12))
    return precision / precision.mean()


def _covariance(held_out: HeldOut, tasks: list[str], feature: Feature) -> np.ndarray:
    """(T, T) covariance of f(partᵢ) within requests: what all rows of a request have in common ranks nothing."""
    x = np.stack([feature(held_out.parts[task]) for task in tasks], axis=1)
    rows = np.bincount(held_out.numbers)
    means = np.stack([np.bincount(held_out.numbers, column) / rows for column in x.T], axis=1)
    x = x - means[held_out.numbers]
    return x.T @ x / len(x)


def influence_of(held_out: HeldOut, weights: Mapping[str, float], feature: Feature) -> Weights:
    """Each task's share of the ranking: wᵢ Cov(f(pᵢ), s) / Var(s) with s = Σ wᵢ f(pᵢ), within requests.

    The shares add up to 1; one is negative where a task works against what the others make of the score.

    Example:
        >>> rows = HeldOut({"a": np.array([0.0, 1, 0, 1]), "b": np.array([0.0, 0, 1, 1])}, {}, request=np.zeros(4, int))
        >>> influence_of(rows, {"a": 1.0, "b": 3.0}, lambda part: part)
        {'a': 0.1, 'b': 0.9}
    """
    tasks = list(weights)
    w = np.array(list(weights.values()))
    shares = w * (_covariance(held_out, tasks, feature) @ w)
    total = float(shares.sum())
    return dict(zip(tasks, (shares / total if total > 0 else np.zeros(len(w))).tolist(), strict=True))


def weights_of_influence(
    held_out: HeldOut, base: Mapping[str, float], influence: Mapping[str, float], feature: Feature
) -> Weights:
    """Weights under which some tasks have a given influence; the others keep their weights among each other.

    The tasks named, and all others together as one with the weights of `base`, are given shares tᵢ > 0 of the score's
    variance: the weights minimise ½ wᵀCw − Σ tᵢ log wᵢ, which is convex (risk budgeting; Spinu, *An algorithm for
    computing risk parity weights*, 2013); solved coordinate by coordinate.  A task whose base weight is negative
    keeps that sign.

    Args:
        base: task -> weight.
        influence: task -> share in (0, 1].

    Raises:
        ConfigError: shares that cannot be, or a task that is not in the score.
        NoWeightsError: a task whose part does not vary.

    Example:
        >>> rows = HeldOut({"a": np.array([0.0, 1, 0, 1]), "b": np.array([0.0, 0, 1, 1])}, {}, request=np.zeros(4, int))
        >>> found = weights_of_influence(rows, {"a": 1.0, "b": 1.0}, {"a": 0.9}, lambda part: part)
        >>> round(found["a"] / found["b"], 6)
        3.0
    """
    check_influence(influence, base)
    total = sum(influence.values())
    tasks = list(base)
    covariance = _covariance(held_out, tasks, feature)
    rest = np.array([0.0 if task in influence else base[task] for task in tasks])
    # Columns: each task named, with its sign; then the others as one.
    columns = [np.eye(len(tasks))[tasks.index(task)] * (-1.0 if base[task] < 0 else 1.0) for task in influence]
    budget = list(influence.values())
    if total < 1 - 1e-9:
        if not rest.any():
            raise ConfigError(f"influence: the shares add up to {total:g}, and no other task has a weight")
        columns.append(rest)
        budget.append(1 - total)
    a = np.stack(columns)
    c, t = a @ covariance @ a.T, np.array(budget)
    if still := [name for name, v in zip([*influence, "the others"], np.diag(c), strict=False) if v <= 1e-18]:
        raise NoWeightsError(f"influence: the part of {still[0]} is the same in all rows of each request")
    w = 1 / np.sqrt(np.diag(c))
    for _ in range(_ROUNDS):
        before = w.copy()
        for i in range(len(w)):
            b = c[i] @ w - c[i, i] * w[i]
            w[i] = (-b + np.sqrt(b * b + 4 * c[i, i] * t[i])) / (2 * c[i, i])
        if np.allclose(w, before, rtol=1e-12, atol=0):
            break
    found = w @ a
    size = np.abs(found).sum()
    return dict(zip(tasks, (found / size).tolist(), strict=True))


def check_influence(influence: Mapping[str, float], tasks: Mapping[str, float] | list[str]) -> None:
    """Raise ConfigError for shares that cannot be."""
    for task, share in influence.items():
        if task not in tasks:
            raise ConfigError(f"influence: no task {task!r} in the score{nearest(task, tasks)}")
        if not 0 < share <= 1:
            raise ConfigError(f"influence: the share of {task!r} lies above 0 and at most at 1, not at {share:g}")
    if sum(influence.values()) > 1 + 1e-9:
        raise ConfigError(f"influence: the shares add up to {sum(influence.values()):g}, more than 1")
