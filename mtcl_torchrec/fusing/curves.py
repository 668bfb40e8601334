"""Fits of one dimension on binned rows: a line in log-odds, a slope, rising curves."""

from __future__ import annotations

import numpy as np
from sklearn.isotonic import isotonic_regression

from mtcl_torchrec.fusing.histograms import Binned

STEEPEST = 64.0  # a slope beyond says that the predictions part the labels altogether


class NotFittedError(ValueError):
    """Held-out rows from which nothing can be fitted; the message says why."""


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def check_labels(data: Binned) -> None:
    """Raise `NotFittedError` where the 0/1 labels are all of one kind."""
    positives, total = float((data.y * data.weight).sum()), float(data.weight.sum())
    if positives <= 0:
        raise NotFittedError("no label is positive")
    if positives >= total:
        raise NotFittedError("every label is positive")


def constant(data: Binned) -> bool:
    """Whether the predictions are all alike."""
    return len(data.x) < 2 or float(data.x[-1] - data.x[0]) < 1e-6 * max(1.0, abs(float(data.x[0])))


def platt_line(data: Binned) -> tuple[float, float, str]:
    """Slope and intercept of the logistic regression of the labels on the log-odds, without a penalty.

    Newton's method on (a, b), halving steps that do not lower the loss.  Where the predictions are all alike, or would
    have to be turned round (a ≤ 0), only b is fitted, with a = 1: what they say on average is right then, and their
    order stays.

    Returns:
        a, b, and what is to be noted ("" if nothing is).

    Raises:
        NotFittedError: labels of one kind, or predictions that part them altogether.

    Example:
        >>> a, b, note = platt_line(Binned(np.array([-1.0, 1.0]), np.array([0.25, 0.75]), np.array([8.0, 8.0])))
        >>> round(a, 4), abs(round(b, 4)), note  # log 3
        (1.0986, 0.0, '')
    """
    check_labels(data)
    if constant(data):
        return 1.0, _intercept(data), "the predictions are all alike: only their mean is corrected"
    centre = float(np.average(data.x, weights=data.weight))
    scale = float(np.sqrt(np.average((data.x - centre) ** 2, weights=data.weight)))
    design = np.stack([(data.x - centre) / scale, np.ones_like(data.x)], 1)
    a, b = _newton(design, data.y, data.weight)
    a, b = a / scale, b - a * centre / scale
    if a > STEEPEST:
        raise NotFittedError("the predictions part the labels altogether")
    if a <= 0:
        return 1.0, _intercept(data), "the labels do not rise with the predictions: only their mean is corrected"
    return float(a), float(b), ""


def _intercept(data: Binned) -> float:
    """b that makes σ(z + b) right on average."""
    return float(_newton(np.ones((len(data.x), 1)), data.y, data.weight, data.x)[0])


def _newton(design: np.ndarray, y: np.ndarray, weight: np.ndarray, offset: np.ndarray | float = 0.0) -> np.ndarray:
    """Minimum of Σ w (softplus(z) - y z), z = design · θ + offset."""
    theta, base = np.zeros(design.shape[1]), float(np.average(y, weights=weight))
    theta[-1] = np.log(base / (1 - base)) - float(np.average(offset + np.zeros_like(y), weights=weight))

    def loss(at: np.ndarray) -> float:
        z = design @ at + offset
        return float((weight * (np.logaddexp(0, z) - y * z)).sum())

    current = loss(theta)
    for _ in range(100):
        p = _sigmoid(design @ theta + offset)
        gradient = design.T @ (weight * (p - y))
        hessian = (design * (weight * p * (1 - p))[:, None]).T @ design
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        size = 1.0
        while (smaller := loss(theta - size * step)) > current and size > 1e-8:
            size /= 2
        if size <= 1e-8:
            break
        theta, gain, current = theta - size * step, current - smaller, smaller
        if gain <= 1e-15 * abs(current) and np.abs(step).max() < 1e-9:
            break
    return theta


