"""Gradient surgery on several ranks: the model of one rank, tables updated once, equal weights, every kind trains."""

import gc
import json

import numpy as np
import pandas as pd
import pytest
import shop
import torch
from ranks import run_ranks
from test_distributed import cut, rows, train_module
from test_faults import state_of
from test_resume import train as train_yaml
from test_surgery import Plain, expected, model
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from mtcl_torchrec import MTCLTrain
from mtcl_torchrec.config import DenseOptimizerConfig, OptimizersConfig, TableOptimizerConfig, dump_run, parse_run
from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.modules.balance.surgery import KINDS, GradientSurgery
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint, read_about
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import fill_tables, local_shards, ranks, tables_of

ROWS, GLOBAL_BATCH, STEPS = 90, 8, 4

# kind, cut, sharding, pipeline, trunk
CASES = [
    ("upgrad", "trunk", "row_wise", "sparse_dist", "mmoe"),
    ("upgrad", "embeddings", "table_wise", "base", "ple"),
    ("gradvac", "both", "mix without columns", "sparse_dist", "mmoe"),
    ("upgrad", "tables", "mix without columns", "sparse_dist", "shared_bottom"),
    ("db_mtl", "tables", "column_wise", "base", "mmoe"),
]
LABELS_OF_CONFLICT = (1.0, 0.0)


def data():
    """As `rows`, but in most rows the first label is 1 and the second 0, where it is not missing."""
    found = rows()
    conflicting = torch.arange(len(found.labels)) % 4 != 0
    known = conflicting & ~torch.isnan(found.labels[:, 1])
    found.labels[conflicting, 0], found.labels[known, 1] = LABELS_OF_CONFLICT
    return found


def batches_of(where):
    size = GLOBAL_BATCH // where.world_size
    return iterate(data(), global_batches(ROWS, size, rank=where.rank, world_size=where.world_size, seed=(1, 2)))


def train_cases(cases):
    """For each case: all parameters, weights of each step, statistics; the same on every rank."""
    with ranks("cpu") as where:
        results = []
        for case in cases:
            results.append(train_case(where, *case))
            gc.collect()
        return results


