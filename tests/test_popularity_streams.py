"""Popularity of rows that are never in memory together: counted as training goes by, to the row, on any ranks."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import shop
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from rich.console import Console
from test_resume import train

from mtcl_torchrec.config import dump_run, load_run, parse_run
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.item_totals import ItemTotals
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.data.source import read_rows
from mtcl_torchrec.data.splits import Splits
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.data.world_windows import WorldWindows, world_of
from mtcl_torchrec.data.worlds import ready_world, world_run
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint, read_about
from mtcl_torchrec.training.counted_items import totals_of
from mtcl_torchrec.training.directory import RunWarning
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.held_out import columns_needed, held_out_of, rows_of_split
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.start import Start

RUN = """
data: {train: train, val: val.parquet, stream: true, window: 150, workers: 2}
schema:
  user: user_id
  item: product_id
  features:
    - {name: user_id, group: user, embedding_dim: 4}
    - {name: shown, column: product_id, group: item, embedding_dim: 4}
    - {name: genre, group: item, embedding_dim: 4}
  tasks:
    - {name: click, kind: binary, sample_weight: age}
    - {name: buy, kind: binary, mask: click}
    - {name: taste, kind: multiclass, label: genre, item_class: genre, mask: click, inputs: [user]}
    - {name: stars, kind: regression, weight: 0.2}
model: {trunk: {kind: shared_bottom, expert_layers: [8]}, tower_layers: [4]}
optimizers: {tables: {lr: 0.1}, dense: {lr: 0.01}}
training: {epochs: 2, batch_size: 32, patience: 0, checkpoint: {every_steps: 7}, id_dropout: {shown: 0.3}}
fusion: {weights: {click: 1, buy: 3, taste: 0.5, stars: 0.5}}
"""
TASKS = (
    Task.binary("click"), Task.multiclass("kind", num_classes=3), Task.regression("stars"),
)  # fmt: skip


def encoded(draw, rows, items, weighed):
    labels = np.stack([draw.integers(0, 2, rows), draw.integers(0, 3, rows), draw.normal(3, 2, rows)], 1)
    labels[draw.random(labels.shape) < 0.3] = np.nan
    weights = torch.from_numpy(draw.random((rows, 3)) * 3).float() if weighed else None
    ids = torch.from_numpy(draw.integers(0, items, (rows, 1)))
    return EncodedRows(torch.empty(rows, 0), ("item",), ids, torch.from_numpy(labels).float(), weights=weights)


def counted(parts, takes, items, most=10**6):
    totals = ItemTotals(TASKS, "item", items, most)
    for part in parts:
        totals.see(totals.part_of(part, torch.arange(len(part))))
    for rows in takes:
        totals.take(rows)
    return totals


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 60), items=st.integers(1, 9), weighed=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=4), batch=st.integers(1, 40), most=st.integers(1, 10),
)  # fmt: skip
def test_any_windows_and_batches_give_what_a_count_of_all_rows_gives(seed, rows, items, weighed, cuts, batch, most):
    whole = encoded(np.random.default_rng(seed), rows, items, weighed)
    ends = sorted({min(cut, rows) for cut in cuts} | {0, rows})
    parts = [whole.slice(start, stop) for start, stop in pairwise(ends)]
    totals = counted(parts, [batch] * -(-rows // batch), items, most)  # the last batch may be filled up
    codes = whole.ids[:, 0].numpy()
    groups = np.where(codes > 0, 1 + (codes - 1) % max(min(items - 1, most), 1), 0)
    keys = pd.Series(groups.astype(float)).mask(groups == 0)
    expected = Popularity.count(
        keys, TASKS, whole.labels.numpy(), None if whole.weights is None else whole.weights.numpy()
    )
    found, asked = totals.popularity(), pd.Series(np.arange(items))
    by_row = found.of_rows(asked, EncodedRows(torch.empty(items, 0), ("item",), torch.arange(items)[:, None],
                                              torch.empty(items, 3)))  # fmt: skip
    as_counted = pd.Series(np.where(asked > 0, 1 + (asked - 1) % max(min(items - 1, most), 1), np.nan))
    for name, of in expected.of(as_counted).items():
        np.testing.assert_allclose(by_row[name], of, rtol=1e-6)
    for name, usual in expected.usual.items():
        np.testing.assert_allclose(found.usual[name], usual, rtol=1e-12)
    # Stopped after some of the batches and gone on with: the same to the bit.
    taken = min(batch, rows)
    first, second = counted(parts, [batch], items, most), ItemTotals(TASKS, "item", items, most)
    for mine, theirs in zip(second.tensors().values(), first.tensors().values(), strict=True):
        mine += theirs
    second.see(second.part_of(whole, torch.arange(taken, rows)))
    second.take(rows)
    for mine, theirs in zip(second.tensors().values(), totals.tensors().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    frame = shop.log(1500)
    (folder / "train").mkdir()
    for number, (start, stop) in enumerate([(0, 7), (7, 1000), (1000, 1200)]):
        frame[start:stop].to_parquet(folder / f"train/{number}.parquet", index=False, row_group_size=120)
    frame[1200:].to_parquet(folder / "val.parquet", index=False)
    return folder


def expected_of(run, run_folder, rows):
    """What a count of all training rows in memory says of a frame's items."""
    read, raw = FinishedRun.load(run_folder), read_rows(run.data.train)
    whole = read.preprocessor.encode(raw)
    found = Popularity.count(raw.frame["product_id"], read.model.tasks, whole.labels.numpy(), whole.weights.numpy())
    return found, found.of(rows)


