"""Everything for rare tasks at once, on two ranks: equal to one rank, through the public entry point, and resumed."""

import io

import numpy as np
import pytest
import shop
import torch
import torch.distributed as dist
from ranks import run_ranks
from rich.console import Console
from test_faults import state_of
from test_resume import Interruption, stop_after
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, PLE, MTBatch, MTCLTrain, Task
from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint, read_about
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

RUN = """
data: {train: train, val: val.parquet}
schema:
  user: user_id
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8}
    - {name: genre, group: item, embedding_dim: 4}
    - {name: hour, group: context, embedding_dim: 4}
  tasks:
    - {name: click, kind: binary, negative_rate: 0.5, pos_weight: 3.0}
    - {name: buy, kind: binary, mask: click, pairwise: 0.5, negative_rate: 0.7}
    - {name: again, kind: binary, label: click, focal_gamma: 2.0, pos_weight: 2.0}
    - {name: stars, kind: regression, inputs: [user, item]}
model: {trunk: {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}, tower_layers: [8]}
optimizers: {tables: {lr: 0.2}, dense: {lr: 0.02}}
training:
  epochs: 4
  batch_size: 25
  warmup_steps: 5
  patience: 0
  task_patience: 1
  checkpoint: {every_steps: 7}
  regularisers: {l2_embedding: 1e-4, l2_dense: 1e-5, expert_orthogonality: 1e-2, gate_balance: 1e-2}
"""

TASKS = [
    Task.binary("click", negative_rate=0.5, pos_weight=3.0, weight=2.0),
    Task.binary("buy", pairwise=0.5, negative_rate=0.7, focal_gamma=1.5),
    Task.binary("like", pairwise=1.0),
    Task.regression("stars", inputs=("user",)),
]
ROWS = 24
PENALTIES = {"l2_embedding": 0.1, "l2_dense": 0.01, "expert_orthogonality": 0.5, "gate_balance": 0.3}


def one_step(rank=0, world_size=1):
    """Loss and gradients of one rank's part of a batch, in plain PyTorch; row i of it is i · ranks + rank."""
    g = torch.Generator().manual_seed(1)
    ids, requests = torch.randint(0, 30, (2, ROWS), generator=g), torch.randint(0, 4, (ROWS,), generator=g)
    requests = 2 * requests + torch.arange(ROWS) % 2  # a request lies on one rank
    labels = torch.randint(0, 2, (ROWS, 4), generator=g).float()
    labels[torch.rand(ROWS, 4, generator=g) < 0.2] = float("nan")
    labels[::5] = float("nan")
    mine = slice(rank, None, world_size)
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(name=f"t{f}", num_embeddings=30, embedding_dim=8, feature_names=[f]) for f in "ui"]
    groups = {"u": ["user"], "i": ["item"]}
    ebc = EmbeddingBagCollection(tables=tables)
    model = MTCL(ebc, 0, PLE(2, 1, [8], levels=2), TASKS, tower_layers=[4], feature_groups=groups)
    train = MTCLTrain(model, regularisers=PENALTIES, seed=3)
    train.loss.freeze("click")
    part = ids[:, mine]
    features = KeyedJaggedTensor(["u", "i"], part.flatten(), lengths=torch.ones(part.numel(), dtype=torch.int64))
    loss, _ = train(MTBatch(torch.empty(part.shape[1], 0), features, labels[mine], requests=requests[mine]))
    loss.backward()
    return [loss.detach(), train.loss.last_task_losses, *(p.grad for p in train.parameters())]


def train(folder, name, existing="refuse", stop=None):
    """What was said."""
    step, said = TrainingProgress.step, io.StringIO()
    if stop is not None:
        stop_after(stop)
    console = Console(file=said, width=200)
    try:
        train_run(parse_run(RUN, folder=folder), folder / name, existing=existing, device="cpu", console=console)
    except Interruption:
        pass
    finally:
        TrainingProgress.step = step
    return said.getvalue()


def everything_on_ranks(folder):
    """All that needs ranks in one process group: starting them takes seconds."""
    with ranks("cpu") as where:
        values = one_step(where.rank, where.world_size)
        for value in values:
            dist.all_reduce(value)
            value /= where.world_size
        straight = train(folder, "straight")
        frozen = min(read_about(newest_checkpoint(folder / "straight/checkpoints"))["history"]["frozen"].values())
        steps = read_about(newest_checkpoint(folder / "straight/checkpoints"))["step"] // 4
        stop = (frozen - 1) * steps + 12  # in the first epoch with a frozen task, after its first checkpoint on the way
        train(folder, "stopped", stop=stop)
        resumed = train(folder, "stopped", "resume")
        return [value.numpy() for value in values], straight, resumed


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rare")
    frame = shop.log(1500)
    (folder / "train").mkdir()
    frame[:1000].to_parquet(folder / "train/a.parquet", index=False)
    frame[1000:].to_parquet(folder / "val.parquet", index=False)
    return folder, run_ranks(everything_on_ranks, 2, folder)


def test_two_ranks_have_the_loss_and_the_gradient_of_one(two):
    """Draws, pairs (of requests that lie on one rank), every regulariser, also the square of mean gate weights."""
    expected = [value.numpy() for value in one_step()]
    for values, *_ in two[1]:
        for value, of_one in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, of_one, rtol=1e-4, atol=2e-6)


def test_all_of_it_trains_and_predictions_are_those_of_all_rows(two):
    folder, results = two
    straight = results[0][1]
    assert straight.count("task 'again': its focal loss pulls predictions towards 0.5") == 1
    metrics = read_about(newest_checkpoint(folder / "straight/checkpoints"))["history"]["epochs"]
    last = metrics[-1]
    assert last["click"]["auc"] > 0.57
    assert last["again"]["auc"] > 0.55
    assert last["buy"]["auc"] > 0.7
    assert 0.8 < last["click"]["calibration"] < 1.2  # odds six times too high without the correction
    assert 0.75 < last["buy"]["calibration"] < 1.3


def test_a_run_that_was_interrupted_after_a_task_was_frozen_ends_as_if_it_had_not_been(two):
    folder, results = two
    (tensors, about), (expected, expected_about) = state_of(folder / "stopped"), state_of(folder / "straight")
    frozen = about["history"]["frozen"]
    assert frozen
    assert set(frozen) < {"click", "buy", "again", "stars"}, "some must go on"
    assert {k: about[k] for k in ("step", "position", "history")} == {
        k: expected_about[k] for k in ("step", "position", "history")
    }
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    order = ["click", "buy", "again", "stars"]
    assert [bool(f) for f in tensors["weights.loss.frozen_tasks.frozen"]] == [t in frozen for t in order]
    first = min(frozen, key=frozen.get)
    assert f"{first} has not improved for 1 epoch: frozen from epoch {frozen[first]}" in results[0][1]
    assert f"epoch {frozen[first]}," in results[0][2].split("going on after step")[1]


def test_the_rare_fields_come_back_from_the_runs_own_yaml():
    run = parse_run(RUN)
    again = parse_run(dump_run(run))
    assert again.data_schema.tasks == run.data_schema.tasks
    assert again.training.regularisers == run.training.regularisers
    assert again.data_schema.request_column == "user_id"
