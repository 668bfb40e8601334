"""How numbers are said and when they are sure: names, intervals, rankings against popularity, value in per cent."""

import dataclasses
import io
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, mean_squared_error, r2_score, roc_auc_score
from test_resampling import made

from mtcl_torchrec import Task
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.evaluation.bootstrap import clusters_of, intervals
from mtcl_torchrec.evaluation.compare import compare_tables
from mtcl_torchrec.evaluation.confidence import FEWEST, FEWEST_USERS, plus_minus, support_of
from mtcl_torchrec.evaluation.details import print_differences, print_segments
from mtcl_torchrec.evaluation.estimates import ratio_estimate, task_estimates
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.metrics import weighted_metrics
from mtcl_torchrec.evaluation.naming import MEASURES, bounds_of, parts_of, sign_of_better
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.report import print_evaluation
from mtcl_torchrec.evaluation.resampled import resampled_metrics
from mtcl_torchrec.evaluation.rivals import ranked_events, sign_of, word_of
from mtcl_torchrec.evaluation.segments import rows_of
from mtcl_torchrec.evaluation.supports import supports_of
from mtcl_torchrec.evaluation.worth import verdict_of
from mtcl_torchrec.schema import Feature, Schema

CLICK = Task.binary("click")


def replaced(table, **columns):
    return PredictionsTable(
        table.frame.assign(**columns), table.tasks, classes=table.classes, thresholds=table.thresholds,
        values=table.values,
    )  # fmt: skip


def taken(table, rows):
    """Some rows, in any number."""
    classes = {name: values[rows] for name, values in table.classes.items()}
    return dataclasses.replace(table, frame=table.frame.iloc[rows].reset_index(drop=True), classes=classes)


def text_of(print_it, *arguments, width=110):
    console = Console(file=io.StringIO(), width=width)
    print_it(*arguments, console)
    return console.file.getvalue()


@given(st.floats(0, 1), st.floats(0, 2), st.integers(1, 5))
def test_no_text_passes_the_bounds_or_says_minus_zero(value, half, digits):
    said = plus_minus(value, half, digits, (0.0, 1.0))
    assert "-0" not in said
    assert "−" not in said
    if " to " in said:
        low, high = (float(end) for end in said.split("(")[1].rstrip(")").split(" to "))
        assert 0 <= low <= high <= 1
        assert value - half < 0 or value + half > 1
    for number in (-1e-12, 0.0, 1e-12):
        assert plus_minus(number, 0.0) == "0.0000"
        assert "± 0.0000" not in plus_minus(number, 1e-9)


def test_every_metric_of_an_evaluation_has_a_name():
    found = evaluate_table(replaced(made(), **{"weight.click": 2.0}), k=[3])
    metrics = {key for of in found.tasks.values() for key in of}
    metrics |= {key for of in found.ranking.values() for key in of if not key.endswith(" half")}
    for metric in metrics:
        assert parts_of(metric).measure in MEASURES, metric
    for of in (found.tasks["click"], found.ranking["fused"]):
        for metric, value in of.items():
            low, high = bounds_of(metric)
            assert math.isnan(value) or low <= value <= high, metric
    assert (sign_of_better("weighted_ne"), sign_of_better("recall@5 click"), sign_of_better("map buy")) == (-1, 0, 1)


def test_intervals_stay_within_the_bounds_of_the_metric():
    table = made(users=60)
    sharp = np.where(table.labels("click") == 1, 0.9, 0.1)
    sharp[:3] = 0.5  # an AUC just below 1
    table = replaced(table, **{"p.click": sharp})
    clusters = clusters_of(table)
    found = intervals(resampled_metrics(table, clusters, k=[3]), clusters[1], draws=60)
    for of, metrics in found.items():
        for metric, sure in metrics.items():
            low, high = bounds_of(metric)
            assert math.isnan(sure.low) or low <= sure.low <= sure.high <= high, (of, metric)
    assert found["click"]["auc"].high == 1.0
    assert found["click"]["auc"].value + found["click"]["auc"].half > 1


