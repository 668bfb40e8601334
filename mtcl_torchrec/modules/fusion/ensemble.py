"""Several trained models as one: the mean of what they say, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class DeepEnsemble(nn.Module):
    """The mean over M trained models of each prediction and of the score, and the spread of their scores.

    (Lakshminarayanan et al., *Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles*, NeurIPS
    2017: the same model trained from other random values.)  It is called as an `MTCL` is.

    Args:
        members: trained `MTCL` models that predict the same tasks from the same inputs.

    Raises:
        ValueError: no member, or members with other tasks than the first.

    Example:
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from mtcl_torchrec import MTCL, SharedBottom, Task, WeightedMean
        >>> table = EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["item"])
        >>> ensemble = DeepEnsemble([
        ...     MTCL(EmbeddingBagCollection(tables=[table]), 0, SharedBottom([8]), [Task.binary("click")],
        ...          WeightedMean({"click": 1.0}))
        ...     for _ in range(3)
        ... ])
        >>> items = KeyedJaggedTensor(["item"], values=torch.arange(2), lengths=torch.ones(2, dtype=torch.int64))
        >>> out = ensemble(torch.empty(2, 0), items)
        >>> sorted(out), bool((out["score_std"] > 0).all())
        (['click', 'score', 'score_std'], True)
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs a member at least")
        self.members = nn.ModuleList(members)
        first: Any = members[0]
        self.tasks = tuple(first.tasks)
        for number, member in enumerate(members):
            of: Any = member
            if [(t.name, t.kind, t.num_classes) for t in of.tasks] != [
                (t.name, t.kind, t.num_classes) for t in self.tasks
            ]:
                raise ValueError(
                    f"member {number} of the ensemble predicts {[t.name for t in of.tasks]}, the first "
                    f"{[t.name for t in self.tasks]}"
                )

    @property
    def output(self) -> Any:
        """The first member's `FusedOutput`: how predictions become parts of a score."""
        first: Any = self.members[0]
        return first.output

    def forward(
        self, dense_features: torch.Tensor, sparse_features: KeyedJaggedTensor, request: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Predictions and scores of B rows.

        Args:
            dense_features, sparse_features, request: as of `MTCL`.

        Returns:
            What `MTCL` returns, as means over the members, and ``"score_std"`` (B,), the standard deviation of the
            members' scores, where all of them have one; 0 for one member.
        """
        outs = [member(dense_features, sparse_features, request) for member in self.members]
        shared = [name for name in outs[0] if all(name in out for out in outs)]
        found = {name: torch.stack([out[name] for out in outs]) for name in shared}
        mean = {name: values.mean(0) for name, values in found.items()}
        if "score" in found:
            mean["score_std"] = found["score"].std(0, correction=0)
        return mean
