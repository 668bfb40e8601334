"""Draws of users against copies of their rows, intervals that cover, and runs compared on the same rows."""

import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import shop
import yaml
from rich.console import Console
from test_cli import mtcl, one_line  # noqa: F401  (a fixture)

from mtcl_torchrec import Task
from mtcl_torchrec.cli import stages
from mtcl_torchrec.evaluation.bootstrap import Resampled, clusters_of, intervals, spread, weights
from mtcl_torchrec.evaluation.compare import compare_tables
from mtcl_torchrec.evaluation.details import print_details, print_differences, print_segments
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.plain_table import print_columns
from mtcl_torchrec.evaluation.predictions_file import write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranked import ranking_metrics
from mtcl_torchrec.evaluation.resampled import resampled_metrics
from mtcl_torchrec.evaluation.segments import rows_of, segment_values
from mtcl_torchrec.evaluation.significance import holm
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.history import finite
from mtcl_torchrec.training.judging import thresholds_of

TASKS = (Task.binary("click"), Task.binary("buy", mask="click"), Task.multiclass("taste", 4), Task.regression("stars"))
VALUES = {"click": 1.0, "buy": 4.0}


def made(users=30, seed=0, skill=1.0, known=True):
    """Rows of users of different sizes; a larger `skill` predicts better.  The labels depend on the seed alone."""
    of_labels, noise = np.random.default_rng(seed), np.random.default_rng((seed, int(100 * skill)))
    user = np.repeat(np.arange(users), of_labels.integers(1, 25, users))
    n = len(user)
    truth = of_labels.normal(size=n) + of_labels.normal(size=users)[user] - 0.5
    click = (of_labels.random(n) < 1 / (1 + np.exp(-2 * truth))).astype(float)
    buy = np.where(click == 1, of_labels.random(n) < 0.4, np.nan)
    frame = pd.DataFrame(
        {
            "user": pd.Series(user, dtype="Int64").where(pd.Series((user % 5 > 0) | known)),
            "item": of_labels.integers(0, 12, n),
            "popularity": 0.0,
            "label.click": click,
            "label.buy": buy,
            "label.taste": of_labels.integers(0, 4, n),
            "label.stars": truth + of_labels.normal(size=n),
        }
    )
    frame["popularity"] = frame["item"] ** 2
    guess = skill * truth + noise.normal(size=n)
    frame["p.click"] = (1 / (1 + np.exp(-guess))).round(2)
    frame["p.buy"] = noise.random(n)
    frame["p.stars"] = guess.round(1)
    frame["score"] = frame["p.click"].round(1)
    taste = noise.dirichlet(np.ones(4), n).astype("f")
    return PredictionsTable(
        frame, TASKS, classes={"p.taste": taste}, thresholds={"click": 0.5, "buy": 0.5}, values=VALUES
    )


def measured(table, k=3):
    """Every metric as `evaluate_table` has it, by the names that a draw gives them."""
    found = evaluate_table(table, k=[k])
    flat = {(task, metric): value for task, of in found.tasks.items() for metric, value in of.items()}
    flat |= {("ranking", metric): value for metric, value in found.ranking["fused"].items()}
    return flat


@pytest.mark.parametrize("known", [True, False])
def test_every_user_once_is_what_all_rows_come_to(known):
    table = made(known=known)
    clusters = clusters_of(table)
    parts = resampled_metrics(table, clusters, k=[3], values=VALUES)
    expected = measured(table)
    named = {n: v for p in parts for n, v in zip(p.names, p.estimate(clusters[1]), strict=True)}
    assert named == pytest.approx({name: expected[name] for name in named})
    unmeasured = {metric.split("@")[0].split(" ")[0] for _, metric in set(expected) - set(named)}
    assert unmeasured == {
        "count", "base_rate", "threshold", "majority", "f1_all_yes", "said_yes", "requests", "choice", "coverage",
        "value",
    }  # fmt: skip
    assert {metric for _, metric in set(expected) - set(named) if metric.startswith("value")} == {"value@3 half"}


