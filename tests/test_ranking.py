"""Rankings against loops over all orders of equal scores, against ranx and scikit-learn, and at a million rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from mtcl_torchrec.evaluation.ranking import Ranking, mean_and_error

ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([0.1, 0.2, 0.3]), st.integers(0, 1)), min_size=1, max_size=12
)


def in_all_orders(scores, labels, measure):
    """The mean of a measure of a list over the orders that equal scores allow."""
    found = [
        measure([labels[i] for i in order])
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean(found)


def measures(k):
    def average_precision(y):
        return np.mean([np.mean(y[: i + 1]) for i, label in enumerate(y) if label])

    def ndcg(y):
        discount = 1 / np.log2(2 + np.arange(len(y)))
        ideal = np.sort(y)[::-1]
        return (discount[:k] * y[:k]).sum() / (discount[:k] * ideal[:k]).sum()

    return {
        "recall_at_k": lambda y: sum(y[:k]) / sum(y),
        "hit_at_k": lambda y: float(any(y[:k])),
        "ndcg_at_k": ndcg,
        "reciprocal_rank": lambda y: 1 / (1 + list(y).index(1)),
        "average_precision": average_precision,
    }


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(1, 4))
def test_equal_scores_count_as_the_mean_over_their_orders(rows, k):
    request, scores, labels = (np.array(c) for c in zip(*rows, strict=True))
    keep = np.concatenate([np.flatnonzero(request == r)[:6] for r in range(3)])
    request, scores, labels = np.unique(request[keep], return_inverse=True)[1], scores[keep], labels[keep]
    ranking = Ranking(request, scores)
    for name, measure in measures(k).items():
        got = getattr(ranking, name)(labels, *((k,) if name.endswith("at_k") else ()))
        for r in range(ranking.count):
            mine = request == r
            if labels[mine].sum() == 0:
                assert np.isnan(got[r])
            else:
                assert got[r] == pytest.approx(in_all_orders(scores[mine], labels[mine], measure)), name
    shown = ranking.shown(k)
    for r in range(ranking.count):
        assert shown[request == r].sum() == pytest.approx(min(k, (request == r).sum()))
        np.testing.assert_allclose(np.bincount(request, shown * labels), ranking.value_at_k(labels, k))


def drawn(requests=200, seed=0):
    draw = np.random.default_rng(seed)
    request = np.repeat(np.arange(requests), draw.integers(1, 15, requests))
    labels = (draw.random(len(request)) < 0.3).astype(float)
    return draw.permutation(request), draw.random(len(request)), labels


@pytest.mark.full  # ranx compiles its loops
def test_rankings_are_those_of_ranx():
    ranx = pytest.importorskip("ranx")
    request, scores, labels = drawn()
    judged = [r for r in np.unique(request) if labels[request == r].any()]
    qrels, run = {}, {}
    for r in judged:
        rows = np.flatnonzero(request == r)
        qrels[str(r)] = {str(i): int(labels[i]) for i in rows if labels[i]}
        run[str(r)] = {str(i): float(scores[i]) for i in rows}
    names = {"hit_rate@3": "hit_at_k", "recall@3": "recall_at_k", "ndcg@3": "ndcg_at_k"}
    names |= {"mrr": "reciprocal_rank", "map": "average_precision"}
    expected = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), list(names))
    ranking = Ranking(request, scores)
    for name, method in names.items():
        got = getattr(ranking, method)(labels, *((3,) if "@" in name else ()))
        assert np.nanmean(got) == pytest.approx(expected[name]), name
        assert np.flatnonzero(~np.isnan(got)).tolist() == judged


def test_rankings_are_those_of_scikit_learn():
    request, scores, labels = drawn(seed=1)
    scores = scores.round(1)
    ranking = Ranking(request, scores)
    ndcg, precision = ranking.ndcg_at_k(labels, 5), Ranking(request, scores + request).average_precision(labels)
    for r in range(ranking.count):
        mine = request == r
        if labels[mine].any() and mine.sum() > 1:
            assert ndcg[r] == pytest.approx(ndcg_score([labels[mine]], [scores[mine]], k=5))
    request, scores, labels = drawn(seed=2)
    precision = Ranking(request, scores).average_precision(labels)
    for r in range(len(precision)):
        mine = request == r
        if labels[mine].any():
            assert precision[r] == pytest.approx(average_precision_score(labels[mine], scores[mine]))


def test_no_rows_are_no_requests():
    nothing = Ranking(np.empty(0, np.int64), np.empty(0))
    none = np.empty(0)
    for got in (nothing.hit_at_k(none, 3), nothing.reciprocal_rank(none), nothing.average_precision(none)):
        assert got.shape == (0,)
    assert np.isnan(mean_and_error(nothing.value_at_k(none, 3))).all()
