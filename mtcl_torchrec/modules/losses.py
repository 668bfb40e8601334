"""The multi-task loss L = Σ wᵢ Lᵢ + λR, each Lᵢ averaged over the labels that are present on *all* ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mtcl_torchrec.modules.balance.cut import Cut
from mtcl_torchrec.modules.embeddings import Pooled
from mtcl_torchrec.modules.guard import LARGEST, Skipped, SkippedSteps, stop_gradient_if
from mtcl_torchrec.modules.heads import loss_per_row
from mtcl_torchrec.schema import Task

Logits = dict[str, torch.Tensor]


class MultiTaskLoss(nn.Module):
    """Σ wᵢ Lᵢ + λR of one batch.

    Lᵢ = Σ_b v_b ℓᵢ(b) / Σ_b v_b over the rows b of the *global* batch whose label is present, v_b being their sample
    weights.  R = mean of ‖pooled embeddings‖² over the global batch's rows that have a label.  (Decay of the dense
    weights is the dense optimizer's, as AdamW does it.)

    Each rank returns its share times the number of ranks, since DDP and TorchRec average gradients over ranks: the
    mean of the ranks' losses is L, and their averaged gradient is the gradient of L, also where one rank has few
    labels or none.

    A training batch in which a part of the loss is not finite (or beyond `LARGEST`) on any rank is skipped on all: the
    gradients of the logits and of the pooled embeddings are exactly zero then, and `found_inf` is 1.  The value that is
    returned stays what it is.

    Args:
        tasks: the tasks, in the order of the label columns.
        l2_embedding: λ.
        process_group: the ranks that share a global batch; None is the default group.

    Example:
        >>> loss = MultiTaskLoss([Task.binary("click")])
        >>> loss.skipped().steps, loss.found_inf
        (0, tensor(0.))
    """

    task_weights: torch.Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        l2_embedding: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.l2_embedding = l2_embedding
        self.process_group = process_group
        self.last_task_losses = torch.zeros(len(self.tasks))
        self.register_buffer("task_weights", torch.tensor([t.weight for t in self.tasks]), persistent=False)
        self.skipped_steps = SkippedSteps([*(t.name for t in self.tasks), "l2_embedding"])

    @property
    def found_inf(self) -> torch.Tensor:
        """() float32, always the same tensor: 1 while the newest training batch is one to be skipped, else 0.

        An optimizer of torch made with ``fused=True`` leaves a step out, its state included, without waiting for the
        device, once it is told: ``optimizer.found_inf = train.loss.found_inf`` (after the model is on its device).
        """
        return self.skipped_steps.found_inf

    def skipped(self) -> Skipped:
        """How many batches were skipped, and which was the last; the same on every rank.  It waits for the device."""
        return self.skipped_steps.read()

    def forward(
        self,
        logits: Logits,
        pooled: Pooled,
        batch: Any,
        skip: torch.Tensor | None = None,
        cut: Cut | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, Logits, torch.Tensor]]:
        """The loss and what metrics need.

        Args:
            logits: task name -> (B,) or (B, C).
            pooled: the embedding-bag collection's output, for R.
            batch: has labels (B, T), and may have weights (B, T) and mask (B, T).
            skip: () bool, set to whether the batch is to be skipped; for the guard inside the tower.
            cut: is told the tasks' losses, at which some kinds of gradient surgery look.

        Returns:
            ``(loss, (loss, logits, labels))``, the second part detached.

        Raises:
            ValueError: the labels do not have one column per task.
        """
        skip = torch.zeros((), dtype=torch.bool, device=batch.labels.device) if skip is None else skip
        labels = self._labels(batch)
        present = ~torch.isnan(labels)
        mask = getattr(batch, "mask", None)
        if mask is not None:
            present = present & mask.bool()
        sample_weights = getattr(batch, "weights", None)
        weights = present.float() if sample_weights is None else torch.where(present, sample_weights, 0.0)
        labelled = present.any(1).float()
        parts = []
        for i, task in enumerate(self.tasks):
            label = torch.where(present[:, i], labels[:, i], 0.0)
            rows = loss_per_row(task, stop_gradient_if(logits[task.name], skip), label)
            parts.append((weights[:, i] * rows).sum())
        if self.l2_embedding:
            parts.append((labelled * stop_gradient_if(_values(pooled), skip).float().square().sum(1)).sum())
        else:
            parts.append(labelled.new_zeros(()))
        sums = torch.stack(parts)
        totals, ranks = self._over_ranks(torch.cat([weights.sum(0), labelled.sum().reshape(1)]), sums.detach(), skip)
        averages = torch.where(totals <= 0, 0.0, ranks * sums / totals.clamp(min=1e-30))
        per_task = averages[:-1]
        loss = (self.task_weights * per_task).sum()
        if self.l2_embedding:
            loss = loss + self.l2_embedding * averages[-1]
        self.last_task_losses = per_task.detach()
        if cut is not None:
            cut.losses = self.last_task_losses
        detached = {name: value.detach() for name, value in logits.items()}
        return loss, (loss.detach(), detached, batch.labels.detach())

    def _labels(self, batch: Any) -> torch.Tensor:
        labels = batch.labels.float()
        if labels.dim() == 1:
            labels = labels.unsqueeze(1)
        if labels.shape[1] != len(self.tasks):
            raise ValueError(
                f"labels have {labels.shape[1]} columns, the model has {len(self.tasks)} tasks: "
                f"{[t.name for t in self.tasks]}"
            )
        return labels

    def _over_ranks(self, counts: torch.Tensor, sums: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Counts of labels over all ranks, and the number of ranks; sets `skip` on the way.

        Args:
            counts, sums: (T + 1,) of this rank.
            skip: () bool.
        """
        bad = ~(sums.abs() <= LARGEST)  # NaN too
        any_bad = bad.any().reshape(1)
        together = dist.is_available() and dist.is_initialized()
        rank = dist.get_rank() if together else 0
        ranks = dist.get_world_size(self.process_group) if together else 1
        # One collective for the counts and for who found what.
        everything = torch.cat([counts, bad, any_bad, any_bad * rank])
        if ranks > 1:
            dist.all_reduce(everything, group=self.process_group)
        counts, found = everything[: len(counts)], everything[len(counts) :]
        if self.training:
            skip.copy_(self.skipped_steps.record(found))
        return counts, ranks


def _values(pooled: Pooled) -> torch.Tensor:
    if isinstance(pooled, tuple):
        pooled = pooled[0]
    # A pipeline hands over a promise of a KeyedTensor, which is neither a KeyedTensor nor a tensor.
    return pooled if isinstance(pooled, torch.Tensor) else pooled.values()
