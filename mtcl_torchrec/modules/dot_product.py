"""Matrix factorisation as a task's head: the user's vector times the item's, over the embeddings all tasks share.

    logit = ⟨u, v⟩ / √d + b_u + b_i + b,   u = W_U x_U,  b_u = w_U · x_U,  v = W_I x_I,  b_i = w_I · x_I

(Koren, Bell and Volinsky, *Matrix Factorization Techniques for Recommender Systems*, Computer 2009, eq. 4, with linear
maps of many columns in place of one row for each user and item, as in Rendle's factorisation machines, ICDM 2010.)

x_U are the columns of the concatenated input, pooled embeddings and dense features, that are known once it is known who
asks and when: those of the groups user and context; x_I are those of the item alone.  Columns of user and item, or of
item and context together are of neither side and left out: the item's vector must be the same for all who ask.  The
head reads the input as the embeddings give it, before any gate or interaction, which would mix the sides; it has no
part in trunk or towers.  In a task restricted by `Task.inputs` it reads what the task may see.

A ``tower_dot`` head adds the logit of the task's tower.  The product says at once what a network learns slowly (Rendle
et al., *Neural Collaborative Filtering vs. Matrix Factorization Revisited*, RecSys 2020), the tower what is no product:
so DeepFM (Guo et al., IJCAI 2017) adds a factorisation machine and a network over the same embeddings.

With `Head.factors`, u = d^¼ Σ p + W_U x_U and v = d^¼ Σ q + W_I x_I, where p and q are the embeddings of the features
that it names, and the maps read the other columns (the biases read all).  Of a user's and an item's id, p and q are the
factors of matrix factorisation, and their part of the logit is ⟨p, q⟩.  Their L2 is ``l2_embedding``
(`mtcl_torchrec.modules.regularisers`): of embeddings that go through a map, it would only make the map larger.
With `Head.bilinear`, u = d^¼ W Σ p + W_U x_U with a (d, d) matrix W of the task, and the part of the factors is qᵀ W p:
one matrix for each kind of event over vectors that all of them share, as in RESCAL (Nickel, Tresp and Kriegel, *A
Three-Way Model for Collective Learning on Multi-Relational Data*, ICML 2011).  W starts near the identity, at random:
from equal matrices, the tasks would part slowly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.embeddings import InputBlock
from mtcl_torchrec.schema import ConfigError, Task, nearest


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
        ConfigError: the columns' groups are not known, or a side has none; one of `Head.factors` is of no side, or of
            another width than the head.

    Example:
        >>> blocks = [InputBlock(4, "user", groups=("user",)), InputBlock(2, "item", groups=("item",))]
        >>> head = DotHead(Task.binary("liked", head={"kind": "dot", "dim": 8}), blocks)
        >>> out = head(torch.randn(5, 6))
        >>> out.logit.shape, out.item.shape
        (torch.Size([5]), torch.Size([5, 9]))
    """

    user_columns: torch.Tensor
    item_columns: torch.Tensor
    user_factors: torch.Tensor
    item_factors: torch.Tensor
    user_mapped: torch.Tensor
    item_mapped: torch.Tensor

    def __init__(self, task: Task, blocks: Sequence[InputBlock], start: torch.Tensor | None = None) -> None:
        super().__init__()
        users, items = side_columns(task, blocks)
        self.dim = task.head.dim
        self.register_buffer("user_columns", torch.tensor(users), persistent=False)
        self.register_buffer("item_columns", torch.tensor(items), persistent=False)
        factors = factor_columns(task, blocks, users, items)
        self.register_buffer("user_factors", torch.tensor(factors[0], dtype=torch.int64), persistent=False)
        self.register_buffer("item_factors", torch.tensor(factors[1], dtype=torch.int64), persistent=False)
        self.bilinear: nn.Parameter | None = None
        if task.head.bilinear:
            self.bilinear = nn.Parameter(torch.eye(self.dim) + 0.2 * torch.randn(self.dim, self.dim))
        self.user = nn.Linear(len(users), self.dim + 1, bias=False)
        self.item = nn.Linear(len(items), self.dim + 1, bias=False)
        for side, columns, of in (("user", users, factors[0]), ("item", items, factors[1])):
            mapped = torch.ones(self.dim + 1, len(columns))
            mapped[: self.dim, [columns.index(column) for column in of]] = 0.0
            self.register_buffer(f"{side}_mapped", mapped, persistent=False)
            with torch.no_grad():
                getattr(self, side).weight.mul_(mapped)
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
        user = self._vector(self.user, asking, self.user_columns, self.user_factors, self.user_mapped, self.bilinear)
        user = user if of_row is None else user.index_select(0, of_row)
        item = self._vector(self.item, x, self.item_columns, self.item_factors, self.item_mapped)
        product = (user[:, : self.dim] * item[:, : self.dim]).sum(1) / math.sqrt(self.dim)
        return DotProduct(product + user[:, self.dim] + item[:, self.dim] + self.bias, user, item)

    def _vector(
        self,
        linear: nn.Linear,
        x: torch.Tensor,
        columns: torch.Tensor,
        factors: torch.Tensor,
        mapped: torch.Tensor,
        bilinear: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, d + 1) of a side."""
        seen = x.index_select(1, columns)
        if not len(factors):
            return linear(seen).float()
        own = x.index_select(1, factors).float().unflatten(1, (len(factors) // self.dim, self.dim)).sum(1)
        own = own if bilinear is None else F.linear(own, bilinear)
        return F.linear(seen, linear.weight * mapped).float() + F.pad(self.dim**0.25 * own, (0, 1))


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
                f"task {task.name!r}: head {task.head.kind} tells columns of the user from those of the item: "
                + (named if block.feature else "dense_groups must name the groups of each dense column")
            )
        if block.task not in (None, task.name) or not set(block.groups) <= set(task.inputs):
            continue
        side = "user" if "item" not in block.groups else "item" if len(block.groups) == 1 else None
        if side is not None:
            sides[side] += range(start, start + block.width)
    for side, columns in sides.items():
        if not columns:
            raise ConfigError(f"task {task.name!r}: head {task.head.kind} sees no column of the {side}")
    return sides["user"], sides["item"]


def factor_columns(
    task: Task, blocks: Sequence[InputBlock], users: Sequence[int], items: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Of the columns of each side, those of the features in `Head.factors`, one feature after the other.

    Raises:
        ConfigError: see `DotHead`.

    Example:
        >>> blocks = [InputBlock(2, "user", groups=("user",)), InputBlock(2, "item", groups=("item",))]
        >>> task = Task.binary("liked", head={"kind": "dot", "dim": 2, "factors": ["item"]})
        >>> factor_columns(task, blocks, [0, 1], [2, 3])
        ([], [2, 3])
    """
    found: tuple[list[int], list[int]] = ([], [])
    starts = list(accumulate((block.width for block in blocks), initial=0))
    for name in task.head.factors:
        of = [(start, b.width) for start, b in zip(starts, blocks, strict=False) if b.feature == name]
        sides = [(side, start, width) for start, width in of
                 for side, columns in enumerate((users, items)) if start in columns]  # fmt: skip
        if not sides:
            known = [
                b.feature for start, b in zip(starts, blocks, strict=False) if b.feature and start in (*users, *items)
            ]
            raise ConfigError(
                f"task {task.name!r}: head.factors: {name!r} is no feature that its user's or item's vector reads"
                f"{nearest(name, known)}"
            )
        for side, start, width in sides:
            if width != task.head.dim:
                raise ConfigError(
                    f"task {task.name!r}: head.factors: {name!r} has embeddings of width {width}, and the head dim "
                    f"{task.head.dim}"
                )
            found[side].extend(range(start, start + width))
    return found


def vector_names(task: Task) -> tuple[str, str]:
    """Keys of the user and item vectors (B, d + 1) among the logits of a tower, for a loss that reads them.

    Example:
        >>> vector_names(Task.binary("liked", head="dot"))
        ('liked: user vector', 'liked: item vector')
    """
    return f"{task.name}: user vector", f"{task.name}: item vector"
