"""Whole runs with histories: every encoder trains on two ranks, ranks agree, interrupted runs go on, models serve."""

import logging

import histories
import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks
from rich.console import Console
from test_faults import state_of
from test_resume import train as train_until

from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.artefact import Artefact
from mtcl_torchrec.serving.export import export_run, sample_inputs
from mtcl_torchrec.serving.network import serving_network
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.planning.offline import plan_offline
from mtcl_torchrec.training.run import train_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("histories")
    histories.log().to_parquet(folder / "log.parquet", index=False)
    return folder


def configured(data, changes=None, *, without=False):
    """The run with parts of it changed: {"model": {...}, ...}."""
    raw = yaml.safe_load(histories.RUN)
    for part, values in (changes or {}).items():
        raw[part] = {**raw.get(part, {}), **values}
    if without:
        raw["schema"]["features"] = [f for f in raw["schema"]["features"] if f.get("kind") != "history"]
    return parse_run(yaml.safe_dump(raw), folder=data)


def quiet():
    return Console(file=open("/dev/null", "w"), force_terminal=False)


ENCODERS = ["din", "gru", "lstm", "transformer", "mean"]
OWN = {"kind": "own_encoder:Newest", "options": {"number": 3}}
CASES = {
    "none": {},
    "din": {"model": {"sequences": {"clicked": "din"}}, "sharding": {"kinds": "row_wise"}},
    "gru": {"model": {"sequences": {"clicked": {"kind": "gru", "layers": 2}}}, "training": {"pipeline": "base"}},
    "lstm": {
        "model": {"sequences": {"clicked": "lstm"}},
        "training": {"epochs": 5, "regularisers": {"l2_embedding": 1e-5, "l2_dense": 1e-6}},
    },
    "transformer": {
        "model": {"sequences": {"clicked": {"kind": "transformer", "blocks": 1, "heads": 2, "dropout": 0.05}}},
        "balance": {"surgery": {"kind": "upgrad", "cut": "both"}},
        "optimizers": {
            "tables": {"kind": "adagrad", "lr": 0.2, "init_scale": 0.5, "max_gradient": 1.0},
            "dense": {"lr": 0.02},
        },
    },
    "mean": {
        "model": {
            "sequences": {"clicked": "mean"},
            "trunk": {"kind": "stem", "expert_layers": [16]},
            "cross_layers": 0,
            "epnet": {"features": ["clicked"]},
            "ppnet": {"features": ["item_id", "clicked"]},
        }
    },
    "dropped": {
        "model": {"sequences": {"clicked": {"kind": "lstm", "layers": 2, "dropout": 0.1}}},
        "training": {"averaging": 0.9, "epochs": 6},
    },
    "own": {"model": {"sequences": {"clicked": OWN}}},
    "tower": {"model": {"tower": "lstm", "sequences": {"clicked": "mean"}}},
    "fields": {"model": {"tower": {"kind": "lstm", "hidden": 8}}},
}


