"""The share of an epoch that training waited for its data: measured, kept, told where it is much."""

import dataclasses
import io
import json
import time

import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import load_data
from mtcl_torchrec.training.sharding import Ranks, ranks
from mtcl_torchrec.training.waiting import TimedBatches, share_waited

TOLD = "of the epoch went into putting batches together"


class SlowRows:
    """Rows whose every batch comes late on some ranks, and how late they all came together."""

    def __init__(self, rows, delay, of_ranks):
        self.rows, self.delay, self.of_ranks, self.slept = rows, delay, of_ranks, 0.0

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def batches(self, position, *, rank, world_size, batch_size):
        for batch in self.rows.batches(position, rank=rank, world_size=world_size, batch_size=batch_size):
            if rank in self.of_ranks:
                started = time.perf_counter()
                time.sleep(self.delay)
                self.slept += time.perf_counter() - started
            yield batch


def train_slowly(data, folder, delay, of_ranks=(0,)):
    run = parse_run(shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 2, batch_size: 150"), folder=data)
    said = io.StringIO()
    with ranks("cpu") as where:
        read = load_data(run, where, say=lambda _: None)
        slow = SlowRows(read.splits.train, delay, of_ranks)
        read = dataclasses.replace(read, splits=dataclasses.replace(read.splits, train=slow))
        result = train_run(run, folder, device="cpu", console=Console(file=said, width=200), data=read)
        return result.history.waiting, result.history.seconds, slow.slept, said.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log().to_parquet(folder / "log.parquet", index=False)
    return folder


def test_slow_data_is_measured_told_and_kept(data, tmp_path):
    waiting, seconds, slept, said = train_slowly(data, tmp_path / "run", 0.05)
    # Not less than was slept, and not more than sleeping and making the batches.
    assert sum(w * s for w, s in zip(waiting, seconds, strict=True)) == pytest.approx(slept, rel=0.3)
    assert len(waiting) == 2
    assert min(waiting) > 0.1
    assert said.count(TOLD) == 2
    stored = json.loads((tmp_path / "run/metrics.json").read_text())
    assert stored["history"]["waiting"] == waiting
    assert min(waiting) <= stored["cost"]["waiting_for_data"] <= max(waiting)


def test_data_that_is_there_is_not_told_of(data, tmp_path):
    waiting, _, slept, said = train_slowly(data, tmp_path / "run", 0.0, ())
    assert slept == 0.0
    assert max(waiting) < 0.5  # a busy machine may stop us anywhere
    assert said.count(TOLD) == sum(share > 0.05 for share in waiting)


def test_all_ranks_know_the_one_that_waits_longest(data, tmp_path):
    (first, *_), (second, _, slept, _) = run_ranks(train_slowly, 2, data, tmp_path / "run", 0.05, (1,))
    assert first == second
    assert slept > 0
    assert min(first) > 0.1


def test_a_wait_that_ends_in_an_error_counts_and_the_error_passes():
    def broken():
        time.sleep(0.02)
        raise ValueError("no row")
        yield

    batches = TimedBatches(broken())
    with pytest.raises(ValueError, match="no row"):
        next(batches)
    assert batches.seconds >= 0.02


def test_a_share_is_at_most_one():
    where = Ranks(0, 1, torch.device("cpu"))
    assert share_waited(0.3, 0.2, where) == 1.0
    assert share_waited(0.0, 0.0, where) == 0.0