def test_a_draw_is_what_copies_of_the_users_rows_come_to():
    table = made()
    clusters = clusters_of(table)
    parts = resampled_metrics(table, clusters, k=[3], values=VALUES)
    drawn = next(weights(clusters[1], 5, seed=3))
    found = np.concatenate([part.of(drawn) for part in parts], 1)
    names = [name for part in parts for name in part.names]
    # Bins are those of all rows, what is known of items as well, and XAUC is exact to first order only.
    approximate = {"ece", "novelty@3", "xauc"}
    for w, got in zip(drawn, found, strict=True):
        copies = [rows_of(table, w[clusters[0]] > copy) for copy in range(int(w.max()))]
        users = np.concatenate([part.frame["user"].astype(int) + 1000 * i for i, part in enumerate(copies)])
        whole = PredictionsTable(
            pd.concat([part.frame for part in copies], ignore_index=True).assign(user=users),
            TASKS,
            classes={"p.taste": np.concatenate([part.classes["p.taste"] for part in copies])},
            thresholds=table.thresholds,
            values=VALUES,
        )
        expected = measured(whole)
        for name, value in zip(names, got, strict=True):
            if name[1] not in approximate:
                assert value == pytest.approx(expected[name], nan_ok=True), name
            elif name[1] == "xauc":
                assert value == pytest.approx(expected[name], abs=0.02)


def test_what_is_not_asked_for_is_not_measured():
    table = made()
    clusters = clusters_of(table)
    parts = resampled_metrics(table, clusters, only=lambda of, metric: metric == "auc" or metric.startswith("ndcg@5"))
    assert [name for part in parts for name in part.names] == [
        ("click", "auc"), ("buy", "auc"), ("ranking", "ndcg@5 click"), ("ranking", "ndcg@5 buy"),
    ]  # fmt: skip
    for part in parts:
        assert part.of(np.ones((2, clusters[1]))).shape == (2, 1)


def test_the_bootstraps_error_of_a_mean_is_the_closed_form():
    users = 400
    x = np.random.default_rng(0).exponential(size=users)
    mean = Resampled((("x", "mean"),), lambda w: (w @ x / w.sum(1))[:, None])
    sure = intervals([mean], users, draws=4000)["x"]["mean"]
    assert sure.error == pytest.approx(x.std() / np.sqrt(users), rel=0.04)
    assert x.mean() - sure.low == pytest.approx(1.966 * sure.error, rel=1e-3)
    assert sure.high - x.mean() == pytest.approx(1.966 * sure.error, rel=1e-3)
    same = np.concatenate(list(weights(users, 50, seed=1)))
    np.testing.assert_array_equal(same.sum(1), users)
    np.testing.assert_array_equal(same, np.concatenate(list(weights(users, 50, seed=1))))
    assert np.isnan(spread(np.array([[1.0], [np.nan]]))[0])


@pytest.mark.full
def test_intervals_cover():
    """Of samples of one world, about 95 in 100 intervals hold what a very large sample comes to."""
    truth = measured(made(users=60_000, seed=999))
    names = [("click", "auc"), ("click", "gauc"), ("click", "pr_auc"), ("click", "ne"), ("stars", "xauc"),
             ("stars", "r2"), ("ranking", "ndcg@3 click"), ("ranking", "value@3")]  # fmt: skip
    trials, hits = 300, dict.fromkeys(names, 0)
    for trial in range(trials):
        table = made(users=150, seed=trial)
        clusters = clusters_of(table)
        parts = resampled_metrics(table, clusters, k=[3], values=VALUES, only=lambda *name: name in names)
        found = intervals(parts, clusters[1], draws=150, seed=trial)
        for of, metric in names:
            sure = found[of][metric]
            hits[of, metric] += sure.low <= truth[of, metric] <= sure.high
    shares = {name: count / trials for name, count in hits.items()}
    assert all(0.91 <= share <= 0.985 for share in shares.values()), shares


@pytest.mark.full
def test_equal_models_differ_by_chance_as_often_as_they_should():
    p = []
    for trial in range(300):
        a, b = made(users=120, seed=trial, skill=1.0), made(users=120, seed=trial, skill=1.0)
        again = np.random.default_rng((trial, 7))
        other = b.frame.assign(**{"p.buy": again.random(len(b))})
        b = PredictionsTable(other, TASKS, classes=b.classes)
        p += [d.p for d in compare_tables(a, b, draws=150, only=lambda of, metric: (of, metric) == ("buy", "auc"))]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09
    assert 0.4 <= np.mean(p) <= 0.6


