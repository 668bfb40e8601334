"""What a task's logits mean: its loss, its prediction, and its part of the fused score in [0, 1]."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mtcl_torchrec.modules.rare import binary_loss
from mtcl_torchrec.schema import Task


def loss_per_row(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The task's loss of each row, not reduced, in float32.

    Args:
        task: binary (BCE with logits; `mtcl_torchrec.modules.rare` says what rare tasks add), multiclass
            (cross-entropy) or regression (MSE or Huber of the standardised label).
        logits: (B,), or (B, num_classes) for a multiclass task.
        labels: (B,) float, no NaN.

    Returns:
        (B,) float32.

    Example:
        >>> loss_per_row(Task.binary("click"), torch.zeros(2), torch.tensor([0.0, 1.0]))
        tensor([0.6931, 0.6931])
    """
    logits = logits.float()
    if task.kind == "binary":
        return binary_loss(task, logits, labels)
    if task.kind == "multiclass":
        return F.cross_entropy(logits, labels.long(), reduction="none")
    standardised = (labels - (task.mean or 0.0)) / (task.std or 1.0)
    if task.loss == "huber":
        return F.huber_loss(logits, standardised, reduction="none", delta=task.huber_delta)
    return F.mse_loss(logits, standardised, reduction="none")


def prediction(task: Task, logits: torch.Tensor) -> torch.Tensor:
    """Logits as what the task predicts: a probability (B,), class probabilities (B, C), or a value (B,) in the
    label's unit.

    Example:
        >>> prediction(Task.regression("watch_time", mean=60.0, std=20.0), torch.tensor([0.0, 1.0]))
        tensor([60., 80.])
    """
    if task.kind == "binary":
        return torch.sigmoid(logits)
    if task.kind == "multiclass":
        return torch.softmax(logits, dim=-1)
    return (task.mean or 0.0) + (task.std or 1.0) * logits


def in_unit_interval(task: Task, predicted: torch.Tensor, item_class: torch.Tensor | None = None) -> torch.Tensor:
    """A prediction as a number in [0, 1] that grows with it, for the fused score.

    A probability stays what it is; a multiclass task gives the probability of the item's own class; a regression
    gives the logistic function of the standardised value.

    Args:
        predicted: what `prediction` returned.
        item_class: (B,) int64 class of each candidate, or None: the most probable class then.  A class outside
            [0, num_classes) has probability 0.

    Returns:
        (B,) in [0, 1].
    """
    if task.kind == "binary":
        return predicted
    if task.kind == "multiclass":
        if item_class is None:
            return predicted.amax(dim=-1)
        known = (item_class >= 0) & (item_class < predicted.shape[1])
        picked = predicted.gather(1, torch.where(known, item_class, 0).unsqueeze(1)).squeeze(1)
        return picked * known
    return torch.sigmoid((predicted - (task.mean or 0.0)) / (task.std or 1.0))
