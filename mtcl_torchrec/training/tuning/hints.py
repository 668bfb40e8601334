"""What to do next, from how the trials of a search went."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.tuning.space import Parameter, Space, Value, shown

if TYPE_CHECKING:
    from mtcl_torchrec.training.tuning.study import Finished

_NEAR = 0.05  # of a range counts as its edge
_ENOUGH = 8  # trials, before which the best of them says little of where the next one would be


def hints(space: Space, trials: Sequence[Finished], best: Finished) -> list[str]:
    """One line for each thing worth knowing before the next search.

    - The best value of a parameter lies at the edge of its range, and the run would take values beyond it.
    - The best trial is among the last quarter: more trials may find a better one.
    - Whether more trials would pay, or there are too few to tell anything of the settings.
    - Trials failed, and why.

    Args:
        space: what was searched.
        trials: all that are over.
        best: the best of them.
    """
    found = []
    complete = [trial.number for trial in trials if trial.state == "complete"]
    for parameter in space.parameters if best.number and len(complete) >= enough(len(space.parameters)) else ():
        if parameter.path in best.values and (edge := _edge(space, parameter, best.values[parameter.path])):
            found.append(edge)
    later = sum(number > best.number for number in complete)
    if len(complete) >= _ENOUGH and later < len(complete) / 4:
        found.append(
            f"the best is trial {best.number} of {len(trials)}: trials still improve; go on with --trials "
            f"{math.ceil(1.5 * len(trials))}"
        )
    elif len(complete) < enough(len(space.parameters)):
        found.append(
            f"{len(complete)} complete trials say little of {len(space.parameters)} settings: which of them matter, "
            f"and where their ranges are too narrow, is told from {enough(len(space.parameters))} on; go on with "
            f"--trials {len(trials) - len(complete) + enough(len(space.parameters))}"
        )
    elif best.number:
        found.append(f"none of the last {later} complete trials was better than trial {best.number}: more pay little")
    reasons = Counter(trial.error for trial in trials if trial.state == "failed")
    found += [f"{count} trial{'s' * (count > 1)} failed: {reason}" for reason, count in reasons.most_common(3)]
    return found


def enough(settings: int) -> int:
    """Complete trials from which on importances and edges of so many settings are told: twice as many, and 8 at least,
    which the sampler draws at random before it learns of them.

    Example:
        >>> enough(2), enough(13)
        (8, 26)
    """
    return max(_ENOUGH, 2 * settings)


def _edge(space: Space, parameter: Parameter, value: Value) -> str | None:
    """A line where the value is the last of its range, and there is something beyond."""
    if isinstance(value, (bool, str, type(None))):
        return None
    if (bounds := parameter.config.bounds) is None:
        options = [v for v in parameter.options if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(options) < 3 or len(options) < len(parameter.options) or value not in (min(options), max(options)):
            return None
        if value <= 0:  # no fewer, and no less, than nothing
            return None
        return _said(parameter, value, ", ".join(map(shown, sorted(options))))
    low, high = bounds
    scale = math.log if parameter.config.log is not None else float
    at = (scale(value) - scale(low)) / (scale(high) - scale(low))
    if _NEAR < at < 1 - _NEAR:
        return None
    beyond = _beyond(parameter, at > 0.5)
    try:
        space.written([(parameter, beyond)])
    except ConfigError:  # a dropout of less than 0
        return None
    return _said(parameter, value, f"{shown(low)} to {shown(high)}")


def _beyond(parameter: Parameter, above: bool) -> float | int:
    bounds = parameter.config.bounds
    assert bounds is not None
    low, high = bounds
    if parameter.config.integer is not None:
        return int(high) + 1 if above else int(low) - 1
    if parameter.config.log is not None:
        return high * 2 if above else low / 2
    return high + (high - low) / 4 if above else low - (high - low) / 4


def _said(parameter: Parameter, value: Value, values: str) -> str:
    factor = "×" if parameter.config.times is not None else ""
    return (
        f"{parameter.path}: the best, {factor}{shown(value)}, is at the edge of what was searched ({values}): widen it"
    )
