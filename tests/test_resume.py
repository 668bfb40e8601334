"""Whole runs that stop and go on: in memory, from a stream, on other ranks, with new data, with a full disk."""

import errno
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console
from test_faults import state_of
from torch.distributed.checkpoint import FileSystemWriter

from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.data.worlds import world_run
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.checkpoint.state import TrainingState
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint, read_about
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.run import train_run

STREAM = """
data: {train: train, val: val.parquet, stream: true, window: 150, workers: 2}
schema:
  user: user_id
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8, encoding: hash, vocabulary_size: 50}
    - {name: topics, group: item, kind: bag, embedding_dim: 4}
    - {name: price, group: item, kind: dense, transform: log}
    - {name: hour, group: context, embedding_dim: 4}
  tasks: [{name: click, kind: binary}, {name: buy, kind: binary, mask: click}]
model: {trunk: {kind: mmoe, num_experts: 2, expert_layers: [16], gate_dropout: 0.1}, tower_layers: [8]}
optimizers: {tables: {lr: 0.1}, dense: {lr: 0.01}}
training: {epochs: 2, batch_size: 32, warmup_steps: 5, patience: 0, checkpoint: {every_steps: 7}}
fusion: {kind: monotone_network, signs: {click: 1, buy: 1}, train: {reward: {click: 1, buy: 3}, missing: zero}}
"""
# Weights that follow the context, learnt from the order within a user's rows, into the heads.
GATED = "fusion: {kind: context_gated_mean, weights: {click: 1, buy: 3, stars: 0.5}, features: [hour, age], "
GATED += "train: {reward: {click: 1, buy: 3}, missing: zero, loss: pairwise, heads: through}}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The shop's log in three very uneven files, and a validation file."""
    folder = tmp_path_factory.mktemp("stream")
    frame = shop.log(1500)
    (folder / "train").mkdir()
    for number, (start, stop) in enumerate([(0, 7), (7, 1000), (1000, 1200)]):
        frame[start:stop].to_parquet(folder / f"train/{number}.parquet", index=False, row_group_size=120)
    frame[1200:].to_parquet(folder / "val.parquet", index=False)
    frame.to_parquet(folder / "log.parquet", index=False)
    return folder


def runs(data):
    return {
        "stream": parse_run(STREAM, folder=data),
        "memory": parse_run(
            shop.RUN.replace("epochs: 4", "epochs: 2, averaging: 0.9, checkpoint: {every_steps: 7}").replace(
                "fusion: {weights: {click: 1, buy: 3, taste: 0.5, stars: 0.5}}", GATED
            ),
            folder=data,
        ),
    }  # fmt: skip


class Interruption(KeyboardInterrupt):
    pass


def stop_after(step):
    """Ends training in the middle, as a person with Ctrl-C would."""

    def interrupted(self, **said):
        if said["step"] == step:
            raise Interruption

    TrainingProgress.step = interrupted


def train(run_yaml, folder, existing="refuse", stop=None):
    """On each rank: what was said, and how many steps the checkpoint has."""
    step = TrainingProgress.step
    if stop is not None:
        stop_after(stop)
    said = io.StringIO()
    try:
        train_run(parse_run(run_yaml), folder, existing=existing, device="cpu", console=Console(file=said, width=200))
    except Interruption:
        pass
    finally:
        TrainingProgress.step = step
    return said.getvalue()


def straight_and_stopped(run, folder):
    """A run without interruption, and one that is stopped twice."""
    train(run, folder / "straight")
    for stop in (17, 24):
        train(run, folder / "stopped", "resume", stop)
        assert read_about(newest_checkpoint(folder / "stopped/checkpoints"))["step"] < stop


