"""Penalties that join the loss by name: on embeddings, dense weights, experts that are alike, gates that neglect some.

Each is a function of averages over the rows of the *global* batch that have a label: sums are formed on every rank and
added up over the ranks, and only then does the penalty become one number.  So it is that of the global batch however
many ranks share it, also where it is no average itself (the square in `gate_balance`), and so is its gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.embeddings import Pooled, inputs_as_one, pooled_by_key
from mtcl_torchrec.modules.guard import stop_gradient_if
from mtcl_torchrec.modules.lookups import Lookups
from mtcl_torchrec.modules.row_penalty import RowPenalty
from mtcl_torchrec.schema import ConfigError, nearest

REGULARISERS = ("l2_embedding", "l2_rows", "l2_dense", "expert_orthogonality", "gate_balance")
_OF_EXPERTS = ("expert_orthogonality", "gate_balance")
# Parts of names; of a dot head's bilinear form, decay would only make the factors large.
_NO_WEIGHTS = {"bias", "biases", "scales", "shifts", "missing", "bilinear"}


class _Mixing(Protocol):
    """What is asked of a tower: see `mtcl_torchrec.modules.towers.MultiTaskTower`."""

    def expert_levels(self) -> Sequence[Any]: ...

    def named_parameters(self) -> Any: ...


def is_weight(name: str) -> bool:
    """Whether a dense parameter is a weight, which decays, and no bias or scale of a norm.

    Example:
        >>> is_weight("towers.weights.0"), is_weight("towers.biases.0")
        (True, False)
    """
    return not _NO_WEIGHTS & set(name.split("."))


class Regularisers(nn.Module):
    """Σ λₖ Rₖ of one batch.

    - ``l2_embedding``: mean of ‖pooled embeddings‖² over rows, which pulls at the table rows that the batch looked up,
      as often as they were: what matrix factorisation adds to each rating (Koren, Bell and Volinsky, Computer 2009,
      eq. 5).  λ is one number for all inputs, or feature -> λ; a feature that is left out has 0.
    - ``l2_rows``: feature -> λ of the mean of ‖row‖² over the rows of its table, for features of one id: a Gaussian
      prior, see `mtcl_torchrec.modules.row_penalty`.  Where all ids are equally frequent, it is ``l2_embedding``.
    - ``l2_dense``: Σ W² over all dense weights, biases and scales of norms left out.  Under Adam this is not AdamW's
      decay, which the dense optimizer has as `weight_decay`.
    - ``expert_orthogonality``: mean of cos² between the outputs of two experts, over rows and pairs of a level: 0 where
      they are orthogonal, 1 where they say the same (after Guo et al., *Advancing Expert Specialization for Better
      MoE*, 2025, who push experts' outputs apart likewise).
    - ``gate_balance``: CV² of the experts' importance, its sum of gate weights over rows and gates (Shazeer et al.,
      *Outrageously Large Neural Networks*, ICLR 2017, eq. 6–7), mean over levels.  Where gates see different experts
      (PLE), importance is divided by what an expert would get if every gate mixed evenly: Σₑ (useₑ - evenₑ)² / evenₑ
      over Σₑ evenₑ, which is CV² where all gates see all experts.

    Args:
        weights: name -> λ; a name that is left out has 0.  That of ``l2_embedding`` may be feature -> λ, that of
            ``l2_rows`` is.
        tower: holds the dense parameters and tells its levels of experts; needed for all but ``l2_embedding``.  It
            does not become a part of this module.
        lookups: the inputs beside the tables; their weights are dense weights, too.  Needed for a λ by feature.  It
            does not become a part either.
        rows: feature -> rows of its table, for ``l2_rows``.
        process_group: the ranks that share a global batch; None is the default group.

    Raises:
        ValueError: an unknown name, a negative λ, or (a ConfigError) a penalty on experts where there are none, or an
            unknown feature.

    Example:
        >>> Regularisers({"l2_embedding": 1e-4}).active
        ('l2_embedding',)
    """

    def __init__(
        self,
        weights: Mapping[str, float | Mapping[str, float]] | None = None,
        tower: _Mixing | None = None,
        lookups: Lookups | None = None,
        rows: Mapping[str, int] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.weights: dict[str, float] = {}
        self._of_inputs: dict[str, float] = {}  # key of an input -> λ, where `l2_embedding` tells them apart
        self._of_rows: dict[str, float] = {}  # the same of `l2_rows`
        self.row_penalty: RowPenalty | None = None
        given = dict(weights or {})
        for name in given:
            if name not in REGULARISERS:
                raise ValueError(f"no regulariser {name!r}{nearest(name, REGULARISERS)}")
        for name in (name for name in REGULARISERS if name in given):
            weight = given[name]
            if name == "l2_rows":
                weight = self._with_rows(weight, lookups, rows or {}, process_group)
            elif isinstance(weight, Mapping):
                if name != "l2_embedding":
                    raise ValueError(
                        f"regulariser {name!r}: a weight is one number; l2_embedding and l2_rows are by feature"
                    )
                self._of_inputs = _by_key(name, weight, lookups)
                weight = 1.0 if self._of_inputs else 0.0
            check_weight(name, weight)
            if weight > 0:
                self.weights[name] = float(weight)
        self._tower = (tower,)  # in a tuple, so that its parameters are not counted twice
        self._lookups = (lookups,)
        for name in self.active:
            if name != "l2_embedding" and tower is None:
                raise ValueError(f"regulariser {name!r} needs the model's tower")
            if name in _OF_EXPERTS and tower is not None and not tower.expert_levels():
                raise ConfigError(_no_experts(name))
        for level in tower.expert_levels() if tower is not None else ():
            level.balanced = "gate_balance" in self.weights

    def _with_rows(self, weight: Any, lookups: Lookups | None, rows: Mapping[str, int], process_group: Any) -> float:
        """Make what `l2_rows` needs; 1 where there is something to penalise, else 0."""
        if not isinstance(weight, Mapping):
            raise ValueError("regulariser 'l2_rows': weights are by feature, such as {user_id: 0.05}")
        self._of_rows = _by_key("l2_rows", weight, lookups)
        of_features = {feature: float(of) for feature, of in weight.items() if of > 0}
        if not of_features:
            return 0.0
        for feature in of_features:
            if feature not in rows:
                raise ConfigError(f"regulariser 'l2_rows': {feature!r} has no table whose rows it looks up")
        self.row_penalty = RowPenalty(of_features, rows, process_group)
        return 1.0

    @property
    def active(self) -> tuple[str, ...]:
        """The regularisers with a weight above 0."""
        return tuple(self.weights)

    @property
    def watched(self) -> tuple[str, ...]:
        """The regularisers whose failures are counted by name: a checkpoint from before ``l2_rows`` has no place for
        it."""
        return tuple(name for name in REGULARISERS if name != "l2_rows" or name in self.weights)

    def sums(
        self, pooled: Pooled, labelled: torch.Tensor, skip: torch.Tensor, sparse_features: Any = None
    ) -> dict[str, torch.Tensor]:
        """What each active regulariser needs to know of this rank's rows, summed over them: (Q,), Q its own.

        In evaluation mode those of experts have nothing: levels keep what they mixed in training only.

        Args:
            pooled: the embedding-bag collection's output.
            labelled: (B,) float, 1 where a row has a label.
            skip: () bool: gradients are exactly zero where this is True by the time of the backward pass.
            sparse_features: the batch's KeyedJaggedTensor, for ``l2_rows``.

        Raises:
            ValueError: a penalty on experts, and in this batch none were mixed.
        """
        asked = [name for name in self.active if self.training or name not in _OF_EXPERTS]
        return {
            name: self._l2_rows_sums(pooled, labelled, skip, sparse_features)
            if name == "l2_rows"
            else getattr(self, f"_{name}_sums")(pooled, labelled, skip)
            for name in asked
        }

    def penalty(self, averages: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """() Σ λₖ Rₖ from the averages over the global batch of what `sums` added up."""
        return torch.stack([self.weights[name] * self.value(name, of) for name, of in averages.items()]).sum()

    def value(self, name: str, average: torch.Tensor) -> torch.Tensor:
        """() one regulariser from its averages (Q,)."""
        return self._gate_balance(average) if name == "gate_balance" else average.sum()

    # ------------------------------------------------------------------ what is summed over rows

    def _l2_embedding_sums(self, pooled: Pooled, labelled: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        lookups = self._lookups[0]
        if self._of_inputs:
            assert lookups is not None
            inputs = pooled_by_key(pooled, lookups.dims)
            of_rows = [
                weight * stop_gradient_if(inputs[key], skip).float().square().sum(1)
                for key, weight in self._of_inputs.items()
            ]
            return (labelled * torch.stack(of_rows).sum(0)).sum().reshape(1)
        if lookups is not None and len(lookups):
            if not lookups.penalised:
                return labelled.new_zeros(1)
            pooled = inputs_as_one(pooled, lookups.penalised)
        values = stop_gradient_if(_values(pooled), skip)
        return (labelled * values.float().square().sum(1)).sum().reshape(1)

    def _l2_rows_sums(
        self, pooled: Pooled, labelled: torch.Tensor, skip: torch.Tensor, sparse_features: Any
    ) -> torch.Tensor:
        lookups, row_penalty = self._lookups[0], self.row_penalty
        assert lookups is not None
        assert row_penalty is not None
        inputs, of_ids = pooled_by_key(pooled, lookups.dims), row_penalty(sparse_features)
        of_rows = [
            of_ids[key.partition("@")[0]] * stop_gradient_if(inputs[key], skip).float().square().sum(1)
            for key in self._of_rows
        ]
        return (labelled * torch.stack(of_rows).sum(0)).sum().reshape(1)

    def _l2_dense_sums(self, pooled: Pooled, labelled: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        tower = self._tower[0]
        assert tower is not None
        lookups = self._lookups[0]
        named = [*tower.named_parameters(), *(lookups.named_parameters() if lookups is not None else ())]
        squares = [p.square().sum() for name, p in named if is_weight(name) and p.requires_grad]
        # The same for every row, so that its average over rows is what it is.
        return (labelled.sum() * stop_gradient_if(torch.stack(squares).sum(), skip)).reshape(1)

    def _expert_orthogonality_sums(self, pooled: Pooled, labelled: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        found = []
        for mixes in self._mixes("expert_orthogonality"):
            for mix in mixes:
                outputs = stop_gradient_if(mix.outputs, skip).float()
                if outputs.dim() == 4:  # (g, e, B, H), a copy for each gate, which take equal parts in the gradient
                    outputs = outputs.mean(0)
                directions = F.normalize(outputs, dim=-1).unbind(0)
                pairs = [(a * b).sum(-1).square() for a, b in combinations(directions, 2)]
                found.append(torch.stack(pairs).mean(0))
        return (labelled * torch.stack(found).mean(0)).sum().reshape(1)

    def _gate_balance_sums(self, pooled: Pooled, labelled: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        weights = (stop_gradient_if(mix.weights, skip) for mixes in self._mixes("gate_balance") for mix in mixes)
        return torch.cat([(labelled.unsqueeze(1) * w.float()).sum(1).flatten() for w in weights])

    # ------------------------------------------------------------------ what becomes of the averages

    def _gate_balance(self, average: torch.Tensor) -> torch.Tensor:
        """From the mean weight that each gate gives to each expert, all levels one after the other."""
        levels, at = [], 0
        for mixes in self._mixes("gate_balance"):
            use: dict[int, list[torch.Tensor]] = defaultdict(list)
            even: dict[int, list[torch.Tensor]] = defaultdict(list)
            for mix in mixes:
                size = (len(mix.gates), len(mix.experts))
                given = average[at : at + size[0] * size[1]].view(size)
                at += size[0] * size[1]
                seen = (given > 0).float()
                fair = seen / seen.sum(1, keepdim=True).clamp(min=1)
                for column, expert in enumerate(mix.experts):
                    use[expert].append(given[:, column].sum())
                    even[expert].append(fair[:, column].sum())
            used = torch.stack([torch.stack(use[e]).sum() for e in use])
            fairly = torch.stack([torch.stack(even[e]).sum() for e in use])
            apart = torch.where(fairly > 0, (used - fairly).square() / fairly.clamp(min=1e-30), 0.0)
            levels.append(apart.sum() / fairly.sum().clamp(min=1e-30))
        return torch.stack(levels).mean()

    def _mixes(self, name: str) -> list[list[Any]]:
        """What each level mixed of two experts or more."""
        tower = self._tower[0]
        assert tower is not None
        levels = [[mix for mix in level.mixes if len(mix.experts) > 1] for level in tower.expert_levels()]
        mixing = [mixes for mixes in levels if mixes]
        if not mixing:
            raise ConfigError(_no_experts(name))
        return mixing


def check_weight(name: str, weight: float) -> None:
    """See that a λ is a finite number of at least 0.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"regulariser {name!r}: a weight is a number of at least 0, not {weight}")


def _by_key(name: str, of_features: Mapping[str, float], lookups: Lookups | None) -> dict[str, float]:
    """Key of an input -> λ of its feature, where that is above 0: a feature may be looked up in several tables."""
    if lookups is None:
        raise ValueError(f"regulariser {name!r} by feature needs the model's lookups")
    keys: dict[str, list[str]] = {}
    for key in lookups.penalised:
        keys.setdefault(key.partition("@")[0], []).append(key)
    for feature, weight in of_features.items():
        check_weight(f"{name}.{feature}", weight)
        if feature not in keys:
            raise ConfigError(f"regulariser {name!r}: no embedded feature {feature!r}{nearest(feature, keys)}")
    return {key: float(weight) for feature, weight in of_features.items() if weight > 0 for key in keys[feature]}


def _no_experts(name: str) -> str:
    return f"regulariser {name!r}: the trunk has no gate that mixes several experts"


def _values(pooled: Pooled) -> torch.Tensor:
    if isinstance(pooled, tuple):
        pooled = pooled[0]
    # A pipeline hands over a promise of a KeyedTensor, which is neither a KeyedTensor nor a tensor.
    return pooled if isinstance(pooled, torch.Tensor) else pooled.values()
