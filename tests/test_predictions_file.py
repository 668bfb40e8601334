"""Predictions as a file: what is written is what was predicted, of every kind of task, on one rank and on two."""

import io
import json

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import shop
from ranks import run_ranks
from rich.console import Console
from sklearn.metrics import roc_auc_score

from mtcl_torchrec import Task
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.source import read_rows, split_by_time
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.predictions_file import METADATA, read_predictions, write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable, predictions_table
from mtcl_torchrec.evaluation.report import print_evaluation
from mtcl_torchrec.evaluation.thresholds import chosen_thresholds
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.judging import evaluation_as_json, thresholds_of
from mtcl_torchrec.training.run import train_run

NAN = float("nan")
TASKS = [Task.binary("click"), Task.binary("buy", after="click"), Task.multiclass("taste", 3), Task.regression("stars")]


def made(rows=10, seed=0):
    draw = np.random.default_rng(seed)
    click, given = draw.random(rows).astype("f"), draw.random(rows).astype("f")
    predictions = {
        "click": click, "buy": click * given, "buy|click": given, "stars": draw.normal(size=rows).astype("f"),
        "taste": draw.dirichlet(np.ones(3), rows).astype("f"), "score": draw.random(rows).astype("f"),
    }  # fmt: skip
    labels = np.stack([(draw.random(rows) < 0.5), np.zeros(rows), draw.integers(0, 3, rows), draw.random(rows)], 1)
    labels = labels.astype("f")
    labels[0, 2:] = NAN
    before = predictions | {"click": click / 2, "taste": predictions["taste"][:, ::-1]}
    users = pd.Series(["a", "b", None, "a", "c"] * (rows // 5), index=np.arange(rows) + 7)
    keys = {"user": users, "item": np.arange(rows) % 4, "popularity": np.arange(rows, dtype="f")}
    return predictions_table(
        TASKS, predictions, labels, keys=keys, uncalibrated=before, split="val", thresholds={"click": 0.1}
    )


def test_what_is_written_is_read_back(tmp_path):
    table = made()
    write_predictions(tmp_path / "a/val.parquet", table)
    again = read_predictions(tmp_path / "a/val.parquet")
    pd.testing.assert_frame_equal(again.frame, table.frame)
    assert (again.tasks, again.split, again.thresholds) == (table.tasks, "val", {"click": 0.1})
    assert set(again.classes) == {"p.taste", "uncalibrated.taste"}
    for name in (*again.predicted_names, "click"):
        for calibrated in (True, False):
            np.testing.assert_array_equal(
                again.predicted(name, calibrated=calibrated), table.predicted(name, calibrated=calibrated)
            )
    assert again.predicted_names == ("click", "buy", "buy|click", "taste", "stars")
    assert "uncalibrated.stars" not in again.frame
    assert not np.array_equal(again.predicted("click"), again.predicted("click", calibrated=False))
    assert again.users[:5].tolist()[:2] == [0, 1]
    assert np.isnan(again.users[2])
    assert again.requests is again.users
    np.testing.assert_array_equal(again.score, table.score)
    clicked = again.labels("click") == 1
    np.testing.assert_array_equal(np.isnan(again.labels("buy|click")), ~clicked)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["val.parquet"]
    part = read_predictions(tmp_path / "a/val.parquet", columns=["score"])
    assert set(part.frame) == {"score", *(f"label.{t.name}" for t in TASKS)}
    assert part.users is None


def test_class_probabilities_are_lists_of_one_length_over_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("mtcl_torchrec.evaluation.predictions_file.ROWS_AT_ONCE", 4)
    table = made()
    write_predictions(tmp_path / "val.parquet", table)
    with pyarrow.parquet.ParquetFile(tmp_path / "val.parquet") as file:
        assert file.num_row_groups == 3
        assert file.schema_arrow.field("p.taste").type == pyarrow.list_(pyarrow.float32(), 3)
    np.testing.assert_array_equal(
        read_predictions(tmp_path / "val.parquet").predicted("taste"), table.classes["p.taste"]
    )


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path, monkeypatch):
    table = PredictionsTable(pd.DataFrame({"label.a": np.zeros(3)}), (Task.binary("a"),))
    write_predictions(tmp_path / "a.parquet", table)
    before = (tmp_path / "a.parquet").read_bytes()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_predictions(tmp_path / "a.parquet", table)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    assert (tmp_path / "a.parquet").read_bytes() == before


def test_the_fingerprint_names_rows_and_not_predictions():
    table = made()
    other = table.frame.assign(score=0.0)
    assert PredictionsTable(other, table.tasks, classes=table.classes).fingerprint == table.fingerprint
    as_text = table.frame.assign(item=table.frame["item"].astype(str))
    assert PredictionsTable(as_text, table.tasks).fingerprint == table.fingerprint
    for changed in (table.frame[::-1], table.frame.assign(**{"label.stars": 0}), table.frame.assign(item=0)):
        assert PredictionsTable(changed, table.tasks).fingerprint != table.fingerprint


def test_what_is_no_file_of_predictions_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        read_predictions(tmp_path / "none.parquet")
    shop.log(5).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"log\.parquet: no file of predictions"):
        read_predictions(tmp_path / "log.parquet")
    table = made()
    with pytest.raises(DataError, match=r"no task 'clik' \(did you mean 'click'\?\)"):
        table.labels("clik")
    with pytest.raises(DataError, match="none of 'clik'"):
        table.predicted("clik")
    with pytest.raises(DataError, match=r"no column label\.like"):
        PredictionsTable(table.frame, (Task.binary("like"),))
    newer = table.frame.drop(columns=["user"])
    write_predictions(tmp_path / "new.parquet", PredictionsTable(newer, table.tasks))
    arrow = pyarrow.parquet.read_table(tmp_path / "new.parquet")
    about = json.loads(arrow.schema.metadata[METADATA]) | {"format": 99}
    pyarrow.parquet.write_table(arrow.replace_schema_metadata({METADATA: json.dumps(about)}), tmp_path / "new.parquet")
    with pytest.raises(DataError, match="of format 99"):
        read_predictions(tmp_path / "new.parquet")