def handful(events=5, users=200):
    """A table with so few purchases."""
    table = made(users=users)
    labels = np.zeros(len(table))
    labels[:: len(table) // events][:events]
    labels[np.linspace(0, len(table) - 1, events).astype(int)] = 1
    return replaced(table, **{"label.buy": labels})


def test_a_handful_of_events_or_one_user_has_no_interval():
    table = handful()
    found = evaluate_table(table, k=[3], bootstrap=20)
    buy = found.intervals["buy"]
    assert {of.unsure for of in buy.values()} == {"too few events (5)"}
    assert all(math.isnan(of.error) and math.isnan(of.low) for of in buy.values())
    assert found.intervals["ranking"]["ndcg@3 buy"].unsure
    assert not found.intervals["ranking"]["ndcg@3 click"].unsure
    assert not found.intervals["click"]["auc"].unsure
    shown = text_of(print_evaluation, found, "test")
    assert "none of buy: too few events (5)" in shown
    assert shown.count("± is half of a 95 % interval, over users") == 1
    row = next(line for line in shown.splitlines() if line.startswith("buy"))
    assert "±" not in row
    alone = made(users=1)
    assert supports_of(alone, clusters_of(alone))("click", "auc").unsure
    many = np.r_[np.ones(FEWEST), np.zeros(FEWEST)]
    assert support_of(many, np.arange(2 * FEWEST)).unsure == ""
    assert support_of(many[1:], np.arange(2 * FEWEST - 1)).unsure == f"too few events ({FEWEST - 1})"
    few = FEWEST_USERS - 1  # have events, many; the other users none
    assert support_of(many, np.r_[np.arange(FEWEST) % few, np.arange(FEWEST)]).unsure == (
        f"too few users with an event ({few})"
    )
    assert "without the event" in support_of(many[:-1], np.arange(2 * FEWEST - 1)).unsure


def test_numbers_are_printed_once_and_fit_the_screen():
    found = evaluate_table(made(users=100), k=[3], bootstrap=20)
    shown = text_of(print_evaluation, found, "test", width=80)
    assert all(len(line) <= 80 for line in shown.splitlines() if "±" in line and ";" not in line and "over" not in line)
    auc = f"{found.tasks['click']['auc']:.4f}"
    assert shown.count(f"{auc} ±") == 1


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_metrics_by_weight_are_scikit_learns(kind):
    draw = np.random.default_rng(1)
    n, w = 400, draw.integers(0, 4, 400).astype(float)
    if kind == "binary":
        y, p = (draw.random(n) < 0.4).astype(float), draw.random(n).round(2).clip(0.01, 0.99)
        found = weighted_metrics(CLICK, y, p, w)
        assert found["weighted_auc"] == pytest.approx(roc_auc_score(y, p, sample_weight=w))
        assert found["weighted_log_loss"] == pytest.approx(log_loss(y, p, sample_weight=w))
        assert found["weighted_calibration"] == pytest.approx((w @ p) / (w @ y))
    elif kind == "multiclass":
        y, p = draw.integers(0, 3, n).astype(float), draw.dirichlet(np.ones(3), n)
        found = weighted_metrics(Task.multiclass("taste", 3), y, p, w)
        assert found["weighted_log_loss"] == pytest.approx(log_loss(y, p, sample_weight=w))
        assert found["weighted_top1"] == pytest.approx(accuracy_score(y, p.argmax(1), sample_weight=w))
    else:
        y = draw.normal(size=n)
        p = y + draw.normal(size=n)
        found = weighted_metrics(Task.regression("stars"), y, p, w)
        assert found["weighted_mse"] == pytest.approx(mean_squared_error(y, p, sample_weight=w))
        assert found["weighted_mae"] == pytest.approx(mean_absolute_error(y, p, sample_weight=w))
        assert found["weighted_r2"] == pytest.approx(r2_score(y, p, sample_weight=w))


def test_intervals_by_weight_are_of_the_weighted_metrics_and_spread_as_rows_that_stand_there_twice():
    table = made(users=80)
    w = np.random.default_rng(2).integers(0, 3, len(table)).astype(float)
    weighed = replaced(table, **{"weight.click": w, "weight.taste": w, "weight.stars": w})
    expected = {(t, m): v for t, of in evaluate_table(weighed, k=[3]).tasks.items() for m, v in of.items()}
    clusters = clusters_of(weighed)
    parts = resampled_metrics(weighed, clusters, k=[3], only=lambda of, metric: metric.startswith("weighted_"))
    named = {name: value for p in parts for name, value in zip(p.names, p.estimate(clusters[1]), strict=True)}
    wanted = {name for name in expected if name[1].startswith("weighted_") and "base_rate" not in name[1]}
    assert set(named) == wanted
    assert named == pytest.approx({name: expected[name] for name in named})
    # Rows that stand there as often as they weigh come to the same draws.
    copied = taken(table, np.repeat(np.arange(len(table)), w.astype(int)))
    again = clusters_of(copied)
    keep = np.unique(clusters[0][w > 0])
    drawn = np.random.default_rng(0).integers(0, 3, (6, clusters[1])).astype(float)
    plain = {n: p for p in resampled_metrics(copied, again, k=[3]) for n in p.names}
    for part in parts:
        got = part.of(drawn)
        for i, (of, metric) in enumerate(part.names):
            other = plain[of, metric.removeprefix("weighted_")]
            at = other.names.index((of, metric.removeprefix("weighted_")))
            assert got[:, i] == pytest.approx(other.of(drawn[:, keep])[:, at], nan_ok=True), (of, metric)


def test_errors_without_draws_are_those_of_the_bootstrap():
    table = made(users=300)
    clusters = clusters_of(table)
    drawn = intervals(resampled_metrics(table, clusters), clusters[1], draws=300)
    for task, metric in (("click", "auc"), ("click", "gauc"), ("click", "ne"), ("click", "calibration"),
                         ("taste", "ne"), ("taste", "top1"), ("stars", "r2")):  # fmt: skip
        found = task_estimates(table, task, *clusters)[metric]
        assert found.value == pytest.approx(drawn[task][metric].value), (task, metric)
        assert found.error == pytest.approx(drawn[task][metric].error, rel=0.2), (task, metric)
    assert math.isnan(ratio_estimate(np.ones(3), np.zeros(3), np.arange(3)).value)


def test_popularity_is_a_share_that_counts_alone_do_not_tell():
    rows = pd.DataFrame(
        {"u": [1] * 110, "i": ["often"] * 100 + ["good"] * 10, "click": [1] * 20 + [0] * 80 + [1] * 9 + [0]}
    )
    features = [Feature(name=name, group=group, embedding_dim=4) for name, group in (("u", "user"), ("i", "item"))]
    schema = Schema(user="u", item="i", features=features, tasks=[CLICK])
    clicks = rows[["click"]].to_numpy(float)
    rates = Popularity.count(rows["i"], schema.tasks, clicks)
    often, good, new = rates.of(pd.Series(["often", "good", "new"]))["click"]
    found = Catalogue.build(schema, {"u": "user", "i": "item"}, rows, rows[:0])
    assert found.popularity["often"] > found.popularity["good"]
    mean = 29 / 110
    assert (often, good, new) == pytest.approx(((20 + 20 * mean) / 120, (9 + 20 * mean) / 30, mean))


def test_popularity_survives_saving(tmp_path):
    items = pd.Series(["a", "a", "b", None], name="i")
    tasks = (CLICK, Task.regression("stars"), Task.multiclass("genre", 3))
    labels = np.array([[1, 2.5, 0], [0, np.nan, 2], [1, 1.0, 2], [0, 3.0, np.nan]])
    rates, asked = Popularity.count(items, tasks, labels), pd.Series(["b", "a", "z", None])
    frame, series = pd.DataFrame({"i": ["a", "b"]}), pd.Series({"a": 1.0, "b": 1.0}, name="popularity")
    for kept in (rates, None):
        Catalogue(frame, frame, {}, frame, series.rename_axis("i"), rates=kept).save(tmp_path / str(kept is None))
        read = Catalogue.load(tmp_path / str(kept is None)).rates
        assert (read is None) == (kept is None)
    read = Catalogue.load(tmp_path / "False").rates
    assert read.usual == rates.usual
    assert set(read.of(asked)) == {"click", "stars"}  # no item is popular for a class
    for name, found in read.of(asked).items():
        np.testing.assert_array_equal(found, rates.of(asked)[name])
    assert read.of(asked)["stars"][2:] == pytest.approx([6.5 / 3] * 2)


def test_the_fused_score_is_better_than_popularity_only_beyond_the_interval():
    table = made(users=400)
    random = np.random.default_rng(3).random(len(table))
    clusters = clusters_of(table)
    (good,) = ranked_events(replaced(table, **{"popular.click": random}), ["click"], *clusters)
    assert word_of(good.gap("popularity")) == "better"
    assert sign_of(good.gap("popularity", unwanted=True)) == -1
    draws = []
    for _ in range(60):  # the paired error is that of drawing users
        users = np.random.default_rng(len(draws)).integers(0, clusters[1], clusters[1])
        rows = np.concatenate([np.flatnonzero(clusters[0] == user) for user in users])
        new = np.repeat(np.arange(len(users)), np.bincount(clusters[0])[users])
        part = taken(replaced(table, **{"popular.click": random}), rows)
        (again,) = ranked_events(replaced(part, user=new), ["click"], new, len(users))
        draws.append(again.gap("popularity").difference)
    assert good.gap("popularity").error == pytest.approx(np.std(draws), rel=0.35)
    close = replaced(table, **{"popular.click": random}, score=np.random.default_rng(4).random(len(table)))
    assert word_of(ranked_events(close, ["click"], *clusters)[0].gap("popularity")) == "too close to call"
    few = handful()
    found = evaluate_table(replaced(few, **{"popular.buy": np.where(few.labels("buy") == 1, 1.0, 0.0)}), k=[3])
    assert found.against_popularity["buy"]["fused_is"].startswith("too few events")
    shown = text_of(print_evaluation, found, "test")
    assert "fused is" in shown
    assert "too few events (" in shown


def test_what_is_equal_by_construction_is_compared_once_and_what_is_rare_is_marked():
    a, b = handful(users=300), handful(users=300)
    better = made(users=300, skill=3.0)
    b = replaced(b, **{"p.click": better.predicted("click"), "score": better.score})
    everything = {(d.of, d.metric): d for d in compare_tables(a, b, k=[3, 40, 50], draws=20, only=lambda of, m: True)}
    metrics = {metric for of, metric in everything if of == "ranking"}
    assert {"ndcg@3 click", "ndcg@40 click", "rate@3 click"} <= metrics  # no request has 40 rows
    assert not metrics & {"ndcg@50 click", "rate@40 click", "value@40", "recall@50 click", "hit@40 click"}
    rare = everything["buy", "auc"]
    assert (rare.unsure, rare.better) == ("too few events (5)", None)
    assert math.isnan(rare.p)
    assert math.isnan(rare.p_holm)
    same = everything["stars", "mae"]
    assert same.equal
    assert same.better is None
    tested = [d for d in everything.values() if not math.isnan(d.p_holm)]
    assert all(not d.equal and not d.unsure for d in tested)
    smallest = min(tested, key=lambda d: d.p)
    assert smallest.p_holm == pytest.approx(min(1.0, len(tested) * smallest.p))
    shown = text_of(print_differences, list(everything.values()), ("a", "b"), width=200)
    assert "too few events (5)" in shown
    assert "equal" in shown
    assert f"{len(tested)} metrics are compared" in shown
    twice = (*a.tasks[:1], Task.binary("match", label="click"))
    named = replaced(a, **{"label.match": a.labels("click"), "p.match": a.predicted("click")})
    named = PredictionsTable(named.frame, twice)
    assert "ndcg@5 match" not in {d.metric for d in compare_tables(named, named, draws=20)}


def test_segments_have_rows_events_and_intervals_and_hours_are_a_row_each():
    table = made(users=200)
    rows = np.arange(len(table))
    table = replaced(
        table, time=1_700_000_000 + rows * 3600, **{"segment.shop": np.where(rows % 100 == 7, "small", "large")}
    )
    found = evaluate_table(table, k=[3], segments=["shop", "hour_of_day"])
    large = found.segments["shop"]["large"]["quality"]["click"]
    own = rows_of(table, rows % 100 != 7)
    assert large["events"] == np.nansum(own.labels("click"))
    error, support = task_estimates(own, "click", *clusters_of(own))["auc"].error, supports_of(own, clusters_of(own))
    assert large["half"] == pytest.approx(support("click", "auc").quantile * error)
    small = found.segments["shop"]["small"]["quality"]["click"]
    assert small["unsure"].startswith("too few")
    assert math.isnan(small["half"])
    shown = text_of(print_segments, found, width=100)
    cell = f"{large['value']:.3f} ± {large['half']:.3f} ({large['events']:,})"
    assert cell in shown
    hours = shown[shown.index("By hour_of_day") :].splitlines()
    assert sum(line.split("  ")[0].strip().isdigit() for line in hours) == 24


def test_segments_of_classes_and_numbers_are_told_by_two_metrics():
    table = made(users=300)
    rows = np.arange(len(table))
    table = replaced(table, **{"segment.side": np.where(rows % 2, "odd", "even"), "segment.price": rows % 20})
    found = evaluate_table(table, k=[3], segments=["side", "price"])
    stars = found.segments["side"]["odd"]["quality"]["stars"]
    own = rows_of(table, rows % 2 == 1)
    known = ~np.isnan(own.labels("stars"))
    off = np.abs(own.predicted("stars")[known] - own.labels("stars")[known])
    per_user = pd.Series(off).groupby(pd.Series(own.users[known])).agg(["sum", "count"])
    left = (per_user["sum"] - off.mean() * per_user["count"]) / known.sum()  # of each user, in a ratio of sums
    error = np.sqrt((left**2).sum() * len(left) / (len(left) - 1))
    assert stars["beside"]["mae"]["value"] == pytest.approx(off.mean())
    assert stars["beside"]["mae"]["half"] == pytest.approx(1.96 * error, rel=0.03)
    assert stars["value"] == pytest.approx(found.segments["side"]["odd"]["tasks"]["stars"]["r2"])
    shown = text_of(print_segments, found, width=200)
    assert f"{off.mean():.3f} ± {stars['beside']['mae']['half']:.3f}" in shown
    assert "stars MAE" in shown
    by_price = shown[shown.index("By price") :]
    assert f"{found.segments['price']['7']['quality']['stars']['beside']['mae']['value']:.2f}±" in by_price


def test_what_the_fusion_is_worth_in_per_cent():
    table = made(users=500, skill=1.0)
    perfect = table.labels("click") + 4 * np.nan_to_num(table.labels("buy"))
    table = replaced(table, score=perfect, popular=np.random.default_rng(5).random(len(table)))
    assert (
        verdict_of(table, [2]).rivals[0].name == "head stars"
    )  # worth nothing itself, and a strong rival all the same
    table = dataclasses.replace(table, fused=("click", "buy"))
    head, popular = verdict_of(table, [1000, 2, 3]).rivals  # the shortest that leaves a choice
    assert (head.name, popular.name) == ("head click", "popularity")
    assert head.sign == popular.sign == 1
    assert popular.per_cent[0] > head.per_cent[0] > 0
    found = evaluate_table(table, k=[2])
    both = [found.ranking[rule]["value@2"] for rule in ("fused", "popular")]
    assert popular.per_cent[0] == pytest.approx(100 * (both[0] / both[1] - 1))
    as_head = table.frame.assign(score=table.predicted("click"))
    alone = verdict_of(dataclasses.replace(table, frame=as_head), [2])  # it is the head itself
    assert (alone.rivals[0].ahead, alone.word) == (0, "not shown")
    assert verdict_of(PredictionsTable(table.frame, table.tasks), [2]) is None  # nothing is worth anything
    few = verdict_of(dataclasses.replace(handful(), values={"buy": 1}), [2])
    assert few.unsure.startswith("too few events (")
    assert all(math.isnan(rival.half) and rival.sign == 0 for rival in few.rivals)
    assert verdict_of(table, [1000]) is None
