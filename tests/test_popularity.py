"""Popularity is one thing: training, evaluate, the report, fuse and baselines state the same of the same rows."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import shop
from rich.console import Console

from mtcl_torchrec.baselines import Budget, run_baselines
from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.data.source import read_splits
from mtcl_torchrec.evaluation import predictions_file
from mtcl_torchrec.evaluation.metrics import auc, gauc
from mtcl_torchrec.evaluation.predictions_file import read_predictions, write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.ranked import RankedRows, reward_of
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.facts import events
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.directory import RunWarning
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.held_out import columns_needed, held_out_of, rows_of_split
from mtcl_torchrec.training.run import train_run

K, EVENTS = 2, ("click", "buy")
PLAIN = "fusion: {weights: {click: 1, buy: 3, taste: 0.5, stars: 0.5}}"
FUSIONS = {
    "mean": PLAIN,
    "priced": "fusion: {kind: expected_value, weights: {click: 2, buy: 1}, numbers: {buy: price}, given: {buy: click}}",
    "learned": "fusion: {kind: stacking, weights: {click: 2, buy: 1}, train: {reward: buy}}",
    "gated": "fusion: {kind: context_gated_mean, weights: {click: 2, buy: 1}, features: [hour], train: {reward: buy}}",
    "ranks": "fusion: {kind: reciprocal_rank, weights: {click: 2, buy: 1}}",
}


def trained(folder, fusion, weighed=""):
    log = shop.log(3000)
    # What is bought is not what is clicked: popularity of clicks says nothing of the other event.
    log["buy"] = ((log["click"] == 1) & (log["product_id"].str[1:].astype(int) % 7 < 3)).astype(int)
    log.to_parquet(folder / "log.parquet", index=False)
    text = shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256").replace(PLAIN, fusion)
    run = parse_run(f"{text}evaluation: {{k: [{K}, 5], values: {{click: 1, buy: 4}}}}\n", folder=folder)
    train_run(run, folder / "run", device="cpu", console=Console(quiet=True))
    return folder / "run"


def of_popularity(table):
    """What an independent count says of ranking a table's rows: AUC and GAUC by event, value@k."""
    found = {}
    for task in EVENTS:
        known = ~np.isnan(table.labels(task))
        y, s = table.labels(task)[known], table.popular_for[task][known]
        found |= {f"auc {task}": auc(y, s), f"gauc {task}": gauc(y, s, table.users[known])}
    rows = RankedRows(table, table.popular)
    return found | {f"value@{K}": rows.ranking.value_at_k(reward_of(table, table.values)[rows.known], K).mean()}


@pytest.mark.parametrize("kind", FUSIONS)
def test_all_commands_state_the_same_popularity(kind, tmp_path, mtcl):
    folder = trained(tmp_path, FUSIONS[kind])
    config = load_run(folder / "run.yaml")

    def stated(where=folder):
        return json.loads((where / "metrics.json").read_text())["evaluations"]["test"]["ranking"]["popular"]

    def check():
        table = read_predictions(folder / "predictions/test.parquet")
        expected = of_popularity(table)
        # train, or fuse, in metrics.json
        assert {key: stated()[key] for key in expected} == pytest.approx(expected)
        # evaluate, of the same rows as a file
        run = FinishedRun.load(folder)
        raw = rows_of_split(config, columns_needed(run), "test")
        raw.frame.to_parquet(tmp_path / "rows.parquet", index=False)
        mtcl("evaluate", folder, "--data", tmp_path / "rows.parquet", "--k", K, "--json", tmp_path / "found.json")
        of_evaluate = json.loads((tmp_path / "found.json").read_text())["ranking"]["popular"]
        assert {key: of_evaluate[key] for key in expected} == pytest.approx(expected)
        # the report
        shown = {event.task: event.rankings["popularity"][0] for event in events(read_contents(folder))}
        assert shown == pytest.approx({task: expected[f"gauc {task}"] for task in shown})
        assert set(shown) <= set(EVENTS)
        assert shown
        # fuse
        held_out = held_out_of(run, raw, session_minutes=0)
        np.testing.assert_array_equal(held_out.rankings["popularity"], table.popular)
        for task in EVENTS:
            np.testing.assert_array_equal(held_out.popular[task], table.popular_for[task])
        # baselines: popularity's own predictions, and the score that it gets
        run_baselines(config, folder, only=["popularity"], tasks=["click"], budget=Budget(8), say=lambda line: None)
        entry = json.loads((folder / "baselines.json").read_text())["popularity"]
        baseline = read_predictions(folder / "baselines/popularity/predictions/test.parquet")
        np.testing.assert_array_equal(baseline.score, table.popular)
        for task in EVENTS:
            np.testing.assert_array_equal(baseline.predicted(task), table.popular_for[task])
            assert entry["metrics"]["test"]["tasks"][task]["auc"] == pytest.approx(expected[f"auc {task}"])
            assert entry["metrics"]["test"]["ranking"]["popular"][f"auc {task}"] == pytest.approx(
                expected[f"auc {task}"]
            )
        assert entry["metrics"]["test"]["ranking"]["fused"][f"value@{K}"] == pytest.approx(expected[f"value@{K}"])
        return table

    before = check()
    mtcl("fuse", folder, "--set", "click=1,buy=9" if kind != "mean" else "click=1,buy=9,taste=0,stars=0")
    after = check()
    assert not np.array_equal(before.popular, after.popular)
    for task in EVENTS:
        np.testing.assert_array_equal(before.popular_for[task], after.popular_for[task])


