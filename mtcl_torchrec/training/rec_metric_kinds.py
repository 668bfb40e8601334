"""The metrics that TorchRec lacks, or has with a catch, as `RecMetric`s of its `RecMetricModule`."""

from __future__ import annotations

from typing import Any

import torch
from torchrec.metrics.auc import AUCMetricComputation
from torchrec.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix
from torchrec.metrics.rec_metric import MetricComputationReport, RecMetric, RecMetricComputation

GROUPS = "groups"  # key of the rows' groups among what `RecMetricModule.update` is given
_ROWS = ("predictions", "labels", "weights")


def grouped_auc(
    predictions: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """AUC within each group, averaged with the group's number of rows as weight; ties count half.

    With one group for all, it is the AUC.  As `mtcl_torchrec.evaluation.metrics.gauc` (Zhou et al., KDD 2018, eq. 7),
    on the device; it waits for it.

    Args:
        predictions: (N,) float32, at least 0.
        labels: (N,) 0 or 1.
        weights: (N,) 0 for rows that do not count.
        groups: (N,) int64 keys below 2³¹, negative for rows of no group, which do not count either.

    Returns:
        () float64, NaN where no group has both classes.

    Example:
        >>> p, y = torch.tensor([0.1, 0.2, 0.1, 0.9, 0.8]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
        >>> grouped_auc(p, y, torch.ones(5), torch.tensor([1, 1, 2, 3, 3]))
        tensor(0.5000, dtype=torch.float64)
    """
    counts = (weights > 0) & (groups >= 0)
    # One sort by group, then prediction: the bits of floats of at least 0 are in the order of the floats.
    bits = predictions.float().contiguous().view(torch.int32).long()
    key = torch.sort((((groups << 31) | bits) << 1 | labels.long())[counts]).values
    if len(key) == 0:
        return torch.full((), float("nan"), dtype=torch.float64, device=predictions.device)
    y, tied, group = (key & 1).double(), key >> 1, key >> 32
    # Runs of equal predictions in one group, then groups: rows and positives of each.
    run = torch.cat([key.new_zeros(1), (tied[1:] != tied[:-1]).long().cumsum(0)])
    rows, positives = torch.bincount(run).double(), torch.bincount(run, weights=y)
    first = torch.cat([rows.new_zeros(1, dtype=torch.int64), rows.long().cumsum(0)[:-1]])
    of = torch.unique_consecutive(group[first], return_inverse=True)[1]
    negatives = rows - positives
    before = negatives.cumsum(0) - negatives
    won = torch.bincount(of, weights=positives * (before + negatives / 2))
    rows, positives, negatives = (torch.bincount(of, weights=w) for w in (rows, positives, negatives))
    won = won - positives * (negatives.cumsum(0) - negatives)
    pairs = positives * negatives
    weight = torch.where(pairs > 0, rows, 0.0)
    return (weight * won / pairs.clamp(min=1)).sum() / weight.sum()


class _WindowAUC(AUCMetricComputation):
    """TorchRec's window of rows and its exchange between ranks, with the rows' groups beside them."""

    def __init__(self, *args: Any, grouped: bool = False, overall: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grouped, self._overall = grouped, overall
        if grouped:
            self._add_state(
                GROUPS, [], add_window_state=False, dist_reduce_fx=lambda of_ranks: [torch.cat(of_ranks, dim=-1)]
            )
            self._init_groups()

    def _init_groups(self) -> None:
        # As long as what `_init_states` begins with, a row of weight 0.
        getattr(self, GROUPS).append(torch.full((1, 1), -1, dtype=torch.int64, device=self.device))

    def update(self, *, predictions: Any, labels: Any, weights: Any, **kwargs: Any) -> None:
        """Take rows in, and let the oldest go."""
        first = self._num_samples == 0
        super().update(predictions=predictions, labels=labels, weights=weights, **kwargs)
        if not self._grouped:
            return
        held = getattr(self, GROUPS)
        if first:
            held.clear()
        held.append(kwargs["required_inputs"][GROUPS].reshape(1, -1))
        over = sum(t.shape[-1] for t in held) - sum(t.shape[-1] for t in self.predictions)
        while over > 0:
            cut = min(over, held[0].shape[-1])
            held[0] = held[0][:, cut:]
            over -= cut
            if held[0].shape[-1] == 0:
                held.pop(0)

    def _compute(self) -> list[MetricComputationReport]:
        predictions, labels, weights = (torch.cat(getattr(self, name), dim=-1) for name in _ROWS)

        def report(name: MetricName, groups: torch.Tensor) -> MetricComputationReport:
            of_tasks = [grouped_auc(*of, groups) for of in zip(predictions, labels, weights, strict=True)]
            return MetricComputationReport(name=name, metric_prefix=MetricPrefix.WINDOW, value=torch.stack(of_tasks))

        reports = []
        if self._overall:
            everyone = torch.zeros(predictions.shape[-1], dtype=torch.int64, device=predictions.device)
            reports.append(report(MetricName.AUC, everyone))
        if self._grouped:
            keys = torch.cat(getattr(self, GROUPS), dim=-1)[0]
            dense = torch.unique(keys, return_inverse=True)[1]
            reports.append(report(MetricName.GAUC, torch.where(keys >= 0, dense, -1)))
        return reports

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        if self._grouped:
            self._init_groups()


class WindowAUC(RecMetric):
    """AUC and AUC within groups over the newest rows of all ranks.

    TorchRec's ``AUCMetric`` breaks ties as its sort does, knows no groups of unequal size, and fails with groups on two
    ranks (1.8).

    Args:
        grouped: whether to give the AUC within groups, whose keys `RecMetricModule.update` is then given as `GROUPS`.
        overall: whether to give the AUC of all rows.
    """

    _namespace: MetricNamespace = MetricNamespace.AUC
    _computation_class: type[RecMetricComputation] = _WindowAUC

    def __init__(self, *, grouped: bool = False, overall: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs, grouped=grouped, overall=overall)
        if grouped:
            self._required_inputs.add(GROUPS)


def of_own_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What multiclass metrics need of a row, in place of all its classes.

    Args:
        logits: (B, C).
        labels: (B,) float; rows without a class in [0, C), such as NaN, give anything.

    Returns:
        (B, 2) float32: the log-probability of the row's class, and 1 where no other is as probable.

    Example:
        >>> of_own_class(torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([0.0, 0.0]))
        tensor([[-0.6931,  0.0000],
                [ 0.0000,  1.0000]])
    """
    logits = logits.float()
    own = logits.gather(1, torch.nan_to_num(labels).long().clamp(0, logits.shape[1] - 1).unsqueeze(1))
    return torch.stack([own.squeeze(1) - logits.logsumexp(1), ((logits >= own).sum(1) <= 1).float()], 1)


class _Multiclass(RecMetricComputation):
    def __init__(self, *args: Any, num_classes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, width in (("sums", 2), ("classes", num_classes)):
            zeros = torch.zeros(1, width, dtype=torch.double)
            self._add_state(name, zeros, add_window_state=True, dist_reduce_fx="sum", persistent=False)

    def update(self, *, predictions: Any, labels: Any, weights: Any, **kwargs: Any) -> None:
        """Take in the rows of one task.

        Args:
            predictions: (1, B, 2) from `of_own_class`.
            labels, weights: (1, B).
        """
        classes = torch.zeros_like(self.classes).index_add_(1, labels[0].long(), weights)
        states = {"sums": (weights.unsqueeze(2) * predictions).sum(1), "classes": classes}
        for name, value in states.items():
            state = getattr(self, name)
            state += value
            self._aggregate_window_state(name, value, labels.shape[-1])

    def _compute(self) -> list[MetricComputationReport]:
        (gained, hits), classes = self.get_window_state("sums")[0], self.get_window_state("classes")[0]
        rows = classes.sum()
        shares = classes / rows
        entropy = torch.special.entr(shares).sum()
        found = {
            MetricName.NE: -gained / rows / torch.where(entropy > 0, entropy, float("nan")),
            MetricName.ACCURACY: hits / rows,
        }
        return [
            MetricComputationReport(name=name, metric_prefix=MetricPrefix.WINDOW, value=value.reshape(1))
            for name, value in found.items()
        ]


class MulticlassMetric(RecMetric):
    """Normalised entropy (cross-entropy over that of always predicting the classes' shares) and top-1 accuracy of one
    multiclass task; NaN without rows.

    Args:
        num_classes: C.
    """

    _namespace: MetricNamespace = MetricNamespace.ACCURACY
    _computation_class: type[RecMetricComputation] = _Multiclass

    def __init__(self, *, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs, num_classes=num_classes)
