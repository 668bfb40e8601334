"""What a report computes itself: standard errors, curves, shares of the ranking, and the verdict's rules."""

import math

import numpy as np
import pytest
from made_run import table
from sklearn.metrics import auc as area
from sklearn.metrics import roc_auc_score

from mtcl_torchrec.evaluation.estimates import auc_estimate, clusters_of, gauc_estimate
from mtcl_torchrec.evaluation.metrics import gauc
from mtcl_torchrec.evaluation.naming import MEASURES, bounds_of
from mtcl_torchrec.evaluation.ranking import Ranking
from mtcl_torchrec.evaluation.rivals import Gap, sign_of
from mtcl_torchrec.fusing.held_out import HeldOut
from mtcl_torchrec.fusing.weights import influence_of
from mtcl_torchrec.report.comparisons import Comparison
from mtcl_torchrec.report.curves import precision_recall_points, reliability, roc_points
from mtcl_torchrec.report.facts import Event, TaskFact
from mtcl_torchrec.report.fusion_pictures import ends_of
from mtcl_torchrec.report.fusion_verdict import what_does_fusion
from mtcl_torchrec.report.influence import shares_of_ranking
from mtcl_torchrec.report.sharing import do_tasks_help
from mtcl_torchrec.report.verdict import is_it_good, learnt, orders

NAN = math.nan


def rows(count=400, users=60, seed=0):
    """Labels, two scores (with ties) and users that matter for both."""
    draw = np.random.default_rng(seed)
    user = draw.integers(0, users, count)
    taste = draw.normal(size=users)[user]
    x = draw.normal(size=count)
    labels = (draw.random(count) < 1 / (1 + np.exp(-x - taste))).astype(float)
    labels[draw.random(count) < 0.1] = np.nan
    return labels, np.round(x + 0.7 * draw.normal(size=count), 1), np.round(x + taste, 1), user


def resampled_auc(labels, scores, of_user):
    def auc(taken):
        index = np.concatenate([of_user[u] for u in taken])
        return roc_auc_score(labels[index], scores[index])

    return auc


def resampled_gauc(labels, scores, of_user):
    both = [len(set(labels[rows])) == 2 for rows in of_user]
    aucs = [roc_auc_score(labels[rows], scores[rows]) if ok else 0.0 for rows, ok in zip(of_user, both, strict=True)]
    sizes = np.array([len(rows) * ok for rows, ok in zip(of_user, both, strict=True)])
    return lambda taken: np.average(np.array(aucs)[taken], weights=sizes[taken])


@pytest.mark.parametrize(("estimate", "again"), [(auc_estimate, resampled_auc), (gauc_estimate, resampled_gauc)])
def test_standard_errors_are_those_of_a_bootstrap_over_users(estimate, again):
    labels, *scores, users = rows(900, 120)
    known = ~np.isnan(labels)
    of_user = [np.flatnonzero((users == u) & known) for u in np.unique(users)]
    metrics = [again(labels, s, of_user) for s in scores]
    draws = np.random.default_rng(1).integers(0, len(of_user), (200, len(of_user)))
    x, y = np.array([[metric(taken) for metric in metrics] for taken in draws]).T
    a, b = (estimate(labels, s, clusters_of(users.astype(float), len(users))) for s in scores)
    assert [a.error, b.error, a.minus(b)[1]] == pytest.approx([x.std(), y.std(), (x - y).std()], rel=0.25)
    assert a.minus(b)[0] == pytest.approx(a.value - b.value)
    assert a.minus(b)[1] < 0.9 * a.minus(b, paired=False)[1]


def test_estimates_are_the_metrics_of_metrics_json():
    labels, one, _, users = rows()
    known = ~np.isnan(labels)
    clusters = clusters_of(users.astype(float), len(users))
    assert auc_estimate(labels, one, clusters).value == pytest.approx(roc_auc_score(labels[known], one[known]))
    expected = gauc(labels[known], one[known], users[known].astype(float))
    assert gauc_estimate(labels, one, clusters).value == pytest.approx(expected)


