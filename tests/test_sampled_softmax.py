"""In-batch sampled softmax: loops, a closed form, 2 ranks as 1, through the public entry point, and resumed."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import shop
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from ranks import run_ranks
from rich.console import Console
from sklearn.metrics import roc_auc_score
from test_faults import assert_same_result
from test_resume import Interruption, stop_after
from test_surgery import Waits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, MMoE, MTBatch, MTCLTrain, Task
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.modules import sampled_softmax
from mtcl_torchrec.modules.dot_product import vector_names
from mtcl_torchrec.modules.sampled_softmax import DotLosses, Popularity
from mtcl_torchrec.schema import ConfigError, Schema
from mtcl_torchrec.training.checkpoint.reader import read_tensors
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint, read_about
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks


def dot(name="liked", l2=0.0, weight=1.0, **softmax):
    head = {"kind": "dot", "dim": 4, "l2": l2, "sampled_softmax": {"item": "i", **softmax}}
    return Task.binary(name, weight=weight, head=head)


def features(items):
    """Rows with one item each, -1 for none."""
    return KeyedJaggedTensor(["i"], items[items >= 0], lengths=(items >= 0).long())


def terms(losses, user, item, items, weights):
    """The softmax's average over the positives, from vectors (B, 5)."""
    logits = dict(zip(vector_names(losses.tasks[0]), (user, item), strict=True))
    batch = MTBatch(torch.empty(len(items), 0), features(items), weights[:, None])
    sums, counts = losses(logits, torch.ones(len(items), 1), weights[:, None], batch)
    return sums.sum() / counts.sum()


def looped(user, item, items, weights, met, total, temperature=1.0, logq=True):
    """The same in plain Python over rows, differentiable."""
    losses, count = [], 0.0
    for b in range(len(items)):
        others = [r for r in range(len(items)) if items[r] >= 0 and items[r] != items[b]]
        if items[b] < 0 or not others or weights[b] == 0:
            continue
        s = [(user[b, :4] * item[r, :4]).sum() / (2 * temperature) for r in range(len(items))]
        share = {r: met[int(items[r])] / total for r in (*others, b)}
        if logq:
            z = sum(s[r].exp() * (1 - share[b]) / share[r] for r in others) / len(others)
        else:
            z = sum(s[r].exp() for r in others) / sum(int(items[r]) == int(items[b]) for r in range(len(items)))
        losses.append(weights[b] * -(s[b].exp() / (s[b].exp() + z)).log())
        count += weights[b]
    return sum(losses) / count


def drawn(rows=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    user, item = (torch.randn(rows, 5, generator=g, requires_grad=True) for _ in range(2))
    items = torch.randint(-1, 6, (rows,), generator=g)
    weights = torch.where(torch.rand(rows, generator=g) < 0.6, torch.rand(rows, generator=g), 0.0)
    return user, item, items, weights


@pytest.mark.parametrize("at_once", [2**22, 30])
@pytest.mark.parametrize("softmax", [{}, {"temperature": 0.3}, {"correction": "none"}])
def test_loss_and_gradient_are_those_of_a_loop_over_rows(softmax, at_once, monkeypatch):
    monkeypatch.setattr(sampled_softmax, "_AT_ONCE", at_once)
    losses, (user, item, items, weights) = DotLosses([dot(**softmax)], {"i": 6}), drawn()
    terms(losses, *drawn(seed=1))  # an earlier batch counts
    met = torch.bincount(torch.cat([drawn(seed=1)[2], items]).clamp(min=-1) + 1)[1:]
    got = terms(losses, user, item, items, weights)
    assert torch.equal(losses.popularity[0].counts, met)
    options = {"temperature": softmax.get("temperature", 1.0), "logq": "correction" not in softmax}
    expected = looped(user, item, items, weights, met, met.sum(), **options)
    torch.testing.assert_close(got, expected)
    for value, wanted in zip(
        torch.autograd.grad(got, [user, item]), torch.autograd.grad(expected, [user, item]), strict=True
    ):
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-4)
        assert value[:, 4].abs().max() == 0  # biases are none of its business