class Heard(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def train_all(data, folder, cases):
    """Click AUC of each case, and what the pipeline complained of."""
    heard, found = Heard(), {}
    logging.getLogger("torchrec.distributed.train_pipeline").addHandler(heard)
    for name in cases:
        changes = {**CASES[name], "training": {**CASES[name].get("training", {}), "batch_size": 32}}
        changes["training"] = {**yaml.safe_load(histories.RUN)["training"], **changes["training"]}
        run = configured(data, changes, without=name in ("none", "fields"))
        result = train_run(run, folder / name, device="cpu", console=quiet())
        found[name] = result.evaluations["test"].tasks["click"]["auc"]
    return found, heard.said


@pytest.mark.parametrize(
    "cases",
    [
        ["din", "transformer", "mean"],
        # A GRU and LSTM towers train on two ranks below, too, and an LSTM on one.
        pytest.param(["none", "fields", "gru", "lstm", "tower", "own", "dropped"], marks=pytest.mark.full),
    ],
    ids=["ours", "others"],
)
def test_every_encoder_and_the_lstm_towers_learn_what_histories_tell(data, tmp_path, cases):
    """Nothing else in the log tells anything of a click."""
    (aucs, said), (others, _) = run_ranks(train_all, 2, data, tmp_path, cases, timeout=400)
    assert aucs == others
    assert said == []  # such as that a module is not pipelined
    for name, auc in aucs.items():
        assert auc < 0.6 if name in ("none", "fields") else auc > 0.7, aucs


def trained(data, folder, changes):
    result = train_run(configured(data, changes), folder, device="cpu", console=quiet())
    return result.history.epochs, result.evaluations["test"].tasks


def test_two_ranks_train_the_same_model_as_one(data, tmp_path):
    """Half the batch on each, one of them cut by rows; in plain numbers, all metrics agree."""
    small = {"epochs": 1, "warmup_steps": 5, "patience": 0, "eval_batch_size": 200}
    model = {"model": {"sequences": {"clicked": "transformer"}, "tower": "lstm", "tower_layers": [8]}}
    one = trained(data, tmp_path / "one", {**model, "training": {**small, "batch_size": 64}})
    both = run_ranks(
        trained, 2, data, tmp_path / "two",
        {**model, "training": {**small, "batch_size": 32}, "sharding": {"tables": {"item_id": {"kinds": "row_wise"}}}},
    )  # fmt: skip
    for two in both:
        for mine, theirs in zip((*two[0], two[1]), (*one[0], one[1]), strict=True):
            for task in mine:
                assert mine[task]["ne"] == pytest.approx(theirs[task]["ne"], abs=2e-4)
    # What two ranks stored, one process reads.
    frame = histories.log(40, seed=5)
    a, b = (Recommender.load(tmp_path / name).score(frame) for name in ("one", "two"))
    np.testing.assert_allclose(a["score"], b["score"], atol=1e-3)


def test_an_interrupted_run_ends_as_if_it_had_not_been_and_goes_on_with_other_ranks(data, tmp_path):
    run = configured(data, {"model": {"sequences": {"clicked": {"kind": "gru", "dropout": 0.1}}, "tower": "lstm"}})
    run.training.epochs, run.training.checkpoint.every_steps = 1, 4
    run = parse_run(dump_run(run))
    run_ranks(train_until, 2, dump_run(run), tmp_path / "straight")
    run_ranks(train_until, 2, dump_run(run), tmp_path / "stopped", "resume", 6)
    run_ranks(train_until, 2, dump_run(run), tmp_path / "stopped", "resume")
    (tensors, _), (expected, _) = state_of(tmp_path / "stopped"), state_of(tmp_path / "straight")
    assert any(".embeddings.table_item_id" in name and name.endswith("/sum") for name in expected)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    run.training.epochs = 2
    said = train_until(dump_run(run), tmp_path / "stopped", "resume")
    assert "going on after step" in said


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    raw = yaml.safe_load(histories.RUN)
    # A history for each encoder, all of one column, and towers that read one of them.
    first = raw["schema"]["features"][3]
    raw["schema"]["features"] += [{**first, "name": name, "column": "clicked"} for name in ENCODERS[1:]]
    raw["model"] |= {"sequences": {"clicked": "din", **{n: n for n in ENCODERS[1:]}}}
    raw["model"] |= {"tower": {"kind": "lstm", "history": "clicked"}}
    raw["training"] |= {"epochs": 1}
    train_run(parse_run(yaml.safe_dump(raw), folder=data), folder, device="cpu", console=quiet())
    return FinishedRun.load(folder)


def test_a_recommender_gives_what_the_model_does_and_encodes_a_user_once(finished):
    frame = histories.log(30, seed=4)
    rows = finished.preprocessor.encode(Rows(frame), with_labels=False)
    expected = predict(finished.model, rows)
    scored = Recommender(finished).score(frame)
    for name in ("click", "like", "score"):
        np.testing.assert_allclose(scored[name], expected[name], atol=1e-6)


def test_what_is_the_users_alone_is_computed_once_a_user(finished):
    network = serving_network(finished.model).eval()
    seen = []
    for encoder in network.lookups[0].sequences.encoders().values():
        encoder.register_forward_pre_hook(lambda of, given: seen.append((of.reads_candidate, len(given[0].lengths))))
    once = sample_inputs(network, finished.preprocessor.encoder, 10)  # two rows of each of five users
    each = {**once, "alike": torch.arange(10), "first": torch.arange(10)}
    lengths = once["history_lengths"]
    parts = once["histories"].split(lengths.flatten().tolist())
    twice = [parts[f * 5 + user] for f in range(len(lengths)) for user in (torch.arange(10) // 2).tolist()]
    each |= {"histories": torch.cat(twice), "history_lengths": lengths.repeat_interleave(2, dim=1)}
    with torch.no_grad():
        one, other = network(**once), network(**each)
    assert seen == [(True, 10)] + [(False, 5)] * 4 + [(True, 10)] + [(False, 10)] * 4
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(("tables", "compiled"), [("fp32", "auto"), ("int8", "no"), ("fp16", "no")])
def test_an_exported_model_scores_as_the_run_does(finished, tmp_path, tables, compiled):
    """Any number of rows and values; see `export_run`, which compares the graph with the modules itself."""
    made = export_run(finished, tmp_path / "model.mtcl", tables=tables, compiled=compiled)
    assert max(made.difference.values()) < (2e-4 if tables == "fp32" else 0.02)
    frame = histories.log(25, seed=4)
    expected, got = Recommender(finished).score(frame), Recommender(Artefact.load(made.path)).score(frame)
    np.testing.assert_allclose(got["score"], expected["score"], atol=1e-5 if tables == "fp32" else 0.02)


def test_a_plan_holds_the_tables_of_histories(data):
    run = configured(data, {"model": {"tower": "lstm"}})
    report = plan_offline(run, 8, num_rows_of={"user_id": 10**7, "item_id": 10**8, "hour": 24, "clicked_kind": 8})
    placed = {table.name: table for table in report.tables}
    assert set(placed) == {"user_id", "hour", "item_id", "clicked_kind", "clicked_age"}
    assert placed["item_id"].kind in ("row_wise", "table_wise", "column_wise")
    assert report.memory.activations > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"sequences": {"clickd": "din"}}}, "no history 'clickd' \\(did you mean 'clicked'"),
        ({"model": {"sequences": {"clicked_kind": "din"}}}, "it stands beside 'clicked'"),
        ({"model": {"sequences": {"clicked": "dim"}}}, "'dim' is none of .*did you mean 'din'"),
        ({"model": {"sequences": {"clicked": {"kind": "din", "layers": 2}}}}, "layers belongs to gru and lstm"),
        ({"model": {"sequences": {"clicked": {"kind": "transformer", "heads": 3}}}}, "3 do not divide"),
        ({"model": {"sequences": {"clicked": {"kind": "gru", "options": {}, "heads": 2}}}}, "heads belongs to"),
        ({"model": {"tower": {"kind": "mlp", "hidden": 3}}}, "hidden belongs to lstm"),
        ({"model": {"tower": {"kind": "lstm", "history": "item_id"}}}, "model.tower.history: no history"),
        ({"model": {"ppnet": {"features": ["clicked_age"]}}}, "part of history 'clicked'; name that"),
        (
            {"model": {"trunk": {"kind": "stem", "own_tables": ["item_id"]}, "cross_layers": 0}},
            "a history looks up table 'item_id'",
        ),
        ({"balance": {"surgery": {"kind": "upgrad", "cut": "tables"}}}, "a history's rows goes"),
        ({"balance": {"surgery": {"kind": "upgrad"}}, "model": {"tower": "lstm"}}, "lstm tower reads"),
    ],
)
def test_a_wrong_configuration_is_refused(data, changes, message):
    with pytest.raises(ConfigError, match=message):
        configured(data, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": {"tables": {"kind": "adam"}}}, "adam has no kernel on the CPU"),
        ({"sharding": {"tables": {"item_id": {"kinds": "data_parallel"}}}}, "fused kernels only on a CPU"),
        ({"sharding": {"tables": {"item_id": {"kinds": "table_row_wise"}}}}, "take table_wise, row_wise, column_wise$"),
        ({"model": {"sequences": {"clicked": {"kind": "own_encoder:Newst"}}}}, "has no 'Newst'"),
    ],
)
def test_what_cannot_be_trained_here_is_said(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_run(configured(data, changes), tmp_path / "run", device="cpu", console=quiet())


def test_batches_in_which_nobody_has_a_history_train_too(data, tmp_path):
    """Rows one by one: the first ones have no history, and later ones do."""
    rows = histories.log(70, seed=3)
    rows.to_parquet(tmp_path / "log.parquet", index=False)
    assert (rows["clicked"].map(len) == 0).sum() > 5
    small = {"epochs": 1, "batch_size": 1, "warmup_steps": 5, "patience": 0}
    for kind in ("gru", "lstm"):
        model = {"model": {"sequences": {"clicked": kind}, "trunk": {"kind": "shared_bottom", "expert_layers": [4]}}}
        _, tasks = trained(tmp_path, tmp_path / kind, {**model, "training": small})
        assert np.isfinite(tasks["click"]["ne"])
