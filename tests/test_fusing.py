"""Fitting the fused score: objectives against plain loops, closed forms, search, constraints, a world with a truth."""

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score, roc_auc_score
from torch import nn

from mtcl_torchrec import ConfigError, DataError, WeightedMean
from mtcl_torchrec.data.impressions import draw_impressions
from mtcl_torchrec.evaluation.metrics import gauc
from mtcl_torchrec.evaluation.ranking import auc_by_request, auc_of, mean_and_error, ndcg_at_k, value_at_k
from mtcl_torchrec.fusing import Combiner, HeldOut, fit_fusion
from mtcl_torchrec.fusing.combiners import combiner_of, log_odds
from mtcl_torchrec.fusing.held_out import sessions
from mtcl_torchrec.fusing.search import unit
from mtcl_torchrec.fusing.targets import parse_target
from mtcl_torchrec.fusing.weights import influence_of, stacked_weights, weights_of_influence


def same(part):
    return part


# ---------------------------------------------------------------------- objectives


def drawn(seed, rows=60, requests=9, levels=5):
    """Requests of many sizes, scores with many ties, rewards of both signs."""
    rng = np.random.default_rng(seed)
    request = np.unique(rng.integers(0, requests, rows), return_inverse=True)[1]
    return request, rng.integers(0, levels, rows) / levels, rng.integers(-3, 5, rows).astype(float)


def expected_over_ties(scores, reward, k):
    """Σ over the k best, each row of a tie being as likely in each of the tie's places."""
    total, place = 0.0, 0
    for score in sorted(set(scores), reverse=True):
        tied = [r for s, r in zip(scores, reward, strict=True) if s == score]
        total += sum(tied) / len(tied) * max(0, min(len(tied), k - place))
        place += len(tied)
    return total


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12))
def test_value_at_k_is_the_sum_over_the_k_best(seed, k):
    request, scores, reward = drawn(seed)
    found = value_at_k(request, scores, reward, k)
    for r in range(len(found)):
        rows = request == r
        assert found[r] == pytest.approx(expected_over_ties(scores[rows], reward[rows], k))
    # without ties, simply the best
    distinct = np.random.default_rng(seed).permutation(len(scores)).astype(float)
    found = value_at_k(request, distinct, reward, k)
    for r in range(len(found)):
        rows = np.flatnonzero(request == r)
        assert found[r] == pytest.approx(reward[rows[np.argsort(-distinct[rows])][:k]].sum())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12))
def test_ndcg_is_scikit_learns(seed, k):
    request, scores, reward = drawn(seed)
    found = ndcg_at_k(request, scores, reward, k)
    for r in range(len(found)):
        rows = request == r
        gains = np.maximum(reward[rows], 0)
        if gains.max() == 0:
            assert math.isnan(found[r])
        elif rows.sum() > 1:
            assert found[r] == pytest.approx(ndcg_score(gains[None], scores[rows][None], k=k))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_grouped_auc_is_that_of_each_request(seed):
    request, scores, reward = drawn(seed)
    labels = np.where(reward == 4, np.nan, (reward > 0).astype(float))
    found, rows = auc_by_request(request, scores, labels)
    known = ~np.isnan(labels)
    for r in range(len(found)):
        mine = (request == r) & known
        assert rows[r] == mine.sum()
        if len(set(labels[mine])) == 2:
            assert found[r] == pytest.approx(roc_auc_score(labels[mine], scores[mine]))
        else:
            assert math.isnan(found[r])
    held_out = HeldOut({"a": scores}, {"a": labels}, request)
    both = parse_target("gauc:a", None, ["a"])(held_out, scores)
    assert both == pytest.approx(gauc(labels[known], scores[known], request[known]), nan_ok=True)
    assert auc_of(scores, labels) == pytest.approx(roc_auc_score(labels[known], scores[known]))


def test_a_standard_error_allows_for_requests_of_one_user_being_alike():
    rng = np.random.default_rng(0)
    alone = rng.standard_normal(400)
    assert mean_and_error(alone)[1] == pytest.approx(alone.std(ddof=1) / 20)
    alike, user = np.repeat(alone, 4), np.repeat(np.arange(400), 4)
    assert mean_and_error(alike, user)[1] == pytest.approx(mean_and_error(alone)[1])
    assert mean_and_error(alike)[1] < 0.6 * mean_and_error(alone)[1]


