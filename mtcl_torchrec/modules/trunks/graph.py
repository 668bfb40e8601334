"""The one masked graph of experts that all trunks here are: levels of experts, and gates that mix what they may see."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from mtcl_torchrec.modules.experts import BatchedExperts, Norm
from mtcl_torchrec.modules.mixing import gate_logits, mixtures
from mtcl_torchrec.modules.trunks.contract import ParameterSlices, Shared, Trunk, TrunkInputs

Residual = Literal["none", "linear", "gate"]


class Mix(NamedTuple):
    """How a level mixed its newest training batch, still part of the graph.

    Args:
        gates, experts: which gates and which experts, g and e of them.
        weights: of the softmax, (g, B, e); a residual is not in them.
        outputs: of the experts, (e, B, H), or (g, e, B, H): a copy for each gate.
    """

    gates: list[int]
    experts: list[int]
    weights: torch.Tensor
    outputs: torch.Tensor


class LevelMask(NamedTuple):
    """Which gates of a level mix which experts, and what each reads.

    Args:
        sees: (G, E) bool: gate g mixes expert e.
        learns: (G, E) bool: and its gradient reaches that expert; None where it reaches all that it sees.
        native: (G, E) bool: experts of the gate's own, of which a residual is added; None is no residual.
        expert_reads: stream that each expert reads, (E,); None where all read the same.
        gate_reads: stream that each gate reads, (G,); None where all read the same.
        gates_also_read: a stream that is added to what each gate reads; needs `gate_reads`.
    """

    sees: torch.Tensor
    learns: torch.Tensor | None = None
    native: torch.Tensor | None = None
    expert_reads: Sequence[int] | None = None
    gate_reads: Sequence[int] | None = None
    gates_also_read: int | None = None


class ExpertLevel(nn.Module):
    """Experts and the gates that mix them.

    Gate g gives Σₑ (softmax(x W_g)ₑ + r_gₑ) · expertₑ over the experts that it sees; r, the residual of its native
    experts, is 0 where there is none.

    Attributes:
        mixes: what the level did since `forget_mixes` was called, for penalties and for a look at the use of experts;
            kept only in training, one for each call of `split`.

    Args:
        in_features: D.
        expert_layers: widths of an expert, the last one H.
        sees, learns, native, expert_reads, gate_reads, gates_also_read: see `LevelMask`.  A gate that sees one expert
            and has no residual passes it on and has no weights.
        residual: of native experts: ``"linear"``, a learnt number for each, 1 where a gate has one native expert
            (AdaTT), or ``"gate"``, a softmax of the gate's input, a sigmoid where it has one (HoME).
        gate_dropout: while training, the share of experts that a gate leaves out, drawn for each row; never all.
        norm, dropout, feature_rank: see `BatchedExperts`.

    Example:
        >>> level = ExpertLevel(8, [4], sees=torch.ones(2, 3, dtype=torch.bool))
        >>> level(torch.randn(5, 8)).shape
        torch.Size([2, 5, 4])
    """

    hidden: torch.Tensor
    learns: torch.Tensor | None
    native: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        expert_layers: Sequence[int],
        sees: torch.Tensor,
        *,
        learns: torch.Tensor | None = None,
        native: torch.Tensor | None = None,
        expert_reads: Sequence[int] | None = None,
        gate_reads: Sequence[int] | None = None,
        gates_also_read: int | None = None,
        residual: Residual = "none",
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
        feature_rank: int = 0,
    ) -> None:
        super().__init__()
        num_gates, num_experts = sees.shape
        if not bool(sees.any(1).all()):
            raise ValueError("every gate must see an expert")
        if any(mask is not None and bool((mask & ~sees).any()) for mask in (learns, native)):
            raise ValueError("a gate learns from, and adds, only experts that it sees")
        if gates_also_read is not None and gate_reads is None:
            raise ValueError("gates_also_read needs gate_reads")
        self.experts = BatchedExperts(
            in_features, expert_layers, num_experts,
            reads=expert_reads, norm=norm, dropout=dropout, feature_rank=feature_rank,
        )  # fmt: skip
        self.gate_dropout = gate_dropout
        self.mixes: list[Mix] = []
        self.balanced = False  # whether a penalty looks at the gates' weights
        self._parting: dict[tuple[int, ...], Shared] = {}  # for `mixes`: what the gates read, before any copies
        self.gate_names: list[str] | None = None  # for what is told about training; None: a gate for each task
        self.gate_reads = None if gate_reads is None else list(gate_reads)
        self.gates_also_read = gates_also_read
        self._seen = [torch.nonzero(row).flatten().tolist() for row in sees]
        if learns is not None and bool((learns == sees).all()):
            learns = None
        self._learnt = [torch.nonzero(row).flatten().tolist() for row in (sees if learns is None else learns)]
        self.residual: Residual = "none" if native is None else residual
        bound = in_features**-0.5
        self.gate_weight: nn.Parameter | None = None
        if bool((sees.sum(1) > 1).any()) or self.residual != "none":
            self.gate_weight = nn.Parameter(torch.empty(num_gates, num_experts, in_features).uniform_(-bound, bound))
        self.native_weight: nn.Parameter | None = None
        if self.residual == "gate":
            self.native_weight = nn.Parameter(torch.empty(num_gates, num_experts, in_features).uniform_(-bound, bound))
        elif native is not None and self.residual == "linear" and bool((native.sum(1) > 1).any()):
            self.native_weight = nn.Parameter(native / native.sum(1, keepdim=True).clamp(min=1))
        self.register_buffer("hidden", ~sees, persistent=False)
        self.register_buffer("learns", learns, persistent=False)
        self.register_buffer("native", native, persistent=False)

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
            parting = Shared((outputs, x))
        else:
            own = x[[self.gate_reads[g] for g in self._wanted(gates)]]
            also = () if self.gates_also_read is None else (x[self.gates_also_read],)
            parting = Shared((outputs, *also), (own,))
        if self.training:
            self._parting[tuple(self._wanted(gates))] = parting
        return parting

    def split(self, shared: Shared, gates: Sequence[int] | None = None) -> torch.Tensor:
        """Mixtures (G, B, H) from what `shared` returned for the same gates."""
        outputs, wanted, used = shared.common[0], self._wanted(gates), self._used(gates)
        copied = outputs.dim() == 4  # (G, E, B, H): a copy of all outputs for each gate
        if self.gate_weight is None:
            at = [used.index(self._seen[g][0]) for g in wanted]
            if copied:
                return outputs[range(len(at)), at]
            return outputs if at == list(range(len(outputs))) else outputs[at]
        x = _read_by_gates(shared)
        weights, hidden = self._weights_and_hidden(x, wanted, used)
        if self.training:
            # Not of the copies: a penalty is no task's, and does not pass where tasks' gradients are caught.
            parting = self._parting.pop(tuple(wanted), shared)
            told = weights
            if copied and self.balanced:
                told, _ = self._weights_and_hidden(_read_by_gates(parting), wanted, used, hidden)
            self.mixes.append(Mix(wanted, used, told, parting.common[0]))
        if self.residual != "none":
            weights = weights + self._native_weights(x, wanted, used)
        if self.learns is None:
            return mixtures(weights, outputs)
        of = outputs.unbind(1 if copied else 0)
        # What a gate sees without learning it, it sees detached.
        learns = _rows_and_columns(self.learns, wanted, used).unsqueeze(1)
        some, others = self._learnt_and_not(wanted, used)
        learnt = _mixture(weights * learns, of, some)
        return _mixture(weights * ~learns, [output.detach() for output in of], others, learnt)

    def forget_mixes(self) -> None:
        """Let go of what `mixes` holds."""
        # New ones: a compiled graph would hold for one state of the old ones only.
        self.mixes = []
        self._parting = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mixes": [], "_parting": {}}  # tensors of a graph cannot be copied

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
        return self._weights_and_hidden(x, gates, experts)[0]

    def _weights_and_hidden(
        self, x: torch.Tensor, gates: list[int], experts: list[int], hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and what gates leave out: `hidden`, or else what they do not see and what gate dropout draws."""
        assert self.gate_weight is not None
        logits = _logits(x, _rows_and_columns(self.gate_weight, gates, experts))
        if hidden is None:
            hidden = _rows_and_columns(self.hidden, gates, experts).unsqueeze(1)
            if self.training and self.gate_dropout > 0:
                draw = torch.rand_like(logits, dtype=torch.float32).masked_fill(hidden, -1.0)
                luckiest = draw == draw.amax(-1, keepdim=True)  # stays where all would go
                hidden = hidden | ((draw < self.gate_dropout) & ~luckiest)
        return torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1), hidden

    def _native_weights(self, x: torch.Tensor, gates: list[int], experts: list[int]) -> torch.Tensor:
        """Weights of the residual, (g, B, e) or (g, 1, e); 0 where an expert is not native."""
        assert self.native is not None
        native = _rows_and_columns(self.native, gates, experts).unsqueeze(1)
        if self.native_weight is None:
            return native.to(x.dtype)
        weight = _rows_and_columns(self.native_weight, gates, experts)
        if self.residual == "linear":
            return weight.unsqueeze(1) * native
        logits = _logits(x, weight)
        alone = native.sum(-1, keepdim=True) == 1
        # A gate without any native expert hides none, or its softmax would be NaN.
        several = torch.softmax(logits.masked_fill(~native & native.any(-1, keepdim=True), float("-inf")), dim=-1)
        return torch.where(alone, torch.sigmoid(logits), several) * native

    # ------------------------------------------------------------------ whose gradient reaches what

    def reached_by(self, gates: Sequence[set[int]]) -> tuple[list[set[int]], dict[int, set[int]]]:
        """Whose gradients reach each expert, and each stream that the level reads.

        Args:
            gates: the tasks whose gradients reach each gate.

        Returns:
            For each expert, and for each stream by its number, the tasks.
        """
        experts = [
            set().union(*(tasks for tasks, learnt in zip(gates, self._learnt, strict=True) if expert in learnt))
            for expert in range(self.experts.num_experts)
        ]
        streams: dict[int, set[int]] = {}
        for stream, tasks in zip(self.experts.reads or [0] * len(experts), experts, strict=True):
            streams[stream] = streams.get(stream, set()) | tasks
        if self.gate_weight is not None:
            for stream, tasks in zip(self.gate_reads or [0] * len(gates), gates, strict=True):
                streams[stream] = streams.get(stream, set()) | tasks
            if self.gates_also_read is not None:
                streams[self.gates_also_read] = streams.get(self.gates_also_read, set()).union(*gates)
        return experts, streams

    def _learnt_and_not(self, gates: list[int], experts: list[int]) -> tuple[list[int], list[int]]:
        """Places in `experts` of those that some of the gates learn, and of those that some see without learning."""
        places = range(len(experts))
        return (
            [p for p in places if any(experts[p] in self._learnt[g] for g in gates)],
            [
                p
                for p in places
                if any(experts[p] in self._seen[g] and experts[p] not in self._learnt[g] for g in gates)
            ],
        )


