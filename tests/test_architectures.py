"""Every kind of trunk through the public doors: a YAML on several ranks, and Python inside TorchRec's pipeline."""

import gc
import json

import numpy as np
import pytest
import shop
import torch
import yaml
from own_trunk import Factors, Informed, NoForward, NoWidth
from ranks import run_ranks
from rich.console import Console
from torchrec.datasets.utils import Batch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import mtcl_torchrec as m
from mtcl_torchrec.config import ModelConfig, OptimizersConfig, ShardingConfig, TableOptimizerConfig, parse_run
from mtcl_torchrec.data.source import read_rows, split_by_time
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.modules.embeddings import with_own_tables
from mtcl_torchrec.modules.trunks import ExpertLevel
from mtcl_torchrec.training.build import build_trunk, for_modules
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.judging import fused_tasks, rows_predicted_by
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.planning.offline import plan_offline
from mtcl_torchrec.training.planning.planner import plan_as_json
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

SMALL = {"expert_layers": [16, 8]}
PEPNET = {"epnet": {"hidden": 8}, "ppnet": {"features": ["user_id", "hour"], "hidden": 8}}
MODELS = {
    "shared_bottom": {"trunk": {"kind": "shared_bottom", **SMALL}},
    "ple": {"trunk": {"kind": "ple", **SMALL}, "cross_layers": 1},
    "adatt": {"trunk": {"kind": "adatt", "shared_experts": 1, "task_experts": 2, **SMALL}},
    "home": {"trunk": {"kind": "home", "groups": [["click", "buy"], ["taste", "stars"]], "feature_rank": 4, **SMALL}},
    "stem": {"trunk": {"kind": "stem", "levels": 2, "own_tables": ["user_id", "topics"], **SMALL}},
    "stem_everywhere": {"trunk": {"kind": "stem", **SMALL}, **PEPNET},
    "own": {"trunk": {"kind": "own_trunk:Factors", "options": {"width": 12}}, "ppnet": {}, "epnet": {}},
}
# From YAML by `make test-full` alone: shared_bottom trains in test_content_runs.py and others, adatt and stem in
# TorchRec's pipeline below, and stem_everywhere is a stem, too, with more tables of the tasks' own.
SLOW = ("shared_bottom", "adatt", "stem")
QUICK = tuple(name for name in MODELS if name not in SLOW)


def text_of(model):
    raw = yaml.safe_load(shop.RUN)
    raw["model"] = {"tower_layers": [8], **model}
    raw["schema"]["features"][3]["pooling"] = "mean"  # topics
    raw["training"] |= {"epochs": 2, "batch_size": 8, "decay": "none"}
    del raw["statistics"]
    return yaml.safe_dump(raw)


def train_everything(data, folder, names, in_pipeline=()):
    """Train one model after the other in one process group: from YAML, and in TorchRec's pipeline."""
    found = {}
    with ranks("cpu") as where:
        for name in names:
            run = parse_run(text_of(MODELS[name]), folder=data)
            result = train_run(run, folder / name, device="cpu", console=Console(quiet=True))
            found[name] = json.dumps([result.history.epochs, result.evaluations["test"].tasks])
            del result
            gc.collect()
        return found, {name: train_in_pipeline(where, name) for name in in_pipeline}


# ---------------------------------------------------------------- the same in Python

