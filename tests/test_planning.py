"""What the planner is told, what it refuses, and what a plan for a cluster that is not there says."""

import io
import json

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from rich.console import Console
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from typer.testing import CliRunner

from mtcl_torchrec.cli.commands import app
from mtcl_torchrec.config import ShardingConfig, TableOptimizerConfig, dump_run, load_run, parse_run
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.optimizers import fuse_table_optimizer
from mtcl_torchrec.training.planning.constraints import table_configs, table_constraints
from mtcl_torchrec.training.planning.hardware import KNOWN, configured, known_hardware
from mtcl_torchrec.training.planning.offline import UnfittedEncoder, plan_offline, saved_for_backward
from mtcl_torchrec.training.planning.planner import (
    Search,
    plan_as_json,
    plan_tables,
    table_sharders,
    topology,
)
from mtcl_torchrec.training.planning.report import print_plan
from mtcl_torchrec.training.sharding import ranks, shard

TERABYTE = "benchmarks/plans/one_terabyte.yaml"


def tables(*shapes, dtype=DataType.FP32):
    return EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name=f"t{i}", num_embeddings=rows, embedding_dim=dim, feature_names=[f"f{i}", f"g{i}"], data_type=dtype
            )
            for i, (rows, dim) in enumerate(shapes)
        ],
    )


