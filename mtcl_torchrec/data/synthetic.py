"""Logs of any size from a world whose probabilities are known: every row is a function of (seed, row index) alone.

Nothing is stored and nothing is read: `World.rows` computes the rows it is asked for, in any order, chunk, process or
rank, and `World.oracle` gives the true probability of every label in them.  How a row comes about:

1. **Who, what, when.**  The user is drawn from a Zipf law over all users, the item from one over the items there are at
   that time, the place (mostly the user's home) and the device by chance.  Time grows with the row; the hour is local.
2. **Taste.**  A user has a vector p (near that of their segment), an item a vector q (near that of its category), each
   coordinate with variance 1.  Task t's taste is Σ_d b_t[d] p[d] q[d] with ‖b_t‖ = 1; the b_t are such that the tastes
   of two tasks correlate as the dials say.  Quality of the item, openness of the user and the moment (segment × hour,
   device, place) are made the same way.
3. **Logit.**  z_t = α_t + signal · (a weighted sum of these four, of variance 1) + effect_t · log price.  α_t is solved
   so that the mean of the label is what the world asks for.
4. **Labels.**  An event is 1 with probability σ(z).  In a chain (buy after click) the label exists only where the
   parent is 1.  The content task, which category the user turns to next, is a softmax over the user's closeness to the
   categories and the hour; the item at hand plays no part in it.

Three dials, off by default, add what makes real logs hard; a world without them has the same rows to the digit.

- `World.text`: an item has a title, a few words of two topics and some that mean nothing.  That share of the variance
  of its vector q is the mean topic of these words: who reads titles can know it of an item nobody has met.
- `World.position_bias`, b: a row stands at a position k of a list, drawn by itself, where a user looks with probability
  k⁻ᵇ; nothing happens to what is not looked at (the position-based model of Craswell et al., *An Experimental
  Comparison of Click Position-Bias Models*, WSDM 2008, with the examination of Joachims et al., WSDM 2017).
- `World.delay`: an event is recorded some time after its row (exponential, as in Chapelle, *Modeling Delayed Feedback
  in Display Advertising*, KDD 2014, or log-normal, by `World.delay_spread`), and in the log as of a moment
  (``rows(..., as_of=...)``) it is a 0 until then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mtcl_torchrec.data.outcomes import Column, Outcome
from mtcl_torchrec.data.synthetic_labels import DAY, TAG_DIMS, item_columns, row_columns, tag_lists
from mtcl_torchrec.data.synthetic_truth import (
    BLOCK,
    DEVICES,
    HOURS,
    PLACES,
    SEGMENTS,
    START,
    Draw,
    describe,
    draw_rows,
    examination,
    truth,
)
from mtcl_torchrec.schema import DataError, Feature, Group, Schema, Task, check_unique

POSITIONS = 10
MAX_IDS = 10**12
MAX_ROWS = 2**41

Share = Annotated[float, Field(ge=0, le=0.95)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class World:
    """A world with known probabilities.  The ready ones: `mtcl_torchrec.data.worlds.ready_world`.

    Args:
        outcomes: the tasks, parents before children.
        seed: another seed is another world.
        horizon: rows that the world is meant for, all splits together: `days` and `cold_after` refer to it.  Rows
            beyond it exist, too.
        num_users, num_items: ids run from 1; 0 is the schema's "unknown".
        user_exponent, item_exponent: of the Zipf laws; 0 is uniform.
        latent_dim: coordinates of the users' and items' vectors, above the number of tasks.
        categories: of the items; an item has one.
        signal: standard deviation of a logit, about: 0 is pure noise, 3 nearly certain.
        context: share of a logit's variance that the moment (hour, device, place) decides.
        correlation: of the tastes of two tasks, ρ.
        conflict: from 0 to 1, turns the opposed tasks against the others: their correlation is ρ (1 - 2 · conflict).
        missing: share of the labels that are missing, for each task by itself.
        cold_items: share of the items, those with the highest ids, that no row before `cold_after` · `horizon` is
            about; of the rows from there on, the same share is about them.
        cold_after: see `cold_items`.
        days: that the horizon spans.
        text: share of the variance of an item's vector that its title explains; above 0, there are titles.
        position_bias: b of the probability k⁻ᵇ to look at position k; above 0, there is a column ``position``.  The
            means are those of what is looked at.
        positions: of a list; 10 where there is a position bias.
        delay: days until an event is recorded, on average, times `Outcome.delay`; above 0, each event has a column
            of the seconds that it took, ``click_delay``, missing where it did not happen.
        delay_spread: standard deviation of the logarithm of the delays, which are then log-normal, with the same mean;
            0: they are exponential.
        user, item, category, number, tags, title: names of the columns.
        number_median, number_spread: of the item's number, log-normal.

    Example:
        >>> world = World(outcomes=(Outcome(name="click", mean=0.2),), num_items=10**9, item="product_id")
        >>> a, b = world.rows(np.arange(5)), world.rows(np.array([4]))
        >>> int(a["product_id"][4]) == int(b["product_id"][0])
        True
        >>> world.oracle(np.arange(5))["click"].shape
        (5,)
    """

    outcomes: Annotated[tuple[Outcome, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    horizon: Annotated[int, Field(ge=1, le=10**12)] = 1_000_000
    num_users: Annotated[int, Field(ge=1, le=MAX_IDS)] = 100_000
    num_items: Annotated[int, Field(ge=2, le=MAX_IDS)] = 100_000
    user_exponent: Annotated[float, Field(ge=0, le=3)] = 0.5
    item_exponent: Annotated[float, Field(ge=0, le=3)] = 1.0
    latent_dim: Annotated[int, Field(ge=TAG_DIMS, le=64)] = 8
    categories: Annotated[int, Field(ge=2, le=256)] = 16
    signal: Annotated[float, Field(ge=0, le=5)] = 1.8
    context: Share = 0.2
    correlation: Annotated[float, Field(ge=0, le=1)] = 0.5
    conflict: Annotated[float, Field(ge=0, le=1)] = 0.0
    missing: Share = 0.0
    cold_items: Share = 0.0
    cold_after: Annotated[float, Field(ge=0, lt=1)] = 0.9
    days: Annotated[int, Field(ge=1, le=3650)] = 30
    text: Annotated[float, Field(ge=0, le=1)] = 0.0
    position_bias: Annotated[float, Field(ge=0, le=5)] = 0.0
    positions: Annotated[int, Field(ge=2, le=1000)] | None = None
    delay: Annotated[float, Field(ge=0, le=3650)] = 0.0
    delay_spread: Annotated[float, Field(ge=0, le=4)] = 0.0
    user: Column = "user_id"
    item: Column = "item_id"
    category: Column = "category"
    number: Column = "price"
    tags: Column = "tags"
    title: Column = "title"
    number_median: Annotated[float, Field(gt=0)] = 20.0
    number_spread: Annotated[float, Field(ge=0, le=2)] = 0.8

    @model_validator(mode="after")
    def _consistent(self) -> World:
        features = ["segment", "hour", "device", "place", "time"]
        names = [self.user, self.item, self.category, self.number, self.tags, *features]
        names += [self.title] if self.text else []
        names += ["position"] if self.position_bias else []
        names += [f"{o.name}_delay" for o in self.outcomes if o.kind == "event"] if self.delay else []
        check_unique("column", names + [o.name for o in self.outcomes])
        if self.positions is not None and not self.position_bias:
            raise ValueError("positions belong to a position_bias above 0")
        if self.delay_spread and not self.delay:
            raise ValueError("delay_spread belongs to a delay above 0")
        events: list[str] = []
        for outcome in self.outcomes:
            if outcome.after is not None and outcome.after not in events:
                raise ValueError(f"{outcome.name}: 'after' names no event declared before it ({outcome.after!r})")
            events += [outcome.name] if outcome.kind == "event" else []
        if len([o for o in self.outcomes if o.kind == "content"]) > 1:
            raise ValueError("a world has one content task at most")
        if self.latent_dim <= len(self.outcomes):
            raise ValueError(f"latent_dim must be above the number of tasks, {len(self.outcomes)}")
        return self

    @property
    def num_cold(self) -> int:
        """How many items are cold: the ids num_items - num_cold + 1 … num_items."""
        return min(max(round(self.cold_items * self.num_items), 1), self.num_items - 1) if self.cold_items else 0

    @property
    def num_positions(self) -> int:
        """Of a list; 1 without position bias."""
        return (self.positions or POSITIONS) if self.position_bias else 1

    @property
    def cold_from(self) -> int:
        """The first row that may be about a cold item."""
        return int(self.cold_after * self.horizon)

    # ------------------------------------------------------------------ what the rest of the package needs to know

    def schema(self) -> Schema:
        """The columns as features and tasks.  Ids are rows of their tables already; only a title's words are not."""

        def index(name: str, group: Group, values: int, dim: int) -> Feature:
            return Feature(name=name, group=group, encoding="index", vocabulary_size=values + 1, embedding_dim=dim)

        features: tuple[Feature, ...] = (
            index(self.user, "user", self.num_users, 16),
            index("segment", "user", SEGMENTS, 8),
            index(self.item, "item", self.num_items, 16),
            index(self.category, "item", self.categories, 8),
            Feature(name=self.tags, group="item", kind="bag", encoding="index", vocabulary_size=2 * TAG_DIMS + 1,
                    embedding_dim=8),
            Feature(name=self.number, group="item", kind="dense", transform="log"),
            index("hour", "context", HOURS, 4),
            index("device", "context", DEVICES, 4),
            index("place", "context", PLACES, 4),
        )  # fmt: skip
        if self.text:
            title = Feature(name=self.title, group="item", kind="bag", separator=" ", embedding_dim=16)
            features = (*features, title)
        if self.position_bias:
            features = (*features, index("position", "context", self.num_positions, 4))
        return Schema(
            user=self.user, item=self.item, time="time", features=features, tasks=tuple(map(self._task, self.outcomes))
        )

    def _task(self, outcome: Outcome) -> Task:
        mask = {"mask": outcome.after} if outcome.after else {}
        of_user: dict[str, tuple[Group, ...]] = {"inputs": ("user", "context")}
        if outcome.kind == "content":
            return Task(name=outcome.name, kind="multiclass", item_class=self.category, weight=0.5, **of_user)
        if outcome.kind == "event":
            return Task(name=outcome.name, kind="binary", **mask, **(of_user if outcome.moment else {}))
        return Task(name=outcome.name, kind="regression", loss="huber", weight=0.5, **mask,
                    **(of_user if outcome.moment else {}))  # fmt: skip

    def fusion_weights(self) -> dict[str, float]:
        """Task -> weight in the fused score, of the tasks that have one."""
        return {o.name: o.fused for o in self.outcomes if o.fused}

    # ------------------------------------------------------------------ rows and their probabilities

    def rows(self, index: np.ndarray, *, as_of: int | None = None) -> pd.DataFrame:
        """The rows of these indices, in this order; a row depends on its own index only.

        Args:
            index: (N,) integers from 0 to 2⁴¹ - 1.
            as_of: a time, see `moment`: labels as they were recorded then, an event yet to come being 0, and what comes
                after it missing.  None: all has come.

        Returns:
            The schema's columns: int64 ids and time, int32 categories, float32 number and labels (NaN where missing,
            or where the parent in a chain is not 1), a tuple of tags; with the dials, a title, an int32 position and
            float32 delays.

        Raises:
            DataError: an index is no integer, or out of range, or its row comes after `as_of`.
        """
        return self._frame(self.columns(index, as_of=as_of))

    def columns(self, index: np.ndarray, *, as_of: int | None = None) -> dict[str, np.ndarray]:
        """As `rows`, as arrays; the tags as a number that indexes `mtcl_torchrec.data.synthetic_labels.tag_lists`.

        Raises:
            DataError: a row comes after the moment `as_of`.
        """
        parts = _blocks(index)
        if as_of is not None and len(index) and int(index.max()) >= self.rows_by(as_of):
            raise DataError(f"row {int(index.max()):,} comes after the moment that the log is wanted of")
        blocks = [row_columns(self, part, as_of) for part in parts]
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}

    def moment(self, days: float) -> int:
        """The time, as in the column ``time``, so many days after row 0."""
        return START + int(days * DAY)

    def time_of(self, row: int) -> int:
        """What stands in the column ``time`` of a row."""
        return START + int(row * (self.days * DAY / self.horizon))

    def rows_by(self, time: int) -> int:
        """How many rows there are up to a time.

        Example:
            >>> world = World(outcomes=(Outcome(name="click"),), horizon=3_000, days=30)
            >>> world.rows_by(world.moment(0)), world.rows_by(world.moment(10))
            (1, 1001)
        """
        return bisect_right(range(MAX_ROWS), time, key=self.time_of)

    def chunks(self, rows: int, *, start: int = 0, size: int = 65_536) -> Iterator[pd.DataFrame]:
        """`rows` rows from `start` on, in frames of `size`."""
        for first in range(start, start + rows, size):
            yield self.rows(np.arange(first, min(first + size, start + rows)))

    def items(self, ids: np.ndarray) -> pd.DataFrame:
        """What is known of items before anybody meets them: their columns, titles among them, as in `rows`.

        Args:
            ids: (N,) integers from 1 to `num_items`.

        Raises:
            DataError: there is no such item.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 1 and ids.max() <= self.num_items):
            raise DataError(f"items are numbered from 1 to {self.num_items:,}")
        one = np.ones_like(ids)
        return self._frame(item_columns(self, describe(self, one, ids, one, one, one, one, one)))

    def _frame(self, columns: dict[str, np.ndarray]) -> pd.DataFrame:
        columns[self.tags] = tag_lists()[columns[self.tags]]
        frame = pd.DataFrame(columns)
        return frame.astype({self.title: str}) if self.text else frame  # also of no rows

    # ------------------------------------------------------------------ the truth

    def oracle(self, index: np.ndarray, *, joint: bool = False, position: int | None = None) -> dict[str, np.ndarray]:
        """The truth about the labels of these rows, once all has been recorded.

        Args:
            index: as for `rows`.
            joint: of an event in a chain, the probability that its parents and it happen, instead of its
                probability given that its parent did.
            position: the truth if the row stood there; None: where it does.  At position 1, everybody looks.

        Returns:
            Task -> float64: (N,) probability of an event; (N, categories + 1) of each class, column 0 ("unknown")
            being 0; (N,) expected value of stars and amounts, given the parent.
        """
        return self._truth((draw_rows(self, part, part) for part in _blocks(index)), joint, position)

    def oracle_of(
        self, frame: pd.DataFrame, *, joint: bool = False, position: int | None = None
    ) -> dict[str, np.ndarray]:
        """The truth about rows as they stand in a frame, also ones that never were: any user, item and moment.

        Args:
            frame: with the columns of `oracle_columns`.
            joint, position: as for `oracle`, whose result this has.

        Raises:
            DataError: a column is missing, or holds what this world has not.
        """
        highest = self._highest()
        columns = {}
        for name, most in highest.items():
            if name not in frame:
                raise DataError(f"the truth of a row follows from {', '.join(highest)}: no column {name!r}")
            values = frame[name].to_numpy(np.float64, na_value=np.nan)
            if not bool(((values >= 1) & (values <= most)).all()):
                raise DataError(f"column {name!r} holds what is not between 1 and {most:,}")
            columns[name] = values.astype(np.int64)
        one = np.ones(len(frame), np.int64)
        user, item, hour, device, place = (columns[n] for n in list(highest)[:5])
        slot = columns.get("position", one)
        parts = [slice(i, i + BLOCK) for i in range(0, max(len(frame), 1), BLOCK)]
        return self._truth(
            (describe(self, user[p], item[p], one[p], hour[p], device[p], place[p], slot[p]) for p in parts),
            joint, position,
        )  # fmt: skip

    def _highest(self) -> dict[str, int]:
        """The columns from which the truth follows, and their highest values."""
        ids = {self.user: self.num_users, self.item: self.num_items}
        slot = {"position": self.num_positions} if self.position_bias else {}
        return {**ids, "hour": HOURS, "device": DEVICES, "place": PLACES, **slot}

    @property
    def oracle_columns(self) -> tuple[str, ...]:
        """The columns from which the truth of a row follows."""
        return tuple(self._highest())

    @property
    def telling_columns(self) -> tuple[str, ...]:
        """The columns from which `is_of` tells whether rows are of this world."""
        return (*self.oracle_columns, "segment", self.category)

    def is_of(self, frame: pd.DataFrame) -> bool:
        """Whether rows are of this world: what they say of their users and items is so here."""
        if not set(self.telling_columns) <= set(frame):
            return False
        try:
            self.oracle_of(frame.head(1))
            one = np.ones(len(frame), np.int64)
            user, item = frame[self.user].to_numpy(np.int64), frame[self.item].to_numpy(np.int64)
        except (DataError, ValueError, TypeError):
            return False
        drawn = describe(self, user, item, one, one, one, one, one)
        said = {"segment": drawn.segment, self.category: drawn.category}
        return all(bool((frame[name].to_numpy() == values).all()) for name, values in said.items())

    def _truth(self, draws: Iterable[Draw], joint: bool, position: int | None) -> dict[str, np.ndarray]:
        if position is not None and not 1 <= position <= self.num_positions:
            raise DataError(f"position {position}: the world has positions 1 to {self.num_positions}")
        blocks = [self._truth_of(draw, joint, position) for draw in draws]
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}

    def _truth_of(self, draw: Draw, joint: bool, position: int | None) -> dict[str, np.ndarray]:
        parts = {name: values.astype(np.float64) for name, values in truth(self, draw).items()}
        slot = draw.position if position is None else np.full_like(draw.position, position)
        looked = examination(self, slot).astype(np.float64) if self.position_bias else None
        for outcome in self.outcomes:
            if outcome.kind == "content":
                classes = parts[outcome.name]
                parts[outcome.name] = np.concatenate([np.zeros_like(classes[:1]), classes / classes.sum(0)]).T
            elif looked is not None and outcome.needs_a_look and outcome.kind != "stars":
                parts[outcome.name] = parts[outcome.name] * looked
            elif joint and outcome.kind == "event" and outcome.after:
                parts[outcome.name] = parts[outcome.name] * parts[outcome.after]
        return parts


def _blocks(index: np.ndarray) -> list[np.ndarray]:
    index = np.asarray(index)
    if index.ndim != 1 or (index.dtype.kind not in "iu" and index.size):
        raise DataError(
            f"row indices are a one-dimensional array of integers, not {index.dtype} of shape {index.shape}"
        )
    if index.size and not (index.min() >= 0 and index.max() < MAX_ROWS):
        raise DataError(f"row indices lie between 0 and {MAX_ROWS - 1:,}, not {index.min():,} to {index.max():,}")
    index = np.ascontiguousarray(index, dtype=np.int64)
    return [index[i : i + BLOCK] for i in range(0, max(len(index), 1), BLOCK)]
