"""Whole runs through the public entry points: every trunk, optimizer and option trains, is stored and recommends."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.config import dump_run, load_run, parse_run
from mtcl_torchrec.data.batch import global_batches, iterate
from mtcl_torchrec.data.source import Rows, read_rows, split_by_time
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.checkpoint.store import best_checkpoint, newest_checkpoint
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.judging import fused_tasks, rows_predicted_by
from mtcl_torchrec.training.run import train_run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log().to_parquet(folder / "log.parquet", index=False)
    return folder


def configured(data, changes=()):
    run = parse_run(shop.RUN, folder=data)
    for path, value in dict(changes).items():
        *parents, last = path.split(".")
        at = run
        for parent in parents:
            at = getattr(at, parent)
        setattr(at, last, value)
    return parse_run(dump_run(run))


def quiet():
    return Console(file=open("/dev/null", "w"), force_terminal=False)


def trained(data, folder, changes=()):
    return train_run(configured(data, changes), folder, device="cpu", console=quiet())


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "shop"
    return trained(data, folder, {"training.epochs": 5})


def test_a_run_learns_what_the_columns_tell(finished):
    test = finished.evaluations["test"]
    assert test.tasks["click"]["auc"] > 0.75
    assert test.tasks["buy"]["auc"] > 0.65
    taste = finished.history.epochs[-1]["taste"]  # the kept epoch is the best for clicks
    assert taste["ne"] < 1
    assert taste["top1"] > 1.2 * taste["base_rate"]
    assert test.tasks["stars"]["r2"] > 0.3
    assert test.ranking["fused"]["auc click"] > test.ranking["popular"]["auc click"] + 0.1
    assert test.rows == 450


def test_masked_and_missing_labels_are_counted_nowhere(data, finished):
    parts = split_by_time(read_rows([str(data / "log.parquet")]), "time", 0.15, 0.15)
    test = parts["test"].frame
    counts = {name: m["count"] for name, m in finished.evaluations["test"].tasks.items()}
    clicked = test["click"].sum()
    assert counts == {"click": len(test), "buy": clicked, "taste": clicked, "stars": test["stars"].notna().sum()}


def test_metrics_are_stored_as_plain_json(finished):
    stored = json.loads((finished.folder / "metrics.json").read_text())
    assert stored["history"]["best_epoch"] == finished.history.best_epoch
    assert stored["evaluations"]["test"]["tasks"]["click"] == pytest.approx(
        finished.evaluations["test"].tasks["click"], nan_ok=True
    )


def test_a_run_of_dense_features_alone_trains_is_resumed_and_recommends(data, tmp_path):
    """No table at all: an ordinary network in the same loop, for what statistics tell."""
    text = (
        shop.RUN.split("  features:\n")[0]
        + """  features:
    - {name: price, group: item, kind: dense, transform: log}
    - {name: age, group: user, kind: dense}
  tasks: [{name: click, kind: binary}]