def test_without_users_the_error_is_that_of_delong():
    labels, scores, _, _ = rows(200)
    known = ~np.isnan(labels)
    x, y = scores[known][labels[known] == 1], scores[known][labels[known] == 0]
    wins = (x[:, None] > y).astype(float) + 0.5 * (x[:, None] == y)
    expected = math.sqrt(wins.mean(1).var(ddof=1) / len(x) + wins.mean(0).var(ddof=1) / len(y))
    found = auc_estimate(labels, scores, clusters_of(None, len(labels)))
    assert found.error == pytest.approx(expected, rel=0.02)


def test_one_class_has_no_auc_and_no_error():
    for estimate in (auc_estimate, gauc_estimate):
        found = estimate(np.array([1.0, 1.0, np.nan]), np.arange(3.0), np.arange(3))
        assert math.isnan(found.value)
        assert math.isnan(found.error)


def test_thinned_curves_keep_their_area():
    labels, scores, _, _ = rows(20_000)
    known = ~np.isnan(labels)
    x, y = roc_points(labels, scores)
    assert len(x) <= 120
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert area(x, y) == pytest.approx(roc_auc_score(labels[known], scores[known]), abs=1e-3)
    recall, precision = precision_recall_points(labels, scores)
    assert len(recall) <= 120
    assert (np.diff(recall) >= 0).all()
    assert precision[-1] == pytest.approx(np.nanmean(labels))
    assert roc_points(np.ones(3), np.arange(3.0)) is None


def test_reliability_is_that_of_a_loop():
    labels, _, _, _ = rows()
    p = np.random.default_rng(3).random(len(labels))
    found = reliability(labels, p, bins=5)
    known = ~np.isnan(labels)
    edges = np.quantile(p[known], [0.2, 0.4, 0.6, 0.8])
    for b in range(5):
        inside = known & (np.searchsorted(edges, p, side="right") == b)
        assert found.predicted[b] == pytest.approx(p[inside].mean())
        assert found.happened[b] == pytest.approx(labels[inside].mean())
        rate = labels[inside].mean()
        assert found.error[b] == pytest.approx(math.sqrt(rate * (1 - rate) / inside.sum()))
    classes = np.array([[0.9, 0.1], [0.6, 0.4]])
    top = reliability(np.array([0.0, 1.0]), classes, bins=2)
    assert top.happened.tolist() == [0.0, 1.0]
    assert reliability(np.full(3, np.nan), np.zeros(3)) is None
    assert len(reliability(np.array([0.0, 1.0]), np.full(2, 0.5)).predicted) == 1


def test_shares_of_a_weighted_mean_are_its_influences():
    of = table(300)
    parts = {task: of.predicted(task) for task in ("click", "like", "report")}
    weights = {"click": 1.0, "like": 2.0, "report": -1.5}
    score = sum(w * parts[t] for t, w in weights.items())
    held_out = HeldOut(parts, {}, request=of.users.astype(int))
    expected = influence_of(held_out, weights, lambda part: part)
    assert shares_of_ranking(parts, score, of.users) == pytest.approx(expected)
    part_of = {t: p for t, p in parts.items() if t != "like"}
    assert sum(shares_of_ranking(part_of, score, of.users).values()) < 0.9
    assert shares_of_ranking(parts, np.ones(300)) == {}


def fact(kind="binary", task="click", error=0.01, **metrics):
    return TaskFact(task, kind, metrics, {"auc": error, "r2": error, "ne": 0.005, "calibration": 0.05})


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (fact(auc=0.6, ne=0.9), True),
        (fact(auc=0.6, ne=1.1), False),  # worse than always the base rate
        (fact(auc=0.515, ne=0.99), False),  # less than two standard errors above a half
        (fact(auc=0.525, ne=0.99), True),
        (fact(auc=None, ne=None), None),
        (fact("multiclass", ne=0.99), True),
        (fact("multiclass", ne=1.01), False),
        (fact("regression", r2=0.1), True),
        (fact("regression", r2=-0.1), False),
        (fact("regression"), None),
    ],
)
def test_what_counts_as_learnt(of, expected):
    assert learnt(of) is expected


