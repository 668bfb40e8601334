"""How the tasks of a run get along, in numbers: what is kept of the readings that the loop takes every few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt

from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.modules.balance.gate_use import GateSums, gate_sums
from mtcl_torchrec.modules.balance.surgery_statistics import SurgeryStatistics
from mtcl_torchrec.modules.trunks import ExpertLevel
from mtcl_torchrec.training.sharding import Ranks

MEMORY = 0.1  # of the averages over readings: about the last ten


@dataclass
class LossWeights:
    """What a loss weighting does on top of the tasks' declared weights.

    Args:
        method: its name.
        mean: task -> moving average of its weight.
        clamped: task -> share of its steps in which the weight was held within its range.
    """

    method: str
    mean: dict[str, float | None]
    clamped: dict[str, float | None]


@dataclass
class GradientAgreement:
    """What gradient surgery met at one cut; see `mtcl_torchrec.modules.balance.surgery_statistics.PartStatistics`.

    Args:
        clamped, degenerate: shares of the steps.
    """

    cut: str
    tasks: list[str]
    cosine: list[list[float | None]]
    conflicting: list[list[float | None]]
    weights: dict[str, float | None]
    steps: NonNegativeInt
    clamped: float | None
    degenerate: float | None


@dataclass
class GateUse:
    """How one gate mixes experts, averaged over rows, ranks and the newest readings.

    Args:
        level: of the trunk, from 1.
        gate: the task that it belongs to, or another name.
        weights: mean weight of each expert, None where the gate does not see it.
        entropy: mean entropy over rows, 1 for a gate that gives the experts it sees equal weights, 0 for a hard choice.
        native: the experts that are added to what the gate mixes, whatever their weight.
    """

    level: PositiveInt
    gate: str
    weights: list[float | None]
    entropy: float
    native: list[NonNegativeInt] = field(default_factory=list)

    def move(self, towards: GateUse, share: float) -> None:
        """Take in a newer reading of the same gate."""
        pairs = zip(self.weights, towards.weights, strict=True)
        self.weights = [None if a is None or b is None else a + (b - a) * share for a, b in pairs]
        self.entropy += (towards.entropy - self.entropy) * share


@dataclass
class Balance:
    """What is known after a reading.

    Args:
        readings: how many there were.
        loss_weights: None under the weighted sum.
        gradients: by cut; empty without gradient surgery.
        gates: of every level that has gates with a choice.
    """

    readings: NonNegativeInt = 0
    loss_weights: LossWeights | None = None
    gradients: list[GradientAgreement] = field(default_factory=list)
    gates: list[GateUse] = field(default_factory=list)

    def scalars(self) -> dict[str, float]:
        """By name, as TensorBoard groups them."""
        found: dict[str, float | None] = {}
        if self.loss_weights is not None:
            found |= {f"loss_weight/{task}": value for task, value in self.loss_weights.mean.items()}
        for seen in self.gradients:
            for i, one in enumerate(seen.tasks):
                for j, other in enumerate(seen.tasks[:i]):
                    found[f"cosine_{seen.cut}/{other}-{one}"] = seen.cosine[i][j]
                    found[f"conflicting_{seen.cut}/{other}-{one}"] = seen.conflicting[i][j]
            found |= {f"gradient_weight_{seen.cut}/{task}": value for task, value in seen.weights.items()}
        for use in self.gates:
            found[f"gate_entropy/level{use.level}/{use.gate}"] = use.entropy
            found |= {f"gate/level{use.level}/{use.gate}/expert{e}": w for e, w in enumerate(use.weights)}
        return {name: value for name, value in found.items() if value is not None}

    def _meet(self, gates: list[GateUse]) -> None:
        share = max(1 / (self.readings + 1), MEMORY)
        known = {(use.level, use.gate, len(use.weights)): use for use in self.gates}
        for number, new in enumerate(gates):
            old = known.get((new.level, new.gate, len(new.weights)))
            if old is not None:
                old.move(new, share)
                gates[number] = old
        self.gates = gates or self.gates


def read_step(
    train_module: MTCLTrain, loss: torch.Tensor, where: Ranks, balance: Balance, *, overdue: bool = False
) -> tuple[dict[str, float], bool]:
    """Read the newest training step, in one collective and one wait for the device (gradient surgery may wait again);
    every rank calls it.

    Args:
        loss: of the step on this rank.
        balance: it takes the reading in, and is the same on every rank.
        overdue: rank 0's is told to all.

    Returns:
        Losses of the global batch, by task, ``"total"`` and, where the fused score is trained, ``"score"``; and rank
        0's `overdue`.
    """
    levels = [(n, level) for n, level in enumerate(train_module.model.tower.expert_levels(), 1)]
    sums = [(n, found) for n, level in levels if (found := gate_sums(level)) is not None]
    of_score = train_module.loss.last_fused_loss
    more = [] if of_score is None else [of_score.reshape(1)]
    losses = torch.cat([loss.detach().reshape(1), train_module.loss.last_task_losses, *more])
    told = losses.new_tensor([float(overdue and where.first) * where.world_size])
    of_ranks = [losses, told, *(t for _, s in sums for t in (s.weights, s.native, s.entropy, s.rows))]
    values = torch.cat([t.double().flatten() for t in of_ranks])
    if where.world_size > 1:
        dist.all_reduce(values)
    weighting = train_module.loss.weighting
    alike = [] if weighting is None else [weighting.mean_weights, weighting.clamped / weighting.seen]
    numbers = _Numbers(torch.cat([values, *(t.double() for t in alike)]).tolist())
    tasks = [task.name for task in train_module.model.tasks]
    means = [value / where.world_size for value in numbers.take(len(losses) + 1)]
    in_trunk = [task.name for task in train_module.model.tasks if task.in_trunk]
    names = {n: _gate_names(level, in_trunk) for n, level in levels}
    gates = [use for n, s in sums for use in _gate_uses(n, names[n], s, numbers)]
    if weighting is not None:
        mean, clamped = (dict(zip(tasks, numbers.finite(len(tasks)), strict=True)) for _ in range(2))
        balance.loss_weights = LossWeights(weighting.title, mean, clamped)
    surgery = train_module.surgery
    balance.gradients = [] if surgery is None else _agreements(surgery.statistics())
    balance._meet(gates)
    balance.readings += 1
    return dict(zip(["total", *tasks, "score"], means[:-1], strict=False)), means[-1] > 0


class _Numbers:
    """A list of numbers, taken from its front."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def take(self, count: int) -> list[float]:
        return [next(self._numbers) for _ in range(count)]

    def finite(self, count: int) -> list[float | None]:
        """With None for what is not known yet, NaN."""
        return [value if math.isfinite(value) else None for value in self.take(count)]


