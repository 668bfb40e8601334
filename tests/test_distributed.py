"""Any number of ranks and any sharding train the same model as plain PyTorch on the same global batches."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mtcl_torchrec import MTCL, PLE, MMoE, MTCLTrain, SharedBottom, SingleTask, Task, WeightedMean
from mtcl_torchrec.config import DenseOptimizerConfig, OptimizersConfig, ShardingConfig, TableOptimizerConfig
from mtcl_torchrec.data.batch import EncodedRows, global_batches, iterate
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.training.averaging import WeightAverage
from mtcl_torchrec.training.loop import build_pipeline, parallelise, plain_model
from mtcl_torchrec.training.optimizers import build_schedule
from mtcl_torchrec.training.sharding import fill_tables, local_shards, ranks, tables_of

ROWS, STEPS, GLOBAL_BATCH = 90, 12, 8  # the last global batch has 2 rows: some ranks of 4 get none
TASKS = [Task.binary("click"), Task.binary("rare", weight=3.0), Task.regression("seconds")]


def rows():
    g = torch.Generator().manual_seed(5)
    labels = torch.stack(
        [
            torch.randint(0, 2, (ROWS,), generator=g).float(),
            torch.randint(0, 2, (ROWS,), generator=g).float(),
            torch.randn(ROWS, generator=g),
        ],
        1,
    )
    # A rare label: in many steps only one rank has it, in some none.
    labels[torch.rand(ROWS, generator=g) < 0.85, 1] = float("nan")
    ids = torch.stack([torch.randint(0, 200, (ROWS,), generator=g), torch.randint(0, 30, (ROWS,), generator=g)], 1)
    weights = torch.rand(ROWS, 3, generator=g) + 0.5
    return EncodedRows(torch.randn(ROWS, 2, generator=g), ("user", "item"), ids, labels, weights=weights)


TRUNKS = {
    "shared_bottom": lambda: SharedBottom([8]),
    "mmoe": lambda: MMoE(2, [8]),
    "ple": lambda: PLE(1, 1, [8]),
    "single_task": lambda: SingleTask([8]),
}


def train_module(device="meta", trunk="shared_bottom"):
    configs = [
        EmbeddingBagConfig(name="t_users", num_embeddings=200, embedding_dim=8, feature_names=["user"]),
        EmbeddingBagConfig(name="t_items", num_embeddings=30, embedding_dim=4, feature_names=["item"]),
    ]
    torch.manual_seed(7)
    ebc = EmbeddingBagCollection(tables=configs, device=torch.device(device))
    torch.manual_seed(7)
    model = MTCL(ebc, 2, TRUNKS[trunk](), TASKS, WeightedMean({"click": 1.0, "rare": 1.0}), tower_layers=[4])
    return MTCLTrain(model, l2_embedding=0.01)


def eps_of(kind):
    """Adam divides a first gradient by itself: with a tiny eps, one of rounding size becomes a whole step."""
    return 1e-4 if kind == "adam" else 1e-8


def optimizers(kind):
    return OptimizersConfig(
        tables=TableOptimizerConfig(kind=kind, lr=0.05, lr_of={"t_items": 0.02}, eps=eps_of(kind)),
        dense=DenseOptimizerConfig(kind="adam", lr=0.01, clip_norm=0.5),
    )


def cut(sharding):
    return ShardingConfig(kinds=[] if sharding == "auto" else sharding)


def torchrec_batches(batches):
    """TorchRec's own Batch, which knows no sample weights."""
    for batch in batches:
        yield Batch(batch.dense_features, batch.sparse_features, batch.labels)


def train_on_ranks(sharding, kind, pipeline, trunk="shared_bottom", own_batch=True, averaging=0.0):
    """Train and return all parameters, losses and predictions; the same on every rank."""
    with ranks("cpu") as where:
        model, optimizer = parallelise(
            train_module(trunk=trunk), where, optimizers(kind), sharding=cut(sharding), seed=3
        )
        pipe = build_pipeline(model, optimizer, where.device, pipeline)
        schedule = build_schedule(optimizer, 3, STEPS, "linear")
        model.train()
        data, losses = rows(), []
        batch = GLOBAL_BATCH // where.world_size
        indices = global_batches(ROWS, batch, rank=where.rank, world_size=where.world_size, seed=(1, 2))
        batches = iterate(data, indices) if own_batch else torchrec_batches(iterate(data, indices))
        average = WeightAverage(model, averaging) if averaging else None
        for _ in range(STEPS):
            loss, *_ = pipe.progress(batches)
            schedule.step()
            if average is not None:
                average.update()
            losses.append(np.mean(where.gather(loss.item())))
        if average is not None:
            average.swap()
        parameters = {}
        for name, value in model.state_dict().items():
            short = name.removeprefix("model.")
            if ".embedding_bags." in name:
                whole = np.zeros(tuple(value.shape), np.float32)
                for part in where.gather([(t.detach().numpy(), r, c) for t, r, c in local_shards(value)]):
                    for tensor, row, column in part:
                        if tensor.size:
                            whole[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
                parameters[short] = whole
            else:
                parameters[short] = value.detach().numpy()
        if hasattr(pipe, "detach"):
            pipe.detach()
        predictions = predict(plain_model(model), data, batch_size=7)
        del pipe, model, optimizer, schedule, average
        return parameters, losses, predictions


def train_plainly(kind, trunk="shared_bottom", own_batch=True, averaging=0.0):
    """The reference: one process, unsharded tables, ordinary optimizers, the same global batches."""
    module = train_module("cpu", trunk)
    fill_tables(module, seed=3, zero_first_row=True)
    average = WeightAverage(module, averaging) if averaging else None
    table_class = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD,
                   "adam": torch.optim.Adam}[kind]  # fmt: skip
    eps = {} if kind == "sgd" else {"eps": eps_of(kind)}
    bags = module.model.embedding_bag_collection.embedding_bags
    tables = table_class(
        [
            {"params": list(bags["t_users"].parameters()), "lr": 0.05},
            {"params": list(bags["t_items"].parameters()), "lr": 0.02},
        ],
        lr=0.05, **eps,
    )  # fmt: skip
    dense = torch.optim.Adam(module.model.tower.parameters(), lr=0.01)
    starts = [[g["lr"] for g in o.param_groups] for o in (tables, dense)]
    data, losses = rows(), []
    batches = iterate(data, global_batches(ROWS, GLOBAL_BATCH, seed=(1, 2)))
    for step, batch in enumerate(batches if own_batch else torchrec_batches(batches)):
        if step == STEPS:
            break
        factor = (step + 1) / 3 if step < 3 else (STEPS - step) / (STEPS - 3)
        for optimizer, start in zip((tables, dense), starts, strict=True):
            for group, lr in zip(optimizer.param_groups, start, strict=True):
                group["lr"] = lr * factor
            optimizer.zero_grad()
        loss, _ = module(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.model.tower.parameters(), 0.5)
        tables.step()
        dense.step()
        losses.append(loss.item())
        if average is not None:
            average.update()
    if average is not None:
        average.swap()
    parameters = {n.removeprefix("model."): p.detach().numpy() for n, p in module.state_dict().items()}
    return parameters, losses, predict(module.model, data)


