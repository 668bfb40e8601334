"""Five ready synthetic worlds, and a run's YAML for each.

| world | behaviour | fused score is for | `conflict` turns |
|---|---|---|---|
| ``shop`` | click → cart → buy; a price | sales | buy against the others |
| ``social`` | like, comment, share, hide | joining in, and against hides | hide against the others |
| ``video`` | finish, like, watch_time; a length | time well spent | like against the others |
| ``courses`` | enrol → finish → rating; hours | finished courses | finish against the others |
| ``health`` | view → book → rating; days to wait | visits that help | book against the others |

Each also has a task of content, ``next_category`` (``next_topic``, …), the one that the user turns to next, a softmax;
and one of context, ``return``: whether the user comes back, which the user and the moment decide.  Neither sees an item
(`Task.inputs`).  An arrow is a chain: the label exists, and its task's mask holds, where the event before it is 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml
from pydantic import ValidationError

from mtcl_torchrec.data.defaults import FEW, defaults_for
from mtcl_torchrec.data.outcomes import Outcome
from mtcl_torchrec.data.synthetic import World
from mtcl_torchrec.schema import ConfigError, Feature, Task, nearest


def _event(name: str, mean: float, **options: Any) -> Outcome:
    return Outcome(name=name, mean=mean, **options)


_RETURN = Outcome(name="return", mean=0.3, moment=True)

_READY: dict[str, dict[str, Any]] = {
    "shop": {
        "item": "product_id", "number": "price", "number_median": 20.0, "number_spread": 0.8, "conflict": 0.2,
        "outcomes": (
            _event("click", 0.2, number_effect=-0.1, fused=1, delay=0.01),
            _event("cart", 0.25, after="click", number_effect=-0.3, fused=2, delay=0.1),
            _event("buy", 0.4, after="cart", number_effect=-0.6, opposed=True, fused=4),
            Outcome(name="next_category", kind="content", fused=0.5),
            _RETURN,
        ),
    },
    "social": {
        "item": "post_id", "category": "topic", "tags": "hashtags", "number": "length", "number_median": 40.0,
        "number_spread": 1.0, "conflict": 1.0,
        "outcomes": (
            _event("like", 0.12, number_effect=-0.2, fused=1, delay=0.05),
            _event("comment", 0.03, number_effect=0.2, fused=8, delay=0.2),
            _event("share", 0.02, fused=10),
            _event("hide", 0.015, opposed=True, number_effect=0.2, fused=-20),
            Outcome(name="next_topic", kind="content", fused=0.5),
            _RETURN,
        ),
    },
    "video": {
        "item": "video_id", "category": "genre", "number": "length", "number_median": 3.0, "number_spread": 0.7,
        "conflict": 0.3,
        "outcomes": (
            _event("finish", 0.35, number_effect=-0.8, fused=1, delay=0.01),
            _event("like", 0.05, opposed=True, fused=5, delay=0.05),
            Outcome(name="watch_time", kind="amount", mean=1.8, number_effect=1.2, fused=1),
            Outcome(name="next_genre", kind="content", fused=0.5),
            _RETURN,
        ),
    },
    "courses": {
        "item": "course_id", "category": "subject", "tags": "skills", "number": "hours", "number_median": 12.0,
        "number_spread": 0.6, "conflict": 0.4,
        "outcomes": (
            _event("enrol", 0.08, number_effect=-0.2, fused=1, delay=0.1),
            _event("finish", 0.3, after="enrol", opposed=True, number_effect=-0.6, fused=4),
            Outcome(name="rating", kind="stars", mean=4.1, after="finish", fused=1),
            Outcome(name="next_subject", kind="content", fused=0.5),
            _RETURN,
        ),
    },
    "health": {
        "item": "service_id", "category": "specialty", "tags": "conditions", "number": "wait_days",
        "number_median": 6.0, "number_spread": 0.9, "conflict": 0.2,
        "outcomes": (
            _event("view", 0.25, fused=1, delay=0.01),
            _event("book", 0.15, after="view", opposed=True, number_effect=-0.6, fused=6),
            Outcome(name="rating", kind="stars", mean=4.3, after="book", fused=2),
            Outcome(name="next_specialty", kind="content", fused=0.5),
            _RETURN,
        ),
    },
}  # fmt: skip

READY_WORLDS = tuple(_READY)


def ready_world(name: str, *, rates: Mapping[str, float] | None = None, imbalance: float = 1.0, **dials: Any) -> World:
    """One of the ready worlds, with some dials turned.

    Args:
        name: ``"shop"``, ``"social"``, ``"video"``, ``"courses"`` or ``"health"``.
        rates: task -> mean of its label, where it is not to be the world's own; not of content.
        imbalance: at least 1; the mean of every event, but for those of context, is divided by it.
        dials: fields of `World`, such as `seed`, `num_users` or `cold_items`.

    Raises:
        ConfigError: no such world, task or dial, or a value out of range.

    Example:
        >>> world = ready_world("shop", num_items=30_000_000, rates={"click": 0.05})
        >>> [(t.name, t.mask) for t in world.schema().tasks][:3]
        [('click', None), ('cart', 'click'), ('buy', 'cart')]
        >>> ready_world("shpo")
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: no ready world 'shpo' (did you mean 'shop'?)
    """
    if name not in _READY:
        raise ConfigError(f"no ready world {name!r}{nearest(name, _READY)}")
    known = [f.name for f in fields(World) if f.name != "outcomes"]
    for dial in dials:
        if dial not in known:
            raise ConfigError(f"world {name}: no dial {dial!r}{nearest(dial, [*known, 'rates', 'imbalance'])}")
    if imbalance < 1:
        raise ConfigError(f"world {name}: imbalance is at least 1, not {imbalance}")
    settings = _READY[name] | dials
    own = {o.name: o for o in settings["outcomes"] if o.kind != "content"}
    rates = rates or {}
    for task in rates:
        if task not in own:
            raise ConfigError(f"world {name}: rates: no task {task!r} with a mean{nearest(task, own)}")
    try:
        outcomes = tuple(_with_mean(o, rates.get(o.name), imbalance) for o in settings["outcomes"])
        return World(**settings | {"outcomes": outcomes})
    except ValidationError as error:
        raise ConfigError("\n".join(f"world {name}: {_explained(e)}" for e in error.errors())) from None


def _explained(error: Mapping[str, Any]) -> str:
    """One thing that pydantic found wrong."""
    message = error["msg"].removeprefix("Value error, ")
    return f"{error['loc'][0]}: {message} (given: {error['input']!r})" if error["loc"] else message


def _with_mean(outcome: Outcome, mean: float | None, imbalance: float) -> Outcome:
    rare = imbalance if outcome.kind == "event" and not outcome.moment else 1.0
    values = outcome.model_dump() | {"mean": (outcome.mean if mean is None else mean) / rare}
    return Outcome.model_validate(values)


def world_run(
    name: str,
    *,
    rows: int = 1_000_000,
    val_rows: int | None = None,
    test_rows: int | None = None,
    log: str | None = None,
    factors: bool = True,
    **dials: Any,
) -> str:
    """A commented run on a ready world: YAML for `mtcl train`.

    Args:
        rows, val_rows, test_rows: of the splits, which follow each other in time; a tenth of `rows`, and at most
            50,000, validate and test.
        log: a file that holds the world's rows: train on it.  `rows` is their number, and tenths of it validate and
            test.
        factors: False leaves out the vectors that tasks share and their prior: the network alone, whose steps the
            benchmarks of speed and memory measure.
        dials: as for `ready_world`; those given stand in the YAML.

    Raises:
        ConfigError: as `ready_world`.

    Example:
        >>> print(world_run("video", rows=10_000).split("schema:")[0])  # doctest: +ELLIPSIS
        # The ready world "video": rows come from known probabilities and are computed while training.
        ...
            world: video
            rows: 10000
        ...
    """
    dials = {"seed": 0, "num_users": 100_000, "num_items": 100_000} | dials
    held_out = max(1, min(50_000, rows // 10))
    val_rows, test_rows = val_rows or held_out, test_rows or held_out
    settings: dict[str, Any] = {"horizon": rows + (0 if log else val_rows + test_rows)} | dials
    world = ready_world(name, **settings)
    schema = world.schema()
    few = defaults_for(rows) if rows < FEW else None  # of more, two passes know most of what can be known
    epochs, batch_size, patience = (few.epochs, few.batch_size, few.patience) if few else (2, 1024, 1)
    tasks, features = [_declared(task) for task in schema.tasks], [_declared(of) for of in schema.features]
    tables, dense_lr = "{kind: rowwise_adagrad, lr: 0.02}", 0.001
    if factors:
        tasks = [_with_head(task, world) for task in tasks]
        features = [_as_factor(feature, world) for feature in features]
        tables, dense_lr = "{kind: adagrad, lr: 0.3, init_scale: 0.15}", 0.01
    about_factors = [
        "    # An event after another is a chain: what is predicted, and ranks, is that both happen.  A masked task",
        "    # weighs as much as the share of rows that have its label.  Behaviour is a network's logit plus a product",
        "    # of vectors that all tasks share (tower_dot), by a matrix of each task's own (bilinear).",
    ]
    prior = [
        "  decay: linear      # of all learning rates, to 0",
        "  # A Gaussian prior of the vectors of users and items, felt most by those with few rows: 6 · ids / rows.",
        f"  regularisers: {{l2_rows: {_flow(_prior(world, rows))}}}",
    ]
    lines = [
        *(_from_rows(name, rows, val_rows, test_rows, dials) if log is None else _from_log(name, log)),
        "",
        "schema:",
        f"  user: {schema.user}",
        f"  item: {schema.item}",
        f"  time: {schema.time}",
        "  features:",
        "    # encoding: index takes ids as rows of their table, so no vocabulary has to be learnt.  The tables of",
        "    # users and items must hold all ids: num_users + 1 and num_items + 1 rows, row 0 being 'unknown'.",
        *(f"    - {_flow(feature)}" for feature in features),
        "  tasks:",
        *(about_factors if factors else ["    # A masked label counts only where the event before it happened."]),
        *(f"    - {_flow(task)}" for task in tasks),
        "",
        "model:",
        "  # or kind: shared_bottom, ple, single_task",
        "  trunk: {kind: mmoe, num_experts: 4, expert_layers: [128, 64]}",
        "  tower_layers: [32]",
        "  cross_layers: 1",
        "",
        "optimizers:",
        f"  tables: {tables}",
        f"  dense: {{kind: adamw, lr: {dense_lr}, weight_decay: 0.01}}",
        "",
        "training:",
        f"  epochs: {epochs}",
        f"  batch_size: {batch_size}   # rows per step and rank",
        f"  patience: {patience}        # stop after so many epochs without a better mean validation AUC",
        *(prior if factors else []),
        "",
        "# The score that ranks: a weighted mean of the predictions, in [0, 1].  A negative weight lowers it.",
        "fusion:",
        f"  weights: {_flow(world.fusion_weights())}",
    ]
    return "\n".join(lines) + "\n"


_FACTOR_DIM = 16


def _factors(world: World) -> list[str]:
    """The features whose embeddings add up to the user's vector and the item's."""
    return [world.user, "segment", world.item, world.category, world.tags, *([world.title] if world.text else [])]


def _as_factor(feature: dict[str, Any], world: World) -> dict[str, Any]:
    return feature | ({"embedding_dim": _FACTOR_DIM} if feature["name"] in _factors(world) else {})


def _with_head(task: dict[str, Any], world: World) -> dict[str, Any]:
    """A task as declared, with what else a run says of it.

    An event that may only follow another is a chain: predicted is that both happen, which a fused score can rank by.
    """
    outcomes = {o.name: o for o in world.outcomes}
    if "mask" in task and outcomes[task["name"]].kind == "event":
        task = {("after" if key == "mask" else key): value for key, value in task.items()}
    share, parent = 1.0, outcomes[task["name"]].after if "mask" in task else None
    while parent is not None:
        share, parent = share * outcomes[parent].mean, outcomes[parent].after
    if outcomes[task["name"]].kind == "content":  # every row has one; it tells most of the user's vector
        return {key: value for key, value in task.items() if key != "weight"}
    if share < 1:
        task = task | {"weight": round(task.get("weight", 1.0) * share, 4)}
    if outcomes[task["name"]].moment:
        return task
    return task | {"head": {"kind": "tower_dot", "dim": _FACTOR_DIM, "factors": _factors(world), "bilinear": True}}


def _prior(world: World, rows: int) -> dict[str, float]:
    """λ of `l2_rows`: half of a precision of 12 for each row of a table, over the rows that the loss averages."""
    return {world.user: round(6 * world.num_users / rows, 6), world.item: round(6 * world.num_items / rows, 6)}


def _from_rows(name: str, rows: int, val_rows: int, test_rows: int, dials: Mapping[str, Any]) -> list[str]:
    return [
        f'# The ready world "{name}": rows come from known probabilities and are computed while training.',
        f"name: {name}",
        "",
        "data:",
        "  synthetic:   # row numbers are split: the first train, the next validate, the last test",
        f"    world: {name}",
        f"    rows: {rows}",
        f"    val_rows: {val_rows}",
        f"    test_rows: {test_rows}",
        *(f"    {dial}: {_flow(value)}" for dial, value in dials.items()),
        "    # More dials: rates: {TASK: mean of its label}, imbalance (1 and up), correlation and conflict between",
        "    # tasks, signal, context, missing, cold_items, user_exponent and item_exponent (Zipf), text (of titles),",
        "    # position_bias, delay (in days, of events; log-normal with a delay_spread), …",
    ]


def _from_log(name: str, log: str) -> list[str]:
    return [
        f'# Rows of the ready world "{name}", as mtcl synth wrote them.',
        f"name: {name}",
        "",
        "data:",
        f"  log: {json.dumps(log, ensure_ascii=False)}",
        "  # The newest rows validate and test.",
        "  val_fraction: 0.1",
        "  test_fraction: 0.1",
    ]


def _declared(part: Feature | Task) -> dict[str, Any]:
    """What a feature or task says itself; one group as a word."""
    values = part.model_dump(mode="json", exclude_unset=True)
    if len(values.get("group", ())) == 1:
        values["group"] = values["group"][0]
    return values


def _flow(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