@pytest.mark.parametrize(
    ("world_size", "kind"),
    [
        (1, "memory"),
        (2, "stream"),
        *(pytest.param(*case, marks=pytest.mark.full) for case in [(1, "stream"), (2, "memory")]),
    ],
)
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(data, tmp_path, kind, world_size):
    run = dump_run(runs(data)[kind])
    run_ranks(straight_and_stopped, world_size, run, tmp_path)
    said = run_ranks(train, world_size, run, tmp_path / "stopped", "resume")
    assert "going on after step" in said[0]
    assert said[1:] == [""] * (world_size - 1)
    (tensors, about), (expected, expected_about) = state_of(tmp_path / "stopped"), state_of(tmp_path / "straight")
    assert {k: about[k] for k in ("step", "position", "history")} == {
        k: expected_about[k] for k in ("step", "position", "history")
    }
    assert any("fused_score" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    straight, stopped = (json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("straight", "stopped"))
    assert stopped["evaluations"] == straight["evaluations"]
    assert straight["evaluations"]["val"]["tasks"]["click"]["auc"] > 0.6


@pytest.mark.parametrize("kind", [pytest.param("stream", marks=pytest.mark.full), "memory"])
def test_a_run_goes_on_with_another_number_of_ranks(data, tmp_path, kind):
    run = runs(data)[kind]
    run_ranks(train, 2, dump_run(run), tmp_path / "run", "refuse", 12)
    train(dump_run(run), tmp_path / "run", "resume", stop=26)
    run.sharding.kinds = ["row_wise"]
    said = run_ranks(train, 2, dump_run(run), tmp_path / "run", "resume")
    assert "going on after step" in said[0]
    about = read_about(newest_checkpoint(tmp_path / "run/checkpoints"))
    assert about["position"] == {"epoch": 3, "taken": []}
    assert len(about["history"]["epochs"]) == 2
    assert about["history"]["epochs"][-1]["click"]["auc"] > 0.6


@pytest.mark.full
def test_both_pipelines_train_the_same_in_every_epoch(data, tmp_path):
    run = runs(data)["memory"]
    run.training.epochs = 2
    train(dump_run(run), tmp_path / "sparse_dist")
    run.training.pipeline = "base"
    train(dump_run(run), tmp_path / "base")
    (tensors, about), (expected, expected_about) = state_of(tmp_path / "base"), state_of(tmp_path / "sparse_dist")
    assert about["step"] == expected_about["step"]
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def test_new_data_and_new_ids_find_rows_of_their_own(data, tmp_path):
    """Resumed on a longer log: known ids keep their rows, new ones get the next, the table grows."""
    folder = tmp_path / "log"
    folder.mkdir()
    frame = shop.log(900)
    frame.to_parquet(folder / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("epochs: 4", "epochs: 1"), folder=folder)
    train(dump_run(run), tmp_path / "run")
    before, table = state_of(tmp_path / "run")[0], "weights.model.embedding_bag_collection.embedding_bags.table_user_id"
    vocabulary = FinishedRun.load(tmp_path / "run").preprocessor.encoder._vocabularies["user_id"]
    newer = shop.log(300, seed=9)
    newer["user_id"] = "a" + newer["user_id"]  # before "u1" in the alphabet
    newer.loc[newer["genre"] == "drama", "genre"] = "audio"  # a new class of the task "taste"
    pd.concat([frame, newer]).to_parquet(folder / "log.parquet", index=False)
    run.training.epochs, run.optimizers.tables.lr, run.optimizers.dense.lr = 2, 1e-12, 1e-12
    said = train(dump_run(run), tmp_path / "run", "resume")
    assert "the training data is not what it was" not in said  # the epoch was over
    grown = FinishedRun.load(tmp_path / "run").preprocessor.encoder._vocabularies["user_id"]
    assert list(grown[: len(vocabulary)]) == list(vocabulary)
    assert {str(u)[:2] for u in grown[len(vocabulary) :]} >= {"au"}
    after = state_of(tmp_path / "run")[0]
    old, new = before[f"{table}.weight"], after[f"{table}.weight"]
    assert len(new) == len(grown) + 1 > len(old) == len(vocabulary) + 1
    torch.testing.assert_close(new[: len(old)], old)
    assert new[len(old) :].abs().max() > 0
    assert len(Recommender.load(tmp_path / "run").recommend("au3", k=3)) == 3


def test_the_schedule_goes_on_where_it_was_in_the_data(data, tmp_path, monkeypatch):
    """Not at the same number of steps, which are of another size on other ranks or with another batch size."""
    run = runs(data)["memory"]
    run.training.warmup_steps, run.training.epochs, run.training.batch_size = 0, 1, 32  # 33 steps
    train(dump_run(run), tmp_path / "run", stop=15)
    run.training.batch_size = 8
    rates, load = [], TrainingState.load

    def loaded(self, *arguments, **options):
        load(self, *arguments, **options)
        rates.extend(group["lr"] for group in self.optimizer.param_groups)

    monkeypatch.setattr(TrainingState, "load", loaded)
    train(dump_run(run), tmp_path / "run", "resume", stop=16)
    left = 1 - 14 * 32 / 1050  # of the rows, after the checkpoint of step 14: so is the rate of a linear decay to 0
    assert rates == [pytest.approx(lr * left, rel=0.02) for lr in [0.1] * (len(rates) - 2) + [0.01] * 2]


def test_an_epoch_starts_again_where_its_rows_have_changed(data, tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    shop.log(900).to_parquet(folder / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("epochs: 4", "epochs: 2, checkpoint: {every_steps: 3}"), folder=folder)
    train(dump_run(run), tmp_path / "run", stop=8)
    shop.log(1000).to_parquet(folder / "log.parquet", index=False)
    said = train(dump_run(run), tmp_path / "run", "resume", stop=9)
    assert "the training data is not what it was: its epoch starts again" in said
    assert "epoch 1, 0% of it done" in said
    shop.log(1000, seed=5).to_parquet(folder / "log.parquet", index=False)  # as many rows, others
    assert "is not what it was" in train(dump_run(run), tmp_path / "run", "resume")


def test_an_epoch_of_a_stream_starts_again_where_files_have_changed_places(data, tmp_path):
    (tmp_path / "train").mkdir()
    frame = shop.log(800)
    for name, half in (("a", frame[:400]), ("b", frame[400:])):
        half.to_parquet(tmp_path / f"train/{name}.parquet", index=False, row_group_size=100)
    run = parse_run(STREAM.replace("train: train", f"train: {tmp_path}/train"), folder=data)
    train(dump_run(run), tmp_path / "run", stop=10)
    again = train(dump_run(run), tmp_path / "run", "resume", stop=12)
    assert "is not what it was" not in again
    (tmp_path / "train/a.parquet").rename(tmp_path / "train/c.parquet")
    assert "is not what it was" in train(dump_run(run), tmp_path / "run", "resume")


def test_weights_that_overflow_are_told(data, tmp_path):
    run = runs(data)["memory"]
    run.optimizers.dense.kind, run.optimizers.dense.lr, run.optimizers.dense.clip_norm = "sgd", 1e30, 0.0
    run.training.max_skipped_steps = 10**6
    with pytest.raises(FloatingPointError, match=r"predictions of .*click.* are not finite on the validation rows"):
        train(dump_run(run), tmp_path / "run")


def test_a_failed_write_on_the_way_is_told_also_where_it_is_not_in_the_background(data, tmp_path, monkeypatch):
    run = runs(data)["memory"]
    run.training.checkpoint.asynchronous, run.training.epochs = False, 1
    mkdir = Path.mkdir

    def full(self, *arguments, **options):
        if "step_000000007" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    said = train(dump_run(run), tmp_path / "run")
    assert "WARNING" in said
    assert "No space left on device" in said
    assert FinishedRun.load(tmp_path / "run").finished


@pytest.mark.parametrize("moment", ["written", "moved", "done"])
def test_what_preprocessing_learnt_survives_an_interruption_of_its_own_rewriting(data, tmp_path, moment):
    run = runs(data)["memory"]
    run.training.epochs = 1
    train(dump_run(run), tmp_path / "run")
    learnt = tmp_path / "run/preprocessing"
    shutil.copytree(learnt, tmp_path / "run/preprocessing.writing")
    if moment != "written":
        learnt.rename(tmp_path / "run/preprocessing.old")
    if moment == "done":
        (tmp_path / "run/preprocessing.writing").rename(learnt)
    assert len(Recommender.load(tmp_path / "run").recommend("u3", k=3)) == 3
    run.training.epochs = 2
    assert "epoch 2/2" in train(dump_run(run), tmp_path / "run", "resume")
    assert not list((tmp_path / "run").glob("*.old")) + list((tmp_path / "run").glob("*.writing"))


def test_what_was_trained_before_an_interruption_recommends(data, tmp_path):
    run = runs(data)["memory"]
    train(dump_run(run), tmp_path / "run", stop=5)
    with pytest.raises(DataError, match="has kept no epoch yet"):
        FinishedRun.load(tmp_path / "run")
    train(dump_run(run), tmp_path / "run", "resume", stop=50)
    assert not FinishedRun.load(tmp_path / "run").finished
    assert len(Recommender.load(tmp_path / "run").recommend("u3", k=3)) == 3
    said = train(dump_run(run), tmp_path / "run", "resume")
    assert FinishedRun.load(tmp_path / "run").finished
    again = train(dump_run(run), tmp_path / "run", "resume")  # nothing is left to do
    assert "epoch 2/2" in said
    assert "epoch 2/2" not in again
    assert "all 2 epochs are done: nothing is trained" in again
    assert "nothing to go on with" in train(dump_run(run), tmp_path / "other", "resume", stop=1)


def test_a_disk_that_is_full_on_the_way_is_told_and_at_the_end_of_an_epoch_stops(data, tmp_path, monkeypatch):
    run = runs(data)["memory"]
    write = FileSystemWriter.write_data

    def full(self, *args, **options):
        if "step_000000007" in str(self.path) or fails_always:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args, **options)

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    fails_always = False
    said = train(dump_run(run), tmp_path / "run", stop=16)
    assert "WARNING" in said
    assert "step_000000007 could not be written" in said
    assert "No space left on device" in said
    assert newest_checkpoint(tmp_path / "run/checkpoints").name == "step_000000014"
    fails_always = True
    with pytest.raises(OSError, match=r"could not be written.*the last good one is step_000000014"):
        train(dump_run(run), tmp_path / "run", "resume")
    fails_always = False
    train(dump_run(run), tmp_path / "run", "resume")
    assert FinishedRun.load(tmp_path / "run").finished


def test_checkpoints_are_written_by_the_clock_of_the_first_rank(data, tmp_path):
    run = runs(data)["memory"]
    run.training.checkpoint.every_steps, run.training.checkpoint.every_minutes = 0, 1e-6
    run.training.checkpoint.keep = 100
    run_ranks(train, 2, dump_run(run), tmp_path / "run")
    steps = {int(p.name[5:]) for p in (tmp_path / "run/checkpoints").glob("step_*")}
    about = read_about(newest_checkpoint(tmp_path / "run/checkpoints"))
    last, each = about["step"], about["step"] // 2
    # The clock is read together with the losses; the end of an epoch has a checkpoint of its own.
    assert steps == {each, last} | set(range(20, last, 20))
    assert about["ranks"] == 2
    assert set(about["plan"]) == {f"table_{name}" for name in run.data_schema.tables()}
    assert all(table["kind"] in ("table_wise", "row_wise") for table in about["plan"].values())
    assert about["versions"]["torch"] == torch.__version__
    assert parse_run(about["run"]).data_schema == run.data_schema


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "12"), ("step", -1), ("step", 6), ("averaged", 0.5), ("position", {"epoch": 1, "taken": [[1, 32, 999]]}),
     ("position", {"epoch": 0, "taken": []}), ("position", [1]), ("history", {"epochs": 3}),
     ("history", {"best_auc": "x"}), ("history", {"unknown": 1}), ("rows", None)],
)  # fmt: skip
def test_a_state_that_makes_no_sense_is_one_clear_error(data, tmp_path, key, value):
    run = runs(data)["memory"]
    if not (data / "spoilt").exists():
        train(dump_run(run), data / "spoilt", stop=8)
    shutil.copytree(data / "spoilt", tmp_path / "run")
    path = newest_checkpoint(tmp_path / "run/checkpoints") / "state.json"
    about = json.loads(path.read_text())
    if value is None:
        del about[key]
    else:
        about[key] = value
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"damaged checkpoint|no position"):
        train(dump_run(run), tmp_path / "run", "resume")


