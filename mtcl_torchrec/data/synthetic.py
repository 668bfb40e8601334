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
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from mtcl_torchrec.data.counter_random import sixteenths, stream, uniform
from mtcl_torchrec.data.synthetic_truth import BLOCK, DEVICES, HOURS, PLACES, SEGMENTS, draw_rows, truth
from mtcl_torchrec.schema import DataError, Feature, Group, Schema, Task, check_unique

TAG_DIMS = 6  # an item's tags are the directions, of the first so many, in which its vector stands out
MAX_IDS = 10**12
MAX_ROWS = 2**41

Share = Annotated[float, Field(ge=0, le=0.95)]
Column = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Outcome(BaseModel):
    """One task of a world.

    Args:
        name: of the task and of its label column.
        kind: ``"event"`` (0 or 1), ``"content"`` (the category turned to next, 1 … categories), ``"stars"`` (1 … 5) or
            ``"amount"`` (a positive number).
        mean: of the label wherever there can be one: in a chain, where the parent is 1.  Not of content.
        after: the event that must be 1 for this one to happen, declared before it.
        moment: whether the user and the moment alone decide it, whatever the item (a task of context).
        opposed: whether it is one of the tasks that `World.conflict` turns against the others.
        number_effect: how much one standard deviation of the item's log number (price, duration) adds to the logit.
        fused: weight in the fused score; 0 leaves it out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Column
    kind: Literal["event", "content", "stars", "amount"] = "event"
    mean: Annotated[float, Field(ge=1e-6)] = 0.1
    after: str | None = None
    moment: bool = False
    opposed: bool = False
    number_effect: float = 0.0
    fused: float = 0.0

    @model_validator(mode="after")
    def _possible(self) -> Outcome:
        if self.kind == "event" and not self.mean < 1:
            raise ValueError(f"{self.name}: the mean of an event lies between 0 and 1")
        if self.kind == "stars" and not 1 < self.mean < 5:
            raise ValueError(f"{self.name}: the mean of stars lies between 1 and 5")
        if self.kind == "content" and (self.after or self.moment or self.opposed):
            raise ValueError(f"{self.name}: content comes after nothing, and is neither moment nor opposed")
        return self


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
        user, item, category, number, tags: names of the columns.
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
    user: Column = "user_id"
    item: Column = "item_id"
    category: Column = "category"
    number: Column = "price"
    tags: Column = "tags"
    number_median: Annotated[float, Field(gt=0)] = 20.0
    number_spread: Annotated[float, Field(ge=0, le=2)] = 0.8

    @model_validator(mode="after")
    def _consistent(self) -> World:
        features = ["segment", "hour", "device", "place", "time"]
        names = [self.user, self.item, self.category, self.number, self.tags, *features]
        check_unique("column", names + [o.name for o in self.outcomes])
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
    def cold_from(self) -> int:
        """The first row that may be about a cold item."""
        return int(self.cold_after * self.horizon)

    # ------------------------------------------------------------------ what the rest of the package needs to know

    def schema(self) -> Schema:
        """The columns as features and tasks.  Ids are rows of their tables already, so nothing is learnt from data."""

        def index(name: str, group: Group, values: int, dim: int) -> Feature:
            return Feature(name=name, group=group, encoding="index", vocabulary_size=values + 1, embedding_dim=dim)

        features = (
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

    def rows(self, index: np.ndarray) -> pd.DataFrame:
        """The rows of these indices, in this order; a row depends on its own index only.

        Args:
            index: (N,) integers from 0 to 2⁴¹ - 1.

        Returns:
            The schema's columns: int64 ids and time, int32 categories, float32 number and labels (NaN where missing,
            or where the parent in a chain is not 1), a tuple of tags.

        Raises:
            DataError: an index is no integer, or out of range.
        """
        columns = self.columns(index)
        columns[self.tags] = tag_lists()[columns[self.tags]]
        return pd.DataFrame(columns)

    def columns(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """As `rows`, as arrays; the tags as a number that indexes `tag_lists`."""
        blocks = [_columns(self, part) for part in _blocks(index)]
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}

    def chunks(self, rows: int, *, start: int = 0, size: int = 65_536) -> Iterator[pd.DataFrame]:
        """`rows` rows from `start` on, in frames of `size`."""
        for first in range(start, start + rows, size):
            yield self.rows(np.arange(first, min(first + size, start + rows)))

    def oracle(self, index: np.ndarray, *, joint: bool = False) -> dict[str, np.ndarray]:
        """The truth about the labels of these rows.

        Args:
            index: as for `rows`.
            joint: of an event in a chain, the probability that its parents and it happen, instead of its
                probability given that its parent did.

        Returns:
            Task -> float64: (N,) probability of an event; (N, categories + 1) of each class, column 0 ("unknown")
            being 0; (N,) expected value of stars and amounts, given the parent.
        """
        blocks = [truth(self, draw_rows(self, part, part)) for part in _blocks(index)]
        parts = {name: np.concatenate([b[name] for b in blocks], -1).astype(np.float64) for name in blocks[0]}
        for outcome in self.outcomes:
            if outcome.kind == "content":
                classes = parts[outcome.name]
                parts[outcome.name] = np.concatenate([np.zeros_like(classes[:1]), classes / classes.sum(0)]).T
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


def _columns(world: World, index: np.ndarray) -> dict[str, np.ndarray]:
    draw = draw_rows(world, index, index)
    price = np.float32(world.number_median) * np.exp(draw.number * np.float32(world.number_spread))
    tags = np.zeros(len(index), np.int64)
    for d in range(TAG_DIMS):
        tags = 3 * tags + (draw.items[d] > 1) + 2 * (draw.items[d] < -1)
    columns = {
        world.user: draw.user,
        "segment": draw.segment.astype(np.int32),
        world.item: draw.item,
        world.category: draw.category.astype(np.int32),
        world.tags: tags,
        world.number: np.round(price, 2),
        "hour": draw.hour.astype(np.int32),
        "device": draw.device.astype(np.int32),
        "place": draw.place.astype(np.int32),
        "time": draw.time,
    }
    true = truth(world, draw)
    for number, outcome in enumerate(world.outcomes):
        label = _label(world.seed, outcome, true[outcome.name], index)
        if outcome.after:
            label[columns[outcome.after] != 1] = np.nan
        if world.missing:
            chance = sixteenths(stream(world.seed, "missing", number // 4), index)[number % 4]
            label[chance < world.missing] = np.nan
        columns[outcome.name] = label
    return columns


def _label(seed: int, outcome: Outcome, true: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(N,) float32, drawn from the truth."""
    source = stream(seed, "label", outcome.name)
    if outcome.kind == "stars":  # 1 + Binomial(4, p)
        p = (true - 1) * np.float32(0.25)
        return 1 + sum((chance < p for chance in sixteenths(source, index)), np.zeros(len(index), np.float32))
    u = uniform(source, index)
    if outcome.kind == "event":
        return (u < true).astype(np.float32)
    if outcome.kind == "amount":  # times the sum of two uniform numbers, which has mean 1
        return (true * (u + uniform(stream(seed, "second", outcome.name), index))).astype(np.float32)
    below_class = np.zeros(true.shape[1], np.float32)
    totals = below_class.copy()
    for odds in true:
        totals += odds
    label = np.ones(len(index), np.float32)
    for odds in true[:-1]:
        below_class += odds
        label += u * totals >= below_class
    return label


