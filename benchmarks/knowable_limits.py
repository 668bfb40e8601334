"""What could be known at most from so many rows of a synthetic world, by who knows its rules and one side of it.

Every user has a vector and an openness of their own, every item a vector and a quality, and no row says what they are:
they must be learnt from the user's or item's own rows.  The observer knows all else: the rules, each segment and
category, what tags say, and *all items exactly* when they learn a user, *all users exactly* when they learn an item.
Their posterior is that of all labels of the user's (item's) training rows, in Laplace's approximation; they predict the
mean of σ(z) under it.  No learner gets further than the smaller of the first two columns; the third joins both
posteriors, which no learner can have together, and is nearer to what can be reached.

    python benchmarks/knowable_limits.py --world shop --rows 1000000

Shares are those of `mtcl_torchrec.evaluation.knowable`, over a sample of the test rows, with events only.  Of an event
that may only follow another, a row predicts that both happen, with the product of what the observer predicts of each,
and ``buy|cart`` the event given the other, over rows where that happened.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

import numpy as np

from mtcl_torchrec.data import synthetic_truth as rules
from mtcl_torchrec.data.counter_random import latents
from mtcl_torchrec.data.synthetic import World
from mtcl_torchrec.data.synthetic_labels import TAG_DIMS
from mtcl_torchrec.data.synthetic_truth import Draw, draw_rows, who_meets_what
from mtcl_torchrec.data.worlds import READY_WORLDS, ready_world
from mtcl_torchrec.evaluation.knowable import expected_auc

ENOUGH = 4_000  # rows after which an item or user counts as known
HALF = math.sqrt(0.5)


@dataclass
class Side:
    """What is to be learnt of users, or of items.

    Args:
        name: ``"user"`` or ``"item"``.
        mean, variance: (n, D) of each one's unknowns before any row: the vector's own part, and openness or quality.
        true: (n, D) what they are.
    """

    name: str
    ids: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    true: np.ndarray


def side_of(world: World, name: str, ids: np.ndarray) -> Side:
    """What is known of them beforehand."""
    tasks, dim = len(scored(world)), world.latent_dim
    own = np.stack(latents(world.seed, f"{name} vector", ids, dim), 1)
    level = np.stack(latents(world.seed, "openness" if name == "user" else "quality", ids, tasks + 1), 1)
    true = np.concatenate([own, level], 1).astype(np.float64)
    mean, variance = np.zeros_like(true), np.ones_like(true)
    if name == "item":  # tags tell where, between -√3 and √3, the own part of some coordinates lies
        frame = world.items(ids)
        centre = rules.effects_of(world).categories.T[frame[world.category].to_numpy() - 1].astype(np.float64)
        high = np.array([[d + 1 in tags for d in range(TAG_DIMS)] for tags in frame[world.tags]])
        low = np.array([[d + 1 + TAG_DIMS in tags for d in range(TAG_DIMS)] for tags in frame[world.tags]])
        up, down = 1 / HALF - centre[:, :TAG_DIMS], -1 / HALF - centre[:, :TAG_DIMS]
        edge = math.sqrt(3.0)
        start = np.clip(np.where(high, up, np.where(low, -edge, down)), -edge, edge)
        stop = np.clip(np.where(high, edge, np.where(low, down, up)), -edge, edge)
        mean[:, :TAG_DIMS] = (start + stop) / 2
        variance[:, :TAG_DIMS] = np.maximum((stop - start) ** 2 / 12, 1e-4)
    return Side(name, ids, mean, variance, true)


def scored(world: World) -> list:
    """The outcomes with a logit of their own: all but content."""
    return [o for o in world.outcomes if o.kind != "content"]


def predicted(world: World) -> dict[str, list[str]]:
    """What a run may predict -> the events whose probabilities, each given those before it, are multiplied.

    An event that may only follow another is there twice: that both happen, and given that the other did.

    Example:
        >>> predicted(ready_world("shop"))["buy"], predicted(ready_world("shop"))["buy|cart"]
        (['click', 'cart', 'buy'], ['buy'])
    """
    events, found = {o.name: o for o in world.outcomes if o.kind == "event"}, dict[str, list[str]]()
    for name, outcome in events.items():
        if outcome.after is None:
            found[name] = [name]
        else:
            found |= {name: [*found[outcome.after], name], f"{name}|{outcome.after}": [name]}
    return found


def slopes(world: World, draw: Draw, name: str) -> np.ndarray:
    """(T, N, D): what a unit of each unknown of a side adds to the logits of the tasks, the other side being known."""
    fixed, tasks, dim = rules.effects_of(world), scored(world), world.latent_dim
    other = np.stack(draw.items if name == "user" else draw.users, 1).astype(np.float64)
    out = np.zeros((len(tasks), len(draw.user), dim + len(tasks) + 1))
    for t, outcome in enumerate(tasks):
        taste, item, user, _ = rules.logit_shares(world, outcome)
        level = user if name == "user" else 0.0 if outcome.moment else item
        if not outcome.moment:
            out[t, :, :dim] = other * fixed.direction[t] * (world.signal * taste * HALF)
        shared, own = fixed.loading[t]
        out[t, :, dim], out[t, :, dim + 1 + t] = world.signal * level * shared, world.signal * level * own
    return out


def content_slopes(world: World) -> np.ndarray:
    """(categories, D) of the logits of the content task in a user's unknowns."""
    dim = world.latent_dim
    out = np.zeros((world.categories, dim + len(scored(world)) + 1))
    close = world.signal * math.sqrt((1 - world.context) / dim)
    out[:, :dim] = rules.effects_of(world).categories.T * (close * HALF)
    return out


