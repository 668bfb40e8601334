"""What the columns of a person's log are besides its keys, guessed from their names and from what they hold.

A name alone is not believed: an event is 0 or 1.  Whatever may be an outcome is never guessed to be an input.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from mtcl_torchrec.data.column_values import (
    constant_within,
    hashable,
    is_binary,
    is_list,
    is_prose,
    is_timestamp,
    often_missing,
    separator_of,
    why_useless,
)
from mtcl_torchrec.data.roles import Roles, words_of

Kind = Literal["feature", "event", "outcome", "unsure", "useless"]
EVENT_WORDS = (
    "click", "like", "view", "buy", "purchase", "order", "cart", "pay", "follow", "share", "forward", "comment", "hate",
    "hide", "report", "finish", "enrol", "book", "install", "convert", "conversion", "label", "save", "favorite",
    "skip", "enter", "target", "rated", "play", "listen", "watch", "complete", "subscribe", "dislike", "block",
)  # fmt: skip
# Of a column of 0 and 1 that differs from row to row; as whole words, as they are parts of others, such as tap of tape.
DONE_WORDS = (
    "did", "tap", "taps", "tapped", "flagged", "loved", "opened", "voted", "upvoted", "downvoted", "swiped", "reacted",
    "replied", "streamed", "retweet", "retweeted", "repost", "reposted", "bid", "applied", "booked", "rewatched",
)  # fmt: skip
FOLD_WORDS = ("fold", "folds", "kfold", "cvfold", "split", "partition")
WEIGHT_WORDS = ("ipw", "iptw", "ips", "ipsw", "weight", "weights")
RATING_WORDS = ("rating", "ratings", "stars", "star", "score", "grade", "rate")
DURATION_WORDS = (
    "duration", "dwell", "watch", "watched", "played", "spent", "seconds", "secs", "minutes", "mins", "msec", "millis",
    "listened", "elapsed", "completion", "ratio", "amount", "revenue", "paid",
)  # fmt: skip
_MOST_FOLDS = 20


@dataclass(frozen=True)
class Guess:
    """What a column is.

    Args:
        kind: ``feature`` is known before the event; an ``event`` is 0 or 1 afterwards; an ``outcome`` a number; of
            ``unsure`` ones nothing tells whether they come before or after; ``useless`` ones hold nothing to learn.
        group: of a feature: whose property it is.
        why: of useless and unsure columns and of outcomes, the reason.
        separator: of texts that are lists.
    """

    kind: Kind
    group: str = "context"
    why: str = ""
    separator: str | None = None


def guess_column(frame: pd.DataFrame, name: str, roles: Roles) -> Guess:
    """What a column is that has no role, or that of the user or item.

    Example:
        >>> from mtcl_torchrec.data.roles import guess_roles
        >>> frame = pd.DataFrame({"user": list("aabb") * 9, "city": list("xxyy") * 9, "click": [0, 1, 1, 0] * 9})
        >>> roles = guess_roles(frame)
        >>> guess_column(frame, "city", roles).group, guess_column(frame, "click", roles).kind
        ('user', 'event')
    """
    column = frame[name]
    if name in (roles.user, roles.item):
        return Guess("feature", "user" if name == roles.user else "item")
    if reason := why_useless(column):
        return Guess("useless", why=reason)
    if is_timestamp(column):
        return Guess("useless", why="a second time")
    if is_event(column, name):
        return Guess("event")
    if is_fold(column, name):
        return Guess("useless", why="a fold of a split, by its name, and no property of the row")
    if is_weight(column, name):
        return Guess("useless", why=f"a weight, by its name: a task may count rows by it, with sample_weight: {name}")
    group = group_of(frame, name, roles.user, roles.item)
    if (
        is_binary(column)
        and column.nunique() == 2
        and group in (None, "context")
        and set(words_of(name)) & set(DONE_WORDS)
    ):
        return Guess("event")
    number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    varies = group is None or (group == "context" and not name.lower().startswith("context"))
    words = set(words_of(name))
    if varies and number and not is_binary(column):
        if words & set(RATING_WORDS) and column.nunique() <= 21:
            return Guess("outcome", why="a rating")
        if words & set(DURATION_WORDS):
            return Guess("outcome", why="an amount that differs from row to row")
    if sounds_later(name) or group is None or (varies and (is_binary(column) or often_missing(column))):
        return Guess("unsure", group or "context", why="differs from row to row")
    separator = None
    if not number and not is_list(column):
        separator = separator_of(column)
        if separator is None and is_prose(column):
            return Guess("useless", why="a text; mtcl embed makes vectors of it")
    return Guess("feature", group or "context", separator=separator)


def is_event(column: pd.Series, name: str) -> bool:
    """Whether it holds both 0 and 1, and is named after something that a person does."""
    return is_binary(column) and column.nunique() == 2 and any(word in name.lower() for word in EVENT_WORDS)


def is_fold(column: pd.Series, name: str) -> bool:
    """Whether it says which part of a split a row belongs to.

    Example:
        >>> [is_fold(pd.Series(range(5)), name) for name in ("fold", "cvFold", "folder", "split_test")]
        [True, True, False, False]
    """
    return words_of(name)[-1:] != [] and words_of(name)[-1] in FOLD_WORDS and column.nunique() <= _MOST_FOLDS


def is_weight(column: pd.Series, name: str) -> bool:
    """Whether it says how much a row counts, such as an inverse propensity: above 0, and no weight of a thing.

    Example:
        >>> weights = pd.Series([0.5, 2.0])
        >>> [is_weight(weights, name) for name in ("ipw", "sample_weight", "click_ips", "item_weight", "body_weight")]
        [True, True, True, False, False]
    """
    if not pd.api.types.is_float_dtype(column) or not column.min() >= 0:
        return False
    words = words_of(name)
    plain = {"weight", "weights"} & set(words[-1:])
    of_rows = len(words) == 1 or words[-2] in ("sample", "row", "example", "importance", "inverse", "propensity")
    return words[-1:] != [] and words[-1] in WEIGHT_WORDS and (of_rows or not plain)


def sounds_later(name: str) -> bool:
    """Whether a column's name says that it tells what came afterwards."""
    return re.match(r"(next|after|later|future|outcome|label|target)(_|$)", name.lower()) is not None


def group_of(frame: pd.DataFrame, name: str, user: str | None, item: str | None) -> str | None:
    """The group a column belongs to; None where it differs from row to row like an outcome."""
    for prefix in ("user", "item", "context"):
        if name.lower().startswith(prefix):
            return prefix
    values = hashable(frame[name])
    for key, group in ((item, "item"), (user, "user")):
        if key is not None and key != name and constant_within(values, frame[key]):
            return group
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 200:
        return None
    return "context"
