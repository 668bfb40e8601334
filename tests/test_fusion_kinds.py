"""Every fused score: closed forms and loops as references, and what must hold for any predictions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtcl_torchrec import (
    Borda,
    ContextGatedMean,
    DenseNumber,
    ExpectedValue,
    HardVoting,
    MonotoneNetwork,
    PowerProduct,
    ReciprocalRankFusion,
    RowContext,
    SoftVoting,
    Stacking,
    TopKVoting,
    WeightedGeometricMean,
    WeightedMean,
)
from mtcl_torchrec.modules.fusion import contributions, fuse
from mtcl_torchrec.modules.fusion.contract import Weighted

WEIGHTS = {"a": 2.0, "b": 1.0, "c": -3.0}
PRICE = DenseNumber(1, mean=2.0, std=0.5, transform="log")


def shaken(module):
    """With parameters as if it had learnt something."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.7 * torch.randn(p.shape, generator=g))
    return module


def stacked():
    return Stacking({"a": 1.5, "b": 0.5, "c": -0.7}, bias=0.3)


KINDS = {
    "weighted_mean": lambda: WeightedMean(WEIGHTS),
    "weighted_geometric_mean": lambda: WeightedGeometricMean(WEIGHTS),
    "power_product": lambda: PowerProduct(
        {"a": 2.0, "b": -0.5, "c": 3.0}, bases={"a": 0.5}, exponents={"b": -1.5, "c": -2.0}
    ),
    "expected_value": lambda: ExpectedValue(WEIGHTS, given={"b": "a"}, numbers={"b": PRICE}),
    "expected_value_alone": lambda: ExpectedValue(WEIGHTS),
    "soft_voting": lambda: SoftVoting(WEIGHTS, thresholds={"a": 0.2}, temperature=0.1),
    "hard_voting": lambda: HardVoting(WEIGHTS, thresholds={"a": 0.2}),
    "top_k_voting": lambda: TopKVoting(WEIGHTS, k=2),
    "top_k_voting_soft": lambda: TopKVoting(WEIGHTS, k=2, temperature=0.1),
    "borda": lambda: Borda(WEIGHTS),
    "reciprocal_rank": lambda: ReciprocalRankFusion(WEIGHTS, k=3),
    "stacking": stacked,
    "monotone_network": lambda: shaken(MonotoneNetwork({"a": 1, "b": 1, "c": -1}, hidden=[6, 4])),
    "context_gated_mean": lambda: shaken(ContextGatedMean(WEIGHTS, features={"u": 4}, dense_columns=[0], hidden=5)),
}
# Tasks that speak against an item; of the expected value, a higher P(a) raises P(b) too.
AGAINST = {"c"}
every = pytest.mark.parametrize("kind", KINDS)


def rows(count, seed=0, parts=None, requests=None, dtype=torch.float32):
    """Parts and context; `requests` as a list, or None."""
    g = torch.Generator().manual_seed(seed)
    if parts is None:
        parts = {t: torch.rand(count, generator=g, dtype=dtype) for t in WEIGHTS}
    return parts, RowContext(
        torch.randn(count, 2, generator=g, dtype=dtype),
        {"u": torch.randn(count, 4, generator=g, dtype=dtype)},
        None if requests is None else torch.tensor(requests),
    )


def at(parts, context, index):
    return {t: p[index] for t, p in parts.items()}, RowContext(
        context.dense_features[index],
        {k: v[index] for k, v in context.embeddings.items()},
        None if context.request is None else context.request[index],
    )


unit = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 1e-30, 1 - 2**-24]))
batches = st.lists(st.tuples(unit, unit, unit, st.integers(-1, 2)), min_size=1, max_size=7)


def drawn(drawn_rows):
    *parts, request = zip(*drawn_rows, strict=True)
    parts = {t: torch.tensor(p) for t, p in zip(WEIGHTS, parts, strict=True)}
    return rows(len(request), parts=parts, requests=request)


# ---------------------------------------------------------------- what holds for all of them


@every
@settings(max_examples=25, deadline=None)
@given(batches)
def test_scores_lie_in_the_unit_interval(kind, batch):
    score = fuse(KINDS[kind](), *drawn(batch))
    assert score.shape == (len(batch),)
    assert bool(((score >= 0) & (score <= 1)).all()), score


