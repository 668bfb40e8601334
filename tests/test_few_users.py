"""Worlds in which a few of many users have the event: intervals cover and equal models differ by chance, or it is said
that nothing is sure."""

import numpy as np
import pandas as pd
import pytest

from mtcl_torchrec import Task
from mtcl_torchrec.evaluation.bootstrap import clusters_of, intervals
from mtcl_torchrec.evaluation.compare import compare_tables
from mtcl_torchrec.evaluation.confidence import SURE
from mtcl_torchrec.evaluation.estimates import task_estimates
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.resampled import resampled_metrics
from mtcl_torchrec.evaluation.supports import supports_of

CLICK = Task.binary("click")
METRICS = ("auc", "gauc", "ne", "pr_auc", "calibration", "ndcg@3 click", "rate@3 click", "value@3", "mrr click")


def world(seed, active, users=300):
    """Two equally good models, each better for some users than for others; `active` of the users ever click."""
    draw = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), draw.integers(10, 30, users))
    x, clicks = draw.normal(size=len(user)), draw.random(users) < active / users
    happened = draw.random(len(user)) < np.where(clicks[user], 0.45, 0) / (1 + np.exp(-1.5 * x))

    def table():
        skill, taste = draw.normal(0, 0.5, users), draw.normal(0, 0.5, users)
        score = x * np.exp(skill[user]) * np.sign(1 + skill[user]) + draw.normal(size=len(user)) + taste[user]
        p = 1 / (1 + np.exp(2 - score))
        frame = pd.DataFrame({"user": user, "label.click": happened.astype(float), "p.click": p, "score": p})
        return PredictionsTable(frame, (CLICK,), values={"click": 1.0})

    return table(), table()


def test_formulas_cover_where_a_dozen_of_300_users_have_events():
    many, _ = world(10**6, 400, 10_000)
    truth = {metric: of.value for metric, of in task_estimates(many, "click", *clusters_of(many)).items()}
    inside, by_normal, unsure = {"auc": [], "gauc": []}, {"auc": [], "gauc": []}, 0
    for seed in range(250):
        table, _ = world(seed, 12)
        clusters = clusters_of(table)
        found, support = task_estimates(table, "click", *clusters), supports_of(table, clusters)
        for metric, covered in inside.items():
            rests = support("click", metric)
            unsure += bool(rests.unsure)
            if not rests.unsure:
                off = abs(found[metric].value - truth[metric])
                covered.append(off <= rests.quantile * found[metric].error)
                by_normal[metric].append(off <= SURE * found[metric].error)
    assert 0 < unsure < 250
    for metric, covered in inside.items():
        assert 0.9 <= np.mean(covered) <= 0.985, metric
        assert np.mean(by_normal[metric]) < np.mean(covered)


def test_where_six_users_have_all_events_nothing_is_sure():
    a, b = world(3, 6)
    assert a.labels("click").sum() > 20
    found = {(d.of, d.metric): d for d in compare_tables(a, b, k=[3], draws=10)}
    assert {d.unsure for d in found.values()} == {"too few users with an event (6)"}
    assert all(np.isnan(d.low) and d.better is None for d in found.values())


def test_a_difference_rests_on_requests_that_leave_a_choice():
    """Of 40 users 5 have more than three rows: which of them are shown differs there alone."""
    user = np.repeat(np.arange(40), [10] * 5 + [3] * 35)
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"user": user, "label.click": np.arange(len(user)) % 2.0, "p.click": draw.random(len(user))})
    table = PredictionsTable(frame.assign(score=frame["p.click"]), (CLICK,), values={"click": 1.0})
    alone, paired = (supports_of(table, clusters_of(table), values=table.values, paired=of) for of in (False, True))
    for metric in ("rate@3 click", "recall@3 click", "value@3"):
        assert not alone("ranking", metric).unsure
        assert paired("ranking", metric).unsure == "too few users with an event (5)"
    assert not paired("ranking", "ndcg@3 click").unsure  # the order of the three counts, too


@pytest.mark.full
@pytest.mark.parametrize("active", [12, 20, 300])
def test_intervals_cover_and_equal_models_differ_by_chance(active):
    share, trials = active / 300, 200
    big, _ = world(10**6, 10_000 * share, 10_000)
    asked = {"k": [3], "values": {"click": 1.0}, "only": lambda of, metric: metric in METRICS}
    truth = {
        name: value
        for part in resampled_metrics(big, clusters_of(big), **asked)
        for name, value in zip(part.names, part.estimate(clusters_of(big)[1]), strict=True)
    }
    inside, differ = {}, {}
    for seed in range(trials):
        a, b = world(seed, active)
        clusters = clusters_of(a)
        support = supports_of(a, clusters, values=a.values)
        found = intervals(resampled_metrics(a, clusters, **asked), clusters[1], draws=120, seed=seed, support=support)
        for of, metrics in found.items():
            for metric, sure in metrics.items():
                if not sure.unsure:
                    inside.setdefault((of, metric), []).append(sure.low <= truth[of, metric] <= sure.high)
        for d in compare_tables(a, b, draws=120, seed=seed, **{**asked, "k": [3]}):
            if not d.unsure:
                differ.setdefault((d.of, d.metric), []).append(d.p < 0.05)
    assert len(inside) == len(METRICS)
    assert all(np.mean(of) >= 0.9 for of in inside.values()), {name: np.mean(of) for name, of in inside.items()}
    assert all(np.mean(of) <= 0.09 for of in differ.values()), {name: np.mean(of) for name, of in differ.items()}