@pytest.mark.parametrize(
    ("difference", "error", "expected"),
    [(0.03, 0.01, 1), (0.015, 0.01, 0), (-0.03, 0.01, -1), (0.006, NAN, 1), (0.004, NAN, 0), (-0.006, NAN, -1),
     (NAN, 0.1, 0)],
)  # fmt: skip
def test_what_counts_as_a_difference(difference, error, expected):
    assert sign_of(Gap("click", "popularity", difference, error)) == expected


GOOD, POOR = fact(auc=0.82, ne=0.8, calibration=1.02), fact(task="like", auc=0.5, ne=1.0, calibration=1.3)


def said(answer):
    return " ".join([answer.short, *answer.sentences])


def test_a_good_model_and_a_bad_one():
    assert is_it_good([GOOD], [], []).tone == "good"
    assert is_it_good([GOOD, POOR], [], []).tone == "mixed"
    bad = is_it_good([GOOD, POOR, fact(task="x", auc=0.5, ne=1.2)], [], [])
    assert (bad.tone, bad.short) == ("bad", "No: 1 of 3 tasks learnt")
    unknown = is_it_good([fact(auc=None, ne=None)], [], [])
    assert (unknown.tone, unknown.short) == ("unknown", "Not known")
    assert "Cannot be judged, and left out below: like, no labels." in said(
        is_it_good([GOOD, fact(task="like")], [], [])
    )


def versus(task, against, difference, error=0.01, metric="auc", **more):
    """A comparison that is sure, one way or the other, beyond 1.96 standard errors."""
    half = 1.96 * error
    sign = (1 if difference > 0 else -1) * (abs(difference) > half) * (-1 if metric == "ne" else 1)
    return Comparison(task, metric, against, difference, half, sign, **more)


def test_baselines_decide_too():
    ahead, behind = versus("click", "trees", 0.05), versus("click", "als", -0.05)
    assert is_it_good([GOOD], [ahead], []).short == "Yes: no baseline is better"
    assert is_it_good([GOOD], [], []).short == "Better than guessing"
    beaten = is_it_good([GOOD], [ahead, behind], [])
    assert beaten.tone == "bad"
    assert "On click, als (by 0.0500 ± 0.0196 AUC) is better." in said(beaten)
    others = [fact(task=f"t{n}", auc=0.8, ne=0.8) for n in range(3)]
    gaps = [versus(f"t{n}", "trees", 0.05) for n in range(3)]
    assert is_it_good([GOOD, *others], [behind, *gaps], []).short == "In part: a baseline wins 1 of 4 tasks"
    close = versus("click", "als", -0.01)
    assert is_it_good([GOOD], [ahead, close], []).tone == "good"
    assert "clearly the best on 0 of 1 tasks" in said(is_it_good([GOOD], [ahead, close], []))
    untuned = said(is_it_good([GOOD], [ahead, close], [], untuned=["als", "trees"]))
    assert "They were tried at one setting only" in untuned
    assert "als was tried at one setting only" in said(is_it_good([GOOD], [ahead, close], [], untuned=["als"]))
    # A twin that was trained alone is no rival; the second question is about it.
    assert "no tuned baselines" in said(is_it_good([GOOD], [versus("click", "single_task", -0.1)], []))
    assert "Against trees (the twins not counted)," in said(
        is_it_good([GOOD], [ahead, versus("click", "single_task", -0.1)], [])
    )


