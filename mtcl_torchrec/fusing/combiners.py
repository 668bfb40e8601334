"""The kinds of fused score that are fitted: by their weights, and by what else a kind has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from mtcl_torchrec.config import FusionConfig
from mtcl_torchrec.config.commands import USUAL_COMBINERS as USUAL
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.modules import fusion
from mtcl_torchrec.modules.fusion import learned
from mtcl_torchrec.schema import ConfigError, nearest

Weights = dict[str, float]
Feature = Callable[[np.ndarray], np.ndarray]

ALL = "all"
SIZE = "size"  # the knob that is the absolute sum of the weights, where that matters
_SMALLEST = 1e-6


def log_odds(part: np.ndarray) -> np.ndarray:
    """What `Stacking` multiplies its weights by: the log-odds of p moved into [10⁻⁶, 1 − 10⁻⁶]."""
    return learned.log_odds(torch.from_numpy(np.asarray(part, np.float64))).numpy()


class Knob(NamedTuple):
    """A number that a search turns beside the weights, evenly in its logarithm.

    Args:
        low, high: its bounds, above 0.
        start: without a search.

    Example:
        >>> Knob(1, 100, 10).place, Knob(1, 100, 10).at(1.0)
        (0.5, 100.0)
    """

    low: float
    high: float
    start: float

    @property
    def place(self) -> float:
        """Where it starts, from 0 to 1."""
        return math.log(self.start / self.low) / math.log(self.high / self.low)

    def at(self, place: float) -> float:
        """Its value at a place from 0 to 1."""
        return float(self.low * (self.high / self.low) ** place)


@dataclass(frozen=True)
class Combiner:
    """A kind of fused score that is fitted by its weights, one for each task, and by its knobs, if it has some.

    Args:
        name: in tables; of a kind of ours, what a run's YAML calls it.
        build: task -> weight to a module of the signature in `mtcl_torchrec.modules.fusion`.
        config: task -> weight to what is written into the run, or None: such a fusion cannot be saved.
        feature: f, where the score orders rows as Σ wᵢ f(partᵢ) does; it can then be fitted by regression, and the
            influence of a task be told.
        spread: what a weight multiplies, for the size of its steps in a search; the default is `feature`.
        terms: rows to the same rows with the parts that `feature` is given, where those are not the tasks' own.  With
            a `feature` that changes nothing, a weighted mean of them orders the rows as the score does.
        knobs: tasks to what a search turns beside the weights.
        turned: (rows, tasks, knob -> its value) to this combiner with its knobs there; needed with `knobs`.
        learns: what is built of the weights is where training on the rows' reward starts; see
            `mtcl_torchrec.fusing.learned`.

    Example:
        >>> from mtcl_torchrec import WeightedMean
        >>> mine = Combiner("mine", WeightedMean, feature=lambda part: part)
    """

    name: str
    build: Callable[[Weights], nn.Module]
    config: Callable[[Weights], FusionConfig] | None = None
    feature: Feature | None = None
    spread: Feature | None = None
    terms: Callable[[HeldOut], HeldOut] | None = None
    knobs: Callable[[Sequence[str]], dict[str, Knob]] | None = None
    turned: Callable[[HeldOut, Sequence[str], Mapping[str, float]], Combiner] | None = None
    learns: bool = False

    def scales(self, rows: HeldOut, tasks: Sequence[str]) -> Weights:
        """Task -> one over how much its part moves; 1 where that does not matter."""
        of, parts = self.spread or self.feature, self.seen(rows).parts
        return {task: 1.0 if of is None else 1 / max(float(np.std(of(parts[task]))), _SMALLEST) for task in tasks}

    def seen(self, rows: HeldOut) -> HeldOut:
        """The rows with the parts that `feature` is given."""
        return rows if self.terms is None else self.terms(rows)

    def knobs_of(self, tasks: Sequence[str]) -> dict[str, Knob]:
        """What a search turns beside the weights."""
        return {} if self.knobs is None else self.knobs(tasks)

    def at(self, rows: HeldOut, tasks: Sequence[str], values: Mapping[str, float] | None = None) -> Combiner:
        """This combiner with its knobs at some values; None is where they start."""
        if self.turned is None:
            return self
        return self.turned(rows, tasks, {n: k.start for n, k in self.knobs_of(tasks).items()} | dict(values or {}))


@dataclass(frozen=True)
class Setting:
    """A combiner with all that was fitted of it.

    Args:
        combiner: with its knobs where they were found best.
        weights: task -> weight.
        fused_score: built of them, and trained where it learns.
    """

    combiner: Combiner
    weights: Weights
    fused_score: nn.Module

    @property
    def config(self) -> FusionConfig | None:
        """What is written into the run."""
        return None if self.combiner.config is None else self.combiner.config(self.weights)


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
    "soft_voting": ("SoftVoting", None, None),
    "hard_voting": ("HardVoting", None, None),
    "top_k_voting": ("TopKVoting", None, None),
    "borda": ("Borda", None, None),
    "reciprocal_rank": ("ReciprocalRankFusion", None, None),
}
_OTHERS = ("expected_value", "monotone_network", "context_gated_mean")


def known_kinds() -> list[str]:
    """Kinds that can be fitted."""
    return [*_MODULES, *_OTHERS]


def combiner_of(kind: str, rows: HeldOut | None = None) -> Combiner:
    """A kind of ours, to be fitted.

    Args:
        rows: what it is fitted on; an expected value takes its chains and numbers from them, and the weights of a
            context-gated mean depend on all of their dense features and embeddings.

    Raises:
        ConfigError: no such kind, or rows that lack what it needs.

    Example:
        >>> combiner_of("weighted_meen")
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: no combiner 'weighted_meen' (did you mean 'weighted_mean'?)
    """
    if kind == "expected_value":
        return _expected_value(rows)
    if kind == "monotone_network":
        return monotone_network()
    if kind == "context_gated_mean":
        if rows is None or rows.dense_features is None:
            raise ConfigError("context_gated_mean: its weights depend on the context, and these rows have none")
        widths = {name: int(values.shape[1]) for name, values in rows.embeddings.items()}
        return context_gated_mean(features=widths, dense_columns=range(rows.dense_features.shape[1]))
    if kind == "borda":
        return replace(_by_weights(kind, {}), feature=_same, terms=places)
    if kind not in _MODULES:
        raise ConfigError(f"no combiner {kind!r}{nearest(kind, known_kinds())}")
    return _by_weights(kind, {})


def _by_weights(kind: str, options: Mapping[str, Any]) -> Combiner:
    name, feature, spread = _MODULES[kind]
    make = getattr(fusion, name)

    def build(weights: Weights) -> nn.Module:
        return make(**arguments(kind, weights, options))

    def config(weights: Weights) -> FusionConfig:
        given: Mapping[str, Any] = arguments(kind, weights, options)
        return FusionConfig(**given) if kind == "weighted_mean" else FusionConfig(kind=kind, **given)

    combiner = Combiner(kind, build, config, feature, spread)
    if kind not in _KNOBS:
        return combiner
    knobs, options_at = _KNOBS[kind]

    def turned(rows: HeldOut, tasks: Sequence[str], values: Mapping[str, float]) -> Combiner:
        return replace(_by_weights(kind, options_at(rows, tasks, values)), knobs=knobs, turned=turned)

    return replace(combiner, knobs=knobs, turned=turned)


# ---------------------------------------------------------------------- knobs


def _thresholds(rows: HeldOut, tasks: Sequence[str], values: Mapping[str, float]) -> dict[str, Any]:
    """A task votes for a share of the rows, which says its threshold."""
    shares = {task: values[f"votes for:{task}"] for task in tasks}
    return {"thresholds": {t: _rounded(float(np.quantile(rows.parts[t], 1 - s))) for t, s in shares.items()}}


def _soft(rows: HeldOut, tasks: Sequence[str], values: Mapping[str, float]) -> dict[str, Any]:
    spread = float(np.mean([np.std(rows.parts[task]) for task in tasks]))
    temperature = _rounded(max(spread * values["temperature"], _SMALLEST))
    return {**_thresholds(rows, tasks, values), "temperature": temperature}


def _top(rows: HeldOut, tasks: Sequence[str], values: Mapping[str, float]) -> dict[str, Any]:
    return {"k": max(1, round(values["votes for"] * float(rows.rows_of_requests.mean())))}


def _reciprocal(rows: HeldOut, tasks: Sequence[str], values: Mapping[str, float]) -> dict[str, Any]:
    return {"k": round(values["k"])}


def _powers(rows: HeldOut, tasks: Sequence[str], values: Mapping[str, float]) -> dict[str, Any]:
    return {"exponents": {task: _rounded(values[f"exponent:{task}"]) for task in tasks}}


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")  # as a person reads it in fusion.yaml


def _votes_for(tasks: Sequence[str]) -> dict[str, Knob]:
    return {f"votes for:{task}": Knob(0.01, 0.9, 0.25) for task in tasks}  # of all rows


_KNOBS: dict[str, tuple[Callable[..., dict[str, Knob]], Callable[..., dict[str, Any]]]] = {
    "hard_voting": (_votes_for, _thresholds),
    "soft_voting": (lambda tasks: {**_votes_for(tasks), "temperature": Knob(0.05, 5.0, 1.0)}, _soft),
    "top_k_voting": (lambda tasks: {"votes for": Knob(0.02, 0.8, 0.25)}, _top),  # of the rows of a request
    "reciprocal_rank": (lambda tasks: {"k": Knob(1, 1000, 60)}, _reciprocal),
    "power_product": (
        lambda tasks: {**{f"exponent:{t}": Knob(0.25, 4.0, 1.0) for t in tasks}, SIZE: Knob(1, 1000, 1)}, _powers
    ),
}  # fmt: skip


# ---------------------------------------------------------------------- kinds with more than weights


def places(rows: HeldOut) -> HeldOut:
    """The rows with `Borda`'s points of each task in the place of the parts.

    Example:
        >>> places(HeldOut({"click": np.array([0.2, 0.9, 0.3])}, {}, np.array([1, 1, 1]))).parts["click"]
        array([0. , 1. , 0.5], dtype=float32)
    """
    parts, context = rows.tensors
    votes = fusion.Borda(dict.fromkeys(parts, 1.0)).votes(torch.stack([*parts.values()], 1), context.request)
    return rows.with_parts(dict(zip(parts, votes.T.numpy(), strict=True)))


def _expected_value(rows: HeldOut | None) -> Combiner:
    """Σ wᵢ nᵢ Pᵢ with the chains and numbers of the rows."""
    given = {} if rows is None else dict(rows.given)
    numbers = {} if rows is None else dict(rows.item_numbers)

    def arguments_of(weights: Weights) -> dict[str, Any]:
        whole = dict(weights)
        for task in weights:
            while task in given:
                task = given[task]
                whole.setdefault(task, 0.0)
        chains = {task: first for task, first in given.items() if task in whole}
        return {"weights": whole, **({"given": chains} if chains else {})}

    def build(weights: Weights) -> nn.Module:
        options = arguments_of(weights)
        read = {task: number for task, number in numbers.items() if task in options["weights"]}
        return fusion.ExpectedValue(options.pop("weights"), numbers=read, **options)

    def config(weights: Weights) -> FusionConfig:
        options = arguments_of(weights)
        names = {task: number.name for task, number in numbers.items() if task in options["weights"]}
        return FusionConfig(kind="expected_value", **options, **({"numbers": names} if names else {}))

    named = all(number.name for number in numbers.values())
    return Combiner("expected_value", build, config if named else None, _same, terms=expected_terms)


def expected_terms(rows: HeldOut) -> HeldOut:
    """The rows with nᵢ Pᵢ in the place of the parts, all divided by one number, so that they stay in [0, 1].

    Example:
        >>> parts = {"click": np.array([0.5]), "buy": np.array([0.2])}
        >>> rows = HeldOut(parts, {}, np.array([1]), given={"buy": "click"})
        >>> expected_terms(rows).parts["buy"]
        array([0.1])
    """
    terms = {}
    for task, part in rows.parts.items():
        terms[task] = part * rows.amounts.get(task, 1.0)
        event = task
        while event in rows.given:
            event = rows.given[event]
            terms[task] = terms[task] * rows.parts[event]
    largest = max([1.0, *(float(amount.max()) for amount in rows.amounts.values())])
    return rows.with_parts({task: term / largest for task, term in terms.items()})


def monotone_network(hidden: Sequence[int] = (8,)) -> Combiner:
    """A `MonotoneNetwork`, of whose weights only the signs are taken."""

    def signs(weights: Weights) -> dict[str, Any]:
        return {task: -1 if w < 0 else 1 for task, w in weights.items()}

    return Combiner(
        "monotone_network",
        lambda weights: fusion.MonotoneNetwork(signs(weights), hidden=hidden),
        lambda weights: FusionConfig(kind="monotone_network", signs=signs(weights), hidden=list(hidden)),
        learns=True,
    )


def context_gated_mean(
    *, features: Mapping[str, int], dense_columns: Sequence[int], names: Sequence[str] = (), hidden: int = 16
) -> Combiner:
    """A `ContextGatedMean`, which starts as the value model of the weights.

    Args:
        features, dense_columns: what it reads, see `ContextGatedMean`.
        names: the features of the schema that these belong to; without them, it cannot be saved.
        hidden: width of the hidden layer.
    """

    def build(weights: Weights) -> nn.Module:
        return fusion.ContextGatedMean(weights, features=features, dense_columns=dense_columns, hidden=hidden)

    def config(weights: Weights) -> FusionConfig:
        return FusionConfig(kind="context_gated_mean", weights=weights, features=list(names), hidden=[hidden])

    return Combiner("context_gated_mean", build, config if names else None, learns=True)


# ---------------------------------------------------------------------- weights of a configuration


def arguments(kind: str, weights: Weights, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a kind is made with.  In a product of powers, a task that lowers the score has a negative exponent.

    Args:
        options: of that kind; of one by task, those of tasks without weight are left out.
    """
    weights = {task: float(w) for task, w in weights.items()}
    given = {
        name: {task: v for task, v in value.items() if task in weights} if isinstance(value, Mapping) else value
        for name, value in (options or {}).items()
    }
    if kind != "power_product":
        return {"weights": weights, **given}
    powers = given.get("exponents", {})
    exponents = {task: (-1.0 if w < 0 else 1.0) * powers.get(task, 1.0) for task, w in weights.items()}
    unusual = {task: power for task, power in exponents.items() if power != 1}
    return {"weights": {t: abs(w) for t, w in weights.items()}, **({"exponents": unusual} if unusual else {})}