def test_the_better_run_is_found_and_a_run_is_no_better_than_itself():
    a, b = made(users=300, skill=0.5), made(users=300, skill=2.0)
    found = {(d.of, d.metric): d for d in compare_tables(a, b, draws=100)}
    for name in (("click", "auc"), ("click", "gauc"), ("click", "ne"), ("ranking", "value@5")):
        assert found[name].better == "b", name
        assert found[name].p <= found[name].p_holm < 0.05
    assert found["click", "ne"].difference < 0 < found["click", "auc"].difference
    assert found["stars", "mae"].better == "a"  # it overstates: worse by distance, though better by order
    assert found["buy", "auc"].p_holm > 0.05
    assert found["buy", "auc"].better is None
    expected = measured(a)
    assert found["click", "auc"].a == pytest.approx(expected["click", "auc"])
    for d in found.values():
        assert (d.low <= 0 <= d.high) == (d.p >= 0.05)
    other = {(d.of, d.metric): d for d in compare_tables(b, a, draws=100)}
    assert other["click", "auc"].better == "a"
    assert other["click", "auc"].p == pytest.approx(found["click", "auc"].p)
    for d in compare_tables(a, a, draws=30, only=lambda of, metric: True):
        assert (d.difference, d.p) == (0, 1) or np.isnan(d.p)


def test_less_of_what_costs_something_is_better():
    a, b = made(users=300, skill=0.5), made(users=300, skill=2.0)  # b shows more clicks
    costly = replace(a, values={"click": -1.0, "buy": 4.0})
    found = {(d.of, d.metric): d for d in compare_tables(costly, b, k=[2], draws=100)}
    for metric in ("rate@2 click", "auc click", "gauc click", "ndcg@2 click"):
        assert found["ranking", metric].unwanted
        assert found["ranking", metric].difference > 0
        assert found["ranking", metric].better == "a"
    assert found["click", "auc"].better == "b"  # it is predicted better, whatever that is worth
    assert not found["ranking", "value@2"].unwanted
    console = Console(file=io.StringIO(), width=150)
    print_differences(list(found.values()), ("a", "b"), console)
    assert "click: worth less than nothing; of a ranking, less of it is better." in console.file.getvalue()


def test_holms_correction_by_hand():
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_other_rows_are_refused():
    a = made()
    shorter = rows_of(a, np.arange(len(a)) > 0)
    with pytest.raises(DataError, match=r"A and B were not judged on the same rows: \d+ and \d+ rows"):
        compare_tables(a, shorter)
    labels = PredictionsTable(a.frame.assign(**{"label.stars": a.frame["label.stars"] + 1}), TASKS, classes=a.classes)
    with pytest.raises(DataError, match="labels of task 'stars' differ, the first is row 0"):
        compare_tables(a, labels)
    turned = PredictionsTable(a.frame.assign(user=a.frame["user"][::-1].to_numpy()), TASKS, classes=a.classes)
    with pytest.raises(DataError, match="rows differ in user"):
        compare_tables(a, turned)
    other = PredictionsTable(a.frame.rename(columns={"label.click": "label.like"}), (Task.binary("like"),))
    with pytest.raises(DataError, match="no task in common"):
        compare_tables(a, other)
    with pytest.raises(DataError, match=r"no binary or regression task 'clik' \(did you mean 'click'\?\)"):
        compare_tables(a, a, values={"clik": 1})


def test_a_run_of_one_task_is_compared_by_that():
    a = made(users=60)
    columns = [c for c in a.frame if "buy" not in c and "stars" not in c]
    one = PredictionsTable(a.frame[columns].drop(columns="popularity"), TASKS[:1])
    found = compare_tables(a, one, draws=20)
    assert {d.of for d in found} == {"click", "ranking"}
    # Its ranking is judged by what happened, whether it predicts that or not.
    assert {(d.a, d.b) for d in found if d.metric == "ndcg@5 buy"} == {(measured(a, 5)["ranking", "ndcg@5 buy"],) * 2}


