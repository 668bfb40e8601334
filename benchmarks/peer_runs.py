"""What every contender of `peers.py` has: the optimizers, and what is told of its run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

TABLE_LR, DENSE_LR, EPS = 0.02, 1e-3, 1e-8


@dataclass
class Stamps:
    """When each step was done: seconds on the wall, and of processor time of all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def note(self) -> None:
        """A step is done."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


@dataclass
class Ran:
    """What a contender did.

    Args:
        predictions: (N, T) probabilities of the validation rows.
        table_parameters, dense_parameters: how many it has trained.
        ready_s: until the first step could begin: reading, building the model.
        read_s: of these, reading what is read before training.
        stamps: when each step was done.
    """

    predictions: np.ndarray
    table_parameters: int
    dense_parameters: int
    ready_s: float
    read_s: float
    stamps: Stamps


class Adagrads:
    """Adagrad on the tables and Adam on everything else, as one optimizer that notes when it has stepped.

    Both in the fastest form that torch has: fused into one pass, but for sparse gradients, which have none.

    Args:
        module: whose parameters of so many rows are tables.
        sparse: the gradients of tables are.
    """

    def __init__(self, module: nn.Module, table_rows: int, *, sparse: bool = False) -> None:
        tables, dense = [], []
        for parameter in module.parameters():
            (tables if parameter.dim() == 2 and len(parameter) == table_rows else dense).append(parameter)
        self.tables, self.dense = sum(p.numel() for p in tables), sum(p.numel() for p in dense)
        self.parts = [
            torch.optim.Adagrad(tables, lr=TABLE_LR, eps=EPS, fused=not sparse),
            torch.optim.Adam(dense, lr=DENSE_LR, fused=True),
        ]
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.stamps = Stamps()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()
        self.stamps.note()