def _read_by_gates(shared: Shared) -> torch.Tensor:
    """What the gates read, (B, D) or (g, B, D), of what `ExpertLevel.shared` returned or of its copies."""
    read = (*shared.own, *shared.common[1:])
    return read[0] if len(read) == 1 else read[0] + read[1]


def _logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(g, B, e) from x (B, D) or (g, B, D) and a weight (g, e, D)."""
    if x.dim() == 3:
        return gate_logits(x, weight)
    return torch.matmul(x, weight.flatten(0, 1).T).view(x.shape[0], *weight.shape[:2]).transpose(0, 1)


def _mixture(
    weights: torch.Tensor, outputs: Sequence[torch.Tensor], of: Iterable[int], start: torch.Tensor | None = None
) -> torch.Tensor:
    """Σₑ weights[..., e] · outputs[e]: a sum over a handful of experts, not B tiny matrix products."""
    for e in of:
        weight = weights[..., e].unsqueeze(-1)
        start = weight * outputs[e] if start is None else torch.addcmul(start, weight, outputs[e])
    assert start is not None
    return start


def _rows_and_columns(matrix: torch.Tensor, rows: list[int], columns: list[int]) -> torch.Tensor:
    """The chosen rows and columns; all of them in order cost no copy."""
    if rows != list(range(matrix.shape[0])):
        matrix = matrix[rows]
    return matrix if columns == list(range(matrix.shape[1])) else matrix[:, columns]


class ExpertGraph(Trunk):
    """A trunk of one or several `ExpertLevel`s; a kind of trunk says with `masks` who sees whom.

    Gate t of the last level is task t's.  The gates of every other level are the streams that the next one reads.

    Args:
        expert_layers: widths of an expert, the last one H.
        norm: ``"layer"``, ``"rms"`` or ``"none"``.
        dropout: after each activation.
        gate_dropout: while training, the share of experts a gate leaves out, so that none is leaned on alone.
        residual, feature_rank: see `ExpertLevel`.
    """

    def __init__(
        self,
        expert_layers: Sequence[int],
        *,
        norm: Norm = "layer",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
        residual: Residual = "none",
        feature_rank: int = 0,
    ) -> None:
        super().__init__()
        self.expert_layers, self.out_features = list(expert_layers), expert_layers[-1]
        self.options: dict[str, Any] = {
            "norm": norm,
            "dropout": dropout,
            "gate_dropout": gate_dropout,
            "residual": residual,
            "feature_rank": feature_rank,
        }

    @abstractmethod
    def masks(self, num_tasks: int, inputs: TrunkInputs | None) -> list[LevelMask]:
        """The levels of T tasks, in the order data meets them."""

    def streams(self, x: torch.Tensor) -> torch.Tensor:
        """What the first level reads of the input x (B, D): x itself, or streams (S, B, D')."""
        return x

    def build(self, in_features: int, num_tasks: int, inputs: TrunkInputs | None = None) -> None:
        """See `Trunk.build`."""
        levels = []
        for mask in self.masks(num_tasks, inputs):
            levels.append(ExpertLevel(in_features, self.expert_layers, **mask._asdict(), **self.options))
            in_features = self.out_features
        self.levels = nn.ModuleList(levels)

    def shared(self, x: torch.Tensor, tasks: Sequence[int]) -> Shared:
        """See `Trunk.shared`."""
        x = self.streams(x)
        for level in self.levels[:-1]:
            x = level(x)
        return self._last.shared(x, tasks)

    def split(self, shared: Shared, tasks: Sequence[int]) -> torch.Tensor:
        """See `Trunk.split`."""
        return self._last.split(shared, tasks).transpose(0, 1)

    def shared_parameters(self) -> ParameterSlices:
        """See `mtcl_torchrec.modules.trunks.shared_parameters`."""
        found: ParameterSlices = []
        levels = [level for level in self.levels if isinstance(level, ExpertLevel)]
        reached = [{task} for task in range(len(self._last.hidden))]  # whose gradients reach each gate of a level
        for number in reversed(range(len(levels))):
            level = levels[number]
            experts, streams = level.reached_by(reached)
            of_gates = [weight for weight in (level.gate_weight, level.native_weight) if weight is not None]
            found = [*_slices(level.experts.parameters(), experts), *_slices(of_gates, reached), *found]
            if number:
                reached = [streams.get(gate, set()) for gate in range(len(levels[number - 1].hidden))]
        return found

    @property
    def _last(self) -> ExpertLevel:
        last = self.levels[-1]
        assert isinstance(last, ExpertLevel)
        return last


def _slices(parameters: Iterable[nn.Parameter], tasks: Sequence[set[int]]) -> ParameterSlices:
    """The rows of each parameter that several tasks reach, None where they reach all rows."""
    rows = [row for row, reached_by in enumerate(tasks) if len(reached_by) > 1]
    whole = len(rows) == len(tasks)
    return [(parameter, None if whole else rows) for parameter in parameters] if rows else []
