"""PEPNet's gates: who looks, and where, scales the embeddings (EPNet) and the hidden layers of the towers (PPNet).

Both are from Chang et al., *PEPNet*, KDD 2023, and can be put around any trunk.  A gate is 2·sigmoid, around 1 at the
start; it reads the embeddings of a few features and, without sending a gradient there, everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.embeddings import InputBlock
from mtcl_torchrec.modules.trunks.contract import ParameterSlices, Shared, Trunk, TrunkInputs, shared_parameters
from mtcl_torchrec.schema import ConfigError, nearest


class GateUnits(nn.Module):
    """G gate units of one shape, computed together: 2·sigmoid(relu(x W + b) W' + b'), for each of several outputs.

    Args:
        in_features: D.
        hidden: width of the hidden layer of each output.
        widths: of the outputs.
        num_gates: G.

    Example:
        >>> GateUnits(8, 4, [6, 2], num_gates=3)(torch.randn(5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, in_features: int, hidden: int, widths: Sequence[int], num_gates: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"a gate's hidden layer has a width of at least 1, not {hidden}")
        self.hidden = hidden
        shapes = [(len(widths) * hidden, in_features), *((width, hidden) for width in widths)]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_gates, *shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_gates, shape[0])) for shape in shapes)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: torch.Tensor, gates: Sequence[int] | None = None) -> torch.Tensor:
        """(G, B, Σ widths) in (0, 2): the outputs of all gates, or of those in `gates`, side by side.

        Args:
            x: (B, D) that all gates read, or (G, B, D).
        """
        all_gates = gates is None or list(gates) == list(range(len(self.weights[0])))
        weights, biases = ([p if all_gates else p[list(gates or ())] for p in ps] for ps in (self.weights, self.biases))
        if x.dim() == 2:
            h = F.linear(x, weights[0].flatten(0, 1), biases[0].flatten())
            h = h.view(x.shape[0], *biases[0].shape).transpose(0, 1)
        else:
            h = torch.baddbmm(biases[0].unsqueeze(1), x, weights[0].transpose(1, 2))
        parts = F.relu(h).split(self.hidden, dim=2)
        logits = [
            torch.baddbmm(bias.unsqueeze(1), part, weight.transpose(1, 2))
            for part, weight, bias in zip(parts, weights[1:], biases[1:], strict=True)
        ]
        return 2 * torch.sigmoid(torch.cat(logits, dim=2))


