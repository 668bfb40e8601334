"""The multi-task loss L = Σ wᵢ Lᵢ + Σ λₖ Rₖ, each Lᵢ averaged over the labels that are present on *all* ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mtcl_torchrec.modules.chains import ChainLoss
from mtcl_torchrec.modules.embeddings import Pooled
from mtcl_torchrec.modules.freezing import FrozenTasks
from mtcl_torchrec.modules.guard import LARGEST, Skipped, SkippedSteps, stop_gradient_if
from mtcl_torchrec.modules.heads import loss_per_row
from mtcl_torchrec.modules.rare import NegativeSampling, PairwiseLoss
from mtcl_torchrec.modules.regularisers import REGULARISERS, Regularisers
from mtcl_torchrec.schema import Task

Logits = dict[str, torch.Tensor]


class MultiTaskLoss(nn.Module):
    """Σ wᵢ Lᵢ + Σ λₖ Rₖ of one batch.

    Lᵢ = Σ_b v_b ℓᵢ(b) / Σ_b v_b over the rows b of the *global* batch whose label is present, v_b being their sample
    weights; a row that `negative_rate` leaves out is none of them.  A task's pairwise term is part of its Lᵢ: its
    weight times the average over the pairs of all ranks.  Rₖ: see `mtcl_torchrec.modules.regularisers`.

    In a chain of events (`mtcl_torchrec.modules.chains`) a label that is missing where the parent's is 0 counts as 0,
    and Lᵢ of a child is the sum of its parts, each divided by its own count over the global batch.

    Each rank returns its share times the number of ranks, since DDP and TorchRec average gradients over ranks: the
    mean of the ranks' losses is L, and their averaged gradient is the gradient of L, also where one rank has few
    labels or none.

    A training batch in which a part of the loss is not finite (or beyond `LARGEST`) on any rank is skipped on all: the
    gradients of the logits and of the pooled embeddings are exactly zero then, and `found_inf` is 1.  The value that is
    returned stays what it is.

    Args:
        tasks: the tasks, in the order of the label columns.
        regularisers: penalties; None is none.
        seed: of the draws of `Task.negative_rate`.
        process_group: the ranks that share a global batch; None is the default group.

    Example:
        >>> loss = MultiTaskLoss([Task.binary("click")])
        >>> loss.skipped().steps, loss.found_inf, loss.frozen()
        (0, tensor(0.), ())
    """

    task_weights: torch.Tensor

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        regularisers: Regularisers | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.process_group = process_group
        self.negative_sampling = NegativeSampling(tasks, seed=seed)
        self.pairwise = PairwiseLoss(tasks)
        self.regularisers = regularisers if regularisers is not None else Regularisers()
        self.frozen_tasks = FrozenTasks([t.name for t in tasks])
        self.last_task_losses = torch.zeros(len(self.tasks))
        self.register_buffer("task_weights", torch.tensor([t.weight for t in self.tasks]), persistent=False)
        self.chains = ChainLoss(self.tasks)
        self.skipped_steps = SkippedSteps([*(t.name for t in self.tasks), *self.chains.names, *REGULARISERS])

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

    def freeze(self, *tasks: str) -> None:
        """Tasks that no longer move what tasks share; call it on every rank.  See `FrozenTasks`.

        Raises:
            ValueError: an unknown task.
        """
        self.frozen_tasks.freeze(*tasks)

    def unfreeze(self, *tasks: str) -> None:
        """Frozen tasks that take part again; call it on every rank."""
        self.frozen_tasks.unfreeze(*tasks)

    def frozen(self) -> tuple[str, ...]:
        """The tasks that are frozen.  It waits for the device."""
        return self.frozen_tasks.names()

    def forward(
        self, logits: Logits, pooled: Pooled, batch: Any, skip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, Logits, torch.Tensor]]:
        """The loss and what metrics need.

        Args:
            logits: of the tower: task name -> (B,) or (B, C), and what `Chains` adds.
            pooled: the embedding-bag collection's output, for its penalty.
            batch: has labels (B, T), and may have weights (B, T) and mask (B, T); where a task has a pairwise term,
                requests (B,) too.
            skip: () bool, set to whether the batch is to be skipped; for the guard inside the tower.

        Returns:
            ``(loss, (loss, logits, labels))``, the second part detached; the labels with the zeros that chains imply.

        Raises:
            ValueError: the labels do not have one column per task; a task compares rows of a request, and the batch
                names none; a regulariser of experts, and none were mixed.
        """
        skip = torch.zeros((), dtype=torch.bool, device=batch.labels.device) if skip is None else skip
        mask = getattr(batch, "mask", None)
        labels = self.chains.labels(self._labels(batch), mask)
        present = ~torch.isnan(labels)
        if mask is not None:
            present = present & mask.bool()
        sample_weights = getattr(batch, "weights", None)
        weights = present.float() if sample_weights is None else torch.where(present, sample_weights, 0.0)
        labelled, known = present.any(1).float(), torch.where(present, labels, 0.0)
        safe = {name: stop_gradient_if(value, skip) for name, value in logits.items()}
        conditional, of_conditional = self.chains.conditional(safe, known, weights)
        rank, ranks = self._place()
        weights = self.negative_sampling(known, weights, self.skipped_steps.batches, rank, ranks)
        rows = [
            self.chains.rows(task, loss_per_row(task, safe[task.name], known[:, i]), safe)
            for i, task in enumerate(self.tasks)
        ]
        sums = (weights * torch.stack(rows, 1)).sum(0)
        pair_sums, pair_weights = self.pairwise(safe, known, weights, batch)
        penalised = self.regularisers.sums(pooled, labelled, skip)
        bad = torch.cat([
            self._bad_tasks(sums, pair_sums), _of_no_use(conditional), _bad_regularisers(penalised, skip)
        ])  # fmt: skip
        counts = torch.cat([weights.sum(0), of_conditional, pair_weights, labelled.sum().reshape(1)])
        of_rows = torch.cat([s.flatten() for s in penalised.values()]) if penalised else counts.new_zeros(0)
        totals, all_rows = self._over_ranks(counts, of_rows.detach(), bad, skip)
        averages = _average(ranks * torch.cat([sums, conditional, pair_sums]), totals[:-1])
        first, second, pairs = averages.split([len(sums), len(conditional), len(pair_sums)])
        per_task = self.chains.per_task(first, second)
        if len(pairs):
            per_task = per_task + self.pairwise.per_task(pairs, per_task)
        loss = (self.task_weights * per_task).sum()
        if penalised:
            # The sum over all ranks, with this rank's part of its gradient (which is averaged over ranks).
            of_all = _average(all_rows + ranks * (of_rows - of_rows.detach()), totals[-1])
            parts = of_all.split([len(s) for s in penalised.values()])
            loss = loss + self.regularisers.penalty(dict(zip(penalised, parts, strict=True)))
        self.last_task_losses = per_task.detach()
        detached = {name: value.detach() for name, value in logits.items()}
        return loss, (loss.detach(), detached, (labels if self.chains.links else batch.labels).detach())

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

    def _place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(self.process_group), dist.get_world_size(self.process_group)

    def _bad_tasks(self, sums: torch.Tensor, pair_sums: torch.Tensor) -> torch.Tensor:
        """(T,) bool: the task's loss is of no use."""
        bad = list(_of_no_use(sums).unbind())
        for place, i in enumerate(self.pairwise.weights):
            bad[i] = bad[i] | _of_no_use(pair_sums[place])
        return torch.stack(bad)

    def _over_ranks(
        self, counts: torch.Tensor, sums: torch.Tensor, bad: torch.Tensor, skip: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts and sums over all ranks; sets `skip` on the way.

        Args:
            counts, sums: of this rank.
            bad: bool, for each part of the loss that `SkippedSteps` names: this rank's is of no use.
            skip: () bool.
        """
        _, ranks = self._place()
        rank = dist.get_rank() if ranks > 1 else 0
        any_bad = bad.any().reshape(1)
        # One collective for the counts and for who found what.
        everything = torch.cat([counts, sums, bad, any_bad, any_bad * rank])
        if ranks > 1:
            dist.all_reduce(everything, group=self.process_group)
        counts, sums, found = everything.split([len(counts), len(sums), len(bad) + 2])
        if self.training:
            skip.copy_(self.skipped_steps.record(found))
        return counts, sums


def _average(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """0 where nothing was counted."""
    return torch.where(counts <= 0, 0.0, sums / counts.clamp(min=1e-30))


def _of_no_use(sums: torch.Tensor) -> torch.Tensor:
    return ~(sums.detach().abs() <= LARGEST)  # NaN too


def _bad_regularisers(sums: Mapping[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """(regularisers,) bool: it is of no use."""
    none = torch.zeros((), dtype=torch.bool, device=like.device)
    return torch.stack([_of_no_use(sums[name]).any() if name in sums else none for name in REGULARISERS])
