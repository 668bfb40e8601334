"""The multi-task loss L = Σ wᵢ Lᵢ + Σ λₖ Rₖ, each Lᵢ averaged over the labels that are present on *all* ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mtcl_torchrec.modules.balance.cut import Cut
from mtcl_torchrec.modules.balance.weighting import LossWeighting
from mtcl_torchrec.modules.chains import ChainLoss
from mtcl_torchrec.modules.embeddings import Pooled
from mtcl_torchrec.modules.freezing import FrozenTasks
from mtcl_torchrec.modules.fusion.joint import FusedLoss
from mtcl_torchrec.modules.guard import LARGEST, Skipped, SkippedSteps, stop_gradient_if
from mtcl_torchrec.modules.heads import loss_per_row
from mtcl_torchrec.modules.rare import NegativeSampling, PairwiseLoss
from mtcl_torchrec.modules.regularisers import Regularisers
from mtcl_torchrec.modules.sampled_softmax import DotLosses
from mtcl_torchrec.schema import Task, check_weights

Logits = dict[str, torch.Tensor]


class MultiTaskLoss(nn.Module):
    """Σ wᵢ Lᵢ + Σ λₖ Rₖ of one batch.

    Lᵢ = Σ_b v_b ℓᵢ(b) / Σ_b v_b over the rows b of the *global* batch whose label is present, v_b being their sample
    weights; a row that `negative_rate` leaves out is none of them.  A task's pairwise term is part of its Lᵢ: its
    weight times the average over the pairs of all ranks; and so are the L2 and sampled softmax of a dot head
    (`mtcl_torchrec.modules.sampled_softmax`).  Rₖ: see `mtcl_torchrec.modules.regularisers`.

    In a chain of events (`mtcl_torchrec.modules.chains`) a label that is missing where the parent's is 0 counts as 0,
    and Lᵢ of a child is the sum of its parts, each divided by its own count over the global batch.

    Each rank returns its share times the number of ranks, since DDP and TorchRec average gradients over ranks: the
    mean of the ranks' losses is L, and their averaged gradient is the gradient of L, also where one rank has few
    labels or none.

    A training batch in which a part of the loss is not finite (or beyond `LARGEST`) on any rank is skipped on all: the
    gradients of the logits and of the pooled embeddings are exactly zero then, and `found_inf` is 1.  The value that is
    returned stays what it is.

    With a `weighting`, the model is trained by Σ aᵢ wᵢ Lᵢ + λR instead, aᵢ being the weighting's own weights of this
    batch, and what is returned is its S + λR, the same on every rank.  Each rank sends its sums along with the counts,
    in the one all-reduce there is.

    Args:
        tasks: the tasks, in the order of the label columns.
        weighting: how weights follow the losses, see `mtcl_torchrec.modules.balance.weighting`; None is the weighted
            sum.
        regularisers: penalties; None is none.
        fused_loss: of the fused score; None is none.  It is added beside the tasks, as penalties are: no weighting
            touches it.
        seed: of the draws of `Task.negative_rate`.
        item_rows: sparse feature -> rows of its table, for the sampled softmax of a dot head.
        process_group: the ranks that share a global batch; None is the default group.

    Raises:
        ValueError: every task has weight 0, or the weighting is made for another number of tasks.

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
        weighting: LossWeighting | None = None,
        regularisers: Regularisers | None = None,
        fused_loss: FusedLoss | None = None,
        seed: int = 0,
        item_rows: Mapping[str, int] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        check_weights(self.tasks)
        if weighting is not None and weighting.num_tasks != len(self.tasks):
            raise ValueError(f"the loss weighting is made for {weighting.num_tasks} tasks, not for {len(self.tasks)}")
        self.weighting = weighting
        self.process_group = process_group
        self.negative_sampling = NegativeSampling(tasks, seed=seed)
        self.pairwise = PairwiseLoss(tasks)
        self.dot_losses = DotLosses(tasks, item_rows, process_group)
        self.regularisers = regularisers if regularisers is not None else Regularisers()
        self.frozen_tasks = FrozenTasks([t.name for t in tasks])
        self.fused_loss = fused_loss
        self.last_task_losses = torch.zeros(len(self.tasks))
        self.last_fused_loss: torch.Tensor | None = None
        self.register_buffer("task_weights", torch.tensor([t.weight for t in self.tasks]), persistent=False)
        self.chains = ChainLoss(self.tasks)
        score = [] if fused_loss is None else ["the score"]
        watched = self.regularisers.watched
        self.skipped_steps = SkippedSteps([*(t.name for t in self.tasks), *self.chains.names, *watched, *score])

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
        self,
        logits: Logits,
        pooled: Pooled,
        batch: Any,
        skip: torch.Tensor | None = None,
        cut: Cut | None = None,
        score: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, Logits, torch.Tensor]]:
        """The loss and what metrics need.

        Args:
            logits: of the tower: task name -> (B,) or (B, C), and what `Chains` adds.
            pooled: the embedding-bag collection's output, for its penalty.
            batch: has labels (B, T), and may have weights (B, T) and mask (B, T); where a task has a pairwise term,
                requests (B,) too.
            skip: () bool, set to whether the batch is to be skipped; for the guard inside the tower.
            cut: is told the tasks' losses, at which some kinds of gradient surgery look, and which tasks take part.
            score: (B,) the fused score, where there is a `fused_loss`.

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
        sums, counts, bad = self._parts(safe, known, weights, batch)
        penalised = self.regularisers.sums(pooled, labelled, skip, getattr(batch, "sparse_features", None))
        of_score, scored = self._score_sums(score, labels, present, batch, skip)
        beside = torch.cat([sums.new_zeros(0), *(s.flatten() for s in penalised.values()), of_score])
        totals, of_all, any_bad = self._over_ranks(
            torch.cat([counts, scored, labelled.sum().reshape(1)]),
            beside.detach() if self.weighting is None else torch.cat([beside, sums]).detach(),
            torch.cat([bad, _bad_regularisers(penalised, self.regularisers.watched, skip), _of_no_use(of_score)]),
            skip,
        )
        if self.regularisers.row_penalty is not None:
            self.regularisers.row_penalty.take_back(skip)
        _, ranks = self._place()
        counts, scored = totals[: len(counts)], totals[len(counts) : -1]
        per_task = self._per_task(_average(ranks * sums, counts))
        if self.weighting is None:
            loss = (self.task_weights * per_task).sum()
        else:
            of_task = self._per_task(_average(of_all[len(beside) :], counts))
            loss = self._weighted(per_task, of_task, totals[: len(self.tasks)] > 0, any_bad)
        # The sum over all ranks, with this rank's part of its gradient (which is averaged over ranks).
        everywhere = of_all[: len(beside)] + ranks * (beside - beside.detach())
        if penalised:
            sizes = [len(s) for s in penalised.values()]
            parts = _average(everywhere[: sum(sizes)], totals[-1]).split(sizes)
            loss = loss + self.regularisers.penalty(dict(zip(penalised, parts, strict=True)))
        if self.fused_loss is not None:
            of_fused = _average(everywhere[-1], scored[0])
            loss, self.last_fused_loss = loss + self.fused_loss.weight * of_fused, of_fused.detach()
        self.last_task_losses = per_task.detach()
        if cut is not None:
            cut.losses = self.last_task_losses
            cut.taking_part = (totals[: len(self.tasks)] > 0) & ~self.frozen_tasks.frozen
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

    def _score_sums(
        self, score: torch.Tensor | None, labels: torch.Tensor, present: torch.Tensor, batch: Any, skip: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's sum of the fused score's loss, and what divides it: (1,) each, (0,) without such a loss."""
        if self.fused_loss is None:
            return labels.new_zeros(0), labels.new_zeros(0)
        if score is None:
            raise ValueError("the fused score has a loss, which was given no score")
        total, count = self.fused_loss(stop_gradient_if(score, skip), labels, present, batch)
        return total.reshape(1), count.reshape(1)

    def _place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(self.process_group), dist.get_world_size(self.process_group)

    def _parts(
        self, logits: Logits, labels: torch.Tensor, weights: torch.Tensor, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The parts of the tasks' losses on this rank: the tasks themselves, the second parts of chains, pairs, what
        dot heads add.

        Args:
            logits: by name.
            labels, weights: (B, T), 0 where there is no label.

        Returns:
            Sums, and what divides them once both are summed over the ranks, (P,) each; and bool, for each of the tasks
            and second parts, whether it is of no use.
        """
        conditional, of_conditional = self.chains.conditional(logits, labels, weights)
        weights = self.negative_sampling(labels, weights, self.skipped_steps.batches, *self._place())
        rows = [
            self.chains.rows(task, loss_per_row(task, logits[task.name], labels[:, i]), logits)
            for i, task in enumerate(self.tasks)
        ]
        sums = (weights * torch.stack(rows, 1)).sum(0)
        pair_sums, pair_weights = self.pairwise(logits, labels, weights, batch)
        dot_sums, dot_weights = self.dot_losses(logits, labels, weights, batch)
        bad = list(_of_no_use(sums).unbind())
        of_task = [*self.pairwise.weights, *(i for i, _ in self.dot_losses.weights)]
        for i, more in zip(of_task, torch.cat([pair_sums, dot_sums]).unbind(), strict=True):
            bad[i] = bad[i] | _of_no_use(more)
        return (
            torch.cat([sums, conditional, pair_sums, dot_sums]),
            torch.cat([weights.sum(0), of_conditional, pair_weights, dot_weights]),
            torch.cat([torch.stack(bad), _of_no_use(conditional)]),
        )

    def _per_task(self, averages: torch.Tensor) -> torch.Tensor:
        """(T,) losses of the tasks from the averages of all parts (P,)."""
        sizes = [len(self.tasks), len(self.chains.names), len(self.pairwise.weights), len(self.dot_losses.weights)]
        rows, conditional, pairs, dots = averages.split(sizes)
        per_task = self.chains.per_task(rows, conditional)
        if self.pairwise.weights:
            per_task = per_task + self.pairwise.per_task(pairs, per_task)
        return per_task + self.dot_losses.per_task(dots, per_task) if self.dot_losses.weights else per_task

    def _weighted(
        self, per_task: torch.Tensor, of_all: torch.Tensor, present: torch.Tensor, bad: torch.Tensor
    ) -> torch.Tensor:
        """The weighting's S in value and for its own parameters; Σ aᵢ wᵢ Lᵢ for the gradient of the model.

        Args:
            per_task: (T,) this rank's share of the tasks' losses, times the number of ranks.
            of_all: (T,) the losses of the global batch, the same on every rank.
            present: (T,) bool: which tasks have a label in it.
            bad: () bool: the batch is skipped, or would be in training.
        """
        assert self.weighting is not None
        values = self.task_weights * of_all
        combined, weights = self.weighting(values, present & (self.task_weights > 0) & ~bad)
        combined = torch.where(bad, values.sum(), combined)  # the value stays what it is, without a gradient
        return combined + (weights * self.task_weights * (per_task - per_task.detach())).sum()

    def _over_ranks(
        self, counts: torch.Tensor, sums: torch.Tensor, bad: torch.Tensor, skip: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts and sums over all ranks, and () bool, whether any rank has a part of no use; sets `skip` on the way.

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
        return counts, sums, found[-2] > 0


def _average(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """0 where nothing was counted."""
    return torch.where(counts <= 0, 0.0, sums / counts.clamp(min=1e-30))


def _of_no_use(sums: torch.Tensor) -> torch.Tensor:
    return ~(sums.detach().abs() <= LARGEST)  # NaN too


def _bad_regularisers(sums: Mapping[str, torch.Tensor], names: Sequence[str], like: torch.Tensor) -> torch.Tensor:
    """(names,) bool: the regulariser is of no use."""
    none = torch.zeros((), dtype=torch.bool, device=like.device)
    return torch.stack([_of_no_use(sums[name]).any() if name in sums else none for name in names])
