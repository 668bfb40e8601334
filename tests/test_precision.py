"""bf16 in the dense part, fp16 tables, gradients of tables cut: through whole runs, and against plain PyTorch."""

import dataclasses

import numpy as np
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console
from test_distributed import GLOBAL_BATCH, ROWS, cut, eps_of, rows, train_module
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from mtcl_torchrec import ConfigError
from mtcl_torchrec.config import DenseOptimizerConfig, OptimizersConfig, TableOptimizerConfig, parse_run
from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.data.jagged import Bag
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.optimizers import check_tables
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import fill_tables, local_shards, ranks, tables_of

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log().to_parquet(folder / "log.parquet", index=False)
    return folder


def train_shop(data, folder, change=lambda text: text):
    run = parse_run(change(shop.RUN.replace("epochs: 4", "epochs: 2")), folder=data)
    return train_run(run, folder, device="cpu", console=Console(file=open("/dev/null", "w")))


@pytest.fixture(scope="module")
def fp32(data, tmp_path_factory):
    return train_shop(data, tmp_path_factory.mktemp("run") / "fp32")


# ---------------------------------------------------------------- bf16 after the embeddings


def train_shop_on_ranks(data, folder, pipeline):
    """Click AUC in fp32 and in bf16."""
    found = []
    for precision in ("fp32", "bf16"):
        changed = f"precision: {precision}, pipeline: {pipeline}, batch_size: 48,"
        result = train_shop(data, folder / precision, lambda text, c=changed: text.replace("batch_size: 32,", c))
        found.append(result.evaluations["val"].tasks["click"]["auc"])
    return found


@pytest.mark.parametrize(
    ("world_size", "pipeline"), [pytest.param(1, "sparse_dist", marks=pytest.mark.full), (2, "base")]
)
def test_a_run_in_bf16_learns_what_one_in_fp32_does(data, tmp_path, world_size, pipeline):
    (expected, auc), *others = run_ranks(train_shop_on_ranks, world_size, data, tmp_path, pipeline)
    assert others == [[expected, auc]] * (world_size - 1)
    assert auc == pytest.approx(expected, abs=0.01)
    assert auc != expected
    assert expected > 0.7
    # Read back, it computes as it was trained and evaluated, and holds float32.
    run = FinishedRun.load(tmp_path / "bf16")
    assert run.model.tower.precision == "bf16"
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_logits_are_float32_heads_of_bf16_layers():
    plain, short = train_module("cpu"), train_module("cpu")
    short.model.tower.precision = "bf16"
    batch = next(iterate(single_rows(), global_batches(ROWS, GLOBAL_BATCH)))
    exact, (_, exact_logits, _) = plain(batch)
    loss, (_, logits, _) = short(batch)
    loss.backward()
    for name, value in logits.items():
        assert value.dtype == torch.float32
        # The head itself is float32: rows that differ little are not tied.
        assert not torch.equal(value, value.bfloat16().float())
        torch.testing.assert_close(value, exact_logits[name], atol=0.02, rtol=0.02)
        assert not torch.equal(value, exact_logits[name])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.02, rtol=0.02)
    assert {p.grad.dtype for p in short.parameters()} == {torch.float32}


def test_another_precision_is_refused():
    from mtcl_torchrec import MTCL, SharedBottom, Task

    ebc = train_module("cpu").model.embedding_bag_collection
    with pytest.raises(ValueError, match="precision is one of fp32, bf16, not 'fp16'"):
        MTCL(ebc, 2, SharedBottom([4]), [Task.binary("click")], precision="fp16")


def test_gradients_cannot_be_accumulated_and_the_error_says_why():
    with pytest.raises(ConfigError, match="gradient_accumulation: tables whose optimizer is fused into backward step"):
        parse_run(shop.RUN.replace("training: {", "training: {gradient_accumulation: 4, "))


# ---------------------------------------------------------------- fp16 tables


def single_rows():
    """Bags of one id: a mean over more is divided before the cut in a table that is cut by rows, else after it."""
    data = rows()
    tags = Bag(torch.arange(len(data)) % 50, torch.arange(len(data) + 1))
    return dataclasses.replace(data, bags={**data.bags, "tags": tags})


def of_type(data_type, device="meta"):
    module = train_module(device)
    if device == "meta":
        for config in module.model.embedding_bag_collection.embedding_bag_configs():
            config.data_type = DataType(data_type)
    return module


