"""Losses for tasks whose positives are rare: fewer or lighter negatives, the focal loss, pairs within a request.

What the loss makes of the odds it undoes itself: a model's logits are always those of all rows, and the loss adds
`Task.logit_shift` to them, log w for positives that weigh w and -log r for negatives that train with probability r.
So predictions, the fused score, an exported model and products of probabilities need no correction of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.data.counter_random import stream
from mtcl_torchrec.schema import Task

_AT_ONCE = 2**21  # comparisons held in memory together


def binary_loss(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of each row of a binary task.

    With z = logit + log w - log r it is ``w y softplus(-z) + (1 - y) softplus(z)``.  Where a share r of the negatives
    is left, its minimum is at the log-odds of the probability among all rows.

    With γ > 0 each part is multiplied by the probability of the other outcome to the power γ: the focal loss (Lin et
    al., ICCV 2017, eq. 4; with w, eq. 5).  Its minimum lies nearer to ½ than the probability.

    Args:
        task: with `negative_rate`, `pos_weight` and `focal_gamma`.
        logits: (B,) float32.
        labels: (B,), 0 or 1.

    Returns:
        (B,) float32.

    Example:
        >>> binary_loss(Task.binary("like", negative_rate=0.25), torch.zeros(1), torch.zeros(1))  # log 5: p' = 4/5
        tensor([1.6094])
    """
    shifted = logits + task.logit_shift if task.logit_shift else logits
    if not task.focal_gamma:
        loss = F.binary_cross_entropy_with_logits(shifted, labels, reduction="none")
        return loss if task.pos_weight == 1 else loss * _weight_of(task, labels)
    towards = torch.where(labels > 0.5, shifted, -shifted)  # the log-odds of what happened
    # A power of a probability that underflows would have an infinite slope for γ < 1.
    return -F.logsigmoid(towards) * torch.exp(task.focal_gamma * F.logsigmoid(-towards)) * _weight_of(task, labels)


def _weight_of(task: Task, labels: torch.Tensor) -> torch.Tensor:
    return torch.where(labels > 0.5, task.pos_weight, 1.0)


class UncalibratedWarning(UserWarning):
    """Some predictions are no probabilities."""


def warn_of_uncalibrated(tasks: Sequence[Task]) -> None:
    """Warn of tasks whose predictions are no probabilities."""
    for line in uncalibrated_lines(tasks):
        warnings.warn(line, UncalibratedWarning, stacklevel=3)


def uncalibrated_lines(tasks: Sequence[Task]) -> list[str]:
    """A line about each task whose predictions are no probabilities.

    Example:
        >>> uncalibrated_lines([Task.binary("click"), Task.binary("like", focal_gamma=2.0)])
        ["task 'like': its focal loss pulls predictions towards 0.5; they rank, but are no probabilities"]
    """
    return [
        f"task {task.name!r}: its focal loss pulls predictions towards 0.5; they rank, but are no probabilities"
        for task in tasks
        if not task.calibrated
    ]


class NegativeSampling(nn.Module):
    """Leaves negatives out of the loss of tasks with `Task.negative_rate`, each row for itself.

    Whether a row stays is a hash of the seed, the task, the number of the training batch and the row's place in the
    global batch (row i of rank k is number i · ranks + k, as `mtcl_torchrec.data.batch.global_batches` cuts it).  So a
    resumed run draws what the uninterrupted one does, and two ranks what one does.

    Args:
        tasks: the tasks, in the order of the label columns.
        seed: of the draws.

    Example:
        >>> sampling = NegativeSampling([Task.binary("like", negative_rate=0.25)])
        >>> weights = sampling(torch.zeros(1000, 1), torch.ones(1000, 1), torch.tensor(7))
        >>> 200 < weights.sum() < 300
        tensor(True)
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0) -> None:
        super().__init__()
        self.rates = {i: task.negative_rate for i, task in enumerate(tasks) if task.negative_rate < 1}
        self._streams = {i: stream(seed, "negatives", tasks[i].name) for i in self.rates}

    def forward(
        self, labels: torch.Tensor, weights: torch.Tensor, batch: torch.Tensor, rank: int = 0, ranks: int = 1
    ) -> torch.Tensor:
        """The rows' weights (B, T), 0 where a negative is left out.

        In evaluation mode no row is left out and negatives weigh r: the same loss on average.

        Args:
            labels: (B, T).
            weights: (B, T) float32.
            batch: () int64, number of the training batch.
            rank, ranks: this rank's part of the global batch.
        """
        if not self.rates:
            return weights
        places = torch.arange(len(labels), device=labels.device) * ranks + rank
        columns = list(weights.unbind(1))
        for i, rate in self.rates.items():
            negative = labels[:, i] < 0.5
            if self.training:
                kept = uniform_bits(self._streams[i], (batch << 32) + places) < int(rate * 2**53)
                columns[i] = torch.where(negative & ~kept, 0.0, columns[i])
            else:
                columns[i] = torch.where(negative, rate * columns[i], columns[i])
        return torch.stack(columns, 1)


def uniform_bits(source: Any, counter: torch.Tensor) -> torch.Tensor:
    """53 random bits for each counter, on its device: those of `mtcl_torchrec.data.counter_random.uniform`.

    Args:
        source: a `mtcl_torchrec.data.counter_random.Stream`.
        counter: any shape, int64.

    Returns:
        int64 in [0, 2⁵³), of the same shape.
    """
    x = counter * _signed(source.multiplier) + _signed(source.offset)
    x = x ^ _shifted(x, 30)
    x = x * _signed(0xBF58476D1CE4E5B9)
    x = x ^ _shifted(x, 27)
    x = x * _signed(0x94D049BB133111EB)
    return _shifted(x ^ _shifted(x, 31), 11)


def _signed(bits: Any) -> int:
    """64 bits as the integer that torch takes them for."""
    return (int(bits) + 2**63) % 2**64 - 2**63


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """64 bits moved to the right; torch's own shift would fill up with the sign."""
    return (x >> by) & (2 ** (64 - by) - 1)