def rates_in(folder):
    return pd.read_parquet(folder / "popularity/rates.parquet"), (folder / "popularity/usual_rates.json").read_text()


def stopped_once(run, folder):
    train(run, folder, "resume", stop=13)
    assert not (folder / "popularity").exists()


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_stream_knows_the_popularity_of_all_its_rows_and_a_resumed_one_the_same(data, tmp_path, world_size):
    run = parse_run(RUN, folder=data)
    run_ranks(train, world_size, dump_run(run), tmp_path / "straight")
    run_ranks(stopped_once, world_size, dump_run(run), tmp_path / "stopped")
    assert read_about(newest_checkpoint(tmp_path / "stopped/checkpoints"))["position"]["epoch"] == 1
    run_ranks(train, world_size, dump_run(run), tmp_path / "stopped", "resume")
    (frame, usual), (again, usual_again) = rates_in(tmp_path / "straight"), rates_in(tmp_path / "stopped")
    pd.testing.assert_frame_equal(frame, again, check_exact=True)
    assert usual == usual_again
    straight, stopped = (json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("straight", "stopped"))
    assert stopped["evaluations"] == straight["evaluations"]

    table = read_predictions(tmp_path / "straight/predictions/val.parquet")
    raw = rows_of_split(run, ["product_id"], "val")
    counted, by_event = expected_of(run, tmp_path / "straight", raw.frame["product_id"])
    for task, of in by_event.items():
        np.testing.assert_allclose(table.popular_for[task], of, rtol=1e-5)
    assert np.ptp(by_event["click"]) > 0.1
    np.testing.assert_allclose(json.loads(usual)["taste"], counted.usual["taste"], rtol=1e-9)
    assert {"auc click", "gauc click"} <= set(straight["evaluations"]["val"]["ranking"]["popular"])
    assert straight["evaluations"]["val"]["against_popularity"]