# ---------------------------------------------------------------------- held-out rows


def rows_of(seed=0, requests=300, candidates=12, noise=0.4, **options):
    """Impressions with parts that are the truth, or nearly."""
    rows = draw_impressions(requests, candidates, noise=noise, seed=seed, **options)
    return HeldOut(rows.probability, rows.labels, rows.request), rows.values


def test_folds_never_part_a_user_or_a_request():
    rng = np.random.default_rng(0)
    user = rng.integers(0, 40, 500)
    request = user * 10 + rng.integers(0, 5, 500)
    held_out = HeldOut({"a": rng.random(500)}, {"a": np.zeros(500)}, request, user)
    folds = held_out.folds(5, seed=3)
    assert all(len(set(folds[user == u])) == 1 for u in set(user))
    assert sorted(np.bincount(folds, minlength=5) > 50) == [True] * 5
    assert not np.array_equal(folds, held_out.folds(5, seed=4))
    without = HeldOut({"a": rng.random(500)}, {"a": np.zeros(500)}, request).folds(5)
    assert all(len(set(without[request == r])) == 1 for r in set(request))
    with pytest.raises(ConfigError, match="41 folds over 40 users"):
        held_out.folds(41)
    with pytest.raises(DataError, match="rows of two users"):
        HeldOut({"a": np.zeros(2)}, {}, np.array([1, 1]), np.array([5, 6]))


def test_what_is_no_part_is_refused():
    with pytest.raises(DataError, match=r"parts of 'a' are not all in \[0, 1\]"):
        HeldOut({"a": np.array([0.5, np.nan])}, {}, np.array([1, 2]))
    with pytest.raises(DataError, match="labels of 'b': 1 rows, but there are 2"):
        HeldOut({"a": np.zeros(2)}, {"b": np.zeros(1)}, np.array([1, 2]))
    with pytest.raises(ConfigError, match=r"values: no labels of a task 'lke'.*'like'"):
        HeldOut({"like": np.zeros(1)}, {"like": np.zeros(1)}, np.array([1])).reward({"lke": 1})


def test_sessions_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    user, time = rng.integers(0, 6, 200), rng.integers(0, 3000, 200)
    found = sessions(user, time, 50)
    for u in range(6):
        rows = np.flatnonzero(user == u)
        rows = rows[np.argsort(time[rows])]
        for a, b in pairwise(rows):
            assert (found[a] == found[b]) == (time[b] - time[a] <= 50)
    assert len({(u, s) for u, s in zip(user, found, strict=True)}) == len(set(found))


# ---------------------------------------------------------------------- weights in closed form


def test_stacking_finds_the_weights_of_the_reward():
    held_out, values = rows_of(requests=400)
    tasks = list(values)
    exact = sum(v * held_out.parts[t] for t, v in values.items())
    found = stacked_weights(held_out, tasks, same, exact, binary=False, ridge=1e-6)
    assert found == pytest.approx(values, rel=1e-3)
    label = held_out.labels["click"]
    found = stacked_weights(held_out, ["click", "like"], log_odds, label, binary=True, ridge=1e-6)
    plain = LogisticRegression(C=1e9).fit(np.stack([log_odds(held_out.parts[t]) for t in ("click", "like")], 1), label)
    assert list(found.values()) == pytest.approx(plain.coef_[0].tolist(), rel=0.01, abs=0.01)
    with pytest.raises(ConfigError, match="the reward is the same in all rows"):
        stacked_weights(held_out, tasks, same, np.zeros(len(held_out)), binary=False)


def test_influence_is_the_share_of_the_scores_variance_within_requests():
    held_out, values = rows_of()
    found = influence_of(held_out, values, same)
    centred = {}
    for task, part in held_out.parts.items():
        means = np.array([part[held_out.request == r].mean() for r in range(held_out.requests)])
        centred[task] = part - means[held_out.request]
    score = sum(values[t] * centred[t] for t in values)
    for task in values:
        assert found[task] == pytest.approx((values[task] * centred[task] * score).mean() / (score**2).mean())
    assert sum(found.values()) == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(shares=st.lists(st.floats(0.05, 0.4), min_size=1, max_size=2), seed=st.integers(0, 50))