def with_fp16(text):
    return text.replace("group: user, embedding_dim: 8", "group: user, embedding_dim: 8, data_type: fp16").replace(
        "group: item, embedding_dim: 8", "group: item, embedding_dim: 8, data_type: fp16"
    )


def test_a_run_with_fp16_tables_learns_as_much_and_reads_back_the_same(data, fp32, tmp_path):
    result = train_shop(data, tmp_path / "run", with_fp16)
    auc = result.evaluations["val"].tasks["click"]["auc"]
    assert auc == pytest.approx(fp32.evaluations["val"].tasks["click"]["auc"], abs=0.02)
    run = FinishedRun.load(tmp_path / "run")
    types = {n.split(".")[-2]: v.dtype for n, v in run.model.state_dict().items() if ".embedding_bags." in n}
    assert types["table_user_id"] == types["table_product_id"] == torch.float16
    assert types["table_genre"] == torch.float32
    frame = shop.log().tail(300)
    predictions = predict(run.model, run.encode(frame))
    assert predictions["click"].dtype == np.float32
    from sklearn.metrics import roc_auc_score

    assert roc_auc_score(frame["click"], predictions["click"]) > 0.7


def train_tables(sharding, kind, data_type, max_gradient=0.0):
    """Tables after some steps, whole, and their local types."""
    with ranks("cpu") as where:
        config = OptimizersConfig(
            tables=TableOptimizerConfig(kind=kind, lr=0.05, eps=eps_of(kind), max_gradient=max_gradient),
            dense=DenseOptimizerConfig(kind="sgd", lr=0.01, clip_norm=0.0),
        )
        model, optimizer = parallelise(of_type(data_type), where, config, sharding=cut(sharding), seed=3)
        pipe = build_pipeline(model, optimizer, where.device, "sparse_dist")
        model.train()
        batch = GLOBAL_BATCH // where.world_size
        indices = global_batches(ROWS, batch, rank=where.rank, world_size=where.world_size, seed=(1, 2))
        batches = iterate(single_rows(), indices)
        for _ in range(STEPS):
            pipe.progress(batches)
        wholes, types = {}, set()
        for name, value in tables_of(model).items():
            whole = np.zeros(tuple(value.shape), np.float32)
            for part in where.gather([(t.detach().float().numpy(), r, c) for t, r, c in local_shards(value)]):
                for tensor, row, column in part:
                    if tensor.size:
                        whole[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
            wholes[name.split(".")[-2]] = whole
            types |= {str(t.dtype) for t, _, _ in local_shards(value)}
        del pipe, model, optimizer
        return wholes, types


def train_plainly(kind, max_gradient=0.0):
    """The reference: plain tables, their pooled embeddings' gradients cut by hand, ordinary optimizers."""
    module = train_module("cpu")
    fill_tables(module, seed=3, zero_first_row=True)
    bags = module.model.embedding_bag_collection.embedding_bags
    for bag in bags.values():
        if max_gradient:
            bag.register_forward_hook(
                lambda _module, _input, pooled: (
                    pooled.register_hook(lambda g: g.clamp(-max_gradient, max_gradient)) and None
                )
            )
    kinds = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD,
             "adam": torch.optim.Adam}  # fmt: skip
    tables = kinds[kind](bags.parameters(), lr=0.05, **({} if kind == "sgd" else {"eps": eps_of(kind)}))
    dense = torch.optim.SGD(module.model.tower.parameters(), lr=0.01)
    batches = iterate(single_rows(), global_batches(ROWS, GLOBAL_BATCH, seed=(1, 2)))
    for _, batch in zip(range(STEPS), batches, strict=False):
        tables.zero_grad()
        dense.zero_grad()
        module(batch)[0].backward()
        tables.step()
        dense.step()
    return {name: bag.weight.detach().numpy() for name, bag in bags.items()}


@pytest.mark.parametrize(
    ("world_size", "sharding", "kind"),
    [(1, "table_wise", "sgd"), (2, "row_wise", "adagrad"), (2, "column_wise", "sgd"), (2, "auto", "rowwise_adagrad")],
)
def test_fp16_tables_train_as_fp32_ones_up_to_their_rounding(world_size, sharding, kind):
    expected = train_plainly(kind)
    for tables, types in run_ranks(train_tables, world_size, sharding, kind, "FP16"):
        assert types == {"torch.float16"}
        for name, value in expected.items():
            away = np.abs(tables[name] - value)
            # Adagrad's first step in a row is ± lr: rounding may turn the sign of a gradient that is almost 0.
            assert np.quantile(away, 0.995) < 3e-3, name
            assert away.max() > 0, name  # they really are shorter


