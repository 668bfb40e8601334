"""Frozen vectors as inputs of a model: what comes out, what is bounded, who is trained, what surgery sees."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec import MTCL, MMoE, MTCLTrain, SharedBottom, Task, WeightedMean
from mtcl_torchrec.modules.balance.surgery import GradientSurgery
from mtcl_torchrec.modules.lookups import Lookups
from mtcl_torchrec.modules.vectors import FrozenVectors
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.network import ServingNetwork

ROWS = 12
TASKS = [Task.binary("click"), Task.binary("like")]


def kjt(**ids):
    values = [v for of in ids.values() for v in of]
    return KeyedJaggedTensor(list(ids), values=torch.tensor(values), lengths=torch.ones(len(values), dtype=torch.int64))


def matrix(items=5, width=6, seed=0):
    vectors = torch.randn(items + 1, width, generator=torch.Generator().manual_seed(seed))
    vectors[0] = 0
    return vectors


def model_of(trainable=0.0, trunk=None, **options):
    torch.manual_seed(0)
    names = [("user", 9), ("item", 9), *([("text", 6)] if trainable else [])]
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=rows, embedding_dim=4, feature_names=[name])
        for name, rows in names
    ]
    text = FrozenVectors("text", matrix(), 4, trainable=trainable)
    model = MTCL(EmbeddingBagCollection(tables=tables), 0, trunk or SharedBottom([8]), TASKS,
                 WeightedMean({"click": 1, "like": 1}), lookups=[text], **options)  # fmt: skip
    with torch.no_grad():
        text.missing.uniform_(-1, 1)
    return model


def batch_of(seed=0):
    draw = np.random.default_rng(seed)
    user, item, text = (draw.integers(0, n, ROWS).tolist() for n in (9, 9, 6))
    labels = torch.from_numpy(draw.integers(0, 2, (ROWS, 2))).float()
    return Batch(torch.empty(ROWS, 0), kjt(user=user, item=item, text=text), labels)


# ---------------------------------------------------------------------- by itself


@pytest.mark.parametrize("data_type", [torch.float32, torch.float16])
def test_what_comes_out_is_the_projection_or_the_learnt_vector(data_type):
    vectors = matrix().to(data_type)
    text = FrozenVectors("text", vectors, 4)
    nn.init.normal_(text.missing)
    ids = KeyedJaggedTensor(["text"], values=torch.tensor([3, 0, 6, -1, 5]), lengths=torch.tensor([1, 1, 1, 1, 0, 1]))
    out = text(ids)["text"]
    expected = torch.stack([text.projection(vectors[i].float()) if i else text.missing for i in (3, 0, 0, 0, 0, 5)])
    torch.testing.assert_close(out, expected)
    assert out.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 3), st.floats(0, 1e12), st.integers(0, 9))
def test_the_trained_part_stays_below_its_bound(bound, size, seed):
    text = FrozenVectors("text", matrix(), 8, trainable=bound)
    own = size * torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([1, 2, 3, 0])
    added = text.of_rows(rows, own) - text.of_rows(rows, torch.zeros(4, 8))
    assert (added.square().mean(1).sqrt() <= bound * 1.001 + 1e-6).all()
    assert (added[3] == 0).all()  # an item without a vector has no part of its own either
    small = 1e-4 * torch.randn(4, 8)
    torch.testing.assert_close(
        (text.of_rows(rows, small) - text.of_rows(rows, torch.zeros(4, 8)))[:3], bound * small[:3], atol=1e-6, rtol=1e-3
    )


def test_bf16_projects_nearly_the_same_and_returns_float32():
    text = FrozenVectors("text", matrix(width=64), 8)
    ids = kjt(text=[1, 2, 0])
    expected = text(ids)["text"]
    text.precision = "bf16"
    out = text(ids)["text"]
    assert out.dtype == torch.float32
    assert 0 < (out - expected).abs().max() < 0.03


def test_the_matrix_is_frozen_shared_and_in_no_checkpoint():
    vectors = matrix()
    text = FrozenVectors("text", vectors, 4)
    text(kjt(text=[1, 2, 0]))["text"].sum().backward()
    assert text.vectors.data_ptr() == vectors.data_ptr()
    assert not text.vectors.requires_grad
    assert set(text.state_dict()) == {"missing", "projection.weight", "projection.bias"}
    assert all(p.grad is not None for p in text.parameters())


@pytest.mark.parametrize(
    ("vectors", "trainable"), [(torch.zeros(1, 3), 0.0), (torch.zeros(3, 3).long(), 0.0), (torch.zeros(3, 3), -0.1)]
)
def test_what_is_no_matrix_is_refused(vectors, trainable):
    with pytest.raises(ValueError, match="'text'"):
        FrozenVectors("text", vectors, 4, trainable=trainable)


# ---------------------------------------------------------------------- in a model


def test_lookups_are_refused_where_keys_do_not_fit():
    text = FrozenVectors("text", matrix(), 4)
    with pytest.raises(ValueError, match="makes 'text', which is there already"):
        Lookups({"text": 4}, [text])
    with pytest.raises(ValueError, match="takes 'text', which no table gives"):
        Lookups({"user": 4}, [FrozenVectors("text", matrix(), 4, trainable=0.1)])


@pytest.mark.parametrize("trainable", [0.0, 0.5])
def test_the_model_reads_vectors_beside_embeddings(trainable):
    model, batch = model_of(trainable), batch_of()
    read = model.lookups(model.embedding_bag_collection(batch.sparse_features), batch.sparse_features)
    assert list(read) == list(model.lookups.dims) == ["user", "item", "text"]
    text, rows = model.lookups[0], batch.sparse_features["text"].values()
    own = model.embedding_bag_collection.embedding_bags["t_text"].weight[rows] if trainable else None
    torch.testing.assert_close(read["text"], text.of_rows(rows, own))
    out = model(batch.dense_features, batch.sparse_features)
    changed = kjt(**{k: batch.sparse_features[k].values().tolist() for k in ("user", "item")}, text=[0] * ROWS)
    assert (model(batch.dense_features, changed)["click"] != out["click"])[rows > 0].all()


def test_items_that_were_never_trained_on_differ_by_their_vectors():
    model = model_of()
    out = model(torch.empty(3, 0), kjt(user=[1, 1, 1], item=[0, 0, 0], text=[1, 2, 2]))["click"]
    assert (out[0] - out[1]).abs() > 1e-4
    torch.testing.assert_close(out[1], out[2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("trainable", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_serving_has_projected_them_before(trainable, precision):
    model, batch = model_of(trainable).eval(), batch_of()
    network = ServingNetwork(model, precision)
    of = batch.sparse_features
    values = torch.cat([of[name].values() for name in network.features])
    lengths = torch.stack([of[name].lengths() for name in network.features])
    with torch.no_grad():
        out = network(torch.empty(ROWS, 0), values, lengths)
        expected = model(torch.empty(ROWS, 0), of)
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, atol=1e-6 if precision == "fp32" else 2e-2, rtol=0)
    assert not any(buffer.shape == (6, 6) for buffer in network.buffers())  # the wide matrix is not served


def test_penalties_look_at_what_is_trained():
    batch = batch_of()
    plain, penalised = (
        MTCLTrain(model_of(), regularisers=weights) for weights in ({}, {"l2_embedding": 0.1, "l2_dense": 0.01})
    )
    pooled = plain.model.embedding_bag_collection(batch.sparse_features)
    embeddings = sum(pooled[key].square().sum(1) for key in ("user", "item")).mean()
    weights = [p for n, p in plain.model.named_parameters() if n.endswith("weight") or ".weights." in n]
    dense = [p for p in weights if not any(p is t for t in plain.model.embedding_bag_collection.parameters())]
    norms = {id(m.weight) for m in plain.modules() if isinstance(m, nn.LayerNorm)}
    dense = sum(p.square().sum() for p in dense if id(p) not in norms)
    difference = penalised(batch)[0] - plain(batch)[0]
    torch.testing.assert_close(difference, 0.1 * embeddings + 0.01 * dense, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- gradient surgery


class Keep(nn.Module):
    """Weights that are told, and the Gramian that they would follow from."""

    def __init__(self, weights):
        super().__init__()
        self.told = torch.tensor(weights, dtype=torch.float64)

    def forward(self, gramian):
        Keep.gramian = gramian.clone()
        return self.told


def gradients(model, batch, task):
    """Of one task's loss alone: of the inputs that the tower reads, and of each parameter."""
    read = model.lookups(model.embedding_bag_collection(batch.sparse_features), batch.sparse_features)
    x = torch.cat([read[key] for key in model.lookups.dims], dim=1)
    logits = model.tower(batch.dense_features, x)[task]
    column = [t.name for t in TASKS].index(task)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels[:, column])
    return torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)


