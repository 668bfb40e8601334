"""A small causal transformer over a history."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.sequences.encoders import Encoder
from mtcl_torchrec.modules.sequences.history import History

BUCKETS = 64  # of time: more than any number of seconds has binary digits


class Bias(nn.Module):
    """What is added to the attention logits of position i to j ≤ i, for each of h heads: p(i - j) + t(bucket of the
    time from j to i), as in HSTU (Zhai et al., ICML 2024, relative attention bias).

    Ages are in buckets that double, so the time between two positions is that between the middles of their buckets.

    Args:
        heads: h.
        max_length: the most positions there are.
        times: whether there are ages.
    """

    between: torch.Tensor

    def __init__(self, heads: int, max_length: int, *, times: bool) -> None:
        super().__init__()
        self.of_place = nn.Parameter(torch.zeros(max_length, heads))
        self.of_time = nn.Parameter(torch.zeros(BUCKETS, heads)) if times else None
        self.register_buffer("between", _buckets_between(), persistent=False)

    def forward(
        self,
        places: torch.Tensor,
        length: int,
        ages: torch.Tensor | None = None,
        of_queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(b, h, q, L), -inf at later positions; b is 1 where it is the same for all rows.

        Args:
            places: (b, q) the place of each query.
            length: L.
            ages: (b, L) buckets, or None.
            of_queries: (b, q) buckets of the queries.
        """
        back = places.unsqueeze(2) - torch.arange(length, device=places.device)
        bias = F.embedding(back.clamp(min=0, max=self.of_place.shape[0] - 1), self.of_place)
        if self.of_time is not None and ages is not None and of_queries is not None:
            bias = bias + F.embedding(self.between[of_queries.unsqueeze(2), ages.unsqueeze(1)], self.of_time)
        return bias.masked_fill((back < 0).unsqueeze(3), -math.inf).permute(0, 3, 1, 2)


def _buckets_between() -> torch.Tensor:
    """(BUCKETS, BUCKETS) from the buckets of two ages, the newer first, to that of the time between them; 0 where one
    of them is not known."""
    bucket = torch.arange(BUCKETS, dtype=torch.float64)
    middle = torch.where(bucket > 0, 1.5 * 2 ** (bucket - 1) - 1, 0.0)
    apart = (middle.unsqueeze(0) - middle.unsqueeze(1)).clamp(min=0)
    found = (torch.log2(1 + apart).floor() + 1).clamp(max=BUCKETS - 1).long()
    unknown = (bucket == 0).unsqueeze(0) | (bucket == 0).unsqueeze(1)
    return torch.where(unknown, 0, found)


class Block(nn.Module):
    """Causal self-attention and a perceptron, each with a norm before and a residual around it."""

    def __init__(self, width: int, heads: int, max_length: int, dropout: float, *, times: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.bias = Bias(heads, max_length, times=times)

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        """(V, D) from (V, D), for every position."""
        read = self.before_attention(x)
        ages = [] if history.ages is None else [history.ages.unsqueeze(1).to(x.dtype)]
        seen = history.attend(self._all_to_all, self.query(read), self.key_value(read), *ages)
        return self._after(x, seen)

    def newest(self, x: torch.Tensor, history: History) -> torch.Tensor:
        """(B, D) what `forward` gives for the newest position of each row, which alone looks at the others then."""
        read = self.before_attention(x)
        keys = history.padded(self.key_value(read))
        place = (history.lengths - 1).clamp(min=0).unsqueeze(1)
        ages = of_newest = None
        if history.ages is not None:
            by_place = history.padded(history.ages.unsqueeze(1).to(x.dtype)).squeeze(2)
            ages = by_place.long()
            of_newest = ages.gather(1, place)
        bias = self.bias(place, keys.shape[1], ages, of_newest)
        seen = self._attention(self.query(history.last(read)).unsqueeze(1), keys, bias).squeeze(1)
        return self._after(history.last(x), seen)

    def _all_to_all(self, query: torch.Tensor, key_value: torch.Tensor, *ages: torch.Tensor) -> torch.Tensor:
        places = torch.arange(query.shape[1], device=query.device).unsqueeze(0)
        known = ages[0].squeeze(2).long() if ages else None
        return self._attention(query, key_value, self.bias(places, query.shape[1], known, known))

    def _attention(self, query: torch.Tensor, key_value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(b, q, D) from queries (b, q, D), keys and values (b, L, 2 D), and bias (b or 1, h, q, L)."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (query, *key_value.chunk(2, dim=2)))
        dropped = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropped)
        return seen.transpose(1, 2).flatten(2)

    def _after(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.out(seen), self.dropout, self.training)
        h = self.down(F.gelu(self.up(self.before_mlp(x))))
        return x + F.dropout(h, self.dropout, self.training)


class Transformer(Encoder):
    """A causal transformer over the positions, oldest first (Kang and McAuley, *SASRec*, ICDM 2018): the newest
    position's state.

    Where positions stand to each other is told by what is added to attention, see `Bias`, not by embeddings of places:
    a state then depends on nothing that comes after it, not even on how much comes.  Norms stand before attention and
    perceptron.  In the last block, only the newest position looks at the others.

    Args:
        blocks: how many; 2 in the paper.
        heads: of attention; they divide the width.
        dropout: of attention weights and of what each block adds.
        times: whether the time between positions counts, where there are ages.

    Example:
        >>> from mtcl_torchrec.modules.sequences.history import JaggedHistory
        >>> transformer = Transformer(blocks=1, heads=2)
        >>> transformer.build(embedding_dim=4, max_length=5)
        >>> transformer(JaggedHistory(torch.randn(3, 4), torch.tensor([2, 0, 1]), 5)).shape
        torch.Size([3, 4])
    """

    def __init__(self, blocks: int = 2, *, heads: int = 2, dropout: float = 0.0, times: bool = True) -> None:
        super().__init__()
        if min(blocks, heads) < 1:
            raise ValueError(f"a transformer needs a block and a head: {blocks=}, {heads=}")
        self.num_blocks, self.heads, self.dropout, self.times = blocks, heads, dropout, times

    def build(self, embedding_dim: int, max_length: int, *, ages: bool = True) -> None:
        """See `Encoder.build`."""
        if embedding_dim % self.heads:
            raise ValueError(f"a transformer of {self.heads} heads needs embeddings of a multiple of that width, "
                             f"not of {embedding_dim}")  # fmt: skip
        self.out_features = embedding_dim
        self.blocks = nn.ModuleList(
            Block(embedding_dim, self.heads, max_length, self.dropout, times=self.times and ages)
            for _ in range(self.num_blocks)
        )
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, history: History) -> torch.Tensor:
        """(B, D); of a row without history, anything finite."""
        *before, last = self.blocks
        x = history.values
        for block in before:
            x = block(x, history)
        return self.norm(last.newest(x, history))  # type: ignore[operator]

    def states(self, history: History) -> torch.Tensor:
        """(V, D) each position's state, of which later ones are no part."""
        x = history.values
        for block in self.blocks:
            x = block(x, history)
        return self.norm(x)