def test_classes_and_numbers_can_be_beaten_too():
    taste, minutes = fact("multiclass", task="taste", ne=0.8), fact("regression", task="minutes", r2=0.3)
    lost = is_it_good([minutes], [versus("minutes", "trees", -0.2, metric="r2")], [])
    assert (lost.tone, lost.short) == ("bad", "No: a baseline is better")
    assert "On minutes, trees (by 0.2000 ± 0.0196 R²) is better." in said(lost)
    worse = versus("taste", "trees", 0.0855, 0.0045, metric="ne")  # of NE, more is worse
    both = is_it_good([GOOD, taste, minutes], [worse, versus("click", "trees", 0.1)], [])
    assert both.short == "No: a baseline is better"
    assert "clearly the best on 1 of 2 tasks (click)" in said(both)
    assert "On taste, trees (by 0.0855 ± 0.0088 NE) is better." in said(both)
    assert "Not compared with baselines: minutes." in said(both)
    ranked = Comparison("ranking", "value@5", "trees", -0.3, 0.1, -1)
    answer = is_it_good([GOOD], [versus("click", "trees", 0.1), ranked], [])
    assert "By value@5 of what is shown, trees (by 0.3000 ± 0.1000 value@5) is better." in said(answer)


def test_each_by_more_than_half_of_its_interval():
    """AUC and NE: the one may be sure where the other is not."""
    vague = TaskFact("rare", "binary", {"auc": 0.75, "ne": 0.9972}, {"auc": 0.05, "ne": 0.0134})
    assert learnt(vague) is False
    assert orders(vague) is True
    assert "not clearly so rare (NE 0.9972 ± 0.0263)" in said(is_it_good([GOOD, vague], [], []))
    flat = TaskFact("flat", "binary", {"auc": 0.52, "ne": 0.99}, {"auc": 0.05, "ne": 0.0001})
    assert "not clearly so flat (AUC 0.5200 ± 0.0980)" in said(is_it_good([GOOD, flat], [], []))
    assert orders(flat) is False


def test_of_what_cannot_be_judged_nothing_is_said():
    metrics = {"auc": 0.161, "ne": 1.2, "calibration": 9.0, "count": 500.0, "base_rate": 0.002}
    rare = TaskFact("rare", "binary", metrics, {"auc": 0.01, "ne": 0.01}, "too few events (1)")
    compared = [versus("click", "trees", 0.1), Comparison("rare", "auc", "trees", -0.5, unsure="too few events (1)")]
    found = [Event("rare", "GAUC", {"fused": (0.2, 0.1)}, False, (Gap("rare", "popularity", -0.3, 0.1, "too few"),))]
    answer = is_it_good([GOOD, rare], compared, [*found, event("click", 0.1, 0.1)])
    assert answer.short == "Yes: no baseline is better"
    about = [line for line in answer.sentences if "rare" in line]
    assert about == ["Cannot be judged, and left out below: rare, too few events (1)."]
    assert "1 of 1 events come out better than by popularity (click)" in said(answer)
    alone = is_it_good([rare], compared, found)
    assert (alone.short, len(alone.sentences)) == ("Not known", 1)
    fused = what_does_fusion({"click": 0.9}, [*found, event("click", 0.1, 0.1)], True)
    assert fused.tone == "good"
    assert [line for line in fused.sentences if "rare" in line] == ["Cannot be judged: rare, too few."]


def test_words_for_separation_and_calibration():
    sentences = said(is_it_good([GOOD, POOR], [], []))
    assert (
        "click are told from the rest well (AUC 0.820), those of like hardly better than by chance (0.500)" in sentences
    )
    assert "like is predicted 30% too often" in sentences
    assert "too seldom" in said(is_it_good([fact(auc=0.7, ne=0.9, calibration=0.8)], [], []))
    assert "agree within 10%" in said(is_it_good([GOOD], [], []))