@lru_cache(maxsize=1)
def tag_lists() -> np.ndarray:
    """The tags that each number of `World.columns` stands for: 1 … 2 · TAG_DIMS, object array of tuples."""
    lists = np.empty(3**TAG_DIMS, object)
    for code in range(len(lists)):
        signs = [code // 3 ** (TAG_DIMS - 1 - d) % 3 for d in range(TAG_DIMS)]
        lists[code] = tuple(d + 1 + TAG_DIMS * (sign - 1) for d, sign in enumerate(signs) if sign)
    return lists


# ---------------------------------------------------------------------- files


def write_parquet(
    world: World,
    path: str | Path,
    rows: int,
    *,
    start: int = 0,
    row_group_size: int = 131_072,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write rows `start` … `start + rows - 1` of a world to one Parquet file.

    The memory needed is that of one row group, however many rows there are.  The file appears under its name once it is
    complete; a run that is broken off leaves nothing there.

    Args:
        path: of the file; its folder must exist, and a file of that name is replaced.
        row_group_size: rows of a row group.
        progress: called after each row group with the number of rows written so far.

    Raises:
        DataError: `rows` or `row_group_size` is below 1, or the folder does not exist.
    """
    path = Path(path)
    if rows < 1 or row_group_size < 1:
        raise DataError(f"{path}: rows and row_group_size are at least 1, not {rows:,} and {row_group_size:,}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: no such folder")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.writing")
    lists = pa.array(map(list, tag_lists()), pa.list_(pa.int32()))
    writer = None
    try:
        for first in range(start, start + rows, row_group_size):
            last = min(first + row_group_size, start + rows)
            table = _arrow_table(world, np.arange(first, last), lists)
            writer = writer or pa.parquet.ParquetWriter(unfinished, table.schema)
            writer.write_table(table, row_group_size=row_group_size)
            if progress is not None:
                progress(last - start)
        assert writer is not None
        writer.close()
        unfinished.replace(path)
    except BaseException:
        if writer is not None:
            writer.close()
        unfinished.unlink(missing_ok=True)
        raise


def _arrow_table(world: World, index: np.ndarray, lists: pa.Array) -> pa.Table:
    columns = world.columns(index)
    arrays = {name: pa.array(values, from_pandas=True) for name, values in columns.items()}
    arrays[world.tags] = lists.take(pa.array(columns[world.tags]))
    return pa.table(arrays)