def test_where_the_best_checkpoint_is_gone_another_epoch_is_kept(data, tmp_path):
    run = runs(data)["memory"]
    run.training.epochs = 1
    train(dump_run(run), tmp_path / "run")
    run.training.epochs = 2
    best = read_about(newest_checkpoint(tmp_path / "run/checkpoints"))["history"]["best_step"]
    train(dump_run(run), tmp_path / "run", "resume", stop=best + 9)
    shutil.rmtree(tmp_path / f"run/checkpoints/step_{best:09d}")
    about = read_about(newest_checkpoint(tmp_path / "run/checkpoints"))
    assert about["step"] > about["history"]["best_step"] == best
    said = train(dump_run(run), tmp_path / "run", "resume")
    assert "is gone: of the epochs to come" in said
    assert read_about(newest_checkpoint(tmp_path / "run/checkpoints"))["history"]["best_epoch"] == 2


# ---------------------------------------------------------------- streams


def test_a_truncated_file_is_named(data, tmp_path):
    broken = tmp_path / "train.parquet"
    broken.write_bytes((data / "train/1.parquet").read_bytes()[:-200])
    run = runs(data)["stream"]
    run.data.train = [str(data / "train/0.parquet"), str(broken)]
    with pytest.raises(DataError, match=r"train\.parquet: cannot be read"):
        train(dump_run(run), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("label", ["click", "buy"])
def test_a_label_column_that_holds_no_value_is_named(data, tmp_path, stream, label):
    frame = pd.read_parquet(data / "train").assign(**{label: np.nan})
    frame.to_parquet(tmp_path / "train.parquet", index=False)
    run = runs(data)["stream"]
    run.data.train, run.data.stream = [str(tmp_path / "train.parquet")], stream
    if not stream:
        run.data = type(run.data)(train=run.data.train, val=run.data.val)
    with pytest.raises(DataError, match=f"label.*'?{label}'?"):
        train(dump_run(run), tmp_path / "run")


def test_more_ranks_than_rows(data, tmp_path):
    pd.read_parquet(data / "train/0.parquet")[:3].assign(click=[0, 1, 1], buy=[0, 1, 0]).to_parquet(
        tmp_path / "train.parquet", index=False
    )
    run = runs(data)["stream"]
    run.data.train = [str(tmp_path / "train.parquet")]
    run.training.epochs = 1
    run_ranks(train, 4, dump_run(run), tmp_path / "run")
    assert read_about(newest_checkpoint(tmp_path / "run/checkpoints"))["step"] == 1


def test_statistics_cannot_be_counted_in_a_stream_and_prepared_ones_can(data, tmp_path):
    from mtcl_torchrec.data.prepare import prepare_files

    run = parse_run(STREAM.replace("model:", "statistics: {keys: [user_id], outcomes: [click]}\nmodel:").replace(
        "user: user_id", "user: user_id\n  time: time"), folder=data)  # fmt: skip
    with pytest.raises(ConfigError, match="mtcl prepare"):
        train(dump_run(run), tmp_path / "run")
    prepare_files(run, tmp_path / "prepared", lambda _: None)
    prepared = (tmp_path / "prepared/run.yaml").read_text()
    assert "stream: true" in prepared
    assert "window: 150" in prepared
    assert pq.ParquetFile(tmp_path / "prepared/train.parquet").metadata.row_group(0).num_rows == 150
    ready = parse_run(prepared, folder=tmp_path / "prepared")
    ready.training.epochs = 1
    train(dump_run(ready), tmp_path / "run")
    assert (
        len(FinishedRun.load(tmp_path / "run").preprocessor.encoder.dense_groups) == 4
    )  # price, its mark, count, rate


@pytest.mark.full
def test_a_run_on_a_world_stops_and_goes_on(tmp_path):
    run = world_run("video", rows=3000, val_rows=500, test_rows=300, num_users=200, num_items=100)

    parsed = parse_run(run)
    parsed.training.checkpoint.every_steps = 5
    parsed.training.epochs = 1
    run_ranks(train, 2, dump_run(parsed), tmp_path / "straight")
    run_ranks(train, 2, dump_run(parsed), tmp_path / "run", "refuse", 8)
    run_ranks(train, 2, dump_run(parsed), tmp_path / "run", "resume")
    (tensors, _), (expected, _) = state_of(tmp_path / "run"), state_of(tmp_path / "straight")
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