TASKS = [m.Task.binary("click"), m.Task.binary("buy", inputs=("user", "context")), m.Task.regression("stars")]
IN_PYTHON = {
    "shared_bottom": lambda: {"trunk": m.SharedBottom([8])},
    "single_task": lambda: {"trunk": m.SingleTask([8])},
    "mmoe": lambda: {"trunk": m.MMoE(2, [8])},
    "ple": lambda: {"trunk": m.PLE(1, 1, [8])},
    "adatt": lambda: {"trunk": m.AdaTT([8], shared_experts=1, task_experts=2)},
    "home": lambda: {"trunk": m.HoME([8], groups=[["click", "buy"], ["stars"]], feature_rank=2)},
    "stem": lambda: {"trunk": m.STEM([8], levels=2)},
    "pepnet": lambda: {
        "trunk": m.PLE(1, 1, [8]), "epnet": m.EPNet(["hour"]), "ppnet": m.PPNet(["user"], hidden=4),
        "interaction": lambda width: LowRankCrossNet(width, 1, 4),
    },
    "own": lambda: {"trunk": Informed(8), "ppnet": m.PPNet(hidden=4)},
}  # fmt: skip
NEW = ["adatt", "home", "stem", "pepnet", "own"]  # the others are in test_distributed.py
ROWS, GLOBAL_BATCH, STEPS = 64, 32, 12


def tables(name):
    def table(name, rows, *features, pooling=PoolingType.SUM):
        return EmbeddingBagConfig(
            name=name, num_embeddings=rows, embedding_dim=4, feature_names=list(features), pooling=pooling
        )

    found = [table("users", 20, "user"), table("hours", 24, "hour"), table("tags", 9, "tags", pooling=PoolingType.MEAN)]
    return with_own_tables(found, TASKS, only=["users", "tags"]) if name == "stem" else found


def rows():
    g = torch.Generator().manual_seed(1)
    lengths = torch.ones(3, ROWS, dtype=torch.int64)
    lengths[2] = torch.randint(0, 4, (ROWS,), generator=g)
    values = [torch.randint(0, n, (int(k.sum()),), generator=g) for n, k in zip((20, 24, 9), lengths, strict=True)]
    labels = torch.stack([(values[0] % 2).float(), (values[1] > 11).float(), torch.randn(ROWS, generator=g)], 1)
    sparse = KeyedJaggedTensor(["user", "hour", "tags"], torch.cat(values), lengths=lengths.flatten())
    return torch.randn(ROWS, 1, generator=g), sparse, labels


def part_of(batch, of):
    """Rows of a batch, as a batch."""
    dense, sparse, labels = batch
    jagged = [sparse[key].to_dense() for key in sparse.keys()]  # noqa: SIM118
    values = torch.cat([torch.cat([column[r] for r in of]) for column in jagged])
    lengths = torch.stack([torch.tensor([len(column[r]) for r in of]) for column in jagged]).flatten()
    return Batch(dense[of], KeyedJaggedTensor(sparse.keys(), values, lengths=lengths), labels[of])


def module(name, device="meta"):
    torch.manual_seed(0)
    ebc = EmbeddingBagCollection(tables=tables(name), device=torch.device(device))
    torch.manual_seed(0)
    groups = {"user": ["user"], "hour": ["context"], "tags": ["item"]}
    options = {"tower_layers": [4], "feature_groups": groups, "dense_groups": [["item"]], **IN_PYTHON[name]()}
    return m.MTCLTrain(m.MTCL(ebc, 1, tasks=TASKS, **options))