def temperature_slope(data: Binned) -> float:
    """Slope a of σ(a z) by maximum likelihood.

    Raises:
        NotFittedError: labels of one kind, or a slope outside of 1/64 … 64.

    Example:
        >>> round(temperature_slope(Binned(np.array([-2.0, 2.0]), np.array([0.25, 0.75]), np.array([8.0, 8.0]))), 4)
        0.5493
    """
    check_labels(data)

    def derivative(a: float) -> float:  # of the convex loss
        return float((data.weight * (_sigmoid(a * data.x) - data.y) * data.x).sum())

    low, high = np.log(1 / STEEPEST), np.log(STEEPEST)
    if derivative(1 / STEEPEST) >= 0:
        raise NotFittedError("the labels do not rise with the predictions")
    if derivative(STEEPEST) <= 0:
        raise NotFittedError("the predictions part the labels altogether")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if derivative(float(np.exp(middle))) > 0 else (middle, high)
    return float(np.exp((low + high) / 2))


def isotonic_knots(data: Binned, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the isotonic regression of the labels on the values (pool adjacent violators, scikit-learn's).

    Both ends of each flat stretch are knots.  Where there are more than `knots`, those are kept that leave least of it
    out: one after the other, the point at which the curve through those chosen so far errs most (squared, by weight).

    Returns:
        x and y, (knots,) each, rising; the last knot is repeated where fewer would do.

    Example:
        >>> data = Binned(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.6, 0.4, 1.0]), np.ones(4))
        >>> isotonic_knots(data, 4)
        (array([0., 1., 2., 3.]), array([0. , 0.5, 0.5, 1. ]))
    """
    rising = isotonic_regression(data.y, sample_weight=data.weight)
    step = np.r_[True, rising[1:] != rising[:-1], True]
    return thinned(data.x, rising, data.weight, step[:-1] | step[1:], knots)


def cdf_knots(x: np.ndarray, weight: np.ndarray, knots: int) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the share of rows below a value, a value's own rows counting half.

    Beyond the smallest and largest value it goes on to 0 and 1, over the range of the values on either side.

    Args:
        x: (n,) values, not falling.
        weight: (n,) of each.

    Raises:
        NotFittedError: the values are all alike.

    Example:
        >>> cdf_knots(np.array([0.0, 1.0]), np.array([1.0, 1.0]), 4)
        (array([-1.,  0.,  1.,  2.]), array([0.  , 0.25, 0.75, 1.  ]))
    """
    values, first = np.unique(x, return_index=True)
    if len(values) < 2:
        raise NotFittedError("the predictions are all alike")
    of = np.add.reduceat(weight, first)
    share = (np.cumsum(of) - of / 2) / of.sum()
    span = values[-1] - values[0]
    if knots < 4:
        return thinned(values, share, of, np.ones(len(values), bool), knots)
    inner_x, inner_y = thinned(values, share, of, np.ones(len(values), bool), knots - 2)
    return np.r_[values[0] - span, inner_x, values[-1] + span], np.r_[0.0, inner_y, 1.0]


def thinned(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, candidates: np.ndarray, knots: int
) -> tuple[np.ndarray, np.ndarray]:
    """At most `knots` of the candidates (n,) bool of a curve, the first and last point among them, filled up to that
    number with the last."""
    places = np.flatnonzero(candidates)
    chosen = places if len(places) <= knots else np.array([0, len(x) - 1])
    while len(chosen) < min(knots, len(places)):
        error = weight * (np.interp(x, x[chosen], y[chosen]) - y) ** 2
        error[~candidates] = -1
        error[chosen] = -1
        chosen = np.sort(np.append(chosen, int(error.argmax())))
    chosen = np.append(chosen, np.full(knots - len(chosen), chosen[-1]))
    return x[chosen], y[chosen]
