"""What is true in a synthetic world: who meets what and when, and with which probability what follows.

The arithmetic behind `mtcl_torchrec.data.synthetic.World`, whose docstring tells the story.  All of it works element by
element on (N,) arrays, and a vector is a list of such arrays: a row comes out the same to the last bit in any block.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtcl_torchrec.data.counter_random import below, bits, latents, scatter, sixteenths, stream, uniform, zipf_ranks
from mtcl_torchrec.data.titles import titles, vocabulary

if TYPE_CHECKING:
    from mtcl_torchrec.data.outcomes import Outcome
    from mtcl_torchrec.data.synthetic import World

SEGMENTS, DEVICES, PLACES, HOURS = 8, 3, 8, 24
START = 1_767_225_600  # of time: 1 January 2026, UTC
BLOCK = 16_384  # rows computed at once: their arrays stay in the cache
_SAMPLE = 131_072  # rows from which the intercepts are solved
_SAMPLE_FROM = 2**62  # their counters, beyond those of any row
_TASTE_QUALITY_OPENNESS = (0.5, 0.3, 0.2)  # of what is not the moment
_DEVICE_SHARE = (0.6, 0.3, 0.1)
_AT_HOME = 0.85
_AMOUNT_SCALE = 0.35  # of a logit in the exponent of an amount
TOPICS, TOPIC_WORDS, TITLE_WORDS = 16, 30, 6  # that titles are of, that each has, and of a title
_OF_TOPICS = (0.5, 0.3)  # share of a title's words that are of the item's first topic, and of its second


# ---------------------------------------------------------------------- who, what, when


class Draw(NamedTuple):
    """What a block of rows is about; (N,) each."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    segment: np.ndarray
    category: np.ndarray
    hour: np.ndarray
    device: np.ndarray
    place: np.ndarray
    position: np.ndarray  # from 1; 1 everywhere in a world without position bias
    number: np.ndarray  # float32, mean 0 and variance 1
    users: list[np.ndarray]  # latent_dim vectors
    items: list[np.ndarray]


