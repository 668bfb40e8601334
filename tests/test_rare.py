"""Losses of rare tasks: what is left out or weighed comes back exactly, focal and pairwise terms are what loops say."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, Feature, MTBatch, MTCLTrain, Schema, SharedBottom, Task
from mtcl_torchrec.data.counter_random import stream, uniform
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.modules import rare
from mtcl_torchrec.modules.calibration import Calibration, PlattScaling
from mtcl_torchrec.modules.losses import MultiTaskLoss
from mtcl_torchrec.modules.rare import NegativeSampling, PairwiseLoss, binary_loss

RATES, WEIGHTS = st.floats(1e-3, 1.0), st.floats(1e-2, 100.0)


def batch_of(labels, **more):
    n = len(labels)
    ids = KeyedJaggedTensor(["user"], values=torch.arange(n), lengths=torch.ones(n, dtype=torch.int64))
    return MTBatch(torch.empty(n, 0), ids, labels, **more)


def loss_of(loss, logits, batch):
    return loss(logits, torch.zeros(len(batch.labels), 4), batch)[0]


# ---------------------------------------------------------------------- probabilities come back


@given(p=st.floats(1e-4, 1 - 1e-4), r=RATES, w=WEIGHTS)
def test_the_shift_undoes_what_sampling_and_weights_make_of_a_probability(p, r, w):
    seen = w * p / (w * p + r * (1 - p))  # among the rows and weights that the loss sees
    odds = math.log(p / (1 - p)) + Task.binary("a", negative_rate=r, pos_weight=w).logit_shift
    assert 1 / (1 + math.exp(-odds)) == pytest.approx(seen, abs=1e-9)
    sampled = p / (p + r * (1 - p))
    assert sampled / (sampled + (1 - sampled) / r) == pytest.approx(p, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(p=st.floats(0.01, 0.99), r=RATES, w=WEIGHTS)
def test_the_expected_loss_has_its_minimum_at_the_true_log_odds(p, r, w):
    task = Task.binary("a", negative_rate=r, pos_weight=w)
    z = torch.tensor([math.log(p / (1 - p))], requires_grad=True)
    positive, negative = (binary_loss(task, z, torch.full((1,), y)) for y in (1.0, 0.0))
    (slope,) = torch.autograd.grad((p * positive + (1 - p) * r * negative).sum(), z)
    assert abs(slope.item()) < 1e-5 * (w * p + r)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{"negative_rate": 0.1}, {"pos_weight": 7.0}, {"negative_rate": 0.2, "pos_weight": 3.0}]
)
def test_a_model_of_a_bias_alone_learns_the_base_rate(options, training):
    labels = torch.zeros(50_000, 1)
    labels[:1000] = 1
    labels[1000:3000] = float("nan")
    batch, base = batch_of(labels), 1000 / 48_000
    loss, bias = (
        MultiTaskLoss([Task.binary("rare", **options)], seed=3).train(training),
        torch.zeros(1, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS(
        [bias], max_iter=50, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss.skipped_steps.batches.zero_()  # the same draw each time
        value = loss_of(loss, {"rare": bias.expand(len(labels))}, batch)
        value.backward()
        return value

    optimizer.step(closure)
    learnt = torch.sigmoid(bias).item()
    if training and "negative_rate" in options:
        rate = options["negative_rate"]
        assert learnt == pytest.approx(base, rel=4 * ((1 - rate) / rate / 47_000) ** 0.5)
        assert learnt != pytest.approx(base, rel=1e-5)  # as a sample is
    else:
        assert learnt == pytest.approx(base, rel=2e-3)  # as far as single precision goes


def test_a_head_starts_at_even_odds_in_what_its_loss_sees():
    def heads(**options):
        torch.manual_seed(0)
        tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["user"])]
        tasks = [Task.binary("click"), Task.binary("like", **options)]
        return MTCL(EmbeddingBagCollection(tables=tables), 0, SharedBottom([4]), tasks).tower.heads

    plain, shifted = heads(), heads(negative_rate=0.1, pos_weight=2.0)
    assert torch.equal(plain[0].bias, shifted[0].bias)
    torch.testing.assert_close(shifted[1].bias, plain[1].bias - math.log(2 / 0.1))


# ---------------------------------------------------------------------- negatives left out


def test_draws_are_those_of_the_counter_and_the_same_on_any_number_of_ranks():
    tasks = [Task.binary("a"), Task.binary("b", negative_rate=0.3), Task.binary("c", negative_rate=0.7)]
    sampling, n = NegativeSampling(tasks, seed=5), 1000
    labels = (torch.rand(n, 3, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    weights, number = torch.full((n, 3), 2.0), torch.tensor(2**30 + 7)
    whole = sampling(labels, weights, number)
    for column, rate in (("b", 0.3), ("c", 0.7)):
        i = "abc".index(column)
        drawn = uniform(stream(5, "negatives", column), (int(number) << 32) + np.arange(n)) < rate
        expected = torch.where((labels[:, i] == 1) | torch.from_numpy(drawn), 2.0, 0.0)
        assert torch.equal(whole[:, i], expected)
    assert torch.equal(whole[:, 0], weights[:, 0])
    for rank in range(3):
        assert torch.equal(sampling(labels[rank::3], weights[rank::3], number, rank, 3), whole[rank::3])
    assert not torch.equal(sampling(labels, weights, number + 1), whole)
    assert not torch.equal(NegativeSampling(tasks, seed=6)(labels, weights, number), whole)
    torch.testing.assert_close(sampling.eval()(labels, weights, number)[:, 1], torch.where(labels[:, 1] == 1, 2.0, 0.6))


def test_a_row_left_out_of_one_task_stays_for_the_others_and_draws_go_on_after_a_resume():
    tasks = [Task.binary("click"), Task.binary("like", negative_rate=0.5)]
    labels, logits = torch.zeros(64, 2), {"click": torch.randn(64), "like": torch.randn(64)}
    batch = batch_of(labels)
    loss = MultiTaskLoss(tasks)
    first = [(loss_of(loss, logits, batch), loss.last_task_losses)[1] for _ in range(4)]
    assert len({click.item() for click, _ in first}) == 1  # every row, in every step
    assert len({like.item() for _, like in first}) == 4
    resumed = MultiTaskLoss(tasks)
    loss_of(resumed, logits, batch), loss_of(resumed, logits, batch)
    again = MultiTaskLoss(tasks)
    again.load_state_dict(resumed.state_dict())
    loss_of(again, logits, batch)
    assert torch.equal(again.last_task_losses, first[2])


# ---------------------------------------------------------------------- focal


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_equals_its_formula(gamma):
    task = Task.binary("a", focal_gamma=gamma, pos_weight=3.0)
    logits, labels = 3 * torch.randn(200), (torch.rand(200) < 0.5).float()
    p = torch.sigmoid(logits.double() + math.log(3.0))
    p_t, alpha = torch.where(labels == 1, p, 1 - p), torch.where(labels == 1, 3.0, 1.0)
    expected = -alpha * (1 - p_t) ** gamma * p_t.log()
    torch.testing.assert_close(binary_loss(task, logits, labels), expected.float(), rtol=1e-4, atol=1e-6)


def test_focal_loss_of_extreme_logits_has_a_finite_gradient():
    z = torch.tensor([-500.0, -30.0, 0.0, 30.0, 500.0], requires_grad=True)
    for y in (0.0, 1.0):
        loss = binary_loss(Task.binary("a", focal_gamma=0.5), z, torch.full((5,), y))
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert torch.isfinite(torch.cat([loss, gradient])).all()


def test_focal_tasks_are_marked_and_warned_of():
    focal = Task.binary("like", focal_gamma=2.0)
    assert not focal.calibrated
    assert Task.binary("like", negative_rate=0.1, pos_weight=9.0, pairwise=1.0).calibrated
    tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["user"])]
    with pytest.warns(UserWarning, match="task 'like': its focal loss .* no probabilities"):
        MTCL(EmbeddingBagCollection(tables=tables), 0, SharedBottom([4]), [Task.binary("click"), focal])
    calibration = Calibration([Task.binary("click"), focal], {"like": PlattScaling()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MTCL(
            EmbeddingBagCollection(tables=tables), 0, SharedBottom([4]), [Task.binary("click"), focal],
            calibration=calibration,
        )  # fmt: skip


# ---------------------------------------------------------------------- pairs


def pairs_by_loop(z, labels, weights, requests):
    total, count = 0.0, 0.0
    for i in range(len(z)):
        for j in range(len(z)):
            if requests[i] == requests[j] >= 0 and labels[i] == 1 and labels[j] == 0:
                total = total + weights[i] * weights[j] * torch.log1p(torch.exp(z[j] - z[i]))
                count += float(weights[i] * weights[j])
    return total, count


@pytest.mark.parametrize("at_once", [2**21, 50])
@pytest.mark.parametrize(("n", "requests"), [(40, 5), (40, 40), (40, 1), (1, 1)])
def test_pairs_equal_a_loop_over_all_of_them(monkeypatch, n, requests, at_once):
    monkeypatch.setattr(rare, "_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(n + requests)
    keys = torch.randint(0, requests, (n,), generator=g) * 10**17
    keys[torch.rand(n, generator=g) < 0.1] = -1
    labels = (torch.rand(n, 2, generator=g) < 0.3).float()
    weights = torch.rand(n, 2, generator=g) * (torch.rand(n, 2, generator=g) < 0.8)
    z = torch.randn(n, generator=g, dtype=torch.float64).requires_grad_()
    term = PairwiseLoss([Task.binary("a"), Task.binary("b", pairwise=0.5)])
    for largest in (None, n):  # found out here, and not known
        batch = batch_of(labels, requests=keys, largest_request=largest)
        sums, counts = term({"a": torch.zeros(n), "b": z.float()}, labels, weights, batch)
        expected, count = pairs_by_loop(z, labels[:, 1], weights[:, 1], keys)
        assert counts.item() == pytest.approx(count, rel=1e-5)
        assert sums.item() == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-5)
        if count:
            (gradient,) = torch.autograd.grad(sums.sum(), z)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], rtol=1e-4, atol=1e-6)


def test_the_pairwise_term_is_part_of_the_tasks_loss_and_leaves_predictions_probabilities():
    """Two kinds of rows in one request, of true probabilities 0.2 and 0.6: a minimum of both terms is there."""
    labels = torch.cat([torch.arange(50) < 10, torch.arange(50) < 30]).float().unsqueeze(1)
    kind = torch.cat([torch.zeros(50), torch.ones(50)]).long()
    batch = batch_of(labels, requests=torch.zeros(100, dtype=torch.int64))
    z = torch.tensor([0.2, 0.6]).logit().requires_grad_()
    loss, without = (MultiTaskLoss([Task.binary("a", pairwise=w, weight=2.0)]) for w in (0.7, 0.0))
    value = loss_of(loss, {"a": z[kind]}, batch)
    loss_of(without, {"a": z[kind]}, batch)
    total, count = pairs_by_loop(z[kind], labels[:, 0], torch.ones(100), torch.zeros(100))
    expected = without.last_task_losses + 0.7 * total.detach() / count
    torch.testing.assert_close(loss.last_task_losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(value.detach(), 2 * loss.last_task_losses[0])
    (slope,) = torch.autograd.grad(value, z)
    assert slope.abs().max() < 1e-6


def test_masked_and_missing_labels_count_in_no_term():
    """What is masked or missing changes nothing: the same loss as without those rows."""
    tasks = [
        Task.binary("click", negative_rate=0.5, pos_weight=3.0, pairwise=0.4),
        Task.binary("like", focal_gamma=1.5, negative_rate=0.7, pairwise=1.0),
    ]
    g = torch.Generator().manual_seed(1)
    labels, keys = torch.randint(0, 2, (40, 2), generator=g).float(), torch.randint(0, 5, (40,), generator=g)
    logits = {t.name: torch.randn(40, generator=g).requires_grad_() for t in tasks}
    short, mask = labels[:30], torch.arange(40)[:, None].expand(40, 2) < 30
    expected = loss_of(
        MultiTaskLoss(tasks), {n: z[:30] for n, z in logits.items()}, batch_of(short, requests=keys[:30])
    )
    masked = loss_of(MultiTaskLoss(tasks), logits, batch_of(labels, mask=mask, requests=keys))
    missing = loss_of(MultiTaskLoss(tasks), logits, batch_of(labels.masked_fill(~mask, float("nan")), requests=keys))
    torch.testing.assert_close(masked, expected)
    torch.testing.assert_close(missing, expected)
    for gradient in torch.autograd.grad(masked, list(logits.values())):
        assert not gradient[30:].any()
        assert gradient[:30].any()


def test_a_pairwise_loss_that_is_not_finite_skips_the_batch_by_the_tasks_name():
    loss = MultiTaskLoss([Task.binary("click"), Task.binary("like", pairwise=1e-3)])
    labels, requests = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
    weights = torch.full((2, 2), 1e16)  # of rows: large, of pairs: beyond what is of use
    loss_of(
        loss, {"click": torch.zeros(2), "like": torch.zeros(2)}, batch_of(labels, weights=weights, requests=requests)
    )
    assert loss.skipped().last_parts == ("like",)


# ---------------------------------------------------------------------- requests on their way


def test_requests_reach_the_batch_under_the_same_key_wherever_they_are_met():
    schema = Schema(
        features=[Feature(name="item", group="item")],
        tasks=[Task.binary("buy", pairwise=1.0)],
        user="u",
        request="visit",
    )
    frame = pd.DataFrame({"item": list("abcab"), "visit": ["x", "y", None, "x", "z"], "buy": [0, 1, 0, 1, 0]})
    encoder = FeatureEncoder(schema).fit(Rows(frame))
    assert "visit" in encoder.columns()
    assert "visit" not in encoder.columns(with_labels=False)
    rows, later = encoder.encode(Rows(frame)), encoder.encode(Rows(frame.iloc[3:].reset_index(drop=True)))
    x, y, nothing, again, z = rows.requests.tolist()
    assert x == again == later.requests[0]
    assert (nothing, len({x, y, z}), min(x, y, z) >= 0) == (-1, 3, True)
    assert torch.equal(type(rows).cat([rows.slice(0, 3), later]).requests, rows.requests)
    batch = rows.batch(torch.tensor([0, 2, 3]))
    assert batch.requests.tolist() == [x, -1, x]
    assert (batch.largest_request, rows.blank().largest_request) == (2, 0)
    moved = batch.to(torch.device("meta"))
    assert (moved.requests.device.type, moved.largest_request) == ("meta", 2)
    assert encoder.encode(Rows(frame), with_labels=False).batch().requests is None


def test_without_a_pairwise_task_there_are_no_requests():
    schema = Schema(features=[Feature(name="item", group="item")], tasks=[Task.binary("buy")], user="u")
    frame = pd.DataFrame({"item": ["a"], "buy": [1]})
    assert FeatureEncoder(schema).fit(Rows(frame)).encode(Rows(frame)).requests is None
    assert schema.label_columns() == ["buy"]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("field", "value"), [("negative_rate", 0.5), ("pos_weight", 2.0), ("focal_gamma", 2.0), ("pairwise", 1.0)]
)
def test_options_of_binary_tasks_are_refused_elsewhere(field, value):
    with pytest.raises(ValidationError, match=f"task 'a': {field} belongs to binary tasks"):
        Task.regression("a", **{field: value})


@pytest.mark.parametrize(
    "options", [{"negative_rate": 0.0}, {"negative_rate": 1.5}, {"pos_weight": 0}, {"focal_gamma": -1}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        Task.binary("a", **options)


def test_pairs_without_a_request_are_refused():
    features = [Feature(name="item", group="item")]
    with pytest.raises(
        ValidationError, match="task 'a': pairwise compares rows of one request, and needs request or user"
    ):
        Schema(features=features, tasks=[Task.binary("a", pairwise=1.0)])
    alone = Schema(features=features, tasks=[Task.binary("a")], request="visit")
    assert alone.request_column == "visit"  # a fused score may compare its rows
    tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["user"])]
    model = MTCL(EmbeddingBagCollection(tables=tables), 0, SharedBottom([4]), [Task.binary("a", pairwise=1.0)])
    with pytest.raises(ValueError, match=r"task 'a': pairwise .* the batch has no requests"):
        MTCLTrain(model)(batch_of(torch.zeros(2, 1)))