def test_twins_tell_whether_tasks_help():
    names = ["a", "b", "c", "d"]
    up, down, level = (versus(t, "single_task", d) for t, d in (("a", 0.05), ("b", -0.05), ("c", 0.01)))
    assert do_tasks_help([up, level], [], [], names).short == "Yes, 1 of 2"
    assert do_tasks_help([down, level], [], [], names).tone == "bad"
    both = do_tasks_help([up, down, level], [], [], names)
    assert both.short == "1 gain, 1 lose"
    counts = "1 is predicted better together, 1 worse, 1 too close to call"
    assert f"Of 3 tasks that twins were trained on alone, {counts}" in said(both)
    assert "Worse: b (−0.0500 ± 0.0196 AUC)." in said(both)
    assert "Not compared: d." in said(both)
    assert "run's own settings" not in said(both)
    assert "The twins have the run's own settings" in said(
        do_tasks_help([up], [], [], names, {"single_task": "the run's own settings"})
    )
    assert do_tasks_help([level], [], [], names).short == "No difference that counts"
    assert do_tasks_help([versus("a", "trees", 0.5)], [], [], names).short == "Not measured"
    assert "--only single_task" in said(do_tasks_help([], [], [], names))
    assert do_tasks_help([], [], [], ["a"]).short == "There is one task"


def test_twins_of_classes_and_numbers_count_and_rare_events_do_not():
    names = ["taste", "minutes", "rare"]
    taste = versus("taste", "single_task", -0.03, metric="ne")
    minutes = versus("minutes", "single_task", -0.05, metric="r2")
    rare = Comparison("rare", "auc", "single_task", 0.3, unsure="too few events (2)")
    found = do_tasks_help([taste, minutes, rare], [], [], names)
    assert found.short == "1 gain, 1 lose"
    assert "Better: taste (−0.0300 ± 0.0196 NE). Worse: minutes (−0.0500 ± 0.0196 R²). Of NE, less is better." in said(
        found
    )
    assert "Cannot be judged: rare, too few events (2)." in said(found)
    assert "Not compared" not in said(found)
    assert do_tasks_help([rare], [], [], names).short == "Not known: too few events"


def test_what_is_sure_and_small_is_hardly_a_difference():
    gaps = [versus("a", "single_task", -0.0015, 0.0003), versus("b", "single_task", 0.0001, 0.0003)]
    found = do_tasks_help(gaps, [], [], ["a", "b"])
    assert (found.short, found.tone) == ("Hardly: all differences are below 0.002 AUC", "mixed")
    assert "0 are predicted better together, 1 worse, 1 too close to call" in said(found)
    gaps[0] = versus("a", "single_task", -0.0025, 0.0003)
    assert do_tasks_help(gaps, [], [], ["a", "b"]).short == "No, sharing hurts 1 of 2"


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [(-0.06, "pull apart for 1 of 1 pairs of tasks, most a and b (−0.06)"), (0.06, "agree most (+0.06)"),
     (0.01, "hardly meet"), (None, "")],
)  # fmt: skip
def test_gradients_are_a_hint(cosine, expected):
    gradients = [{"cut": "trunk", "tasks": ["a", "b"], "cosine": [[1.0, cosine], [cosine, 1.0]]}]
    sentences = said(do_tasks_help([], gradients, [], ["a", "b"]))
    assert expected in sentences
    assert ("radients" in sentences) == bool(expected)


def test_gates_that_share_and_gates_that_do_not():
    def gates(other):
        return [{"level": 1, "gate": g, "weights": w} for g, w in (("a", [1.0, 0.0]), ("b", other))]

    assert "give 100% of their weight to the same experts" in said(do_tasks_help([], [], gates([1.0, 0.0]), ["a", "b"]))
    assert "give 0% of their weight to the same experts" in said(do_tasks_help([], [], gates([None, 1.0]), ["a", "b"]))


def event(task, against_head, against_popularity, error=0.01):
    gaps = (Gap(task, "own head", against_head, error), Gap(task, "popularity", against_popularity, error))
    return Event(task, "GAUC", {"fused": (0.6, error)}, False, gaps)


