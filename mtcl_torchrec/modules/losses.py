"""The multi-task loss L = Σ wᵢ Lᵢ + λR, each Lᵢ averaged over the labels that are present on *all* ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

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

    Args:
        tasks: the tasks, in the order of the label columns.
        l2_embedding: λ.
        process_group: the ranks that share a global batch; None is the default group.
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

    def forward(
        self, logits: Logits, pooled: Any, batch: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, Logits, torch.Tensor]]:
        """The loss and what metrics need.

        Args:
            logits: task name -> (B,) or (B, C).
            pooled: the embedding-bag collection's output, for R.
            batch: has labels (B, T), and may have weights (B, T) and mask (B, T).

        Returns:
            ``(loss, (loss, logits, labels))``, the second part detached.

        Raises:
            ValueError: the labels do not have one column per task.
        """
        labels = batch.labels.float()
        if labels.dim() == 1:
            labels = labels.unsqueeze(1)
        if labels.shape[1] != len(self.tasks):
            raise ValueError(
                f"labels have {labels.shape[1]} columns, the model has {len(self.tasks)} tasks: "
                f"{[t.name for t in self.tasks]}"
            )
        present = ~torch.isnan(labels)
        mask = getattr(batch, "mask", None)
        if mask is not None:
            present = present & mask.bool()
        sample_weights = getattr(batch, "weights", None)
        weights = present.float() if sample_weights is None else torch.where(present, sample_weights, 0.0)
        sums = torch.stack(
            [
                (
                    weights[:, i] * loss_per_row(task, logits[task.name], torch.where(present[:, i], labels[:, i], 0.0))
                ).sum()
                for i, task in enumerate(self.tasks)
            ]
        )
        labelled = present.any(1).float()
        totals, ranks = self._over_ranks(torch.cat([weights.sum(0), labelled.sum().reshape(1)]))
        per_task = torch.where(totals[:-1] > 0, ranks * sums / totals[:-1].clamp(min=1e-30), 0.0)
        loss = (self.task_weights * per_task).sum()
        if self.l2_embedding:
            loss = loss + self.l2_embedding * ranks * (labelled * _squared_norms(pooled)).sum() / totals[-1].clamp(
                min=1
            )
        self.last_task_losses = per_task.detach()
        detached = {name: value.detach() for name, value in logits.items()}
        return loss, (loss.detach(), detached, batch.labels.detach())

    def _over_ranks(self, counts: torch.Tensor) -> tuple[torch.Tensor, int]:
        if not (dist.is_available() and dist.is_initialized()):
            return counts, 1
        ranks = dist.get_world_size(self.process_group)
        if ranks > 1:
            counts = counts.clone()
            dist.all_reduce(counts, group=self.process_group)
        return counts, ranks


def _squared_norms(pooled: Any) -> torch.Tensor:
    if isinstance(pooled, tuple):
        pooled = pooled[0]
    # A pipeline hands over a promise of a KeyedTensor, which is neither a KeyedTensor nor a tensor.
    values = pooled if isinstance(pooled, torch.Tensor) else pooled.values()
    return values.float().square().sum(1)
