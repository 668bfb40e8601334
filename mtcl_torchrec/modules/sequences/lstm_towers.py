"""LSTM task towers over shared embeddings: each task reads the sequence of embeddings with a network of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.embeddings import Pooled, pooled_by_key
from mtcl_torchrec.modules.guard import stop_gradient_if
from mtcl_torchrec.modules.sequences.encoders import remember
from mtcl_torchrec.modules.sequences.history import History
from mtcl_torchrec.modules.sequences.inputs import HistoryInput, positions_of
from mtcl_torchrec.schema import GROUPS, ConfigError, Group, Task, nearest


class LSTMTowers(nn.Module):
    """For each task an LSTM of its own over embeddings that all tasks share; pass it as ``MTCL(lstm_towers=...)``.

    With a history, the sequence of a row is the history, oldest position first, and then the candidate's embedding;
    without one, it is the embeddings of all features, in the order of the tables, shorter ones filled up with zeros.
    The hidden state after the last element goes beside the trunk's representation of the task, and both go through the
    task's tower (`tower_layers`) to its head.  With ``tower_layers=()`` the head reads both directly.

    A task that is restricted by `Task.inputs` reads zeros where it may not see.  Tables of one task alone (STEM) are no
    part of the sequence.  As the candidate comes last, what the LSTM makes of the history is computed once for all
    candidates where the model serves.

    Args:
        hidden: width of the hidden state.
        history: which history, where the model has several.

    Example:
        >>> towers = LSTMTowers(hidden=6)
        >>> towers.build([Task.binary("click"), Task.binary("like")], {"user": 4, "item": 8}, {}, {})
        >>> towers({"user": torch.randn(3, 4), "item": torch.randn(3, 8)}).shape
        torch.Size([2, 3, 6])
    """

    def __init__(self, hidden: int = 32, *, history: str | None = None) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"an LSTM's hidden state has a width of at least 1, not {hidden}")
        self.hidden, self.history = hidden, history

    def build(
        self,
        tasks: Sequence[Task],
        dims: Mapping[str, int],
        histories: Mapping[str, HistoryInput],
        feature_groups: Mapping[str, Sequence[Group]],
    ) -> None:
        """Create the parameters; the model does so.

        Args:
            dims: key of each input -> its width.
            histories: those of the model.
            feature_groups: feature -> its groups; needed where a task is restricted.

        Raises:
            ConfigError: there is no such history, or there are several and none is named.
        """
        if self.history is not None and self.history not in histories:
            raise ConfigError(f"lstm towers: no history {self.history!r}{nearest(self.history, histories)}")
        if self.history is None and len(histories) > 1:
            raise ConfigError(f"lstm towers: say which history they read: {' or '.join(histories)}")
        self.dims = dict(dims)
        self.read = self.history or next(iter(histories), None)
        of_task = {task.name.replace(".", "_") for task in tasks}
        self.keys: tuple[str, ...] = tuple(k for k in dims if not ("@" in k and k.split("@")[-1] in of_task))
        if self.read is not None:
            candidate = histories[self.read].candidate
            self.keys = () if candidate is None else (candidate,)
            width = histories[self.read].width
        else:
            width = max(dims[key] for key in self.keys)
        self.width = width
        self.lstms = nn.ModuleList(nn.LSTM(width, self.hidden, batch_first=True) for _ in tasks)
        for lstm in self.lstms:
            remember(lstm)  # type: ignore[arg-type]

        def sees(task: Task, key: str) -> bool:
            return set(task.inputs) >= set(GROUPS) or set(feature_groups[key.split("@")[0]]) <= set(task.inputs)

        self._sees = [[sees(task, key) for key in self.keys] for task in tasks]
        self._sees_history = [self.read is not None and sees(task, self.read) for task in tasks]

    def forward(
        self,
        inputs: Pooled,
        skip: torch.Tensor | None = None,
        frozen: torch.Tensor | None = None,
        of_row: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, B, H), float32.

        Args:
            inputs: what `Lookups` returned, the history among it.
            skip: () bool: the gradient of what is shared is exactly zero where this is True by the time of backward.
            frozen: (T,) bool: the tasks that do not move what is shared.
            of_row: (B,) int64: the row of the history that each row has; None: its own.
        """
        given = inputs[0] if isinstance(inputs, tuple) else inputs
        by_key = pooled_by_key(given, self.dims)
        tokens = [F.pad(by_key[key].float(), (0, self.width - self.dims[key])) for key in self.keys]
        if skip is not None:
            tokens = [stop_gradient_if(token, skip) for token in tokens]
        history: Any = None if self.read is None else given[positions_of(self.read)]
        states = []
        for number, lstm in enumerate(self.lstms):
            stop = None if frozen is None else frozen[number]
            own = [
                _unmoved(token if seen else torch.zeros_like(token), stop)
                for token, seen in zip(tokens, self._sees[number], strict=True)
            ]
            if history is None:
                states.append(lstm(torch.stack(own, dim=1))[1][0][0])
            else:
                states.append(self._after_history(lstm, history, own, number, stop, of_row))
        return torch.stack(states)

    def _after_history(
        self,
        lstm: Any,
        history: History,
        candidate: list[torch.Tensor],
        number: int,
        stop: torch.Tensor | None,
        of_row: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._sees_history[number]:
            h, c = _stopped(history, stop).final_state(lstm)
        else:
            h = c = history.values.new_zeros(history.lengths.shape[0], self.hidden)
        if of_row is not None:
            h, c = h[of_row], c[of_row]
        for token in candidate:
            h, c = torch.lstm_cell(token, (h, c), *lstm._flat_weights)
        return h


def _unmoved(x: torch.Tensor, stop: torch.Tensor | None) -> torch.Tensor:
    return x if stop is None else stop_gradient_if(x, stop)


def _stopped(history: History, stop: torch.Tensor | None) -> History:
    """The history whose gradient is zero where `stop` is True by the time of backward."""
    if stop is None:
        return history
    return history.with_values(stop_gradient_if(history.values, stop))
