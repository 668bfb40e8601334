"""Batches: every row once on any number of ranks, and the same jagged tensors as a loop over rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec.data.batch import EncodedRows, MTBatch, global_batches, iterate
from mtcl_torchrec.data.jagged import Bag


def steps(n, batch_size, world_size, seed=None):
    """Row numbers as lists, by rank and step."""
    return [
        [b.tolist() for b in global_batches(n, batch_size, rank=r, world_size=world_size, seed=seed)]
        for r in range(world_size)
    ]


def bag_of(lists):
    lengths = [len(x) for x in lists]
    values = torch.tensor([v for x in lists for v in x], dtype=torch.int64)
    return Bag(values, torch.tensor(np.r_[0, np.cumsum(lengths)].astype(np.int64)))


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 70),
    batch_size=st.integers(1, 9),
    world_size=st.sampled_from([1, 2, 3, 4]),
    seed=st.one_of(st.none(), st.tuples(st.integers(0, 9), st.integers(0, 9))),
)
def test_every_row_is_seen_once_in_the_same_steps_on_any_number_of_ranks(n, batch_size, world_size, seed):
    ranks = steps(n, batch_size, world_size, seed)
    assert len({len(r) for r in ranks}) == 1
    assert sorted(row for r in ranks for b in r for row in b) == list(range(n))
    (alone,) = steps(n, batch_size * world_size, 1, seed)
    together = [sorted(row for b in parts for row in b) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(b) for b in alone]
    for parts in zip(*ranks, strict=True):
        sizes = [len(b) for b in parts]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def test_order_is_kept_without_a_seed_and_shuffled_with_one():
    assert steps(7, 3, 1) == [[[0, 1, 2], [3, 4, 5], [6]]]
    one, same, other = (steps(50, 8, 2, seed) for seed in [(1, 0), (1, 0), (1, 1)])
    assert one == same
    assert one != other
    assert one != steps(50, 8, 2)
    # Seed and epoch are no sum: (0, 1) and (1, 0) are different passes.
    assert steps(50, 8, 1, (0, 1)) != steps(50, 8, 1, (1, 0))


def test_large_seeds_are_accepted():
    assert sorted(steps(9, 9, 1, (2**63, 2**40))[0][0]) == list(range(9))


@settings(max_examples=100, deadline=None)
@given(
    lists=st.lists(st.lists(st.integers(0, 99), max_size=4), min_size=1, max_size=9),
    data=st.data(),
)
def test_bag_take_equals_a_loop(lists, data):
    index = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=12))
    values, lengths = bag_of(lists).take(torch.tensor(index, dtype=torch.int64))
    assert values.tolist() == [v for i in index for v in lists[i]]
    assert lengths.tolist() == [len(lists[i]) for i in index]


def rows_of(n, bags, weights=False, seed=0):
    """Rows of keys i, b, j, c: two ids with two bags between and after them."""
    draw = np.random.default_rng(seed)
    keys = ("i", "b", "j", "c") if bags else ("i", "j")
    lists = {k: [draw.integers(0, 9, draw.integers(0, 4)).tolist() for _ in range(n)] for k in "bc"}
    rows = EncodedRows(
        dense=torch.from_numpy(draw.normal(size=(n, 3)).astype(np.float32)),
        keys=keys,
        ids=torch.from_numpy(draw.integers(0, 9, (n, 2))),
        bags={k: bag_of(v) for k, v in lists.items()} if bags else {},
        labels=torch.from_numpy(draw.integers(0, 2, (n, 2)).astype(np.float32)),
        weights=torch.from_numpy(draw.random((n, 2)).astype(np.float32)) if weights else None,
    )
    return rows, lists


@pytest.mark.parametrize("bags", [False, True])
@pytest.mark.parametrize("index", [[0], [3, 1, 1, 6], []])
def test_batch_equals_a_loop_over_its_rows(bags, index):
    rows, lists = rows_of(7, bags, weights=True)
    batch = rows.batch(torch.tensor(index, dtype=torch.int64))
    column = {"i": 0, "j": 1}
    assert batch.sparse_features.keys() == list(rows.keys)
    assert batch.sparse_features.stride() == len(index)
    for key in rows.keys:
        expected = [[int(rows.ids[i, column[key]])] if key in column else lists[key][i] for i in index]
        jagged = batch.sparse_features[key]
        assert jagged.lengths().tolist() == [len(x) for x in expected]
        assert jagged.values().tolist() == [v for x in expected for v in x]
    assert torch.equal(batch.dense_features, rows.dense[index])
    assert torch.equal(batch.labels, rows.labels[index])
    assert torch.equal(batch.weights, rows.weights[index])
    assert batch.mask is None


@pytest.mark.parametrize("bags", [False, True])
def test_ids_that_lie_by_column_or_by_row_give_the_same_batches(bags):
    by_row, _ = rows_of(9, bags, weights=True)
    by_column = replace(by_row, ids=by_row.ids.T.contiguous().T)
    assert not by_column.ids.is_contiguous()
    assert by_column.row_by_row().ids.is_contiguous()
    assert by_row.row_by_row() is by_row
    index = torch.tensor([8, 0, 0, 3])
    expected = by_row.ids[[2, 3, 4, 0]].T.reshape(-1)
    for rows in (by_row, by_column, by_column.row_by_row()):
        cut = EncodedRows.cat([rows.slice(2, 5), rows.slice(0, 1)]).batch().sparse_features
        assert torch.cat([cut[key].values() for key in ("i", "j")]).tolist() == expected.tolist()
        picked, wanted = rows.batch(index).sparse_features, by_row.batch(index).sparse_features
        assert torch.equal(picked.values(), wanted.values())
        assert torch.equal(picked.lengths(), wanted.lengths())
        whole = by_row.batch(torch.arange(9)).sparse_features
        assert torch.equal(rows.batch().sparse_features.values(), whole.values())


def test_a_slice_keeps_no_memory_of_the_rows_it_was_cut_from():
    rows, _ = rows_of(9, bags=True, weights=True)
    for whole in (rows, replace(rows, ids=rows.ids.T.contiguous().T)):
        part = whole.slice(0, 9)
        for name in ("dense", "ids", "labels", "weights"):
            mine, theirs = getattr(part, name), getattr(whole, name)
            assert torch.equal(mine, theirs)
            assert mine.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_a_batch_of_empty_bags_only_has_no_values():
    rows = EncodedRows(
        dense=torch.empty(3, 0),
        keys=("b",),
        ids=torch.empty(3, 0, dtype=torch.int64),
        bags={"b": bag_of([[], [], []])},
        labels=torch.zeros(3, 1),
    )
    batch = rows.batch(torch.tensor([2, 0]))
    assert batch.sparse_features["b"].lengths().tolist() == [0, 0]
    assert batch.sparse_features.values().numel() == 0
    assert batch.weights is None


def test_iterate_gives_an_empty_rank_one_row_without_labels():
    rows, _ = rows_of(5, bags=True, weights=True)
    indices = global_batches(5, 2, rank=1, world_size=2)
    batches = list(iterate(rows, indices))
    assert [len(i) for i in indices] == [2, 0]
    assert torch.equal(batches[0].labels, rows.labels[[1, 3]])
    assert batches[1].labels.shape == (1, 2)
    assert batches[1].labels.isnan().all()
    assert len(batches[1].dense_features) == batches[1].sparse_features.stride() == 1
    assert not rows.labels.isnan().any()


def a_batch(full):
    return MTBatch(
        dense_features=torch.ones(2, 1),
        sparse_features=KeyedJaggedTensor(keys=["a"], values=torch.tensor([4, 5, 6]), lengths=torch.tensor([1, 2])),
        labels=torch.tensor([[0.0], [1.0]]),
        weights=torch.tensor([[2.0], [3.0]]) if full else None,
        mask=torch.tensor([[True], [False]]) if full else None,
    )


def assert_same(got, expected):
    for name in ("dense_features", "labels", "weights", "mask"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if b is not None:
            assert torch.equal(a.cpu(), b)
            assert a.dtype == b.dtype
    assert got.sparse_features["a"].values().tolist() == expected.sparse_features["a"].values().tolist()
    assert got.sparse_features["a"].lengths().tolist() == [1, 2]


@pytest.mark.parametrize("full", [False, True])
def test_to_keeps_every_field_and_none(full):
    batch = a_batch(full)
    assert_same(batch.to(torch.device("cpu"), non_blocking=True, data_copy_stream=None), batch)
    on_meta = batch.to(torch.device("meta"))
    assert on_meta.labels.device.type == on_meta.sparse_features.values().device.type == "meta"
    assert (on_meta.weights is None) == (not full)
    assert not full or on_meta.mask.device.type == on_meta.weights.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
@pytest.mark.parametrize("full", [False, True])
def test_pinning_and_moving_to_a_gpu_keep_every_field(full):
    batch = a_batch(full)
    pinned = batch.pin_memory()
    assert pinned.labels.is_pinned()
    assert_same(pinned, batch)
    moved = pinned.to(torch.device("cuda"), non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert moved.labels.is_cuda
    assert_same(moved, batch)


def test_batches_of_one_kind_are_laid_out_alike():
    """With and without columns, cut out of one part or joined from two: a compiled graph is made for one layout."""
    for columns in (0, 3):
        dense = torch.from_numpy(np.zeros((8, columns), np.float32))
        rows = EncodedRows(dense, ("user",), torch.zeros(8, 1, dtype=torch.int64), torch.zeros(8, 1))
        halves = [rows.slice(0, 4), rows.slice(4, 8)]
        layouts = {of.batch().dense_features.stride() for of in (*halves, EncodedRows.cat(halves))}
        assert layouts == {(max(columns, 1), 1)}