def train_in_pipeline(where, name):
    """Losses of the global batch, and whether the tables' plan holds the tasks' own ones."""
    optimizers = OptimizersConfig(tables=TableOptimizerConfig(lr=0.1), dense={"lr": 0.02})
    model, optimizer = parallelise(module(name), where, optimizers, seed=3, batch_size=GLOBAL_BATCH // where.world_size)
    pipe = build_pipeline(model, optimizer, where.device, "sparse_dist")
    data, size = rows(), GLOBAL_BATCH // where.world_size
    batches = [
        part_of(data, list(range(start + where.rank * size, start + (where.rank + 1) * size)))
        for start in range(0, ROWS, GLOBAL_BATCH)
    ]
    losses, stream = [], iter(batches * (STEPS // len(batches)))
    for _ in range(STEPS):
        loss, *_ = pipe.progress(stream)
        losses.append(float(np.mean(where.gather(loss.item()))))
    planned = set(plan_as_json(model.plan))
    pipe.detach()
    del pipe, model, optimizer
    gc.collect()
    return losses, planned


# ---------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    log = shop.log(300)
    log["age"] = 30.0 + 20 * log["click"] + np.random.default_rng(0).normal(0, 5, len(log))  # easily learnt
    log.to_parquet(folder / "log.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (first, python), (second, _) = run_ranks(train_everything, 2, data, folder, QUICK, NEW)
    assert first == second
    return folder, {name: json.loads(of) for name, of in first.items()}, python


@pytest.mark.parametrize("name", QUICK)
def test_every_kind_trains_from_yaml_on_two_ranks_and_is_read_back(data, trained, name):
    learns_and_is_read_back(data, trained[0], name, *trained[1][name])


@pytest.mark.full
def test_the_other_kinds_do_so_too(data, tmp_path):
    (first, _), (second, _) = run_ranks(train_everything, 2, data, tmp_path, SLOW)
    assert first == second
    for name, found in first.items():
        learns_and_is_read_back(data, tmp_path, name, *json.loads(found))


def learns_and_is_read_back(data, folder, name, epochs, test):
    assert len(epochs) == 2
    assert epochs[1]["click"]["ne"] < min(epochs[0]["click"]["ne"], 0.9)  # 1 is what the base rate gives
    assert test["click"]["auc"] > 0.8
    run = FinishedRun.load(folder / name)
    raw = split_by_time(read_rows([str(data / "log.parquet")]), "time", 0.15, 0.15)["test"]
    again = evaluate_table(rows_predicted_by(run, raw), fused_tasks=fused_tasks(run.model))
    for task, metrics in test.items():
        # The thresholds of the validation split are not known to it.
        both = again.tasks[task].keys() & metrics.keys()
        assert len(both) >= 4
        assert {k: again.tasks[task][k] for k in both} == pytest.approx(
            {k: metrics[k] for k in both}, rel=1e-5, abs=1e-6, nan_ok=True
        )


@pytest.mark.parametrize("name", NEW)
def test_every_kind_trains_in_torchrecs_pipeline_on_one_rank_as_on_two(trained, name):
    losses, planned = trained[2][name]
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])
    assert planned == {table.name for table in tables(name)}
    with ranks("cpu") as where:
        one, _ = train_in_pipeline(where, name)
    assert one == pytest.approx(losses, rel=2e-4)


@pytest.mark.parametrize("name", IN_PYTHON)
def test_every_parameter_gets_a_gradient(name):
    train = module(name, "cpu")
    loss, _ = train(part_of(rows(), list(range(ROWS))))
    loss.backward()
    if name == "stem":  # "buy" may not see the item
        assert train.model.embedding_bag_collection.embedding_bags["tags@buy"].weight.grad.abs().sum() == 0
        del train.model.embedding_bag_collection.embedding_bags["tags@buy"]
    for parameter_name, parameter in train.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_a_task_trains_no_table_of_another_in_stem():
    """Through the whole model: EPNet, restricted tasks, towers."""
    torch.manual_seed(0)
    ebc = EmbeddingBagCollection(tables=tables("stem"))
    groups = {"user": ["user"], "hour": ["context"], "tags": ["item"]}
    model = m.MTCL(
        ebc, 1, m.STEM([8], levels=2), TASKS, feature_groups=groups, dense_groups=[["item"]],
        epnet=m.EPNet(["hour"]), ppnet=m.PPNet(["user"]),
    )  # fmt: skip
    dense, sparse, _ = rows()
    for number, task in enumerate(TASKS):
        model.zero_grad()
        model.tower(dense, ebc(sparse))[task.name].sum().backward()
        trained = {name for name, bag in ebc.embedding_bags.items() if bag.weight.grad.abs().sum() > 0}
        of_item = {"tags", f"tags@{task.name}"} if number != 1 else set()  # "buy" may not see the item
        assert trained == {"users", "hours", f"users@{task.name}"} | of_item


def test_a_left_out_feature_is_left_out_of_all_its_tables():
    torch.manual_seed(0)
    ebc = EmbeddingBagCollection(tables=tables("stem"))
    model = m.MTCL(ebc, 1, m.STEM([8]), [m.Task.binary(t.name) for t in TASKS], embedding_dropout=0.5)
    dense, sparse, _ = rows()
    x = model.tower.concat(dense, ebc(sparse))
    users = [column for column, key in enumerate(k for k in model.tower.concat.keys for _ in range(4)) if "user" in key]
    gone = x[:, users] == 0
    assert len(users) == 16
    assert (gone.all(1) | ~gone.any(1)).all()
    assert gone.any()
    assert not gone.all()


def test_own_tables_take_what_is_said_of_the_shared_one_unless_they_are_named(data):
    text = (
        text_of(MODELS["stem"])
        + """
sharding: {tables: {user_id: {kinds: table_wise}}}
"""
    )
    run = parse_run(
        text.replace("    lr: 0.1", "    lr: 0.1\n    lr_of: {user_id: 0.2, user_id@buy: 0.3}"), folder=data
    )
    optimizers, sharding = for_modules(run)
    assert optimizers.tables.lr_of == {
        "table_user_id": 0.2, "table_user_id@click": 0.2, "table_user_id@buy": 0.3, "table_user_id@taste": 0.2,
        "table_user_id@stars": 0.2,
    }  # fmt: skip
    assert set(sharding.tables) == set(optimizers.tables.lr_of)


def test_own_tables_are_planned_offline(data):
    run = parse_run(text_of(MODELS["stem"]), folder=data)
    sizes = {"user_id": 5_000_000, "product_id": 1000, "genre": 10, "topics": 100_000, "hour": 24}
    report = plan_offline(run, 2, "h200", num_rows_of=sizes)
    tasks = ("click", "buy", "taste", "stars")
    copies = {f"{table}@{task}": sizes[table] for task in tasks for table in ("user_id", "topics")}
    assert {table.name: table.rows for table in report.tables} == {**sizes, **copies}
    # Averaged bags of features in several tables: TorchRec would average them wrongly.
    assert {t.kind for t in report.tables if t.name.startswith("topics")} <= {"table_wise", "data_parallel"}
    run.sharding = ShardingConfig(tables={"topics@buy": {"kinds": "row_wise"}})
    with pytest.raises(m.ConfigError, match="'topics@buy': row_wise is not right here, since its bags are averaged"):
        plan_offline(run, 2, "h200", num_rows_of=sizes)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"trunk": {"kind": "stem", "own_tables": ["usr_id"]}}, "own_tables: no table 'usr_id' (did you mean 'user_id"),
        ({"trunk": {"kind": "stem"}, "cross_layers": 1}, "model: cross_layers would mix the tasks' own columns"),
        ({"trunk": {"kind": "ple", "own_tables": ["user_id"]}}, "own_tables belongs to stem, not to ple"),
        ({"trunk": {"kind": "ple", "shared_experts": 0}}, "ple needs at least one of shared_experts"),
        ({"trunk": {"kind": "home", "groups": [["click", "by"]]}}, "groups: no task 'by' (did you mean 'buy'?)"),
        ({"trunk": {"kind": "home", "groups": [["click", "buy", "stars"]]}}, "groups: task 'taste' is in none"),
        ({"trunk": {"kind": "home", "levels": 3}}, "levels belongs to adatt and ple and stem, not to home"),
        ({"trunk": {"kind": "mmoe", "options": {"a": 1}}}, "options belong to a trunk given by its import path"),
        ({"trunk": {"kind": "a.b:C", "num_experts": 2}}, "give a trunk of your own its arguments as options"),
        ({"trunk": {"kind": "adat"}}, "nor an import path such as 'my_package.my_module:MyTrunk' (did you mean 'adat"),
        ({"trunk": {"kind": "os.path.C"}}, "nor an import path"),
        ({"trunk": {"kind": ":C"}}, "nor an import path"),
        ({"epnet": {"features": ["hours"]}}, "model.epnet.features: no sparse feature 'hours' (did you mean 'hour'?)"),
        ({"ppnet": {"features": ["age"]}}, "model.ppnet.features: 'age' is dense, and the gate reads embeddings"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line(model, said):
    with pytest.raises(m.ConfigError) as error:
        parse_run(text_of(model))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_epnet_without_context_features_and_tables_of_one_name_are_refused():
    text = text_of({"epnet": {}}).replace("group: context", "group: user")
    with pytest.raises(m.ConfigError, match=r"model\.epnet: no sparse feature is of the group context"):
        parse_run(text)
    text = text_of({"trunk": {"kind": "stem"}}).replace("name: genre", "name: genre\n    table: user_id@buy", 1)
    assert "table: user_id@buy" in text
    with pytest.raises(m.ConfigError, match=r"table .* 'user_id@buy' is declared twice"):
        parse_run(text)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("no_such_package.trunks:Mine", {}, "'no_such_package.trunks' cannot be imported (it is not installed nor"),
        ("own_trunk:Factor", {}, "module 'own_trunk' has no 'Factor' (did you mean 'Factors'?)"),
        ("own_trunk:A_NUMBER", {}, "own_trunk:A_NUMBER is a int, not a class or function"),
        ("own_trunk:not_a_module", {}, "own_trunk:not_a_module makes a int, not a torch.nn.Module"),
        ("own_trunk:Factors", {"widht": 3}, "own_trunk:Factors cannot be made of {'widht': 3} (TypeError"),
    ],
)  # fmt: skip
def test_a_trunk_that_cannot_be_imported_says_why(kind, options, said):
    config = ModelConfig.model_validate({"trunk": {"kind": kind, "options": options}}).trunk
    with pytest.raises(m.ConfigError) as error:
        build_trunk(config)
    assert said in str(error.value)


