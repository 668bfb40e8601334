"""What a task's logits mean: its loss, its prediction, its part of the fused score in [0, 1], and where they start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from mtcl_torchrec.modules.rare import binary_loss
from mtcl_torchrec.schema import Task, chain_links, nearest


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


def starting_logits(
    tasks: Sequence[Task], base_rates: Mapping[str, float | Sequence[float]]
) -> dict[str, torch.Tensor]:
    """Where the last bias of heads starts, so that an untrained model predicts about how often each event happens.

    The log-odds of a binary task (Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017, section 3.3), given
    the parent's event where a chain's head predicts that; the log of each class's share of a multiclass task.

    Args:
        tasks: all tasks.
        base_rates: task -> probability of its event over all rows, or the share of each class.

    Returns:
        Task name -> (1,), or (num_classes,), float32; of the tasks in `base_rates`.

    Raises:
        ValueError: an unknown task, or one that has no rate; a rate outside (0, 1); shares that are not one for each
            class, or do not add up to 1; an event of a chain without the rate of its parent, or not below it.

    Example:
        >>> starting_logits([Task.binary("click"), Task.binary("buy", after="click")], {"click": 0.5, "buy": 0.1})
        {'click': tensor([0.]), 'buy': tensor([-1.3863])}
    """
    by_name = {task.name: task for task in tasks}
    for name, given in base_rates.items():
        if name not in by_name:
            raise ValueError(f"base_rates: no task {name!r}{nearest(name, by_name)}")
        _check_rates(by_name[name], [given] if isinstance(given, int | float) else list(given))
    parents = {tasks[child].name: tasks[parent].name for child, parent in chain_links(tasks)}
    starts = {}
    for name, given in base_rates.items():
        if not isinstance(given, int | float):
            starts[name] = torch.tensor(given, dtype=torch.float64).log().float()
            continue
        odds_of = float(given)
        if name in parents:
            parent = base_rates.get(parents[name])
            if not isinstance(parent, int | float):
                raise ValueError(f"base_rates: {name!r} comes after {parents[name]!r}, whose rate is needed, too")
            if given >= parent:
                raise ValueError(
                    f"base_rates: {name!r} ({given:g}) cannot happen without {parents[name]!r} ({parent:g}), so its "
                    "rate is the lower one"
                )
            odds_of = given / parent if by_name[name].conditional_name else given
        starts[name] = torch.tensor([math.log(odds_of) - math.log1p(-odds_of)])
    return starts


def _check_rates(task: Task, rates: Sequence[float]) -> None:
    if task.kind == "regression":
        raise ValueError(f"base_rates: {task.name!r} is a regression task: it starts at its label's mean")
    wanted = 1 if task.kind == "binary" else task.out_features
    if len(rates) != wanted:
        raise ValueError(f"base_rates: {task.name!r} needs {wanted} rate{'s' * (wanted > 1)}, not {len(rates)}")
    if wrong := [rate for rate in rates if not 0 < rate < 1]:
        raise ValueError(f"base_rates: {task.name!r}: a rate lies between 0 and 1, and {wrong[0]:g} does not")
    if wanted > 1 and not math.isclose(sum(rates), 1, abs_tol=1e-3):
        raise ValueError(f"base_rates: {task.name!r}: the shares of its classes add up to {sum(rates):g}, not to 1")
