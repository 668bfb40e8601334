"""Biased matrix factorisation in plain PyTorch: the collaborative filter that fits the label itself.

    logit(u, i) = b + b_u + b_i + ⟨p_u, q_i⟩

(Koren, Bell and Volinsky, *Matrix Factorization Techniques for Recommender Systems*, Computer 2009, eq. 4 and 5), with
the log-loss of a label in place of the squared error of a rating, and λ_U(‖p_u‖² + b_u²) + λ_I(‖q_i‖² + b_i²) added for
each row, so that a rare id is shrunk more than a frequent one.  Users and items that the training rows do not have keep
p = 0 and b = 0.  Nothing but ids and labels is read, and nothing of the package's own networks is used.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import loguniform
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.baselines.rows import BaselineData, BaselineRows
from mtcl_torchrec.baselines.search import Found, Predictions, Settings, candidates, search
from mtcl_torchrec.evaluation.metrics import auc
from mtcl_torchrec.schema import Task

USUAL: Settings = {"factors": 32, "l2_user": 0.02, "l2_item": 0.02, "lr": 0.005}
SPACE = {
    "factors": [8, 16, 32, 64],
    "l2_user": loguniform(0.003, 0.3),
    "l2_item": loguniform(0.003, 0.3),
    "lr": loguniform(0.001, 0.02),
}
BATCH, EPOCHS, PATIENCE = 2048, 40, 2


def factorised(data: BaselineData, task: Task, *, trials: int, seed: int) -> Found:
    """Search for the settings that rank the validation split best, by random search as all baselines do.

    Args:
        trials: how many settings are tried, the usual one included.
    """
    known = data.held_out["val"].labels[:, data.column(task)]

    def attempt(settings: Settings) -> tuple[Predictions, float]:
        predicted = fit(data, task, settings, seed=seed)
        return predicted, auc(known, predicted["val"][task.name])

    return search(candidates(USUAL, SPACE, trials, seed), attempt)


def fit(data: BaselineData, task: Task, settings: Settings, *, seed: int = 0) -> Predictions:
    """Train until the AUC of the validation split has not risen for `PATIENCE` epochs; the best epoch's predictions.

    Args:
        settings: ``factors``, ``l2_user``, ``l2_item``, ``lr`` of Adam, which falls linearly over `EPOCHS`.
        seed: of the first factors and the order of the rows.

    Raises:
        FloatingPointError: training diverged.
    """
    column, draw = data.column(task), torch.Generator().manual_seed(seed)
    users, items, labels = _triples(data.train, column)
    model = Factorisation(data.num_users, data.num_items, settings["factors"], float(labels.mean()), draw)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], fused=True)
    held_out = {split: _triples(rows, column, every=True) for split, rows in data.held_out.items()}
    best, waited, predicted = -math.inf, 0, Predictions()
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * (1 - epoch / EPOCHS)
        for rows in torch.randperm(len(labels), generator=draw).split(BATCH):
            p, q = F.embedding(users[rows], model.users), F.embedding(items[rows], model.items)
            penalty = settings["l2_user"] * p.square().sum(1) + settings["l2_item"] * q.square().sum(1)
            loss = F.binary_cross_entropy_with_logits(model(p, q), labels[rows]) + penalty.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"epoch {epoch + 1}: the loss is not finite")
        now = {split: {task.name: model.probabilities(*of[:2])} for split, of in held_out.items()}
        reached = auc(data.held_out["val"].labels[:, column], now["val"][task.name])
        if reached > best:
            best, waited, predicted = reached, 0, now
        elif (waited := waited + 1) >= PATIENCE:
            break
    return predicted


class Factorisation(nn.Module):
    """Rows of factors, with the bias in the last column; the last row of each, for who is not known, stays zero.

    Args:
        base_rate: of the label; the logit starts from it.

    Example:
        >>> model = Factorisation(3, 5, 4, 0.5, torch.Generator().manual_seed(0))
        >>> model(model.users[torch.tensor([0, -1])], model.items[torch.tensor([2, -1])]).shape
        torch.Size([2])
    """

    def __init__(self, users: int, items: int, factors: int, base_rate: float, draw: torch.Generator) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(base_rate).logit())
        self.users, self.items = (nn.Parameter(_start(rows, factors, draw)) for rows in (users, items))

    def forward(self, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """(B,) logits of rows of users and items, (B, factors + 1) each."""
        return self.bias + p[:, -1] + q[:, -1] + (p[:, :-1] * q[:, :-1]).sum(1)

    @torch.no_grad()
    def probabilities(self, users: torch.Tensor, items: torch.Tensor) -> np.ndarray:
        """(N,) float64 in [0, 1]; a number of -1 is somebody new."""
        parts = zip(users.split(65_536), items.split(65_536), strict=True)
        return torch.cat([self(self.users[u], self.items[i]).sigmoid() for u, i in parts]).double().numpy()


def _start(rows: int, factors: int, draw: torch.Generator) -> torch.Tensor:
    start = torch.randn(rows + 1, factors + 1, generator=draw) * 0.1 / math.sqrt(factors)
    start[:, -1] = 0.0
    start[-1] = 0.0
    return start


def _triples(
    rows: BaselineRows, column: int, *, every: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users, items and labels of the rows that say something of this: both known, and labelled.  Or of every row."""
    labels = rows.labels[:, column]
    kept = np.full(len(rows), True) if every else (rows.users >= 0) & (rows.items >= 0) & ~np.isnan(labels)
    return tuple(torch.from_numpy(of[kept]) for of in (rows.users, rows.items, labels))  # type: ignore[return-value]
