"""The columns of a synthetic world's rows: what they are about, and labels drawn from the truth.

The arithmetic behind `mtcl_torchrec.data.synthetic.World.columns`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtri

from mtcl_torchrec.data.counter_random import sixteenths, stream, uniform
from mtcl_torchrec.data.synthetic_truth import Draw, draw_rows, examination, item_titles, truth

if TYPE_CHECKING:
    from mtcl_torchrec.data.outcomes import Outcome
    from mtcl_torchrec.data.synthetic import World

TAG_DIMS = 6  # an item's tags are the directions, of the first so many, in which its vector stands out
DAY = 86_400  # seconds


def row_columns(world: World, index: np.ndarray, as_of: int | None) -> dict[str, np.ndarray]:
    """See `World.columns`; `index` is one block."""
    draw = draw_rows(world, index, index)
    columns = _about(world, draw)
    true = truth(world, draw)
    looked = None
    if world.position_bias:
        looked = uniform(stream(world.seed, "looked"), index) < examination(world, draw.position)
    delays: dict[str, np.ndarray] = {}
    for number, outcome in enumerate(world.outcomes):
        label = _label(world.seed, outcome, true[outcome.name], index)
        if looked is not None and outcome.needs_a_look:
            label[~looked] = np.nan if outcome.kind == "stars" else 0
        if outcome.after:
            label[columns[outcome.after] != 1] = np.nan
        if world.missing:
            chance = sixteenths(stream(world.seed, "missing", number // 4), index)[number % 4]
            label[chance < world.missing] = np.nan
        if world.delay and outcome.kind == "event":
            delays[outcome.name] = _delay(world, outcome, index) + delays.get(outcome.after or "", np.float32(0))
            if as_of is not None:
                label[(label == 1) & (draw.time + delays[outcome.name] > as_of)] = 0
        columns[outcome.name] = label
    for name, delay in delays.items():
        columns[f"{name}_delay"] = np.where(columns[name] == 1, delay, np.float32(np.nan))
    return columns


def _about(world: World, draw: Draw) -> dict[str, np.ndarray]:
    """What the rows are about: all but labels."""
    of_item = item_columns(world, draw)
    columns = {world.user: draw.user, "segment": draw.segment.astype(np.int32)}
    columns |= {name: of_item[name] for name in (world.item, world.category, world.tags, world.number)}
    columns |= {name: getattr(draw, name).astype(np.int32) for name in ("hour", "device", "place")}
    columns["time"] = draw.time
    if world.text:
        columns[world.title] = of_item[world.title]
    if world.position_bias:
        columns["position"] = draw.position.astype(np.int32)
    return columns


def item_columns(world: World, draw: Draw) -> dict[str, np.ndarray]:
    """What the rows say of their items; the tags as a number that indexes `tag_lists`."""
    price = np.float32(world.number_median) * np.exp(draw.number * np.float32(world.number_spread))
    tags = np.zeros(len(draw.item), np.int64)
    for d in range(TAG_DIMS):
        tags = 3 * tags + (draw.items[d] > 1) + 2 * (draw.items[d] < -1)
    columns = {
        world.item: draw.item,
        world.category: draw.category.astype(np.int32),
        world.tags: tags,
        world.number: np.round(price, 2),
    }
    return columns | {world.title: item_titles(world, draw.item)} if world.text else columns


def _delay(world: World, outcome: Outcome, index: np.ndarray) -> np.ndarray:
    """(N,) float32 seconds from the row, or from the event before it, to the arrival of the event."""
    chance = uniform(stream(world.seed, "delay", outcome.name), index)
    mean, spread = world.delay * outcome.delay * DAY, world.delay_spread
    times = np.exp(spread * ndtri(chance) - spread**2 / 2) if spread else -np.log1p(-chance)  # of mean 1
    return (times * mean).astype(np.float32)


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
