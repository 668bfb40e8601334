"""What a dot head's vectors learn beside the task's own loss: which item among those of the batch, and how short to be.

**Sampled softmax.**  For a row b of the *global* batch whose label is 1, with user u and item i:

    ℓ_b = -s(u, i) + log(exp s(u, i) + Z_b),   s(u, j) = ⟨u, v_j⟩ / (√d · temperature)

Z_b stands for Σ exp s(u, j) over all other items j.  It is estimated from the batch's other rows, which bring item j as
often as the training rows are about it, with probability q_j; rows about i itself are left out, so that n_b rows are
left, which are drawn with probability q_j / (1 - q_i):

    Z_b = (1 - q_i) / n_b · Σ_{rows r ≠ i} exp(s(u, j_r)) / q_{j_r}

With log n_b - log(1 - q_i) + log q_j taken off its logit, each negative counts as often as it would in the full
softmax; the minimum is at s(u, i) = log p(i | u, label 1) + c(u), whatever q is.  (Bengio and Senécal, *Adaptive
Importance Sampling*, TNN 2008; in batches: Yi et al., *Sampling-Bias-Corrected Neural Modeling*, RecSys 2019, who take
log q off the positive's logit, too.  The positive is not drawn from q, it is always there: with rows about it left out,
taking log q off it would push popular items down.)  Without the correction, Z_b is the sum of exp s over the n_b rows,
divided by the number of rows about i, and the minimum is at the log of the lift, p(i | u, label 1) / q_i: taste without
popularity.

The biases are not part of s: the item's bias in the logit says how much an item is liked by those who meet it, and the
softmax would bend it to how often it is met.

**q** is the share of an item in the rows of all global batches so far, the newest one included, in a buffer.  Training
meets every row once in an epoch, in random order, so this settles on the share in the training split, which it is at
the end of every epoch; in the first batch, every item of the batch counts once.  It needs no pass over the data, works
for streams, is the same on any number of ranks, and a resumed run goes on with it exactly.  (Yi et al. estimate the
steps between two occurrences with a moving average, which follows a drift and never settles.)

**L2.**  λ(‖u‖² + ‖v‖² + b_u² + b_i²), averaged over the rows with a label: what matrix factorisation regularises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.modules.dot_product import vector_names
from mtcl_torchrec.modules.gathering import RankGather
from mtcl_torchrec.schema import ConfigError, Task, nearest

_AT_ONCE = 2**22  # logits held in memory together


class DotLosses(nn.Module):
    """The further losses of tasks with a dot head; without such a head, nothing.

    Args:
        tasks: the tasks, in the order of the label columns.
        rows: sparse feature -> rows of its table, for features by which a sampled softmax tells items apart.
        process_group: the ranks that share a global batch; None is the default group.

    Attributes:
        weights: (task number, weight) of each term.

    Raises:
        ConfigError: a sampled softmax names no feature, or one that is not there.

    Example:
        >>> task = Task.binary("liked", head={"kind": "dot", "l2": 0.1, "sampled_softmax": {"item": "item_id"}})
        >>> DotLosses([task], {"item_id": 100}).weights
        ((0, 0.1), (0, 1.0))
    """

    def __init__(self, tasks: Sequence[Task], rows: Mapping[str, int] | None = None, process_group: Any = None) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self._short = [i for i, task in enumerate(tasks) if task.head.l2]
        self._softmax = [i for i, task in enumerate(tasks) if task.head.sampled_softmax]
        of_softmax = [(i, t.head.sampled_softmax.weight) for i, t in enumerate(tasks) if t.head.sampled_softmax]
        self.weights = (*((i, tasks[i].head.l2) for i in self._short), *of_softmax)
        self.gather = RankGather(process_group)
        self._items = {i: _item_feature(tasks[i], rows or {}) for i in self._softmax}
        # A list, not a dict by name: a feature may be called what an attribute of ModuleDict is called.
        self._features = list(dict.fromkeys(self._items.values()))
        self.popularity = nn.ModuleList(Popularity((rows or {})[feature]) for feature in self._features)

    def forward(
        self, logits: Mapping[str, torch.Tensor], labels: torch.Tensor, weights: torch.Tensor, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's sum of each term, and what divides it once both are summed over the ranks, (P,) each.

        While training, the items of the batch are counted.

        Args:
            logits: of the tower, the vectors among them.
            labels, weights: (B, T), 0 where there is no label.
            batch: has `sparse_features`.
        """
        sums, counts = [weights.new_zeros(0)], [weights.new_zeros(0)]
        for i in self._short:
            user, item = (logits[name] for name in vector_names(self.tasks[i]))
            sums.append((weights[:, i] * (user.square().sum(1) + item.square().sum(1))).sum().reshape(1))
            counts.append(weights[:, i].sum().reshape(1))
        if self._softmax:
            pools = self._pools(batch.sparse_features, len(labels))
            for i in self._softmax:
                total, count = self._softmax_sums(i, logits, labels[:, i] * weights[:, i], *pools[self._items[i]])
                sums.append(total.reshape(1))
                counts.append(count.reshape(1))
        return torch.cat(sums), torch.cat(counts)

    def per_task(self, averages: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What the terms add to each task's loss, as `like` (T,), from their averages (P,)."""
        added = [like.new_zeros(())] * len(like)
        for (i, weight), average in zip(self.weights, averages.unbind(), strict=True):
            added[i] = added[i] + weight * average
        return torch.stack(added)

    def _pools(self, sparse_features: Any, rows: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of each feature the items of all ranks' rows (N,), and how often each was met so far (N,)."""
        self.gather.agree(rows)
        pools = {}
        for feature, popularity in zip(self._features, self.popularity, strict=True):
            items = self.gather(first_values(sparse_features, feature))
            pools[feature] = items, popularity(items)
        return pools

    def _softmax_sums(
        self, i: int, logits: Mapping[str, torch.Tensor], weights: torch.Tensor, items: torch.Tensor, met: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        task, softmax = self.tasks[i], self.tasks[i].head.sampled_softmax
        assert softmax is not None
        user, item = (logits[name][:, : task.head.dim] for name in vector_names(task))
        user = user / (math.sqrt(task.head.dim) * softmax.temperature)
        all_met = met if softmax.correction == "logq" else None
        popularity = self.popularity[self._features.index(self._items[i])]
        return _SoftmaxSums.apply(user, self.gather(item), weights, items, self.gather.first, all_met, popularity.total)


def first_values(sparse_features: KeyedJaggedTensor, feature: str) -> torch.Tensor:
    """The first value of a feature in each row (B,), -1 where it has none; nobody waits for the device.

    Example:
        >>> ids = KeyedJaggedTensor(["u", "i"], torch.tensor([5, 6, 7]), lengths=torch.tensor([1, 1, 0, 1]))
        >>> first_values(ids, "i")
        tensor([-1,  7])
    """
    rows, at = sparse_features.stride(), sparse_features.keys().index(feature)
    of_feature = slice(at * rows, (at + 1) * rows)
    values = sparse_features.values()
    padded = torch.cat([values, values.new_full((1,), -1)])
    return torch.where(sparse_features.lengths()[of_feature] > 0, padded[sparse_features.offsets()[of_feature]], -1)


def _item_feature(task: Task, rows: Mapping[str, int]) -> str:
    softmax = task.head.sampled_softmax
    assert softmax is not None
    what = f"task {task.name!r}: head.sampled_softmax"
    if softmax.item is None:
        raise ConfigError(f"{what} compares items: name the sparse feature that tells them apart (item)")
    if softmax.item not in rows:
        raise ConfigError(f"{what}.item: no sparse feature {softmax.item!r}{nearest(softmax.item, rows)}")
    return softmax.item


class Popularity(nn.Module):
    """How often each item was met in the training batches so far; its buffers travel in the checkpoint.

    Args:
        rows: how many items are told apart; ids beyond it share a count (id modulo rows).

    Example:
        >>> popularity = Popularity(10)
        >>> popularity(torch.tensor([3, 3, 5, -1])), popularity(torch.tensor([3, 7]))
        (tensor([2., 2., 1., 0.]), tensor([3., 1.]))
        >>> popularity.total
        tensor(5)
    """

    counts: torch.Tensor
    total: torch.Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """(N,) float32: of how many rows each was; in training, after these rows were counted.

        Args:
            items: (N,) int64; a negative one is none.
        """
        known, place = items >= 0, items.remainder(len(self.counts))
        if self.training:
            self.counts.index_add_(0, place, known.to(torch.int64))
            self.total += known.sum()
        return torch.where(known, self.counts[place], 0).float()

    @torch.no_grad()
    def take_back(self, items: torch.Tensor, when: torch.Tensor) -> None:
        """As if the items (N,), counted before, had not been, where `when`, () bool, is True; nobody waits for it."""
        known = (items >= 0) & when
        self.counts.index_add_(0, items.remainder(len(self.counts)), -known.to(torch.int64))
        self.total -= known.sum()


class _SoftmaxSums(torch.autograd.Function):
    """Σ w_b ℓ_b and Σ w_b over this rank's rows, of those that have an item and a negative.

    The gradient is computed along with the sum, block by block, so that no more logits than `_AT_ONCE` are kept.
    """

    @staticmethod
    def forward(ctx: Any, user: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(user.device.type, enabled=False):
            loss, count, *gradients = _softmax_sums(user, *others)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_user, of_item = ctx.saved_tensors
        return grads[0] * of_user, grads[0] * of_item, None, None, None, None, None


def _softmax_sums(
    user: torch.Tensor,
    item: torch.Tensor,
    weight: torch.Tensor,
    items: torch.Tensor,
    first: int,
    met: torch.Tensor | None,
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of `_SoftmaxSums`, and the loss's gradient of `user` and `item`.

    Args:
        user: (B, d) scaled vectors of this rank's rows.
        item: (N, d) vectors of all ranks' rows, in which this rank's begin at `first`.
        weight: (B,) w.
        items: (N,) int64, -1 where there is none.
        met: (N,) how often each item was met, None for no correction.
        total: () how many rows were.
    """
    user, item = user.float(), item.float()
    loss, count = user.new_zeros(()), user.new_zeros(())
    of_user, of_item = [], torch.zeros_like(item)
    at_once = max(_AT_ONCE // max(len(item), 1), 1)
    for start in range(0, len(user), at_once):
        own = slice(start, start + at_once)
        u, w = user[own], weight[own]
        at = slice(first + start, first + start + len(u))
        other = (items[at, None] != items) & (items >= 0)
        n = other.sum(1)
        w = torch.where((items[at] >= 0) & (n > 0), w, 0.0)
        if met is None:
            shift = -((items >= 0).sum() - n).clamp(min=1).log()[:, None]
        else:
            rest = (total - met[at]).clamp(min=1)
            shift = (rest / n.clamp(min=1)).log()[:, None] - met.clamp(min=1).log()
        negative = torch.where(other, u @ item.T + shift, float("-inf"))
        z, positive = torch.logsumexp(negative, 1), (u * item[at]).sum(1)
        behind = z - positive
        slope = torch.where(w > 0, w * torch.sigmoid(behind), 0.0)
        loss = loss + torch.where(w > 0, w * F.softplus(behind), 0.0).sum()
        count = count + w.sum()
        share = slope[:, None] * torch.where(other, (negative - z[:, None]).exp(), 0.0)
        of_user.append(share @ item - slope[:, None] * item[at])
        of_item += share.T @ u
        of_item[at] -= slope[:, None] * u
    return loss, count, torch.cat(of_user) if of_user else user, of_item