def test_fp16_tables_start_as_fp32_ones_rounded():
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

    filled = {}
    for kind in (DataType.FP32, DataType.FP16):
        tables = [
            EmbeddingBagConfig(name="t", num_embeddings=5000, embedding_dim=4, feature_names=["a"], data_type=kind)
        ]
        module = torch.nn.ModuleDict({"e": EmbeddingBagCollection(tables=tables)})
        fill_tables(module, seed=5)
        filled[kind] = module["e"].embedding_bags["t"].weight.detach()
    assert filled[DataType.FP16].dtype == torch.float16
    assert torch.equal(filled[DataType.FP32].half(), filled[DataType.FP16])


def small_steps(_=None):
    """Many updates, each under half of what tells two fp16 numbers near 1 apart."""
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

    from mtcl_torchrec.training.optimizers import fuse_table_optimizer
    from mtcl_torchrec.training.sharding import shard

    with ranks("cpu") as where:
        tables = [
            EmbeddingBagConfig(
                name="t", num_embeddings=2, embedding_dim=4, feature_names=["a"], data_type=DataType.FP16
            )
        ]
        module = torch.nn.Sequential(EmbeddingBagCollection(tables=tables, device=torch.device("meta")))
        fuse_table_optimizer(module, TableOptimizerConfig(kind="sgd", lr=1e-4))
        model = shard(module, where)
        (weights,) = tables_of_any(model)
        weights.fill_(1.0)
        ids = KeyedJaggedTensor(["a"], values=torch.tensor([1]), lengths=torch.tensor([1]))
        for _ in range(50):
            model(ids)["a"].sum().backward()
        moved = float((1.0 - weights[1]).abs().max())
        del model, module, weights
        return moved


def tables_of_any(model):
    return [t for v in model.state_dict().values() for t, _, _ in local_shards(v)]


def test_on_the_cpu_fp16_rounds_to_nearest_so_that_the_smallest_steps_are_lost():
    """What the documentation says; FBGEMM's CUDA kernels round at random instead, which keeps them on average."""
    assert run_ranks(small_steps, 1) == [0.0]


@pytest.mark.parametrize(
    ("kind", "data_type", "message"),
    [
        ("sgd", "BF16", "table 't_users': bf16 has no kernel on the CPU"),
        ("adam", "FP16", "table 't_users': fp16 needs an optimizer fused into backward, and adam has none on cpu"),
    ],
)
def test_a_type_that_cannot_be_trained_is_refused(kind, data_type, message):
    with pytest.raises(ConfigError, match=message):
        check_tables(of_type(data_type), TableOptimizerConfig(kind=kind), torch.device("cpu"))
    check_tables(of_type(data_type), TableOptimizerConfig(kind=kind), torch.device("cuda"))
    with pytest.raises(AssertionError, match=message):
        run_ranks(train_tables, 1, "table_wise", kind, data_type)


def test_a_data_parallel_table_of_fp16_is_refused():
    with pytest.raises(AssertionError, match="table 't_users': float16 needs an optimizer fused into backward, and a"):
        run_ranks(train_tables, 1, "data_parallel", "sgd", "FP16")


# ---------------------------------------------------------------- gradients of tables cut


@pytest.mark.parametrize(
    ("world_size", "sharding", "kind"),
    [
        (1, "table_wise", "sgd"),
        (2, "row_wise", "sgd"),
        (2, "column_wise", "adagrad"),
        (2, "auto", "rowwise_adagrad"),
        (2, "data_parallel", "sgd"),
        (1, "auto", "adam"),
        (2, "table_wise", "adam"),
    ],
)
def test_the_gradient_of_a_pooled_embedding_is_cut_alike_in_every_kernel_and_sharding(world_size, sharding, kind):
    expected, uncut = train_plainly(kind, max_gradient=0.01), train_plainly(kind)
    for tables, _ in run_ranks(train_tables, world_size, sharding, kind, "FP32", 0.01):
        for name, value in expected.items():
            np.testing.assert_allclose(tables[name], value, atol=5e-5, err_msg=name)
            assert np.abs(uncut[name] - value).max() > 1e-3, name
