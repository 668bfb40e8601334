"""Sequences of different lengths, as an encoder reads them: jagged where a model trains, padded where it serves.

An encoder is written once, in the operations that both kinds have.  Jagged, a position that is not there takes no part
in anything that is done position by position.  Where positions of one row meet (attention, recurrence), it depends on
the device:

- On a CPU, rows are padded no further than they must be: attention takes the rows in a few groups of similar lengths,
  each padded to its longest, and recurrent networks run over packed rows, the longest first.
- Elsewhere, how long the longest row is would have to be asked of the device, and everything would wait for the answer.
  Rows are padded to the cap there, which the longest of a large batch comes close to anyway.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F

GROUPS_OF_ROWS = 4  # that attention on a CPU is cut into, by length; measured
SHUT = 1e4  # before a sigmoid


class History(ABC):
    """B sequences of vectors, oldest position first, V positions in all.

    Attributes:
        values: (V, D) float, the vector of each position.
        lengths: (B,) int64, 0 where a row has no history; at most `max_length`.
        max_length: the cap.
        ages: (V,) int64, how long ago each position was, in buckets (see `mtcl_torchrec.schema.Feature`), 0 where that
            is not known; None where no ages are given.
    """

    values: torch.Tensor
    lengths: torch.Tensor
    max_length: int
    ages: torch.Tensor | None

    def with_values(self, values: torch.Tensor) -> History:
        """The same positions with other vectors (V, D')."""
        other = copy.copy(self)
        other.values = values
        return other

    @abstractmethod
    def expand(self, of_rows: torch.Tensor) -> torch.Tensor:
        """(V, C): what each row (B, C) has, at each of its positions."""

    @abstractmethod
    def sum(self, of_positions: torch.Tensor) -> torch.Tensor:
        """(B, C): the sum over each row's positions (V, C); zero where a row has none."""

    @abstractmethod
    def last(self, of_positions: torch.Tensor) -> torch.Tensor:
        """(B, C): what each row has at its newest position, of (V, C); anything finite where it has none."""

    @abstractmethod
    def padded(self, of_positions: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, C): each row's positions from the left, zeros behind them.  L depends on the batch and the device.

        Args:
            of_positions: (V, C); None is `values`.
        """

    @abstractmethod
    def unpadded(self, padded: torch.Tensor) -> torch.Tensor:
        """(V, C) from (B, L, C), where L is that of `padded`."""

    @abstractmethod
    def attend(self, attention: Callable[..., torch.Tensor], *of_positions: torch.Tensor) -> torch.Tensor:
        """(V, C): what `attention` makes of rows, whose positions it takes and returns padded.

        Args:
            attention: from tensors (b, L, Cᵢ) of some rows to (b, L, C).  What stands behind the end of a row is zero,
                and must not count.
            of_positions: (V, Cᵢ).
        """

    @abstractmethod
    def last_state(self, rnn: nn.RNNBase) -> torch.Tensor:
        """(B, H) the last layer's state after each row's newest position; zero where it has none."""

    @abstractmethod
    def final_state(self, lstm: nn.LSTM) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H) hidden and cell states of an LSTM of one layer after each row's newest position; zero where it has
        none."""

    def states(self, rnn: nn.RNNBase) -> torch.Tensor:
        """(V, H) the last layer's states after each position."""
        return self.unpadded(rnn(self.padded())[0])


class JaggedHistory(History):
    """Rows one behind the other, as an EmbeddingCollection gives them.

    Args:
        values: (V, D).
        lengths: (B,).
        max_length: the cap: of longer rows, the newest positions count.
        ages: (V,) or None.
        asks: whether sizes may be asked of the device, which everything then waits for; None: on a CPU alone.

    Example:
        >>> history = JaggedHistory(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 1]), max_length=5)
        >>> history.sum(history.values).tolist(), history.padded().squeeze(2).tolist()
        ([[3.0], [0.0], [4.0]], [[1.0, 2.0], [0.0, 0.0], [4.0, 0.0]])
    """

    def __init__(
        self,
        values: torch.Tensor,
        lengths: torch.Tensor,
        max_length: int,
        ages: torch.Tensor | None = None,
        *,
        asks: bool | None = None,
    ) -> None:
        lengths = lengths.long()
        self.max_length = max_length
        self._asks = values.device.type == "cpu" if asks is None else asks
        self._longest = max_length
        ends = lengths.cumsum(0)
        if self._asks:
            self._longest = int(lengths.max()) if len(lengths) else 0
            if self._longest > max_length:
                kept = _from_end(ends, lengths, len(values)) < max_length
                values, ages = values[kept], None if ages is None else ages[kept]
                lengths, self._longest = lengths.clamp(max=max_length), max_length
                ends = lengths.cumsum(0)
            self._longest = max(self._longest, 1)
        self.values, self.ages = values, ages
        self.lengths = lengths.clamp(max=max_length)
        self._ends, self._starts = ends, ends - self.lengths
        self._offsets = F.pad(ends, (1, 0))

    @cached_property
    def _row(self) -> torch.Tensor:
        """(V,) the row of each position."""
        whole = self._offsets.diff()
        rows = torch.arange(whole.shape[0], device=whole.device)
        return torch.repeat_interleave(rows, whole, output_size=self.values.shape[0])

    @cached_property
    def _place(self) -> torch.Tensor:
        """(V,) the number of each position in its row; negative where it lies before the cap."""
        return torch.arange(self.values.shape[0], device=self._row.device) - self._starts[self._row]

    def expand(self, of_rows: torch.Tensor) -> torch.Tensor:
        return of_rows.index_select(0, self._row)

    def sum(self, of_positions: torch.Tensor) -> torch.Tensor:
        if not self._asks:  # nobody knows whether all are kept
            of_positions = torch.where((self._place >= 0).unsqueeze(1), of_positions, 0.0)
        if self._asks:
            return of_positions.new_zeros(self.lengths.shape[0], of_positions.shape[1]).index_add(
                0, self._row, of_positions
            )
        # One thread adds up a row, so that the sum is the same every time.
        return torch.segment_reduce(of_positions, "sum", offsets=self._offsets, unsafe=True, initial=0)

    def last(self, of_positions: torch.Tensor) -> torch.Tensor:
        one_more = F.pad(of_positions, (0, 0, 0, 1))  # where there is no position at all
        return one_more.index_select(0, torch.where(self.lengths > 0, self._ends - 1, of_positions.shape[0]))

    def padded(self, of_positions: torch.Tensor | None = None) -> torch.Tensor:
        x = self.values if of_positions is None else of_positions
        if self._asks:
            return torch.ops.fbgemm.jagged_to_padded_dense(x, [self._offsets], [self._longest], 0.0)
        place = torch.arange(self._longest, device=x.device)
        at = torch.where(place < self.lengths.unsqueeze(1), self._starts.unsqueeze(1) + place, x.shape[0])
        return F.pad(x, (0, 0, 0, 1)).index_select(0, at.flatten()).unflatten(0, at.shape)

    def unpadded(self, padded: torch.Tensor) -> torch.Tensor:
        if self._asks:
            return torch.ops.fbgemm.dense_to_jagged(padded, [self._offsets], self.values.shape[0])[0]
        at = self._row * padded.shape[1] + self._place.clamp(min=0)
        return padded.flatten(0, 1).index_select(0, at)

    def attend(self, attention: Callable[..., torch.Tensor], *of_positions: torch.Tensor) -> torch.Tensor:
        if not self._asks or self.lengths.shape[0] < GROUPS_OF_ROWS or self._longest < GROUPS_OF_ROWS:
            return self.unpadded(attention(*(self.padded(x) for x in of_positions)))
        order = torch.argsort(self.lengths)
        where = self._positions_of(order)
        rows = order.tensor_split(GROUPS_OF_ROWS)
        counts = [int(self.lengths[of].sum()) for of in rows]
        together = [x[where].split(counts) for x in of_positions]
        out = []
        for of, *parts in zip(rows, *together, strict=True):
            lengths = self.lengths[of]
            offsets, longest = F.pad(lengths.cumsum(0), (1, 0)), max(int(lengths[-1]), 1)
            dense = attention(*(torch.ops.fbgemm.jagged_to_padded_dense(x, [offsets], [longest], 0.0) for x in parts))
            out.append(torch.ops.fbgemm.dense_to_jagged(dense, [offsets], parts[0].shape[0])[0])
        back = torch.empty_like(where)
        back[where] = torch.arange(where.shape[0])
        return torch.cat(out)[back]

    def _positions_of(self, rows: torch.Tensor) -> torch.Tensor:
        """(V,) the positions of rows in another order."""
        lengths = self.lengths[rows]
        shift = torch.repeat_interleave(self._starts[rows] - (lengths.cumsum(0) - lengths), lengths)
        return shift + torch.arange(shift.shape[0])

    def last_state(self, rnn: nn.RNNBase) -> torch.Tensor:
        if not self._asks:
            return _padded_last_state(rnn, self.padded(), self.lengths)
        return self._final_states(rnn)[0]

    def final_state(self, lstm: nn.LSTM) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._asks:
            return _padded_final_state(lstm, self.padded(), self.lengths)
        return self._final_states(lstm)

    def _final_states(self, rnn: nn.RNNBase) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the last layer; the cell state of a GRU is its hidden one."""
        if self.values.shape[0] == 0:
            # A step whose result nobody takes: every batch, and every rank's, has to reach every parameter.
            hidden, cell = run_packed(rnn, F.pad(self.values, (0, 0, 0, 1)), [1])
            nobody = (0, 0, 0, self.lengths.shape[0])
            return F.pad(hidden[:0], nobody), F.pad(cell[:0], nobody)
        order = torch.argsort(self.lengths, descending=True)
        lengths = self.lengths[order]
        places = torch.arange(self._longest).unsqueeze(1)
        there = places < lengths
        at = (self._starts[order] + places)[there]  # the positions of place 0 in their rows, of place 1, …
        hidden, cell = run_packed(rnn, self.values.index_select(0, at), there.sum(1).tolist())
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.shape[0])
        more = (0, 0, 0, order.shape[0] - hidden.shape[0])
        return F.pad(hidden, more).index_select(0, rank), F.pad(cell, more).index_select(0, rank)


class PaddedHistory(History):
    """Rows padded to one length, what stands behind the end of a row being anything finite.  It needs no operator
    beyond torch's own, and no size that only the data tells.

    Args:
        values: (B, L, D).
        lengths: (B,).
        ages: (B, L) or None.

    Example:
        >>> history = PaddedHistory(torch.tensor([[[1.0], [2.0]], [[7.0], [7.0]]]), torch.tensor([2, 0]))
        >>> history.sum(history.values).tolist()
        [[3.0], [0.0]]
    """

    def __init__(self, values: torch.Tensor, lengths: torch.Tensor, ages: torch.Tensor | None = None) -> None:
        self.max_length = values.shape[1]
        self.lengths = lengths.clamp(max=self.max_length)
        self.values = values.flatten(0, 1)
        self.ages = None if ages is None else ages.flatten()
        self._there = torch.arange(self.max_length, device=values.device) < self.lengths.unsqueeze(1)

    def rows(self, index: torch.Tensor) -> PaddedHistory:
        """The history of the rows in `index` (B',), some of them several times."""
        ages = None if self.ages is None else self._by_row(self.ages.unsqueeze(1)).squeeze(2)[index]
        return PaddedHistory(self._by_row(self.values)[index], self.lengths[index], ages)

    def _by_row(self, of_positions: torch.Tensor) -> torch.Tensor:
        return of_positions.unflatten(0, (-1, self.max_length))

    def expand(self, of_rows: torch.Tensor) -> torch.Tensor:
        return of_rows.unsqueeze(1).expand(-1, self.max_length, -1).flatten(0, 1)

    def sum(self, of_positions: torch.Tensor) -> torch.Tensor:
        return self.padded(of_positions).sum(1)

    def last(self, of_positions: torch.Tensor) -> torch.Tensor:
        at = (self.lengths - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, of_positions.shape[1])
        return self._by_row(of_positions).gather(1, at).squeeze(1)

    def padded(self, of_positions: torch.Tensor | None = None) -> torch.Tensor:
        x = self._by_row(self.values if of_positions is None else of_positions)
        return torch.where(self._there.unsqueeze(2), x, 0.0)

    def unpadded(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.flatten(0, 1)

    def attend(self, attention: Callable[..., torch.Tensor], *of_positions: torch.Tensor) -> torch.Tensor:
        return self.unpadded(attention(*(self.padded(x) for x in of_positions)))

    def last_state(self, rnn: nn.RNNBase) -> torch.Tensor:
        return _padded_last_state(rnn, self.padded(), self.lengths)

    def final_state(self, lstm: nn.LSTM) -> tuple[torch.Tensor, torch.Tensor]:
        return _padded_final_state(lstm, self.padded(), self.lengths)


def _from_end(ends: torch.Tensor, lengths: torch.Tensor, positions: int) -> torch.Tensor:
    """(V,) how many positions of its row come after each."""
    return torch.repeat_interleave(ends, lengths, output_size=positions) - 1 - torch.arange(positions)


def run_packed(rnn: nn.RNNBase, x: torch.Tensor, batch_sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden and cell states (b, H) of the last layer of a GRU or LSTM; a GRU's cell state is its hidden one.

    torch's own way over packed rows makes, in backward, a tensor of the size of the whole batch for every step (most of
    its time, as measured on a CPU).

    Args:
        x: (V, D) in the order of a `torch.nn.utils.rnn.PackedSequence`.
        batch_sizes: how many rows have each step.
    """
    step = _gru_step if isinstance(rnn, nn.GRU) else _lstm_step
    for layer in range(rnn.num_layers):
        weight, recurrent, bias, recurrent_bias = _weights(rnn, layer)
        h = c = x.new_zeros(batch_sizes[0], rnn.hidden_size)
        every, over = [], []
        for gates in F.linear(x, weight, bias).split(batch_sizes):
            rows = gates.shape[0]
            if rows < h.shape[0]:
                over.append((h[rows:], c[rows:]))
                h, c = h[:rows], c[:rows]
            h, c = step(gates, F.linear(h, recurrent, recurrent_bias), h, c)
            every.append(h)
        if layer < rnn.num_layers - 1:
            x = F.dropout(torch.cat(every), rnn.dropout, rnn.training)
    hidden, cell = zip(*reversed([*over, (h, c)]), strict=True)
    return torch.cat(hidden), torch.cat(cell)


def _weights(rnn: nn.RNNBase, layer: int) -> list[torch.Tensor]:
    """Weight of the input, of the state, and both biases of a layer."""
    return [weight for weight in rnn._flat_weights[4 * layer : 4 * layer + 4] if weight is not None]


def _gru_step(
    gates: torch.Tensor, recurrent: torch.Tensor, h: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    width = 2 * h.shape[1]
    r, z = torch.sigmoid(gates[:, :width] + recurrent[:, :width]).chunk(2, dim=1)
    h = torch.lerp(torch.tanh(torch.addcmul(gates[:, width:], r, recurrent[:, width:])), h, z)
    return h, h


def _lstm_step(
    gates: torch.Tensor, recurrent: torch.Tensor, h: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    i, f, g, o = (gates + recurrent).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _padded_last_state(rnn: nn.RNNBase, padded: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, H): what comes behind the end of a row changes no state before it."""
    out = rnn(padded)[0]
    at = (lengths - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, out.shape[2])
    return torch.where((lengths > 0).unsqueeze(1), out.gather(1, at).squeeze(1), 0.0)


def _padded_final_state(
    lstm: nn.LSTM, padded: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One more column of the input, 1 behind the end of a row, opens the forget gate there and shuts the input gate, so
    that the cell is carried to where the network gives it: exactly, since sigmoid(±SHUT) is 0 and 1 in float32."""
    weight, recurrent, *biases = _weights(lstm, 0)
    gate = weight.new_tensor([-SHUT, SHUT, 0.0, 0.0]).repeat_interleave(lstm.hidden_size).unsqueeze(1)
    behind = torch.arange(padded.shape[1], device=padded.device) >= lengths.unsqueeze(1)
    x = torch.cat([padded, behind.unsqueeze(2).to(padded.dtype)], dim=2)
    zero = padded.new_zeros(1, padded.shape[0], lstm.hidden_size)
    weights = [torch.cat([weight, gate], dim=1), recurrent, *biases]
    out, _, cell = torch._VF.lstm(x, (zero, zero), weights, True, 1, 0.0, lstm.training, False, True)
    at = (lengths - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, out.shape[2])
    return torch.where((lengths > 0).unsqueeze(1), out.gather(1, at).squeeze(1), 0.0), cell[0]
