"""Trunks whose tasks mix shared experts and experts of their own: SharedBottom, SingleTask, MMoE, PLE, AdaTT."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtcl_torchrec.modules.experts import Norm
from mtcl_torchrec.modules.trunks.contract import TrunkInputs
from mtcl_torchrec.modules.trunks.graph import ExpertGraph, LevelMask


class SharedBottom(ExpertGraph):
    """One network that all tasks share (Caruana, *Multitask Learning*, 1997).

    Args:
        expert_layers: widths of the shared network.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.

    Example:
        >>> trunk = SharedBottom([16, 8])
        >>> trunk.build(in_features=4, num_tasks=3)
        >>> trunk(torch.randn(5, 4), tasks=[0, 2]).shape
        torch.Size([5, 2, 8])
    """

    def __init__(self, expert_layers: Sequence[int], *, norm: Norm = "layer", dropout: float = 0.0) -> None:
        super().__init__(expert_layers, norm=norm, dropout=dropout)

    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """Every task sees the one expert."""
        return [LevelMask(torch.ones(num_tasks, 1, dtype=torch.bool))]


class SingleTask(ExpertGraph):
    """A network for each task and nothing shared but the embeddings: what multi-task learning is compared with.

    Args:
        expert_layers: widths of each task's network.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.

    Example:
        >>> trunk = SingleTask([16, 8])
        >>> trunk.build(in_features=4, num_tasks=3)
        >>> trunk(torch.randn(5, 4), tasks=[1]).shape
        torch.Size([5, 1, 8])
    """

    def __init__(self, expert_layers: Sequence[int], *, norm: Norm = "layer", dropout: float = 0.0) -> None:
        super().__init__(expert_layers, norm=norm, dropout=dropout)

    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """Each task sees its own expert."""
        return [LevelMask(torch.eye(num_tasks, dtype=torch.bool))]


class MMoE(ExpertGraph):
    """Multi-gate mixture of experts: each task mixes the same experts with a gate of its own (Ma et al., KDD 2018,
    eq. 5–7).

    Args:
        num_experts: E.
        expert_layers: widths of an expert.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.
        gate_dropout: while training, the share of experts a gate leaves out, so that none is leaned on alone.

    Example:
        >>> trunk = MMoE(num_experts=4, expert_layers=[16, 8])
        >>> trunk.build(in_features=4, num_tasks=3)
        >>> trunk(torch.randn(5, 4), tasks=[0, 1, 2]).shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self,
        num_experts: int,
        expert_layers: Sequence[int],
        *,
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
    ) -> None:
        super().__init__(expert_layers, norm=norm, dropout=dropout, gate_dropout=gate_dropout)
        self.num_experts = num_experts

    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """Every task sees every expert."""
        return [LevelMask(torch.ones(num_tasks, self.num_experts, dtype=torch.bool))]


class PLE(ExpertGraph):
    """Progressive layered extraction: shared experts and experts of each task's own, in levels (Tang et al., RecSys
    2020).

    In each level, task t mixes its own experts and the shared ones (eq. 1–4); between levels a shared gate mixes all
    experts into the stream that the next level's shared experts read (eq. 6).  One level is CGC.

    Args:
        shared_experts: shared experts in each level.
        task_experts: experts of each task's own in each level.
        expert_layers: widths of an expert.
        levels: extraction levels.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.
        gate_dropout: while training, the share of experts a gate leaves out.

    Example:
        >>> trunk = PLE(shared_experts=2, task_experts=1, expert_layers=[8], levels=2)
        >>> trunk.build(in_features=4, num_tasks=3)
        >>> trunk(torch.randn(5, 4), tasks=[0, 1, 2]).shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self,
        shared_experts: int,
        task_experts: int,
        expert_layers: Sequence[int],
        *,
        levels: int = 2,
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
    ) -> None:
        super().__init__(expert_layers, norm=norm, dropout=dropout, gate_dropout=gate_dropout)
        if min(shared_experts, task_experts, levels) < 1:
            raise ValueError(f"PLE needs one of each at least: {shared_experts=}, {task_experts=}, {levels=}")
        self.shared_experts, self.task_experts, self.num_levels = shared_experts, task_experts, levels

    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """See the class."""
        owner, gates = owners(num_tasks, self.task_experts, self.shared_experts)
        sees = (owner == gates) | (owner == num_tasks) | (gates == num_tasks)
        return stacked(LevelMask(sees), owner, num_tasks, self.num_levels)


class AdaTT(ExpertGraph):
    """Adaptive task-to-task fusion: each task's gate mixes the experts of all tasks, and a linear combination of its
    own experts is added (Li et al., KDD 2023).

    In each level, F_t = softmax(x_t W_t) · [all experts] + v_t · [experts of t], x_t being what task t brings from the
    level before.  v_t is learnt, or 1 where each task has one expert.  Shared experts, if any, have a unit of their own
    that mixes in the same way, in all levels but the last; without them it is the paper's AdaTT-sp.

    Args:
        expert_layers: widths of an expert.
        task_experts: experts of each task's own in each level.
        shared_experts: shared experts in each level; may be 0.
        levels: fusion levels.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.
        gate_dropout: while training, the share of experts a gate leaves out; the residual is not touched.

    Example:
        >>> trunk = AdaTT([8], task_experts=2, levels=2)
        >>> trunk.build(in_features=4, num_tasks=3)
        >>> trunk(torch.randn(5, 4), tasks=[0, 1, 2]).shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self,
        expert_layers: Sequence[int],
        *,
        task_experts: int = 1,
        shared_experts: int = 0,
        levels: int = 2,
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
    ) -> None:
        super().__init__(expert_layers, norm=norm, dropout=dropout, gate_dropout=gate_dropout, residual="linear")
        if min(task_experts, levels) < 1 or shared_experts < 0:
            raise ValueError(f"AdaTT needs a task expert and a level: {task_experts=}, {shared_experts=}, {levels=}")
        self.task_experts, self.shared_experts, self.num_levels = task_experts, shared_experts, levels

    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """See the class."""
        owner, gates = owners(num_tasks, self.task_experts, self.shared_experts)
        native = owner == gates
        return stacked(LevelMask(torch.ones_like(native), native=native), owner, num_tasks, self.num_levels)


def owners(num_tasks: int, task_experts: int, shared_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whose each expert is, (E,), and the gates, (G, 1): t for task t, T for all of them.

    Without shared experts there is no gate T.

    Example:
        >>> owners(2, task_experts=2, shared_experts=1)[0]
        tensor([0, 0, 1, 1, 2])
    """
    owner = [t for t in range(num_tasks) for _ in range(task_experts)] + [num_tasks] * shared_experts
    return torch.tensor(owner), torch.arange(num_tasks + (shared_experts > 0)).unsqueeze(1)


def stacked(mask: LevelMask, owner: torch.Tensor, num_tasks: int, levels: int) -> list[LevelMask]:
    """Levels of one mask: gate g is stream g of the next level, and an expert reads its owner's stream there.

    The last level has gates for tasks only.
    """
    found = []
    for level in range(levels):
        num_gates = num_tasks if level == levels - 1 else len(mask.sees)
        cut = [None if m is None else m[:num_gates] for m in (mask.sees, mask.learns, mask.native)]
        reads = (None, None) if level == 0 else (owner.tolist(), range(num_gates))
        assert cut[0] is not None
        found.append(LevelMask(cut[0], cut[1], cut[2], *reads))
    return found