def test_in_the_first_batch_it_is_the_softmax_over_the_items_of_the_batch_each_once():
    user, item, items, weights = drawn()
    by_item = torch.randn(6, 5)
    item = by_item[items]
    scores = user[:, :4] @ by_item[:, :4].T / 2
    here = items[items >= 0].unique()
    present = (items >= 0) & (weights > 0)
    log_p = scores[:, here].log_softmax(1)[torch.arange(12), torch.searchsorted(here, items.clamp(min=0))]
    expected = -(weights * log_p)[present].sum() / weights[present].sum()
    torch.testing.assert_close(terms(DotLosses([dot()], {"i": 6}), user, item, items, weights), expected)


@pytest.mark.parametrize("correction", ["logq", "none"])
def test_the_minimum_is_at_the_log_of_what_is_liked_whatever_is_shown_how_often(correction):
    """The gradient vanishes where s = log p(i | u, 1), or the log of the lift; the rows are exactly as q has it."""
    shown = torch.tensor([0.55, 0.25, 0.12, 0.08])
    liked = torch.tensor([[0.2, 0.3, 0.1, 0.4], [0.5, 0.1, 0.3, 0.1]])  # p(i | u, 1) of two users
    items = torch.arange(4).repeat_interleave((200 * shown).round().long())
    users = torch.arange(200) % 2
    lift = liked / shown
    user = torch.zeros(200, 5)
    user[torch.arange(200), users] = 1.0

    def slope(scores):
        table = (2 * scores).requires_grad_()  # ⟨u, v⟩ / √4, with users' vectors of one 1
        item = torch.cat([table.T, torch.zeros(4, 3)], 1)[items]
        losses = DotLosses([dot(correction=correction)], {"i": 4})
        # Weights as if positives were drawn from p(i | u, 1).
        return torch.autograd.grad(terms(losses, user, item, items, lift[users, items]), table)[0].abs().max()

    right, other = (liked, lift) if correction == "logq" else (lift, liked)
    assert slope(right.log() + torch.tensor([[0.3], [-0.2]])) < 1e-6  # whatever is added for a user
    assert slope(other.log()) > 0.03


def test_without_negatives_and_without_items_nothing_is_learnt_and_nothing_breaks():
    user, item, _, weights = drawn()
    for items in (torch.full((12,), 3), torch.full((12,), -1)):
        losses = DotLosses([dot()], {"i": 6})
        logits = dict(zip(vector_names(losses.tasks[0]), (user, item), strict=True))
        batch = MTBatch(torch.empty(12, 0), features(items), weights[:, None])
        sums, counts = losses(logits, torch.ones(12, 1), weights[:, None], batch)
        assert sums.item() == counts.item() == 0
        assert all(g.abs().max() == 0 for g in torch.autograd.grad(sums.sum(), [user, item]))


def test_items_are_counted_in_training_alone_and_the_counts_travel_and_grow(tmp_path):
    popularity = Popularity(4)
    popularity.eval()(torch.tensor([1, 2]))
    popularity.train()(torch.tensor([1, 1, 3, -1, 7]))  # 7 shares a count with 3
    assert popularity.counts.tolist() == [0, 2, 0, 2]
    assert popularity.eval()(torch.tensor([1, 0, 3])).tolist() == [2, 0, 2]
    dcp.save({"weights.x.popularity.0.counts": popularity.counts}, checkpoint_id=tmp_path / "saved", no_dist=True)
    grown = Popularity(6)
    read_tensors({"weights.x.popularity.0.counts": grown.counts}, tmp_path / "saved", alone=True)
    assert grown.counts.tolist() == [0, 2, 0, 2, 0, 0]


def test_what_cannot_tell_items_apart_is_refused():
    head = {"kind": "dot", "sampled_softmax": {}}
    with pytest.raises(ConfigError, match=r"task 'a': head.sampled_softmax compares items: name the sparse feature"):
        DotLosses([Task.binary("a", head=head)])
    with pytest.raises(ConfigError, match=r"no sparse feature 'i' \(did you mean 'ii'\?\)"):
        DotLosses([dot()], {"ii": 6})
    columns = [{"name": "u", "group": "user"}, {"name": "i", "group": "item"}]
    with pytest.raises(ValidationError, match="compares items: name the id feature"):
        Schema(features=columns, tasks=[Task.binary("a", head=head)])
    with pytest.raises(ValidationError, match=r"head.sampled_softmax.item: no id feature 'j'"):
        Schema(features=columns, tasks=[Task.binary("a", head={"kind": "dot", "sampled_softmax": {"item": "j"}})])
    assert Schema(features=columns, item="i", tasks=[Task.binary("a", head=head)]).item_feature == "i"


