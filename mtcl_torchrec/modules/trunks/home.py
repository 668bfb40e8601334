"""A hierarchy of experts: of all tasks, of groups of tasks, of one task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtcl_torchrec.modules.experts import Norm
from mtcl_torchrec.modules.trunks.contract import TrunkInputs
from mtcl_torchrec.modules.trunks.graph import ExpertGraph, ExpertLevel, LevelMask
from mtcl_torchrec.schema import check_groups, nearest


class HoME(ExpertGraph):
    """Hierarchy of multi-gate experts (Wang et al., *HoME*, 2024), in the graph of experts that all trunks here share.

    Related tasks form groups.  In the first (meta) level there are experts of each group and shared ones: a group's
    gate mixes its experts and the shared ones, and a shared gate mixes all.  In the second level, task t of group c
    mixes shared experts, which read the shared stream, and experts of its group and of its own, which read the group's
    stream; its gate reads the group's stream.  Every gate adds a self-gate: a softmax (a sigmoid where there is one)
    over its own experts alone, so that they are trained however little the gate thinks of them.  Every expert has a
    feature gate of low rank on its input, see `BatchedExperts`, and ends in normalisation and Swish.

    This follows the paper's structure, not its every detail: experts are normalised by row (LayerNorm) after each
    layer and not by batch, since statistics of a batch would differ between ranks; a feature gate is one LoRA, not a
    mixture of several; gates are linear; and groups, which the paper makes by hand, default to the tasks' kinds.

    Args:
        expert_layers: widths of an expert.
        groups: tasks by name or by number, each in one group; the default groups them by kind (binary, multiclass,
            regression), or puts all into one group where the trunk is built without knowing the tasks.
        shared_experts, group_experts, task_experts: how many there are of each in a level.
        feature_rank: of the feature gates; 0 is none.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.
        gate_dropout: while training, the share of experts a gate leaves out; self-gates are not touched.

    Example:
        >>> trunk = HoME([8], groups=[[0, 2], [1]])
        >>> trunk.build(in_features=4, num_tasks=3)
        >>> trunk(torch.randn(5, 4), tasks=[0, 1, 2]).shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self,
        expert_layers: Sequence[int],
        *,
        groups: Sequence[Sequence[int | str]] | None = None,
        shared_experts: int = 1,
        group_experts: int = 1,
        task_experts: int = 1,
        feature_rank: int = 8,
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            expert_layers, norm=norm, dropout=dropout, gate_dropout=gate_dropout, residual="gate",
            feature_rank=feature_rank,
        )  # fmt: skip
        if min(shared_experts, group_experts, task_experts) < 1:
            raise ValueError(f"HoME needs one of each at least: {shared_experts=}, {group_experts=}, {task_experts=}")
        self.groups = None if groups is None else [list(group) for group in groups]
        self.shared_experts, self.group_experts, self.task_experts = shared_experts, group_experts, task_experts

    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """See the class.

        Raises:
            ValueError: the groups are no partition of the tasks.
        """
        groups = self._numbered(num_tasks, inputs)
        number = len(groups)
        group_of = torch.tensor([next(c for c, group in enumerate(groups) if t in group) for t in range(num_tasks)])
        # First level: gate and stream c are group c's, number C is shared.
        owner = torch.tensor([c for c in range(number) for _ in range(self.group_experts)]
                             + [number] * self.shared_experts)  # fmt: skip
        gates = torch.arange(number + 1).unsqueeze(1)
        meta = LevelMask((owner == gates) | (owner == number) | (gates == number), native=owner == gates)
        # Second level: the tasks' own experts, then those of the first level again.
        own = torch.arange(num_tasks).repeat_interleave(self.task_experts)
        none = torch.full_like(own, -1)
        native = torch.cat([own, torch.full_like(owner, -1)]) == torch.arange(num_tasks).unsqueeze(1)
        of_group = torch.cat([none, owner])
        sees = native | (of_group == group_of.unsqueeze(1)) | (of_group == number)
        reads = torch.cat([group_of[own], owner]).tolist()
        return [meta, LevelMask(sees, native=native, expert_reads=reads, gate_reads=group_of.tolist())]

    def build(self, in_features: int, num_tasks: int, inputs: TrunkInputs | None = None) -> None:
        """See `Trunk.build`."""
        super().build(in_features, num_tasks, inputs)
        names = [task.name for task in inputs.tasks] if inputs else [str(n) for n in range(num_tasks)]
        groups = ["+".join(names[n] for n in group) for group in self._numbered(num_tasks, inputs)]
        first = self.levels[0]
        assert isinstance(first, ExpertLevel)
        first.gate_names = [*groups, "shared"]

    def _numbered(self, num_tasks: int, inputs: TrunkInputs | None) -> list[list[int]]:
        """The groups as task numbers."""
        if self.groups is None:
            if inputs is None:
                return [list(range(num_tasks))]
            kinds = list(dict.fromkeys(task.kind for task in inputs.tasks))
            return [[n for n, task in enumerate(inputs.tasks) if task.kind == kind] for kind in kinds]
        names = [task.name for task in inputs.tasks] if inputs else [str(n) for n in range(num_tasks)]
        numbered = []
        for group in self.groups:
            for task in group:
                known = task in names if isinstance(task, str) else 0 <= task < num_tasks
                if not known:
                    raise ValueError(f"groups: no task {task!r}{nearest(str(task), names)}")
            numbered.append([names.index(task) if isinstance(task, str) else task for task in group])
        check_groups([[names[n] for n in group] for group in numbered], names)
        return numbered
