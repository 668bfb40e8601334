"""A model over zero-collision hashing: ids from a space of 2⁴⁰ find rows of their own, on one rank and on two."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from mtcl_torchrec import MTCL, ConfigError, MTBatch, MTCLTrain, SharedBottom, Task, WeightedMean
from mtcl_torchrec.config import DenseOptimizerConfig, TableOptimizerConfig
from mtcl_torchrec.modules.embeddings import embedding_dims, looked_up_features
from mtcl_torchrec.training.loop import build_pipeline, plain_model
from mtcl_torchrec.training.optimizers import build_optimizer, check_tables, fuse_table_optimizer
from mtcl_torchrec.training.planning.planner import TableSharder
from mtcl_torchrec.training.sharding import fill_tables, local_shards, ranks, tables_of

ROWS, USERS, SPACE, STEPS = 128, 40, 2**40, 60


def user_ids():
    """Ids all over the space that are the same modulo the number of rows."""
    draw = np.random.default_rng(0).choice(SPACE // ROWS, USERS, replace=False)
    return torch.from_numpy(draw * ROWS + 5)


def collection(device, buckets):
    configs = [EmbeddingBagConfig(name="t_users", num_embeddings=ROWS, embedding_dim=8, feature_names=["user"])]
    ebc = EmbeddingBagCollection(tables=configs, device=torch.device(device))
    modules = {
        "t_users": MCHManagedCollisionModule(
            zch_size=ROWS,
            device=torch.device("cpu"),
            eviction_policy=DistanceLFU_EvictionPolicy(),
            eviction_interval=2,
            input_hash_size=SPACE,
            buckets=buckets,
        )
    }
    return ManagedCollisionEmbeddingBagCollection(ebc, ManagedCollisionCollection(modules, configs))


def train_module(device="meta", buckets=1):
    torch.manual_seed(1)
    tasks = [Task.binary("click"), Task.regression("seconds")]
    return MTCLTrain(
        MTCL(collection(device, buckets), 1, SharedBottom([8]), tasks, WeightedMean({"click": 1.0}), tower_layers=[]),
        regularisers={"l2_embedding": 1e-4},
    )


def batch(step, rank, rows=32):
    """Who the user is decides both labels."""
    g = torch.Generator().manual_seed(step * 10 + rank)
    who = torch.randint(0, USERS, (rows,), generator=g)
    features = KeyedJaggedTensor(["user"], values=user_ids()[who], lengths=torch.ones(rows, dtype=torch.int64))
    labels = torch.stack([(who % 2).float(), (who % 5) - 2.0], 1)
    return MTBatch(torch.randn(rows, 1, generator=g), features, labels)


def train_on_ranks(pipeline, kind):
    with ranks("cpu") as where, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = train_module(buckets=where.world_size)
        tables = TableOptimizerConfig(kind=kind, lr=0.2)
        fuse_table_optimizer(module, tables)
        sharders = [ManagedCollisionEmbeddingBagCollectionSharder(TableSharder())]
        planner = EmbeddingShardingPlanner(
            topology=Topology(where.world_size, "cpu", local_world_size=where.world_size),
            storage_reservation=FixedPercentageStorageReservation(0.15),
            constraints={"t_users": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])},
        )
        model = DistributedModelParallel(
            module,
            env=ShardingEnv(where.world_size, where.rank, dist.group.WORLD, output_dtensor=True),
            device=where.device,
            plan=planner.collective_plan(module, sharders, dist.group.WORLD),
            sharders=sharders,
        )
        fill_tables(model, seed=2, scale=0.01)
        optimizer = build_optimizer(model, tables, DenseOptimizerConfig(lr=0.02))
        pipe = build_pipeline(model, optimizer, where.device, pipeline)
        model.train()
        before = {
            n: [(t.detach().clone(), r) for t, r, _ in local_shards(v)] for n, v in tables_of(model).items()
        }  # fmt: skip
        waiting, losses = (batch(step, where.rank) for step in range(STEPS)), []
        for _ in range(STEPS):
            loss, *_ = pipe.progress(waiting)
            losses.append(float(np.mean(where.gather(loss.item()))))
        if hasattr(pipe, "detach"):
            pipe.detach()
        moved = set()
        for name, value in tables_of(model).items():
            for (now, row, _), (then, _) in zip(local_shards(value), before[name], strict=True):
                moved |= {row + int(i) for i in torch.nonzero((now != then).any(1)).flatten()}
        model.eval()
        everyone = KeyedJaggedTensor(["user"], values=user_ids(), lengths=torch.ones(USERS, dtype=torch.int64))
        with torch.no_grad():
            predictions = {n: v.numpy().copy() for n, v in plain_model(model)(torch.zeros(USERS, 1), everyone).items()}
        del pipe, model, optimizer, module
        return losses, moved, predictions


@pytest.mark.parametrize(
    ("world_size", "pipeline", "kind"),
    [(1, "base", "sgd"), (1, "sparse_dist", "adagrad"), (2, "base", "adagrad"), (2, "sparse_dist", "sgd")],
)
def test_ids_that_would_collide_have_rows_of_their_own(world_size, pipeline, kind):
    results = run_ranks(train_on_ranks, world_size, pipeline, kind)
    moved = set().union(*(rows for _, rows, _ in results))
    assert len(moved) >= USERS
    for losses, _, predictions in results:
        assert losses == results[0][0]
        assert np.mean(losses[-5:]) < 0.2 * np.mean(losses[:3])
        who = np.arange(USERS)
        np.testing.assert_array_equal(predictions["click"] > 0.5, who % 2 == 1)
        assert np.abs(predictions["seconds"] - (who % 5 - 2)).mean() < 0.5
        np.testing.assert_allclose(predictions["score"], predictions["click"], atol=1e-6)


def test_a_model_finds_the_tables_inside():
    inside = collection("cpu", 1)
    assert embedding_dims(inside) == {"user": 8}
    assert looked_up_features(inside) == {"user"}
    train = train_module("cpu")
    loss, _ = train(batch(0, 0))
    loss.backward()
    assert all(p.grad is not None for p in train.parameters())


def test_what_fbgemm_cannot_evict_is_refused():
    tables, cpu = TableOptimizerConfig(kind="rowwise_adagrad"), torch.device("cpu")
    with pytest.raises(ConfigError, match="table 't_users': under managed collision, rowwise_adagrad cannot reset"):
        check_tables(train_module(), tables, cpu)
    check_tables(train_module(), tables, torch.device("cuda"))
    check_tables(train_module(), TableOptimizerConfig(kind="adagrad"), cpu)