def test_weights_give_the_influence_asked_for(shares, seed):
    held_out, values = rows_of(seed, requests=50)
    asked = dict(zip(["like", "report"], shares, strict=False))
    weights = weights_of_influence(held_out, values, asked, same)
    found = influence_of(held_out, weights, same)
    for task, share in asked.items():
        assert found[task] == pytest.approx(share, abs=1e-6)
        assert np.sign(weights[task]) == np.sign(values[task])
    # the others keep their weights among each other
    assert weights["click"] / weights["buy"] == pytest.approx(values["click"] / values["buy"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"lke": 0.5}, "no task 'lke' .*'like'"),
        ({"like": 0.0}, "the share of 'like' lies above 0"),
        ({"like": 0.7, "buy": 0.7}, "add up to 1.4"),
    ],
)
def test_influence_that_cannot_be_is_refused(asked, said):
    held_out, values = rows_of(requests=20)
    with pytest.raises(ConfigError, match=said):
        weights_of_influence(held_out, values, asked, same)
    with pytest.raises(ConfigError, match=said):
        fit_fusion(held_out, values=values, influence=asked, search="none")


# ---------------------------------------------------------------------- fitting


@pytest.mark.parametrize("search", ["tpe", "cma"])
def test_a_search_finds_weights_that_no_rule_gives(search):
    """Two heads are noise and one is on another scale; the target is a function of one's own."""
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(250), 8)
    a, b, noise = rng.random((3, 2000))
    truth = 0.35 * a + 0.65 * b

    def correlation(rows, scores):
        return float(np.corrcoef(scores, rows.labels["truth"])[0, 1])

    held_out = HeldOut({"a": a, "b": b / 100, "noise": noise}, {"truth": truth}, request)
    fitted = fit_fusion(
        held_out, target=correlation, combiners=["weighted_mean"], search=search, trials=60, folds=3, front_points=0
    )
    assert fitted.chosen.method == "search"
    assert fitted.chosen.mean > 0.995
    assert fitted.weights["a"] / (fitted.weights["b"] / 100) == pytest.approx(0.35 / 0.65, rel=0.15)
    assert fitted.target.name == "correlation"


