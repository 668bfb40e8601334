"""A small log with titles, from a world whose probabilities are known: part of the taste stands in the text.

1. **Items.**  An item has a mixture of topics θ (one or two weigh most) and a vector q that no text tells of.
   Its title is drawn from the words of its topics, with a share of words that mean nothing.  ``genres`` are the topics
   above a quarter.
2. **Users.**  A user has a liking for each topic and a vector p.
3. **Utility.**  z = signal · (√share · ⟨liking, θ⟩ + √(1 - share) · ⟨p, q⟩), both products of variance 1, plus how
   good the item is and how generous the user.  `text_share` is what a reader of titles could know at most.
4. **Rating.**  P(rating ≥ k) = σ(z + cₖ), k = 2 … 5, from one uniform number.  So liked (≥ 4), loved (5) and disliked
   (≤ 2) have the known probabilities ``p_liked``, ``p_loved`` and ``p_disliked``.
5. **Log.**  Users rate items drawn by a power law of popularity, whatever their taste; no user rates an item twice.

The columns are those of `mtcl_torchrec.data.movielens.load`, so that whatever reads the one reads the other.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mtcl_torchrec.data.titles import titles, vocabulary

_AT_LEAST = {2: 2.4, 3: 1.2, 4: 0.0, 5: -1.4}  # cₖ


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class TextWorld:
    """See the module.

    Args:
        seed: another seed is another world.
        num_users, num_items: ids run from 1.
        ratings: of each user.
        topics: how many there are.
        words: of a topic.
        title_words: of a title.
        noise: share of words in a title that mean nothing.
        signal: standard deviation of the utility that users and items decide together.
        text_share: share of it that stands in the title.
        latent_dim: of the vectors that no text tells.
        item_exponent: of the power law of popularity.

    Example:
        >>> world = TextWorld(num_users=20, num_items=40, ratings=5)
        >>> world.items().columns.tolist()
        ['item_id', 'title', 'genres', 'year']
        >>> log = world.log()
        >>> len(log), bool(((log.p_liked > 0) & (log.p_liked < 1)).all())
        (100, True)
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_users: Annotated[int, Field(ge=1, le=10**6)] = 1000
    num_items: Annotated[int, Field(ge=2, le=10**6)] = 600
    ratings: Annotated[int, Field(ge=1)] = 60
    topics: Annotated[int, Field(ge=2, le=256)] = 12
    words: Annotated[int, Field(ge=1, le=1000)] = 30
    title_words: Annotated[int, Field(ge=1, le=1000)] = 6
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.2
    signal: Annotated[float, Field(ge=0, le=10)] = 1.6
    text_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    latent_dim: Annotated[int, Field(ge=1, le=64)] = 4
    item_exponent: Annotated[float, Field(ge=0, le=3)] = 0.7

    @model_validator(mode="after")
    def _possible(self) -> TextWorld:
        if self.ratings > self.num_items:
            raise ValueError(f"no user can rate {self.ratings} of {self.num_items} items")
        return self

    def items(self) -> pd.DataFrame:
        """item_id, title, genres (a list), year: what an encoder of texts may read."""
        mixture, draw = self._mixture(), self._draw("titles")
        shape = (self.num_items, self.title_words)
        # A topic for each word, by inversion; the last row of the vocabulary holds the words that mean nothing.
        topic = (draw.random(shape)[..., None] > mixture.cumsum(1)[:, None, :-1]).sum(-1)
        topic = np.where(draw.random(shape) < self.noise, self.topics, topic)
        return pd.DataFrame(
            {
                "item_id": np.arange(1, self.num_items + 1),
                "title": titles(vocabulary(self.topics, self.words), topic, draw.random(shape)),
                "genres": [[f"topic{t}" for t in np.flatnonzero(row > 0.25)] for row in mixture],
                "year": 1950 + draw.integers(0, 50, self.num_items),
            }
        )

    def log(self) -> pd.DataFrame:
        """The ratings, everybody's first before anybody's second; with ``p_liked``, ``p_loved``, ``p_disliked``."""
        draw = self._draw("log")
        popularity = 1 / np.arange(1, self.num_items + 1) ** self.item_exponent
        keys = np.log(draw.permutation(popularity)) + draw.gumbel(size=(self.num_users, self.num_items))
        item = np.argsort(-keys, axis=1)[:, : self.ratings]  # without replacement, by popularity
        user = np.repeat(np.arange(self.num_users), self.ratings).reshape(item.shape)
        z = self.utility()[user, item]
        chance = draw.random(z.shape)
        at_least = {k: 1 / (1 + np.exp(-(z + c))) for k, c in _AT_LEAST.items()}
        rating = 1 + np.sum([chance < p for p in at_least.values()], axis=0)
        log = pd.DataFrame(
            {
                "user_id": user.T.ravel() + 1,
                "item_id": item.T.ravel() + 1,
                "rating": rating.T.ravel(),
                "position": np.arange(self.ratings).repeat(self.num_users),
            }
        )
        for name, label in (("liked", log.rating >= 4), ("loved", log.rating == 5), ("disliked", log.rating <= 2)):
            log[name] = label.astype("int8")
        for name, p in (("liked", at_least[4]), ("loved", at_least[5]), ("disliked", 1 - at_least[3])):
            log[f"p_{name}"] = p.T.ravel()
        return log.merge(self.items(), on="item_id", how="left")

    def utility(self) -> np.ndarray:
        """(users, items): z of every pair."""
        draw, mixture = self._draw("tastes"), self._mixture()
        by_text = draw.normal(size=(self.num_users, self.topics)) @ (mixture - mixture.mean(0)).T
        beyond = draw.normal(size=(self.num_users, self.latent_dim)) @ draw.normal(
            size=(self.latent_dim, self.num_items)
        )
        together = np.sqrt(self.text_share) * _scaled(by_text) + np.sqrt(1 - self.text_share) * _scaled(beyond)
        good, generous = draw.normal(size=self.num_items), draw.normal(size=(self.num_users, 1))
        return self.signal * together + 0.4 * good + 0.4 * generous

    def _mixture(self) -> np.ndarray:
        """(items, topics), rows that add up to 1."""
        return self._draw("topics").dirichlet(np.full(self.topics, 0.15), size=self.num_items)

    def _draw(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what.encode()])


def _scaled(values: np.ndarray) -> np.ndarray:
    return values / max(float(values.std()), 1e-12)
