"""How the gates of a model use its experts, in numbers that are there anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtcl_torchrec.modules.trunks import ExpertLevel


@dataclass(frozen=True)
class GateSums:
    """How this rank's newest training batch used the experts of one level, as sums over rows.

    Args:
        weights: (G, E) float64, sum of each gate's weights; NaN where it does not see the expert.
        native: (G, E) float64, 1 where the expert is added to what the gate mixes, whatever its weight (a residual).
        entropy: (G,) float64, sum of each gate's entropy in units of log(number of experts it sees).
        rows: (G,) float64, number of rows that went through each gate.
    """

    weights: torch.Tensor
    native: torch.Tensor
    entropy: torch.Tensor
    rows: torch.Tensor


@torch.no_grad()
def gate_sums(level: ExpertLevel) -> GateSums | None:
    """What the gates of a level did in its newest training batch; None where it has no gates that choose.

    A gate through which several groups of tasks went, each with the inputs it may see, counts the rows of each.

    Example:
        >>> level = ExpertLevel(2, [4], sees=torch.tensor([[True, True], [False, True]]))
        >>> _ = level.gate_weight.data.zero_(), level(torch.randn(5, 2))
        >>> sums = gate_sums(level)
        >>> sums.weights, sums.entropy
        (tensor([[2.5000, 2.5000], [   nan, 5.0000]], dtype=torch.float64), tensor([5., 0.], dtype=torch.float64))
    """
    if level.gate_weight is None:
        return None
    sees = ~level.hidden
    num_gates, num_experts = sees.shape
    weights = torch.zeros(num_gates, num_experts, dtype=torch.float64, device=sees.device)
    entropy, rows = weights.new_zeros(num_gates), weights.new_zeros(num_gates)
    choices = sees.sum(1).clamp(min=2).double().log()  # of one expert, the entropy is 0 in any unit
    for mix in level.mixes:
        shares = mix.weights.double()  # (g, B, e)
        gates = torch.tensor(mix.gates, device=sees.device)
        of_gate = torch.zeros(len(mix.gates), num_experts, dtype=torch.float64, device=sees.device)
        of_gate[:, mix.experts] = shares.sum(1)
        weights.index_add_(0, gates, of_gate)
        entropy.index_add_(0, gates, torch.special.entr(shares).sum((1, 2)) / choices[gates])
        rows.index_add_(0, gates, rows.new_full((len(mix.gates),), shares.shape[1]))
    native = getattr(level, "native", None)
    added = torch.zeros_like(weights) if native is None else native.double()
    return GateSums(weights.masked_fill(~sees, float("nan")), added, entropy, rows)
