"""The search for a baseline's settings: every baseline has the same seconds, and the same number of trials, but for
networks, of which each trial is a training.

It is random search (Bergstra & Bengio, JMLR 2012) by scikit-learn: the first trial is the baseline's usual setting, the
others are drawn.  With two to five settings and some ten trials, optuna's TPE would still be in its random start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from sklearn.model_selection import ParameterGrid, ParameterSampler

_DRAWS = 32  # from lists, before all that is left
Settings = dict[str, Any]
# Split -> task -> (N,), or (N, C) of a multiclass task.
Predictions = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Budget:
    """What the search for one baseline's settings may cost.

    Args:
        trials: settings that are tried for each task, the usual one included; at least 1.
        seconds: no trial begins that would probably end after so many; None is no limit.  The first trial of each
            task always runs.
        network_trials: as `trials`, of networks, each a training; the usual setting is that of the run itself.
    """

    trials: int = 8
    seconds: float | None = None
    network_trials: int = 1

    def trials_of(self, network: bool) -> int:
        """Of a baseline that is a network, or none."""
        return self.network_trials if network else self.trials


@dataclass
class Trial:
    """One setting that was tried.

    Args:
        settings: by name.
        quality: on the validation split, the higher the better; NaN where it failed.
        seconds: what it took.
    """

    settings: Settings
    quality: float
    seconds: float


@dataclass
class Found:
    """What a search came to.

    Args:
        settings: the best.
        quality: theirs.
        predictions: theirs.
        trials: all that were tried, in order.
    """

    settings: Settings = field(default_factory=dict)
    quality: float = math.nan
    predictions: Predictions = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What all trials took."""
        return sum(trial.seconds for trial in self.trials)


def candidates(usual: Settings, space: Mapping[str, Any], trials: int, seed: int) -> list[Settings]:
    """The usual settings, and others drawn from a space until there are as many as trials, or the space is used up.
    Those of fewer trials are the first of those of more, so that a search can be gone on with.

    Args:
        space: setting -> list of values, or a distribution of scipy.

    Example:
        >>> found = candidates({"c": 1, "d": 0}, {"c": [1, 2, 4]}, trials=9, seed=0)
        >>> found[0], sorted(setting["c"] for setting in found)
        ({'c': 1, 'd': 0}, [1, 2, 4])
    """
    found = [dict(usual)]
    lists = all(isinstance(values, Sequence) for values in space.values())
    if lists:  # drawn without replacement, and in another order where there are more draws: their number is fixed
        size = len(ParameterGrid(dict(space)))
        draws = [min(_DRAWS, size), size] if space else []
    else:
        draws = [4 * trials]
    for drawn in chain(*(ParameterSampler(dict(space), count, random_state=seed) for count in draws)):
        setting = {
            **usual,
            **{name: value.item() if hasattr(value, "item") else value for name, value in drawn.items()},
        }
        if len(found) < trials and setting not in found:
            found.append(setting)
    return found


def search(
    settings: Sequence[Settings],
    attempt: Callable[[Settings], tuple[Predictions, float]],
    *,
    until: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    before: Found | None = None,
    keep: Callable[[Found], object] = lambda found: None,
) -> Found:
    """Try settings one after the other and keep the best.

    Args:
        settings: to try, the first of them always.
        before: what an interrupted search had found; its trials are the first of these settings.
        keep: is given all that was found so far, after each trial.
        attempt: predictions of a setting, and their quality on the validation split; what raises FloatingPointError
            (training that diverged) is a trial that failed.
        until: time of the clock at which it ends; what would take longer than the trials before is not begun.

    Raises:
        FloatingPointError: every trial failed.

    Example:
        >>> found = search([{"x": 1}, {"x": 3}, {"x": 2}], lambda s: ({}, -abs(s["x"] - 2.2)))
        >>> found.settings, len(found.trials)
        ({'x': 2}, 3)
    """
    found, failure = before or Found(), FloatingPointError("every trial failed")
    for setting in settings[len(found.trials) :]:
        typical = found.seconds / max(len(found.trials), 1)
        if found.trials and clock() + typical > until:
            break
        began = clock()
        try:
            predictions, quality = attempt(setting)
        except FloatingPointError as error:
            failure = error
            found.trials.append(Trial(setting, math.nan, clock() - began))
            keep(found)
            continue
        found.trials.append(Trial(setting, quality, clock() - began))
        better = not quality <= found.quality if not math.isnan(quality) else not found.predictions
        if better:
            found.settings, found.quality, found.predictions = setting, quality, predictions
        keep(found)
    if not found.predictions and all(math.isnan(trial.quality) for trial in found.trials):
        raise failure
    return found