def constraints(device="cpu", optimizer="sgd", world_size=2, shapes=((100, 48),), **sharding):
    return table_constraints(
        tables(*shapes), ShardingConfig(**sharding), device_type=device, world_size=world_size, ranks_per_host=2,
        optimizer=optimizer,
    )  # fmt: skip


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("fused_uvm_caching caches host memory on a GPU", {"compute_kernels": "fused_uvm_caching"}),
        ("fused_uvm caches", {"tables": {"t0": {"compute_kernels": ["fused", "fused_uvm"]}}}),
        ("grid_shard is not right on cpu", {"kinds": ["table_wise", "grid_shard"]}),
        ("column_wise would make row-wise Adagrad another", {"kinds": "column_wise", "optimizer": "rowwise_adagrad"}),
        ("table_column_wise would", {"kinds": "table_column_wise", "optimizer": "rowwise_adagrad"}),
        ("data_parallel table moves all", {"kinds": "data_parallel", "optimizer": "adam", "device": "cuda"}),
        ("dense table moves all", {"compute_kernels": "dense", "optimizer": "adam", "device": "cuda"}),
        ("has no fused_uvm kernel", {"kinds": "data_parallel", "compute_kernels": "fused_uvm", "device": "cuda"}),
        ("48 columns have no equal parts of 28 or more", {"tables": {"t0": {"min_partition": 28}}}),
        ("no table 't00' (did you mean 't0'?)", {"tables": {"t00": {}}}),
    ],
)
def test_what_cannot_be_right_is_refused(said, options):
    with pytest.raises(ConfigError) as error:
        constraints(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_configured_reaches_the_planner():
    asked = {"pooling_factor": 7.0, "cache_load_factor": 0.3, "compute_kernels": "fused_uvm_caching"}
    found = constraints("cuda", tables={"t0": asked, "t1": {"kinds": "column_wise"}}, shapes=((9, 48), (9, 48), (9, 8)))
    assert found["t0"].pooling_factors == [7.0, 7.0]  # a number for each of the two features
    assert found["t0"].cache_params.load_factor == 0.3
    assert "fused" not in found["t0"].compute_kernels
    assert found["t1"].sharding_types == ["column_wise"]
    assert found["t1"].min_partition == 24  # a half for each rank
    assert found["t2"].min_partition is None
    assert "data_parallel" in found["t2"].sharding_types
    assert "data_parallel" not in constraints("cuda", "adam")["t0"].sharding_types
    assert "column_wise" not in constraints("cuda", "rowwise_adagrad")["t0"].sharding_types
    assert constraints(world_size=1)["t0"].sharding_types == ["table_wise"]
    assert "table_row_wise" in constraints(world_size=4)["t0"].sharding_types


def test_a_cluster_has_the_memory_and_the_speed_that_are_said():
    cluster = topology(known_hardware("h200"), 16, 8, reserve=0.1, taken_gb=6.9)
    assert {device.storage.hbm for device in cluster.devices} == {120_000_000_000}
    assert {device.storage.ddr for device in cluster.devices} == {225_000_000_000}
    assert cluster.intra_host_bw == pytest.approx(450e6)  # bytes a millisecond
    assert cluster.inter_host_bw == pytest.approx(50e6)
    said = ShardingConfig(device_memory_gb=10, host_memory_gb=80)
    assert configured(KNOWN["h200"], said).memory_gb == 10
    assert configured(KNOWN["cpu"], said).memory_gb == 0
    with pytest.raises(ConfigError, match="12 ranks do not fill hosts of 8"):
        topology(KNOWN["h200"], 12, 8)
    with pytest.raises(ConfigError, match="no memory is left for tables"):
        topology(KNOWN["h200"], 8, 8, taken_gb=150)
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        known_hardware("h20")


# ---------------------------------------------------------------- the plan as data


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    dim=st.sampled_from([4, 8, 12, 20, 64]),
    kind=st.sampled_from(["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise"]),
    hosts=st.sampled_from([1, 2]),
)
def test_shards_cover_a_table_once(rows, dim, kind, hosts):
    plan = plan_tables(
        tables((rows, dim)), ShardingConfig(kinds=kind), KNOWN["cpu"], world_size=2 * hosts, ranks_per_host=2,
        optimizer="sgd", fused=True, batch_size=8,
    )  # fmt: skip
    about = json.loads(json.dumps(plan_as_json(plan)))["t0"]
    count = torch.zeros(rows, dim)
    for piece in about["shards"]:
        count[piece["row"] : piece["row"] + piece["rows"], piece["column"] : piece["column"] + piece["columns"]] += 1
        assert 0 <= piece["rank"] < 2 * hosts
    assert (count == 1).all()
    if kind == "table_column_wise":
        assert len({piece["rank"] // 2 for piece in about["shards"]}) == 1  # on one host
    assert about["kernel"] == "fused"


def test_a_dense_table_is_planned_as_such():
    sharding = ShardingConfig(tables={"t0": {"compute_kernels": "dense"}, "t1": {"kinds": "data_parallel"}})
    plan = plan_tables(
        tables((9, 8), (9, 8), (9, 8)), sharding, KNOWN["cpu"], world_size=2, ranks_per_host=2, optimizer="sgd",
        fused=True, batch_size=8,
    )  # fmt: skip
    about = plan_as_json(plan)
    assert [about[name]["kernel"] for name in ("t0", "t1", "t2")] == ["dense", "dense", "fused"]
    assert about["t1"]["ranks"] == [0, 1]


# ---------------------------------------------------------------- on ranks


def refusals():
    said = []
    with ranks("cpu") as where:
        for sharding in (ShardingConfig(host_memory_gb=0.0001), ShardingConfig(ranks_per_host=1)):
            try:
                shard(tables((5000, 64)), where, sharding=sharding)
            except ConfigError as error:
                said.append(str(error))
    return said


def test_every_rank_hears_of_a_plan_that_failed():
    """No rank is left waiting for a plan."""
    here, there = run_ranks(refusals, 2, timeout=60)
    assert here == there
    assert "fit on no plan for 2 ranks" in here[0]
    assert here[1].startswith("sharding.ranks_per_host is 1, but 2 of 2 ranks run on each host")


# ---------------------------------------------------------------- a cluster that is not there


def small_run(rows=("1_000_000", "500_000_000"), **parts):
    text = f"""
name: small
data: {{log: events.parquet}}
schema:
  time: t
  features:
    - {{name: user, group: user, encoding: hash, vocabulary_size: {rows[0]}, embedding_dim: 64}}
    - {{name: item, group: item, encoding: hash, vocabulary_size: {rows[1]}, embedding_dim: 32}}
    - {{name: price, group: item, kind: dense}}
  tasks: [{{name: click, kind: binary}}, {{name: tag, kind: multiclass, num_classes: 5}}]
training: {{batch_size: 256}}
"""
    run = parse_run(text)
    run.sharding = ShardingConfig(**parts)
    return run


def test_a_plan_adds_up():
    run = small_run(kinds="row_wise", reserve=0.2)
    report = plan_offline(run, 16, "a100-80")
    assert report.fits
    by_name = {table.name: table for table in report.tables}
    item = 500_000_000 * (32 * 4 + 4) / 1e9  # fp32 and one number of row-wise Adagrad's state
    assert by_name["item"].gb == pytest.approx(item)
    assert by_name["item"].ranks == tuple(range(16))
    user = 1_000_000 * (64 * 4 + 4) / 1e9
    buffers = 256 * 16 * (8 + 4 * (64 + 32)) / 1e9  # of ids, and of pooled embeddings for all ranks
    assert max(report.used_gb) == pytest.approx((item + user) / 16 + buffers, rel=0.01)
    assert report.memory_imbalance == pytest.approx(1.0, abs=0.01)
    memory = report.memory
    assert memory.for_tables == pytest.approx(80 * 0.8 - memory.dense - memory.activations)
    parameters = sum(p.numel() for p in tower_of(run).parameters())
    assert memory.dense == pytest.approx(parameters * 16 / 1e9)  # AdamW: weight, gradient, two states
    assert report.step_ms == pytest.approx(sum(phase.slowest for phase in report.phases.values()))
    assert report.step_ms > 0
    assert report.rows_per_s == pytest.approx(256 * 16 / report.step_ms * 1000)
    assert json.loads(json.dumps(report.as_json()))["tables"][1]["rows"] == 500_000_000


def tower_of(run):
    return build_model(run.model, UnfittedEncoder(run.data_schema), None).tower


def test_slower_networks_and_larger_batches_take_longer():
    run = small_run(kinds="row_wise")
    fast, slow = plan_offline(run, 16, "h200"), plan_offline(run, 16, "v100")
    assert slow.step_ms > 2 * fast.step_ms
    large = plan_offline(run, 16, "h200", batch_size=1024)
    assert large.step_ms == pytest.approx(4 * fast.step_ms, rel=0.01)
    assert large.memory.activations == pytest.approx(4 * fast.memory.activations)
    run.sharding.communication.forward = run.sharding.communication.backward = "fp16"
    assert plan_offline(run, 16, "h200").phases["fwd_comms"].slowest == pytest.approx(
        fast.phases["fwd_comms"].slowest / 2
    )


@pytest.mark.parametrize("kinds", [["row_wise"], ["table_wise"]])
@pytest.mark.parametrize("world_size", [2, 8])
def test_what_is_said_to_be_short_is_what_is_missing(kinds, world_size):
    def plan(memory):
        return plan_offline(small_run(kinds=kinds, device_memory_gb=memory, reserve=0.0), world_size, "h200")

    report = plan(5.0)
    assert not report.fits
    short = float(report.shortfall.split("short by ")[1].split(" GB")[0])
    assert not plan(5.0 + short * 0.97).fits
    assert plan(5.0 + short * 1.01 + 0.1).fits
    whole = kinds == ["table_wise"]
    assert ("the smallest piece that table 'item' may be cut into (table_wise)" in report.shortfall) == whole
    assert ("row_wise for that table" in report.hint) == whole
    assert ("at least 16 ranks" in report.hint) == (not whole)  # 14, in hosts of 8
    assert "fp16" in report.hint
    assert "keeps one number of state a row" not in report.hint


def test_an_optimizer_that_takes_less_is_advised_where_one_takes_much():
    run = small_run(device_memory_gb=5.0)
    run.optimizers.tables.kind = "adagrad"
    assert "rowwise_adagrad, which keeps one number of state a row" in plan_offline(run, 2, "h200").hint


def test_one_rank_that_is_too_small_is_told_how_many_would_do():
    report = plan_offline(small_run(device_memory_gb=30), 1, "h200")
    assert "on the one rank: the tables need 66.3 GB" in report.shortfall
    assert "at least 3 ranks" in report.hint


def test_uvm_is_taken_where_it_is_asked_for():
    assert not plan_offline(small_run(device_memory_gb=30), 1, "h200").fits
    run = small_run(
        device_memory_gb=30, tables={"item": {"compute_kernels": "fused_uvm_caching", "cache_load_factor": 0.1}}
    )
    report = plan_offline(run, 1, "h200")
    assert report.fits
    by_name = {table.name: table for table in report.tables}
    assert (by_name["user"].kernel, by_name["item"].kernel) == ("fused", "fused_uvm_caching")
    assert max(report.host_gb) == pytest.approx(500_000_000 * (32 * 4 + 4) / 1e9, rel=0.01)
    assert max(report.used_gb) < 12


def test_storage_counts_what_an_optimizer_keeps():
    """fp16 weights with fp32 state; a table without a fused optimizer has a gradient."""
    module = tables((1000, 64), dtype=DataType.FP16)
    fuse_table_optimizer(module, TableOptimizerConfig(kind="adam"))
    sharding = ShardingConfig(kinds=["table_wise", "data_parallel"])
    found = table_constraints(module, sharding, device_type="cuda", world_size=2, ranks_per_host=2, optimizer="adagrad")
    search = Search(topology(KNOWN["h200"], 2, 2), found, batch_size=1)
    storage = {o.sharding_type: o.shards[0].storage.hbm for o in search.options(module, table_sharders(sharding))}
    assert storage["table_wise"] == pytest.approx(64_000 * (2 + 4 + 4), rel=0.01)
    assert storage["data_parallel"] == pytest.approx(64_000 * 2 * (1 + 2 + 2), rel=0.01)


def test_on_a_cpu_no_rank_is_left_without_rows_of_a_table_cut_by_rows():
    """FBGEMM's backward pass is wrong there: other tables move too little, or memory is overwritten."""
    module = tables((9, 4), (8, 8), (3, 4))

    def kinds(device, **configured):
        found = table_constraints(module, ShardingConfig(**configured), device_type=device, world_size=4,
                                  ranks_per_host=2, optimizer="rowwise_adagrad")  # fmt: skip
        return [constraint.sharding_types for constraint in found.values()]

    assert kinds("cpu", kinds="row_wise") == [["table_wise"], ["row_wise"], ["table_wise"]]
    assert kinds("cuda", kinds="row_wise") == [["row_wise"]] * 3
    assert kinds("cpu", kinds=["table_row_wise", "row_wise"])[2] == ["table_row_wise"]
    first = next(iter(table_configs(module)))
    with pytest.raises(ConfigError, match=r"its 9 rows would leave some of 4 ranks without any.*take table_wise"):
        kinds("cpu", tables={first: {"kinds": "row_wise"}})


def test_equally_good_plans_are_found_in_one_order():
    module, sharding = tables((9, 8), (9, 8)), ShardingConfig(kinds=["row_wise", "column_wise", "table_wise"])
    found = table_constraints(module, sharding, device_type="cpu", world_size=2, ranks_per_host=2, optimizer="sgd")
    search = Search(topology(KNOWN["cpu"], 2, 2), found, batch_size=1)
    order = [(o.name, o.sharding_type) for o in search.options(module, table_sharders(sharding))]
    assert order == [(t, kind) for t in ("t0", "t1") for kind in ("table_wise", "row_wise", "column_wise")]


def test_activations_are_what_backward_needs():
    class Tower(torch.nn.Module):
        dense_in_features = 3

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(10, 7)

        def forward(self, dense, pooled):
            return {"y": torch.relu(self.layer(pooled))}

    assert saved_for_backward(Tower(), 10) == 4 * (10 + 7)  # the input of the layer and what ReLU let through


def test_rows_that_only_the_data_knows_must_be_given():
    text = """
data: {log: events.parquet}
schema:
  time: t
  features: [{name: user, group: user}, {name: item, group: item}, {name: price, group: item, kind: dense}]
  tasks: [{name: click, kind: binary}, {name: kind_of, kind: multiclass, item_class: item}]
statistics: {keys: [user], outcomes: [click]}
"""
    run = parse_run(text)
    with pytest.raises(ConfigError, match=r"rows of tables user, item are learnt .* --rows user=N"):
        plan_offline(run, 2)
    with pytest.raises(ConfigError, match="did you mean 'item'"):
        plan_offline(run, 2, num_rows_of={"items": 5})
    report = plan_offline(run, 2, num_rows_of={"user": 1000, "item": 50})
    assert [(table.name, table.rows) for table in report.tables] == [("user", 1000), ("item", 50)]
    frame = pd.DataFrame({"user": [1, 2, 3], "item": [1, 1, 2], "price": [1.0, 2.0, 3.0], "click": [0, 1, 0]})
    frame["kind_of"] = frame["item"]
    fitted = FeatureEncoder(run.data_schema).fit(Rows(frame))
    report = plan_offline(run, 2, num_rows_of={"user": 1000}, fitted=fitted)
    assert [table.rows for table in report.tables] == [1000, 3]


def printed(report):
    file = io.StringIO()
    print_plan(report, Console(width=100, file=file))
    return file.getvalue()


def test_the_table_fits_a_terminal():
    text = printed(plan_offline(small_run(), 8, "h200"))
    assert max(map(len, text.splitlines())) <= 100
    assert "Plan of small for 8 × h200 (one host), 256 rows" in text
    assert "2 tables, 501,000,000 rows" in text
    assert "tightest, rank" in text
    assert "estimated" in text
    feature = "  - {{name: f{0}, group: user, encoding: hash, vocabulary_size: {1}, embedding_dim: {2}}}\n"
    many = parse_run(
        "data: {log: e.parquet}\nschema:\n  time: t\n  tasks: [{name: click, kind: binary}]\n  features:\n"
        + "".join(feature.format(i, 999 + i, 8 + i % 2 * 8) for i in range(40))
    )
    text = printed(plan_offline(many, 2, "h200"))
    assert "40 tables" in text
    assert "like f0" in text
    assert len(text.splitlines()) < 40


def test_the_command(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_run(small_run()))
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["plan", str(path), "--world-size", "8", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["fits"]
    result = CliRunner().invoke(
        app, ["plan", str(path), "--world-size", "2", "--device", "l40s", "--rows", "item=5e9", "--batch-size", "64"]
    )
    assert result.exit_code == 1
    assert "Does not fit: short by" in result.output
    assert "5,001,000,000 rows" in result.output


@pytest.mark.parametrize("world_size", [16, pytest.param(128, marks=pytest.mark.full)])
def test_a_terabyte_is_planned(world_size):
    report = plan_offline(load_run(TERABYTE), world_size, "h200")
    assert sum(table.rows for table in report.tables) >= 10_000_000_000
    assert sum(table.rows * table.dim * 4 for table in report.tables) >= 0.97e12
    assert report.fits
    assert max(report.used_gb) <= report.memory.for_tables
    assert len(report.used_gb) == world_size
    assert report.planning_s < 120
