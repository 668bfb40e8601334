"""An encoder of somebody else's, for tests that name it by import path."""

from torch import nn


class Newest(nn.Module):
    """The mean of the newest three positions."""

    def __init__(self, number: int = 3) -> None:
        super().__init__()
        self.number = number

    def build(self, embedding_dim, max_length):
        self.out_features = embedding_dim

    def forward(self, history):
        x = history.padded()
        place = (history.lengths.unsqueeze(1) - 1).clamp(min=0)
        total = 0.0
        for back in range(self.number):
            at = (place - back).clamp(min=0).unsqueeze(2).expand(-1, 1, x.shape[2])
            total = total + x.gather(1, at).squeeze(1)
        return total / self.number