def who_meets_what(world: World, counter: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """User and item of rows, (N,) each, as `draw_rows` draws them."""
    rank = zipf_ranks(uniform(stream(world.seed, "user"), counter), world.num_users, world.user_exponent)
    user = 1 + scatter(rank - 1, world.num_users, _offset(world.seed, "user", world.num_users))
    return user, _items(world, counter, position)


def draw_rows(world: World, counter: np.ndarray, position: np.ndarray) -> Draw:
    """Rows drawn with the randomness of `counter`, at the time of row `position`."""
    seed = world.seed
    user, item = who_meets_what(world, counter, position)
    chance, away, where, _ = sixteenths(stream(seed, "moment"), counter)
    device = 1 + (chance >= _DEVICE_SHARE[0]) + (chance >= _DEVICE_SHARE[0] + _DEVICE_SHARE[1])
    home = below(stream(seed, "home"), user, PLACES)
    place = 1 + np.where(away < _AT_HOME, home, (where * PLACES).astype(np.int64))
    time = START + (position * (world.days * 86_400 / world.horizon)).astype(np.int64)
    hour = (time // 3600 + place * (HOURS // PLACES)) % HOURS
    slot = np.ones(len(counter), np.int64)
    if world.position_bias:
        slot += below(stream(seed, "position"), counter, world.num_positions)
    return describe(world, user, item, time, np.where(hour == 0, HOURS, hour), device, place, slot)


def describe(
    world: World, user: np.ndarray, item: np.ndarray, time: np.ndarray, hour: np.ndarray, device: np.ndarray,
    place: np.ndarray, position: np.ndarray,
) -> Draw:  # fmt: skip
    """All that follows from who meets what, and when and where: (N,) integers each."""
    seed = world.seed
    segment = 1 + below(stream(seed, "segment"), user, SEGMENTS)
    category = 1 + below(stream(seed, "category"), item, world.categories)
    four = latents(seed, "number", item, 4)
    effects = effects_of(world)
    items = _near(effects.categories, category, latents(seed, "item vector", item, world.latent_dim))
    return Draw(
        user, item, time, segment, category, hour, device, place, position,
        (four[0] + four[1] + four[2] + four[3]) * np.float32(0.5),
        _near(effects.segments, segment, latents(seed, "user vector", user, world.latent_dim)),
        _with_text(world, item, items) if world.text else items,
    )  # fmt: skip


def _with_text(world: World, item: np.ndarray, rest: list[np.ndarray]) -> list[np.ndarray]:
    """Items' vectors, a share `World.text` of whose variance is the mean topic of the title's words."""
    lines = [line for line, _ in title_words(world, item)]
    first, second = _topics(world, item)
    counts = [sum((line == kind).astype(np.float32) for line in lines) for kind in (0, 1)]
    # The centres have variance 1 over the topics: so has the sum, over its expected square length Σ E[count²].
    length = sum(TITLE_WORDS * p * (1 - p) + (TITLE_WORDS * p) ** 2 for p in _OF_TOPICS)
    told, other = np.float32(math.sqrt(world.text / length)), np.float32(math.sqrt(1 - world.text))
    return [
        (counts[0] * centre[first] + counts[1] * centre[second]) * told + x * other
        for centre, x in zip(effects_of(world).topics, rest, strict=True)
    ]


def _topics(world: World, item: np.ndarray) -> list[np.ndarray]:
    """The two topics of each item, (N,) from 0; they may be the same."""
    return [below(stream(world.seed, "topic", number), item, TOPICS) for number in (0, 1)]


def title_words(world: World, item: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each word of an item's title: whether it is of the first topic, the second or of none (0, 1, 2), and a
    uniform number that says which word; (N,) each."""
    drawn = [sixteenths(stream(world.seed, "title", word), item) for word in range(TITLE_WORDS)]
    return [((u >= _OF_TOPICS[0]).astype(np.int64) + (u >= sum(_OF_TOPICS)), which) for u, which, _, _ in drawn]


def item_titles(world: World, item: np.ndarray) -> np.ndarray:
    """(N,) object: the title of each item."""
    once, where = np.unique(item, return_inverse=True)
    words = title_words(world, once)
    of_item = np.stack([*_topics(world, once), np.full(len(once), TOPICS)])
    lines = np.stack([of_item[line, np.arange(len(once))] for line, _ in words], 1)
    made = titles(vocabulary(TOPICS, TOPIC_WORDS), lines, np.stack([which for _, which in words], 1))
    return np.array(made, dtype=object)[where]


def examination(world: World, position: np.ndarray) -> np.ndarray:
    """(N,) float32: the probability that a user looks at what stands at a position (from 1): position⁻ᵇ for bias b."""
    of_position = [place ** -float(world.position_bias) for place in range(1, world.num_positions + 1)]
    return np.array(of_position, np.float32)[position - 1]


def _offset(seed: int, name: str, n: int) -> int:
    return int(bits(stream(seed, name, "offset"), np.zeros(1, np.int64))[0]) % n


def _items(world: World, counter: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The item of each row: a warm one, or, late enough and by chance, a cold one."""
    u = uniform(stream(world.seed, "item"), counter)
    warm = world.num_items - world.num_cold
    rank = zipf_ranks(u, warm, world.item_exponent)
    item = 1 + scatter(rank - 1, warm, _offset(world.seed, "item", warm))
    if world.num_cold:
        chance = uniform(stream(world.seed, "cold"), counter)
        cold = np.flatnonzero((position >= world.cold_from) & (chance < world.cold_items))
        rank = zipf_ranks(u[cold], world.num_cold, world.item_exponent)
        offset = _offset(world.seed, "cold", world.num_cold)
        item[cold] = 1 + warm + scatter(rank - 1, world.num_cold, offset)
    return item


def _near(centres: np.ndarray, group: np.ndarray, own: list[np.ndarray]) -> list[np.ndarray]:
    """Vectors half of whose variance is their group's: (dim, groups) centres, dim arrays (N,)."""
    half = np.float32(math.sqrt(0.5))
    return [(centre[group - 1] + x) * half for centre, x in zip(centres, own, strict=True)]


# ---------------------------------------------------------------------- effects


class Effects(NamedTuple):
    """Small tables that follow from the world's dials; T tasks that have a logit (all but content)."""

    scored: tuple[Outcome, ...]
    loading: tuple[tuple[float, float], ...]  # of each task on what all share, and on what is its own
    direction: np.ndarray  # (T, latent_dim), of length 1
    segments: np.ndarray  # (latent_dim, SEGMENTS) float32
    categories: np.ndarray  # (latent_dim, categories)
    topics: np.ndarray  # (latent_dim, TOPICS)
    moment: np.ndarray  # (T, SEGMENTS · HOURS · DEVICES · PLACES)
    content_hour: np.ndarray  # (categories, HOURS + 1)


@lru_cache(maxsize=64)
def effects_of(world: World) -> Effects:
    """What a world's dials and seed settle once for all of its rows."""
    scored = tuple(o for o in world.outcomes if o.kind != "content")
    tasks, dim = len(scored), world.latent_dim
    shared = [math.sqrt(world.correlation) * (1 - 2 * world.conflict * o.opposed) for o in scored]
    loading = tuple((s, math.sqrt(1 - s * s)) for s in shared)
    # An orthonormal basis (of the discrete cosine transform): its first vector is what the tasks share.
    k, d = np.arange(tasks + 1)[:, None], np.arange(dim)[None, :]
    basis = np.where(k == 0, math.sqrt(1 / dim), math.sqrt(2 / dim) * np.cos(math.pi * (d + 0.5) * k / dim))
    moments = _moments(world.seed, tasks + 1)
    return Effects(
        scored,
        loading,
        np.stack([s * basis[0] + own * basis[1 + t] for t, (s, own) in enumerate(loading)]) if tasks else basis[:0],
        _table(world.seed, "segments", dim, SEGMENTS),
        _table(world.seed, "categories", dim, world.categories),
        _table(world.seed, "topics", dim, TOPICS),
        np.stack([s * moments[0] + own * moments[1 + t] for t, (s, own) in enumerate(loading)]).astype(np.float32)
        if tasks
        else moments[:0],
        _waves(world.seed, "content hour", world.categories)[:, np.arange(HOURS + 1) % HOURS].astype(np.float32),
    )


def _table(seed: int, name: str, dim: int, size: int) -> np.ndarray:
    """(dim, size) float32 random numbers; each line has mean 0 and variance 1 exactly."""
    table = np.stack(latents(seed, name, np.arange(size), dim)).astype(np.float64)
    table -= table.mean(1, keepdims=True)
    return (table / table.std(1, keepdims=True)).astype(np.float32)


def _waves(seed: int, name: str, n: int) -> np.ndarray:
    """(n, HOURS): a daily wave for each, with a peak at an hour of its own; variance 1."""
    peak = uniform(stream(seed, name), np.arange(n))[:, None]
    return math.sqrt(2) * np.cos(2 * math.pi * (np.arange(HOURS)[None, :] / HOURS - peak))


def _moments(seed: int, n: int) -> np.ndarray:
    """(n, SEGMENTS · HOURS · DEVICES · PLACES): what each moment adds, variance 1."""
    hour = _waves(seed, "hour", n * SEGMENTS).reshape(n, SEGMENTS, HOURS, 1, 1)
    device = _table(seed, "device", n, DEVICES).reshape(n, 1, 1, DEVICES, 1)
    place = _table(seed, "place", n, PLACES).reshape(n, 1, 1, 1, PLACES)
    return (math.sqrt(0.65) * hour + math.sqrt(0.25) * device + math.sqrt(0.1) * place).reshape(n, -1)


def logits_of(world: World, draw: Draw) -> list[np.ndarray]:
    """Of each task but content, without its intercept: float32 (N,)."""
    fixed = effects_of(world)
    tasks = len(fixed.scored)
    products = [p * q for p, q in zip(draw.users, draw.items, strict=True)]
    quality = latents(world.seed, "quality", draw.item, tasks + 1)
    openness = latents(world.seed, "openness", draw.user, tasks + 1)
    moment = ((draw.segment - 1) * HOURS + draw.hour % HOURS) * (DEVICES * PLACES)
    moment += (draw.device - 1) * PLACES + draw.place - 1
    logits = []
    for t, outcome in enumerate(fixed.scored):
        shared, own = fixed.loading[t]
        taste_share, item_share, user_share, moment_share = logit_shares(world, outcome)
        z = fixed.moment[t][moment] * np.float32(moment_share)
        z += (openness[0] * np.float32(shared) + openness[1 + t] * np.float32(own)) * np.float32(user_share)
        if not outcome.moment:
            z += (quality[0] * np.float32(shared) + quality[1 + t] * np.float32(own)) * np.float32(item_share)
            for weight, product in zip(fixed.direction[t], products, strict=True):
                z += product * np.float32(weight * taste_share)
        z *= np.float32(world.signal)
        z += draw.number * np.float32(outcome.number_effect)
        logits.append(z * np.float32(_AMOUNT_SCALE) if outcome.kind == "amount" else z)
    return logits


def logit_shares(world: World, outcome: Outcome) -> tuple[float, ...]:
    """Standard deviations of what taste, quality, openness and the moment add, of 1 in all."""
    if outcome.moment:
        return 0.0, 0.0, math.sqrt(0.5), math.sqrt(0.5)
    return *(math.sqrt((1 - world.context) * part) for part in _TASTE_QUALITY_OPENNESS), math.sqrt(world.context)


@lru_cache(maxsize=64)
def intercepts_of(world: World) -> tuple[float, ...]:
    """α of each task but content, such that the mean of its label is the one asked for.

    Solved on a fixed sample of rows that are no rows of the world's; a child counts with its parents' probability.
    """
    scored = effects_of(world).scored
    parts = []
    for i in range(0, _SAMPLE, BLOCK):
        n = np.arange(i, i + BLOCK)
        parts.append(logits_of(world, draw_rows(world, n + _SAMPLE_FROM, n * world.horizon // _SAMPLE)))
    happens: dict[str | None, np.ndarray] = {None: np.ones(_SAMPLE)}
    intercepts = []
    for t, outcome in enumerate(scored):
        z, weight = np.concatenate([part[t] for part in parts]).astype(np.float64), happens[outcome.after]
        alpha = round(_solve(z, weight / weight.sum(), outcome), 7)
        happens[outcome.name] = weight * _sigmoid(z + alpha)
        intercepts.append(alpha)
    return tuple(intercepts)


def _solve(z: np.ndarray, weight: np.ndarray, outcome: Outcome) -> float:
    if outcome.kind == "amount":
        return math.log(outcome.mean) - math.log(float((weight * np.exp(z)).sum()))
    target = outcome.mean if outcome.kind == "event" else (outcome.mean - 1) / 4
    wanted, alpha = math.log(target / (1 - target)), 0.0
    for _ in range(200):
        mean = float((weight * _sigmoid(z + alpha)).sum())
        step = wanted - math.log(mean / (1 - mean))
        alpha += step
        if abs(step) < 1e-9:
            break
    return alpha


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


# ---------------------------------------------------------------------- the truth


def truth(world: World, draw: Draw) -> dict[str, np.ndarray]:
    """Task -> float32: (N,) probability or expected value of what is looked at; (categories, N) odds of content, not
    normalised."""
    values = {}
    alphas, logits = iter(intercepts_of(world)), iter(logits_of(world, draw))
    for outcome in world.outcomes:
        if outcome.kind == "content":
            values[outcome.name] = content_odds(world, draw)
            continue
        z = next(logits) + np.float32(next(alphas))
        if outcome.kind == "amount":
            values[outcome.name] = np.exp(z)
        elif outcome.kind == "stars":
            values[outcome.name] = 1 + 4 * _sigmoid(z)
        else:
            values[outcome.name] = _sigmoid(z)
    return values


def content_odds(world: World, draw: Draw) -> np.ndarray:
    """(categories, N) float32 odds of the category turned to next: the user's closeness to it, and the hour."""
    fixed = effects_of(world)
    close = np.float32(world.signal * math.sqrt((1 - world.context) / world.latent_dim))
    of_hour = np.float32(world.signal * math.sqrt(world.context))
    general = latents(world.seed, "content", np.arange(world.categories), 1)[0] * np.float32(0.5)
    odds = np.empty((world.categories, len(draw.user)), np.float32)
    for c in range(world.categories):
        z = fixed.content_hour[c][draw.hour] * of_hour + general[c]
        for x, centre in zip(draw.users, fixed.categories, strict=True):
            z += x * (centre[c] * close)
        odds[c] = np.exp(z)
    return odds
