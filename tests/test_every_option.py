"""Every option of the YAML, away from its default, in a run that trains on two ranks; a new one must find a place here.

What an option does is tested where its part is.  Here it has to get from a YAML through training, checkpoint and
evaluation, together with others.
"""

import json
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import shop
import yaml
from pydantic import BaseModel, RootModel
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.config import RunConfig, dump_run, load_run, parse_run
from mtcl_torchrec.data.prepare import prepare_files
from mtcl_torchrec.data.vectors import write_codes, write_vectors
from mtcl_torchrec.data.worlds import world_run
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

# Option -> why no run here has it.
ELSEWHERE = {
    "TrainingConfig.gradient_accumulation": "must be 1",
    "TrainingConfig.compile": "takes a compiler and a minute: tests/test_compiling.py",
    "TableShardingConfig.cache_load_factor": "of CUDA: tests/test_planning.py",
    "RunConfig.tuning": "of `mtcl tune`, not of training: tests/test_tuning.py",
}
DATA = {
    "log": {"data": {"log": "log.parquet", "val_fraction": 0.25, "test_fraction": 0.2}},
    "files": {"data": {split: f"{split}.parquet" for split in ("train", "val", "test")}},
    "stream": {
        "data": {"train": "train.parquet", "val": "val.parquet", "stream": True, "window": 60, "workers": 2},
    },
}
TASKS = {
    "click": {"name": "click", "kind": "binary"},
    "buy": {"name": "buy", "kind": "binary", "mask": "click"},
    "stars": {"name": "stars", "kind": "regression"},
}
BASE = """
name: options
schema:
  user: user_id
  item: product_id
  time: time
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8}
    - {name: genre, group: item, embedding_dim: 4}
    - {name: price, group: item, kind: dense, transform: log}
    - {name: hour, group: context, embedding_dim: 4}
model: {trunk: {kind: shared_bottom, expert_layers: [8]}, tower_layers: [4]}
training: {epochs: 1, batch_size: 30, warmup_steps: 2}
"""
# What each run has beside `BASE`; "tasks" and "features" go into the schema, the features beside its own.
RUNS = {
    "training": DATA["log"] | yaml.safe_load("""
model:
  trunk: {kind: mmoe, num_experts: 2, expert_layers: [8], dropout: 0.1, gate_dropout: 0.1, norm: rms}
  epnet: {features: [genre, hour], hidden: 4}
  ppnet: {hidden: 4}
  tower_layers: [4]
  cross_layers: 1
  cross_rank: 4
  embedding_dropout: 0.1
  dense_dropout: 0.1
  dense_noise: 0.1
  tower_dropout: 0.1
optimizers:
  tables: {kind: adagrad, lr: 0.1, lr_of: {user_id: 0.05}, eps: 1.0e-6, init_scale: 0.2, max_gradient: 1.0}
  dense: {kind: adam, lr: 0.01, betas: [0.8, 0.99], weight_decay: 0.01, clip_norm: 1.0}
training:
  epochs: 1
  batch_size: 20
  eval_batch_size: 25
  patience: 1
  task_patience: 1
  watch: [click]
  id_dropout: {product_id: 0.1}
  warmup_steps: 2
  decay: cosine
  averaging: 0.5
  regularisers:
    {l2_embedding: {user_id: 1.0e-3}, l2_rows: {product_id: 1.0e-3}, l2_dense: 1.0e-4, expert_orthogonality: 0.1,
     gate_balance: 0.1}
  seed: 3
  pipeline: base
  precision: bf16
  log_every: 2
  metrics: {every: 2, window: 60, ranked_window: 40, kinds: [ne, auc]}
  max_skipped_steps: 3
  checkpoint: {every_steps: 5, every_minutes: 1, keep: 1, asynchronous: false}
balance: {weighting: {kind: dwa, temperature: 1.5, window: 2, max_factor: 20}}
fusion:
  kind: weighted_geometric_mean
  weights: {click: 1, buy: 4}
  floor: 0.01
  train: {reward: {click: 1, buy: 4}, weight: 0.5, heads: through, loss: pairwise, missing: zero}
evaluation:
  {k: [2], values: {click: 2}, threshold: accuracy, segments: [genre], bootstrap: 20, save_predictions: false}
"""),
    "counted": DATA["log"] | yaml.safe_load("""
statistics:
  - {keys: [user_id, [user_id, city]], groups: {city: user}, outcomes: [click, buy], smoothing: 5,
     smoothing_of: {buy: 9}, last: 20, label: short}
  - {keys: [user_id], outcomes: [click], given: [product_id], given_smoothing: 7, counts: true}
histories:
  - {feature: clicked, by: visitor, where: [click, buy], beside: {what: [click, buy]}, time_unit: ms}
  - {feature: seen}
  - {feature: met}
next_labels: {column: next_genre, of: genre, by: visitor, where: [click]}
features:
  - {name: visitor, group: user, embedding_dim: 4}
  - {name: clicked, group: user, kind: history, of: product_id, max_length: 3}
  - {name: what, group: user, kind: history, beside: clicked, encoding: index, vocabulary_size: 3, embedding_dim: 4}
  - {name: since, group: user, kind: history, beside: clicked, encoding: log_bucket, embedding_dim: 4}
  - {name: seen, group: user, kind: history, of: product_id}
  - {name: met, group: user, kind: history, of: product_id}
tasks:
  - {name: click, kind: binary}
  - {name: taste, kind: multiclass, label: next_genre, item_class: genre, inputs: [user, context]}
model:
  trunk: {kind: ple, expert_layers: [8], shared_experts: 1, task_experts: 2, levels: 1}
  sequences:
    clicked: {kind: transformer, blocks: 1, heads: 1, times: false}
    seen: {kind: gru, hidden: 4, layers: 2, dropout: 0.1}
    met: {kind: "own_encoder:Newest", options: {number: 2}}
  tower: {kind: lstm, hidden: 4, history: seen}
balance: {weighting: {kind: tchebycheff, mu: 0.3}}
fusion: {kind: power_product, weights: {click: 1, taste: 2}, bases: {taste: 2}, exponents: {taste: -1}}
"""),
    "features": DATA["files"] | yaml.safe_load("""
features:
  - {name: shelf, group: item, column: product_id, encoding: hash, vocabulary_size: 32, embedding_dim: 8, table: shelf}
  - {name: neighbour, group: item, column: other_id, encoding: hash, vocabulary_size: 32, embedding_dim: 8,
     table: shelf}
  - {name: words, group: item, kind: bag, separator: ";", pooling: sum, min_count: 2, embedding_dim: 4,
     data_type: fp16}
  - {name: rate, group: context, kind: dense, transform: logit, clip: 2.0, mark_missing: false}
  - {name: text, group: item, kind: vector, column: product_id, vectors: vectors.parquet, trainable: 0.2,
     embedding_dim: 8}
  - {name: code, group: item, kind: semantic_id, column: product_id, codes: codes.parquet, embedding_dim: 4}
sharding:
  kinds: [row_wise, table_wise]
  compute_kernels: [fused]
  tables:
    user_id: {kinds: column_wise, min_partition: 4, pooling_factor: 2}
    genre: {kinds: data_parallel, compute_kernels: dense}
  ranks_per_host: 2
  device_memory_gb: 2
  host_memory_gb: 4
  reserve: 0.3
  communication: {forward: fp16, backward: bf16}
optimizers: {tables: {kind: adagrad, lr: 0.1}}
model: {trunk: {kind: "own_trunk:Factors", options: {width: 6}}, tower_layers: [4]}
fusion: {kind: "own_fused:Product", options: {times: 0.5}}
"""),
    "tasks": DATA["log"] | yaml.safe_load("""
schema: {request: request, reward: worth}
tasks:
  - {name: click, kind: binary, weight: 1.5, negative_rate: 0.8, pos_weight: 2, pairwise: 0.2, sample_weight: counts}
  - {name: again, kind: binary, label: click, focal_gamma: 1.0,
     head: {kind: dot, dim: 8, factors: [user_id, product_id], l2: 0.01,
            sampled_softmax: {weight: 0.2, temperature: 0.5, correction: none, item: product_id}}}
  - {name: buy, kind: binary, after: click,
     chain: {kind: escm2_dr, joint_weight: 0.8, conditional_weight: 0.2, min_propensity: 0.1, imputation_weight: 0.5}}
  - {name: kind, kind: multiclass, num_classes: 4, mask: click, inputs: [user, context]}
  - {name: stars, kind: regression, loss: huber, huber_delta: 0.5, mean: 3, std: 2}
model:
  {trunk: {kind: home, expert_layers: [8], groups: [[click, buy], [kind, stars]], group_experts: 2, feature_rank: 4},
   tower_layers: [4]}
balance: {weighting: {kind: famo, lr: 0.05, weight_decay: 0.01}}
calibration:
  click: [{kind: prior, rate: 0.5}, {kind: isotonic, segment: genre, knots: 8, min_rows: 10, shrink: 5}]
fusion: {kind: stacking, train: {reward: worth}}
"""),
    "chains": DATA["files"] | yaml.safe_load("""
tasks:
  - {name: click, kind: binary}
  - {name: buy, kind: binary, after: click, chain: {kind: escm2_ips, self_normalised: true}}
  - {name: keep, kind: binary, after: click, chain: {kind: aitm, calibrator_weight: 0.3}}
balance: {surgery: {kind: gradnorm, alpha: 1, lr: 0.1, min_weight: 0.2, max_weight: 5}}
fusion: {kind: soft_voting, weights: {click: 1, buy: 2}, thresholds: {buy: 0.2}, temperature: 0.2}
"""),
    "stem": DATA["files"] | yaml.safe_load("""
model: {trunk: {kind: stem, expert_layers: [8], own_tables: [genre]}, tower_layers: [4]}
balance: {surgery: {kind: cagrad, c: 0.3, cut: both, groups: [[user_id]]}}
fusion: {kind: expected_value, weights: {click: 1, buy: 0.1}, given: {buy: click}, numbers: {buy: price}, scale: 2}
"""),
    "stream": DATA["stream"] | yaml.safe_load("""
balance: {surgery: {kind: gradvac, beta: 0.2}}
fusion: {kind: reciprocal_rank, weights: {click: 1, buy: 2}, k: 5}
"""),
    "monotone": DATA["files"] | yaml.safe_load("""
fusion:
  {kind: monotone_network, signs: {click: 1, buy: 1, stars: -1}, hidden: [4], train: {reward: {click: 1, stars: 0.1}}}
"""),
    "gated": DATA["files"] | yaml.safe_load("""
fusion: {kind: context_gated_mean, weights: {click: 1, buy: 1}, features: [hour], train: {reward: click}}
"""),
}  # fmt: skip
DIALS = {
    "seed": 5, "num_users": 50, "num_items": 60, "user_exponent": 0.3, "item_exponent": 0.8, "latent_dim": 9,
    "categories": 6, "signal": 1.5, "context": 0.3, "correlation": 0.4, "conflict": 0.6, "missing": 0.1,
    "cold_items": 0.2, "cold_after": 0.8, "days": 20, "text": 0.3, "position_bias": 1.0, "positions": 5, "delay": 1.0,
    "delay_spread": 0.5, "rates": {"like": 0.4, "share": 0.2}, "imbalance": 1.2,
}  # fmt: skip