def test_nobody_waits_for_the_device():
    losses, (user, item, items, weights) = DotLosses([dot()], {"i": 6}), drawn()
    with Waits() as waits:
        terms(losses, user, item, items, weights).backward()
    assert not waits.met


# ---------------------------------------------------------------------- ranks and runs

ROWS = 25  # an odd number: one rank has a row more
TASKS = [
    Task.binary("click", weight=2.0),
    dot("liked", l2=0.05, weight=0.7, temperature=0.5),
    dot("loved", correction="none"),
]


def one_step(rank=0, world_size=1):
    """Loss and gradients of one rank's part of a batch, the second of two."""
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(name=f"t{f}", num_embeddings=9, embedding_dim=8, feature_names=[f]) for f in "ui"]
    model = MTCL(
        EmbeddingBagCollection(tables=tables), 0, MMoE(2, [8]), TASKS, tower_layers=[4],
        feature_groups={"u": ["user"], "i": ["item"]},
    )  # fmt: skip
    train = MTCLTrain(model, regularisers={"l2_dense": 0.01})
    for _ in range(2):
        ids = torch.randint(0, 9, (2, ROWS), generator=g)
        labels = torch.randint(0, 2, (ROWS, 3), generator=g).float()
        labels[torch.rand(ROWS, 3, generator=g) < 0.2] = float("nan")
        mine = slice(rank, None, world_size)
        part = ids[:, mine]
        sparse = KeyedJaggedTensor(["u", "i"], part.flatten(), lengths=torch.ones(part.numel(), dtype=torch.int64))
        train.zero_grad()
        loss, _ = train(MTBatch(torch.empty(part.shape[1], 0), sparse, labels[mine]))
        loss.backward()
    counts = [p.counts.float() for p in train.loss.dot_losses.popularity]
    return [loss.detach(), train.loss.last_task_losses, *(p.grad for p in train.parameters()), *counts]


RUN = """
data: {train: train.parquet, val: val.parquet}
schema:
  user: user_id
  item: product_id
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8}
    - {name: genre, group: item, embedding_dim: 4}
    - {name: hour, group: context, embedding_dim: 4}
  tasks:
    - {name: click, kind: binary}
    - {name: liked, kind: binary, label: click, pairwise: 0.1, negative_rate: 0.8,
       head: {kind: dot, dim: 8, l2: 1e-4, factors: [user_id, product_id],
              sampled_softmax: {weight: 0.1, temperature: 0.7}}}
    - {name: buy, kind: binary, after: click, head: {kind: dot, sampled_softmax: {weight: 0.05, correction: none}}}
    - {name: stars, kind: regression, inputs: [user, item], head: dot, weight: 0.3}
    - {name: again, kind: binary, label: click,
       head: {kind: tower_dot, dim: 8, l2: 1e-4, factors: [user_id, product_id], bilinear: true}}
model: {trunk: {kind: mmoe, num_experts: 3, expert_layers: [16]}, tower_layers: [8]}
optimizers: {tables: {lr: 0.2}, dense: {lr: 0.02}}
training:
  {batch_size: 40, patience: 0, checkpoint: {every_steps: 7},
   regularisers: {l2_embedding: {user_id: 1e-3}, l2_rows: {product_id: 1e-3}}, MORE}
BALANCE
fusion: {weights: {click: 1, liked: 1, buy: 2, stars: 0.2}}
"""
RUNS = {
    "surgery": RUN.replace("MORE", "epochs: 3, task_patience: 1").replace(
        "BALANCE", "balance: {surgery: {kind: upgrad, cut: embeddings}}"
    ),
    "bf16": RUN.replace("MORE", "epochs: 2, precision: bf16, pipeline: base").replace("BALANCE", "calibration: platt"),
}


