"""Fused scores with parameters of their own, trained on held-out predictions after the model's training.

The parts are what the model gives to a fused score: calibrated, where the run is.  (In joint training, `fusion.train`,
the same kinds learn from predictions before calibration, which is only fitted afterwards.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from mtcl_torchrec.fusing.combiners import Combiner, Setting, Weights
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.weights import NoWeightsError, precision_of_rows
from mtcl_torchrec.modules.fusion import RowContext, WeightedMean, fuse

_INNER_FOLDS = 5  # one of which says when to stop
_EPOCHS, _PATIENCE = 60, 6
_BATCH_ROWS = 4096
_LR_TO_START, _LR, _DECAY = 0.05, 0.01, 1e-4
_ALIKE = 0.9995  # a correlation with the start from which on it is one


def train_setting(
    combiner: Combiner, weights: Weights, rows: HeldOut, reward: np.ndarray, *, within: bool = True, seed: int = 0
) -> Setting:
    """A combiner that learns, built of its weights and trained until rows that it does not learn from gain no more:
    first towards the value model of these weights, which has no noise, then towards the reward.

    What is raised is the correlation of the score with the reward within requests: the best score by that measure is
    the expected reward, or any rising straight line of it, so that neither the score's level nor the values' unit
    matters.  Rows count by one over the variance of their reward, see `precision_of_rows`.  A fifth of the users (or
    requests) says when to stop, and what was best by them is kept, which may be the start.

    Args:
        weights: of the value model that it starts as.
        reward: (N,) what each row brought; NaN is left out.
        within: False counts what is between requests, too; for a target over all rows.
        seed: of the parameters to begin with, and of the batches: equal arguments give equal parameters.

    Raises:
        NoWeightsError: there are fewer than two users (or requests).
    """
    known = ~np.isnan(reward)
    if not known.any() or _groups(rows.take(known)) < 2:
        raise NoWeightsError(f"{combiner.name}: fewer than two users (or requests) of known reward to learn from")
    rows, reward = rows.take(known), reward[known]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fused_score = combiner.build(weights)
    fold = rows.folds(min(_INNER_FOLDS, _groups(rows)), seed=seed)
    x = np.stack([rows.parts[task] for task in weights], axis=1)
    within = within and bool((rows.rows_of_requests > 1).any())
    draw = torch.Generator().manual_seed(seed)
    start = rows.scores(WeightedMean(weights))
    _train(fused_score, _Rows(rows, start, np.ones(len(rows)), within), fold == 0, draw, lr=_LR_TO_START)
    _train(fused_score, _Rows(rows, reward, precision_of_rows(x, reward), within), fold == 0, draw, lr=_LR)
    return Setting(combiner, weights, fused_score.eval().requires_grad_(False))


def _groups(rows: HeldOut) -> int:
    return len(np.unique(rows.request if rows.user is None else rows.user))


class _Rows:
    """Held-out rows as tensors, of which some are taken at a time."""

    def __init__(self, rows: HeldOut, reward: np.ndarray, precision: np.ndarray, within: bool) -> None:
        self.parts, self.context = rows.tensors
        self.reward = torch.from_numpy(reward / max(float(np.std(reward)), 1e-12)).float()
        self.precision = torch.from_numpy(precision).float()
        self.request = torch.from_numpy(rows.numbers) if within else torch.zeros(len(rows), dtype=torch.int64)
        self.requests, self.count = rows.numbers, rows.requests

    def agreement(self, fused_score: nn.Module, index: torch.Tensor) -> torch.Tensor:
        """() the weighted correlation of score and reward over some rows, each less its request's mean."""
        context = RowContext(
            self.context.dense_features[index], {n: e[index] for n, e in self.context.embeddings.items()}
        )
        score = fuse(fused_score, {name: part[index] for name, part in self.parts.items()}, context)
        weight, request = self.precision[index], self.request[index]
        s, r = (self._centred(values, weight, request) for values in (score, self.reward[index]))
        return (weight * s * r).sum() / ((weight * s * s).sum() * (weight * r * r).sum() + 1e-20).sqrt()

    def _centred(self, values: torch.Tensor, weight: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
        """Values (B,) less the weighted mean of their request."""
        total = torch.zeros(self.count).index_add(0, request, weight * values)
        return values - (total / torch.zeros(self.count).index_add(0, request, weight))[request]

    def batches(self, mask: np.ndarray, draw: torch.Generator) -> Iterator[torch.Tensor]:
        """Row numbers of batches of whole requests, in random order."""
        rows = np.flatnonzero(mask)
        keys, numbers = np.unique(self.requests[rows], return_inverse=True)
        count = max(1, round(len(rows) / _BATCH_ROWS))
        of_request = torch.randperm(len(keys), generator=draw).numpy() % count
        batch = of_request[numbers]
        for number in range(count):
            yield torch.from_numpy(rows[batch == number])


def _train(fused_score: nn.Module, data: _Rows, judges: np.ndarray, draw: torch.Generator, *, lr: float) -> None:
    optimizer = torch.optim.Adam(fused_score.parameters(), lr=lr, weight_decay=_DECAY)
    judging = torch.from_numpy(np.flatnonzero(judges))

    def judged() -> float:
        with torch.no_grad():
            return float(data.agreement(fused_score, judging))

    best, kept, without = judged(), copy.deepcopy(fused_score.state_dict()), 0
    for _ in range(_EPOCHS):
        if best > _ALIKE:
            break
        for index in data.batches(~judges, draw):
            optimizer.zero_grad()
            (-data.agreement(fused_score, index)).backward()
            optimizer.step()
        if (now := judged()) > best:
            best, kept, without = now, copy.deepcopy(fused_score.state_dict()), 0
        elif (without := without + 1) >= _PATIENCE:
            break
    fused_score.load_state_dict(kept)