def test_rankings_of_a_table_count_what_would_be_shown():
    frame = pd.DataFrame(
        {
            "user": ["a", "a", "a", "b", None], "item": ["x", "y", "z", "x", "y"], "score": [3, 2, 1, 1, 9.0],
            "popularity": [6.0, 0, np.nan, 6, 0], "label.click": [0, 1, 1, 0, 1.0], "label.buy": [np.nan, 1, 0, 0, 1],
        }
    )  # fmt: skip
    got = ranking_metrics(PredictionsTable(frame, TASKS[:2]), k=[2], values={"click": 1, "buy": 10})
    bits = -np.log2([7 / 9, 1 / 9, 7 / 9])
    expected = {
        "requests": 2, "choice@2": 0.5, "value@2": 11 / 2, "value@2 error": 5.5, "coverage@2": 2 / 3,
        "novelty@2": bits.mean(), "rate@2 click": 1 / 3, "rate@2 buy": 1 / 3, "recall@2 click": 0.5,
        "recall@2 buy": 1, "hit@2 click": 1, "mrr click": 0.5, "map click": (1 / 2 + 2 / 3) / 2, "mrr buy": 0.5,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_segments_by_value_quantile_and_hour():
    rows = 1000
    frame = pd.DataFrame(
        {
            "label.click": np.arange(rows) % 2.0, "p.click": np.arange(rows) % 7 / 7,
            "segment.price": [np.nan, *np.arange(rows - 1.0)], "segment.shop": [f"s{i % 40 % 30}" for i in range(rows)],
            "segment.floor": pd.Series([1, None] * (rows // 2), dtype="Int64"), "item_seen": np.arange(rows) < 900,
            "time": 1_700_000_000_000 + np.arange(rows) * 3_600_000,
        }
    )  # fmt: skip
    table = PredictionsTable(frame, TASKS[:1])
    count = {name: segment_values(table, name).value_counts(sort=False).to_dict()
             for name in ("price", "shop", "floor", "item_seen", "hour_of_day")}  # fmt: skip
    assert list(count["price"]) == ["0 to 199", "200 to 399", "400 to 598", "599 to 798", "799 to 998", "(missing)"]
    assert len(count["shop"]) == 24
    assert (count["shop"]["s3"], count["shop"]["(other)"]) == (50, 175)
    assert count["floor"] == {"1": 500, "(missing)": 500}
    assert count["item_seen"] == {"False": 100, "True": 900}
    assert list(count["hour_of_day"]) == [str(hour) for hour in range(24)]
    times = frame["time"]
    for other in (times // 1000, times * 1000, times * 10**6, pd.to_datetime(times, unit="ms")):
        other = frame.assign(time=other)
        hours = segment_values(PredictionsTable(other, TASKS[:1]), "hour_of_day")
        assert hours.tolist() == segment_values(table, "hour_of_day").tolist()
    apart = evaluate_table(table, segments=["item_seen"]).segments["item_seen"]
    seen = evaluate_table(rows_of(table, frame["item_seen"].to_numpy()))
    assert finite(apart["True"]["tasks"]) == finite(seen.tasks)
    with pytest.raises(DataError, match=r"segments: no column 'prise' .*did you mean 'price'"):
        segment_values(table, "prise")
    with pytest.raises(DataError, match="too small to be seconds"):
        segment_values(PredictionsTable(frame.assign(time=np.arange(rows)), TASKS[:1]), "hour_of_day")


def test_everything_prints_within_a_terminal(capsys):
    table = made()
    found = evaluate_table(table, k=[3], segments=["user"], bootstrap=20)
    console = Console(width=100)
    print_details(found, console, [3])
    print_segments(found, console)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "the first 3 of each of 30 requests" in shown
    assert "value@3: " in shown
    assert "By user" in shown


def test_runs_are_compared_on_the_command_line(mtcl, tmp_path):  # noqa: F811
    write_predictions(tmp_path / "a.parquet", made(users=200, skill=0.5))
    write_predictions(tmp_path / "b/predictions/test.parquet", made(users=200, skill=2.0))
    status, shown, _ = mtcl("compare", "a.parquet", "b", "--draws", "40", "--k", "3", "--json", "c.json")
    assert status == 0
    assert "b (B) against a.parquet (A)" in shown
    assert "p (Holm)" in shown
    stored = json.loads((tmp_path / "c.json").read_text())["against"]["b"]
    assert {"value@3", "ndcg@3 click"} <= {d["metric"] for d in stored}
    assert next(d for d in stored if d["metric"] == "auc")["p_holm"] < 0.05
    status, shown, _ = mtcl("compare", "a.parquet", "b", "--draws", "20", "--value", "buy=1", "--all")
    assert "PR-AUC" in shown
    write_predictions(tmp_path / "other.parquet", made(users=199))
    for arguments, said in (
        (["a.parquet", "other.parquet"], "not judged on the same rows"),
        (["a.parquet"], "two runs at least"),
        (["a.parquet", "a.parquet"], "given twice"),
        (["a.parquet", "b", "--split", "val"], "no predictions for val"),
        (["a.parquet", "b", "--value", "buy"], "task=number"),
    ):
        status, _, error = mtcl("compare", *arguments)
        assert status == 2
        assert said in one_line(error)


def told_rows(shown):
    """Name -> the figures of its row, of a comparison that was printed."""
    row = r"(\S.*?)  +(-?\d+\.\d{4}|–)  +(-?\d+\.\d{4}|–)  +([+-]\d.*?\d|–)  +(\d\.\d{4}|–)(?:  +(\w*))? *"
    found = [re.fullmatch(row, line) for line in shown.splitlines()]
    return {parts[1]: [part or "" for part in parts.groups()[1:]] for parts in found if parts is not None}


@pytest.mark.parametrize("columns", ["80", "100", "140", None])
def test_a_comparison_is_told_whole_on_any_screen(mtcl, tmp_path, monkeypatch, columns):  # noqa: F811
    """Not a figure is cut, at 80 columns or in a pipe, and all of them stand in one line with what they are of."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    for name, skill in (("a", 0.5), ("b", 2.0)):
        table = made(users=60, skill=skill)
        buys = table.frame.index[table.frame["label.buy"] == 1]
        table.frame.loc[buys[9:], "label.buy"] = 0  # nine events: nothing is sure
        write_predictions(tmp_path / f"{name}.parquet", table)
    status, shown, error = mtcl("compare", "a.parquet", "b.parquet", "--draws", "20", "--k", "3", "--json", "c.json")
    assert (status, error) == (0, "")
    tables = [line for line in shown.splitlines() if re.search(r"\d\.\d{4}", line)]
    assert max(map(len, tables)) <= int(columns or 110)
    assert "…" not in shown
    stored = {
        (d["metric"] if d["of"] == "ranking" else f"{d['of']} {d['metric']}"): d
        for d in json.loads((tmp_path / "c.json").read_text())["against"]["b.parquet"]
    }
    rows = told_rows(shown)
    assert len(rows) == len(stored)
    for named, key in (("click AUC", "click auc"), ("value@3", "value@3"), ("NDCG@3 of click", "ndcg@3 click")):
        a, b, apart, p, better = rows[named]
        d = stored[key]
        assert (a, b, p) == (f"{d['a']:.4f}", f"{d['b']:.4f}", f"{d['p_holm']:.4f}")
        assert apart == f"{d['difference']:+.4f} ± {(d['high'] - d['low']) / 2:.4f}"
        assert better == ("B" if d["p_holm"] < 0.05 else "")
    assert rows["buy AUC"][-1] == "unsure"
    assert "unsure: too few events (9), of buy " in shown
    assert "worth click 1, buy 4, for all runs: as a.parquet (A) says" in shown
    shown = mtcl("compare", "b.parquet", "a.parquet", "--draws", "20", "--k", "3", "--value", "buy=2")[1]
    assert "worth buy 2, for all runs: as --value says" in shown


def test_several_runs_are_one_family_of_comparisons(mtcl, tmp_path):  # noqa: F811
    """Of many runs that are no better than the first, seldom is one called so."""
    for name, skill in (("a", 1.0), ("b", 1.1), ("c", 2.0), ("d", 1.0)):
        write_predictions(tmp_path / f"{name}.parquet", made(users=60, skill=skill))
    asked = ("--draws", 40, "--json", "found.json")
    status, shown, _ = mtcl("compare", *(f"{name}.parquet" for name in "abcd"), *asked)
    assert status == 0
    assert "allows for all comparisons of these 4 runs together" in shown
    of = json.loads((tmp_path / "found.json").read_text())["against"]
    every = [d for found in of.values() for d in found]
    equal = [d["difference"] == d["low"] == d["high"] == 0 for d in every]
    p = [np.nan if d["p"] is None or same else d["p"] for d, same in zip(every, equal, strict=True)]
    given = [np.nan if d["p_holm"] is None else d["p_holm"] for d in every]
    np.testing.assert_allclose(given, holm(p))
    assert sum(not np.isnan(value) for value in p) > len(of["b.parquet"])  # of more than one run
    status, shown, _ = mtcl("compare", "a.parquet", "c.parquet", *asked)
    assert "together" not in shown
    alone = json.loads((tmp_path / "found.json").read_text())["against"]["c.parquet"]
    both = [(a["p_holm"], b["p_holm"]) for a, b in zip(alone, of["c.parquet"], strict=True) if a["p_holm"] is not None]
    assert all(one <= many + 1e-12 for one, many in both)
    assert any(one < many for one, many in both)


def test_names_wrap_where_figures_need_the_room(capsys):
    rows = [["a task with a very long name", "0.1234", "+0.1234 ± 0.0123", "equal"]]
    for width in (80, 40, 30, 20, 10):
        print_columns(Console(width=width), "", ["task", "A", "B - A", "better"], rows)
        shown = capsys.readouterr().out
        for figure in rows[0][1:]:
            assert figure in shown
        assert "…" not in shown
        assert re.sub(r"\s", "", rows[0][0]) in re.sub(r"[\s\d.+±-]|equal", "", shown)
        assert len(shown.splitlines()) > 3 or width == 80


def test_a_finished_run_is_judged_by_everything(mtcl, tmp_path, monkeypatch):  # noqa: F811
    shop.log(1500).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(shop.RUN.replace("epochs: 4", "epochs: 1"))
    assert mtcl("train", "run.yaml", "--out", "run", "--device", "cpu")[0] == 0
    monkeypatch.setattr(stages, "TELL_EVERY", 0.0)
    status, shown, error = mtcl(
        "evaluate", "run", "--data", "log.parquet", "--batch-size", "600", "--all", "--k", "3",
        "--segments", "age,item_seen,hour_of_day",
        "--bootstrap", "20", "--save", "rows.parquet", "--json", "rows.json",
    )  # fmt: skip
    assert status == 0, error
    for said in (
        "log.parquet: 1,500 rows",
        "majority",
        "first 3 of each",
        "By age",
        "By hour_of_day",
        "± is half of a 95 % interval, over users",
    ):
        assert said in shown
    told = [line.removeprefix("mtcl: ") for line in error.splitlines()]
    for said in (
        r"predicting rows: 600 of 1,500, [\d,]+ rows/s, \d+ s left",
        r"predicting rows: 1,500 of 1,500, [\d,]+ rows/s, 0 s left",
        r"judging rows by age: 0 of 1,500",
        r"making draws of users: 20 of 20, [\d,]+ draws/s, 0 s left",
    ):
        assert any(re.fullmatch(said, line) for line in told), f"{said} in {told}"
    monkeypatch.setattr(stages, "TELL_EVERY", 10.0)
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert stored["tasks"]["click"]["f1"] > 0
    assert set(stored["segments"]) == {"age", "item_seen", "hour_of_day"}
    status, _, error = mtcl("compare", "run", "rows.parquet")
    assert "225 and 1,500 rows" in one_line(error)
    status, _, error = mtcl("evaluate", "run", "--data", "log.parquet", "--segments", "agee")
    assert "no column 'agee' (did you mean 'age'?)" in one_line(error)

    # Nobody's file is overwritten, and nothing is judged before that is clear.
    (tmp_path / "notes.json").write_text('{"tasks": "to do"}')
    before = {name: (tmp_path / name).read_bytes() for name in ("log.parquet", "notes.json", "run/metrics.json")}
    for arguments, said in (
        (["--save", "log.parquet"], "--save: log.parquet is something else, and is not overwritten"),
        (["--json", "notes.json"], "--json: notes.json is something else"),
        (["--json", "run/metrics.json"], "is something else"),
        (["--save", "run"], "is something else"),
        (["--bootstrap", "3"], "fewer than 20 draws"),
    ):
        status, shown, error = mtcl("evaluate", "run", "--data", "log.parquet", *arguments)
        assert (status, shown) == (2, "")
        assert said in one_line(error)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert "is something else" in one_line(mtcl("compare", "run", "rows.parquet", "--json", "notes.json")[2])
    assert "given twice" in one_line(mtcl("compare", "run", str(tmp_path / "run"))[2])

    # A column of the data counts as itself, also where it has the name of a key.
    log = shop.log(200)
    log.assign(user=log["genre"], popularity=log["hour"] > 11).to_parquet(tmp_path / "named.parquet", index=False)
    arguments = ["--data", "named.parquet", "--segments", "user,popularity,user_id,", "--k", "3", "--k", "3"]
    status, _, error = mtcl("evaluate", "run", *arguments, "--json", "deep/named.json")
    assert status == 0, error
    stored = json.loads((tmp_path / "deep/named.json").read_text())["segments"]
    assert set(stored["user"]) == set(shop.GENRES)
    assert set(stored["popularity"]) == {"False", "True"}
    assert "u3" in stored["user_id"]
    whole = (tmp_path / "run/metrics.json").read_text()
    for broken in ("{", "[]", '{"evaluations": {"val": {"tasks": {"click": {"threshold": "high"}}}}}'):
        (tmp_path / "run/metrics.json").write_text(broken)
        status, _, error = mtcl("evaluate", "run", "--data", "named.parquet")
        assert status == 2
        assert "metrics.json: not the metrics of a run" in one_line(error)
    (tmp_path / "run/metrics.json").write_text(whole)

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    status, shown, error = mtcl("compare", "run", "again", "--draws", "20", "--html", "both.html")
    assert status == 0, error
    assert "both.html" in shown
    assert "run and again say the same of every row" in shown
    again = yaml.safe_load((tmp_path / "again/run.yaml").read_text())
    (tmp_path / "again/run.yaml").write_text(yaml.safe_dump(again | {"evaluation": {"k": [4]}}))
    assert mtcl("compare", "again", "run", "--draws", "20", "--json", "four.json")[0] == 0
    stored = json.loads((tmp_path / "four.json").read_text())["against"]["run"]
    assert {d["metric"].partition("@")[2].split()[0] for d in stored if "@" in d["metric"]} == {"4"}
    page = (tmp_path / "both.html").read_text()
    assert "<svg" in page
    assert "again" in page
    status, _, error = mtcl("compare", "run", "rows.parquet", "--html", "both.html")
    assert "--html shows run directories, and rows.parquet is none" in one_line(error)

    # What a run has left there goes when it goes on, and nothing is written where nothing is wanted.
    assert (tmp_path / "run/predictions/val.parquet").is_file()
    with (tmp_path / "run.yaml").open("a") as file:
        file.write("evaluation: {save_predictions: false}\n")
    assert mtcl("train", "run.yaml", "--out", "run", "--device", "cpu", "--resume")[0] == 0
    assert not (tmp_path / "run/predictions").exists()
    assert set(thresholds_of(tmp_path / "run")) == {"click", "buy"}
    assert "no predictions for test" in one_line(mtcl("compare", "run", "rows.parquet")[2])

    # One that died before its end is judged by the epoch that it has kept, and says so.
    (tmp_path / "again/metrics.json").unlink()
    status, shown, error = mtcl("evaluate", "again", "--data", "log.parquet", "--k", "2", "--all")
    assert status == 0
    assert "the first 2 of each" in shown
    assert error.startswith("mtcl: training of again has not finished: metrics.json missing, last written to ")
    assert "best epoch so far" in error
    shutil.rmtree(tmp_path / "again/checkpoints")
    assert "has kept no epoch yet" in one_line(mtcl("evaluate", "again", "--data", "log.parquet")[2])