def configured(name, folder):
    """One of `RUNS`, a run on a world with all its dials turned, or one whose columns `mtcl prepare` has made."""
    if name == "prepared":
        return load_run(folder / "prepared/run.yaml")
    if name == "world":
        raw = yaml.safe_load(world_run("social", rows=600, val_rows=200, test_rows=100, **DIALS))
        raw["training"] = {"epochs": 1, "batch_size": 60, "warmup_steps": 2}
        return parse_run(yaml.safe_dump(raw), folder=folder)
    more = dict(RUNS[name])
    raw = yaml.safe_load(BASE)
    raw["schema"]["features"] += more.pop("features", [])
    raw["schema"] |= {"tasks": more.pop("tasks", list(TASKS.values())), **more.pop("schema", {})}
    return parse_run(yaml.safe_dump(raw | more), folder=folder)


NAMES = (*RUNS, "prepared", "world")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    frame = shop.log(400)
    number = frame["product_id"].str[1:].astype(int)
    frame["time"] = pd.to_datetime(frame["time"], unit="s").astype("int64") // 10**6  # in milliseconds
    frame["visitor"], frame["city"] = frame["user_id"], "c" + (frame["hour"] % 3).astype(str)
    frame["other_id"] = "p" + (59 - number).astype(str)
    frame["words"] = frame["genre"] + ";" + frame["genre"].shift(-1, fill_value="rare")
    frame["rate"] = np.where(number % 5 == 0, np.nan, number / 60)
    frame["request"], frame["counts"] = frame["user_id"] + frame["city"], 1.0 + frame["hour"] % 2
    frame["worth"], frame["kind"] = frame["click"] / 2, number % 4
    frame["keep"] = frame["click"] * (number % 2)
    frame.to_parquet(folder / "log.parquet", index=False)
    for split, part in (("train", slice(0, 240)), ("val", slice(240, 320)), ("test", slice(320, 400))):
        frame[part].to_parquet(folder / f"{split}.parquet", index=False)
    keys, draw = pd.Series([f"p{i}" for i in range(60)]), np.random.default_rng(0)
    write_vectors(folder / "vectors.parquet", keys, draw.normal(size=(60, 6)).astype(np.float32), key="product_id")
    write_codes(folder / "codes.parquet", keys, np.c_[np.arange(60) % 4, np.arange(60) // 4], (4, 15), key="product_id")
    prepare_files(configured("counted", folder), folder / "prepared", lambda line: None)
    return folder


def train_all(data, folder):
    """Train each run; its name -> its validation log-losses."""
    found = {}
    with ranks("cpu"):  # one process group for all
        for name in NAMES:
            try:
                result = train_run(configured(name, data), folder / name, device="cpu", console=Console(quiet=True))
            except Exception as error:
                raise AssertionError(f"run {name!r}") from error
            found[name] = {
                task: of.get("log_loss", of.get("mse")) for task, of in result.evaluations["val"].tasks.items()
            }
    return found


def test_every_run_trains_on_two_ranks_and_keeps_its_options(data, tmp_path):
    one, other = run_ranks(train_all, 2, data, tmp_path, timeout=500)
    assert one == other
    assert one["prepared"] == pytest.approx(one["counted"], abs=1e-6)
    for name in NAMES:
        assert set(one[name]) >= {task.name for task in configured(name, data).data_schema.tasks}
        assert all(np.isfinite(loss) for loss in one[name].values()), name
        assert json.loads((tmp_path / name / "metrics.json").read_text())["evaluations"]["val"]["tasks"], name
        kept, given = load_run(tmp_path / name / "run.yaml"), configured(name, data)
        assert set(options_of(kept)) >= set(options_of(given)), name


def parts_of(model):
    """All parts of a configuration, by its types."""
    found = [model]
    for part in found:
        for field in part.model_fields.values():
            waiting = [field.annotation]
            for kind in waiting:
                waiting += get_args(kind)
                if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
                    found.append(kind)
    return found


def options_of(value):
    """``Part.option`` of all that is not at its default."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            given = getattr(value, name)
            if field.is_required() or given != field.get_default(call_default_factory=True):
                yield f"{type(value).__name__}.{name}"
            yield from options_of(given)
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from options_of(part)


def test_no_option_is_left_out(data):
    there = {
        f"{part.__name__}.{name}" for part in parts_of(RunConfig) if not issubclass(part, RootModel)
        for name in part.model_fields
    }  # fmt: skip
    tuned = {option for option in there if option.startswith(("TuningConfig.", "ParameterConfig."))}
    given = {option for name in NAMES for option in options_of(configured(name, data))}
    assert len(there) > 200
    assert sorted(there - tuned - given - set(ELSEWHERE)) == []
    assert set(ELSEWHERE) & given == set()


@pytest.mark.parametrize("name", NAMES)
def test_every_run_comes_back_from_its_own_yaml(name, data):
    run = configured(name, data)
    assert parse_run(dump_run(run)) == run