def test_what_the_fusion_does():
    shares = {"click": 0.7, "like": 0.28, "report": 0.02}
    won = what_does_fusion(shares, [event("click", -0.02, 0.1), event("like", 0.05, 0.1)], True)
    assert (won.tone, won.short) == ("good", "Ranks mostly by click")
    assert "decided by click (70%) and like (28%)" in said(won)
    assert what_does_fusion({"taste": 0.5, "liked": 0.49}, [], True).short == "Led by taste and liked"
    assert what_does_fusion({"taste": 0.8}, [], True).short == "Ranks mostly by taste"
    assert "2 of 2 events come out better than by popularity" in said(won)
    assert "at most 0.020 GAUC against its own head (most for click)" in said(won)
    assert "For like it is better than the event's own head" in said(won)
    lost = what_does_fusion({"click": 0.4, "like": 0.35}, [event("click", -0.02, -0.1)], True)
    assert (lost.tone, lost.short) == ("bad", "Led by click and like")
    assert "0 of 1 events come out better than by popularity, click worse" in said(lost)
    level = what_does_fusion({}, [event("click", -0.02, 0.001)], True)
    assert (level.tone, level.short) == ("mixed", "Ranks by all heads together")
    assert what_does_fusion({}, [], False).short == "There is none"
    assert what_does_fusion({}, [], True).tone == "unknown"


def test_a_fusion_fitted_after_training_is_held_against_the_best_head():
    better, worse = (Gap("like", "head like", d, 0.01) for d in (0.05, -0.05))
    fitted = what_does_fusion({"like": 1.0}, [], True, [better], "value@5")
    assert fitted.tone == "good"
    assert "Fitted for value@5, it is clearly better than the head of like alone" in said(fitted)
    assert what_does_fusion({"like": 1.0}, [], True, [worse], "value@5").tone == "bad"


@pytest.mark.parametrize(("metric", "value"), [("auc", 0.99), ("auc", 0.01), ("r2", 0.99), ("ne", 0.01)])
def test_bars_end_at_the_bounds_of_a_metric(metric, value):
    low, high = bounds_of(metric)
    below, above = ends_of(value, 0.02, metric)
    assert value - below == pytest.approx(max(low, value - 0.0392))
    assert value + above == pytest.approx(min(high, value + 0.0392))
    assert ends_of(value, NAN, metric) == (0, 0)


def test_the_glossary_says_what_is_computed():
    """A request without the event counts in the rate of what is shown, and in no hit rate, recall, NDCG, MRR, MAP."""
    ranking = Ranking(np.array([0, 0, 1, 2, 2]), np.array([0.9, 0.1, 0.5, 0.8, 0.7]))
    labels = np.array([1.0, 0, 0, 0, 1])
    said = {key: MEASURES[key].explained for key in ("rate", "hit", "recall", "ndcg", "mrr", "map")}
    assert (labels * ranking.shown(1)).sum() / ranking.shown(1).sum() == pytest.approx(1 / 3)
    assert "of all requests" in said.pop("rate")
    assert np.nanmean(ranking.hit_at_k(labels, 1)) == 1 / 2
    per_request = [ranking.hit_at_k(labels, 1), ranking.recall_at_k(labels, 1), ranking.ndcg_at_k(labels, 1),
                   ranking.reciprocal_rank(labels), ranking.average_precision(labels)]  # fmt: skip
    assert all(np.isnan(of).tolist() == [False, True, False] for of in per_request)
    assert all("requests that have" in words for words in said.values())


def test_one_epoch_has_one_tick():
    ticks = pytest.importorskip("mtcl_torchrec.report.studio").ticks
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.plot([1], [0.7])
    axes.margins(x=0.08)
    ticks(axes.xaxis, 6, integer=True)
    low, high = axes.get_xlim()
    assert [tick for tick in axes.xaxis.get_majorticklocs() if low <= tick <= high] == [1]
