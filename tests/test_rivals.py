"""Does fusing pay?  What is said of the fused score against single heads and popularity, against plain loops."""

import dataclasses
import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from mtcl_torchrec.cli.fitted import _gain, _plus_minus, print_fitted
from mtcl_torchrec.data.impressions import draw_impressions
from mtcl_torchrec.evaluation.worth import verdict_lines
from mtcl_torchrec.fusing import HeldOut, fit_fusion
from mtcl_torchrec.fusing.rivals import verdict_in_target, verdict_on
from mtcl_torchrec.fusing.targets import longest_with_choice, parse_target


def world(requests=300, noise=0.3, **options):
    rows = draw_impressions(requests, 10, seed=3)
    draw = np.random.default_rng(0)
    parts = {task: np.clip(p * np.exp(noise * draw.normal(size=len(p))), 0, 1) for task, p in rows.probability.items()}
    popularity = draw.random(len(rows.request))
    return HeldOut(parts, rows.labels, rows.request, rankings={"popularity": popularity}, **options), rows.values


def best_k(request, scores, reward, k):
    """(R,) one request after the other; without ties."""
    return np.array([reward[rows[np.argsort(-scores[rows])][:k]].sum() for rows in
                     (np.flatnonzero(request == r) for r in np.unique(request))])  # fmt: skip


def test_the_verdict_is_a_paired_t_test_on_the_realised_value():
    held_out, values = world()
    fitted = fit_fusion(held_out, values=values, target="value@3", search="none", folds=4, front_points=0)
    reward = held_out.reward(values)
    own = best_k(held_out.request, fitted.chosen.scores, reward, 3)
    heads = {t: best_k(held_out.request, np.sign(values[t]) * held_out.parts[t], reward, 3) for t in values}
    best = max(heads, key=lambda task: heads[task].mean())
    found = fitted.pays
    assert (found.measure, found.paired, found.worth) == ("value@3", "requests", pytest.approx(own.mean()))
    popular = best_k(held_out.request, held_out.rankings["popularity"], reward, 3)
    for rival, name, theirs in zip(found.rivals, (f"head {best}", "popularity"), (heads[best], popular), strict=True):
        assert (rival.name, rival.worth) == (name, pytest.approx(theirs.mean()))
        low, high = ttest_rel(own, theirs).confidence_interval(0.95)
        assert rival.ahead == pytest.approx((low + high) / 2)
        # Student's t of the effective number of requests to which something happened, which are fewer than all.
        assert 1 < rival.half / ((high - low) / 2) < 1.03
        assert rival.sign == (1 if rival.ahead > rival.half else -1 if rival.ahead < -rival.half else 0)
        assert rival.per_cent[0] == pytest.approx(100 * rival.ahead / abs(theirs.mean()))
    signs = [rival.sign for rival in found.rivals]
    assert signs[1] == 1  # popularity is noise in this world
    assert found.word == ("no" if -1 in signs else "not shown" if 0 in signs else "yes")
    written = json.loads(json.dumps(fitted.report(), allow_nan=False))["pays"]
    assert [of["name"] for of in written["rivals"]] == [f"head {best}", "popularity"]
    assert written["word"] == found.word


def test_ranking_by_the_best_head_itself_is_not_said_to_pay():
    held_out, values = world()
    goal = parse_target("value@3", values, held_out.labels)
    alone = verdict_on(held_out, held_out.parts["like"], ["like"], goal, values)
    assert (alone.rivals[0].ahead, alone.rivals[0].half, alone.word) == (0, 0, "not shown")
    line, _ = verdict_lines(alone, "on these rows")
    assert line.startswith("Does fusing pay?  Not shown: value@3 ")
    assert "the same as the best head, like" in line
    assert "0.0" not in line.split("the same as")[1].split(";")[0]
    worse = verdict_on(held_out, -held_out.parts["like"], ["like"], goal, values)
    assert worse.word == "no"
    line = verdict_lines(worse, "on these rows")[0]
    assert "No: value@3" in line
    assert " % on the best head, like (" in line