def test_each_event_is_held_against_its_own_popularity(tmp_path):
    folder = trained(tmp_path, PLAIN)
    run, table = load_run(folder / "run.yaml"), read_predictions(folder / "predictions/test.parquet")
    splits = read_splits(run.data, ["product_id", "click", "buy", "stars", "time"], "time")
    train, test = splits["train"].frame, splits["test"].frame
    for task in EVENTS:
        label = train[task] if task == "click" else train[task].where(train["click"] == 1)
        usual = label.mean()
        of_item = label.groupby(train["product_id"]).agg(["sum", "count"])
        shares = test["product_id"].map((of_item["sum"] + 20 * usual) / (of_item["count"] + 20)).fillna(usual)
        np.testing.assert_allclose(table.popular_for[task], shares, rtol=1e-6)
    labels = table.labels("buy")
    known = ~np.isnan(labels)
    own, clicks = (auc(labels[known], table.popular_for[task][known]) for task in ("buy", "click"))
    assert own > 0.75 > 0.6 > clicks
    told = json.loads((folder / "metrics.json").read_text())["evaluations"]["test"]
    assert told["ranking"]["popular"]["auc buy"] == pytest.approx(own)
    # fused as the run fuses: the item's own class by its share, the stars by the logistic function
    parts = {task: table.popular_for[task] for task in EVENTS}
    stars = next(task for task in FinishedRun.load(folder).model.tasks if task.name == "stars")
    parts["stars"] = 1 / (1 + np.exp(-(table.popular_for["stars"] - stars.mean) / stars.std))
    genre = read_splits(run.data, ["genre", "click", "time"], "time")
    clicked = genre["train"].frame.query("click == 1")["genre"].value_counts()
    classes = FinishedRun.load(folder).model.tasks[2].num_classes
    parts["taste"] = (genre["test"].frame["genre"].map(clicked).fillna(0) + 1 / classes) / (clicked.sum() + 1)
    weights = run.fusion.weights
    fused = sum(weights[task] * parts[task].to_numpy() if isinstance(parts[task], pd.Series)
                else weights[task] * parts[task] for task in weights) / sum(weights.values())  # fmt: skip
    np.testing.assert_allclose(table.popular, fused, rtol=1e-4)
    check_that_a_former_run_says_so(folder, table)


def check_that_a_former_run_says_so(folder, table):
    """A run from before: it kept no popularity of events, and calls popularity what is that of clicks."""
    (folder / "catalogue/rates.parquet").unlink()
    run = FinishedRun.load(folder)
    raw = rows_of_split(load_run(folder / "run.yaml"), columns_needed(run), "test")
    with pytest.warns(RunWarning, match="before it kept how popular items are for each event"):
        assert "popularity" not in held_out_of(run, raw, session_minutes=0).rankings
    assert "popularity" in events(read_contents(folder))[0].rankings
    kept = table.frame[[column for column in table.frame if not column.startswith("popular.") and column != "popular"]]
    write_predictions(folder / "predictions/test.parquet", dataclasses.replace(table, frame=kept))
    former = read_contents(folder)
    assert all("popularity" not in event.rankings for event in events(former))
    assert any("held against no popularity" in line for line in former.missing)


def test_a_file_from_before_each_event_had_its_own_is_read_without_popularity(tmp_path, monkeypatch):
    frame = pd.DataFrame(
        {"label.click": [1.0, 0.0], "p.click": [0.5, 0.5], "popular": [0.1, 0.2], "popularity": [1.0, 2]}
    )
    now = PredictionsTable(frame, (Task.binary("click"),))
    with monkeypatch.context() as patched:
        patched.setattr(predictions_file, "FORMAT", 1)
        write_predictions(tmp_path / "old.parquet", now)
    write_predictions(tmp_path / "new.parquet", now)
    old, new = (read_predictions(tmp_path / f"{name}.parquet") for name in ("old", "new"))
    assert (old.popular, old.popular_for) == (None, {})
    np.testing.assert_array_equal(old.popularity, new.popularity)
    np.testing.assert_array_equal(new.popular, [0.1, 0.2])
    assert dataclasses.replace(new).popular is not None