def test_equal_arguments_give_an_equal_fusion_and_all_of_it_is_json():
    held_out, values = rows_of(requests=80)
    steps = []
    first, again = (
        fit_fusion(
            held_out, values=values, target="ndcg@3", trials=8, folds=3, front_points=5, seed=4,
            progress=lambda done, total, doing: steps.append((done, total)),
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.report() == again.report()
    assert steps[-1][0] == steps[-1][1]
    assert json.loads(json.dumps(first.report(), allow_nan=False))["folds"] == 3
    other = fit_fusion(held_out, values=values, target="ndcg@3", trials=8, folds=3, front_points=5, seed=5)
    assert other.report() != first.report()
    table = first.table()
    assert {"head click", "weighted_mean, values", "weighted_mean, search"} <= set(table["name"])
    assert list(table["target"]) == sorted(table["target"], reverse=True)


class Product(nn.Module):
    """A fused score of one's own."""

    def __init__(self, weights):
        super().__init__()
        self.tasks, self.w = tuple(weights), torch.tensor(list(weights.values()))

    def forward(self, parts):
        return torch.stack([parts[t] for t in self.tasks], 1).clamp_min(1e-6).pow(self.w.abs()).prod(1)


def test_a_combiner_of_ones_own_is_fitted_beside_ours():
    held_out, _ = rows_of(requests=60)
    fitted = fit_fusion(
        held_out, values={"click": 1, "like": 8}, target="value@3", trials=6, folds=2, front_points=4,
        combiners=["weighted_mean", Combiner("product", Product, spread=lambda p: np.log(np.maximum(p, 1e-6)))],
    )  # fmt: skip
    assert {t.combiner for t in fitted.tried} == {"weighted_mean", "product"}
    assert set(fitted.weights) == {"click", "like"}


def test_constraints_are_kept_or_it_is_said_how_far_the_best_came():
    held_out, values = rows_of(requests=100)
    options = {"values": values, "target": "value@3", "trials": 20, "folds": 2, "front_points": 0}
    free = fit_fusion(held_out, **options, combiners=["weighted_mean"])
    like = parse_target("auc:like", None, ["like"])
    least = like(held_out, held_out.scores(free.fused_score)) + 0.03
    fitted = fit_fusion(
        held_out, **options, combiners=["weighted_mean"],
        constraints=[f"auc:like >= {least:.4f}", "weight:report <= -0.3"],
    )  # fmt: skip
    assert like(held_out, held_out.scores(fitted.fused_score)) >= round(least, 4)
    assert unit(fitted.weights)["report"] <= -0.3
    assert not fitted.chosen.broken
    shared = fit_fusion(held_out, **options, combiners=["weighted_mean"], constraints=["share:click >= 0.5"])
    assert influence_of(held_out, shared.weights, same)["click"] >= 0.5
    with pytest.raises(ConfigError, match=r"no weights keep to all constraints; the nearest, .*like >= 0.99 came"):
        fit_fusion(held_out, **options, combiners=["weighted_mean"], constraints=["auc:like >= 0.99"])


def test_by_auc_better_is_the_mean_over_folds_of_which_each_has_weights_of_its_own():
    held_out, values = rows_of(requests=80)
    fitted = fit_fusion(
        held_out, values=values, target="auc:like", combiners=["weighted_mean"], trials=10, folds=4, front_points=0
    )
    for one in fitted.tried:
        apart = one.of_fold - next(t for t in fitted.tried if t.method == f"head {one.against}").of_fold
        assert one.better == pytest.approx(apart.mean())
        assert one.better_error == pytest.approx(apart.std(ddof=1) / 2)
    by_values = next(t for t in fitted.tried if t.method == "values")
    assert set(by_values.weights_std.values()) == {0.0}
    poor = fit_fusion(
        held_out, values={"like": 0.01, "report": 10}, target="auc:like", combiners=["weighted_mean"], search="none",
        front_points=0,
    )  # fmt: skip
    assert poor.method != "values"
    assert poor.left_for_values is None


def test_what_is_left_for_the_values_is_said():
    held_out, values = rows_of(requests=80)
    fitted = fit_fusion(held_out, values=values, target="value@3", search="none", folds=4, front_points=0)
    first = max((t for t in fitted.tried if t.combiner), key=lambda t: t.mean)
    assert fitted.method == "values"
    assert first.name != "weighted_mean, values"  # else there is nothing to say
    name, ahead, half = fitted.left_for_values
    assert name == first.name
    by_values = next(t for t in fitted.tried if t.name == "weighted_mean, values")
    apart, error = fitted.target.difference(held_out, first.scores, by_values.scores)
    # Kish's effective number of requests, of what those brought (or cost) that leave a choice.
    brought = np.bincount(held_out.numbers, np.abs(held_out.reward(values)))[held_out.rows_of_requests > 3]
    effective = brought.sum() ** 2 / (brought**2).sum()
    assert (ahead, half) == (apart, pytest.approx(student.ppf(0.975, effective - 1) * error))
    assert ahead <= half


def test_what_was_chosen_is_worth_the_same_wherever_it_is_said():
    """Folds have not equally many requests: the mean of their means is another number than the mean of all."""
    held_out, values = rows_of(requests=83)
    fitted = fit_fusion(held_out, values=values, target="value@3", search="none", folds=4, front_points=0)
    assert fitted.chosen.mean == pytest.approx(fitted.pays.worth, rel=1e-12)
    assert fitted.chosen.mean != pytest.approx(fitted.chosen.of_fold.mean(), rel=1e-6)
    by_auc = fit_fusion(held_out, target="auc:like", search="none", folds=4, front_points=0)
    assert by_auc.chosen.mean == pytest.approx(by_auc.chosen.of_fold.mean()) == pytest.approx(by_auc.pays.worth)


def test_a_handful_of_events_makes_no_lead_sure():
    held_out, _ = rows_of(requests=80)
    happened = np.flatnonzero(held_out.labels["like"] > 0)[:9]
    few = {**held_out.labels, "like": np.zeros(len(held_out)), "click": np.zeros(len(held_out))}
    few["like"][happened] = 1
    rare = dataclasses.replace(held_out, labels=few)
    fitted = fit_fusion(rare, values={"like": 1.0, "click": 1.0}, target="value@3", search="none", front_points=0)
    assert np.isnan([[t.half, t.better_half] for t in fitted.tried]).all()
    assert fitted.pays.unsure == "too few events (9)"
    assert fitted.method == "values"
    assert rare.requests > 20


def test_a_target_of_influence_is_met_by_all_that_is_tried():
    held_out, values = rows_of(requests=80)
    fitted = fit_fusion(
        held_out, values=values, target="value@3", influence={"like": 0.5}, trials=10, folds=2, front_points=0
    )
    assert fitted.influence["like"] == pytest.approx(0.5, abs=1e-6)
    for one in fitted.tried:
        if one.combiner == "weighted_mean":
            assert influence_of(held_out, one.weights, same)["like"] == pytest.approx(0.5, abs=1e-6)


def test_without_values_all_tasks_enter_whatever_one_of_them_is_asked():
    held_out, _ = rows_of(requests=60)
    options = {"target": "auc:click", "search": "none", "folds": 2, "front_points": 0, "combiners": ["weighted_mean"]}
    fitted = fit_fusion(held_out, **options, influence={"like": 0.5}, constraints=["auc:like >= 0.1"])
    assert fitted.influence["like"] == pytest.approx(0.5, abs=1e-6)
    assert set(fitted.weights) == set(held_out.parts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "value@5"}, "needs values"),
        ({"target": "ndcg@5", "values": {"report": -1}}, "needs a positive value"),
        ({"target": "auc:lke"}, "no task 'lke' with labels.*'like'"),
        ({"target": "hits@5"}, "no target 'hits@5'; there are value@K"),
        ({"target": "auc:like", "tasks": ["cick"]}, "tasks: no task 'cick' has predictions.*'click'"),
        ({"target": "value@5", "values": {"nix": 1}}, "values: no task 'nix' has predictions; there are: click, "),
        ({"target": "auc:like", "combiners": ["weighted_men"]}, "no combiner 'weighted_men'.*'weighted_mean'"),
        ({"target": "auc:like", "combiners": []}, "give one at least"),
        ({"target": "auc:like", "constraints": ["like more"]}, "constraint 'like more': expected such as"),
        ({"target": "auc:like", "constraints": ["auc:lik >= 1"]}, "constraint 'auc:lik >= 1': auc:lik: no task 'lik'"),
        ({"target": "auc:like", "constraints": ["value@5 >= 1"]}, "needs values"),
        ({"target": "auc:like", "folds": 1}, "1 folds over 20 requests"),
        ({"target": "value@5", "values": {"like": math.nan}}, "values are finite numbers"),
    ],
)
def test_mistakes_are_named(options, said):
    held_out, _ = rows_of(requests=20)
    with pytest.raises(ConfigError, match=said):
        fit_fusion(held_out, search="none", **options)


