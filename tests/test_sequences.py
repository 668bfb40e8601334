"""Histories as jagged and padded rows, encoders against references, and what must never leak or break."""

import math

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec import MTCL, ConfigError, GradientSurgery, MTCLTrain, SharedBottom, Task
from mtcl_torchrec.modules.sequences import (
    DIN,
    GRU,
    LSTM,
    HistoryEncoder,
    JaggedHistory,
    Mean,
    PaddedHistory,
    Sequences,
    Transformer,
)  # fmt: skip
from mtcl_torchrec.modules.sequences.lstm_towers import LSTMTowers

DIM, CAP = 8, 6
ENCODERS = {
    "mean": Mean, "gru": lambda: GRU(10, layers=2), "lstm": LSTM, "din": DIN, "transformer": lambda: Transformer(2)
}  # fmt: skip


def built(kind, ages=True):
    torch.manual_seed(1)
    encoder = ENCODERS[kind]()
    encoder.build(DIM, CAP, ages=ages)
    for parameter in encoder.parameters():  # biases of attention start at zero
        nn.init.normal_(parameter, std=0.5)
    return encoder


def rows(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    values = torch.randn(int(lengths.sum()), DIM, generator=draw)
    ages = torch.randint(0, 34, (len(values),), generator=draw)
    return values, lengths, ages, torch.randn(len(lengths), DIM, generator=draw)


def padded_to_cap(values, lengths, ages):
    offsets = [0, *lengths.cumsum(0).tolist()]
    x, a = torch.full((len(lengths), CAP, DIM), 7.0), torch.full((len(lengths), CAP), 5)
    for b, n in enumerate(lengths.tolist()):
        kept = min(n, CAP)
        x[b, :kept], a[b, :kept] = values[offsets[b + 1] - kept : offsets[b + 1]], ages[offsets[b + 1] - kept :][:kept]
    return PaddedHistory(x, lengths.clamp(max=CAP), a)


def encoded(encoder, history, candidate):
    out = encoder(history, candidate) if encoder.reads_candidate else encoder(history)
    return torch.where((history.lengths > 0).unsqueeze(1), out, 0.0)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_jagged_rows_give_what_padded_ones_do(kind, elsewhere):
    """Also beyond the cap, where the newest positions count, and on the way that other devices take."""
    encoder = built(kind)
    values, lengths, ages, candidate = rows([3, 0, 6, 1, 9, 0, 2, 5, 4])
    grads = []
    for jagged in (True, False):
        x = values.clone().requires_grad_()
        if jagged:
            history = JaggedHistory(x, lengths, CAP, ages, asks=not elsewhere)
        else:
            history = padded_to_cap(x, lengths, ages)
        encoder.zero_grad()
        out = encoded(encoder, history, candidate)
        out.square().sum().backward()
        grads.append((out, x.grad, *(p.grad for p in encoder.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0], [], [4, 0]], ids=str)
def test_rows_without_history_are_defined_forward_and_backward(kind, lengths):
    encoder = HistoryEncoder(built_later(kind), of="item", beside=["age"], ages="age", max_length=CAP)
    encoder.build("clicked", {"clicked": DIM, "age": DIM, "item": DIM})
    with torch.no_grad():
        encoder.empty.fill_(3.0)
    values, lengths, ages, candidate = rows(lengths)
    values.requires_grad_()
    out = encoder(JaggedHistory(values, lengths.long(), CAP, ages), candidate)
    assert out.shape == (len(lengths), encoder.encoder.out_features)
    assert (out[lengths == 0] == 3.0).all()
    out.sum().backward()
    # All of it is reached, as in any other batch: DDP's static graph knows no batch in which something takes no part.
    for gradient in (values.grad, *(p.grad for p in encoder.parameters())):
        assert gradient is not None or not len(lengths)
        assert gradient is None or torch.isfinite(gradient).all()


def built_later(kind):
    return ENCODERS[kind]()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrent_encoders_are_a_loop_over_torchs_own(kind):
    encoder = built(kind)
    values, lengths, ages, _ = rows([3, 0, 6, 1])
    out = encoder(JaggedHistory(values, lengths, CAP, ages))
    for b, x in enumerate(values.split(lengths.tolist())):
        expected = encoder.rnn(x.unsqueeze(0))[0][0, -1] if len(x) else torch.zeros(encoder.out_features)
        torch.testing.assert_close(out[b], expected, rtol=1e-5, atol=1e-6)


def test_din_is_the_papers_sum():
    din = built("din")
    values, lengths, _, candidate = rows([3, 0, 2])
    out = din(JaggedHistory(values, lengths, CAP), candidate)
    for b, x in enumerate(values.split(lengths.tolist())):
        total = torch.zeros(DIM)
        for e in x:
            c = candidate[b]
            hidden = din.activation((din.of_candidate(c) + din.of_position(torch.cat([e, e * c]))).unsqueeze(0))
            total = total + din.weight(hidden)[0] * e
        torch.testing.assert_close(out[b], total, rtol=1e-4, atol=1e-5)


def test_a_transformer_is_attention_written_out():
    """One block, one row, by hand: biases of places and of the time between two positions, nothing later seen."""
    encoder = Transformer(1, heads=2)
    torch.manual_seed(0)
    encoder.build(DIM, CAP, ages=True)
    block = encoder.blocks[0]
    nn.init.normal_(block.bias.of_place)
    nn.init.normal_(block.bias.of_time)
    values, lengths, _, _ = rows([5])
    ages = torch.tensor([20, 12, 12, 0, 3])
    read = block.before_attention(values)
    query, (key, value) = block.query(read), block.key_value(read).chunk(2, dim=1)
    middle = [1.5 * 2 ** (b - 1) - 1 if b else None for b in ages.tolist()]
    seen = torch.zeros(5, DIM)
    for i in range(5):
        for head in range(2):
            at = slice(4 * head, 4 * head + 4)
            logits = []
            for j in range(i + 1):
                apart = None if middle[i] is None or middle[j] is None else max(middle[j] - middle[i], 0)
                bucket = 0 if apart is None else math.floor(math.log2(1 + apart)) + 1
                bias = block.bias.of_place[i - j, head] + block.bias.of_time[bucket, head]
                logits.append(query[i, at] @ key[j, at] / 2 + bias)
            seen[i, at] = torch.softmax(torch.stack(logits), 0) @ value[: i + 1, at]
    x = values + block.out(seen)
    x = x + block.down(torch.nn.functional.gelu(block.up(block.before_mlp(x))))
    history = JaggedHistory(values, lengths, CAP, ages)
    torch.testing.assert_close(encoder.states(history), encoder.norm(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(history), encoder.norm(x)[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_no_state_looks_into_the_future(kind):
    """Other things later, or more of them, change no state before; and what is encoded is the newest state."""
    encoder = built(kind)
    values, lengths, ages, _ = rows([5, 4, 6])
    states = encoder.states(JaggedHistory(values, lengths, CAP, ages))
    changed, other_ages = values.clone(), ages.clone()
    for row, offset in zip(range(3), [0, 5, 9], strict=True):
        changed[offset + 3 :][: lengths[row] - 3] += 100.0
        other_ages[offset + 3 :][: lengths[row] - 3] = 1
    later = encoder.states(JaggedHistory(changed, lengths, CAP, other_ages))
    first = torch.tensor([0, 1, 2, 5, 6, 7, 9, 10, 11])
    torch.testing.assert_close(later[first], states[first], rtol=1e-5, atol=1e-6)
    assert (later - states).abs().max() > 0.01
    three = encoder(JaggedHistory(values[first], torch.tensor([3, 3, 3]), CAP, ages[first]))
    torch.testing.assert_close(three, states[[2, 7, 11]], rtol=1e-4, atol=1e-5)
    newest = encoder(JaggedHistory(values, lengths, CAP, ages))
    torch.testing.assert_close(newest, states[[4, 8, 14]], rtol=1e-4, atol=1e-5)


def test_the_cell_of_an_lstm_is_carried_behind_the_end_of_a_row():
    torch.manual_seed(0)
    lstm = nn.LSTM(DIM, 5, batch_first=True)
    values, lengths, ages, _ = rows([3, 0, 6, 1])
    packed = JaggedHistory(values, lengths, CAP).final_state(lstm)
    carried = padded_to_cap(values, lengths, ages).final_state(lstm)
    for one, other in zip(packed, carried, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- in a model


TASKS = [Task.binary("click"), Task.binary("like")]


def model(encoder=None, lstm=None, tasks=TASKS, **options):
    torch.manual_seed(0)
    bags = [EmbeddingBagConfig(name="t_users", num_embeddings=9, embedding_dim=4, feature_names=["user"])]
    lists = [
        EmbeddingConfig(name="t_items", num_embeddings=20, embedding_dim=DIM, feature_names=["item", "clicked"]),
        EmbeddingConfig(name="t_kinds", num_embeddings=5, embedding_dim=DIM, feature_names=["kind"]),
    ]
    collection = EmbeddingCollection(tables=lists)
    histories = {"clicked": HistoryEncoder(encoder or DIN(), of="item", beside=["kind"], ages="kind", max_length=CAP)}
    return MTCL(
        EmbeddingBagCollection(tables=bags), 2, SharedBottom([8]), tasks, tower_layers=[4],
        embedding_collection=collection, lookups=[Sequences([collection], histories)],
        lstm_towers=LSTMTowers(5) if lstm else None, **options,
    )  # fmt: skip


def batch(seed=0, size=6, labels=None):
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, CAP + 1, (size,), generator=draw)
    ones = torch.ones(size, dtype=torch.int64)
    lengths = {"user": ones, "item": ones, "clicked": counts, "kind": counts}
    sizes = {"user": 9, "item": 20, "clicked": 20, "kind": 5}
    values = [torch.randint(sizes[k], (int(n.sum()),), generator=draw) for k, n in lengths.items()]
    ids = KeyedJaggedTensor(list(lengths), values=torch.cat(values), lengths=torch.cat(list(lengths.values())))
    if labels is None:
        labels = torch.randint(0, 2, (size, 2), generator=draw).float()
    return Batch(torch.randn(size, 2, generator=draw), ids, labels)


def table_grads(train):
    return {n: p.grad for n, p in train.named_parameters() if ".embeddings." in n or ".embedding_bags." in n}


@pytest.mark.parametrize("lstm", [False, True], ids=["mlp", "lstm towers"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_loss_that_is_not_finite_trains_no_table(kind, lstm):
    """Also where an encoder makes NaN of a gradient of zero."""
    train = MTCLTrain(model(ENCODERS[kind](), lstm=lstm))
    of = batch()
    loss, _ = train(of)
    loss.backward()
    assert all(g.abs().sum() > 0 for n, g in table_grads(train).items())
    train.zero_grad()
    with torch.no_grad():
        encoder = train.model.lookups[0].histories[0]
        encoder.empty.fill_(float("inf"))
        for parameter in encoder.encoder.parameters():
            parameter.fill_(float("inf"))
        train.model.tower.trunk.levels[0].experts.weights[0].fill_(float("inf"))
    loss, _ = train(of)
    assert not torch.isfinite(loss)
    loss.backward()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in table_grads(train).values())


def test_a_frozen_task_moves_no_shared_table_through_its_lstm():
    train = MTCLTrain(model(Mean(), lstm=True))
    train.loss.freeze("click", "like")
    train(batch())[0].backward()
    assert all(g is None or g.abs().sum() == 0 for g in table_grads(train).values())
    assert all(p.grad.abs().sum() > 0 for p in train.model.tower.lstm_towers.parameters())


def test_lstm_towers_read_the_history_then_the_candidate():
    towers = model(Mean(), lstm=True).tower.lstm_towers
    values, lengths, _, candidate = rows([3, 0])
    inputs = {"user": torch.zeros(2, 4), "item": candidate, "clicked": torch.zeros(2, DIM),
              "clicked:positions": JaggedHistory(values, lengths, CAP)}  # fmt: skip
    states = towers(inputs)
    for number, lstm in enumerate(towers.lstms):
        for b, x in enumerate(values.split([3, 0])):
            whole = torch.cat([x, candidate[b : b + 1]]).unsqueeze(0)
            torch.testing.assert_close(states[number, b], lstm(whole)[1][0][0, 0], rtol=1e-5, atol=1e-6)


def test_lstm_towers_of_a_restricted_task_read_zeros_where_it_may_not_see():
    tasks = [Task.binary("click"), Task.binary("like", inputs=["user"])]
    groups = {"user": ["user"], "item": ["item"], "clicked": ["user"]}
    of = model(GRU(), lstm=True, tasks=tasks, feature_groups=groups, dense_groups=[["user"]] * 2).eval()
    one, other = batch(), batch()
    moved = other.sparse_features
    at = moved.keys().index("item")
    moved.values()[at * 6 : at * 6 + 6] = (moved.values()[at * 6 : at * 6 + 6] + 1) % 20
    before, after = of(one.dense_features, one.sparse_features), of(other.dense_features, moved)
    torch.testing.assert_close(before["like"], after["like"])
    assert (before["click"] - after["click"]).abs().max() > 1e-4


@pytest.mark.parametrize("cut", ["trunk", "embeddings", "both"])
def test_gradient_surgery_covers_histories_and_candidates(cut):
    """What reaches the tables of histories is the weighted sum of what each task alone would send."""
    click = batch().labels[:, :1]
    opposed, alone = torch.cat([click, 1 - click], dim=1), []
    for task in range(2):
        labels = opposed.clone()
        labels[:, 1 - task] = float("nan")
        train = MTCLTrain(model(GRU()))
        train(batch(labels=labels))[0].backward()
        alone.append(table_grads(train))
    train = MTCLTrain(model(GRU()), gradient_surgery=GradientSurgery("cagrad", cut=cut))
    train(batch(labels=opposed))[0].backward()
    weights = train.surgery.newest_weights[-1].float()
    assert (weights - 1).abs().max() > 1e-3
    for name, gradient in table_grads(train).items():
        expected = weights[0] * alone[0][name] + weights[1] * alone[1][name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_gradient_surgery_says_what_it_cannot_do():
    with pytest.raises(ConfigError, match="'tables' needs each row's gradient"):
        MTCLTrain(model(), gradient_surgery=GradientSurgery("upgrad", cut="tables"))
    with pytest.raises(ConfigError, match="LSTM towers"):
        MTCLTrain(model(lstm=True), gradient_surgery=GradientSurgery("upgrad"))


class Own(nn.Module):
    """An encoder that keeps no more than the contract."""

    def __init__(self, wrong=False):
        super().__init__()
        self.wrong = wrong

    def build(self, embedding_dim, max_length):
        self.out_features = 3
        self.linear = nn.Linear(embedding_dim, 3)

    def forward(self, history):
        out = self.linear(history.padded().amax(1))
        return out[:, :2] if self.wrong else out


def test_an_encoder_of_ones_own():
    of = model(Own())
    assert of.lookups.dims == {"user": 4, "item": DIM, "clicked": 3}
    MTCLTrain(of)(batch())[0].backward()
    with pytest.raises(ConfigError, match=r"encoder Own returned \(6, 2\), expected \(6, 3\): rows, out_features"):
        MTCLTrain(model(Own(wrong=True)))(batch())


def test_wrong_histories_are_refused():
    collection = EmbeddingCollection(
        tables=[EmbeddingConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["item", "clicked"])]
    )
    with pytest.raises(ConfigError, match="no embedding collection looks up 'clickd' \\(did you mean 'clicked'"):
        Sequences([collection], {"clickd": HistoryEncoder(Mean())})
    with pytest.raises(ConfigError, match="DIN reads the candidate; say of which feature"):
        Sequences([collection], {"clicked": HistoryEncoder(DIN())})
    with pytest.raises(ConfigError, match="of 3 heads needs embeddings of a multiple"):
        Sequences([collection], {"clicked": HistoryEncoder(Transformer(heads=3))})
    with pytest.raises(ConfigError, match="'age' does not stand beside"):
        HistoryEncoder(Mean(), ages="age")
    encoder = Mean()
    Sequences([collection], {"clicked": HistoryEncoder(encoder)})
    with pytest.raises(ConfigError, match="encodes another history already"):
        Sequences([collection], {"clicked": HistoryEncoder(encoder)})
    with pytest.raises(ValueError, match="histories need both"):
        MTCL(None, 0, SharedBottom([4]), TASKS, embedding_collection=collection)
