"""The command line as a person uses it: from `init` to `recommend` on a file of their own; mistakes are one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shop
import yaml

import mtcl_torchrec
from mtcl_torchrec.cli import commands, twins
from mtcl_torchrec.data import kuairand
from mtcl_torchrec.data.draft import draft_run
from mtcl_torchrec.evaluation.predictions_file import write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.schema import ConfigError, Task
from mtcl_torchrec.training import held_out


@pytest.fixture
def mtcl(command, monkeypatch, tmp_path):
    """Runs the command in an empty folder and gives (exit status, what it printed, what it said on stderr)."""
    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.parquet"
    shop.log().drop(columns="stars").to_parquet(path, index=False)
    return path


def one_line(error):
    assert error.count("\n") == 1, error
    assert error.startswith("mtcl: ")
    return error


def test_from_a_file_of_ones_own_to_recommendations(mtcl, log, tmp_path):
    status, text, _ = mtcl("init", "log.parquet")
    assert status == 0
    drafted = yaml.safe_load(text)
    features = {f["name"]: f for f in drafted["schema"]["features"]}
    assert {n: f["group"] for n, f in features.items()} == {
        "user_id": "user", "age": "user", "product_id": "item", "genre": "item", "topics": "item", "price": "item",
        "hour": "context",
    }  # fmt: skip
    assert features["topics"]["kind"] == "bag"
    assert features["price"]["kind"] == "dense"
    assert [t["label"] for t in drafted["schema"]["tasks"]] == ["click", "buy"]
    assert (drafted["schema"]["user"], drafted["schema"]["item"], drafted["schema"]["time"]) == (
        "user_id", "product_id", "time",
    )  # fmt: skip

    (tmp_path / "run.yaml").write_text(text.replace("epochs: 20", "epochs: 2").replace("lr: 0.02}", "lr: 0.1}"))
    status, shown, _ = mtcl("train", "run.yaml", "--device", "cpu")
    assert status == 0
    assert "epoch 2/2" in shown
    assert "runs/log" in shown
    assert (tmp_path / "runs/log/metrics.json").exists()

    status, shown, _ = mtcl("evaluate", "runs/log", "--data", "log.parquet")
    assert status == 0
    assert "log.parquet: 3,000 rows" in shown
    assert "click" in shown

    status, shown, _ = mtcl("recommend", "runs/log", "--user", "u3", "--context", "hour=20", "--top", "4", "--seen")
    assert status == 0
    assert "Top 4 for user u3 (hour=20)" in shown
    assert shown.count(" p") >= 4

    status, shown, _ = mtcl("recommend", "runs/log", "--user", "stranger", "--top", "2")
    assert "User stranger is not in the log" in shown

    goods = pd.DataFrame(
        {"product_id": pd.read_parquet("log.parquet")["product_id"].unique(), "name": "[a] thing of a long name " * 3}
    )
    goods.to_csv("goods.csv", index=False)
    status, shown, _ = mtcl("recommend", "runs/log", "--user", "u3", "--top", "5000", "--titles", "goods.csv")
    assert (status, shown.count("[a] thing of a long name")) == (0, shown.count("…"))
    assert f"Top {shown.count('…')} for user u3" in shown
    status, _, said = mtcl("recommend", "runs/log", "--user", "u3", "--titles", "log.parquet")
    assert (status, "no column 'title' or 'name'" in said) == (2, True)

    # A second run of the same name does not touch the first.
    status, shown, _ = mtcl("train", "run.yaml", "--device", "cpu")
    assert "runs/log-2" in shown


def test_init_writes_a_file_whose_paths_start_at_its_own_folder(mtcl, log, tmp_path):
    (tmp_path / "configs").mkdir()
    status, _, _ = mtcl("init", "log.parquet", "--out", "configs/run.yaml", "--label", "click", "--item", "genre")
    assert status == 0
    drafted = yaml.safe_load((tmp_path / "configs/run.yaml").read_text())
    assert drafted["data"]["log"] == "../log.parquet"
    assert [t["name"] for t in drafted["schema"]["tasks"]] == ["click"]
    assert drafted["schema"]["item"] == "genre"
    assert "configs/run.yaml exists already" in one_line(mtcl("init", "log.parquet", "--out", "configs/run.yaml")[2])


def test_init_copes_with_odd_names_and_columns(mtcl, tmp_path):
    frame = shop.log(600).drop(columns="stars")
    frame = frame.rename(columns={"genre": "a: b, c", "hour": "yes", "buy": "is_buy #1"})
    frame["second_time"] = pd.to_datetime(frame["time"], unit="s")
    frame["nothing"] = pd.Series([None] * len(frame), dtype="float64")
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    status, text, _ = mtcl("init", "log.parquet")
    assert status == 0
    drafted = yaml.safe_load(text)
    names = [f["name"] for f in drafted["schema"]["features"]]
    assert {"a: b, c", "yes"} <= set(names)
    assert not {"second_time", "nothing"} & set(names)
    assert drafted["schema"]["tasks"][1] == {"name": "buy #1", "kind": "binary", "label": "is_buy #1"}
    (tmp_path / "run.yaml").write_text(text.replace("epochs: 20", "epochs: 1"))
    assert mtcl("train", "run.yaml", "--device", "cpu")[0] == 0


def test_init_takes_no_outcome_for_an_input_and_weighs_a_skip_down(mtcl, tmp_path):
    frame = shop.log(900).drop(columns="stars").rename(columns={"click": "finale_seen", "buy": "skipped"})
    frame["saved"] = (frame["price"] > 30).astype(int) * frame["finale_seen"]
    frame["time"] = pd.to_datetime(frame["time"], unit="s").dt.strftime("%Y-%m-%dT%H:%M:%S")
    frame["genres"] = frame["topics"].map("|".join)
    frame.drop(columns=["topics", "product_id"]).to_parquet(tmp_path / "log.parquet", index=False)
    status, text, _ = mtcl("init", "log.parquet")
    assert status == 0
    drafted = yaml.safe_load(text)
    features = {f["name"]: f for f in drafted["schema"]["features"]}
    # An outcome of unknown name is no input; it stands there as a comment with a warning.
    assert "finale_seen" not in features
    assert "# - {name: finale_seen" in text
    assert [t["name"] for t in drafted["schema"]["tasks"]] == ["skipped", "saved"]
    assert drafted["fusion"]["weights"]["skipped"] < 0 < drafted["fusion"]["weights"]["saved"]
    assert drafted["schema"]["time"] == "time"
    assert features["genres"]["kind"] == "bag"
    assert "No item column was found" in text
    (tmp_path / "run.yaml").write_text(text.replace("epochs: 20", "epochs: 1"))
    assert mtcl("train", "run.yaml", "--device", "cpu")[0] == 0


def test_init_takes_no_column_for_an_input_that_is_known_of_some_rows_only(mtcl, tmp_path):
    frame = shop.log()
    frame["rating"] = frame["stars"].round().astype("Int64")  # given where something was bought
    frame.drop(columns="stars").to_parquet(tmp_path / "log.parquet", index=False)
    status, text, _ = mtcl("init", "log.parquet")
    assert status == 0
    assert "rating" not in [f["name"] for f in yaml.safe_load(text)["schema"]["features"]]
    assert "# - {name: rating" in text


def test_prepared_data_train_the_same_model_as_raw_data(mtcl, tmp_path):
    shop.log().to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(shop.RUN.replace("epochs: 4", "epochs: 1"))
    status, shown, _ = mtcl("prepare", "run.yaml", "--out", "prepared")
    assert status == 0
    assert "counted per user_id × genre" in shown
    train = pd.read_parquet(tmp_path / "prepared/train.parquet")
    assert {"count(user_id)", "rate(click|user_id,genre)"} <= set(train.columns)
    assert mtcl("train", "run.yaml", "--out", "raw", "--device", "cpu")[0] == 0
    assert mtcl("train", "prepared/run.yaml", "--out", "ready", "--device", "cpu")[0] == 0
    assert (tmp_path / "raw/metrics.json").read_text().split('"seconds"')[0] == (
        (tmp_path / "ready/metrics.json").read_text().split('"seconds"')[0]
    )
    (tmp_path / "prepared").rename(tmp_path / "moved")  # the run needs nothing of it any more
    raw, ready = (mtcl("recommend", run, "--user", "u3")[1] for run in ("raw", "ready"))
    assert raw == ready
    assert "moved is not empty" in one_line(mtcl("prepare", "run.yaml", "--out", "moved")[2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("column", "genre", "genra"), "log.parquet: no column 'genre' (did you mean 'genra'?)"),
        (("label", "click", 7, 2), "log.parquet, row 7: click = 2; a label of binary task 'click' is 0 or 1"),
        (("yaml", "num_experts", "num_expert"), "unknown key 'model.trunk.num_expert' (did you mean 'num_experts'?)"),
        (("yaml", "log.parquet", "logs.parquet"), "no Parquet or CSV file at"),
        (("yaml", "name: hour, group: context", "name: hour, encoding: index, vocabulary_size: 12, group: context"),
         "lies outside its table of 12 rows"),
        (("yaml", "kind: mmoe", "kind: moe"), "model.trunk.kind: "),
        (("yaml", "epochs: 4", "epochs: five"), "training.epochs: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_no_traceback(mtcl, tmp_path, change, says):
    frame, text = shop.log(400), shop.RUN
    kind, *what = change
    if kind == "column":
        frame = frame.rename(columns={what[0]: what[1]})
    elif kind == "label":
        frame.loc[what[1], what[0]] = what[2]
    else:
        assert what[0] in text
        text = text.replace(what[0], what[1])
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(text)
    status, _, error = mtcl("train", "run.yaml", "--device", "cpu")
    assert status == 2
    assert says in one_line(error)
    assert not list(tmp_path.glob("runs/*"))  # a run that never began leaves nothing behind


def test_what_was_given_in_place_of_what_a_command_takes_is_named(mtcl, log, tmp_path):
    (tmp_path / "run.yaml").write_text(shop.RUN.replace("epochs: 4", "epochs: 1"))
    shop.log(400).to_parquet(log, index=False)
    said = one_line(mtcl("evaluate", "run.yaml", "--data", "log.parquet")[2])
    assert "runs/ holds no finished run of it as it stands: mtcl train run.yaml makes one" in said
    assert mtcl("train", "run.yaml", "--out", "runs/shop", "--device", "cpu")[0] == 0
    for arguments, said in (
        (["train", "runs/shop"], "runs/shop is a run, and mtcl train takes its YAML: mtcl train runs/shop/run.yaml"),
        (["tune", "runs/shop"], "runs/shop is a run, and mtcl tune takes its YAML: mtcl tune runs/shop/run.yaml"),
        (["train", "runs"], "runs is a folder, and mtcl train takes the YAML of a run; the runs in it: runs/shop"),
        (["train", "log.parquet"], "mtcl init log.parquet > run.yaml writes one for it"),
        (["evaluate", "log.parquet", "--data", "log.parquet"], "log.parquet is data, and mtcl evaluate takes"),
        (["evaluate", "run.yaml", "--data", "log.parquet"], "its run is runs/shop: mtcl evaluate runs/shop"),
        (["fuse", "run.yaml"], "run.yaml is a YAML; its run is runs/shop: mtcl fuse runs/shop"),
        (["report", "run.yaml"], "run.yaml is a YAML; its run is runs/shop: mtcl report runs/shop"),
        (["recommend", "run.yaml", "--user", "u1"], "its run is runs/shop: mtcl recommend runs/shop"),
        (["compare", "run.yaml", "runs/shop"], "its run is runs/shop"),
        (["report", "runs"], "runs is a folder of runs; name one of them: runs/shop"),
        (["evaluate", "runs", "--data", "log.parquet"], "runs is a folder of runs"),
    ):
        status, shown, error = mtcl(*arguments)
        assert (status, shown) == (2, ""), arguments
        assert said in one_line(error), arguments
    # What is said to go on does.
    assert mtcl("train", "runs/shop/run.yaml", "--out", "runs/shop", "--resume", "--device", "cpu")[0] == 0


def test_other_mistakes_are_one_line_too(mtcl, log, tmp_path):
    assert "no such file" in one_line(mtcl("train", "nowhere.yaml")[2])
    assert "nowhere: no run here, and no such file" in one_line(mtcl("recommend", "nowhere", "--user", "1")[2])
    assert "no run here" in one_line(mtcl("recommend", tmp_path, "--user", "1")[2])
    assert "no Parquet or CSV file at" in one_line(mtcl("init", "nothing.parquet")[2])
    assert "no column 'clck' (did you mean 'click'?)" in one_line(mtcl("init", "log.parquet", "--label", "clck")[2])
    assert "not 0 or 1 everywhere" in one_line(mtcl("init", "log.parquet", "--label", "age")[2])
    (tmp_path / "run.yaml").write_text(mtcl("init", "log.parquet")[1].split("statistics:")[0] + "model: {}\n")
    assert "nothing to prepare" in one_line(mtcl("prepare", "run.yaml", "--out", "p")[2])
    (tmp_path / "empty.csv").write_text("a,b\n")
    assert "no rows" in one_line(mtcl("init", "empty.csv")[2])


def test_nothing_of_a_persons_own_is_overwritten(mtcl, tmp_path):
    shop.log(300).to_parquet(tmp_path / "train.parquet", index=False)
    shop.log(300, seed=1).to_parquet(tmp_path / "val.parquet", index=False)
    log = "data: {log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}"
    files = "data: {train: train.parquet, val: val.parquet}"
    (tmp_path / "run.yaml").write_text(shop.RUN.replace(log, files))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for command in (["train", "run.yaml", "--out", "."], ["prepare", "run.yaml", "--out", "."], ["demo", "--out", "."]):
        status, _, error = mtcl(*command)
        assert status == 2
        assert "not empty" in one_line(error)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_wrong_devices_and_unwritable_folders_are_one_line(mtcl, tmp_path):
    shop.log(300).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(shop.RUN)
    assert mtcl("train", "run.yaml", "--device", "gpu")[0] == 2
    (tmp_path / "file").write_text("")
    assert "Not a directory" in one_line(mtcl("train", "run.yaml", "--device", "cpu", "--out", "file/run")[2])


@pytest.mark.full
def test_torchrun_trains_one_run_on_two_ranks(tmp_path):
    """As test_faults.py has it of ranks that are killed, by the command that people give."""
    shop.log().to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(shop.RUN.replace("epochs: 4", "epochs: 1"))
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mtcl_torchrec"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "train", "run.yaml", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 ranks on cpu" in done.stdout
    assert done.stdout.count("epoch 1/1") == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["shop"]


def test_a_run_is_resumed_and_flags_that_exclude_each_other_are_refused(mtcl, log, tmp_path):
    (tmp_path / "run.yaml").write_text(
        shop.RUN.replace("epochs: 4", "epochs: 1")
        .replace("    - {name: stars, kind: regression, loss: huber, weight: 0.2}\n", "")
        .replace(", stars: 0.5", "")
    )
    assert mtcl("train", "run.yaml", "--out", "run", "--device", "cpu", "--resume")[0] == 0  # nothing there: begins
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text().replace("epochs: 1", "epochs: 2"))
    status, _, error = mtcl("train", "run.yaml", "--out", "run", "--device", "cpu")
    assert (status, "holds a run already; resume it" in one_line(error)) == (2, True)
    status, shown, _ = mtcl("train", "run.yaml", "--out", "run", "--device", "cpu", "--resume")
    assert status == 0
    assert "going on after step" in shown
    assert "epoch 2/2" in shown
    assert "epoch 1/2" not in shown
    assert "give one of them" in one_line(mtcl("train", "run.yaml", "--out", "run", "--resume", "--overwrite")[2])
    for option in ("--resume", "--overwrite"):
        assert f"{option} needs --out" in one_line(mtcl("train", "run.yaml", option)[2])


def test_a_world_is_drafted_and_written(mtcl, tmp_path):
    status, text, _ = mtcl("init", "--world", "courses")
    assert status == 0
    assert yaml.safe_load(text)["data"]["synthetic"]["world"] == "courses"
    sizes = ("--users", 50, "--items", 20, "--horizon", 300)
    assert mtcl("synth", "a.parquet", "--world", "courses", "--rows", 200, *sizes, "--set", "missing=0.5")[0] == 0
    assert mtcl("synth", "b.parquet", "--world", "courses", "--rows", 100, "--start", 200, *sizes)[0] == 0
    assert mtcl("synth", "all.parquet", "--world", "courses", "--rows", 300, *sizes)[0] == 0
    one, rest, whole = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("a", "b", "all"))
    assert (len(one), len(rest)) == (200, 100)
    assert one["enrol"].isna().mean() > 0.3
    pd.testing.assert_frame_equal(rest, whole[200:].reset_index(drop=True))
    assert "--overwrite replaces it" in one_line(mtcl("synth", "a.parquet", "--rows", 10)[2])
    assert "missing" in one_line(mtcl("synth", "c.parquet", "--rows", 10, "--set", "mising=0.5")[2])
    assert "either files" in one_line(mtcl("init")[2])


@pytest.mark.full
def test_a_world_has_the_sizes_that_are_asked_for_and_trains_from_a_file_as_it_does_without(mtcl, tmp_path):
    sizes = ["--rows", 600, "--users", 20, "--items", 12]
    assert mtcl("init", "--world", "video", *sizes, "--out", "small.yaml")[0] == 0
    made = yaml.safe_load((tmp_path / "small.yaml").read_text())
    world = {"rows": 600, "val_rows": 60, "test_rows": 60, "num_users": 20, "num_items": 12}
    assert world.items() <= made["data"]["synthetic"].items()
    assert mtcl("train", "small.yaml", "--device", "cpu")[0] == 0
    assert mtcl("synth", "rows.parquet", "--world", "video", *sizes)[1].count("mtcl train rows.run.yaml") == 1
    beside = yaml.safe_load((tmp_path / "rows.run.yaml").read_text())
    assert {**beside, "data": None} == {**made, "data": None}
    (tmp_path / "rows.run.yaml").write_text((tmp_path / "rows.run.yaml").read_text().replace("epochs: 20", "epochs: 1"))
    assert "test split" in mtcl("train", "rows.run.yaml", "--device", "cpu")[1]
    assert "--users belongs to --world" in one_line(mtcl("init", "rows.parquet", "--users", 3)[2])
    assert "--item belongs to a file" in one_line(mtcl("init", "--world", "shop", "--item", "x")[2])
    # The file that goes on with the world has no settings of its own.
    assert mtcl("synth", "more.parquet", "--world", "video", *sizes, "--start", 600)[0] == 0
    assert not (tmp_path / "more.run.yaml").exists()


def test_a_world_is_written_as_of_a_moment_with_its_titles(mtcl, tmp_path):
    hard = ("--users", 50, "--items", 20, "--set", "delay=4", "--set", "text=0.5", "--set", "position_bias=1")
    assert mtcl("synth", "all.parquet", "--rows", 300, *hard)[0] == 0
    status, _, _ = mtcl("synth", "then.parquet", "--rows", 300, *hard, "--as-of", 15, "--catalogue", "items.parquet")
    assert status == 0
    whole, then, items = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("all", "then", "items"))
    assert (len(whole), len(then), len(items)) == (300, 151, 20)
    pd.testing.assert_frame_equal(then.loc[:, :"position"], whole.loc[:150, :"position"])
    assert 0 < then["return"].sum() < whole["return"][:151].sum()
    assert set(then["title"]) <= set(items["title"])
    assert "items.parquet exists already" in one_line(mtcl("synth", "b.parquet", "--catalogue", "items.parquet")[2])
    both = mtcl("synth", "b.parquet", "--catalogue", "./b.parquet", "--overwrite")[2]
    assert "--catalogue: b.parquet is where the rows go" in one_line(both)
    assert ". is a folder" in one_line(mtcl("synth", ".", "--overwrite")[2])
    late = mtcl("synth", "b.parquet", "--start", 200, "--rows", 100, *hard, "--as-of", 2)[2]
    assert "row 200 comes after that" in one_line(late)


def test_the_module_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "mtcl_torchrec", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "train", "evaluate", "recommend", "init", "prepare"):
        assert command in shown.stdout


# ---------------------------------------------------------------- the data that ships with the package


def test_kuairand_is_whole():
    splits = {s: kuairand.load(s) for s in kuairand.SPLITS}
    assert {s: len(f) for s, f in splits.items()} == {"train": 149_732, "val": 30_290, "test": 42_422}
    for earlier, later in (("train", "val"), ("val", "test")):
        assert splits[earlier]["time_ms"].max() < splits[later]["time_ms"].max()
        assert splits[earlier]["time_ms"].min() < splits[later]["time_ms"].min()
    assert splits["train"]["is_click"].mean() == pytest.approx(0.4518, abs=1e-4)
    assert splits["train"]["is_hate"].sum() == 124
    assert splits["train"]["user_id"].nunique() == 23_651
    assert (kuairand.folder() / "LICENSE.md").read_text().count("CC BY-SA 4.0") >= 1
    with pytest.raises(ValueError, match="split is one of train, val, test, not 'tst'"):
        kuairand.load("tst")


def test_return_is_computed_within_the_split_and_from_known_users_only():
    val = kuairand.load("val")
    assert val.loc[val["user_id"] == 0, "return_10min"].isna().all()
    known = val[val["user_id"] != 0].sort_values(["user_id", "time_ms"])
    gap = known.groupby("user_id")["time_ms"].shift(-1) - known["time_ms"]
    end = val["time_ms"].max()
    for (_, row), wait in zip(known.iterrows(), gap, strict=True):
        if wait <= kuairand.RETURN_WINDOW_MS:
            assert row["return_10min"] == 1
        elif row["time_ms"] + kuairand.RETURN_WINDOW_MS > end:
            assert pd.isna(row["return_10min"])
        else:
            assert row["return_10min"] == 0


@pytest.mark.parametrize(
    ("every", "rows", "reached"), [(4, "10,606", 0.68), pytest.param(1, "42,422", 0.72, marks=pytest.mark.full)]
)
def test_the_demo_trains_and_recommends(mtcl, tmp_path, monkeypatch, every, rows, reached):
    """One epoch of the real thing, or of every fourth row of it; the README's figures come from the whole."""
    load = kuairand.load
    monkeypatch.setattr(kuairand, "load", lambda split: load(split)[::every])
    monkeypatch.setattr(twins, "MOST", 1)
    status, shown, _ = mtcl("demo", "--out", "demo", "--epochs", "1", "--device", "cpu")
    assert status == 0
    assert f"test split, epoch 1 of 1: {rows} rows" in shown
    for task in ("click", "long_view", "like", "content", "return"):
        assert task in shown
    assert "Top 10 for user" in shown
    assert "popular" in shown
    # A twin of one task, trained after all that, tells whether the others help it.
    entries = json.loads((tmp_path / "demo/baselines.json").read_text())
    assert list(entries) == ["popularity", "logistic_regression", "single_task"]
    told = {name: list(entry["metrics"]["test"]["tasks"]) for name, entry in entries.items()}
    assert told.pop("popularity")[:3] == ["click", "long_view", "like"]  # it costs nothing: all tasks
    assert set(map(tuple, told.values())) == {("like",)}
    assert "Of 1 task that twins were trained on alone, " in shown
    asked, answered = (part.splitlines() for part in shown.split("Do the tasks help each other?  ")[1:])
    assert "Top 10 for user" in shown.split("Do the tasks help each other?")[0]
    assert asked[0].startswith("Training the same network with the same settings on like alone")
    assert asked[1:] == ["  twin 1 of 1: like alone", ""]  # of what else is trained, nothing
    assert any(line.startswith("The report, to be") for line in answered)
    page = (tmp_path / "demo/report.html").read_text()
    assert "Of 1 task that twins were trained on alone, " in page
    assert "Not measured" not in page
    metrics = yaml.safe_load((tmp_path / "demo/metrics.json").read_text())["evaluations"]["test"]
    assert metrics["tasks"]["click"]["auc"] > reached
    assert metrics["ranking"]["fused"]["auc click"] > metrics["ranking"]["popular"]["auc click"] + 0.04
    assert metrics["ranking"]["popular"]["auc click"] > 0.6  # a share of clicks; their count gets .58


