"""What someone met before, as one vector a row: encoders of histories.

An encoder of your own is any `nn.Module` with

- ``forward(history)``: a `History` of B rows → (B, H), the vector of each; it may be anything finite of a row without
  history, for which the model has a learnt vector.  ``history.padded()`` gives the positions as (B, L, D), zeros behind
  the end of a row, and ``history.lengths`` (B,) says where that is,
- ``out_features``: H,
- optionally ``reads_candidate = True``; it is called as ``forward(history, candidate)`` then, candidate (B, D),
- optionally ``build(embedding_dim, max_length)``, with ``ages`` if it wants to know whether there are ages, called once
  before training.

In Python, pass it as ``HistoryEncoder(MyEncoder(), ...)``.  In YAML, name it by its import path, ``sequences: {clicked:
{kind: my_package.my_module:MyEncoder, options: {...}}}``.
"""

from mtcl_torchrec.modules.sequences.encoders import DIN, GRU, LSTM, Encoder, Mean
from mtcl_torchrec.modules.sequences.history import History, JaggedHistory, PaddedHistory
from mtcl_torchrec.modules.sequences.inputs import (
    HistoryEncoder,
    HistoryInput,
    Sequences,
    positions_of,
    sequence_configs,
)
from mtcl_torchrec.modules.sequences.transformer import Transformer

__all__ = [
    "DIN",
    "GRU",
    "LSTM",
    "Encoder",
    "History",
    "HistoryEncoder",
    "HistoryInput",
    "JaggedHistory",
    "Mean",
    "PaddedHistory",
    "Sequences",
    "Transformer",
    "positions_of",
    "sequence_configs",
]