def test_counts_go_on_with_other_ranks_and_begin_again_with_other_rows(data, tmp_path):
    folder, run = tmp_path / "run", parse_run(RUN, folder=data)
    run_ranks(stopped_once, 2, dump_run(run), folder)
    train(dump_run(run), folder, "resume")
    _, by_event = expected_of(run, folder, pd.Series([f"p{i}" for i in range(60)]))
    found = FinishedRun.load(folder)
    items = pd.DataFrame({"user_id": "u1", "product_id": [f"p{i}" for i in range(60)], "genre": "drama"})
    of_rows = found.popularity.of_rows(items["product_id"], found.encode(items))
    for task, of in by_event.items():
        np.testing.assert_allclose(of_rows[task], of, rtol=1e-5)
    before, _ = rates_in(folder)

    # More rows: the run goes on with an epoch of these, and counts them.
    shop.log(400, seed=5).to_parquet(tmp_path / "more.parquet", index=False)
    longer = run.model_copy(deep=True)
    longer.data.train, longer.training.epochs = [*run.data.train, str(tmp_path / "more.parquet")], 3
    train(dump_run(longer), folder, "resume")
    _, by_event = expected_of(longer, folder, items["product_id"])
    found = FinishedRun.load(folder)
    of_rows = found.popularity.of_rows(items["product_id"], found.encode(items))
    for task, of in by_event.items():
        np.testing.assert_allclose(of_rows[task], of, rtol=1e-5)
    assert not rates_in(folder)[0].equals(before)


def test_more_items_than_are_counted_apart_are_said_to_share_their_counts(tmp_path):
    world = ready_world("shop", num_users=10, num_items=2_000_000)
    encoder, tasks = FeatureEncoder(world.schema()), [Task.binary("click")]
    train = StreamRows(WorldWindows(world, 100, 50), encoder.encode, seed=0)
    said = []
    totals = totals_of(tmp_path, Splits(train, {}, {}), encoder, tasks, Start(), resume=False, say=said.append)
    assert said == ["popularity: 2,000,000 items are counted in 1,048,576 groups, those of a group together"]
    assert sum(tensor.nbytes for tensor in totals.tensors().values()) < 17e6
    no_item = world.schema().model_copy(update={"item": None})
    nothing = totals_of(
        tmp_path, Splits(train, {}, {}), FeatureEncoder(no_item), tasks, Start(), resume=False, say=said.append
    )
    assert nothing is None


def test_a_generated_world_is_held_against_popularity_wherever_it_is_judged(tmp_path, mtcl):
    text = world_run("shop", rows=4000, val_rows=800, test_rows=800, num_users=60, num_items=40)
    run = parse_run(text)
    run.training.epochs, run.training.batch_size, run.data.window = 1, 256, 1000
    folder = tmp_path / "run"
    train_run(run, folder, device="cpu", console=Console(quiet=True))
    table = read_predictions(folder / "predictions/test.parquet")
    world, config = world_of(run.data.synthetic), load_run(folder / "run.yaml")
    trained = world.rows(np.arange(4000))
    of_item = trained.groupby("product_id")["click"].agg(["sum", "count"])
    usual = trained["click"].mean()
    rates = (of_item["sum"] + 20 * usual) / (of_item["count"] + 20)
    test = world.rows(np.arange(4800, 5600))
    np.testing.assert_allclose(
        table.popular_for["click"], test["product_id"].map(rates).fillna(usual).to_numpy(), rtol=1e-5
    )
    stated = json.loads((folder / "metrics.json").read_text())["evaluations"]["test"]["ranking"]["popular"]
    test.to_parquet(tmp_path / "rows.parquet", index=False)
    said = mtcl("evaluate", folder, "--data", tmp_path / "rows.parquet", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["ranking"]["popular"]
    assert found == pytest.approx(stated, nan_ok=True)
    assert "on popularity (" in said
    finished = FinishedRun.load(folder)
    raw = rows_of_split(config, columns_needed(finished), "test")
    held_out = held_out_of(finished, raw, session_minutes=0)
    np.testing.assert_array_equal(held_out.rankings["popularity"], table.popular)

    # A run from before popularity was counted says so once it is wanted.
    for file in (folder / "popularity").iterdir():
        file.unlink()
    (folder / "popularity").rmdir()
    with pytest.warns(RunWarning, match="before it kept how popular items are for each event"):
        assert "popularity" not in held_out_of(FinishedRun.load(folder), raw, session_minutes=0).rankings
