"""Joint training: the loss of the fused score, its gradients, and what they reach; against plain PyTorch and loops."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import (
    FAMO,
    MTCL,
    Borda,
    ConfigError,
    ContextGatedMean,
    FusedLoss,
    GradientSurgery,
    HardVoting,
    MonotoneNetwork,
    MTBatch,
    MTCLTrain,
    SharedBottom,
    Stacking,
    Task,
    TopKVoting,
    WeightedGeometricMean,
    WeightedMean,
)

NAN = float("nan")
TASKS = [Task.binary("click"), Task.binary("report", pos_weight=2.0), Task.regression("minutes", mean=3.0, std=2.0)]
VALUES = {"click": 1.0, "report": -6.0}
WEIGHTS = {"click": 1.0, "report": -2.0, "minutes": 0.5}


def batch_of(rows=12, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (2 * rows,), generator=g)
    labels = torch.randint(0, 2, (rows, 3), generator=g).float()
    labels[:, 2] = 3 + 2 * torch.randn(rows, generator=g)
    labels[torch.rand(rows, 3, generator=g) < 0.2] = NAN
    features = KeyedJaggedTensor(["user", "item"], ids, lengths=torch.ones(2 * rows, dtype=torch.int64))
    return MTBatch(torch.empty(rows, 0), features, labels, **more)


def train_module(fused_score=None, fused_loss=None, tasks=TASKS, **options):
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=f, num_embeddings=20, embedding_dim=4, feature_names=[f]) for f in ("user", "item")
    ]
    model = MTCL(EmbeddingBagCollection(tables=tables), 0, SharedBottom([8]), tasks, fused_score, tower_layers=[4])
    return MTCLTrain(model, fused_loss=fused_loss, **options)


def gradients(train, batch, only=""):
    loss, _ = train(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in train.named_parameters() if only in n}


def squashed(score):
    return 1e-6 + (1 - 2e-6) * score


def reference(train, batch, values=VALUES, zero=False):
    """The mean BCE of the score against the normalised reward, row by row."""
    column = {task.name: i for i, task in enumerate(train.model.tasks)}
    score = train.model(batch.dense_features, batch.sparse_features)["score"]
    losses = []
    for row, labels in enumerate(batch.labels):
        mine = {t: labels[column[t]].item() for t in values}
        if all(map(math.isnan, mine.values())) or (any(map(math.isnan, mine.values())) and not zero):
            continue
        of = {t: 0.0 if math.isnan(y) else y for t, y in mine.items()}
        if "minutes" in of and not math.isnan(mine["minutes"]):
            of["minutes"] = 1 / (1 + math.exp(-(mine["minutes"] - 3) / 2))
        below = sum(-v for v in values.values() if v < 0)
        reward = (sum(v * of[t] for t, v in values.items()) + below) / sum(map(abs, values.values()))
        losses.append(F.binary_cross_entropy(squashed(score[row]), torch.tensor(reward)))
    return torch.stack(losses).mean()


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("values", [VALUES, {"click": 2.0, "report": -1.0, "minutes": 4.0}])
def test_the_loss_is_the_mean_over_rows_whose_reward_is_known(values, zero):
    batch = batch_of(30)
    loss = FusedLoss(values, weight=0.7, heads="through", missing="zero" if zero else "mask")
    train, plain = train_module(WeightedMean(WEIGHTS), loss), train_module(WeightedMean(WEIGHTS))
    expected = reference(plain, batch, values, zero)
    total = plain(batch)[0] + 0.7 * expected
    total.backward()
    got, grads = gradients(train, batch)
    torch.testing.assert_close(train.loss.last_fused_loss, expected.detach())
    torch.testing.assert_close(got, total.detach())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_batchs_own_reward_and_no_reward_at_all():
    reward = torch.tensor([0.25, NAN, 1.0, 0.0] * 3)
    train = train_module(Stacking({"click": 1.0}), FusedLoss(None))
    train(batch_of(reward=reward))
    score = train.model(*(getattr(batch_of(), n) for n in ("dense_features", "sparse_features")))["score"]
    known = ~reward.isnan()
    expected = F.binary_cross_entropy(squashed(score[known]), reward[known])
    torch.testing.assert_close(train.loss.last_fused_loss, expected.detach())
    nothing, grads = gradients(train, batch_of(reward=torch.full((12,), NAN)), "fused_score")
    assert train.loss.last_fused_loss == 0
    assert nothing.isfinite()
    assert all(not g.any() for g in grads.values())
    with pytest.raises(ValueError, match="the batch has none"):
        train(batch_of())


def test_pairs_of_a_request_weigh_what_they_would_gain():
    requests, reward = torch.tensor([3, 3, 3, 9, 9, -1, -1, 3, 9, 5, 5, 5]), torch.rand(12)
    reward[[2, 9]] = NAN
    batch = batch_of(reward=reward, requests=requests)
    train = train_module(Stacking({"click": 1.0, "report": -1.0}), FusedLoss(None, loss="pairwise"))
    z = torch.logit(squashed(train.model(batch.dense_features, batch.sparse_features)["score"]))
    total = weight = 0.0
    for i in range(12):
        for j in range(12):
            if requests[i] == requests[j] >= 0 and reward[i] > reward[j]:
                total = total + (reward[i] - reward[j]) * F.softplus(z[j] - z[i])
                weight += reward[i] - reward[j]
    (total / weight).backward()
    expected = {n: p.grad.clone() for n, p in train.named_parameters() if "fused_score" in n}
    train.zero_grad()
    _, grads = gradients(train, batch, "fused_score")
    torch.testing.assert_close(train.loss.last_fused_loss, (total / weight).detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(grads["model.output.fused_score.weights"], expected["model.output.fused_score.weights"],
                               atol=1e-5, rtol=1e-4)  # fmt: skip
    batch.requests = None
    with pytest.raises(ValueError, match=r"the fused score's loss: pairwise .* no requests"):
        train(batch)


# ---------------------------------------------------------------- what it trains


def test_detached_heads_learn_nothing_from_the_score():
    batch = batch_of()
    without = gradients(train_module(Stacking(WEIGHTS)), batch)[1]
    with_loss = gradients(train_module(Stacking(WEIGHTS), FusedLoss(VALUES, weight=9.0)), batch)[1]
    for name, gradient in without.items():
        if "fused_score" in name:
            assert gradient is None
            assert with_loss[name].abs().sum() > 0
        else:
            assert torch.equal(gradient, with_loss[name]), name
    through = gradients(train_module(Stacking(WEIGHTS), FusedLoss(VALUES, heads="through")), batch)[1]
    assert all(not torch.equal(g, through[n]) for n, g in without.items() if "embedding_bags" in n)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stacking({"click": 1.0, "report": 0.1}),
        lambda: MonotoneNetwork({"click": 1, "report": -1}, hidden=[4]),
        lambda: ContextGatedMean({"click": 1.0, "report": -1.0}, features={"item": 4}),
    ],
)
def test_what_learns_changes_and_lowers_its_loss_while_the_tasks_stay_as_they_are(make):
    train, batch = train_module(make(), FusedLoss(VALUES)), batch_of(200)
    before = {n: v.clone() for n, v in train.model.output.state_dict().items()}
    optimizer, losses = torch.optim.Adam(train.model.output.parameters(), 0.05), []
    for _ in range(40):
        optimizer.zero_grad()
        train(batch)[0].backward()
        optimizer.step()
        losses.append(train.loss.last_fused_loss.item())
    assert losses[-1] < losses[0] - 0.005
    learnt = {n for n, p in train.model.output.named_parameters() if not torch.equal(p, before[n])}
    assert learnt == {n for n, _ in train.model.output.named_parameters()}


class _Recorder(nn.Module):
    seen: list = []  # noqa: RUF012 - surgery copies the module, the class stays

    def forward(self, gramian):
        self.seen.append(gramian.clone())
        return torch.tensor([2.0, 0.5, 1.0], dtype=gramian.dtype)


def test_under_gradient_surgery_the_score_counts_with_the_task_it_pulls_at():
    batch, options = batch_of(), {"fused_loss": FusedLoss(VALUES, weight=3.0, heads="through")}
    plain = train_module(WeightedGeometricMean(WEIGHTS), **options)
    met = []
    plain.model.tower.trunk.register_forward_hook(lambda *args: met.append(args[2]) or args[2].retain_grad())
    _, of_plain = gradients(plain, batch)
    of_tasks = met[0].grad.transpose(0, 1).flatten(1).double()  # (T, B · H): tasks' own and what the score asks of them
    options = {"fused_loss": FusedLoss(VALUES, weight=3.0, heads="through")}
    surgery = GradientSurgery(_Recorder(), max_weight=3.0)
    _, of_surgery = gradients(train_module(WeightedGeometricMean(WEIGHTS), gradient_surgery=surgery, **options), batch)
    gramian = of_tasks @ of_tasks.T
    torch.testing.assert_close(_Recorder.seen[-1], gramian / gramian.diagonal().mean(), atol=1e-7, rtol=1e-4)
    assert (gramian.diagonal() > 0).all()
    for name, gradient in of_plain.items():  # above the cut nothing is weighed
        if "heads" in name or "towers" in name:
            torch.testing.assert_close(of_surgery[name], gradient, atol=1e-6, rtol=1e-4)
        elif "trunk" in name or "embedding_bags" in name:
            assert not torch.allclose(of_surgery[name], gradient)


def test_beside_a_loss_weighting_it_keeps_its_own_weight():
    batch, weight = batch_of(), 0.3
    plain = gradients(train_module(Stacking(WEIGHTS), loss_weighting=FAMO(3)), batch)
    joint = train_module(Stacking(WEIGHTS), FusedLoss(VALUES, weight=weight), loss_weighting=FAMO(3))
    total, _ = gradients(joint, batch)
    torch.testing.assert_close(total, plain[0] + weight * joint.loss.last_fused_loss)


class _Broken(nn.Module):
    tasks = ("click",)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, parts):
        return parts["click"] * self.scale * NAN


def test_a_score_that_is_not_finite_skips_the_batch():
    train = train_module(_Broken(), FusedLoss(VALUES, heads="through"))
    _, grads = gradients(train, batch_of(), "embedding_bags")
    assert train.loss.skipped().last_parts == ("the score",)
    assert all(not g.any() for g in grads.values())
    assert train.loss.found_inf == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (None, FusedLoss(VALUES)), "the model has none"),
        (lambda: (HardVoting(WEIGHTS), FusedLoss(VALUES, heads="through")), "HardVoting has no gradient"),
        (lambda: (Borda(WEIGHTS), FusedLoss(VALUES, heads="through")), "Borda has no gradient"),
        (lambda: (TopKVoting(WEIGHTS), FusedLoss(VALUES, heads="through")), "TopKVoting has no gradient"),
        (lambda: (TopKVoting(WEIGHTS, temperature=1.0), FusedLoss(VALUES, heads="through")), "hold some of them"),
        (lambda: (WeightedMean(WEIGHTS), FusedLoss(VALUES)), "detach leaves nothing to train; take heads: through"),
        (lambda: (Stacking(WEIGHTS), FusedLoss({"clik": 1.0})), r"no task 'clik' \(did you mean 'click'"),
        (lambda: (None, FusedLoss({"click": 0.0})), "not 0"),
        (lambda: (None, FusedLoss(VALUES, weight=0)), "above 0"),
        (lambda: (None, FusedLoss(VALUES, heads="on")), "heads is one of detach, through, not 'on'"),
        (lambda: (None, FusedLoss(VALUES, loss="mse")), "loss is one of"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        train_module(*make())


def test_a_class_is_worth_nothing():
    tasks = [Task.binary("click"), Task.multiclass("topic", 3)]
    with pytest.raises(ConfigError, match="task 'topic' is multiclass"):
        train_module(Stacking({"click": 1.0}), FusedLoss({"topic": 1.0}), tasks)


def test_a_fused_score_that_reads_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'items' of width 4, and the model has none \(did you mean 'item'"):
        train_module(ContextGatedMean({"click": 1.0}, features={"items": 4}))
    with pytest.raises(ValueError, match="and the model has one of width 4"):
        train_module(ContextGatedMean({"click": 1.0}, features={"item": 8}))


def test_an_ensemble_has_the_means_of_its_members_and_their_spread():
    from mtcl_torchrec import DeepEnsemble

    models = []
    for seed in range(3):
        models.append(train_module(WeightedMean(WEIGHTS)).model)
        torch.manual_seed(seed)
        for p in models[-1].parameters():
            nn.init.normal_(p, std=0.5)
    batch = batch_of()
    outs = [m(batch.dense_features, batch.sparse_features) for m in models]
    got = DeepEnsemble(models)(batch.dense_features, batch.sparse_features)
    for name, value in outs[0].items():
        np.testing.assert_allclose(got[name].detach(), sum(o[name] for o in outs).detach() / 3, rtol=1e-5)
        assert value.shape == got[name].shape
    spread = np.std([o["score"].detach().numpy() for o in outs], axis=0)
    np.testing.assert_allclose(got["score_std"].detach(), spread, atol=1e-6)
    with pytest.raises(ValueError, match="a member at least"):
        DeepEnsemble([])
    other = train_module(WeightedMean({"click": 1.0}), tasks=TASKS[:1]).model
    with pytest.raises(ValueError, match=r"member 1 of the ensemble predicts \['click'\]"):
        DeepEnsemble([models[0], other])