def train_case(where, kind, at, sharding, pipeline, trunk):
    tables = "adagrad" if sharding == "column_wise" else "rowwise_adagrad"
    config = OptimizersConfig(
        tables=TableOptimizerConfig(kind=tables, lr=0.05), dense=DenseOptimizerConfig(kind="adam", lr=0.01)
    )
    plain = train_module(trunk=trunk).model
    surgery = GradientSurgery(kind, cut=at, groups=[["user", "tags"]] if at == "both" else ())
    model, optimizer = parallelise(
        MTCLTrain(plain, regularisers={"l2_embedding": 0.01}, gradient_surgery=surgery),
        where,
        config,
        sharding=cut(sharding),
        seed=3,
    )
    pipe = build_pipeline(model, optimizer, where.device, pipeline)
    model.train()
    waiting, weights = batches_of(where), []
    for _ in range(STEPS):
        pipe.progress(waiting)
        weights.append(surgery.newest_weights.numpy().copy())
    statistics = surgery.statistics()
    assert all(other == json.dumps(weights, default=np.ndarray.tolist) for other in where.gather(
        json.dumps(weights, default=np.ndarray.tolist)
    ))  # fmt: skip
    parameters = {}
    for name, value in model.state_dict().items():
        parts = where.gather([(t.detach().numpy(), r, c) for t, r, c in local_shards(value)])
        whole = np.zeros(tuple(value.shape), parts[0][0][0].dtype if parts[0] else np.float32)
        for tensor, row, column in (shard for of_rank in parts for shard in of_rank):
            if ".embedding_bags." in name:
                whole[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
            else:
                whole = tensor
        parameters[name.removeprefix("model.")] = whole
    del pipe, model, optimizer
    return parameters, weights, statistics


def same(results, reference, case):
    parameters, weights, statistics = results
    wanted, wanted_weights, wanted_statistics = reference
    np.testing.assert_allclose(weights, wanted_weights, atol=2e-4, rtol=2e-4, err_msg=str(case))
    assert np.abs(np.asarray(weights) - 1).max() > 0.01, case
    assert statistics.steps == wanted_statistics.steps == STEPS
    for name, value in wanted.items():
        np.testing.assert_allclose(parameters[name], value, atol=2e-4, rtol=2e-4, err_msg=f"{case} {name}")


@pytest.fixture(scope="module")
def on_one_rank():
    return train_cases(CASES)


@pytest.mark.parametrize(
    ("world_size", "cases"), [(2, range(len(CASES))), pytest.param(4, range(len(CASES)), marks=pytest.mark.full)]
)
def test_several_ranks_train_the_model_of_one(on_one_rank, world_size, cases):
    for of_rank in run_ranks(train_cases, world_size, [CASES[c] for c in cases]):
        for number, results in zip(cases, of_rank, strict=True):
            same(results, on_one_rank[number], (world_size, CASES[number]))


def one_step(cuts):
    """For each cut: the tables before and after a step of fused SGD with a learning rate of 1."""
    with ranks("cpu") as where:
        found = []
        for at in cuts:
            surgery = GradientSurgery("upgrad", cut=at, min_weight=0, max_weight=1e9)
            of = model()
            on_meta = EmbeddingBagCollection(
                tables=of.embedding_bag_collection.embedding_bag_configs(), device=torch.device("meta")
            )
            of.embedding_bag_collection = on_meta
            config = OptimizersConfig(tables=TableOptimizerConfig(kind="sgd", lr=1.0))
            sharded, optimizer = parallelise(
                MTCLTrain(of, gradient_surgery=surgery), where, config, sharding=cut("row_wise"), seed=3
            )
            pipe = build_pipeline(sharded, optimizer, where.device)
            sharded.train()
            pipe.progress(iter(list(batches_of(where))[:1]))
            found.append({n.split(".")[-2]: [(t.numpy().copy(), r) for t, r, _ in local_shards(v)]
                          for n, v in tables_of(sharded).items()})  # fmt: skip
            del pipe, sharded, optimizer
        return found


def test_each_table_takes_exactly_one_step_along_the_combined_gradient():
    cuts = ["trunk", "embeddings", "both", "tables"]
    of_ranks = run_ranks(one_step, 2, cuts)
    for number, at in enumerate(cuts):
        of = model()
        fill_tables(of, seed=3, zero_first_row=True)
        (batch,) = list(iterate(data(), global_batches(ROWS, GLOBAL_BATCH, seed=(1, 2))))[:1]
        _, gradients = expected(Plain(of, batch), at)
        for name, gradient in gradients.items():
            if "embedding_bags" in name:
                start = dict(of.named_parameters())[name].detach()
                assert gradient.abs().max() > 1e-4
                for of_rank in of_ranks:
                    for shard, row in of_rank[number][name.split(".")[-2]]:
                        wanted = (start - gradient)[row : row + len(shard)]
                        np.testing.assert_allclose(shard, wanted, atol=1e-6, err_msg=f"{at} {name}")


# ---------------------------------------------------------------------- through the public entry point

SHORT = """
data: {log: log.parquet, val_fraction: 0.1, test_fraction: 0.0}
schema:
  user: user_id
  item: product_id
  time: time
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8}
    - {name: topics, group: item, kind: bag, embedding_dim: 4}
    - {name: price, group: item, kind: dense}
  tasks:
    - {name: click, kind: binary}
    - {name: buy, kind: binary, weight: 0.5}
    - {name: stars, kind: regression, inputs: [user, item]}
model: {trunk: {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}, tower_layers: [8]}
optimizers: {tables: {lr: 0.1}, dense: {lr: 0.01}}
training: {epochs: 1, batch_size: 32, warmup_steps: 2, patience: 0}
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surgery")
    shop.log(300).to_parquet(folder / "log.parquet", index=False)
    return folder


def configured(log, surgery, change=lambda text: text):
    text = change(SHORT) + f"\nbalance: {{surgery: {surgery}}}\n"
    return dump_run(parse_run(text, folder=log))


CUTS_OF_KINDS = {"mgda": "embeddings, groups: [[user_id, topics]]", "cagrad": "both", "fairgrad": "tables",
                 "pcgrad": "tables", "measure": "both"}  # fmt: skip


def train_all(runs, folder):
    """Train each run; what `train` says is empty on all ranks but the first."""
    with ranks("cpu"):  # one process group for all
        return [train_yaml(run, folder / str(number)) for number, run in enumerate(runs)]


def test_every_kind_trains_on_two_ranks(log, tmp_path):
    runs = []
    for number, kind in enumerate(KINDS):
        at = CUTS_OF_KINDS.get(kind, "trunk")
        pipeline = "base" if number % 2 else "sparse_dist"
        precision = "bf16" if kind == "upgrad" else "fp32"
        averaging = 0.9 if kind == "gradvac" else 0.0
        more = f"pipeline: {pipeline}, precision: {precision}, averaging: {averaging}"
        runs.append(
            configured(log, f"{{kind: {kind}, cut: {at}}}", lambda text, more=more: text.replace("patience: 0", more))
        )
    said = dict(zip(KINDS, run_ranks(train_all, 2, runs, tmp_path)[0], strict=True))
    warned = [kind for kind, lines in said.items() if f"kind {kind} leans on tasks of small gradients" in lines]
    assert warned == ["mgda", "imtl_g", "aligned_mtl", "nash_mtl", "db_mtl"]
    for number, kind in enumerate(KINDS):
        tensors, about = state_of(tmp_path / str(number))
        assert about["step"] > 2
        assert int(next(v for n, v in tensors.items() if n.endswith("surgery.counts.steps"))) == about["step"], kind
        averages = next(v for n, v in tensors.items() if n.endswith("surgery.counts.averages"))
        off_one = (averages[:, -1] / next(v for n, v in tensors.items() if n.endswith("counts.known"))[:, -1] - 1).abs()
        if kind not in ("upgrad", "pcgrad", "gradvac"):  # these leave tasks alone that do not conflict
            assert (off_one.max() < 1e-9) == (kind == "measure"), kind
        metrics = json.loads((tmp_path / str(number) / "metrics.json").read_text())
        assert np.isfinite(metrics["evaluations"]["val"]["tasks"]["click"]["log_loss"]), kind


@pytest.mark.parametrize("surgery", ["{kind: gradvac, cut: both, groups: [[user_id]]}"])
def test_a_run_with_surgery_that_was_interrupted_ends_as_if_it_had_not_been(log, tmp_path, surgery):
    run = configured(log, surgery, lambda text: text.replace("epochs: 1", "epochs: 2, checkpoint: {every_steps: 3}"))
    train_yaml(run, tmp_path / "straight")
    train_yaml(run, tmp_path / "stopped", "resume", stop=5)
    assert read_about(newest_checkpoint(tmp_path / "stopped/checkpoints"))["step"] == 3
    assert "going on after step 3" in train_yaml(run, tmp_path / "stopped", "resume")
    (tensors, about), (wanted, wanted_about) = state_of(tmp_path / "stopped"), state_of(tmp_path / "straight")
    assert about["step"] == wanted_about["step"]
    assert sum("surgery" in name for name in wanted) > 8
    for name, value in wanted.items():
        assert torch.equal(tensors[name], value), name


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        ("{kind: upgrade}", "balance.surgery.kind"),
        ("{kind: upgrad, c: 0.5}", "c belongs to cagrad, not to upgrad"),
        ("{kind: upgrad, alpha: 2}", "alpha belongs to fairgrad and gradnorm, not to upgrad"),
        ("{cut: trunk}", "cut does nothing without a kind of surgery"),
        ("{kind: measure, min_weight: 0.5}", "min_weight clamps weights that move; measure leaves them at 1"),
        ("{kind: upgrad, groups: [[user_id]]}", "groups belong to cut: embeddings and both, not to trunk"),
        ("{kind: upgrad, cut: both, groups: [[user]]}", r"groups: no id feature 'user' \(did you mean 'user_id'"),
        ("{kind: upgrad, cut: both, groups: [[price]]}", "groups: no id feature 'price'"),
        ("{kind: upgrad, cut: both, groups: [[topics, topics]]}", "grouped feature 'topics' is declared twice"),
        ("{kind: upgrad, min_weight: 2}", "min_weight"),
    ],
)
def test_what_does_not_fit_in_yaml_is_refused(log, surgery, message):
    with pytest.raises(ConfigError, match=message):
        configured(log, surgery)


def test_what_does_not_fit_to_the_rest_of_the_run_is_refused(log):
    def single(text):
        return text.replace("kind: mmoe, num_experts: 3", "kind: single_task").replace(", gate_dropout: 0.1", "")

    with pytest.raises(ConfigError, match=r"in a single_task trunk nothing is shared, so 'trunk' cuts nothing"):
        configured(log, "{kind: upgrad}", single)
    configured(log, "{kind: upgrad, cut: embeddings}", single)
    one = parse_run(configured(log, "{kind: none}"))
    one.data_schema = one.data_schema.model_copy(update={"tasks": one.data_schema.tasks[:1]})
    one.balance.surgery.kind = "upgrad"
    with pytest.raises(ConfigError, match=r"balance.surgery needs two tasks at least"):
        parse_run(dump_run(one))


def test_the_checkpoint_reads_back_without_surgery(log, tmp_path):
    """What serves has no surgery, and needs none."""
    from mtcl_torchrec.serving.recommender import Recommender

    train_run(parse_run(configured(log, "{kind: upgrad}")), tmp_path / "run", device="cpu")
    assert isinstance(Recommender.load(tmp_path / "run").recommend("u3", k=2), pd.DataFrame)


def test_a_run_goes_on_with_another_surgery_or_weighting_whose_state_begins_anew(log, tmp_path):
    """The better epoch may lie before the change: its checkpoint knows nothing of the new state."""

    def run(surgery, weighting):
        of = configured(log, surgery, lambda text: text.replace("epochs: 1", "epochs: 2"))
        return of.replace("balance:", f"balance:\n  weighting:\n    kind: {weighting}")

    first, second = run("{kind: none}", "sum"), run("{kind: gradvac, cut: both}", "uncertainty")
    train_yaml(first, tmp_path, stop=12)
    before, about = state_of(tmp_path)
    assert not any("surgery" in name for name in before)
    assert about["position"]["epoch"] == 2
    said = train_yaml(second, tmp_path, "resume")
    assert "balance.surgery was none before: its state begins anew" in said
    assert "balance.weighting was sum before: its state begins anew" in said
    after, about = state_of(tmp_path)
    steps = about["step"] // 2  # the second of two epochs
    assert int(next(v for n, v in after.items() if n.endswith("surgery.counts.steps"))) == steps
    assert int(next(v for n, v in after.items() if n.endswith("log_var/step"))) == steps
    assert "begins anew" not in train_yaml(second, tmp_path, "resume")
