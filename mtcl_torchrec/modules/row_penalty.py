"""The L2 of embedding tables as a prior: every row counts once, however often it is looked up.

What matrix factorisation adds to each training row (``l2_embedding``) shrinks a frequent id as much as a rare one, as
data and penalty grow together.  A Gaussian prior of the rows shrinks each by the same λ‖w‖², which a rare id feels and
a frequent one hardly does.  Steps that touch only the rows of their batch give that on average where each id that is
looked up weighs one over its frequency: the mini-batch aware regularisation of Zhou et al., *Deep Interest Network for
Click-Through Rate Prediction*, KDD 2018, eq. 6.  Frequencies are counted while training, over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from mtcl_torchrec.modules.gathering import RankGather
from mtcl_torchrec.modules.sampled_softmax import Popularity, first_values


class RowPenalty(nn.Module):
    """Σ_f λ_f · mean over the rows of the table of ‖row‖², from the rows that a batch looks up.

    Args:
        weights: feature -> λ; features of one id a row.
        rows: feature -> rows of its table.
        process_group: the ranks that share a global batch; None is the default group.

    Example:
        >>> penalty = RowPenalty({"user": 0.5}, {"user": 4})
        >>> ids = KeyedJaggedTensor(["user"], torch.tensor([1, 1, 1, 2]), lengths=torch.ones(4, dtype=torch.int64))
        >>> penalty(ids)["user"]  # 0.5 · 4 rows met / (4 rows of the table · 3 or 1 times that this one was met)
        tensor([0.1667, 0.1667, 0.1667, 0.5000])
    """

    def __init__(self, weights: Mapping[str, float], rows: Mapping[str, int], process_group: Any = None) -> None:
        super().__init__()
        self.weights = dict(weights)
        # A list, not a dict by name: a feature may be called what an attribute of ModuleDict is called.
        self.popularity = nn.ModuleList(Popularity(rows[feature]) for feature in self.weights)
        self.gather = RankGather(process_group)
        self._counted: list[torch.Tensor] = []  # the ids of the newest batch, of all ranks

    def forward(self, sparse_features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Feature -> (B,) what ‖embedding‖² of each row is multiplied with before it is averaged over rows.

        While training, the ids of the batch are counted; every rank calls it.
        """
        self.gather.agree(sparse_features.stride())
        self._counted, found = [], {}
        popularity: Any  # of modules in a list, nothing more is known
        for (feature, weight), popularity in zip(self.weights.items(), self.popularity, strict=True):
            ids = first_values(sparse_features, feature)
            everywhere = self.gather(ids)
            met = popularity(everywhere)[self.gather.first :][: len(ids)]
            self._counted += [everywhere] if self.training else []
            # Of an id that is not there, the embedding is 0; of one that was never counted, once is the least.
            found[feature] = weight * popularity.total / (len(popularity.counts) * met.clamp(min=1))
        return found

    def take_back(self, skipped: torch.Tensor) -> None:
        """Uncount the newest batch where `skipped`, () bool, is True: what is skipped changes nothing."""
        popularity: Any
        for popularity, ids in zip(self.popularity, self._counted, strict=False):
            popularity.take_back(ids, skipped)
        self._counted = []
