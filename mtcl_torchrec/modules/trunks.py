"""The shared part of a multi-task model: which task sees which expert.

All trunks are one masked graph of experts.  A level has experts, each reading one stream, and gates, each mixing the
experts that it sees; SharedBottom, SingleTask and MMoE are one level with different masks, PLE is several.

A trunk of your own is any `nn.Module` with

- ``forward(x, tasks)``: x (B, D), tasks a sequence of n task numbers → (B, n, H), the representation of each,
- ``out_features``: H,
- optionally ``build(in_features, num_tasks)``, called once before training, for what depends on those two numbers,
- optionally ``shared(x, tasks)`` and ``split(shared, tasks)``, which do in two steps what ``forward`` does in one, see
  `Trunk`: gradients of several tasks can then be balanced where the tasks part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mtcl_torchrec.modules.experts import BatchedExperts, Norm
from mtcl_torchrec.modules.gates import gate_logits, mixtures


class Shared(NamedTuple):
    """What n tasks share just before they part: every path from a task's loss to what is shared leads through it.

    Args:
        common: tensors of any shape that several tasks read.  `Trunk.split` also takes them with a leading dimension n,
            a copy for each task.
        own: tensors (n, ...), the slice of each read by one task alone.
    """

    common: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...] = ()


class Mix(NamedTuple):
    """How a level mixed its newest training batch, still part of the graph.

    Args:
        gates, experts: which gates and which experts, g and e of them.
        weights: (g, B, e).
        outputs: of the experts, (e, B, H), or (g, e, B, H): a copy for each gate.
    """

    gates: list[int]
    experts: list[int]
    weights: torch.Tensor
    outputs: torch.Tensor


class ExpertLevel(nn.Module):
    """Experts and the gates that mix them.

    Attributes:
        mixes: what the level did since `forget_mixes` was called, for penalties and for a look at the use of experts;
            kept only in training, one for each call of `split`.

    Args:
        in_features: D.
        expert_layers: widths of an expert, the last one H.
        sees: (G, E) bool: gate g mixes expert e.  A gate that sees one expert passes it on and has no weights.
        expert_reads: stream that each expert reads, (E,); None where all read the same.
        gate_reads: stream that each gate reads, (G,); None where all read the same.
        gate_dropout: while training, the share of experts that a gate leaves out, drawn for each row; never all.

    Example:
        >>> level = ExpertLevel(8, [4], sees=torch.ones(2, 3, dtype=torch.bool))
        >>> level(torch.randn(5, 8)).shape
        torch.Size([2, 5, 4])
    """

    hidden: torch.Tensor

    def __init__(
        self,
        in_features: int,
        expert_layers: Sequence[int],
        sees: torch.Tensor,
        *,
        expert_reads: Sequence[int] | None = None,
        gate_reads: Sequence[int] | None = None,
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_gates, num_experts = sees.shape
        if not bool(sees.any(1).all()):
            raise ValueError("every gate must see an expert")
        self.experts = BatchedExperts(
            in_features, expert_layers, num_experts, reads=expert_reads, norm=norm, dropout=dropout
        )
        self.gate_dropout = gate_dropout
        self.mixes: list[Mix] = []
        self.gate_reads = None if gate_reads is None else list(gate_reads)
        self._seen = [torch.nonzero(row).flatten().tolist() for row in sees]
        self.gate_weight: nn.Parameter | None = None
        if bool((sees.sum(1) > 1).any()):
            bound = in_features**-0.5
            self.gate_weight = nn.Parameter(torch.empty(num_gates, num_experts, in_features).uniform_(-bound, bound))
        self.register_buffer("hidden", ~sees, persistent=False)

    def forward(self, x: torch.Tensor, gates: Sequence[int] | None = None) -> torch.Tensor:
        """Mixtures (G, B, H) of all gates, or of those in `gates`.

        Args:
            x: (B, D), or (S, B, D) where experts read different streams.
        """
        return self.split(self.shared(x, gates), gates)

    def shared(self, x: torch.Tensor, gates: Sequence[int] | None = None) -> Shared:
        """What the gates read: the outputs of the experts that they see (E, B, H), and their input."""
        outputs = self.experts(x, self._used(gates))
        if self.gate_weight is None:
            return Shared((outputs,))
        if self.gate_reads is None:
            return Shared((outputs, x))
        return Shared((outputs,), (x[[self.gate_reads[g] for g in self._wanted(gates)]],))

    def split(self, shared: Shared, gates: Sequence[int] | None = None) -> torch.Tensor:
        """Mixtures (G, B, H) from what `shared` returned for the same gates."""
        outputs, wanted, used = shared.common[0], self._wanted(gates), self._used(gates)
        copied = outputs.dim() == 4  # (G, E, B, H): a copy of all outputs for each gate
        if self.gate_weight is None:
            at = [used.index(self._seen[g][0]) for g in wanted]
            if copied:
                return outputs[range(len(at)), at]
            return outputs if at == list(range(len(outputs))) else outputs[at]
        weights = self.gate_weights(shared.own[0] if shared.own else shared.common[1], wanted, used)
        if self.training:
            self.mixes.append(Mix(wanted, used, weights, outputs))
        return mixtures(weights, outputs)

    def forget_mixes(self) -> None:
        """Let go of what `mixes` holds."""
        self.mixes.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mixes": []}  # tensors of a graph cannot be copied

    def _wanted(self, gates: Sequence[int] | None) -> list[int]:
        return list(range(len(self._seen)) if gates is None else gates)

    def _used(self, gates: Sequence[int] | None) -> list[int]:
        """The experts that the gates see."""
        return sorted({expert for g in self._wanted(gates) for expert in self._seen[g]})

    def gate_weights(self, x: torch.Tensor, gates: list[int], experts: list[int]) -> torch.Tensor:
        """Softmax weights (len(gates), B, len(experts)) of the gates over the experts.

        Args:
            x: (B, D) that all gates read, or (len(gates), B, D).
        """
        assert self.gate_weight is not None
        weight = _rows_and_columns(self.gate_weight, gates, experts)
        if x.dim() == 2:
            logits = torch.matmul(x, weight.flatten(0, 1).T).view(len(x), len(gates), len(experts)).transpose(0, 1)
        else:
            logits = gate_logits(x, weight)
        hidden = _rows_and_columns(self.hidden, gates, experts).unsqueeze(1)
        if self.training and self.gate_dropout > 0:
            draw = torch.rand_like(logits, dtype=torch.float32).masked_fill(hidden, -1.0)
            luckiest = draw == draw.amax(-1, keepdim=True)  # stays where all would go
            hidden = hidden | ((draw < self.gate_dropout) & ~luckiest)
        return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)


def _rows_and_columns(matrix: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """The chosen rows and columns; all of them in order cost no copy."""
    if rows != list(range(matrix.shape[0])):
        matrix = matrix[rows]
    return matrix if columns == list(range(matrix.shape[1])) else matrix[:, columns]


class Trunk(nn.Module):
    """Base of the trunks here: built when the model knows its input width and number of tasks."""

    out_features: int

    @abstractmethod
    def build(self, in_features: int, num_tasks: int) -> None:
        """Create the parameters.

        Args:
            in_features: D, width of the trunk's input.
            num_tasks: T.
        """

    @abstractmethod
    def shared(self, x: torch.Tensor, tasks: Sequence[int]) -> Shared:
        """What the n tasks share before they part, from the input x (B, D)."""

    @abstractmethod
    def split(self, shared: Shared, tasks: Sequence[int]) -> torch.Tensor:
        """Representations (B, n, H) of the tasks, from what `shared` returned for the same tasks."""

    def forward(self, x: torch.Tensor, tasks: Sequence[int]) -> torch.Tensor:
        """Representations (B, len(tasks), H) of the tasks from the input x (B, D)."""
        return self.split(self.shared(x, tasks), tasks)


class _OneLevel(Trunk):
    """A trunk of one level with a gate for each task."""

    def __init__(
        self, expert_layers: Sequence[int], *, norm: Norm = "layer", dropout: float = 0.0, gate_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.expert_layers, self.out_features = list(expert_layers), expert_layers[-1]
        self.norm: Norm = norm
        self.dropout, self.gate_dropout = dropout, gate_dropout

    @abstractmethod
    def sees(self, num_tasks: int) -> torch.Tensor:
        """(T, E) bool: which expert each task sees."""

    def build(self, in_features: int, num_tasks: int) -> None:
        """See `Trunk.build`."""
        self.level = ExpertLevel(
            in_features,
            self.expert_layers,
            self.sees(num_tasks),
            norm=self.norm,
            dropout=self.dropout,
            gate_dropout=self.gate_dropout,
        )

    def shared(self, x: torch.Tensor, tasks: Sequence[int]) -> Shared:
        """See `Trunk.shared`."""
        return self.level.shared(x, tasks)

    def split(self, shared: Shared, tasks: Sequence[int]) -> torch.Tensor:
        """See `Trunk.split`."""
        return self.level.split(shared, tasks).transpose(0, 1)


class SharedBottom(_OneLevel):
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

    def sees(self, num_tasks: int) -> torch.Tensor:
        """Every task sees the one expert."""
        return torch.ones(num_tasks, 1, dtype=torch.bool)


class SingleTask(_OneLevel):
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

    def sees(self, num_tasks: int) -> torch.Tensor:
        """Each task sees its own expert."""
        return torch.eye(num_tasks, dtype=torch.bool)


class MMoE(_OneLevel):
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

    def sees(self, num_tasks: int) -> torch.Tensor:
        """Every task sees every expert."""
        return torch.ones(num_tasks, self.num_experts, dtype=torch.bool)


class PLE(Trunk):
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
        super().__init__()
        self.shared_experts, self.task_experts, self.num_levels = shared_experts, task_experts, levels
        self.expert_layers, self.out_features = list(expert_layers), expert_layers[-1]
        self.norm: Norm = norm
        self.dropout, self.gate_dropout = dropout, gate_dropout

    def build(self, in_features: int, num_tasks: int) -> None:
        """See `Trunk.build`."""
        # Stream and gate t belong to task t, number T to the shared experts.
        owner = torch.tensor(
            [t for t in range(num_tasks) for _ in range(self.task_experts)] + [num_tasks] * self.shared_experts
        )
        streams = torch.arange(num_tasks + 1).unsqueeze(1)
        sees = (owner == streams) | (owner == num_tasks) | (streams == num_tasks)
        levels = []
        for level in range(self.num_levels):
            first, last = level == 0, level == self.num_levels - 1
            levels.append(
                ExpertLevel(
                    in_features if first else self.out_features,
                    self.expert_layers,
                    sees[:-1] if last else sees,
                    expert_reads=None if first else owner.tolist(),
                    gate_reads=None if first else range(num_tasks if last else num_tasks + 1),
                    norm=self.norm,
                    dropout=self.dropout,
                    gate_dropout=self.gate_dropout,
                )
            )
        self.levels = nn.ModuleList(levels)

    def shared(self, x: torch.Tensor, tasks: Sequence[int]) -> Shared:
        """See `Trunk.shared`."""
        for level in self.levels[:-1]:
            x = level(x)
        return self._last.shared(x, tasks)

    def split(self, shared: Shared, tasks: Sequence[int]) -> torch.Tensor:
        """See `Trunk.split`."""
        return self._last.split(shared, tasks).transpose(0, 1)

    @property
    def _last(self) -> ExpertLevel:
        last = self.levels[-1]
        assert isinstance(last, ExpertLevel)
        return last