@dataclass
class Rows:
    """Labels and logits of rows: z (T, N) the true logits, labels (T, N) NaN where there is none, of events alone."""

    draw: Draw
    z: np.ndarray
    labels: np.ndarray
    classes: np.ndarray | None
    odds: np.ndarray | None


def read(world: World, index: np.ndarray) -> Rows:
    """The rows of these indices with all that is true of them."""
    draw = draw_rows(world, index, index)
    columns = world.columns(index)
    alphas = np.array(rules.intercepts_of(world))[:, None]
    z = np.stack(rules.logits_of(world, draw)).astype(np.float64) + alphas
    labels = np.stack([columns[o.name].astype(np.float64) for o in scored(world)])
    for t, outcome in enumerate(scored(world)):
        if outcome.kind != "event":
            labels[t] = np.nan
    content = next((o.name for o in world.outcomes if o.kind == "content"), None)
    classes = None if content is None else columns[content].astype(np.int64) - 1
    return Rows(draw, z, labels, classes, None if content is None else np.log(rules.content_odds(world, draw)))


def posterior(world: World, side: Side, number: int, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of what is not known of one user or item, from its rows: Laplace's."""
    x, true = slopes(world, rows.draw, side.name), side.true[number]
    base = rows.z - x @ true
    there = ~np.isnan(rows.labels)
    x, base, y = x[there], base[there], rows.labels[there]
    of_classes = content_slopes(world) if side.name == "user" and rows.odds is not None else None
    prior, theta = 1 / side.variance[number], side.mean[number].copy()
    for _ in range(25):
        p = 1 / (1 + np.exp(-(base + x @ theta)))
        gradient = x.T @ (y - p) - prior * (theta - side.mean[number])
        precision = (x * (p * (1 - p))[:, None]).T @ x + np.diag(prior)
        if of_classes is not None:
            logits = (rows.odds - (of_classes @ true)[:, None] + (of_classes @ theta)[:, None]).T
            q = np.exp(logits - logits.max(1, keepdims=True))
            q /= q.sum(1, keepdims=True)
            gradient += of_classes[rows.classes].sum(0) - q.sum(0) @ of_classes
            precision += of_classes.T @ (np.diag(q.sum(0)) - q.T @ q) @ of_classes
        step = np.linalg.solve(precision, gradient)
        theta += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-6:
            break
    return theta, np.linalg.inv(precision)


def own_rows(world: World, rows: int, users: np.ndarray, items: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    """Of each user and item asked for, the training rows that are about them, at most `ENOUGH` + 1."""
    found: dict[str, dict[int, list[np.ndarray]]] = {"user": {}, "item": {}}
    counts = {"user": np.zeros(world.num_users + 1, np.int64), "item": np.zeros(world.num_items + 1, np.int64)}
    wanted = {"user": np.zeros(world.num_users + 1, bool), "item": np.zeros(world.num_items + 1, bool)}
    wanted["user"][users], wanted["item"][items] = True, True
    for start in range(0, rows, 200_000):
        index = np.arange(start, min(start + 200_000, rows))
        for name, ids in zip(("user", "item"), who_meets_what(world, index, index), strict=True):
            chosen = np.flatnonzero(wanted[name][ids] & (counts[name][ids] <= ENOUGH))
            counts[name] += np.bincount(ids, minlength=len(counts[name]))
            order = chosen[np.argsort(ids[chosen], kind="stable")]
            parts = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1)
            for part in parts if len(order) else []:
                found[name].setdefault(int(ids[part[0]]), []).append(index[part])
    return {name: {i: np.concatenate(p)[: ENOUGH + 1] for i, p in of.items()} for name, of in found.items()}


def limits(world: World, rows: int, test: np.ndarray, sample: int = 1000) -> dict[str, dict[str, float]]:
    """Task -> the share of what is knowable by who learns ``user`` only, ``item`` only, and ``both``."""
    columns = world.columns(test)
    draw = np.random.default_rng(0)
    picked = {}
    for name, chain in predicted(world).items():
        there = test[~np.isnan(columns[chain[-1]])] if len(chain) == 1 else test
        picked[name] = np.sort(draw.permutation(there)[:sample])
    index = np.unique(np.concatenate(list(picked.values())))
    users, items = who_meets_what(world, index, index)
    sides = {"user": side_of(world, "user", np.unique(users)), "item": side_of(world, "item", np.unique(items))}
    own = own_rows(world, rows, sides["user"].ids, sides["item"].ids)
    judged = read(world, index)
    error, spread = {}, {}
    for name, side in sides.items():
        known = {}
        for number, one in enumerate(side.ids.tolist()):
            mine = own[name].get(one, np.zeros(0, np.int64))
            if len(mine) > ENOUGH:
                known[one] = (side.true[number], np.zeros((side.true.shape[1],) * 2))
            elif len(mine):
                known[one] = posterior(world, side, number, read(world, mine))
            else:
                known[one] = (side.mean[number], np.diag(side.variance[number]))
        ids = users if name == "user" else items
        x = slopes(world, judged.draw, name)
        off = np.stack([known[i][0] for i in ids.tolist()]) - side.true[np.searchsorted(side.ids, ids)]
        error[name] = (x * off).sum(2)
        spread[name] = np.stack([[v @ known[i][1] @ v for v in x[:, n]] for n, i in enumerate(ids.tolist())], 1)
    shares: dict[str, dict[str, float]] = {}
    number = {o.name: t for t, o in enumerate(scored(world))}
    for task, chain in predicted(world).items():
        at, ts = np.searchsorted(index, picked[task]), [number[name] for name in chain]
        true = np.prod(1 / (1 + np.exp(-judged.z[ts][:, at])), 0)
        best = expected_auc(true, true) - 0.5
        shares[task] = {}
        for who, of in {"user": ["user"], "item": ["item"], "both": ["user", "item"]}.items():
            z = judged.z[ts][:, at] + sum(error[name][ts][:, at] for name in of)
            v = sum(spread[name][ts][:, at] for name in of)
            mean = np.prod(1 / (1 + np.exp(-z / np.sqrt(1 + math.pi * v / 8))), 0)
            shares[task][who] = (expected_auc(true, mean) - 0.5) / best
    return shares


def main() -> None:
    """Say for each task how much of the oracle's ranking a perfect learner could have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=READY_WORLDS, default="shop")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--sample", type=int, default=1000, help="test rows of each task")
    options = parser.parse_args()
    horizon = options.rows + 100_000
    world = ready_world(options.world, num_users=options.users, num_items=options.items, horizon=horizon, seed=0)
    test = np.arange(options.rows + 50_000, horizon)
    found = limits(world, options.rows, test, options.sample)
    for task, shares in found.items():
        print(json.dumps(vars(options) | {"task": task} | {k: round(v, 4) for k, v in shares.items()}))


if __name__ == "__main__":
    main()
