"""Fitting what is more than weights: chains and prices, votes, exponents, places in a request, scores that learn."""

import numpy as np
import pytest
import torch

from mtcl_torchrec import ConfigError, DataError
from mtcl_torchrec.data.impressions import draw_impressions
from mtcl_torchrec.evaluation.ranking import value_at_k
from mtcl_torchrec.fusing import HeldOut, fit_fusion
from mtcl_torchrec.fusing.combiners import combiner_of, context_gated_mean, known_kinds, resolved
from mtcl_torchrec.modules.fusion import DenseNumber, ExpectedValue
from mtcl_torchrec.training.fused import build_fused_score

QUICK = {"search": "none", "folds": 2, "front_points": 0}


def world(seed=0, requests=100, candidates=12, **options):
    rows = draw_impressions(requests, candidates, noise=0.4, seed=seed)
    hour = np.random.default_rng(seed).standard_normal((len(rows.request), 2))
    context = {"dense_features": hour[:, :1], "embeddings": {"hour": hour}} | options
    return HeldOut(rows.probability, rows.labels, rows.request, **context), rows.values


def test_all_kinds_are_tried_and_judged_and_each_can_be_built_again():
    held_out, values = world()
    fitted = fit_fusion(held_out, values=values, target="value@4", combiners=["all"], trials=2, folds=2, front_points=2)
    tried = {t.combiner for t in fitted.tried}
    assert tried == set(known_kinds()) - {"expected_value"}  # which needs a chain of events, or a price
    for one in fitted.tried:
        assert np.isfinite(one.mean)
        scores = held_out.scores(one.setting.fused_score)
        assert scores.min() >= 0
        assert scores.max() <= 1
        config = one.setting.config
        if one.combiner == "context_gated_mean":
            assert config is None  # nobody said which features of a schema it reads
            continue
        again = build_fused_score(config, [])
        again.load_state_dict(one.setting.fused_score.state_dict())
        np.testing.assert_array_equal(held_out.scores(again), scores)
    assert {c.name for c in resolved(None, held_out)} == {"weighted_mean", "weighted_geometric_mean", "stacking"}


def test_a_score_that_learns_ends_as_good_as_the_value_model_and_is_the_same_each_time():
    fit, test = (draw_impressions(250, 12, noise=0.4, seed=seed) for seed in (1, 2))
    held_out = HeldOut(fit.probability, fit.labels, fit.request)
    judged = HeldOut(test.probability, test.labels, test.request)
    options = {"values": fit.values, "target": "value@5", "combiners": ["monotone_network"], **QUICK}
    first, again = fit_fusion(held_out, **options), fit_fusion(held_out, **options)
    assert first.method == "trained"
    for name, value in first.fused_score.state_dict().items():
        assert torch.equal(value, again.fused_score.state_dict()[name])
    assert not any(p.requires_grad for p in first.fused_score.parameters())
    worth = value_at_k(test.request, judged.scores(first.fused_score), test.expected_value, 5).mean()
    best = value_at_k(test.request, test.expected_value, test.expected_value, 5).mean()
    assert worth > 0.95 * best  # its parts are the truth
    rows = {task: part.copy() for task, part in judged.parts.items()}
    rows["report"] = np.minimum(rows["report"] + 0.05, 1)
    assert (judged.with_parts(rows).scores(first.fused_score) <= judged.scores(first.fused_score)).all()


def test_a_context_gate_finds_what_one_set_of_weights_cannot():
    """In one half of the requests the first head is noise, in the other the second."""
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(300), 10)
    evening = (request % 2).astype(float)
    truth = rng.random(3000)
    noise = rng.random((2, 3000))
    parts = {"a": np.where(evening, truth, noise[0]), "b": np.where(evening, noise[1], truth)}
    label = (rng.random(3000) < truth).astype(float)
    held_out = HeldOut(parts, {"a": label, "b": label}, request, dense_features=evening[:, None] - 0.5)
    gate = context_gated_mean(features={}, dense_columns=[0], names=["evening"])
    fitted = fit_fusion(
        held_out, target="gauc:a", combiners=["weighted_mean", gate], search="tpe", trials=5, folds=3, front_points=3
    )
    assert fitted.combiner.name == "context_gated_mean"
    by_weights = max(t.mean for t in fitted.tried if t.combiner == "weighted_mean")
    assert fitted.chosen.mean > by_weights + 0.05
    assert fitted.config.features == ["evening"]
    assert "starts at" not in fitted.table()
    assert fitted.front["front"].any()  # drawn of weighted means


def priced(seed=0, requests=500):
    """Items of which some are dear: a sale brings a tenth of the price, a click 0.1."""
    rng = np.random.default_rng(seed)
    n = requests * 8
    click, buy, price = rng.beta(1, 3, n), rng.beta(1, 3, n), np.exp(rng.normal(2, 1, n))
    clicked = (rng.random(n) < click).astype(float)
    bought = np.where(clicked == 1, (rng.random(n) < buy).astype(float), np.nan)
    number = DenseNumber(0, mean=1.0, std=2.0, transform="log", name="price")
    dense = ((np.log1p(price) - 1.0) / 2.0)[:, None]
    return (
        HeldOut(
            {"click": click, "buy": buy}, {"click": clicked, "buy": bought}, np.repeat(np.arange(requests), 8),
            dense_features=dense, given={"buy": "click"}, item_numbers={"buy": number},
        ),
        price, 0.1 * click + 0.1 * price * click * buy,
    )  # fmt: skip