@every
@settings(max_examples=25, deadline=None)
@given(batches, st.sampled_from(list(WEIGHTS)), st.data())
def test_a_score_follows_each_task_in_the_direction_of_its_sign(kind, batch, task, data):
    fused, (parts, context) = KINDS[kind](), drawn(batch)
    before = fuse(fused, parts, context)[0]
    raised = parts[task].clone()
    raised[0] += (1 - raised[0]) * data.draw(unit)
    after = fuse(fused, {**parts, task: raised}, context)[0]
    assert after <= before + 2e-6 if task in AGAINST else after >= before - 2e-6


@every
@settings(max_examples=20, deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_a_score_does_not_depend_on_other_requests_nor_on_the_order_of_rows(kind, batch, random):
    fused, (parts, context) = KINDS[kind](), drawn(batch)
    together = fuse(fused, parts, context)
    order = list(range(len(batch)))
    random.shuffle(order)
    torch.testing.assert_close(fuse(fused, *at(parts, context, torch.tensor(order))), together[order])
    request = context.request[0]
    own = context.request == request if request >= 0 else torch.arange(len(batch)) == 0
    torch.testing.assert_close(fuse(fused, *at(parts, context, own)), together[own])
    if not getattr(fused, "within_request", False):
        alone = torch.cat([fuse(fused, *at(parts, context, torch.tensor([i]))) for i in range(len(batch))])
        torch.testing.assert_close(alone, together)


@every
def test_gradients_are_right_where_there_are_any(kind):
    fused = KINDS[kind]()
    parts, context = rows(5, requests=[0, 0, 0, 1, 1], dtype=torch.float64)
    if not fused.differentiable:
        leaves = {t: p.requires_grad_() for t, p in parts.items()}
        assert not fuse(fused, leaves, context).requires_grad or kind == "hard_voting"
        return
    fused = fused.double()
    columns = [p.requires_grad_() for p in parts.values()]

    def score(*columns):
        return fuse(fused, dict(zip(WEIGHTS, columns, strict=True)), context)

    assert torch.autograd.gradcheck(score, columns)
    ends = {t: torch.tensor([0.0, 1.0], requires_grad=True) for t in WEIGHTS}
    _, two = rows(2)
    fuse(KINDS[kind](), ends, two).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ends.values())
    for parameter in fused.parameters():
        parameter.grad = None
    score(*columns).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fused.parameters())


class _ForExport(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, a, b, c, dense, user, request):
        return fuse(self.fused, {"a": a, "b": b, "c": c}, RowContext(dense, {"u": user}, request))