def same_up_to_scale(one, other):
    """Solvers are given a Gramian without its size."""
    torch.testing.assert_close(one / one.trace(), other / other.trace(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trainable", [0.0, 0.5])
@pytest.mark.parametrize("cut", ["embeddings", "both", "trunk"])
def test_surgery_weighs_the_projection_like_the_tables(cut, trainable):
    told, batch = [0.5, 1.5], batch_of()
    model = model_of(trainable, MMoE(2, [8]))
    by_hand = [gradients(copy.deepcopy(model), batch, task.name) for task in TASKS]
    train = MTCLTrain(model, gradient_surgery=GradientSurgery(Keep(told), cut=cut, min_weight=0.1, max_weight=10))
    train(batch)[0].backward()
    if cut == "embeddings":
        of_x = torch.stack([g[0].flatten().double() for g in by_hand])
        same_up_to_scale(Keep.gramian, of_x @ of_x.T)
    for (name, parameter), *of_tasks in zip(model.named_parameters(), *(g[1:] for g in by_hand), strict=True):
        if name.startswith(("lookups", "embedding_bag_collection")):
            expected = sum(w * g for w, g in zip(told, of_tasks, strict=True))
            if cut == "trunk":  # gates of MMoE lie above that cut
                assert parameter.grad.abs().sum() > 0
            else:
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)


def test_the_gramian_of_the_tables_has_the_projection_in_it():
    batch, model = batch_of(), model_of()
    by_hand = [gradients(copy.deepcopy(model), batch, task.name)[1:] for task in TASKS]
    shared = [n.startswith(("lookups", "embedding_bag", "tower.trunk")) for n, _ in model.named_parameters()]
    flat = torch.stack(
        [torch.cat([g.flatten() for g, of in zip(grads, shared, strict=True) if of]).double() for grads in by_hand]
    )
    MTCLTrain(model, gradient_surgery=GradientSurgery(Keep([1.0, 1.0]), cut="tables"))(batch)[0].backward()
    same_up_to_scale(Keep.gramian, flat @ flat.T)


def test_the_cut_at_the_tables_does_not_see_a_trained_part():
    with pytest.raises(ConfigError, match="'text' is made into something else"):
        MTCLTrain(model_of(0.5), gradient_surgery=GradientSurgery("upgrad", cut="tables"))
