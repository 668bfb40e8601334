"""A log split for the question of what is known of new items and new users: by each user's own order, no row of the
future among those of the past.

- **Cold users**: a seeded share of the users; all their rows are test rows.
- Of every other user, the newest rows are test, those before them validation, the rest training.  No row of a user is
  trained on that comes after one that is judged by.  Between users nothing is claimed: where a log has no times, their
  orders cannot be compared.
- **Cold items**: a seeded share of the items; their rows are left out of training and validation and stay in test.
  (Their rows before the test part are dropped, not moved there: a user's later rows would have been trained on.)

A test row's ``item_segment`` says how well its item is known: ``"never seen"`` in training, ``"head"`` (the items of
most rows that together hold `head_share` of them) or ``"tail"``.  ``new_user`` marks rows of users without a training
row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from mtcl_torchrec.data.counter_random import stream, uniform
from mtcl_torchrec.schema import DataError, nearest

ItemSegment = Literal["head", "tail", "never seen"]
SEGMENTS: tuple[ItemSegment, ...] = ("head", "tail", "never seen")


def cold_split(
    log: pd.DataFrame,
    *,
    user: str = "user_id",
    item: str = "item_id",
    position: str = "position",
    val: float = 0.1,
    test: float = 0.1,
    cold_items: float = 0.1,
    cold_users: float = 0.05,
    head_share: float = 0.8,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Training, validation and test rows; see the module.

    Args:
        log: one row an event; the rows of each split keep their order in it.
        user, item: integer columns.
        position: the place of a row in its user's own order; what sorts a user's rows.
        val, test: shares of each user's rows, at least one row each; a user of fewer than three rows is trained on.
        cold_items, cold_users: shares of items and users.
        head_share: see the module.
        seed: of the draw of cold items and users.

    Returns:
        ``"train"``, ``"val"`` and ``"test"``; the last with the columns ``item_segment`` and ``new_user``.

    Raises:
        DataError: a column is missing, a place is taken twice, or nothing is left to train on.
        ValueError: a share is out of range.

    Example:
        >>> log = pd.DataFrame({"user_id": np.repeat(np.arange(20), 10), "position": np.tile(np.arange(10), 20),
        ...                     "item_id": np.arange(200) * 7 % 23})
        >>> {name: len(rows) for name, rows in cold_split(log, cold_items=0, cold_users=0).items()}
        {'train': 160, 'val': 20, 'test': 20}
    """
    shares = {"val": val, "test": test, "cold_items": cold_items, "cold_users": cold_users, "head_share": head_share}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} is a share of at least 0 and below 1, not {share}")
    if val + test >= 1:
        raise ValueError(f"val and test leave nothing to train on: {val} + {test}")
    for column in (user, item, position):
        if column not in log:
            raise DataError(f"the log has no column {column!r}{nearest(column, map(str, log.columns))}")
    if log.duplicated([user, position]).any():
        twice = log[log.duplicated([user, position])].iloc[0]
        raise DataError(f"{user} {twice[user]} has two rows of {position} {twice[position]}")
    by_user = log.groupby(user, sort=False)[position]
    size = by_user.transform("size").to_numpy()
    left = size - by_user.rank(method="first").to_numpy().astype(np.int64)  # rows of the user after this one
    several = size >= 3
    of_test = np.where(several & (test > 0), np.maximum((size * test).astype(np.int64), 1), 0)
    of_val = np.where(several & (val > 0), np.maximum((size * val).astype(np.int64), 1), 0)
    stranger = _drawn(log[user], cold_users, seed, "cold users")
    unknown = _drawn(log[item], cold_items, seed, "cold items")
    in_test = stranger | (left < of_test)
    in_val = ~in_test & (left < of_test + of_val)
    train = log[~in_test & ~in_val & ~unknown]
    if train.empty:
        raise DataError("nothing is left to train on: fewer cold items and users, or more rows of each user")
    judged = log[in_test].copy()
    judged["item_segment"] = item_segments(judged[item], train[item], head_share)
    judged["new_user"] = ~judged[user].isin(train[user].unique())
    return {"train": train, "val": log[in_val & ~unknown], "test": judged}


def item_segments(items: pd.Series, trained: pd.Series, head_share: float = 0.8) -> np.ndarray:
    """(N,) of `SEGMENTS`: how well each item is known from training.

    Args:
        items: (N,).
        trained: items of the training rows.
        head_share: see the module.

    Example:
        >>> item_segments(pd.Series([1, 2, 3]), pd.Series([1] * 8 + [2] * 2)).tolist()
        ['head', 'tail', 'never seen']
    """
    counts = trained.value_counts()  # the most frequent first
    before = counts.cumsum() - counts
    head = counts.index[before < head_share * counts.sum()]
    return np.select([items.isin(head), items.isin(counts.index)], SEGMENTS[:2], SEGMENTS[2])


def _drawn(ids: pd.Series, share: float, seed: int, what: str) -> np.ndarray:
    """(N,) bool: whether the id is one of the share that has the lowest random numbers."""
    unique = np.sort(ids.unique())
    order = np.argsort(uniform(stream(seed, what), unique.astype(np.int64)), kind="stable")
    return ids.isin(unique[order[: round(share * len(unique))]]).to_numpy()