statistics: {keys: [user_id, [user_id, genre]], outcomes: [click], groups: {genre: item}}
model: {trunk: {kind: mmoe, num_experts: 2, expert_layers: [16]}}
optimizers: {dense: {lr: 0.01}}
training: {epochs: 1, batch_size: 32}
"""
    )
    run = parse_run(text, folder=data)
    train_run(run, tmp_path, existing="overwrite", device="cpu", console=quiet())
    run.training.epochs = 2
    result = train_run(run, tmp_path, existing="resume", device="cpu", console=quiet())
    assert len(result.history.epochs) == 2
    assert result.evaluations["test"].tasks["click"]["auc"] > 0.6
    assert len(Recommender.load(tmp_path).recommend("u3", k=3)) == 3


def test_a_run_read_back_predicts_the_same(data, finished):
    run = FinishedRun.load(finished.folder)
    raw = split_by_time(read_rows([str(data / "log.parquet")]), "time", 0.15, 0.15)["test"]
    again = evaluate_table(rows_predicted_by(run, raw), fused_tasks=fused_tasks(run.model))
    for task, metrics in finished.evaluations["test"].tasks.items():
        # The thresholds of the validation split are not known to it.
        both = again.tasks[task].keys() & metrics.keys()
        assert len(both) >= 4
        assert {k: again.tasks[task][k] for k in both} == pytest.approx(
            {k: metrics[k] for k in both}, abs=1e-6, nan_ok=True
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"model.trunk.kind": "single_task"},
        {"optimizers.tables.kind": "adagrad"},
        {"optimizers.tables.kind": "sgd", "optimizers.tables.lr": 1.0},
        {"optimizers.tables.kind": "adam", "optimizers.tables.lr": 0.01},
        {"optimizers.dense.kind": "sgd", "optimizers.dense.lr": 0.3, "training.decay": "cosine"},
        {"training.averaging": 0.9, "training.regularisers.l2_embedding": 1e-4, "training.decay": "none"},
        {
            "sharding.kinds": "row_wise",
            "training.pipeline": "base",
            "training.regularisers.l2_embedding": {"user_id": 1e-3, "topics": 1e-4},
        },
        {"sharding.kinds": "data_parallel", "model.tower_layers": []},
        {
            "model.embedding_dropout": 0.2,
            "model.dense_dropout": 0.1,
            "model.tower_dropout": 0.2,
            "model.cross_layers": 2,
            "model.trunk.norm": "rms",
        },
    ],
    ids=lambda c: ",".join(f"{k.split('.')[-1]}={v}" for k, v in c.items()),
)
def test_every_option_trains_and_learns(data, tmp_path, changes):
    changes = {**changes, "training.epochs": 2}
    if "model.trunk.kind" in changes:
        run = configured(data, {"training.epochs": 2})
        kind = changes["model.trunk.kind"]
        run.model.trunk = type(run.model.trunk)(kind=kind, expert_layers=[16])
        result = train_run(run, tmp_path / "run", device="cpu", console=quiet())
    else:
        result = trained(data, tmp_path / "run", changes)
    assert result.evaluations["test"].tasks["click"]["auc"] > 0.65
    assert FinishedRun.load(tmp_path / "run").model(torch.zeros(1, 7), _blank(tmp_path / "run"))["score"].shape == (1,)


def _blank(folder):
    run = FinishedRun.load(folder)
    return run.preprocessor.encode(Rows(shop.log(2)), with_labels=False).blank().sparse_features


def train_on_ranks(data, folder, changes):
    result = trained(data, folder, changes)
    return result.history.epochs, result.evaluations


def test_two_ranks_train_the_same_model_as_one(data, tmp_path):
    """No dropout, and half the batch per rank: then even the metrics agree."""
    same = {"model.trunk.gate_dropout": 0.0, "training.epochs": 2}
    one = trained(data, tmp_path / "one", same)
    two = run_ranks(train_on_ranks, 2, data, tmp_path / "two", {**same, "training.batch_size": 16})
    for epochs, evaluations in two:
        of_two = [*epochs, evaluations["val"].tasks, evaluations["test"].tasks]
        of_one = [*one.history.epochs, one.evaluations["val"].tasks, one.evaluations["test"].tasks]
        for mine, theirs in zip(of_two, of_one, strict=True):
            for task in mine:
                for name in mine[task]:
                    # Rank metrics jump when rounding swaps two rows.
                    tolerance = 1e-2 if name in ("auc", "gauc", "top1", "top5") else 3e-4
                    assert mine[task][name] == pytest.approx(theirs[task][name], abs=tolerance, nan_ok=True), name
    # What two ranks stored, one process reads.
    a, b = Recommender.load(tmp_path / "one"), Recommender.load(tmp_path / "two")
    pd.testing.assert_frame_equal(a.recommend("u3"), b.recommend("u3"), atol=1e-3)


def test_an_earlier_run_is_not_overwritten_unasked(data, finished):
    before = (finished.folder / "metrics.json").read_text()
    with pytest.raises(FileExistsError, match="holds a run already"):
        trained(data, finished.folder)
    assert (finished.folder / "metrics.json").read_text() == before


def test_data_that_do_not_fit_leave_an_earlier_run_alone(data, finished, tmp_path):
    before = sorted(p.relative_to(finished.folder) for p in finished.folder.rglob("*"))
    broken = shop.log().rename(columns={"price": "prize"})
    broken.to_parquet(tmp_path / "log.parquet", index=False)
    with pytest.raises(DataError, match="no column 'price' \\(did you mean 'prize'"):
        train_run(
            parse_run(shop.RUN, folder=tmp_path), finished.folder, existing="overwrite", device="cpu", console=quiet()
        )
    assert sorted(p.relative_to(finished.folder) for p in finished.folder.rglob("*")) == before


def test_tensorboard_holds_losses_and_validation_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    aucs = [e.value for e in events.Scalars("val/auc/click")]
    assert aucs == pytest.approx([e["click"]["auc"] for e in finished.history.epochs], abs=1e-6)
    losses = [e.value for e in events.Scalars("loss/click")]
    assert np.mean(losses[-5:]) < losses[0]


def test_weights_of_layers_decay_and_biases_and_scales_do_not(data):
    from mtcl_torchrec.data.preprocessing import Preprocessor
    from mtcl_torchrec.models import MTCLTrain
    from mtcl_torchrec.training.build import build_model
    from mtcl_torchrec.training.loop import parallelise
    from mtcl_torchrec.training.sharding import ranks

    run = configured(data, {"optimizers.dense.weight_decay": 0.5})
    preprocessor = Preprocessor(run.data_schema, run.statistics)
    preprocessor.fit(read_rows(run.data.log))
    with ranks("cpu") as where:
        train = MTCLTrain(build_model(run.model, preprocessor.encoder, run.fusion))
        model, optimizer = parallelise(train, where, run.optimizers)
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups if "weight_decay" in g for p in g["params"]}
        by_name = {n.split("tower.")[1]: decay[id(p)] for n, p in model.named_parameters() if "tower." in n}
        del model, optimizer, train
    assert by_name["heads.0.weight"] == by_name["trunk.levels.0.experts.weights.0"] == 0.5
    assert by_name["heads.0.bias"] == by_name["trunk.levels.0.experts.scales.0"] == by_name["towers.biases.0"] == 0.0


def test_early_stopping_keeps_the_best_epoch(data, tmp_path):
    wild = {"training.epochs": 12, "training.patience": 1, "training.warmup_steps": 0, "optimizers.dense.lr": 0.05,
            "training.decay": "none", "optimizers.tables.lr": 0.5}  # fmt: skip
    result = trained(data, tmp_path / "run", wild)
    history = result.history
    assert history.stopped_early
    assert len(history.epochs) == history.best_epoch + 1
    means = [np.mean([e[t]["auc"] for t in ("click", "buy")]) for e in history.epochs]
    assert history.best_epoch == 1 + int(np.argmax(means))
    # The evaluation is of the kept epoch, not of the last.
    assert result.evaluations["val"].tasks["click"]["auc"] == pytest.approx(
        history.epochs[history.best_epoch - 1]["click"]["auc"], abs=1e-6
    )


def test_where_validation_has_one_class_only_the_newest_epoch_is_kept_and_nothing_stops(data, tmp_path):
    frame = shop.log(600)
    frame.loc[400:, ["click", "buy"]] = 0
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("patience: 0", "patience: 1"), folder=tmp_path)
    history = train_run(run, tmp_path / "run", device="cpu", console=quiet()).history
    assert not history.stopped_early
    assert history.best_epoch == len(history.epochs) == 4


# ---------------------------------------------------------------- what stands on disk


@pytest.fixture
def stored(finished, tmp_path):
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def test_a_checkpoint_that_would_run_code_is_refused_unread(stored, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (best_checkpoint(stored / "checkpoints") / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="a checkpoint may not hold"):
        FinishedRun.load(stored)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("broken", [".metadata", "state.json", "preprocessing/encoder/encoder.json"])
def test_a_damaged_run_directory_is_one_clear_error(stored, broken):
    of = {".metadata": best_checkpoint, "state.json": newest_checkpoint}  # the newest knows which is best
    path = of[broken](stored / "checkpoints") / broken if broken in of else stored / broken
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"no readable checkpoint|damaged"):
        FinishedRun.load(stored)


def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(stored, finished):
    best = best_checkpoint(stored / "checkpoints")
    unfinished = best.with_name("step_999999999.writing")
    shutil.copytree(best, unfinished)
    pd.testing.assert_frame_equal(
        Recommender.load(stored).recommend("u3"), Recommender.load(finished.folder).recommend("u3")
    )


def test_ids_that_a_file_format_reads_as_another_kind_mean_the_same(tmp_path):
    """Text in Parquet, numbers in CSV: the statistics and the popularity must find them all the same."""
    frame = shop.log(1200)
    frame["user_id"], frame["product_id"] = frame["user_id"].str[1:], frame["product_id"].str[1:]
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("epochs: 4", "epochs: 1"), folder=tmp_path)
    train_run(run, tmp_path / "run", device="cpu", console=quiet())
    read_back = FinishedRun.load(tmp_path / "run")
    later = frame.tail(300).drop(columns="topics").assign(topics="book")
    later.to_parquet(tmp_path / "later.parquet", index=False)
    later.to_csv(tmp_path / "later.csv", index=False)
    raw = [read_back.preprocessor.conform(read_rows([str(tmp_path / f"later.{e}")])) for e in ("parquet", "csv")]
    one, other = (read_back.preprocessor.encode(rows) for rows in raw)
    torch.testing.assert_close(one.dense, other.dense)
    assert torch.equal(one.ids, other.ids)
    popularity = [rows.frame["product_id"].map(read_back.catalogue.popularity) for rows in raw]
    assert popularity[0].notna().all()
    np.testing.assert_array_equal(popularity[0], popularity[1])


def test_weights_edited_in_the_runs_own_yaml_change_the_ranking(stored):
    edited = parse_run((stored / "run.yaml").read_text())
    edited.fusion.weights.update({"click": 0.0, "buy": 0.0, "taste": 1.0, "stars": 0.0})
    (stored / "run.yaml").write_text(dump_run(edited))
    ranked = Recommender.load(stored).recommend("u3", k=5, seen=True)
    np.testing.assert_allclose(ranked["score"], ranked["taste"], atol=1e-6)


def test_the_runs_own_yaml_finds_the_data_again(finished):
    assert len(read_rows(load_run(finished.folder / "run.yaml").data.log)) == 3000


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "mine/catalogue").mkdir(parents=True)
    (tmp_path / "mine/run.yaml").write_text("# my comments")
    with pytest.raises(FileExistsError, match="is not empty and no run directory"):
        trained(data, tmp_path / "mine")
    assert (tmp_path / "mine/run.yaml").read_text() == "# my comments"
    assert (tmp_path / "mine/catalogue").is_dir()


def test_a_configuration_that_cannot_be_built_leaves_an_earlier_run_alone(data, stored):
    run = configured(data)
    features = tuple(
        f.model_copy(update={"encoding": "hash", "vocabulary_size": 10**12}) if f.name == "user_id" else f
        for f in run.data_schema.features
    )
    run.data_schema = run.data_schema.model_copy(update={"features": features})
    with pytest.raises(ConfigError, match="fit on no plan"):
        train_run(run, stored, existing="overwrite", device="cpu", console=quiet())
    assert len(Recommender.load(stored).recommend("u3", k=3)) == 3


def test_a_loss_that_is_not_finite_too_often_stops_with_the_batch_and_the_task_named(data, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"step \d+ \(epoch 1\): the loss of .*click.* is not finite on rank 0; "
    ):
        trained(data, tmp_path / "run", {"optimizers.dense.kind": "sgd", "optimizers.dense.lr": 1e30,
                                         "optimizers.dense.clip_norm": 0.0})  # fmt: skip


def test_one_bad_label_costs_one_batch(tmp_path):
    frame = shop.log(900)
    frame.loc[100, "stars"] = 3e38
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("loss: huber", "mean: 3.0, std: 1.0"), folder=tmp_path)
    said = io.StringIO()
    result = train_run(run, tmp_path / "run", device="cpu", console=Console(file=said, width=200))
    assert result.history.skipped_steps == run.training.epochs
    assert "the loss of stars is not finite on rank 0; the batch trained nothing (1 so far)" in said.getvalue()
    assert result.history.epochs[-1]["click"]["auc"] > 0.6


# ---------------------------------------------------------------- recommending


def test_recommendations_are_the_items_with_the_highest_score(finished):
    recommender = Recommender.load(finished.folder)
    every = recommender.recommend("u3", {"hour": 20}, k=1000, seen=True)
    assert len(every) == len(recommender.catalogue.items)
    assert every["score"].is_monotonic_decreasing
    assert every["score"].between(0, 1).all()
    top = recommender.recommend("u3", {"hour": 20}, k=5, seen=True)
    pd.testing.assert_frame_equal(top, every.head(5))
    # u3 likes the fourth genre.
    assert np.mean([int(p[1:]) % 4 == 3 for p in top["product_id"]]) >= 0.8


def test_the_score_is_that_of_the_model_on_the_same_columns(finished):
    """Serving computes the same features as training: rows written by hand give the recommended score."""
    run, recommender = FinishedRun.load(finished.folder), Recommender.load(finished.folder)
    top = recommender.recommend("u3", {"hour": 20}, k=3, seen=True)
    log = shop.log()
    rows = pd.concat([log[log["product_id"] == p].tail(1) for p in top["product_id"]]).reset_index(drop=True)
    rows = rows.assign(user_id="u3", age=23.0, hour=20)
    encoded = run.preprocessor.encode(Rows(rows), with_labels=False)
    (batch,) = iterate(encoded, global_batches(3, 10))
    out = run.model(batch.dense_features, batch.sparse_features)
    np.testing.assert_allclose(out["score"].detach().numpy(), top["score"], atol=1e-6)
    np.testing.assert_allclose(out["buy"].detach().numpy(), top["buy"], atol=1e-6)


def test_seen_items_are_left_out_unless_asked_for(finished):
    recommender = Recommender.load(finished.folder)
    seen = recommender.catalogue.seen
    met = set(seen.loc[seen["user_id"] == "u3", "product_id"])
    fresh = set(recommender.recommend("u3", k=1000)["product_id"])
    assert met
    assert not fresh & met
    assert fresh | met == set(recommender.catalogue.items["product_id"])


def test_a_column_of_user_and_item_together_is_missing_for_new_pairs(tmp_path):
    frame = shop.log(800)
    frame["distance"] = np.random.default_rng(0).random(800)
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    feature = "    - {name: distance, group: [user, item], kind: dense}\n    - {name: age,"
    text = shop.RUN.replace("    - {name: age,", feature).replace("epochs: 4", "epochs: 1")
    train_run(parse_run(text, folder=tmp_path), tmp_path / "run", device="cpu", console=quiet())
    ranked = Recommender.load(tmp_path / "run").recommend("u3", k=3, seen=True)
    assert np.isfinite(ranked["score"]).all()


def test_an_id_that_training_never_met_is_an_embedding_of_zero(finished):
    run = FinishedRun.load(finished.folder)
    weights = run.model.embedding_bag_collection.embedding_bags["table_user_id"].weight
    assert (weights[0] == 0).all()
    assert (weights[1:].abs().sum(1) > 0).all()


def test_an_unknown_user_is_ranked_without_history(finished):
    recommender = Recommender.load(finished.folder)
    ranked = recommender.recommend("nobody", k=4)
    assert len(ranked) == 4
    assert np.isfinite(ranked["score"]).all()


def test_the_context_matters_and_mistakes_in_it_are_named(finished):
    recommender = Recommender.load(finished.folder)
    early, late = (recommender.recommend("u3", {"hour": h}, k=50, seen=True)["click"].mean() for h in (9, 21))
    assert late > early
    with pytest.raises(DataError, match="no context column 'huor' \\(did you mean 'hour'"):
        recommender.recommend("u3", {"huor": 3})
    with pytest.raises(DataError, match="context hour = 'late' is no number"):
        recommender.recommend("u3", {"hour": "late"})
    with pytest.raises(ValueError, match="k must be at least 1"):
        recommender.recommend("u3", k=0)


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(DataError, match="no run here"):
        FinishedRun.load(tmp_path)


def test_without_a_user_column_there_is_nothing_to_recommend(data, tmp_path):
    text = shop.RUN.replace("  user: user_id\n", "")
    run = parse_run(text, folder=data)
    run.training.epochs = 1
    train_run(run, tmp_path / "run", device="cpu", console=quiet())
    with pytest.raises(ConfigError, match="names no user or no item column"):
        Recommender.load(tmp_path / "run")
