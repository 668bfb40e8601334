"""A batch whose loss is not finite, on whichever rank, changes nothing on any rank, and the next one trains as ever."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_distributed import ROWS, cut, rows, train_module
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.datasets.utils import Batch

from mtcl_torchrec import MTBatch
from mtcl_torchrec.config import DenseOptimizerConfig, OptimizersConfig, TableOptimizerConfig
from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.modules.guard import LARGEST
from mtcl_torchrec.modules.regularisers import REGULARISERS
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.sharding import ranks

BATCH = 8


def batches(world_size=1, rank=0):
    return list(iterate(rows(), global_batches(ROWS, BATCH // world_size, rank=rank, world_size=world_size)))[:4]


def poisoned(batch: MTBatch, how: str) -> MTBatch:
    """A copy with one bad row."""
    bad = copy.deepcopy(batch)
    if how == "label":
        bad.labels[0, 2] = 3e38  # its square is infinite
    elif how == "weight":
        bad.labels[0, 0], bad.weights[0, 0] = 1.0, float("nan")
    else:
        bad.dense_features[0, 1] = float("nan")  # every activation of that row, and every gradient of the layers
    return bad


PARTS = {"label": ("seconds",), "weight": ("click",), "input": ("click", "rare", "seconds")}


def snapshot(model, optimizer):
    """Copies of all weights and of all optimizer state on this rank."""
    tensors = {n: v for n, v in model.state_dict().items() if "skipped_steps" not in n}
    for name, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {f"{n}/{i}": part.detach().numpy().copy() for n, t in tensors.items() for i, part in enumerate(here(t))}


def here(value):
    """What this rank holds of a tensor; the state of row-wise Adagrad has one dimension."""
    if isinstance(value, DTensor):
        return value.to_local().local_shards()
    return [s.tensor for s in value.local_shards()] if isinstance(value, ShardedTensor) else [value]


def train_past_a_bad_batch(sharding, tables, dense, pipeline, how):
    """Snapshots after each step, without and with the bad batch before the last one; and what was counted."""
    with ranks("cpu") as where:
        config = OptimizersConfig(
            tables=TableOptimizerConfig(kind=tables, lr=0.05, eps=1e-6),
            dense=DenseOptimizerConfig(kind=dense, lr=0.01, clip_norm=0.5, weight_decay=0.1),
        )
        good = batches(where.world_size, where.rank)
        bad = [*good[:3], poisoned(good[1], how) if where.rank == where.world_size - 1 else good[1], good[3]]
        runs = []
        for data in (good, bad):
            model, optimizer = parallelise(train_module(), where, config, sharding=cut(sharding), seed=3)
            pipe = build_pipeline(model, optimizer, where.device, pipeline)
            model.train()
            waiting, taken, losses = iter(data), [], []
            for _ in data:
                loss, *_ = pipe.progress(waiting)
                losses.append(loss.item())
                taken.append(snapshot(model, optimizer))
            counted = next(m for m in model.modules() if hasattr(m, "skipped")).skipped()
            runs.append((taken, losses, dataclasses.asdict(counted)))
            del pipe, model, optimizer
        return runs


CASES = [
    (1, "table_wise", "sgd", "adamw", "base", "label"),
    (1, "auto", "rowwise_adagrad", "adam", "sparse_dist", "input"),
    (2, "row_wise", "rowwise_adagrad", "adamw", "sparse_dist", "label"),
    (2, "row_wise", "adagrad", "adam", "base", "weight"),
    (2, "column_wise", "sgd", "sgd", "sparse_dist", "input"),
    (2, "table_wise", "adam", "adamw", "sparse_dist", "input"),
    (2, "data_parallel", "rowwise_adagrad", "adam", "sparse_dist", "weight"),
    (2, "data_parallel", "adagrad", "adamw", "base", "input"),
]


@pytest.mark.parametrize(("world_size", "sharding", "tables", "dense", "pipeline", "how"), CASES)
def test_a_bad_batch_on_one_rank_changes_nothing_on_any(world_size, sharding, tables, dense, pipeline, how):
    results = run_ranks(train_past_a_bad_batch, world_size, sharding, tables, dense, pipeline, how)
    for rank, ((never, _, none), (met, losses, counted)) in enumerate(results):
        assert none["steps"] == 0
        assert none["last_batch"] == 0
        assert counted["steps"] == 1
        assert counted["last_batch"] == 4
        assert counted["last_rank"] == world_size - 1
        assert counted["last_parts"] == PARTS[how]
        assert counted["by_part"]["rare"] == (how == "input")
        assert torch.isfinite(torch.tensor(losses[3])) == (rank != world_size - 1 and how != "weight")
        before, after = met[2], met[3]
        assert any("momentum" in n or "sum" in n or "exp_avg" in n for n in before) or tables == dense == "sgd"
        for name, value in before.items():
            # torch's unfused Adagrad counts its steps, and makes no use of the number.
            if not (name.split("/")[1] == "step" and sharding == "data_parallel" and ".embedding_bags." in name):
                np.testing.assert_array_equal(after[name], value, err_msg=name)
                np.testing.assert_array_equal(met[4][name], never[3][name], err_msg=name)
                assert np.isfinite(value).all(), name
        moved = {name for name, value in after.items() if not np.array_equal(met[4][name], value)}
        assert any(".tower." in name for name in moved)
        assert any(".embedding_bags." in name for name in moved)


def test_in_a_persons_own_loop_the_tables_are_safe_and_torchs_fused_optimizers_can_be():
    train = train_module("cpu")
    tables = torch.optim.SGD(train.model.embedding_bag_collection.parameters(), lr=0.1)
    dense = torch.optim.AdamW(train.model.tower.parameters(), lr=0.01, fused=True)
    dense.found_inf = train.loss.found_inf
    good, following, *_ = batches()
    for step, batch in enumerate([good, poisoned(good, "input"), following]):
        before = copy.deepcopy(list(train.parameters()))
        tables.zero_grad()
        dense.zero_grad()
        # TorchRec's own batch has no weights.
        loss, (told, _, _) = train(Batch(batch.dense_features, batch.sparse_features, batch.labels))
        loss.backward()
        tables.step()
        dense.step()
        same = [torch.equal(a, b) for a, b in zip(before, train.parameters(), strict=True)]
        assert all(same) if step == 1 else not any(same)
        assert torch.isnan(told) if step == 1 else torch.isfinite(told)
    assert train.loss.skipped().steps == 1


def test_two_forwards_before_their_backwards_do_not_mix():
    """Each batch has a flag of its own."""
    train = train_module("cpu")
    good, other, *_ = batches()
    table = train.model.embedding_bag_collection.embedding_bags["t_items"].weight
    bad_loss, _ = train(poisoned(good, "input"))
    good_loss, _ = train(other)
    bad_loss.backward()
    assert not table.grad.any()
    good_loss.backward()
    assert table.grad.any()
    assert torch.isfinite(table.grad).all()


def test_the_penalty_on_embeddings_is_watched_too():
    train = train_module("cpu")
    batch = batches()[0]
    table = train.model.embedding_bag_collection.embedding_bags["t_items"].weight
    with torch.no_grad():
        table[batch.sparse_features["item"].values()[0]] = 1e19  # finite logits of a norm, an infinite square
    loss, _ = train(batch)
    loss.backward()
    assert "l2_embedding" in train.loss.skipped().last_parts
    assert not table.grad.any()


def test_counts_add_up_travel_in_the_state_and_stay_as_they_are_in_evaluation():
    train = train_module("cpu")
    good, *_ = batches()
    for how in ("label", "weight", "label"):
        train(good)
        train(poisoned(good, how))
    skipped = train.loss.skipped()
    assert (skipped.steps, skipped.last_batch, skipped.last_parts) == (3, 6, ("seconds",))
    tasks = {"click": 1, "rare": 0, "seconds": 2}
    assert skipped.by_part == {**tasks, **dict.fromkeys(REGULARISERS, 0)}
    assert train.loss.found_inf == 1
    train.eval()
    train(poisoned(good, "label"))
    assert train.loss.skipped() == skipped
    resumed = train_module("cpu")
    resumed.load_state_dict(train.state_dict())
    assert resumed.loss.skipped() == skipped
    resumed(good)
    assert resumed.loss.skipped() == skipped
    assert resumed.loss.found_inf == 0


@pytest.mark.parametrize("size", [0.9, 1.1])
def test_a_finite_loss_too_large_for_the_optimizers_state_is_skipped_as_well(size):
    train = train_module("cpu")
    batch = batches()[0]
    weights = torch.ones_like(batch.labels)
    batch.labels[0, 2] = (size * LARGEST) ** 0.5
    loss, _ = train(dataclasses.replace(batch, weights=weights))
    assert torch.isfinite(loss)
    assert train.loss.skipped().steps == (size > 1)


def test_a_missing_label_of_any_weight_and_an_infinite_prediction_without_label_do_not_matter():
    train = train_module("cpu")
    batch = batches()[0]
    batch.labels[0] = float("nan")
    batch.weights[0] = float("nan")
    loss, _ = train(batch)
    assert torch.isfinite(loss)
    assert train.loss.skipped().steps == 0
