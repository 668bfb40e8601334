"""Which columns of a person's log are the user, the item, the time and the request.

A name alone is not believed: a user or an item comes again in other rows, a request belongs to one user.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mtcl_torchrec.data.column_values import comes_again, constant_within, is_binary, is_list, is_timestamp

ID_WORDS = ("id", "ids", "key", "uuid", "guid", "pk", "sk", "idx", "hash", "code", "no", "nr", "number")
_OF_THINGS = ("id", "ids", "key", "uuid", "guid", "pk", "sk", "hash")  # words for an id that are none for a place
USER_WORDS = (
    "user", "uid", "userid", "customer", "member", "visitor", "reader", "viewer", "listener", "account", "client",
    "subscriber", "shopper", "buyer", "player", "learner", "student", "patient", "guest", "person", "consumer",
)  # fmt: skip
ITEM_WORDS = (
    "item", "iid", "itemid", "video", "product", "movie", "film", "article", "news", "ad", "song", "track", "book",
    "course", "post", "sku", "listing", "offer", "game", "app", "recipe", "hotel", "restaurant", "podcast", "episode",
    "story", "clip", "photo", "document", "doc", "content", "service", "creative", "job", "event",
)  # fmt: skip
REQUEST_WORDS = ("request", "impression", "slate", "search", "query", "page", "pageview", "visit", "session")
TIME_NAMES = ("time", "timestamp", "ts", "time_ms", "event_time", "datetime", "date", "created_at", "unix_time")
_VISIT = 0.02  # of the time of a log: what comes again within less, half of the times, belongs to a visit
_FINER = 1.5  # times as many as there are items


@dataclass(frozen=True)
class Roles:
    """Which column is what; None where there is none.

    Args:
        doubts: role -> why that column is to be looked at once more.
    """

    user: str | None
    item: str | None
    time: str | None
    request: str | None
    doubts: dict[str, str]


def words_of(name: str) -> list[str]:
    """The words of a column's name, in lower case.

    Example:
        >>> words_of("clickedItemId"), words_of("CUSTOMER_KEY"), words_of("userID")
        (['clicked', 'item', 'id'], ['customer', 'key'], ['user', 'id'])
    """
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return [word.lower() for word in re.split(r"[^A-Za-z0-9]+", parts) if word]


def names_an(name: str, nouns: Sequence[str]) -> bool:
    """Whether a name is that of an id of such a thing: one of the nouns, with words for an id after it.

    Example:
        >>> [names_an(name, USER_WORDS) for name in ("userId", "customer_key", "user", "user_age", "user_group_id")]
        [True, True, True, False, False]
    """
    words = words_of(name)
    while len(words) > 1 and words[-1] in ID_WORDS:
        words.pop()
    return bool(words) and words[-1] in nouns and (len(words) == 1 or words[-2] not in ("parent", "next", "last"))


def guess_roles(
    frame: pd.DataFrame,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    request: str | None = None,
) -> Roles:
    """Who it is about, what is ranked, when, and which rows were offered together.

    Args:
        frame: rows of the log, in the order of the file.
        user, item, time, request: columns that are known.

    Example:
        >>> frame = pd.DataFrame({"visitorKey": list("aabbab"), "sku": list("xyxyxy"), "ts": range(6)})
        >>> roles = guess_roles(frame)
        >>> roles.user, roles.item, roles.time, roles.request
        ('visitorKey', 'sku', 'ts', None)
    """
    doubts: dict[str, str] = {}
    values: dict[str, pd.Series] = {str(name): column for name, column in frame.items()}

    def distinct(name: str) -> int:
        return values[name].nunique()

    time = time or _time_of(frame)
    ids = [str(c) for c in frame if str(c) != time and comes_again(frame[c]) and _may_be_ids(frame[c])]
    free = [c for c in ids if c not in (user, item, request)]
    user = user or _first(free, USER_WORDS)
    free = [c for c in free if c != user]
    if item is None:
        item = _first(free, ITEM_WORDS)
        if item is not None and (finer := _finer(values, [c for c in free if c != item], item, user)):
            doubts["item"] = f"each {finer} is of one {item}: --item {finer}, if that is what was shown"
    free = [c for c in free if c != item]
    # Without telling names: ids by name that nothing was found for.  One who comes stays for some rows.
    unnamed = [c for c in free if words_of(c)[-1:] and words_of(c)[-1] in ID_WORDS and not names_an(c, REQUEST_WORDS)]
    unnamed = [c for c in unnamed if user is None or not constant_within(values[c], values[user])]
    if user is None and item is None and len(unnamed) >= 2:
        unnamed.sort(key=distinct, reverse=True)
        user, item = sorted(unnamed[:2], key=lambda c: _stays(values[c]), reverse=True)
        doubts |= dict.fromkeys(("user", "item"), "its name does not tell; guessed from what it holds")
    elif user is None and (session := _first(free, REQUEST_WORDS)):
        user = session
        doubts["user"] = "the nearest to a user that was found"
    of_many = [c for c in unnamed if c not in (user, request) and words_of(c)[-1] in _OF_THINGS]
    of_many = [c for c in of_many if user is None or not constant_within(values[user], values[c])]
    if item is None and len(of_many) == 1:
        item = of_many[0]
        doubts["item"] = "its name does not tell; the only id of many users"
    if request is not None and user not in (None, request) and not constant_within(frame[user], frame[request]):
        doubts["request"] = f"rows of several values of {user} are in one request"
    if request is None:
        free = [c for c in free if c not in (user, item)]
        named = sorted((c for c in free if names_an(c, REQUEST_WORDS)), key=distinct, reverse=True)
        request = next((c for c in named if _belongs_to_one(frame[c], None if user is None else frame[user])), None)
        if request is None and user is not None and time is not None:
            visits = [c for c in free if _is_visit(frame[c], frame[user], frame[time])]
            request = max(visits, key=distinct, default=None)
            if request is not None:
                doubts["request"] = f"its name does not tell; each is of one {user}, and of a short time"
    return Roles(user, item, time, request, doubts)


def request_sizes(frame: pd.DataFrame, roles: Roles, share: float = 0.1) -> np.ndarray:
    """(R,) how many rows the requests, or where there are none the users, have among the newest rows.

    Args:
        share: of rows that are the newest.

    Example:
        >>> frame = pd.DataFrame({"user": [1, 1, 1, 2], "time": range(4)})
        >>> request_sizes(frame, Roles("user", None, "time", None, {}), share=1.0).tolist()
        [3, 1]
    """
    key = roles.request or roles.user
    if key is None or frame.empty:
        return np.zeros(0, np.int64)
    if roles.time is not None:
        frame = frame.loc[frame[roles.time].rank(method="first", pct=True) > 1 - share]
    return frame.groupby(key, sort=True).size().to_numpy()


def lengths_to_judge(sizes: np.ndarray) -> list[int]:
    """How many are to be shown (k) so that at least half of the requests leave a choice: 5 and 10, or fewer.

    Args:
        sizes: (R,) rows of each request; those of one row leave none whatever k is.

    Example:
        >>> lengths_to_judge(np.array([30, 40, 12])), lengths_to_judge(np.array([8, 9, 4])), lengths_to_judge(
        ...     np.array([2, 2, 1])
        ... )
        ([5, 10], [2, 4], [1])
    """
    several = sizes[sizes > 1]
    typical = int(np.median(several)) if len(several) else 1
    if typical > 10:
        return [5, 10]
    most = max(1, typical // 2)
    return sorted({max(1, most // 2), most})


def _time_of(frame: pd.DataFrame) -> str | None:
    lower = {str(c).lower(): str(c) for c in frame}
    named = next((lower[usual] for usual in TIME_NAMES if usual in lower), None)
    if named is not None:
        return named
    if (found := next((str(c) for c in frame if is_timestamp(frame[c])), None)) is not None:
        return found
    for column in frame:  # such as eventTs, seen_at in seconds or milliseconds since 1970
        words, values = words_of(str(column)), frame[column]
        if set(words) & {"time", "timestamp", "ts", "at", "date"} and pd.api.types.is_numeric_dtype(values):
            smallest = values.min()
            if any(9e8 * unit <= smallest <= values.max() <= 4e9 * unit for unit in (1, 1e3, 1e6, 1e9)):
                return str(column)
    return None


def _first(columns: Sequence[str], nouns: Sequence[str]) -> str | None:
    """The column that is named after the first of the nouns; the shortest of several names."""
    for noun in nouns:
        if found := [c for c in columns if names_an(c, [noun])]:
            return min(found, key=lambda c: (len(words_of(c)), columns.index(c)))
    return None


def _may_be_ids(column: pd.Series) -> bool:
    if is_list(column) or is_binary(column) or is_timestamp(column):
        return False
    if pd.api.types.is_float_dtype(column):  # numbers with gaps, as CSV files are read
        values = column.dropna()
        return bool((values == np.floor(values)).all())
    return True


def _stays(column: pd.Series) -> float:
    """How often a value comes again in the next row, relative to what chance would give."""
    codes = pd.factorize(column)[0]
    by_chance = float(np.square(np.bincount(codes[codes >= 0]) / max(len(codes), 1)).sum())
    return float((codes[1:] == codes[:-1]).mean()) - by_chance


def _belongs_to_one(request: pd.Series, user: pd.Series | None) -> bool:
    """Whether rows of a request are of one user, and users have several."""
    if user is None:
        return True
    return request.nunique() > user.nunique() and constant_within(user, request)


def _is_visit(column: pd.Series, user: pd.Series, time: pd.Series) -> bool:
    """Whether its values are visits or pages: each of one user, of several rows, and of a short time."""
    if not _belongs_to_one(column, user) or column.groupby(column).size().median() < 2:
        return False
    times = time if pd.api.types.is_numeric_dtype(time) else pd.to_datetime(time, errors="coerce", utc=True)
    by_value = times.groupby(column)
    spans: pd.Series = by_value.max() - by_value.min()
    whole: Any = times.max() - times.min()
    return bool(spans.median() <= _VISIT * whole)


def _finer(values: dict[str, pd.Series], free: Sequence[str], item: str, user: str | None) -> str | None:
    """What is to the item as a dish is to its restaurant: an id of one item each, and of many users."""
    found = [
        c
        for c in free
        if not pd.api.types.is_float_dtype(values[c])  # a price
        and values[c].nunique() >= _FINER * values[item].nunique()
        and constant_within(values[item], values[c])
        and not (user is not None and constant_within(values[user], values[c]))
    ]
    return max(found, key=lambda c: values[c].nunique(), default=None)