def test_a_difference_that_chance_makes_is_no_difference_that_counts():
    """Scores that are noise, each seed a world: about 5 % of the intervals leave out 0."""
    wrong = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        parts = {"click": draw.random(400)}
        labels = {"click": (draw.random(400) < 0.3).astype(float)}
        rows = HeldOut(parts, labels, np.arange(400) // 8, user=np.arange(400) // 16)
        goal = parse_target("value@3", {"click": 1}, labels)
        found = verdict_on(rows, draw.random(400), ["click"], goal, {"click": 1})
        assert found.paired == "users"
        wrong += found.word != "not shown"
    assert 2 <= wrong <= 20


def test_without_values_the_target_itself_is_compared_and_of_an_auc_fold_by_fold():
    held_out, _ = world()
    fitted = fit_fusion(
        held_out, target="auc:like", combiners=["weighted_mean"], search="none", folds=4, front_points=0
    )
    found, rival = fitted.pays, fitted.pays.rivals[0]
    assert (found.measure, found.paired) == ("auc:like", "folds")
    head = next(t for t in fitted.tried if t.method == rival.name)
    low, high = ttest_rel(fitted.chosen.of_fold, head.of_fold).confidence_interval(0.95)
    assert (rival.ahead - rival.half, rival.ahead + rival.half) == (pytest.approx(low), pytest.approx(high))
    with_values = fit_fusion(
        held_out, values={"like": 1, "click": 1}, target="ndcg@4", combiners=["weighted_mean"], search="none", folds=2,
        front_points=0,
    )  # fmt: skip
    assert with_values.pays.measure == "value@4"


def test_where_values_are_known_the_target_is_reported_too_over_folds_and_over_users():
    held_out, values = world(requests=120)
    held_out = dataclasses.replace(held_out, user=held_out.request // 3)
    fitted = fit_fusion(
        held_out, values=values, target="gauc:like", combiners=["weighted_mean"], search="none", folds=4, front_points=0
    )
    aimed, rival = fitted.pays_in_target, fitted.pays_in_target.rivals[0]
    assert (fitted.pays.measure, aimed.measure, aimed.paired) == ("value@5", "gauc:like", "folds")
    head = next(t for t in fitted.tried if t.method == rival.name)
    low, high = ttest_rel(fitted.chosen.of_fold, head.of_fold).confidence_interval(0.95)
    assert (rival.ahead - rival.half, rival.ahead + rival.half) == (pytest.approx(low), pytest.approx(high))
    assert aimed.worth == pytest.approx(fitted.chosen.mean)
    written = json.loads(json.dumps(fitted.report(), allow_nan=False))
    assert (written["pays"]["measure"], written["pays_in_target"]["measure"]) == ("value@5", "gauc:like")

    console = Console(file=StringIO(), width=300)
    print_fitted(fitted, held_out, console)
    said = [line for line in console.file.getvalue().splitlines() if line.startswith(("Does fusing", "And in what"))]
    assert [line.split("?  ")[1].split(":")[0].lower() for line in said] == [fitted.pays.word, aimed.word]
    assert f"gauc:like {aimed.worth:.4f} on folds left out" in said[1]

    # On other rows, without folds: users are drawn, and the difference of the two GAUCs measured in each draw.
    goal = parse_target("gauc:like", values, held_out.labels)
    scores = held_out.parts["like"] + 0.3 * held_out.parts["click"]
    found = verdict_in_target(held_out, scores, ["click"], goal, values)
    like, users = held_out.labels["like"], np.unique(held_out.user)
    per_user = [np.flatnonzero(held_out.user == user) for user in users]
    own, theirs = (goal(held_out, s) for s in (scores, held_out.parts["click"]))
    assert (found.paired, found.worth) == ("users", pytest.approx(own))
    assert found.rivals[0].ahead == pytest.approx(own - theirs)
    draw, drawn = np.random.default_rng(0), []
    for _ in range(300):
        rows = np.concatenate([per_user[user] for user in draw.integers(0, len(users), len(users))])
        numbers = np.arange(len(rows)) // 10  # requests of 10 rows, one after the other
        again = HeldOut({"click": held_out.parts["click"][rows]}, {"like": like[rows]}, numbers)
        drawn.append(goal(again, scores[rows]) - goal(again, held_out.parts["click"][rows]))
    assert found.rivals[0].half == pytest.approx(1.96 * np.std(drawn), rel=0.25)
    assert verdict_in_target(held_out, scores, ["click"], parse_target("value@5", values, like), values) is None


def test_weights_that_are_all_alike_are_not_tried_twice():
    held_out, _ = world(requests=60)
    options = {"target": "value@3", "search": "none", "folds": 2, "front_points": 0, "combiners": ["weighted_mean"]}
    for values, methods in (({"click": 5, "like": 5}, {"values"}), ({"click": 1, "like": 5}, {"values", "all alike"})):
        tried = {t.method for t in fit_fusion(held_out, values=values, **options).tried if t.combiner}
        assert {method for method in tried if not method.startswith("head ")} == methods | {"stacking"}


def test_a_usable_k_leaves_a_fifth_of_the_requests_a_choice():
    for seed in range(50):
        sizes = np.random.default_rng(seed).integers(1, 9, 30)
        k = longest_with_choice(sizes)
        assert (sizes > k).mean() >= 0.2
        assert (sizes > k + 1).mean() < 0.2
    assert longest_with_choice(np.ones(5, np.int64)) == 0


def test_numbers_that_round_to_nothing_are_not_printed_as_minus_nothing():
    assert _plus_minus(-0.00004, 0.0003) == "0.0000 ± 0.0003"
    assert _plus_minus(-0.000004, 0.00003) == "-4e-06 ± 3e-05"
    assert _plus_minus(0.0, 0.0) == "0"
    assert _gain(0.0, 0.0) == "the same"
    assert _plus_minus(float("nan"), 0.1) == "–"