def train(folder, kind, name, existing="refuse", stop=None):
    step = TrainingProgress.step
    if stop is not None:
        stop_after(stop)
    try:
        console = Console(file=io.StringIO(), width=200)
        run = parse_run(RUNS[kind], folder=folder)
        train_run(run, folder / name, existing=existing, device="cpu", console=console)
    except Interruption:
        pass
    finally:
        TrainingProgress.step = step


def everything_on_ranks(folder):
    """All that needs ranks in one process group: starting them takes seconds."""
    with ranks("cpu") as where:
        values = one_step(where.rank, where.world_size)
        for value in values:
            dist.all_reduce(value)
            value /= where.world_size
        train(folder, "surgery", "straight")
        train(folder, "surgery", "stopped", stop=24)
        train(folder, "surgery", "stopped", "resume")
        train(folder, "bf16", "bf16")
        return [value.numpy() for value in values]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("softmax")
    frame = shop.log(1500)
    frame[:1000].to_parquet(folder / "train.parquet", index=False)
    frame[1000:].to_parquet(folder / "val.parquet", index=False)
    return folder, run_ranks(everything_on_ranks, 2, folder)


def test_two_ranks_of_half_a_batch_are_one_of_the_whole(two):
    expected = [value.numpy() for value in one_step()]
    for values in two[1]:
        for value, of_one in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, of_one, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["straight", "bf16"])
def test_it_trains_through_the_public_entry_point(two, kind):
    last = read_about(newest_checkpoint(two[0] / kind / "checkpoints"))["history"]["epochs"][-1]
    assert last["click"]["auc"] > 0.57
    assert last["liked"]["auc"] > 0.57
    assert last["again"]["auc"] > 0.57
    assert last["buy"]["auc"] > 0.65
    assert 0.7 < last["liked"]["calibration"] < 1.4


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(two):
    assert_same_result(two[0] / "stopped", two[0] / "straight")


# ---------------------------------------------------------------------- what is there to be found


def low_rank(users=50, items=60, rank=2, rows=12_000, seed=0):
    """Ratings of a low-rank matrix, the log-odds known."""
    draw = np.random.default_rng(seed)
    u, v = draw.normal(size=(users, rank)), draw.normal(size=(items, rank))
    odds = 1.5 * u @ v.T / math.sqrt(rank) + 0.5 * draw.normal(size=items) + 0.5 * draw.normal(size=(users, 1))
    popular = 1 / np.arange(1, items + 1) ** 0.7
    user, item = draw.integers(users, size=rows), draw.choice(items, rows, p=popular / popular.sum())
    p = 1 / (1 + np.exp(-odds[user, item]))
    return pd.DataFrame({"user": user, "item": item, "liked": (draw.random(rows) < p).astype(int), "truth": p})


FACTORISE = """
data: {train: train.parquet, val: val.parquet}
schema:
  user: user
  item: item
  features:
    - {name: user, group: user, embedding_dim: 8}
    - {name: item, group: item, embedding_dim: 8}
  tasks:
    - {name: liked, kind: binary, head: {kind: dot, dim: 8, l2: 1e-3}}
    - {name: too, kind: binary, label: liked, head: {kind: dot, dim: 8, l2: 1e-3, sampled_softmax: {weight: 0.05}}}
optimizers: {tables: {kind: rowwise_adagrad, lr: 0.3}, dense: {lr: 0.03, weight_decay: 0.0}}
training: {epochs: 9, batch_size: 400, patience: 0}
"""


def test_a_low_rank_matrix_is_recovered(tmp_path):
    frame = low_rank()
    known, val = frame[:10_000], frame[10_000:]
    known.to_parquet(tmp_path / "train.parquet", index=False)
    val.to_parquet(tmp_path / "val.parquet", index=False)
    run = parse_run(FACTORISE, folder=tmp_path)
    done = train_run(run, tmp_path / "run", device="cpu", console=Console(quiet=True))
    oracle = roc_auc_score(val.liked, val.truth)
    popular = roc_auc_score(val.liked, val.item.map(known.groupby("item").liked.mean()))
    assert oracle > 0.8
    assert popular < 0.65
    for task in ("liked", "too"):
        reached = done.evaluations["val"].tasks[task]["auc"]
        assert reached > oracle - 0.02, (task, reached, oracle, popular)
