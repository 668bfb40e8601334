"""Trunks of somebody else's, for tests that name them by import path."""

import torch
from torch import nn

A_NUMBER = 3


class Factors(nn.Module):
    """A linear map, and a factor for each task and column."""

    def __init__(self, width: int = 8, wrong: bool = False) -> None:
        super().__init__()
        self.out_features, self.wrong = width, wrong

    def build(self, in_features, num_tasks):
        self.linear = nn.Linear(in_features, self.out_features)
        self.factors = nn.Parameter(torch.ones(num_tasks, self.out_features))

    def forward(self, x, tasks):
        out = torch.relu(self.linear(x)).unsqueeze(1) * self.factors[list(tasks)]
        return out[:, :1] if self.wrong else out


class Informed(Factors):
    """Wants to know what the tasks are."""

    def build(self, in_features, num_tasks, inputs):
        super().build(in_features, num_tasks)
        self.names = [task.name for task in inputs.tasks]
        self.width = sum(block.width for block in inputs.blocks)


class NoWidth(nn.Module):
    def forward(self, x, tasks):
        return x


class NoForward(nn.Module):
    out_features = 8


def not_a_module():
    return 3