CASES = [
    ("auto", "rowwise_adagrad", "sparse_dist"),
    ("table_wise", "rowwise_adagrad", "base"),
    ("row_wise", "rowwise_adagrad", "sparse_dist"),
    ("data_parallel", "rowwise_adagrad", "sparse_dist"),
    ("column_wise", "sgd", "sparse_dist"),
    ("row_wise", "adagrad", "sparse_dist"),
    ("auto", "adam", "sparse_dist"),
]


@pytest.mark.parametrize(("sharding", "kind", "pipeline"), CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_and_sharding_change_nothing(world_size, sharding, kind, pipeline):
    expected, expected_losses, expected_predictions = train_plainly(kind)
    results = run_ranks(train_on_ranks, world_size, sharding, kind, pipeline)
    for parameters, losses, predictions in results:
        assert set(parameters) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(parameters[name], value, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for name, value in expected_predictions.items():
            np.testing.assert_allclose(predictions[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("trunk", "own_batch", "averaging"),
    [("mmoe", True, 0.0), ("ple", False, 0.0), ("single_task", True, 0.0), ("shared_bottom", True, 0.7)],
)
def test_every_trunk_batch_and_average_is_the_same_on_two_ranks(trunk, own_batch, averaging):
    expected, expected_losses, _ = train_plainly("rowwise_adagrad", trunk, own_batch, averaging)
    options = (trunk, own_batch, averaging)
    for parameters, losses, _ in run_ranks(train_on_ranks, 2, "auto", "rowwise_adagrad", "sparse_dist", *options):
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for name, value in expected.items():
            np.testing.assert_allclose(parameters[name], value, atol=2e-5, err_msg=name)


def test_tables_move_and_untouched_rows_do_not():
    """The comparison above would also pass if nothing trained."""
    after, _, _ = train_plainly("rowwise_adagrad")
    module = train_module("cpu")
    fill_tables(module, seed=3, zero_first_row=True)
    before = {n.removeprefix("model."): p.detach().numpy() for n, p in module.state_dict().items()}
    name = "embedding_bag_collection.embedding_bags.t_users.weight"
    moved = np.abs(after[name] - before[name]).max(1) > 0
    assert set(np.flatnonzero(moved)) == set(rows().ids[:, 0].tolist())
    for parameter, value in before.items():
        if "weights" in parameter and "fused" not in parameter:
            assert np.abs(after[parameter] - value).max() > 0, parameter


def test_four_ranks_of_which_some_run_out_of_rows():
    results = run_ranks(train_on_ranks, 4, "row_wise", "rowwise_adagrad", "sparse_dist")
    expected, _, _ = train_plainly("rowwise_adagrad")
    for parameters, _, predictions in results:
        for name, value in expected.items():
            np.testing.assert_allclose(parameters[name], value, atol=1e-5, err_msg=name)
        assert len(predictions["score"]) == ROWS


def fill_and_gather(sharding):
    with ranks("cpu") as where:
        model, _ = parallelise(train_module(), where, optimizers("sgd"), sharding=cut(sharding), seed=11)
        parts = {
            n: [(t.detach().numpy().copy(), r, c) for t, r, c in local_shards(v)] for n, v in tables_of(model).items()
        }
        del model
        return parts


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_tables_start_the_same_however_they_are_cut(sharding):
    module = train_module("cpu")
    fill_tables(module, seed=11, zero_first_row=True)
    whole = {n: v.detach().numpy() for n, v in tables_of(module).items()}
    for parts in run_ranks(fill_and_gather, 2, sharding):
        for name, shards in parts.items():
            for tensor, row, column in shards:
                if tensor.size:
                    expected = whole[name][row : row + tensor.shape[0], column : column + tensor.shape[1]]
                    np.testing.assert_array_equal(tensor, expected)
    table = whole["model.embedding_bag_collection.embedding_bags.t_users.weight"]
    assert len(np.unique(table, axis=0)) == 200
    assert np.abs(table).max() <= 200**-0.5
    assert (table[0] == 0).all()