@every
def test_an_exported_score_is_equal_for_any_number_of_rows(kind):
    module, size = _ForExport(KINDS[kind]()).eval(), torch.export.Dim("size", min=2, max=4096)

    def inputs(count):
        parts, context = rows(count, seed=count, requests=[n // 3 for n in range(count)])
        return (*parts.values(), context.dense_features, context.embeddings["u"], context.request)

    program = torch.export.export(module, inputs(7), dynamic_shapes=[{0: size}] * 6, strict=False).module()
    for count in (7, 20):
        torch.testing.assert_close(program(*inputs(count)), module(*inputs(count)))


@every
def test_state_travels_with_the_model(kind):
    parts, context = rows(6, requests=[0, 0, 0, 0, 1, 1])
    fused, other = KINDS[kind](), KINDS[kind]()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fuse(other, parts, context), fuse(fused, parts, context))


@every
def test_no_rows_have_no_scores(kind):
    assert fuse(KINDS[kind](), *rows(0, requests=[])).shape == (0,)


@pytest.mark.parametrize("kind", [k for k in KINDS if isinstance(KINDS[k](), Weighted)])
def test_weights_are_replaced_without_training_and_wrong_ones_change_nothing(kind):
    fused, (parts, context) = KINDS[kind](), rows(6)
    before = fuse(fused, parts, context)
    for wrong, error in (({"x": 1.0}, KeyError), ({"a": math.nan}, ValueError), (dict.fromkeys("abc", 0), ValueError)):
        with pytest.raises(error):
            fused.set_weights(wrong)
    torch.testing.assert_close(fuse(fused, parts, context), before)
    fused.set_weights({"a": 7.0})
    assert fused.weights[0] == 7
    assert not torch.equal(fuse(fused, parts, context), before)


# ---------------------------------------------------------------- closed forms and loops


def p(**parts):
    return {t: torch.tensor(v, dtype=torch.float64).reshape(-1) for t, v in parts.items()}


def test_the_geometric_mean_is_that_of_odds_for_and_against():
    fused = WeightedGeometricMean({"a": 2.0, "c": -1.0}, floor=1e-9).double()
    score = fused(p(a=0.5, c=0.2)).item()
    assert score == pytest.approx((0.5**2 * 0.8) ** (1 / 3), abs=1e-7)
    assert fused(p(a=1.0, c=0.0)).item() == pytest.approx(1, abs=1e-7)
    assert fused(p(a=0.0, c=0.3)).item() < 1e-5
    halved = [WeightedGeometricMean({"a": 1.0, "b": 1.0})(p(a=[0.4, 0.3], b=[0.1 * s, 0.2 * s])) for s in (1, 0.5)]
    assert (halved[0].argmax(), halved[1].argmax()) == (1, 1)


def test_the_power_product_runs_from_its_least_to_its_greatest_value():
    fused = KINDS["power_product"]().double()

    def product(a, b, c):
        return (0.5 + 2 * a) * (1 - 0.5 * b) ** -1.5 * (1 + 3 * c) ** -2

    least, greatest = product(0, 0, 1), product(1, 1, 0)
    for a, b, c in ((0, 0, 1), (1, 1, 0), (0.3, 0.9, 0.4), (0.01, 0.2, 0.99)):
        expected = (product(a, b, c) - least) / (greatest - least)
        assert fused(p(a=a, b=b, c=c)).item() == pytest.approx(expected, abs=1e-6)
    steep = PowerProduct({"a": 1.0}, exponents={"a": 500.0})  # 2⁵⁰⁰ is no float32
    assert steep({"a": torch.tensor([0.0, 0.999, 1.0])}).isfinite().all()


def test_an_expected_value_multiplies_the_price_with_the_chain_of_events():
    price = torch.tensor([3.0, 400.0], dtype=torch.float64)
    column = (torch.log1p(price) - 2.0) / 0.5  # as the encoder does it
    context = RowContext(torch.stack([torch.zeros(2), column], 1), {})
    fused = ExpectedValue({"a": 1.0, "b": 2.0, "c": -4.0}, given={"b": "a", "c": "b"}, numbers={"b": PRICE}, scale=5.0)
    parts = p(a=[0.5, 0.9], b=[0.1, 0.3], c=[0.2, 0.7])
    chain = parts["a"] * parts["b"]
    value = (parts["a"] + 2 * price * chain - 4 * chain * parts["c"]) / 7
    torch.testing.assert_close(fused.double()(parts, context), (1 + value / (5 + value.abs())) / 2)
    found = fused.contributions(parts, context)
    torch.testing.assert_close(found["b"], 2 * price * chain / 7)
    torch.testing.assert_close(sum(found.values()), value)
    fused.set_weights({"c": 0.0})
    value = (parts["a"] + 2 * price * chain) / 3
    torch.testing.assert_close(fused(parts, context), value / (5 + value))
    with pytest.raises(ValueError, match="the value of 'b' needs a number"):
        fused(parts)


def test_a_number_of_each_transform_is_found_again():
    for transform, value, transformed in (
        ("none", -7.5, -7.5),
        ("log", -20.0, -math.log1p(20)),
        ("logit", 0.2, math.log(0.25)),
    ):
        number = DenseNumber(0, mean=1.5, std=2.0, transform=transform)
        assert number.read(torch.tensor([[(transformed - 1.5) / 2]])).item() == pytest.approx(value, rel=1e-5)
    assert DenseNumber(0, mean=math.log1p(9), transform="log").typical == pytest.approx(9)
    assert ExpectedValue({"a": 1.0}, numbers={"a": DenseNumber(0, mean=30.0)}).scale.item() == 30


def test_a_number_without_bounds_gives_a_score_within_them():
    """An item a thousand times as dear as all before, read back through an exponential."""
    dear = RowContext(torch.tensor([[1000.0], [100.0], [3.0]]), {})
    price = DenseNumber(0, transform="log")
    for weights in ({"a": 1.0}, {"a": 1.0, "c": -1.0}, {"a": -1.0, "c": 1.0}):
        fused = ExpectedValue(weights, numbers=dict.fromkeys(weights, price), scale=1.0)
        score = fused({"a": torch.tensor([0.5, 0.0, 0.5]), "c": torch.tensor([0.5, 0.5, 0.0])}, dear)
        assert ((score >= 0) & (score <= 1)).all(), score


def by_loop(parts, requests, vote):
    """Σ w vote / Σ|w| from a function of a value and all values of its request, its own included."""
    scores = []
    for row, request in enumerate(requests):
        own = [i for i, r in enumerate(requests) if (r == request and request >= 0) or i == row]
        total = sum(w * vote(parts[t][row], [parts[t][i] for i in own]) for t, w in WEIGHTS.items())
        scores.append((total + 3) / 6)
    return torch.tensor(scores)


def rank(x, all_):
    return 1 + sum(o > x for o in all_) + (sum(o == x for o in all_) - 1) / 2


def smooth(x, all_, k=2, temperature=0.1):
    if len(all_) <= k:
        return 1.0
    down = sorted(all_, reverse=True)
    return 1 / (1 + math.exp(-(x - (down[k - 1] + down[k]) / 2) / temperature))


@pytest.mark.parametrize(
    ("kind", "vote"),
    [
        ("hard_voting", None),
        ("top_k_voting", lambda x, all_: float(sum(o > x for o in all_) < 2)),
        ("top_k_voting_soft", smooth),
        ("borda", lambda x, all_: (len(all_) - rank(x, all_)) / (len(all_) - 1) if len(all_) > 1 else 0.5),
        ("reciprocal_rank", lambda x, all_: 4 / (3 + rank(x, all_))),
    ],
)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0])] * 3, st.integers(-1, 2)), min_size=1))
def test_votes_and_ranks_equal_a_loop(kind, vote, batch):
    *columns, requests = zip(*batch, strict=True)
    parts = dict(zip(WEIGHTS, columns, strict=True))
    if vote is None:
        expected = [(2 * (a >= 0.2) + (b >= 0.5) - 3 * (c >= 0.5) + 3) / 6 for a, b, c, _ in batch]
        expected = torch.tensor(expected)
    else:
        expected = by_loop(parts, requests, vote)
    tensors = {t: torch.tensor(column) for t, column in parts.items()}
    got = fuse(KINDS[kind](), *rows(len(batch), parts=tensors, requests=requests))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_soft_votes_become_hard_ones():
    parts, context = rows(50, requests=[n // 5 for n in range(50)])
    for hard, soft in (
        (HardVoting(WEIGHTS), SoftVoting(WEIGHTS, temperature=1e-6)),
        (TopKVoting(WEIGHTS, k=2), TopKVoting(WEIGHTS, k=2, temperature=1e-7)),
    ):
        torch.testing.assert_close(fuse(soft, parts, context), fuse(hard, parts, context))


def test_stacking_is_a_logistic_regression_on_log_odds():
    parts = p(a=[0.9, 0.2], b=[0.5, 0.01], c=[0.3, 0.999])
    z = 1.5 * torch.logit(parts["a"]) + 0.5 * torch.logit(parts["b"]) - 0.7 * torch.logit(parts["c"]) + 0.3
    torch.testing.assert_close(stacked().double()(parts), torch.sigmoid(z), atol=1e-5, rtol=1e-4)
    with pytest.raises(KeyError):
        stacked().set_weights({"x": 1})


def test_a_monotone_network_can_learn_what_is_neither_convex_nor_concave():
    """A step and a plateau, with a negative task beside."""
    torch.manual_seed(0)
    fused, g = MonotoneNetwork({"a": 1, "c": -1}, hidden=[16, 16]), torch.Generator().manual_seed(1)
    a, c = torch.rand(2, 300, generator=g)
    truth = 0.1 + 0.35 * torch.sigmoid((a - 0.3) * 20) + 0.45 * torch.sigmoid((a - 0.8) * 20) - 0.09 * (c > 0.5)
    optimizer = torch.optim.Adam(fused.parameters(), 0.02)
    for _ in range(120):
        optimizer.zero_grad()
        loss = (fused({"a": a, "c": c}) - truth).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.08 * truth.var()


def test_a_gate_starts_as_the_weighted_mean_and_its_shares_follow_the_context():
    parts, context = rows(6)
    fused = ContextGatedMean(WEIGHTS, features={"u": 4}, dense_columns=[1])
    torch.testing.assert_close(fused(parts, context), WeightedMean(WEIGHTS)(parts))
    shares = shaken(fused).shares(context)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    assert shares.std(0).min() > 1e-3
    fused.set_weights({"b": 0.0})
    assert torch.equal(fused.shares(context)[:, 1], torch.zeros(6))
    with pytest.raises(ValueError, match=r"no pooled embedding 'u' in the context \(did you mean 'us'"):
        fused(parts, RowContext(context.dense_features, {"us": context.embeddings["u"]}))


def test_contributions_add_up_to_what_each_class_says():
    parts, context = rows(6, requests=[0, 0, 0, 1, 1, 1])

    def of(kind, fused=None):
        fused = fused or KINDS[kind]()
        return fused, sum(contributions(fused, parts, context).values()), fuse(fused, parts, context)

    for kind in ("weighted_mean", "soft_voting", "hard_voting", "top_k_voting", "borda", "reciprocal_rank"):
        _, total, score = of(kind)
        torch.testing.assert_close(total + 0.5, score)
    _, total, score = of("weighted_geometric_mean")
    torch.testing.assert_close(total.exp(), score)
    fused, total, score = of("stacking")
    torch.testing.assert_close(torch.sigmoid(total + fused.bias), score)
    fused, total, score = of("context_gated_mean")
    torch.testing.assert_close(total + fused.shares(context)[:, 2], score)
    _, total, score = of("power_product")
    assert torch.equal(total.argsort(), score.argsort())
    assert contributions(KINDS["monotone_network"](), parts, context) is None
    assert contributions(nn.Identity(), parts, context) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedGeometricMean({"a": 1}, floor=0), "floor"),
        (lambda: PowerProduct({"a": -1}), "positive weight and a negative exponent"),
        (lambda: PowerProduct({"a": 1}, bases={"a": 0}), "bases are above 0"),
        (lambda: PowerProduct({"a": 1}, exponents={"a": 0}), "whose weight and exponent are not 0"),
        (lambda: PowerProduct({"a": 1}, exponents={"b": 1}), "exponents: 'b' is not part of this score"),
        (lambda: ExpectedValue({"buy": 1}, given={"buy": "bu"}), r"'bu' has no weight \(did you mean 'buy'"),
        (lambda: ExpectedValue({"a": 1, "b": 1}, given={"a": "b", "b": "a"}), "runs in a circle"),
        (lambda: ExpectedValue({"a": 1}, numbers={"b": PRICE}), "numbers: 'b' is not part"),
        (lambda: ExpectedValue({"a": 1}, scale=0), "scale"),
        (lambda: SoftVoting({"a": 1}, temperature=0), "temperature"),
        (lambda: HardVoting({"a": 1}, thresholds={"a": 1.5}), "thresholds lie between 0 and 1"),
        (lambda: TopKVoting({"a": 1}, k=0), "k is at least 1"),
        (lambda: ReciprocalRankFusion({"a": 1}, k=-1), "k is at least 0"),
        (lambda: Stacking({}), "a task at least"),
        (lambda: MonotoneNetwork({"a": 0}), "a sign of 1 or -1"),
        (lambda: MonotoneNetwork({"a": 1}, hidden=[0]), "a unit at least"),
        (lambda: ContextGatedMean({"a": 1}), "features or dense columns"),
        (lambda: Borda({"a": 0}), "at least one that is not 0"),
        # float32 holds each of them, and not their sum
        (lambda: WeightedMean({"a": 3e38, "b": -3e38}), "finite weights"),
        (lambda: WeightedGeometricMean({"a": 3e38, "b": 3e38}), "finite weights"),
        (lambda: Stacking({"a": 3e38, "b": -3e38}), "finite, and so is their sum"),
        # the product is the same for all items, or infinite
        (lambda: PowerProduct({"a": 1e-9}), "orders nothing"),
        (lambda: PowerProduct({"a": 9.0, "b": 9.0}, exponents={"a": 1e38, "b": 2e38}), "orders nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