def test_init_takes_a_reader_for_the_user(tmp_path):
    frame = shop.log(300).rename(columns={"user_id": "reader", "product_id": "article_id"})
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    schema = yaml.safe_load(draft_run([str(tmp_path / "log.parquet")]))["schema"]
    assert (schema["user"], schema["item"]) == ("reader", "article_id")


def test_what_the_package_warns_of_is_one_line_and_others_keep_their_place():
    own = Path(mtcl_torchrec.__file__).parent / "training" / "build.py"
    assert commands._warning(UserWarning("look here"), UserWarning, str(own), 7) == "mtcl: look here\n"
    assert "other.py:7: UserWarning: look here" in commands._warning(
        UserWarning("look here"), UserWarning, "/elsewhere/other.py", 7
    )
    assert "DeprecationWarning" in commands._warning(DeprecationWarning("old"), DeprecationWarning, str(own), 7)


def test_times_that_tell_no_sessions_can_be_done_without():
    with pytest.raises(ConfigError, match=r"too small to be seconds since 1970.*--session-minutes 0"):
        held_out._per_second(np.array([60.0, 120.0]), "time", True)


@pytest.mark.parametrize("content", ['{"doubts": [', "[]"])
def test_a_damaged_file_of_metrics_is_named_by_compare(mtcl, tmp_path, content):
    for name in "ab":
        (tmp_path / name / "predictions").mkdir(parents=True)
        frame = pd.DataFrame({"label.click": [1.0, 0.0], "p.click": [0.5, 0.2]})
        write_predictions(
            tmp_path / name / "predictions/test.parquet", PredictionsTable(frame, (Task.binary("click"),))
        )
    (tmp_path / "b" / "metrics.json").write_text(content)
    status, _, error = mtcl("compare", "a", "b")
    assert status == 2
    assert "b/metrics.json: damaged (" in one_line(error)
