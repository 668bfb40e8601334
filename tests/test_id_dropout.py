"""Ids that are left out of training rows: which ones, whoever asks, and what a model learns by it."""

import numpy as np
import pandas as pd
import pytest
import shop
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from rich.console import Console
from scipy.special import expit

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.id_dropout import drop_ids
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.data.training_rows import MemoryRows
from mtcl_torchrec.evaluation.metrics import auc
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.run import train_run

N = 400


def encoded(frame):
    """Row numbers from 1 as item and as user."""
    numbers = torch.from_numpy(frame["row"].to_numpy(np.int64, copy=True)) + 1
    return EncodedRows(
        dense=torch.empty(len(frame), 0),
        keys=("user", "item"),
        ids=torch.stack([numbers, numbers], 1),
        labels=torch.zeros(len(frame), 1),
    )


class Windows:
    """400 rows in windows of 90."""

    name = fingerprint = "windows"

    def windows(self, seed=None):
        parts = [range(a, min(a + 90, N)) for a in range(0, N, 90)]
        return [Window(part) for part in (parts if seed is None else np.random.default_rng(seed).permutation(5))]

    def read(self, window):
        return Rows(pd.DataFrame({"row": window.part}))

    def empty(self):
        return Rows(pd.DataFrame({"row": []}))


class Window:
    def __init__(self, part):
        self.part = part if isinstance(part, range) else range(part * 90, min(part * 90 + 90, N))
        self.rows = len(self.part)


def rows_of(kind, shares):
    if kind == "memory":
        return MemoryRows(encoded(pd.DataFrame({"row": range(N)})), seed=3, id_dropout=shares)
    return StreamRows(Windows(), lambda rows: encoded(rows.frame), seed=3, workers=2, id_dropout=shares)


def dropped(rows, epoch, world_size, batch_size, split=0):
    """The rows whose item is left out, over all ranks, with a stop after `split` steps."""
    gone, seen = set(), []
    position = Position(epoch)
    for limit in (split, None):
        for rank in range(world_size):
            for step, batch in enumerate(
                rows.batches(position, rank=rank, world_size=world_size, batch_size=batch_size)
            ):
                if step == limit:
                    break
                user, item = batch.sparse_features["user"].values(), batch.sparse_features["item"].values()
                assert set(item[item > 0].tolist()) <= set(user.tolist())
                gone |= set(user[item == 0].tolist())
                seen += user.tolist()
        position = position.after(split, world_size=world_size, batch_size=batch_size)
    assert sorted(seen) == list(range(1, N + 1))
    return gone


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["memory", "stream"]),
    world_size=st.integers(1, 3),
    batch_size=st.integers(5, 60),
    split=st.integers(0, 2),
)
def test_the_same_rows_lose_their_id_on_any_ranks_and_after_a_stop(kind, world_size, batch_size, split):
    rows = rows_of(kind, {"item": 0.3})
    assert dropped(rows, 1, world_size, batch_size, split) == dropped(rows, 1, 1, N)


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_every_epoch_and_feature_draws_anew_and_only_what_was_asked_for(kind):
    rows = rows_of(kind, {"item": 0.3})
    first, second = dropped(rows, 1, 1, 50), dropped(rows, 2, 1, 50)
    both = len(first & second) / N
    assert 0.22 < len(first) / N < 0.38
    assert 0.03 < both < 0.16, "independent epochs agree on 9 % of the rows"
    assert dropped(rows_of(kind, {}), 1, 1, 50) == dropped(rows_of(kind, {"item": 0.0}), 1, 1, 50) == set()