def random_rows(rows=60, requests=20, **changed):
    """Parts and labels that have nothing to do with each other."""
    rng = np.random.default_rng(0)
    parts = {task: rng.random(rows) for task in "abc"} | changed.pop("parts", {})
    labels = {task: (rng.random(rows) < 0.4).astype(float) for task in "abc"} | changed.pop("labels", {})
    return HeldOut(parts, labels, np.arange(rows) * requests // rows, **changed)


ZERO, ONE_EVENT = np.zeros(60), np.eye(60)[5]
WORTH = {"a": 1.0, "b": 5.0, "c": -3.0}


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ({"labels": {"a": ONE_EVENT, "b": ZERO, "c": ZERO}}, {}),  # nothing happened in some folds
        ({"labels": {"a": ONE_EVENT, "b": ZERO, "c": ZERO}}, {"combiners": ["all"], "search": "tpe", "trials": 1}),
        ({"labels": {"a": ONE_EVENT, "b": ZERO, "c": ZERO}}, {"target": "gauc:a", "values": None}),
        ({"labels": {"a": ZERO + np.nan, "b": ZERO}}, {}),
        ({"parts": dict.fromkeys("abc", ZERO + 0.5)}, {}),  # all candidates are equal
        ({"parts": {"a": ZERO, "b": ZERO + 1}}, {}),
        ({"requests": 60}, {"target": "ndcg@2"}),  # one row each
        ({"rows": 3, "requests": 3}, {"folds": 2, "target": "ndcg@2"}),
        ({}, {"values": {"a": -1.0, "b": -2.0}}),
        ({}, {"values": {"a": 1e-11, "b": 9e11}}),
        ({}, {"constraints": ["share:b >= 0.2", "weight:a >= 0.05"], "search": "tpe", "trials": 2}),
    ],
)
def test_what_finds_no_weights_is_left_out_and_the_rest_is_fitted(rows, options, recwarn):
    options = {"values": WORTH, "target": "value@2", "folds": 3, "search": "none", "front_points": 3} | options
    fitted = fit_fusion(random_rows(**rows), **options)
    assert np.isfinite(list(fitted.weights.values())).all()
    assert json.loads(json.dumps(fitted.report(), allow_nan=False))["influence"] == fitted.influence
    names = {one.name for one in fitted.tried}
    assert not names & set(fitted.about["left_out"])
    if "labels" in rows and "target" not in options:
        assert "the same in all rows" in fitted.about["left_out"]["weighted_mean, stacking"]
    assert not [w for w in recwarn if "numpy" in str(w.filename) or "mtcl_torchrec" in str(w.filename)]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ({"labels": dict.fromkeys("abc", ZERO)}, {}, r"each of these 60 rows brought the same \(0\)"),
        ({"labels": dict.fromkeys("abc", ZERO + np.nan)}, {}, "brought the same"),
        ({}, {"values": {"a": 0.0}}, "brought the same"),
        ({"labels": dict.fromkeys("abc", ZERO)}, {"target": "auc:a", "values": None}, "the target is not defined"),
        ({"rows": 1, "requests": 1}, {"target": "auc:a", "values": None}, "3 folds over 1 requests"),
        ({"user": np.zeros(60, np.int64)}, {}, "3 folds over 1 users"),
        ({"requests": 60}, {}, "no request has more than one row, .*: take longer requests"),
        ({}, {"target": "value@3"}, r"target value@3: no request has more than 3 rows, .*: take value@2, or longer"),
        ({}, {"values": {"a": 1e300}}, "of a size between"),
        ({}, {"values": {"a": 1e-300}}, "of a size between"),
        ({"parts": {"a": ZERO}}, {"influence": {"a": 0.5}}, "the part of a is the same in all rows of each request"),
        ({}, {"constraints": ["auc:a <= -1"]}, "no weights keep to all constraints"),
        ({}, {"constraints": ["weight:a >= 1e999"]}, "no weights keep to all constraints"),
        ({}, {"constraints": ["weight:a >= 1"], "combiners": ["monotone_network"]}, "no weights that stay the same"),
        ({}, {"target": lambda rows, scores: float("nan")}, "the target is not defined"),
    ],
)
def test_rows_that_say_nothing_are_one_clear_error(rows, options, said):
    options = {"values": WORTH, "target": "value@2", "folds": 3, "search": "none", "front_points": 3} | options
    with pytest.raises(ConfigError, match=said):
        fit_fusion(random_rows(**rows), **options)