def signed_weights(config: FusionConfig) -> Weights:
    """The weights that `arguments` made a configuration of."""
    exponents = getattr(config, "exponents", None) or {}
    return {t: -w if exponents.get(t, 1.0) < 0 else w for t, w in (config.weights or {}).items()}


def resolved(combiners: Sequence[str | Combiner] | None, rows: HeldOut | None = None) -> list[Combiner]:
    """The combiners asked for; by default, a value model, a log-linear one and a stacking, and an expected value where
    the rows have a chain of events or a number (a price).

    Args:
        combiners: kinds by name, or combiners; ``"all"`` are all kinds that the rows have what is needed for.

    Raises:
        ConfigError: no combiner at all, or a kind that there is not.
    """
    chained = rows is not None and bool(rows.given or rows.item_numbers)
    if combiners is None:
        combiners = [*USUAL, *(["expected_value"] if chained else [])]
    if not combiners:
        raise ConfigError("combiners: give one at least")
    named = {c.name for c in combiners if isinstance(c, Combiner)}
    found: dict[str, Combiner] = {}
    for asked in combiners:
        if isinstance(asked, Combiner):
            found[asked.name] = asked
        for kind in known_kinds() if asked == ALL else [asked] if isinstance(asked, str) else []:
            left_out = asked == ALL and (
                (kind == "expected_value" and not chained)
                or (kind == "context_gated_mean" and (rows is None or rows.dense_features is None))
            )
            if not left_out and kind not in named:
                found.setdefault(kind, combiner_of(kind, rows))
    return list(found.values())
