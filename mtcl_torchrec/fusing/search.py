"""Weights by search on the target itself, TPE of `optuna` or CMA-ES of `cmaes`, kept to constraints by a penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.config.commands import Search
from mtcl_torchrec.fusing.combiners import SIZE, Combiner, Setting, Weights
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.targets import Constraint, Target
from mtcl_torchrec.fusing.weights import NoWeightsError
from mtcl_torchrec.modules.fusion import WeightedMean
from mtcl_torchrec.schema import ConfigError

Point = dict[str, float]

_MANY_TRIALS = 200  # from which on CMA-ES, which learns slower and finds more, is the usual choice
_MISSING = "search {search} needs {library}: pip install 'mtcl_torchrec[tune]', or search none, which needs nothing"
_PENALTY = 1e6  # what breaks a constraint is worse than all that does not


@dataclass(frozen=True)
class Problem:
    """What is searched for.

    Args:
        combiner: its weights, and its knobs.
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

    def judged(self, held_out: HeldOut, setting: Setting, scores: np.ndarray) -> float:
        """The target; where a constraint is broken, a number far below it that rises towards keeping to it."""
        found = [c.violation(c.of(held_out, scores, unit(setting.weights))) for c in self.constraints]
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
) -> Setting:
    """The best weights among `starts` and as many `trials`, and the best places of the combiner's knobs with them.

    What is searched is xᵢ = wᵢ · (standard deviation of what it multiplies), in [0, 1], [−1, 0] or [−1, 1] as the sign
    is known: a weight's part in the spread of the score, so that rare events need no steps of their own.  A knob is
    searched for on the logarithm of its range.

    Args:
        starts: weights to begin with, such as the closed-form ones.
        search: ``"tpe"`` (Bergstra et al., NeurIPS 2011), ``"cma"`` (Hansen, 2016), or ``"auto"``: CMA-ES from 200
            trials and two tasks on.
        progress: called after each trial.

    Returns:
        Weights of absolute sum 1 (or what a knob makes of it), and the combiner with its knobs turned.

    Raises:
        ConfigError: `optuna` or `cmaes` is not installed.
        NoWeightsError: none of the weights that were tried makes a score.
    """
    tasks, knobs = list(problem.signs), problem.combiner.knobs_of(list(problem.signs))
    scale, terms = problem.combiner.scales(held_out, tasks), problem.combiner.seen(held_out)
    lower = {task: 0.0 if problem.signs[task] > 0 else -1.0 for task in tasks} | dict.fromkeys(knobs, 0.0)
    upper = {task: 0.0 if problem.signs[task] < 0 else 1.0 for task in tasks} | dict.fromkeys(knobs, 1.0)

    def as_point(weights: Weights) -> Point:
        x = {task: weights.get(task, 0.0) / scale[task] for task in tasks}
        largest = max(abs(v) for v in x.values()) or 1.0
        at = {task: float(np.clip(v / largest, lower[task], upper[task])) for task, v in x.items()}
        return at | {name: knob.place for name, knob in knobs.items()}

    def as_setting(point: Point) -> Setting:
        turned = {name: knob.at(point[name]) for name, knob in knobs.items()}
        combiner = problem.combiner.at(held_out, tasks, turned)
        weights = problem.adjust(held_out, unit({task: point[task] * scale[task] for task in tasks}))
        weights = {task: w * turned.get(SIZE, 1.0) for task, w in weights.items()}
        return Setting(combiner, weights, combiner.build(weights))

    points = [p for p in map(as_point, starts) if any(p[task] for task in tasks)]
    best: tuple[float, Setting] | None = None
    refused: ConfigError | None = None

    def value_of(point: Point) -> float:
        nonlocal best, refused
        if not any(point[task] for task in tasks):
            return -(_PENALTY**2)
        try:
            setting = as_setting(point)
        except ValueError as error:  # these weights cannot be adjusted, or make no score
            refused = NoWeightsError(str(error))
            return -(_PENALTY**2)
        # What the weights multiply is computed once, where it takes sorting.
        by = setting.fused_score if terms is held_out else WeightedMean(setting.weights)
        value = problem.judged(held_out, setting, terms.scores(by))
        if best is None or value > best[0]:
            best = (value, setting)
        return value

    known = [(value_of(point), point) for point in points]
    if search == "cma" or (search == "auto" and trials >= _MANY_TRIALS):
        middle = max(known, key=lambda pair: pair[0])[1] if known else {n: (lower[n] + upper[n]) / 2 for n in lower}
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