def test_an_expected_value_follows_the_chain_and_the_price_and_its_values_are_found():
    held_out, price, worth = priced()
    np.testing.assert_allclose(held_out.amounts["buy"], price, rtol=1e-5)
    values = {"click": 0.1, "buy": 0.1}
    reward = 0.1 * held_out.labels["click"] + 0.1 * price * np.nan_to_num(held_out.labels["buy"])
    np.testing.assert_allclose(held_out.reward(values), reward, rtol=1e-5)
    np.testing.assert_allclose(held_out.take(price > 9).reward(values), reward[price > 9], rtol=1e-5)
    fitted = fit_fusion(held_out, values=values, target="value@2", **QUICK)  # of what is tried by default
    assert (fitted.combiner.name, fitted.method) == ("expected_value", "values")
    assert isinstance(fitted.fused_score, ExpectedValue)
    order = np.argsort(held_out.scores(fitted.fused_score))
    assert (np.diff(worth[order]) > -1e-6).all()
    assert fitted.config.given == {"buy": "click"}
    assert fitted.config.numbers == {"buy": "price"}
    by_mean = next(t for t in fitted.tried if t.name == "weighted_mean, values")
    assert fitted.chosen.mean > by_mean.mean + 2 * fitted.chosen.error
    assert sum(fitted.influence.values()) == pytest.approx(1)
    stacked = next(t for t in fitted.tried if t.name == "expected_value, stacking").weights
    assert stacked["buy"] / stacked["click"] == pytest.approx(1, rel=0.25)
    # a task whose event must come first need not be worth anything
    alone = fit_fusion(held_out, values={"buy": 1}, target="value@2", combiners=["expected_value"], **QUICK)
    assert alone.config.weights == {"buy": 1, "click": 0}
    with pytest.raises(DataError, match="item_numbers are read from the dense features"):
        HeldOut(held_out.parts, {}, held_out.request, item_numbers=held_out.item_numbers)


@pytest.mark.parametrize(
    ("kind", "truth"),
    [
        ("hard_voting", lambda a, b: 1.0 * (a > 0.85) + 2.0 * (b > 0.02)),
        ("soft_voting", lambda a, b: 1.0 * (a > 0.85) + 2.0 * (b > 0.02)),
        ("power_product", lambda a, b: (1 + 8 * a) ** 3 * (1 + 20 * b) ** -0.5),
    ],
)
def test_a_search_turns_thresholds_and_exponents_too(kind, truth):
    rng = np.random.default_rng(0)
    a, b = rng.random(1500), rng.random(1500) / 10
    label = truth(a, b)

    def correlation(rows, scores):
        return float(np.corrcoef(scores, rows.labels["a"])[0, 1])

    held_out = HeldOut({"a": a, "b": b}, {"a": label, "b": label}, np.repeat(np.arange(150), 10))
    fitted = fit_fusion(
        held_out, target=correlation, combiners=[kind], search="cma", trials=100, folds=2, front_points=0
    )
    assert fitted.method == "search"
    start = next(t for t in fitted.tried if t.method == "all alike")
    assert fitted.chosen.mean > max(0.8, start.mean + 0.02)
    if kind == "hard_voting":
        assert fitted.options["thresholds"]["a"] == pytest.approx(0.85, abs=0.05)
        assert fitted.options["thresholds"]["b"] == pytest.approx(0.02, abs=0.01)
    assert fitted.report()["options"] == fitted.options


def test_borda_has_weights_by_regression_and_an_influence():
    held_out, values = world()
    fitted = fit_fusion(held_out, values=values, target="value@4", combiners=["borda"], **QUICK)
    assert {t.method for t in fitted.tried} == {"all alike", "values", "stacking"}
    assert sum(fitted.influence.values()) == pytest.approx(1)
    shared = fit_fusion(
        held_out, values=values, target="value@4", combiners=["borda", "hard_voting"], influence={"like": 0.5}, **QUICK
    )
    assert shared.influence["like"] == pytest.approx(0.5, abs=1e-4)
    assert {t.combiner for t in shared.tried} == {"borda"}  # the influence on votes cannot be told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"combiners": ["monotone_network"], "target": lambda rows, scores: 1.0}, "learns from what a row brought"),
        ({"combiners": ["monotone_network"], "target": "auc:like", "constraints": ["weight:like >= 0.1"]},
         "a monotone_network has no weights that stay the same"),
        ({"combiners": ["context_gated_mean"], "target": "auc:like"}, "these rows have none"),
        ({"combiners": ["hard_votin"], "target": "auc:like"}, "no combiner 'hard_votin'.*'hard_voting'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, said):
    held_out, _ = world(requests=20, dense_features=None, embeddings={})
    with pytest.raises(ConfigError, match=said):
        fit_fusion(held_out, **options, **QUICK)


def test_kinds_by_name_take_from_the_rows_what_they_read():
    held_out, values = world(requests=20)
    gate = combiner_of("context_gated_mean", held_out).build(values)
    assert gate.features == {"hour": 2}
    assert gate.dense_columns.tolist() == [0]
