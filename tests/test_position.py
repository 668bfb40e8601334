"""Positions: whatever interrupts an epoch, however often, each row is seen exactly once and no rank waits."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.position import Position, count, cut, pieces_left, rows_taken, skip
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.data.training_rows import MemoryRows
from mtcl_torchrec.schema import DataError


@dataclass(frozen=True)
class SomeRows:
    start: int
    rows: int


class Numbered:
    """A source whose one column numbers the rows."""

    fingerprint = "numbered"

    def __init__(self, sizes):
        starts = np.cumsum([0, *sizes])
        self.parts = [SomeRows(int(start), size) for start, size in zip(starts[:-1], sizes, strict=True)]

    def windows(self, seed=None):
        if seed is None:
            return self.parts
        order = np.random.default_rng(seed).permutation(len(self.parts))
        return [self.parts[i] for i in order]

    def read(self, window):
        return Rows(pd.DataFrame({"row": range(window.start, window.start + window.rows)}))

    def empty(self):
        return Rows(pd.DataFrame({"row": []}))


def encode(rows):
    numbers = torch.from_numpy(rows.frame["row"].to_numpy(dtype=np.int64, copy=True))
    return EncodedRows(
        dense=torch.empty(len(rows), 0), keys=("row",), ids=numbers[:, None], labels=torch.zeros(len(rows), 1)
    )


def stream(sizes, seed=0, workers=1):
    return StreamRows(Numbered(sizes), encode, seed=seed, workers=workers)


def memory(sizes, seed=0):
    return MemoryRows(encode(Rows(pd.DataFrame({"row": range(sum(sizes))}))), seed=seed)


def taken_by(rows, position, rank, world_size, batch_size, limit=None):
    """Row numbers of each batch of a rank, which closes its iterator early where there is a limit."""
    batches = rows.batches(position, rank=rank, world_size=world_size, batch_size=batch_size)
    seen = [batch.sparse_features.values().tolist() for batch in islice(batches, limit)]
    batches.close()
    return seen


SIZES = st.lists(st.integers(1, 25), min_size=1, max_size=6)
STRETCHES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(0, 6)), max_size=4)


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from([stream, memory]),
    sizes=SIZES,
    stretches=STRETCHES,
    last=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    seed=st.integers(0, 3),
)
def test_every_row_is_seen_once_whatever_interrupts_the_epoch_and_whoever_goes_on(kind, sizes, stretches, last, seed):
    rows, position, seen = kind(sizes, seed), Position(epoch=2), Counter()
    for world_size, batch_size, limit in [*stretches, (*last, None)]:
        steps = rows.steps(position, world_size=world_size, batch_size=batch_size)
        left = rows.rows_left(position)
        assert left == sum(sizes) - seen.total()
        ranks = [taken_by(rows, position, rank, world_size, batch_size, limit) for rank in range(world_size)]
        # In lockstep: as many batches on each rank, full ones but for the last.
        expected = steps if limit is None else min(limit, steps)
        assert [len(batches) for batches in ranks] == [expected] * world_size
        for together in zip(*ranks, strict=True):
            assert sum(map(len, together)) == min(left, batch_size * world_size)
            assert max(map(len, together)) - min(map(len, together)) <= 1
            left -= sum(map(len, together))
        seen.update(row for batches in ranks for batch in batches for row in batch)
        position = position.after(expected, world_size=world_size, batch_size=batch_size)
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
    assert seen == Counter(range(sum(sizes)))
    assert rows.rows_left(position) == 0
    assert rows.steps(position, world_size=3, batch_size=2) == 0
    assert rows.rows_left(position.next_epoch()) == rows.rows_per_epoch == sum(sizes)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([stream, memory]),
    sizes=SIZES,
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 7),
    at=st.lists(st.integers(0, 6), min_size=1, max_size=3),
)
def test_as_many_ranks_go_on_with_the_very_batches_of_an_uninterrupted_epoch(kind, sizes, world_size, batch_size, at):
    rows, ranks = kind(sizes), range(world_size)
    whole = [taken_by(rows, Position(), rank, world_size, batch_size) for rank in ranks]
    position, pieces = Position(), [[] for _ in ranks]
    for limit in [*at, None]:
        parts = [taken_by(rows, position, rank, world_size, batch_size, limit) for rank in ranks]
        pieces = [before + part for before, part in zip(pieces, parts, strict=True)]
        position = position.after(len(parts[0]), world_size=world_size, batch_size=batch_size)
    assert pieces == whole
    assert len(position.taken) <= 1


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), stretches=STRETCHES, product=st.sampled_from([4, 6, 12]))
def test_in_memory_the_global_batches_are_the_same_for_any_number_of_ranks(n, stretches, product):
    rows, position = memory([n]), Position(taken=tuple(s for s in stretches if s[2]))
    together = []
    for world_size in (1, 2):
        ranks = [taken_by(rows, position, rank, world_size, product // world_size) for rank in range(world_size)]
        together.append([sorted(row for b in parts for row in b) for parts in zip(*ranks, strict=True)])
    assert together[0] == together[1]


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, stretches=STRETCHES, shares=st.integers(1, 5))
def test_shares_are_consecutive_and_differ_by_one_row(sizes, stretches, shares):
    pieces = pieces_left([(i, 0, n) for i, n in enumerate(sizes)], stretches)
    parts = cut(pieces, shares)
    numbered = [(window, row) for window, start, stop in pieces for row in range(start, stop)]
    assert [(w, row) for part in parts for w, start, stop in part for row in range(start, stop)] == numbered
    counts = [count(part) for part in parts]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
    assert count(skip(pieces, 3)) == max(0, len(numbered) - 3)


def test_the_shuffle_follows_from_seed_and_epoch():
    for kind, sizes in [(stream, [9, 9, 9]), (stream, [27]), (memory, [27])]:
        first, again, other, later = (
            list(chain(*taken_by(kind(sizes, seed), Position(epoch), 0, 1, 5)))
            for seed, epoch in [(1, 1), (1, 1), (2, 1), (1, 2)]
        )
        assert first == again
        assert first != other
        assert first != later
        assert sorted(first) == list(range(27)) != first


def test_windows_and_the_rows_in_them_are_shuffled():
    seen = list(chain(*taken_by(stream([20, 20, 20]), Position(), 0, 1, 7)))
    windows = [row // 20 for row in seen]
    assert windows == sorted(windows, key=windows.index)  # window by window
    for start in (0, 20, 40):
        assert seen[start : start + 20] != sorted(seen[start : start + 20])
    orders = set()
    for epoch in range(1, 9):
        later = chain(*taken_by(stream([20, 20, 20]), Position(epoch), 0, 1, 7))
        orders.add(tuple(dict.fromkeys(row // 20 for row in later)))
    assert len(orders) > 2


def test_rows_taken_counts_whole_global_batches_up_to_the_end():
    assert rows_taken(100, []) == 0
    assert rows_taken(100, [(2, 10, 3), (1, 7, 2)]) == 74
    assert rows_taken(70, [(2, 10, 3), (1, 7, 2)]) == 70


def test_positions_merge_stretches_of_as_many_ranks_and_batches_of_one_size():
    position = Position().after(3, world_size=2, batch_size=8).after(4, world_size=2, batch_size=8)
    assert position == Position(1, ((2, 8, 7),))
    position = position.after(0, world_size=4, batch_size=8).after(1, world_size=4, batch_size=8)
    assert position.taken == ((2, 8, 7), (4, 8, 1))
    assert position.after(1, world_size=2, batch_size=8).taken == ((2, 8, 7), (4, 8, 1), (2, 8, 1))
    assert position.next_epoch() == Position(2)


@pytest.mark.parametrize(
    "content",
    [None, 3, [], {}, {"epoch": 1}, {"epoch": 0, "taken": []}, {"epoch": 1, "taken": [[1, 2]]},
     {"epoch": 1, "taken": [[1, 2, -3]]}, {"epoch": 1.5, "taken": []}, {"epoch": 1, "taken": [3]},
     {"epoch": 1, "taken": [], "more": 1}, {"epoch": True, "taken": []}],
)  # fmt: skip
def test_what_is_no_position_is_refused(content):
    with pytest.raises(DataError, match="no position in the training data"):
        Position.from_json(content)


def test_what_a_position_belongs_to_is_told_apart():
    assert memory([5]).fingerprint == memory([2, 3]).fingerprint
    assert len({memory([5], 0).fingerprint, memory([6], 0).fingerprint, memory([5], 1).fingerprint}) == 3
    assert stream([5], 0).fingerprint != stream([5], 1).fingerprint