def test_labels_without_bounds_are_refused():
    with pytest.raises(DataError, match="labels of 'a' are not all finite"):
        random_rows(labels={"a": ZERO + np.inf})
    with pytest.raises(DataError, match="one task and one row"):
        HeldOut({"a": np.empty(0)}, {}, np.empty(0, np.int64))


def test_constraints_hold_on_rows_that_nothing_was_fitted_on_but_for_noise():
    (fit, values), (test, _) = rows_of(1, requests=1000), rows_of(2, requests=1000)
    options = {"values": values, "target": "value@3", "trials": 10, "folds": 2, "front_points": 0}
    free = fit_fusion(fit, **options, combiners=["weighted_mean"])
    click = parse_target("auc:click", None, ["click"])
    least = click(fit, fit.scores(free.fused_score)) + 0.05
    kept = fit_fusion(fit, **options, combiners=["weighted_mean"], constraints=[f"auc:click >= {least:.4f}"])
    gained = click(test, test.scores(kept.fused_score)) - click(test, test.scores(free.fused_score))
    assert gained > 0.04
    shared = fit_fusion(fit, **options, combiners=["weighted_mean"], influence={"like": 0.5}, search="none")
    assert influence_of(test, shared.weights, same)["like"] == pytest.approx(0.5, abs=0.03)