class EPNet(nn.Module):
    """Scales every column of the input by a gate that reads a few features, those of the context by default:
    x ⊙ 2σ(MLP([x_features, stop_gradient(x)])) (eq. 3–4).

    Pass it as ``MTCL(epnet=...)``.  A task that is restricted by `Task.inputs` has the gate of what it may see.

    Args:
        features: names of sparse features; None is every sparse feature whose only group is the context.
        hidden: width of the gate's hidden layer.

    Example:
        >>> epnet = EPNet(["hour"], hidden=4)
        >>> epnet.build([InputBlock(8, "user"), InputBlock(2, "hour"), InputBlock(1)])
        >>> epnet(torch.randn(5, 11)).shape
        torch.Size([5, 11])
    """

    columns: torch.Tensor

    def __init__(self, features: Sequence[str] | None = None, *, hidden: int = 32) -> None:
        super().__init__()
        self.features, self.hidden = None if features is None else list(features), hidden

    def build(self, blocks: Sequence[InputBlock]) -> None:
        """Create the parameters; the model does so.

        Raises:
            ConfigError: a feature is not there, or none is named and none is of the context alone.
        """
        features = self.features
        if features is None:
            features = list(dict.fromkeys(b.feature for b in blocks if b.feature and b.groups == ("context",)))
            if not features:
                raise ConfigError("epnet: no sparse feature is known to be of the group context; name features")
        self.register_buffer("columns", _columns_of("epnet", features, blocks), persistent=False)
        width = sum(block.width for block in blocks)
        self.gate = GateUnits(len(self.columns) + width, self.hidden, [width], num_gates=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scaled input (B, D) from x (B, D)."""
        return x * self.gate(torch.cat([x.index_select(1, self.columns), x.detach()], dim=1))[0]


class PPNet(Trunk):
    """Scales a trunk's representation and every hidden layer of the towers, for each task by gates of its own that read
    a few features: 2σ(MLP_tl([x_features, stop_gradient(x)])) for layer l of task t (eq. 5–7).  x is what EPNet gives,
    where there is one.

    Pass it as ``MTCL(ppnet=...)``; the model puts it around the trunk.  It is a trunk itself, so that what the gates
    read is part of `Shared` like everything else that tasks share.  Its representations are those of the inner trunk,
    scaled, and after them the gates of the towers' layers.

    Args:
        features: names of sparse features, such as the ids of user, item and author; None is every sparse feature.
        hidden: width of the hidden layer of each gate.

    Example:
        >>> from mtcl_torchrec.modules.trunks import SharedBottom
        >>> trunk = SharedBottom([6])
        >>> trunk.build(in_features=10, num_tasks=2)
        >>> ppnet = PPNet(["user"], hidden=4)
        >>> ppnet.wrap(trunk, nn.Identity(), [InputBlock(8, "user"), InputBlock(2, "hour")], 2, tower_layers=[5, 3])
        >>> ppnet(torch.randn(4, 10), tasks=[0, 1]).shape
        torch.Size([4, 2, 14])
    """

    columns: torch.Tensor

    def __init__(self, features: Sequence[str] | None = None, *, hidden: int = 32) -> None:
        super().__init__()
        self.features, self.hidden = None if features is None else list(features), hidden

    def build(self, in_features: int, num_tasks: int, inputs: TrunkInputs | None = None) -> None:
        """Refuses: the model calls `wrap`.

        Raises:
            ConfigError: always; a PPNet goes around another trunk.
        """
        raise ConfigError("a PPNet is no trunk by itself: pass a trunk, and the PPNet as ppnet=...")

    def wrap(
        self,
        trunk: nn.Module,
        interaction: nn.Module,
        blocks: Sequence[InputBlock],
        num_tasks: int,
        tower_layers: Sequence[int],
    ) -> None:
        """Create the parameters; the model does so.

        Args:
            trunk: the inner trunk, built.
            interaction: what comes between x and the inner trunk, such as a cross network.
            blocks: what the columns of the input are.
            tower_layers: widths of the towers.

        Raises:
            ConfigError: a feature is not there.
        """
        features = self.features
        if features is None:
            features = list(dict.fromkeys(block.feature for block in blocks if block.feature))
        self.register_buffer("columns", _columns_of("ppnet", features, blocks), persistent=False)
        self.trunk, self.interaction = trunk, interaction
        self.widths = [int(trunk.out_features), *tower_layers]  # type: ignore[arg-type]
        width = len(self.columns) + sum(block.width for block in blocks)
        self.gates = GateUnits(width, self.hidden, self.widths, num_tasks)
        self.out_features = sum(self.widths)

    def shared(self, x: torch.Tensor, tasks: Sequence[int]) -> Shared:
        """What the inner trunk's tasks share, and what the gates read.

        Of a trunk without two steps, the representations of all tasks are what each reads alone.
        """
        read = torch.cat([x.index_select(1, self.columns), x.detach()], dim=1)
        x = self.interaction(x)
        if _has_two_steps(self.trunk):
            inner: Shared = self.trunk.shared(x, tasks)  # type: ignore[operator]
            return Shared((*inner.common, read), inner.own)
        return Shared((read,), (self.trunk(x, tasks).transpose(0, 1),))

    def split(self, shared: Shared, tasks: Sequence[int]) -> torch.Tensor:
        """See `Trunk.split`: (B, n, H + Σ tower_layers)."""
        *common, read = shared.common
        if _has_two_steps(self.trunk):
            out = self.trunk.split(Shared(tuple(common), shared.own), tasks)  # type: ignore[operator]
        else:
            out = shared.own[0].transpose(0, 1)
        gates = self.gates(read, tasks).transpose(0, 1)
        width = self.widths[0]
        return torch.cat([out * gates[..., :width], gates[..., width:]], dim=2)

    def apart(self, representations: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The scaled representations (..., H), and the gates of each layer of the towers (..., width).

        Args:
            representations: (..., H + Σ tower_layers).
        """
        first, *others = representations.split(self.widths, dim=-1)
        return first, tuple(others)

    def shared_parameters(self) -> ParameterSlices:
        """Those of the inner trunk and of the interaction before it; each gate is one task's own."""
        return [*((p, None) for p in self.interaction.parameters()), *shared_parameters(self.trunk)]


def _has_two_steps(trunk: nn.Module) -> bool:
    return hasattr(trunk, "shared") and hasattr(trunk, "split")


def _columns_of(what: str, features: Sequence[str], blocks: Sequence[InputBlock]) -> torch.Tensor:
    """Numbers of the columns of these features, of shared tables: another task's table is none of a gate's business."""
    known = {block.feature for block in blocks if block.feature and block.task is None}
    for feature in features:
        if feature not in known:
            raise ConfigError(f"{what}: no sparse feature {feature!r} in a shared table{nearest(feature, known)}")
    starts = accumulate((block.width for block in blocks), initial=0)
    return torch.tensor(
        [
            start + column
            for start, block in zip(starts, blocks, strict=False)
            if block.task is None and block.feature in features
            for column in range(block.width)
        ]
    )
