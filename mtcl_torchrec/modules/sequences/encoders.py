"""From a history to one vector for each row: the mean, recurrent networks, and attention to the candidate."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from mtcl_torchrec.modules.sequences.history import History


class Encoder(nn.Module):
    """Base of the encoders here: built when the model knows the width of the embeddings.

    Attributes:
        out_features: width of the vector of a row.
        reads_candidate: whether ``forward`` takes the candidate's embedding too; without it, the vector is the user's
            alone, and is computed once for all candidates where the model serves.
    """

    out_features: int
    reads_candidate = False

    @abstractmethod
    def build(self, embedding_dim: int, max_length: int, *, ages: bool = False) -> None:
        """Create the parameters.

        Args:
            embedding_dim: D, width of a position's vector and of the candidate's.
            max_length: the longest history there is.
            ages: whether histories have ages.
        """


class Mean(Encoder):
    """The mean of the positions.

    Example:
        >>> from mtcl_torchrec.modules.sequences.history import JaggedHistory
        >>> mean = Mean()
        >>> mean.build(embedding_dim=1, max_length=5)
        >>> mean(JaggedHistory(torch.tensor([[1.0], [3.0]]), torch.tensor([2, 0]), 5)).tolist()
        [[2.0], [0.0]]
    """

    def build(self, embedding_dim: int, max_length: int, *, ages: bool = False) -> None:
        """See `Encoder.build`."""
        self.out_features = embedding_dim

    def forward(self, history: History) -> torch.Tensor:
        """(B, D); zero of a row without history."""
        return history.sum(history.values) / history.lengths.clamp(min=1).unsqueeze(1)


@torch.no_grad()
def remember(rnn: nn.RNNBase) -> None:
    """Let an LSTM begin with open forget gates, a bias of 1 (Jozefowicz et al., ICML 2015); a GRU has none."""
    if isinstance(rnn, nn.LSTM):
        for layer in range(rnn.num_layers):
            getattr(rnn, f"bias_ih_l{layer}")[rnn.hidden_size : 2 * rnn.hidden_size] = 1.0


class _Recurrent(Encoder):
    """The last state of a recurrent network."""

    network: type[nn.GRU] | type[nn.LSTM]

    def __init__(self, hidden: int | None = None, *, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if (hidden is not None and hidden < 1) or layers < 1:
            raise ValueError(f"a recurrent network needs widths and layers of at least 1: {hidden=}, {layers=}")
        self.hidden, self.layers, self.dropout = hidden, layers, dropout

    def build(self, embedding_dim: int, max_length: int, *, ages: bool = False) -> None:
        """See `Encoder.build`."""
        self.out_features = self.hidden or embedding_dim
        between = self.dropout if self.layers > 1 else 0.0
        self.rnn = self.network(embedding_dim, self.out_features, self.layers, batch_first=True, dropout=between)
        remember(self.rnn)

    def forward(self, history: History) -> torch.Tensor:
        """(B, H) the state after the newest position; zero of a row without history."""
        return F.dropout(history.last_state(self.rnn), self.dropout, self.training)

    def states(self, history: History) -> torch.Tensor:
        """(V, H) the state after each position, of which later ones are no part."""
        return history.states(self.rnn)


class GRU(_Recurrent):
    """Gated recurrent units over the positions, oldest first (Cho et al., EMNLP 2014; in recommenders Hidasi et al.,
    *GRU4Rec*, ICLR 2016): the state after the newest one.

    Args:
        hidden: H; None is the width of the embeddings.
        layers: how many, one on top of the other.
        dropout: of the state, and between layers.

    Example:
        >>> from mtcl_torchrec.modules.sequences.history import JaggedHistory
        >>> gru = GRU(hidden=6)
        >>> gru.build(embedding_dim=4, max_length=5)
        >>> gru(JaggedHistory(torch.randn(3, 4), torch.tensor([2, 0, 1]), 5)).shape
        torch.Size([3, 6])
    """

    network = nn.GRU


class LSTM(_Recurrent):
    """A long short-term memory over the positions, oldest first (Hochreiter and Schmidhuber, 1997): the hidden state
    after the newest one.

    Args:
        hidden: H; None is the width of the embeddings.
        layers: how many, one on top of the other.
        dropout: of the state, and between layers.

    Example:
        >>> from mtcl_torchrec.modules.sequences.history import JaggedHistory
        >>> lstm = LSTM(hidden=6)
        >>> lstm.build(embedding_dim=4, max_length=5)
        >>> lstm(JaggedHistory(torch.randn(3, 4), torch.tensor([2, 0, 1]), 5)).shape
        torch.Size([3, 6])
    """

    network = nn.LSTM


class DIN(Encoder):
    """Attention of the candidate to the positions (Zhou et al., *Deep Interest Network*, KDD 2018, eq. 3):
    v(c) = Σⱼ a(eⱼ, c) eⱼ.

    The weights a are not normalised, neither by a softmax nor by a sigmoid: how strongly a history speaks for a
    candidate is kept.  a is a perceptron of one hidden layer with PReLU that reads eⱼ, c and eⱼ ⊙ c.  (The authors'
    code has eⱼ - c beside them, which a linear layer of the first two has already.)  Of c, the layer is computed once a
    row.

    Args:
        hidden: width of the hidden layer; 36 in the paper.
        dropout: of the hidden layer.

    Example:
        >>> from mtcl_torchrec.modules.sequences.history import JaggedHistory
        >>> din = DIN()
        >>> din.build(embedding_dim=4, max_length=5)
        >>> din(JaggedHistory(torch.randn(3, 4), torch.tensor([2, 0, 1]), 5), torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """

    reads_candidate = True

    def __init__(self, hidden: int = 36, *, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"the hidden layer of DIN's attention has a width of at least 1, not {hidden}")
        self.hidden, self.dropout = hidden, dropout

    def build(self, embedding_dim: int, max_length: int, *, ages: bool = False) -> None:
        """See `Encoder.build`."""
        self.out_features = embedding_dim
        self.of_candidate = nn.Linear(embedding_dim, self.hidden)
        self.of_position = nn.Linear(2 * embedding_dim, self.hidden, bias=False)
        self.activation = nn.PReLU(self.hidden)
        self.weight = nn.Linear(self.hidden, 1)
        with torch.no_grad():  # as one layer of 3 D inputs would start
            for parameter in (self.of_candidate.weight, self.of_candidate.bias, self.of_position.weight):
                parameter.uniform_(-((3 * embedding_dim) ** -0.5), (3 * embedding_dim) ** -0.5)

    def forward(self, history: History, candidate: torch.Tensor) -> torch.Tensor:
        """(B, D); zero of a row without history.

        Args:
            candidate: (B, D).
        """
        x, width = history.values, candidate.shape[1]
        both = history.expand(torch.cat([candidate, self.of_candidate(candidate)], dim=1))
        c, h = both[:, :width], both[:, width:]
        h = self.activation(h + self.of_position(torch.cat([x, x * c], dim=1)))
        return history.sum(x * self.weight(F.dropout(h, self.dropout, self.training)))