def trained(text, data, folder):
    run = parse_run(text, folder=data)
    train_run(run, folder, device="cpu", console=Console(quiet=True))


RUN = (
    shop.RUN.replace("epochs: 4", "epochs: 1").replace(
        "{name: click, kind: binary}", "{name: click, kind: binary, sample_weight: age}"
    )
    + """
calibration: {buy: platt, taste: temperature}
evaluation:
  {k: [2, 7], values: {click: 1, stars: 0.5}, threshold: youden, bootstrap: 20,
   segments: [age, genre, item_seen, user_seen, hour_of_day]}
"""
)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"values": {"click": "much"}}, "could not convert string to float: 'much'"),
        ({"thresholds": {"click": None}}, "float"),
        ({"values": [1]}, "has no attribute 'items'"),
        ({"tasks": [{"name": "click", "kind": "nope"}]}, "Input should be 'binary', 'multiclass' or 'regression'"),
    ],
)
def test_damaged_words_about_predictions_are_one_line(tmp_path, changed, said):
    path = tmp_path / "p.parquet"
    frame = pd.DataFrame({"label.click": [1.0], "p.click": [0.5]})
    write_predictions(path, PredictionsTable(frame, (Task.binary("click"),)))
    arrow = pyarrow.parquet.read_table(path)
    about = json.dumps(json.loads(arrow.schema.metadata[METADATA]) | changed).encode()
    pyarrow.parquet.write_table(arrow.replace_schema_metadata({METADATA: about}), path)
    with pytest.raises(DataError, match="a damaged one") as refused:
        read_predictions(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("column", ["score", "popular", "popular.click"])
def test_what_ranks_is_a_number(column):
    frame = pd.DataFrame({"label.click": [1.0, 0.0], column: [0.5, np.nan]})
    with pytest.raises(DataError, match=f"predictions: {column}, row 1: NaN ranks nowhere"):
        PredictionsTable(frame, (Task.binary("click"),))


def test_a_run_keeps_its_predictions_in_the_order_of_the_split(tmp_path):
    log = shop.log()
    log.to_parquet(tmp_path / "log.parquet", index=False)
    run_ranks(trained, 2, RUN, tmp_path, tmp_path / "run")
    run = FinishedRun.load(tmp_path / "run")
    parts = split_by_time(read_rows([str(tmp_path / "log.parquet")]), "time", 0.15, 0.15)
    thresholds = {}
    for split in ("val", "test"):
        raw = parts[split]
        table = read_predictions(tmp_path / f"run/predictions/{split}.parquet")
        assert table.split == split
        assert table.frame["user"].tolist() == raw.frame["user_id"].tolist()
        assert table.frame["item"].tolist() == raw.frame["product_id"].tolist()
        assert table.frame["time"].tolist() == raw.frame["time"].tolist()
        rows = run.preprocessor.encode(raw)
        for name, values in predict(run.model, rows).items():
            found = table.score if name == "score" else table.predicted(name)
            np.testing.assert_allclose(found, values, atol=2e-6)
        for i, task in enumerate(run.model.tasks):
            np.testing.assert_array_equal(table.labels(task.name), rows.labels[:, i].numpy())
        assert {c for c in table.frame if c.startswith("uncalibrated")} == {"uncalibrated.buy"}
        assert set(table.classes) == {"p.taste", "uncalibrated.taste"}
        train = parts["train"].frame
        clicks = train.groupby("product_id")["click"].sum()
        np.testing.assert_array_equal(table.popularity, raw.frame["product_id"].map(clicks))
        weight = train["age"] / train["age"].mean()  # clicks count as the loss weighs them
        shown, weighed = (of.groupby(train["product_id"]).sum() for of in (weight, weight * train["click"]))
        usual = weighed.sum() / shown.sum()
        shares = raw.frame["product_id"].map((weighed + 20 * usual) / (shown + 20)).fillna(usual)
        np.testing.assert_allclose(table.popular_for["click"], shares, rtol=1e-6)
        assert set(table.popular_for) == {"click", "buy", "stars"}
        assert table.frame["user_seen"].tolist() == raw.frame["user_id"].isin(train["user_id"]).tolist()
        assert table.frame["segment.age"].tolist() == raw.frame["age"].tolist()
        assert table.values == {"click": 1, "stars": 0.5}
        np.testing.assert_array_equal(table.weights("click"), raw.frame["age"])
        assert table.weights("buy") is None
        thresholds[split] = table.thresholds
    val = read_predictions(tmp_path / "run/predictions/val.parquet")
    assert thresholds["val"] == thresholds["test"] == chosen_thresholds(val, "youden")
    assert thresholds_of(tmp_path / "run") == thresholds["test"]
    assert set(thresholds["test"]) == {"click", "buy"}

    # What metrics.json says is what the file says.
    stored = json.loads((tmp_path / "run/metrics.json").read_text())["evaluations"]
    assert stored["val"]["intervals"] == {}
    again = evaluate_table(
        table, fused_tasks=run.model.output.fused_score.tasks, k=[2, 7], bootstrap=20,
        segments=["age", "genre", "item_seen", "user_seen", "hour_of_day"],
    )  # fmt: skip
    assert evaluation_as_json(again) == stored["test"]
    assert again.tasks["click"]["weighted_auc"] == roc_auc_score(
        table.labels("click"), table.predicted("click"), sample_weight=table.weights("click")
    )
    print_evaluation(again, "test", console := Console(file=io.StringIO(), width=80))
    assert "By sample weights" in console.file.getvalue()
    sure = again.intervals["click"]["weighted_auc"]
    assert sure.low < sure.value < sure.high
    assert again.against_popularity["click"]["metric"] == "gauc"
    assert set(again.segments) == {"age", "genre", "item_seen", "user_seen", "hour_of_day"}
    assert sum(of["rows"] for of in again.segments["genre"].values()) == len(table)
    assert {"value@2", "value@2 half", "ndcg@7 click", "coverage@7", "novelty@2"} <= set(again.ranking["popular"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("k: [5, 5]", "evaluation.k: 5 stands there twice"),
        ("k: []", "evaluation.k"),
        ("bootstrap: 3", "fewer than 20 draws"),
        ("values: {clik: 1}", r"evaluation.values: no task 'clik' \(did you mean 'click'\?\)"),
        ("values: {taste: 1}", "task 'taste' is multiclass"),
        ("threshold: best", "evaluation.threshold"),
        ("treshold: f1", r"unknown key 'evaluation.treshold' \(did you mean 'threshold'\?\)"),
    ],
)
def test_wrong_settings_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        parse_run(shop.RUN + f"evaluation: {{{given}}}\n")


@pytest.mark.parametrize(
    ("segment", "said"),
    [
        ("topics", "segments: column 'topics' holds lists; a row is in one segment"),
        ("hour_of_day", "hour_of_day: the time column holds numbers too small"),
        ("gnre", r"no column 'gnre' \(did you mean 'genre'\?\)"),
    ],
)
def test_segments_that_cannot_be_told_apart_are_refused_before_training(tmp_path, monkeypatch, segment, said):
    shop.log(300).assign(time=np.arange(300)).to_parquet(tmp_path / "log.parquet", index=False)
    monkeypatch.setattr("mtcl_torchrec.training.run.build_model", None)
    with pytest.raises(DataError, match=said):
        trained(shop.RUN + f"evaluation: {{segments: [{segment}]}}\n", tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_visits_that_are_numbered_anew_for_each_user_are_told_before_training(tmp_path):
    log = shop.log(600)
    log["visit"] = log.groupby("user_id").cumcount() // 3
    log["visit_of_user"] = log["user_id"] + "-" + log["visit"].astype(str)
    log.loc[::50, "visit"] = None
    log.to_parquet(tmp_path / "log.parquet", index=False)
    said = {}
    for request in ("visit", "visit_of_user"):
        text = shop.RUN.replace("  user: user_id\n", f"  user: user_id\n  request: {request}\n")
        run = parse_run(text.replace("epochs: 4", "epochs: 1"), folder=tmp_path)
        console = Console(file=io.StringIO(), width=400)
        train_run(run, tmp_path / request, device="cpu", console=console)
        said[request] = [line for line in console.file.getvalue().splitlines() if "schema.request" in line]
    assert said["visit_of_user"] == []
    (line,) = said["visit"]
    val = split_by_time(read_rows([tmp_path / "log.parquet"]), "time", 0.15, 0.15)["val"].frame
    many = (val.groupby("visit")["user_id"].nunique() > 1).sum()
    assert line.startswith(
        f"WARNING: schema.request: {many} of {val['visit'].nunique()} values of 'visit' in val are of"
    )
    assert line.endswith("such as user_id and visit joined")


def test_segments_that_need_a_column_are_refused_without_it():
    text = shop.RUN.replace("  item: product_id\n", "") + "evaluation: {segments: [item_seen]}\n"
    with pytest.raises(ConfigError, match=r"evaluation.segments: item_seen needs schema\.item"):
        parse_run(text)
