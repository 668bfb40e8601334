"""The input matrix: its order, what is left out of it while training, and who may see which column."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedTensor

from mtcl_torchrec.modules.embeddings import PooledConcat, pooled_by_key, visible_columns

DIMS = {"a": 3, "b": 2}


def pooled(rows=5):
    return KeyedTensor.from_tensor_list(["b", "a"], [torch.full((rows, 2), 2.0), torch.full((rows, 3), 1.0)])


def test_keys_are_taken_by_name_and_dense_features_follow():
    out = PooledConcat(DIMS)(torch.full((5, 1), 9.0), pooled())
    assert out[0].tolist() == [1, 1, 1, 2, 2, 9]


def test_a_tuple_that_starts_with_a_keyed_tensor_and_a_ready_matrix_are_accepted():
    dense = torch.zeros(5, 1)
    expected = PooledConcat(DIMS)(dense, pooled())
    assert torch.equal(PooledConcat(DIMS)(dense, (pooled(), None)), expected)
    assert torch.equal(PooledConcat(DIMS)(dense, expected[:, :5]), expected)


def test_embedding_dropout_leaves_out_whole_features_row_by_row_and_keeps_the_mean():
    torch.manual_seed(0)
    module = PooledConcat(DIMS, embedding_dropout=0.3)
    out = module(torch.full((20_000, 1), 9.0), pooled(20_000))
    a, b, dense = out[:, :3], out[:, 3:5], out[:, 5]
    assert ((a == a[:, :1]).all() and (b == b[:, :1]).all()).item()
    assert a.mean().item() == pytest.approx(1.0, abs=0.02)
    assert (a[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert ((a[:, 0] == 0) & (b[:, 0] == 0)).float().mean().item() == pytest.approx(0.09, abs=0.01)
    assert (dense == 9).all()
    assert torch.equal(module.eval()(torch.zeros(5, 1), pooled()), PooledConcat(DIMS)(torch.zeros(5, 1), pooled()))


def test_dense_dropout_and_noise_act_on_dense_features_while_training_only():
    torch.manual_seed(0)
    module = PooledConcat(DIMS, dense_dropout=0.5, dense_noise=0.2)
    out = module(torch.ones(20_000, 1), pooled(20_000))
    kept = out[:, 5][out[:, 5] != 0]
    assert len(kept) / 20_000 == pytest.approx(0.5, abs=0.02)
    assert kept.mean().item() == pytest.approx(2.0, abs=0.02)
    assert (kept / 2).std().item() == pytest.approx(0.2, abs=0.01)
    assert (out[:, :3] == 1).all()
    assert (module.eval()(torch.ones(5, 1), pooled())[:, 5] == 1).all()


def test_a_column_of_two_groups_is_seen_by_who_may_see_both():
    groups = {"a": ["user"], "b": ["item"]}
    both = [["user", "item"]]
    assert visible_columns(["user"], DIMS, 1, groups, both).tolist() == [1, 1, 1, 0, 0, 0]
    assert visible_columns(["user", "item"], DIMS, 1, groups, both).tolist() == [1, 1, 1, 1, 1, 1]
    assert visible_columns(["user", "item", "context"], DIMS, 1, None, None).tolist() == [1] * 6


def test_embeddings_in_the_wanted_order_are_not_copied():
    values = torch.randn(4, 5, requires_grad=True)
    for keys in (list(DIMS), list(DIMS)[::-1]):
        held = KeyedTensor(keys, [DIMS[key] for key in keys], values)
        out = PooledConcat(DIMS)(torch.empty(4, 0), held)
        assert torch.equal(out, torch.cat([held[key] for key in DIMS], 1))
        assert (out is values) == (keys == list(DIMS))
        by_key = pooled_by_key(held, DIMS)
        assert all(torch.equal(by_key[key], held[key]) for key in DIMS)
        direction = torch.randn_like(out)
        ours, theirs = (
            torch.autograd.grad((of * direction).sum(), values)[0]
            for of in (torch.cat(list(by_key.values()), 1), torch.cat([held[key] for key in DIMS], 1))
        )
        assert torch.equal(ours, theirs)
