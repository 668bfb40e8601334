"""Weights by search on the target itself, TPE of `optuna` or CMA-ES of `cmaes`, kept to constraints by a penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtcl_torchrec.fusing.combiners import Combiner, Weights
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.targets import Constraint, Target
from mtcl_torchrec.schema import ConfigError

Search = Literal["auto", "tpe", "cma", "none"]
Point = dict[str, float]

_MANY_TRIALS = 200  # from which on CMA-ES, which learns slower and finds more, is the usual choice
_MISSING = "search {search} needs {library}: pip install 'mtcl_torchrec[tune]', or search none, which needs nothing"
_PENALTY = 1e6  # what breaks a constraint is worse than all that does not


@dataclass(frozen=True)
class Problem:
    """What is searched for.

    Args:
        combiner: its weights.
        signs: task -> 1 or -1 where the sign of its weight is known, 0 where not.
        target: to be as high as possible.
        constraints: to be kept to.
        adjust: what is done to weights before they are judged, such as giving a task its influence.
    """

    combiner: Combiner
    signs: dict[str, int]
    target: Target
    constraints: Sequence[Constraint] = ()
    adjust: Callable[[HeldOut, Weights], Weights] = lambda held_out, weights: weights

    def judged(self, held_out: HeldOut, weights: Weights) -> float:
        """The target; where a constraint is broken, a number far below it that rises towards keeping to it."""
        scores = held_out.scores(self.combiner.build(weights))
        found = [c.violation(c.of(held_out, scores, unit(weights))) for c in self.constraints]
        broken = sum(min(v, 1e3) / (abs(c.bound) or 1.0) for v, c in zip(found, self.constraints, strict=True))
        if broken > 0:
            return -_PENALTY * (1 + broken)
        value = self.target(held_out, scores)
        return value if np.isfinite(value) else -_PENALTY


def unit(weights: Weights) -> Weights:
    """Weights of absolute sum 1.

    Example:
        >>> unit({"like": 3.0, "report": -1.0})
        {'like': 0.75, 'report': -0.25}
    """
    size = sum(abs(w) for w in weights.values())
    return {task: w / size for task, w in weights.items()} if size > 0 else dict(weights)


def search_weights(
    problem: Problem,
    held_out: HeldOut,
    starts: Sequence[Weights],
    *,
    search: Search = "auto",
    trials: int = 100,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Weights:
    """The best weights among `starts` and as many `trials`.

    What is searched is xᵢ = wᵢ · (standard deviation of what it multiplies), in [0, 1], [−1, 0] or [−1, 1] as the sign
    is known: a weight's part in the spread of the score, so that rare events need no steps of their own.

    Args:
        starts: weights to begin with, such as the closed-form ones.
        search: ``"tpe"`` (Bergstra et al., NeurIPS 2011), ``"cma"`` (Hansen, 2016), or ``"auto"``: CMA-ES from 200
            trials and two tasks on.
        progress: called after each trial.

    Returns:
        Weights of absolute sum 1.

    Raises:
        ConfigError: `optuna` or `cmaes` is not installed.
    """
    tasks = list(problem.signs)
    if len(tasks) == 1:
        return {tasks[0]: float(problem.signs[tasks[0]] or 1)}
    scale = {task: problem.combiner.scale(held_out.parts[task]) for task in tasks}
    lower = {task: 0.0 if problem.signs[task] > 0 else -1.0 for task in tasks}
    upper = {task: 0.0 if problem.signs[task] < 0 else 1.0 for task in tasks}

    def as_point(weights: Weights) -> dict[str, float]:
        x = {task: weights.get(task, 0.0) / scale[task] for task in tasks}
        largest = max(abs(v) for v in x.values()) or 1.0
        return {task: float(np.clip(v / largest, lower[task], upper[task])) for task, v in x.items()}

    def as_weights(point: dict[str, float]) -> Weights:
        return problem.adjust(held_out, unit({task: point[task] * scale[task] for task in tasks}))

    points = [p for p in map(as_point, starts) if any(p.values())]
    best: tuple[float, Weights] | None = None
    refused: ConfigError | None = None

    def value_of(point: dict[str, float]) -> float:
        nonlocal best, refused
        if not any(point.values()):
            return -(_PENALTY**2)
        try:
            weights = as_weights(point)
        except ConfigError as error:  # no weights of this kind can be adjusted
            refused = error
            return -(_PENALTY**2)
        value = problem.judged(held_out, weights)
        if best is None or value > best[0]:
            best = (value, weights)
        return value

    known = [(value_of(point), point) for point in points]
    if search == "cma" or (search == "auto" and trials >= _MANY_TRIALS):
        middle = max(known, key=lambda pair: pair[0])[1] if known else {t: (lower[t] + upper[t]) / 2 for t in tasks}
        _evolve(value_of, middle, lower, upper, trials, seed, progress)
    else:
        _estimate(value_of, known, lower, upper, trials, seed, progress)
    if best is None:
        raise refused or ConfigError("a search of weights needs one trial at least")
    return best[1]


def _evolve(
    value_of: Callable[[Point], float],
    middle: Point,
    lower: Point,
    upper: Point,
    trials: int,
    seed: int,
    progress: Callable[[], object],
) -> None:
    """CMA-ES from a point on."""
    try:
        from cmaes import CMA  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(_MISSING.format(search="cma", library="cmaes")) from None
    tasks = list(middle)
    bounds = np.array([(lower[task], upper[task]) for task in tasks])
    optimizer = CMA(mean=np.array(list(middle.values())), sigma=0.2, bounds=bounds, seed=seed)
    told: list[tuple[np.ndarray, float]] = []
    for _ in range(trials):
        x = optimizer.ask()
        told.append((x, -value_of(dict(zip(tasks, x.tolist(), strict=True)))))
        progress()
        if len(told) == optimizer.population_size:
            optimizer.tell(told)
            told = []


def _estimate(
    value_of: Callable[[Point], float],
    known: list[tuple[float, Point]],
    lower: Point,
    upper: Point,
    trials: int,
    seed: int,
    progress: Callable[[], object],
) -> None:
    """TPE, told of the points that are known."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(_MISSING.format(search="tpe", library="optuna")) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {task: optuna.distributions.FloatDistribution(lower[task], upper[task]) for task in lower}
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for value, point in known:
        study.add_trial(optuna.trial.create_trial(params=point, distributions=dict(space), value=value))
    for _ in range(trials):
        trial = study.ask(dict(space))
        study.tell(trial, value_of(trial.params))
        progress()