def _gate_uses(level: int, names: Sequence[str], sums: GateSums, numbers: _Numbers) -> list[GateUse]:
    """Of a level's gates that met rows; those whose weights are not finite (a skipped batch) are left out."""
    num_gates, num_experts = sums.weights.shape
    weights = [numbers.finite(num_experts) for _ in range(num_gates)]
    native = [numbers.take(num_experts) for _ in range(num_gates)]
    entropies, rows = numbers.take(num_gates), numbers.take(num_gates)
    return [
        GateUse(
            level,
            names[gate],
            [None if w is None else w / rows[gate] for w in weights[gate]],
            entropies[gate] / rows[gate],
            [expert for expert, added in enumerate(native[gate]) if added],
        )
        for gate in range(num_gates)
        if rows[gate] > 0 and math.isfinite(entropies[gate])
    ]


def _gate_names(level: ExpertLevel, tasks: list[str]) -> list[str]:
    """A level says the names of its gates, or has one for each task, and possibly one for what they share."""
    if level.gate_names is not None:
        return level.gate_names
    num_gates = len(level.hidden)
    if num_gates in (len(tasks), len(tasks) + 1):
        return [*tasks, "shared"][:num_gates]
    return [f"gate {gate}" for gate in range(num_gates)]


def _agreements(met: SurgeryStatistics) -> list[GradientAgreement]:
    def known(values: Sequence[float]) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values]

    return [
        GradientAgreement(
            cut=part.name,
            tasks=list(met.tasks),
            cosine=[known(row) for row in part.cosine],
            conflicting=[known(row) for row in part.conflicts],
            weights=dict(zip(met.tasks, known(part.weights), strict=True)),
            steps=met.steps,
            clamped=part.clamped / met.steps if met.steps else None,
            degenerate=part.degenerate / met.steps if met.steps else None,
        )
        for part in met.parts
    ]
