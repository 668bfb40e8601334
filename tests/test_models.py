"""MTCL and MTCLTrain: the contract a TorchRec user relies on, and the loss written out by hand."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.modules.crossnet import LowRankCrossNet

from mtcl_torchrec import MTCL, PLE, MMoE, MTBatch, MTCLTrain, SharedBottom, SingleTask, Task, WeightedMean

TASKS = [
    Task.binary("click"),
    Task.multiclass("category", num_classes=4),
    Task.regression("watch_time", mean=5.0, std=2.0),
]
WEIGHTS = {"click": 0.5, "category": 0.3, "watch_time": 0.2}


def tables(device="cpu"):
    configs = [
        EmbeddingBagConfig(name="people", num_embeddings=50, embedding_dim=4, feature_names=["user"]),
        EmbeddingBagConfig(name="things", num_embeddings=60, embedding_dim=6, feature_names=["item", "history"],
                           pooling=PoolingType.MEAN),
        EmbeddingBagConfig(name="category", num_embeddings=4, embedding_dim=2, feature_names=["category"]),
    ]  # fmt: skip
    return EmbeddingBagCollection(tables=configs, device=torch.device(device))


GROUPS = {"user": ["user"], "item": ["item"], "history": ["user"], "category": ["item"]}


def features(rows=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.ones(4, rows, dtype=torch.int64)
    lengths[2] = torch.randint(0, 4, (rows,), generator=g)
    sizes = [50, 60, 60, 4]
    values = [torch.randint(0, s, (int(n.sum()),), generator=g) for s, n in zip(sizes, lengths, strict=True)]
    keys = ["user", "item", "history", "category"]
    kjt = KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=lengths.reshape(-1))
    return torch.randn(rows, 3, generator=g), kjt


def labels(rows=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            torch.randint(0, 2, (rows,), generator=g).float(),
            torch.randint(0, 4, (rows,), generator=g).float(),
            5 + 2 * torch.randn(rows, generator=g),
        ],
        1,
    )


def model(trunk=None, tasks=TASKS, **options):
    torch.manual_seed(0)
    options.setdefault("fused_score", WeightedMean(WEIGHTS))
    return MTCL(tables(), 3, trunk or MMoE(num_experts=3, expert_layers=[8, 5]), tasks, **options)


def test_output_holds_every_prediction_and_the_score():
    m = model().eval()
    dense, sparse = features()
    out = m(dense, sparse)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "click": (6,), "category": (6, 4), "watch_time": (6,), "score": (6,),
    }  # fmt: skip
    torch.testing.assert_close(out["category"].sum(1), torch.ones(6))
    own = out["category"][torch.arange(6), sparse["category"].values()]
    part = torch.sigmoid((out["watch_time"] - 5) / 2)
    torch.testing.assert_close(out["score"], 0.5 * out["click"] + 0.3 * own + 0.2 * part)


def test_the_items_class_may_come_from_a_feature_of_another_name():
    tasks = [Task.multiclass("next", num_classes=4, item_class="category")]
    m = model(tasks=tasks, fused_score=WeightedMean({"next": 1.0})).eval()
    dense, sparse = features()
    out = m(dense, sparse)
    torch.testing.assert_close(out["score"], out["next"][torch.arange(6), sparse["category"].values()])


def test_without_the_items_class_the_most_probable_one_enters_and_a_warning_says_so():
    tasks = [Task.multiclass("mood", num_classes=4)]
    with pytest.warns(UserWarning, match="most probable class"):
        m = model(tasks=tasks, fused_score=WeightedMean({"mood": 1.0})).eval()
    out = m(*features())
    torch.testing.assert_close(out["score"], out["mood"].max(1).values)


def test_no_fused_score_no_score():
    assert set(model(fused_score=None)(*features())) == {"click", "category", "watch_time"}


def test_the_contract_example_builds_on_the_meta_device():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = MTCL(
            embedding_bag_collection=tables("meta"),
            dense_in_features=13,
            trunk=MMoE(num_experts=8, expert_layers=[256, 128]),
            tasks=[Task.binary("click"), Task.multiclass("category", num_classes=18), Task.regression("watch_time")],
            fused_score=WeightedMean({"click": 0.5, "category": 0.3, "watch_time": 0.2}),
        )
    assert not any(p.is_meta for p in m.tower.parameters())
    assert all(p.is_meta for p in m.embedding_bag_collection.parameters())


def reference_loss(logits, y, weights=None):
    """Σ wᵢ Lᵢ by hand, each over its present labels."""
    total = 0.0
    for i, task in enumerate(TASKS):
        there = ~torch.isnan(y[:, i])
        if not there.any():
            continue
        z, t = logits[task.name][there], y[there, i]
        v = torch.ones(len(t)) if weights is None else weights[there, i]
        if task.kind == "binary":
            rows = F.binary_cross_entropy_with_logits(z, t, reduction="none")
        elif task.kind == "multiclass":
            rows = F.cross_entropy(z, t.long(), reduction="none")
        else:
            rows = (z - (t - 5) / 2) ** 2
        total = total + (v * rows).sum() / v.sum()
    return total


def test_the_loss_averages_each_task_over_its_present_labels():
    m = MTCLTrain(model())
    dense, sparse = features()
    y = labels()
    y[:4, 0] = float("nan")
    y[1, 2] = float("nan")
    loss, (detached, logits, returned) = m(Batch(dense, sparse, y))
    torch.testing.assert_close(loss, reference_loss(logits, y))
    assert loss.requires_grad
    assert not detached.requires_grad
    assert not any(z.requires_grad for z in logits.values())
    assert torch.equal(returned.nan_to_num(), y.nan_to_num())


def test_sample_weights_weigh_rows_and_a_mask_takes_labels_out():
    m = MTCLTrain(model())
    dense, sparse = features()
    y, v = labels(), torch.rand(6, 3) + 0.1
    mask = torch.rand(6, 3, generator=torch.Generator().manual_seed(3)) < 0.6
    loss, (_, logits, _) = m(MTBatch(dense, sparse, y, weights=v, mask=mask))
    torch.testing.assert_close(loss, reference_loss(logits, torch.where(mask, y, float("nan")), v))


def test_a_task_without_any_label_counts_nothing_and_leaves_no_nan():
    m = MTCLTrain(model())
    dense, sparse = features()
    y = labels()
    y[:, 0] = float("nan")
    loss, (_, logits, _) = m(Batch(dense, sparse, y))
    torch.testing.assert_close(loss, reference_loss(logits, y))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)
    assert m.model.tower.heads[0].weight.grad.abs().sum() == 0


def test_task_weights_multiply_the_losses():
    heavy = [t.model_copy(update={"weight": w}) for t, w in zip(TASKS, (2.0, 0.0, 7.0), strict=True)]
    plain, weighted = MTCLTrain(model()), MTCLTrain(model(tasks=heavy))
    batch = Batch(*features(), labels())
    plain(batch)
    loss, _ = weighted(batch)
    click, _, watch_time = plain.loss.last_task_losses
    torch.testing.assert_close(loss.detach(), 2 * click + 7 * watch_time)


def test_the_penalty_is_the_mean_squared_norm_of_the_pooled_embeddings():
    batch = Batch(*features(), labels())
    without, _ = MTCLTrain(model())(batch)
    train = MTCLTrain(model(), regularisers={"l2_embedding": 0.3})
    pooled = train.model.embedding_bag_collection(batch.sparse_features).values()
    torch.testing.assert_close(train(batch)[0], without + 0.3 * pooled.square().sum(1).mean())


def test_labels_with_the_wrong_number_of_columns_are_refused_with_the_tasks_named():
    with pytest.raises(ValueError, match=r"labels have 2 columns, the model has 3 tasks: \['click'"):
        MTCLTrain(model())(Batch(*features(), labels()[:, :2]))


def test_dense_features_of_the_wrong_width_are_refused():
    dense, sparse = features()
    with pytest.raises(ValueError, match="2 columns, the model was built with dense_in_features=3"):
        model()(dense[:, :2], sparse)


def restricted(trunk, **options):
    tasks = [Task.binary("click"), Task.multiclass("category", num_classes=4, inputs=("user", "context"))]
    return model(
        trunk, tasks, fused_score=WeightedMean({"click": 1.0, "category": 1.0}), feature_groups=GROUPS,
        dense_groups=[["user"], ["item"], ["user", "item"]], **options,
    ).eval()  # fmt: skip


ALL_TRUNKS = {
    "shared_bottom": lambda: SharedBottom([8]),
    "single_task": lambda: SingleTask([8]),
    "mmoe": lambda: MMoE(3, [8]),
    "ple": lambda: PLE(1, 1, [8]),
}


@pytest.mark.parametrize("trunk", ALL_TRUNKS)
def test_a_restricted_task_does_not_move_with_the_item(trunk):
    m = restricted(ALL_TRUNKS[trunk](), interaction=lambda width: LowRankCrossNet(width, 2, 4))
    dense, sparse = features()
    other_dense = dense.clone()
    other_dense[:, 1:] += 5.0
    jagged = sparse.to_dict()
    other = KeyedJaggedTensor(
        keys=["user", "item", "history", "category"],
        values=torch.cat(
            [jagged["user"].values(), (jagged["item"].values() + 7) % 60, jagged["history"].values(),
             (jagged["category"].values() + 1) % 4]
        ),
        lengths=sparse.lengths(),
    )  # fmt: skip
    before, after = m(dense, sparse), m(other_dense, other)
    torch.testing.assert_close(before["category"], after["category"], rtol=0, atol=0)
    assert (before["click"] - after["click"]).abs().min() > 0
    # What it may see, it does see.
    moved = dense.clone()
    moved[:, 0] += 5.0
    assert (m(moved, sparse)["category"] - before["category"]).abs().max() > 0


def test_a_restricted_task_needs_the_groups():
    tasks = [Task.binary("click", inputs=("user",))]
    with pytest.raises(ValueError, match="feature_groups must name the group of 'user'"):
        model(tasks=tasks, fused_score=None)
    with pytest.raises(ValueError, match="dense_groups must name the groups of each of the 3"):
        model(tasks=tasks, fused_score=None, feature_groups=GROUPS)


def test_names_that_do_not_fit_are_refused_with_the_nearest_right_one():
    with pytest.raises(ValueError, match="task 'clik', which the model lacks \\(did you mean 'click'"):
        model(fused_score=WeightedMean({"clik": 1.0}))
    with pytest.raises(ValueError, match="task 'a' is declared twice"):
        model(tasks=[Task.binary("a"), Task.binary("a")], fused_score=None)
    with pytest.raises(ValueError, match="item_class 'categry' is no sparse feature \\(did you mean 'category'"):
        model(tasks=[Task.multiclass("c", 4, item_class="categry")], fused_score=None)
    with pytest.raises(ValueError, match="at least one task"):
        model(tasks=[], fused_score=None)


def test_the_order_of_keys_in_the_keyed_tensor_does_not_matter():
    """A sharding plan may reorder them."""
    from torchrec.sparse.jagged_tensor import KeyedTensor

    m = model().eval()
    dense, sparse = features()
    pooled = m.embedding_bag_collection(sparse)
    keys = list(reversed(pooled.keys()))
    shuffled = KeyedTensor.from_tensor_list(keys, [pooled[k] for k in keys])
    for name, logits in m.tower(dense, pooled).items():
        torch.testing.assert_close(m.tower(dense, shuffled)[name], logits)


def test_a_persons_own_trunk_and_fused_score_fit():
    class Doubling(torch.nn.Module):
        out_features = 22 - 1

        def forward(self, x, tasks):
            return torch.stack([2 * x for _ in tasks], 1)

    class Product(torch.nn.Module):
        tasks = ("click", "watch_time")

        def forward(self, parts):
            return parts["click"] * parts["watch_time"]

    m = model(Doubling(), fused_score=Product(), tower_layers=())
    out = m(*features())
    torch.testing.assert_close(out["score"], out["click"] * torch.sigmoid((out["watch_time"] - 5) / 2))


def test_no_dense_features():
    torch.manual_seed(0)
    m = MTCL(tables(), 0, SharedBottom([8]), [Task.binary("click")])
    _, sparse = features()
    assert m(torch.empty(6, 0), sparse)["click"].shape == (6,)


def test_dense_features_alone():
    """The same as tables whose embeddings are all zero, and trained."""
    torch.manual_seed(0)
    alone = MTCL(None, 3, SharedBottom([8]), [Task.binary("click")], embedding_dropout=0.2)
    ebc = tables()
    for table in ebc.parameters():
        torch.nn.init.zeros_(table)
    beside = MTCL(ebc, 3, SharedBottom([8]), [Task.binary("click")])
    own = alone.state_dict()  # of the same names; its first layer reads the last three columns alone
    alone.load_state_dict({name: value[..., -3:] if value.shape != own[name].shape else value
                           for name, value in beside.state_dict().items() if name in own})  # fmt: skip
    dense, sparse = features()
    none = KeyedJaggedTensor([], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int64))
    torch.testing.assert_close(alone(dense, none)["click"], beside(dense, sparse)["click"])
    train = MTCLTrain(alone, regularisers={"l2_embedding": 0.1})
    loss, _ = train(Batch(dense, none, labels(6)[:, :1]))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in train.parameters())
    with pytest.raises(ValueError, match="the model has no input: neither embeddings nor dense features"):
        MTCL(None, 0, SharedBottom([8]), [Task.binary("click")])


@pytest.mark.parametrize("trunk", ALL_TRUNKS)
def test_training_steps_lower_the_loss(trunk):
    train = MTCLTrain(model(ALL_TRUNKS[trunk]()))
    batch = Batch(*features(64), labels(64))
    optimizer = torch.optim.Adam(train.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = train(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_method_given_by_name_is_refused_with_what_it_should_be():
    with pytest.raises(TypeError, match=r"loss_weighting is a LossWeighting, such as FAMO\(.*, not 'famo'"):
        MTCLTrain(model(), loss_weighting="famo")
    with pytest.raises(TypeError, match=r"gradient_surgery is a GradientSurgery, such as .*, not 'upgrad'"):
        MTCLTrain(model(), gradient_surgery="upgrad")