def test_the_standard_error_is_how_far_the_mean_is_off():
    """Of many draws of users, whose requests are alike, the means spread as each draw says of itself."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        user = np.repeat(np.arange(40), rng.integers(1, 6, 40))  # requests
        taste = rng.random(40)[user]
        label = (rng.random((len(user), 6)) < taste[:, None]).astype(float).ravel()
        score = rng.random(len(label))
        request = np.repeat(np.arange(len(user)), 6)
        rows = HeldOut({"a": score}, {"a": label}, request, user[request])
        found.append(parse_target("value@2", {"a": 1.0}, ["a"]).with_error(rows, score))
    means, errors = np.array(found).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(ddof=1), rel=0.12)
    # Without users, each request counts as one of its own, which is far too sure of itself.
    alone = HeldOut({"a": score}, {"a": label}, request)
    assert parse_target("value@2", {"a": 1.0}, ["a"]).with_error(alone, score)[1] < 0.75 * means.std(ddof=1)


def test_what_is_missing_says_which_extra_brings_it(monkeypatch):
    held_out, values = rows_of(requests=20)
    for search, library in (("tpe", "optuna"), ("cma", "cmaes")):
        monkeypatch.setitem(__import__("sys").modules, library, None)
        with pytest.raises(ConfigError, match=rf"{library}: pip install 'mtcl_torchrec\[tune\]'"):
            fit_fusion(held_out, values=values, search=search, folds=2)
    assert fit_fusion(held_out, values=values, search="none", folds=2, front_points=0).weights


def test_the_front_holds_what_no_other_ranking_beats(tmp_path):
    held_out, values = rows_of(requests=100)
    fitted = fit_fusion(held_out, values=values, target="value@3", search="none", folds=2, front_points=30)
    losses = fitted.front[[c for c in fitted.front if c.startswith("loss ")]].to_numpy()
    for i, on_front in enumerate(fitted.front["front"]):
        beaten = any((other <= losses[i]).all() and (other < losses[i]).any() for other in losses)
        assert on_front == (not beaten)
    alone = fitted.front.loc[fitted.front["name"] == "head report", "loss report"]
    assert alone.item() == pytest.approx(0, abs=1e-6)
    fitted.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    without = fit_fusion(held_out, values=values, search="none", folds=2, front_points=0)
    with pytest.raises(ConfigError, match="front_points was 0"):
        without.plot(tmp_path / "none.png")


# ---------------------------------------------------------------------- a world with a truth


def calibrated(fitted_on, rows):
    """Platt scaling of each head, fitted on other rows."""
    return {
        name: LogisticRegression(C=1e6)
        .fit(log_odds(fitted_on.predicted[name])[:, None], fitted_on.labels[name])
        .predict_proba(log_odds(rows.predicted[name])[:, None])[:, 1]
        for name in rows.values
    }


def borda(predicted, values, candidates):
    """Σ of the places within a request, the unwanted event's turned round."""
    places = {t: p.reshape(-1, candidates).argsort(1).argsort(1).ravel() for t, p in predicted.items()}
    return sum(np.sign(values[t]) * places[t] for t in values).astype(float)


def test_calibrated_values_reach_the_oracle_and_stacking_recovers_them():
    fit, test = draw_impressions(6000, 30, seed=1), draw_impressions(3000, 30, seed=2)
    values = test.values
    held_out = HeldOut(calibrated(fit, fit), fit.labels, fit.request)
    judged = HeldOut(calibrated(fit, test), test.labels, test.request)
    fitted = fit_fusion(
        held_out, values=values, target="value@10", combiners=["weighted_mean"], search="none", front_points=0
    )
    stacked = next(t for t in fitted.tried if t.method == "stacking").weights
    rankings = {
        "oracle": test.expected_value,
        "calibrated values": judged.scores(WeightedMean(values)),
        "fitted": judged.scores(fitted.fused_score),
        "stacking": judged.scores(WeightedMean(stacked)),
        "raw values": sum(v * test.predicted[t] for t, v in values.items()),
        "uniform mean": sum(test.predicted.values()),
        "borda": borda(test.predicted, values, 30),
    }
    # By what the rows are truly worth, which has less noise than what happened, and the same mean.
    worth = {n: value_at_k(test.request, s, test.expected_value, 10).mean() for n, s in rankings.items()}
    happened = {n: parse_target("value@10", values, values).with_error(judged, s) for n, s in rankings.items()}
    print({n: (round(w, 3), *(round(x, 3) for x in happened[n])) for n, w in worth.items()}, stacked)
    assert worth["calibrated values"] >= 0.95 * worth["oracle"]
    assert worth["fitted"] >= 0.95 * worth["oracle"]
    assert worth["stacking"] >= 0.95 * worth["oracle"]
    for poorer in ("raw values", "uniform mean", "borda"):
        assert worth[poorer] < worth["calibrated values"] - 0.2
    for task in ("click", "like", "report"):
        assert stacked[task] / stacked["buy"] == pytest.approx(values[task] / values["buy"], rel=0.2)
    assert combiner_of("weighted_mean").config(stacked).weights == pytest.approx(stacked)