def test_a_trunk_that_breaks_the_contract_says_how():
    def model(trunk):
        return m.MTCL(EmbeddingBagCollection(tables=tables("")), 1, trunk, [m.Task.binary(t.name) for t in TASKS])

    with pytest.raises(m.ConfigError, match="trunk NoWidth has no out_features"):
        model(NoWidth())
    with pytest.raises(m.ConfigError, match=r"trunk NoForward has no forward\(x, tasks\)"):
        model(NoForward())
    with pytest.raises(m.ConfigError, match=r"an nn\.Module, not Factors"):
        model(Factors)
    dense, sparse, _ = rows()
    with pytest.raises(m.ConfigError, match=r"trunk Factors returned \(64, 1, 8\), expected \(64, 3, 8\): rows, tasks"):
        model(Factors(8, wrong=True))(dense, sparse)
    informed = Informed(8)
    model(informed)
    assert (informed.names, informed.width) == (["click", "buy", "stars"], 13)
    with pytest.raises(m.ConfigError, match="part of a model already"):
        model(informed)
    with pytest.raises(ValueError, match="keeps the tasks' columns apart"):
        m.MTCL(
            EmbeddingBagCollection(tables=tables("stem")), 1, m.STEM([8]), TASKS,
            interaction=lambda width: LowRankCrossNet(width, 1, 4),
        )  # fmt: skip


def test_bf16_computes_every_kind_under_autocast():
    dense, sparse, _ = rows()
    for name in IN_PYTHON:
        model = module(name, "cpu").model.eval()
        exact = model.tower(dense, model.embedding_bag_collection(sparse))
        model.tower.precision = "bf16"
        rough = model.tower(dense, model.embedding_bag_collection(sparse))
        for task, logits in exact.items():
            assert rough[task].dtype == torch.float32
            torch.testing.assert_close(rough[task], logits, atol=0.1, rtol=0.1)


def test_the_levels_of_every_kind_are_found_for_penalties():
    assert len(module("home", "cpu").model.tower.expert_levels()) == 2
    levels = module("pepnet", "cpu").model.tower.expert_levels()
    assert len(levels) == 2
    assert all(isinstance(level, ExpertLevel) for level in levels)
