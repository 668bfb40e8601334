"""Impressions with known probabilities, seen by heads that are good at ranking and wrong about probabilities.

For whatever is fitted on a model's predictions, there is a right answer here: the value of a row is Σ vᵢ pᵢ with the
true pᵢ.  How a row comes about: its candidate has a logit zᵢ for each event, αᵢ + signal · (a normal number common to
the events, and one of its own), part of which the whole request shares; the event happens with probability
pᵢ = σ(zᵢ).  A head sees zᵢ with noise, was trained on a share rᵢ of the negatives (its logit is log(1 / rᵢ) too
high) and has a wrong temperature Tᵢ (its logit is divided by it): qᵢ = σ((zᵢ + noise − log rᵢ) / Tᵢ).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Event:
    """One event, what it is worth, and what is wrong with the head that predicts it.

    Args:
        rate: its probability at the middle of the logits.
        value: what it is worth, or costs.
        common: share of the logit's variance that it has in common with the other events; negative: it goes the
            other way.
        negative_rate: share of the negatives that the head was trained on; in (0, 1].
        temperature: what the head's logit is divided by.
    """

    rate: float
    value: float
    common: float = 0.3
    negative_rate: float = 1.0
    temperature: float = 1.0


FOUR_EVENTS: dict[str, Event] = {
    "click": Event(rate=0.2, value=1, common=0.5, negative_rate=0.5, temperature=2.0),
    "like": Event(rate=0.02, value=8, common=0.4, negative_rate=0.1, temperature=0.7),
    "buy": Event(rate=0.004, value=40, common=0.3, negative_rate=0.05, temperature=1.6),
    "report": Event(rate=0.003, value=-60, common=-0.1, negative_rate=0.02, temperature=0.6),
}


@dataclass(frozen=True)
class Impressions:
    """N impressions.

    Args:
        probability: event -> (N,) the true probability.
        predicted: event -> (N,) what the head says.
        labels: event -> (N,) 0.0 or 1.0.
        request: (N,) int64, the rows that are ranked against each other.
        values: event -> what it is worth.
    """

    probability: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    request: np.ndarray
    values: dict[str, float] = field(default_factory=dict)

    @property
    def expected_value(self) -> np.ndarray:
        """(N,) Σ vᵢ pᵢ: nobody can rank better than by it."""
        return np.sum([self.values[name] * p for name, p in self.probability.items()], axis=0)


def draw_impressions(
    requests: int = 5000,
    candidates: int = 30,
    *,
    events: Mapping[str, Event] | None = None,
    signal: float = 1.2,
    of_request: float = 0.2,
    noise: float = 0.4,
    seed: int = 0,
) -> Impressions:
    """Impressions of `requests` requests with as many `candidates` each.

    Args:
        events: the default is `FOUR_EVENTS`, of values 1, 8, 40 and −60.
        signal: standard deviation of the logits.
        of_request: share of their variance that all candidates of a request have in common.
        noise: standard deviation, in logits, of what a head does not know.
        seed: the same seed gives the same impressions.

    Example:
        >>> rows = draw_impressions(100, 10)
        >>> len(rows.request), sorted(rows.values.values())
        (1000, [-60, 1, 8, 40])
    """
    events = FOUR_EVENTS if events is None else events
    rng, n = np.random.default_rng(seed), requests * candidates
    request = np.repeat(np.arange(requests), candidates)

    def normal() -> np.ndarray:  # of variance 1, partly shared within a request
        shared = rng.standard_normal(requests)[request]
        return np.sqrt(of_request) * shared + np.sqrt(1 - of_request) * rng.standard_normal(n)

    common = normal()
    probability, predicted, labels = {}, {}, {}
    for name, event in events.items():
        taste = np.sign(event.common) * np.sqrt(abs(event.common)) * common + np.sqrt(1 - abs(event.common)) * normal()
        logit = np.log(event.rate / (1 - event.rate)) + signal * taste
        probability[name] = 1 / (1 + np.exp(-logit))
        labels[name] = (rng.random(n) < probability[name]).astype(np.float64)
        seen = logit + noise * rng.standard_normal(n) - np.log(event.negative_rate)
        predicted[name] = 1 / (1 + np.exp(-seen / event.temperature))
    return Impressions(probability, predicted, labels, request, {name: event.value for name, event in events.items()})