class PairwiseLoss(nn.Module):
    """Logistic loss over pairs of one request: ``softplus(z⁻ - z⁺)`` for a positive and a negative row.

    (RankNet, Burges et al., ICML 2005; BPR, Rendle et al., UAI 2009.)

    A pair weighs the product of its rows' weights: a row that is masked, has no label or was left out has none.  With
    the plain loss of rows beside it, the predictions stay probabilities: among rows of log-odds a and b, the first is
    the positive one of a pair in σ(a - b) of all cases, so the true log-odds minimise both.

    Only rows that meet in a batch of one rank are compared.  Training shuffles rows, so this helps where a batch holds
    several rows of a request; a B of the N rows holds about (B/N)² of all pairs.

    The rows are sorted by request, and each is compared with the g - 1 rows before and after it, g being
    `MTBatch.largest_request`: about 2 B g comparisons, of which no more than 2²¹ are in memory together.  A batch on
    an accelerator that does not say g costs 2 B² of them.

    Args:
        tasks: the tasks, in the order of the label columns.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.names = [task.name for task in tasks]
        self.weights = {i: task.pairwise for i, task in enumerate(tasks) if task.pairwise > 0}

    def forward(
        self, logits: dict[str, torch.Tensor], labels: torch.Tensor, weights: torch.Tensor, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the pairs of this rank's batch.

        Args:
            logits: task name -> (B,).
            labels, weights: (B, T), no NaN; the weight of a row that does not count is 0.
            batch: has `requests` (B,) int64, and may have `largest_request`.

        Returns:
            For each of the P tasks with pairs, the sum of weighted losses and the sum of weights, (P,) each.

        Raises:
            ValueError: the batch names no requests.
        """
        if not self.weights:
            return weights.new_zeros(0), weights.new_zeros(0)
        pairs = RequestPairs(batch, f"task {self.names[next(iter(self.weights))]!r}")
        found = [pairs(logits[self.names[i]], labels[:, i], weights[:, i]) for i in self.weights]
        sums, counts = zip(*found, strict=True)
        return torch.stack(sums), torch.stack(counts)

    def per_task(self, averages: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What the pairs add to each task's loss, as `like` (T,), from their averages (P,)."""
        added = [like.new_zeros(())] * len(like)
        for place, (i, weight) in enumerate(self.weights.items()):
            added[i] = weight * averages[place]
        return torch.stack(added)


class RequestPairs:
    """The pairs of rows of one request in a batch.

    Args:
        batch: has `requests` (B,) int64, and may have `largest_request`.
        what: needs them, for the message.

    Raises:
        ValueError: the batch names no requests.
    """

    def __init__(self, batch: Any, what: str) -> None:
        requests = getattr(batch, "requests", None)
        if requests is None:
            raise ValueError(f"{what}: pairwise compares rows of one request, and the batch has no requests")
        largest = getattr(batch, "largest_request", None)
        self.largest = len(requests) if largest is None else min(largest, len(requests))
        self.order = torch.argsort(requests, stable=True)
        self.requests = requests[self.order]

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ over pairs of |yₖ - yₗ| vₖ vₗ softplus(z⁻ - z⁺), z⁺ being the logit of the row with the higher label; and
        Σ |yₖ - yₗ| vₖ vₗ.

        Args:
            logits, labels, weights: (B,); a row of weight 0 is in no pair.
        """
        weight = torch.where(self.requests >= 0, weights[self.order], 0.0)
        return _PairSums.apply(logits.float()[self.order], labels[self.order], weight, self.requests, self.largest)


class _PairSums(torch.autograd.Function):
    """The sums of `RequestPairs`, of rows sorted by request.

    The gradient is computed along with the sum, so that the comparisons need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, label: torch.Tensor, weight: torch.Tensor, request: torch.Tensor, largest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reach, size = max(largest - 1, 0), len(z)
        sides = (F.pad(z, (reach, reach)), F.pad(label, (reach, reach)), F.pad(weight, (reach, reach)))
        around = [side.unfold(0, 2 * reach + 1, 1) for side in sides]  # (B, 2 reach + 1), no copy
        same = F.pad(request, (reach, reach), value=-1).unfold(0, 2 * reach + 1, 1)
        total, count, grads = z.new_zeros(()), z.new_zeros(()), []
        rows = max(_AT_ONCE // (2 * reach + 1), 1)
        for start in range(0, size, rows):
            at = slice(start, start + rows)
            apart = label[at, None] - around[1][at]
            sign = apart.sign()  # 1: this row is the positive one, -1: the other, 0: no pair
            pair = torch.where(request[at, None] == same[at], apart.abs() * weight[at, None] * around[2][at], 0.0)
            behind = sign * (around[0][at] - z[at, None])
            total = total + torch.where(pair > 0, pair * F.softplus(behind), 0.0).sum()
            count = count + pair.sum()
            grads.append(torch.where(pair > 0, -sign * pair * torch.sigmoid(behind), 0.0).sum(1))
        ctx.save_for_backward(torch.cat(grads) if grads else z)
        return total / 2, count / 2  # every pair was met from both sides

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None, None, None
