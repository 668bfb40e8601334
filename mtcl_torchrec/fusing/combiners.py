"""The kinds of fused score whose weights are fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mtcl_torchrec.config import FusionConfig
from mtcl_torchrec.modules import fusion
from mtcl_torchrec.modules.fusion import learned
from mtcl_torchrec.schema import ConfigError, nearest

Weights = dict[str, float]
Feature = Callable[[np.ndarray], np.ndarray]

_SMALLEST = 1e-6


def log_odds(part: np.ndarray) -> np.ndarray:
    """What `Stacking` multiplies its weights by: the log-odds of p moved into [10⁻⁶, 1 − 10⁻⁶]."""
    return learned.log_odds(torch.from_numpy(np.asarray(part, np.float64))).numpy()


@dataclass(frozen=True)
class Combiner:
    """A kind of fused score that is fitted by its weights, one for each task.

    Args:
        name: in tables; of a kind of ours, what a run's YAML calls it.
        build: task -> weight to a module of the signature in `mtcl_torchrec.modules.fusion`.
        config: task -> weight to what is written into the run, or None: such a fusion cannot be saved.
        feature: f, where the score orders rows as Σ wᵢ f(partᵢ) does; it can then be fitted by regression, and the
            influence of a task be told.
        spread: what a weight multiplies, for the size of its steps in a search; the default is `feature`.

    Example:
        >>> from mtcl_torchrec import WeightedMean
        >>> mine = Combiner("mine", WeightedMean, feature=lambda part: part)
    """

    name: str
    build: Callable[[Weights], nn.Module]
    config: Callable[[Weights], FusionConfig] | None = None
    feature: Feature | None = None
    spread: Feature | None = None

    def scale(self, part: np.ndarray) -> float:
        """One over how much a part moves; 1 where that does not matter."""
        of = self.spread or self.feature
        return 1.0 if of is None else 1 / max(float(np.std(of(part))), _SMALLEST)


def _same(part: np.ndarray) -> np.ndarray:
    return part


def _log(part: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(part, _SMALLEST))


# Kind -> the module's name, and what its weights multiply.
_MODULES: dict[str, tuple[str, Feature | None, Feature | None]] = {
    "weighted_mean": ("WeightedMean", _same, None),
    "weighted_geometric_mean": ("WeightedGeometricMean", None, _log),
    "power_product": ("PowerProduct", None, _same),
    "stacking": ("Stacking", log_odds, None),
    "borda": ("Borda", None, None),
    "reciprocal_rank": ("ReciprocalRankFusion", None, None),
}


def known_kinds() -> list[str]:
    """Kinds that can be fitted by their weights."""
    return [kind for kind, (name, *_) in _MODULES.items() if hasattr(fusion, name)]


def combiner_of(kind: str) -> Combiner:
    """A kind of ours, to be fitted.

    Raises:
        ConfigError: no such kind.

    Example:
        >>> combiner_of("weighted_meen")
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: no combiner 'weighted_meen' (did you mean 'weighted_mean'?)
    """
    if kind not in known_kinds():
        raise ConfigError(f"no combiner {kind!r}{nearest(kind, known_kinds())}")
    name, feature, spread = _MODULES[kind]
    make = getattr(fusion, name)

    def build(weights: Weights) -> nn.Module:
        return make(**arguments(kind, weights))

    def config(weights: Weights) -> FusionConfig:
        given: Mapping[str, Any] = arguments(kind, weights)
        return FusionConfig(**given) if kind == "weighted_mean" else FusionConfig(kind=kind, **given)

    return Combiner(kind, build, config, feature, spread)


def arguments(kind: str, weights: Weights) -> dict[str, Any]:
    """What a kind is made with.  In a product of powers, a task that lowers the score has the exponent −1."""
    weights = {task: float(w) for task, w in weights.items()}
    if kind != "power_product":
        return {"weights": weights}
    lowering = {task: -1.0 for task, w in weights.items() if w < 0}
    return {"weights": {t: abs(w) for t, w in weights.items()}, **({"exponents": lowering} if lowering else {})}


def signed_weights(config: FusionConfig) -> Weights:
    """The weights that `arguments` made a configuration of."""
    exponents = getattr(config, "exponents", None) or {}
    return {t: -w if exponents.get(t, 1.0) < 0 else w for t, w in (config.weights or {}).items()}


def resolved(combiners: Sequence[str | Combiner] | None) -> list[Combiner]:
    """The combiners asked for; by default, a value model, a stacking and a log-linear one."""
    if combiners is None:
        usual = ("weighted_mean", "weighted_geometric_mean", "stacking")
        combiners = [kind for kind in usual if kind in known_kinds()]
    if not combiners:
        raise ConfigError("combiners: give one at least")
    return [combiner_of(c) if isinstance(c, str) else c for c in combiners]
