"""Matrix factorisation as a task's head: the user's vector times the item's, over the embeddings all tasks share.

    logit = ⟨u, v⟩ / √d + b_u + b_i + b,   u = W_U x_U,  b_u = w_U · x_U,  v = W_I x_I,  b_i = w_I · x_I

(Koren, Bell and Volinsky, *Matrix Factorization Techniques for Recommender Systems*, Computer 2009, eq. 4, with linear
maps of many columns in place of one row for each user and item, as in Rendle's factorisation machines, ICDM 2010.)

x_U are the columns of the concatenated input, pooled embeddings and dense features, that are known once it is known who
asks and when: those of the groups user and context; x_I are those of the item alone.  Columns of user and item, or of
item and context together are of neither side and left out: the item's vector must be the same for all who ask.  The
head reads the input as the embeddings give it, before any gate or interaction, which would mix the sides; it has no
part in trunk or towers.  In a task restricted by `Task.inputs` it reads what the task may see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from mtcl_torchrec.modules.embeddings import InputBlock
from mtcl_torchrec.schema import ConfigError, Task


class DotProduct(NamedTuple):
    """What a dot head makes of B rows.

    Args:
        logit: (B,).
        user, item: (B, d + 1) vectors, and in the last column their biases.
    """

    logit: torch.Tensor
    user: torch.Tensor
    item: torch.Tensor


class DotHead(nn.Module):
    """A user vector times an item vector, plus biases that are linear in the same columns.

    Args:
        task: whose head it is.
        blocks: what the columns of the concatenated input are, with their groups.
        start: (1,) where b starts; None is at even odds.

    Raises:
        ConfigError: the columns' groups are not known, or a side has none.

    Example:
        >>> blocks = [InputBlock(4, "user", groups=("user",)), InputBlock(2, "item", groups=("item",))]
        >>> head = DotHead(Task.binary("liked", head={"kind": "dot", "dim": 8}), blocks)
        >>> out = head(torch.randn(5, 6))
        >>> out.logit.shape, out.item.shape
        (torch.Size([5]), torch.Size([5, 9]))
    """

    user_columns: torch.Tensor
    item_columns: torch.Tensor

    def __init__(self, task: Task, blocks: Sequence[InputBlock], start: torch.Tensor | None = None) -> None:
        super().__init__()
        users, items = side_columns(task, blocks)
        self.dim = task.head.dim
        self.register_buffer("user_columns", torch.tensor(users), persistent=False)
        self.register_buffer("item_columns", torch.tensor(items), persistent=False)
        self.user = nn.Linear(len(users), self.dim + 1, bias=False)
        self.item = nn.Linear(len(items), self.dim + 1, bias=False)
        # Even odds in what the task's loss sees; a chain's conditional logit has no shift.
        even = 0.0 if task.conditional_name is not None else -task.logit_shift
        self.bias = nn.Parameter(torch.full((1,), even) if start is None else start.clone())

    def forward(
        self, x: torch.Tensor, of_row: torch.Tensor | None = None, first: torch.Tensor | None = None
    ) -> DotProduct:
        """Logits and vectors, float32.

        Args:
            x: (B, D) the concatenated input.
            of_row, first: see `mtcl_torchrec.modules.towers.Alike`: a user's vector is computed once.
        """
        asking = x if first is None else x.index_select(0, first)
        user = self.user(asking.index_select(1, self.user_columns)).float()
        user = user if of_row is None else user.index_select(0, of_row)
        item = self.item(x.index_select(1, self.item_columns)).float()
        product = (user[:, : self.dim] * item[:, : self.dim]).sum(1) / math.sqrt(self.dim)
        return DotProduct(product + user[:, self.dim] + item[:, self.dim] + self.bias, user, item)


def side_columns(task: Task, blocks: Sequence[InputBlock]) -> tuple[list[int], list[int]]:
    """The columns of the concatenated input that make the user's vector, and those that make the item's.

    Raises:
        ConfigError: see `DotHead`.

    Example:
        >>> blocks = [InputBlock(2, "user", groups=("user",)), InputBlock(1, groups=("user", "item")),
        ...           InputBlock(1, "hour", groups=("context",)), InputBlock(1, "item", groups=("item",))]
        >>> side_columns(Task.binary("liked", head="dot"), blocks)
        ([0, 1, 3], [4])
    """
    sides: dict[str, list[int]] = {"user": [], "item": []}
    for start, block in zip(accumulate((block.width for block in blocks), initial=0), blocks, strict=False):
        if not block.groups:
            named = f"feature_groups must name the group of {block.feature!r}"
            raise ConfigError(
                f"task {task.name!r}: head dot tells columns of the user from those of the item: "
                + (named if block.feature else "dense_groups must name the groups of each dense column")
            )
        if block.task not in (None, task.name) or not set(block.groups) <= set(task.inputs):
            continue
        side = "user" if "item" not in block.groups else "item" if len(block.groups) == 1 else None
        if side is not None:
            sides[side] += range(start, start + block.width)
    for side, columns in sides.items():
        if not columns:
            raise ConfigError(f"task {task.name!r}: head dot sees no column of the {side}")
    return sides["user"], sides["item"]


def vector_names(task: Task) -> tuple[str, str]:
    """Keys of the user and item vectors (B, d + 1) among the logits of a tower, for a loss that reads them.

    Example:
        >>> vector_names(Task.binary("liked", head="dot"))
        ('liked: user vector', 'liked: item vector')
    """
    return f"{task.name}: user vector", f"{task.name}: item vector"
