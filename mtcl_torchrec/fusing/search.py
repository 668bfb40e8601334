"""Weights by search: TPE or CMA-ES of `optuna` on the target itself, kept to constraints by a penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mtcl_torchrec.fusing.combiners import Combiner, Weights
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.targets import Constraint, Target
from mtcl_torchrec.schema import ConfigError

Search = Literal["auto", "tpe", "cma", "none"]

_MANY_TRIALS = 200  # from which on CMA-ES, which learns slower and finds more, is the usual choice
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
        broken = float(np.sum([min(v, _PENALTY) / (abs(c.bound) or 1.0) for v, c in zip(found, self.constraints, strict=True)]))
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

    def value_of(point: dict[str, float]) -> float:
        nonlocal best
        if not any(point.values()):
            return -_PENALTY**2
        weights = as_weights(point)
        value = problem.judged(held_out, weights)
        if best is None or value > best[0]:
            best = (value, weights)
        return value

    known = [(value_of(point), point) for point in points]
    study, distributions = _study(search, trials, seed, tasks, lower, upper, known)
    for _ in range(trials):
        trial = study.ask(distributions)
        study.tell(trial, value_of(trial.params))
        progress()
    assert best is not None
    return best[1]


def _study(
    search: Search,
    trials: int,
    seed: int,
    tasks: list[str],
    lower: dict[str, float],
    upper: dict[str, float],
    known: list[tuple[float, dict[str, float]]],
) -> tuple[Any, dict[str, Any]]:
    """A study of optuna that knows the starting points, and the space it draws from."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("a search of weights needs optuna: pip install 'mtcl_torchrec[tune]', or search='none'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {task: optuna.distributions.FloatDistribution(lower[task], upper[task]) for task in tasks}
    if search == "cma" or (search == "auto" and trials >= _MANY_TRIALS):
        try:
            import cmaes  # noqa: F401
        except ImportError:
            raise ConfigError("search 'cma' needs cmaes: pip install 'mtcl_torchrec[tune]', or search='tpe'") from None
        middle = max(known, key=lambda pair: pair[0])[1] if known else None
        sampler: Any = optuna.samplers.CmaEsSampler(x0=middle, sigma0=0.2, seed=seed, n_startup_trials=0)
    else:
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for value, point in known:
        study.add_trial(optuna.trial.create_trial(params=point, distributions=distributions, value=value))
    return study, distributions
