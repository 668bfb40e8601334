"""Ids left out while training, so that a model learns to do without them, as it must for new users and items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.counter_random import stream, uniform


def drop_ids(
    rows: EncodedRows, shares: Mapping[str, float], numbers: np.ndarray | torch.Tensor, seed: Sequence[int]
) -> EncodedRows:
    """The rows with a share of their ids replaced by 0, "unknown" (DropoutNet: Volkovs, Yu and Poutanen, 2017).

    Which ones is a function of seed, feature and row number: the same on any rank, in batches of any size, and after a
    resume.

    Args:
        rows: N encoded rows; they stay as they are.
        shares: id feature -> share of the rows whose id is left out; of other features nothing is.
        numbers: (N,) the rows' numbers within what `seed` names.
        seed: numbers, the run's seed first, such as (seed, epoch).

    Example:
        >>> rows = EncodedRows(
        ...     dense=torch.empty(6, 0), keys=("user", "item"), ids=torch.arange(1, 13).reshape(6, 2),
        ...     labels=torch.zeros(6, 1),
        ... )
        >>> drop_ids(rows, {"item": 0.5}, np.arange(6), (0, 1)).ids.T
        tensor([[ 1,  3,  5,  7,  9, 11],
                [ 0,  0,  6,  0,  0,  0]])
    """
    if not any(shares.values()):
        return rows
    columns = [key for key in rows.keys if key not in rows.bags]
    ids = rows.ids.clone()
    first, *rest = seed
    for name, share in shares.items():
        drawn = uniform(stream(first, "id dropout", name, *rest), np.asarray(numbers))
        ids[torch.from_numpy(drawn < share), columns.index(name)] = 0
    return replace(rows, ids=ids)