def test_the_rows_themselves_stay_and_so_do_bags():
    rows = encoded(pd.DataFrame({"row": range(N)}))
    before = rows.ids.clone()
    thinned = drop_ids(rows, {"item": 0.5, "user": 0.5}, np.arange(N), (0, 1))
    torch.testing.assert_close(rows.ids, before)
    assert (thinned.ids == 0).float().mean(0).sub(0.5).abs().max() < 0.08
    assert ((thinned.ids == 0).all(1)).float().mean() < 0.33, "users and items are drawn apart"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("{prodct_id: 0.1}", "training.id_dropout: no feature 'prodct_id' of kind id (did you mean 'product_id'?)"),
        ("{topics: 0.1}", "no feature 'topics' of kind id"),
        ("{price: 0.1}", "no feature 'price' of kind id"),
        ("{product_id: 1.0}", "training.id_dropout.product_id: Input should be less than 1"),
        ("{product_id: -0.1}", "training.id_dropout.product_id: Input should be greater than or equal to 0"),
    ],
)
def test_what_cannot_be_dropped_is_refused(told, expected):
    with pytest.raises(ConfigError) as raised:
        parse_run(shop.RUN.replace("training: {epochs", f"training: {{id_dropout: {told}, epochs"))
    assert expected in str(raised.value)


def test_the_items_of_a_sampled_softmax_keep_their_id():
    task = "{name: click, kind: binary, head: {kind: dot, dim: 8, sampled_softmax: {}}}"
    text = shop.RUN.replace("{name: click, kind: binary}", task)
    parse_run(text)
    with pytest.raises(
        ConfigError, match=r"of 'product_id' and sampled_softmax of task 'click'.* exclude each other; remove one"
    ):
        parse_run(text.replace("training: {epochs", "training: {id_dropout: {product_id: 0.1}, epochs"))


RUN = """
data: {train: train.parquet, val: val.parquet}
schema:
  user: user_id
  item: item_id
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: item_id, group: item, embedding_dim: 8}
    - {name: genre, group: item, embedding_dim: 8}
  tasks: [{name: click, kind: binary}]
model: {trunk: {kind: shared_bottom, expert_layers: [16]}, tower_layers: [8]}
optimizers: {tables: {lr: 0.2}, dense: {lr: 0.01}}
training: {epochs: 3, batch_size: 64, warmup_steps: 5, patience: 0, id_dropout: {item_id: 0.0}}
"""


def world(rows, items, seed):
    """Clicks by an item's genre and by the item itself."""
    draw = np.random.default_rng(seed)
    item = draw.integers(*items, rows)
    own = np.random.default_rng(7).normal(0, 1.5, 500)
    logit = 1.5 * np.sin(5.0 * (item % 10)) + own[item]
    return pd.DataFrame(
        {
            "user_id": draw.integers(1, 30, rows), "item_id": item, "genre": item % 10,
            "click": (draw.random(rows) < expit(logit)).astype(int),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("items")
    world(6000, (1, 250), 0).to_parquet(place / "train.parquet", index=False)
    world(1500, (1, 250), 1).to_parquet(place / "val.parquet", index=False)
    return place


def quality(folder, share, name, batch_size=64):
    """(AUC on items of training, AUC on others) with a share of the ids left out."""
    text = RUN.replace("item_id: 0.0", f"item_id: {share}").replace("batch_size: 64", f"batch_size: {batch_size}")
    train_run(parse_run(text, folder=folder), folder / name, device="cpu", console=Console(quiet=True))
    finished = FinishedRun.load(folder / name)
    found = []
    for items in ((1, 250), (250, 500)):
        rows = world(4000, items, 2)
        found.append(auc(rows["click"].to_numpy(), predict(finished.model, finished.encode(rows))["click"]))
    return found


@pytest.fixture(scope="module")
def with_dropout(folder):
    return quality(folder, 0.3, "some_ids")


def test_a_model_that_missed_ids_knows_new_items_by_the_rest(folder, with_dropout):
    known, new = quality(folder, 0.0, "all_ids")
    known_after, new_after = with_dropout
    assert new_after > new + 0.02
    assert known_after > known - 0.02


def on_ranks(folder):
    return quality(folder, 0.3, "ranks", batch_size=32)


def test_two_ranks_leave_out_the_same_ids(folder, with_dropout):
    here, there = run_ranks(on_ranks, 2, folder)
    assert here == pytest.approx(there)
    assert here == pytest.approx(with_dropout, abs=2e-3)
