"""From logits to what a model returns: predictions of the tasks, calibrated ones, and the fused score."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.modules.calibration import Calibration
from mtcl_torchrec.modules.embeddings import pooled_by_key, single_value
from mtcl_torchrec.modules.fusion import RowContext, fuse
from mtcl_torchrec.modules.heads import in_unit_interval, prediction
from mtcl_torchrec.modules.losses import Logits
from mtcl_torchrec.schema import Task, nearest


class FusedOutput(nn.Module):
    """Logits to predictions, calibrated ones where there is a `calibration`, and predictions to the fused score.

    Args:
        tasks: what is predicted.
        fused_score: see `mtcl_torchrec.modules.fusion`; None: no ``"score"``.
        item_classes: what `item_classes` found.
        dims: key -> width of each pooled embedding, for a fused score that depends on them.
        calibration: None where predictions stay as they are; may be set later, too.

    Example:
        >>> from mtcl_torchrec.modules.fusion import WeightedMean
        >>> score = WeightedMean({"click": 1, "like": 3})
        >>> output = FusedOutput([Task.binary("click"), Task.binary("like")], score, {}, {})
        >>> none = torch.empty(0, dtype=torch.int64)
        >>> ids = KeyedJaggedTensor([], values=none, lengths=none)
        >>> logits = {"click": torch.tensor([0.0]), "like": torch.tensor([-2.0])}
        >>> {name: round(p.item(), 3) for name, p in output(logits, torch.empty(1, 0), ids, torch.empty(1, 0)).items()}
        {'click': 0.5, 'like': 0.119, 'score': 0.214}
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        fused_score: nn.Module | None,
        item_classes: Mapping[str, str],
        dims: Mapping[str, int],
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        self.dims = dict(dims)
        self.calibration = calibration
        self.tasks = {task.name: task for task in tasks}
        self.fused_score = fused_score
        self.item_classes = dict(item_classes)

    def forward(
        self,
        logits: Logits,
        dense_features: torch.Tensor,
        sparse_features: KeyedJaggedTensor,
        pooled: Any,
        request: torch.Tensor | None = None,
        detached: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Each task's prediction, chains' conditional ones, and with a fused score ``"score"`` (B,) in [0, 1].

        Args:
            logits: what the tower returned.
            dense_features: (B, D), for a fused score that depends on them.
            sparse_features: the candidates, for the class of each in a multiclass task.
            pooled: the pooled embeddings, for a fused score that depends on them.
            request: (B,) int64, for a fused score that compares the candidates of a request; None: one request.
            detached: no gradient reaches the logits.
        """
        if detached:
            logits = {name: value.detach() for name, value in logits.items()}
        out = {name: prediction(task, logits[name].float()) for name, task in self.tasks.items()}
        for task in self.tasks.values():
            if task.conditional_name is not None:
                out[task.conditional_name] = torch.sigmoid(logits[task.conditional_name].float())
        if self.calibration is not None:
            out = self.calibration(out, sparse_features)
        if self.fused_score is not None:
            rows = RowContext(dense_features, self._embeddings(pooled), request)
            out["score"] = fuse(self.fused_score, self.parts(out, sparse_features), rows)
        return out

    def _embeddings(self, pooled: Any) -> dict[str, torch.Tensor]:
        if not getattr(self.fused_score, "needs_context", False):
            return {}
        return {key: embedding.detach() for key, embedding in pooled_by_key(pooled, self.dims).items()}

    def parts(
        self, predictions: Mapping[str, torch.Tensor], sparse_features: KeyedJaggedTensor
    ) -> dict[str, torch.Tensor]:
        """What each task contributes to the score: (B,) in [0, 1] by task."""
        parts = {}
        for name, task in self.tasks.items():
            feature = self.item_classes.get(name)
            item_class = None if feature is None else single_value(sparse_features, feature)
            if task.kind == "regression" and self.calibration is not None:
                parts[name] = self.calibration.unit_interval(task, predictions[name])
            else:
                parts[name] = in_unit_interval(task, predictions[name], item_class)
        return parts


def item_classes(tasks: Sequence[Task], features: set[str], fused_score: nn.Module | None) -> dict[str, str]:
    """Multiclass task -> the sparse feature that holds the item's own class, of those that have one.

    Args:
        features: the sparse features that the model looks up.
        fused_score: warned of a task that enters it without such a feature.

    Raises:
        ValueError: a task names a feature that the model does not look up.

    Example:
        >>> taste = Task.multiclass("taste", num_classes=18, item_class="category")
        >>> item_classes([taste, Task.binary("click")], {"category", "user"}, None)
        {'taste': 'category'}
    """
    found = {}
    for task in tasks:
        if task.kind != "multiclass":
            continue
        if task.item_class is not None and task.item_class not in features:
            raise ValueError(
                f"task {task.name!r}: item_class {task.item_class!r} is no sparse feature"
                f"{nearest(task.item_class, features)}"
            )
        feature = task.item_class or (task.name if task.name in features else None)
        if feature is not None:
            found[task.name] = feature
        elif task.name in getattr(fused_score, "tasks", ()):
            warnings.warn(
                f"multiclass task {task.name!r} enters the fused score as the probability of its most probable class; "
                "name the sparse feature that holds the item's own class with Task.multiclass(..., item_class=...)",
                stacklevel=3,
            )
    return found
