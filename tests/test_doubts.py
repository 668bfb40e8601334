"""What makes a run too good to be true is told: features that are known only afterwards, and rows that it was trained
on; and tasks of few events do not decide which epoch is kept."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import made_run
import numpy as np
import pandas as pd
import pytest
import shop
import torch
import yaml
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.cli import main
from mtcl_torchrec.cli.films import write_films
from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.data import kuairand, movielens
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.worlds import world_run
from mtcl_torchrec.evaluation.metrics import mean_auc, stopping_tasks
from mtcl_torchrec.evaluation.report import user_groups
from mtcl_torchrec.evaluation.supports import unsure_tasks
from mtcl_torchrec.report import compare_html
from mtcl_torchrec.report.studio import Picture, Studio
from mtcl_torchrec.schema import ConfigError, Feature, Schema, Task
from mtcl_torchrec.training.doubts import too_good
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import load_data
from mtcl_torchrec.training.sharding import Ranks, ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def silent(line):
    """No screen."""


# ---------------------------------------------------------------- features that tell a task alone


def leaky(rows=2000, seed=0):
    """A shop's log, with what was known only afterwards in columns of every kind."""
    frame, draw = shop.log(rows, seed), np.random.default_rng(seed + 1)
    click, buy = frame["click"].to_numpy(), frame["buy"].to_numpy()
    return frame.assign(
        left_by=np.where(buy == 1, "paid", draw.choice(["closed", "back"], rows)),
        seconds=draw.exponential(20, rows) + 200 * click,
        steps=[["seen", *["cart"] * bought] for bought in buy],
        receipt=np.where(buy == 1, draw.normal(size=rows), np.nan),
        paid_in=np.where(buy == 1, 2.0 + 3 * (frame["stars"] == 5), np.nan),
        genre_again=frame["genre"],
    )


LEAKS = [
    Feature(name="left_by", group="context"),
    Feature(name="seconds", group="context", kind="dense", transform="log"),
    Feature(name="steps", group="item", kind="bag"),
    Feature(name="receipt", group="context", kind="dense"),
    Feature(name="genre_again", group="item"),
]
HONEST = [Feature(name="user_id", group="user"), Feature(name="hour", group="context"),
          Feature(name="price", group="item", kind="dense")]  # fmt: skip
TASKS = [
    Task.binary("click"),
    Task.binary("buy"),
    Task.binary("bought", label="buy", inputs=("user", "item")),
    Task.multiclass("taste", label="genre", item_class="genre_again", num_classes=None),
    Task.regression("stars"),
]


@pytest.fixture(scope="module")
def encoded():
    schema = Schema(features=HONEST + LEAKS, tasks=TASKS, time="time")
    preprocessor = Preprocessor(schema)
    preprocessor.fit(Rows(leaky(2000)))
    return preprocessor.encoder, preprocessor.encode(Rows(leaky(2000, seed=5)))


def auc(value, count=2000.0, rate=0.2):
    return {"auc": value, "count": count, "base_rate": rate}


def told(encoded, **metrics):
    encoder, rows = encoded
    return too_good(encoder.resolved_tasks(), metrics, encoder, rows)


def test_features_of_every_kind_are_named(encoded):
    assert told(encoded, click=auc(0.999)) == [
        "click is predicted too well to be true (validation AUC 0.9990): seconds (AUC 1.000) tells it almost alone; is "
        "it known before the event?"
    ]
    (line,) = told(encoded, buy=auc(0.93))  # less than perfect, but a feature tells it
    assert "left_by (AUC 1.000), steps (AUC 1.000) and receipt (AUC 1.000) each tell it almost alone; are they" in line
    assert "seconds" not in line
    (line,) = told(encoded, bought=auc(0.99))
    assert "steps (AUC 1.000) tells it" in line  # of what the task may see
    (line,) = told(encoded, taste={"ne": 0.01, "count": 2000.0})
    assert "(validation NE 0.0100): genre_again (AUC 1.000) and price (AUC 0.9" in line  # an item's price is its own
    (line,) = told(encoded, stars={"r2": 0.99, "count": 400.0})
    assert line == (
        "stars is predicted too well to be true (validation R² 0.9900), though no single feature tells it: look for "
        "what is known only after the event"
    )


def test_what_is_good_or_cannot_be_judged_is_left_alone(encoded):
    assert told(encoded, click=auc(0.89), taste={"ne": 0.4, "count": 2000.0}, stars={"r2": 0.9, "count": 400.0}) == []
    assert told(encoded, click=auc(1.0, rate=0.005)) == []  # 10 events
    assert told(encoded, click=auc(None)) == told(encoded, click={"count": 0.0}) == []


def test_few_rows_name_no_feature(encoded):
    encoder, rows = encoded
    (line,) = told((encoder, rows.slice(0, 30)), click=auc(1.0, count=60.0, rate=0.4))
    assert line.endswith("too well to be true (validation AUC 1.0000): is every feature known before the event?")


def test_honest_features_are_no_doubt():
    schema = Schema(features=HONEST, tasks=[Task.binary("click"), Task.binary("buy")], time="time")
    preprocessor = Preprocessor(schema)
    preprocessor.fit(Rows(shop.log(2000)))
    rows = preprocessor.encode(Rows(shop.log(2000, seed=5)))
    assert told((preprocessor.encoder, rows), click=auc(0.95), buy=auc(0.95)) == []


@pytest.mark.parametrize("name", ["shop", "social", "video", "courses", "health"])
def test_no_feature_of_a_world_tells_a_task_alone(name):
    run = parse_run(world_run(name, rows=4000, val_rows=20_000, test_rows=0, num_users=500, num_items=300))
    data = load_data(run, ALONE, say=silent)
    encoder, rows = data.preprocessor.encoder, data.splits.encoded["val"]
    pretended = {task.name: auc(0.95) for task in run.data_schema.tasks}
    assert too_good(encoder.resolved_tasks(), pretended, encoder, rows) == []


@pytest.mark.full
def test_no_feature_of_the_demo_tells_a_task_alone(tmp_path):
    for split in kuairand.SPLITS:
        kuairand.load(split).to_parquet(tmp_path / f"{split}.parquet", index=False)
    declared = yaml.safe_load(kuairand.example_run())
    declared["data"] = {split: f"{split}.parquet" for split in kuairand.SPLITS}
    data = load_data(parse_run(yaml.safe_dump(declared), folder=tmp_path), ALONE, say=silent)
    encoder, rows = data.preprocessor.encoder, data.splits.encoded["val"]
    pretended = {task.name: auc(0.95) for task in encoder.schema.tasks}
    assert data.doubts == ()
    assert too_good(encoder.resolved_tasks(), pretended, encoder, rows) == []


@pytest.mark.skipif("MTCL_MOVIELENS" not in os.environ, reason="MTCL_MOVIELENS names no folder with MovieLens-1M")
def test_no_feature_of_movielens_tells_a_task_alone(tmp_path):
    """A twelfth of its users: neither films, their texts and genres, nor what a user liked before, are in doubt."""
    whole, part = Path(os.environ["MTCL_MOVIELENS"]), tmp_path / "part"
    part.mkdir()
    for name in ("users.dat", "movies.dat"):
        shutil.copy(whole / name, part)
    log = movielens.load(whole)
    log = log[log["user_id"] % 12 == 0].rename(columns={"position": "pos"})
    log[["user_id", "item_id", "rating", "pos"]].to_parquet(part / "ratings_ordered.parquet", index=False)
    write_films(part, tmp_path / "data", "tfidf", 0, "cpu")
    data = load_data(load_run(tmp_path / "data" / "run.yaml"), ALONE, say=silent)
    encoder, rows = data.preprocessor.encoder, data.splits.encoded["val"]
    assert len(rows) > 5000
    assert data.doubts == ()
    pretended = {task.name: auc(0.95) for task in encoder.resolved_tasks() if task.kind == "binary"}
    assert set(pretended) == {"liked", "loved", "disliked", "taste"}
    assert too_good(encoder.resolved_tasks(), pretended, encoder, rows) == []
    # Of classes, features are looked into only where they are predicted as if they were known.
    (line,) = too_good(encoder.resolved_tasks(), {"next_genre": {"ne": 0.04, "count": 2000.0}}, encoder, rows)
    assert "though no single feature tells it" in line


LEAKY = shop.RUN.replace(
    "    - {name: hour,", "    - {name: left_by, group: context, embedding_dim: 4}\n    - {name: hour,"
).replace("epochs: 4", "epochs: 6")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("doubts"), io.StringIO()
    leaky(1500).to_parquet(folder / "log.parquet", index=False)
    run = parse_run(LEAKY, folder=folder)
    result = train_run(run, folder / "run", device="cpu", console=Console(file=said, width=200))
    return folder / "run", result, said.getvalue()


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mtcl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    return capsys.readouterr().out.replace("\n", "")


def test_training_the_report_and_compare_say_it(trained, tmp_path, monkeypatch, capsys):
    folder, result, said = trained
    line = result.diagnosis[0]
    assert line.startswith("buy is predicted too well to be true (validation AUC ")
    assert "left_by (AUC 1.000) tells it almost alone" in line
    assert f"diagnosis:\n  - {line}" in said
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["doubts"] == [line]
    assert stored["diagnosis"] == result.diagnosis
    other = tmp_path / "other"
    train_run(parse_run(LEAKY.replace("epochs: 6", "epochs: 1"), folder=folder.parent), other, device="cpu",
              console=Console(file=io.StringIO()))  # fmt: skip
    page = tmp_path / "run.html"
    said = run_main(monkeypatch, capsys, "compare", folder, other, "--draws", 20, "--html", tmp_path / "compare.html")
    assert f"WARNING: {folder}: {line}" in said
    assert f"run: {line}" in (tmp_path / "compare.html").read_text()
    run_main(monkeypatch, capsys, "report", folder, "--out", page)
    html = page.read_text()
    first = html[html.index("Is the model good?") :]
    assert (
        first.index("In doubt: too good to be true") < first.index("left_by (AUC 1.000)") < first.index("better than")
    )


def test_runs_side_by_side_are_in_doubt_where_one_of_them_is(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Studio, "draw", lambda self, name, title, alt, *_, **__: Picture("p", title, alt, "<svg/>", 300)
    )
    runs = {name: made_run.make(tmp_path / name, baselines=False, fitted=False) for name in ("leaky", "b", "c")}
    metrics = json.loads((runs["leaky"] / "metrics.json").read_text()) | {"doubts": ["like is too good"]}
    (runs["leaky"] / "metrics.json").write_text(json.dumps(metrics))

    def answers(*names):
        html = compare_html([runs[name] for name in names], None, tmp_path / "compare.html").read_text()
        parts = html[: html.index("What differs, and by how much")].split("<h3>")[1:]
        return [
            ("In doubt: too good to be true" in part, "<li>leaky: like is too good.</li>" in part) for part in parts
        ]

    assert answers("b", "leaky", "c") == [(True, True), (False, False)]
    assert answers("leaky", "b", "c") == [(True, True), (True, True)]  # each is held against it
    assert answers("b", "c") == [(False, False)]


# ---------------------------------------------------------------- rows that are trained on


@pytest.mark.parametrize("how", ["same", "link", "folder", "test"])
def test_the_training_file_is_no_other_split(how, tmp_path):
    log = shop.log(200)
    (tmp_path / "train").mkdir()
    log[:150].to_parquet(tmp_path / "train" / "a.parquet", index=False)
    log[150:].to_parquet(tmp_path / "val.parquet", index=False)
    (tmp_path / "link.parquet").symlink_to(tmp_path / "train" / "a.parquet")
    given = {
        "same": "{train: train/a.parquet, val: ./train/../train/a.parquet}",
        "link": "{train: train/a.parquet, val: [val.parquet, link.parquet]}",
        "folder": "{train: train/a.parquet, val: train, stream: true}",
        "test": "{train: train, val: val.parquet, test: train/a.parquet}",
    }[how]
    text = shop.RUN.replace("{log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}", given)
    if how == "folder":
        text = text[: text.index("statistics:")] + text[text.index("model:") :]
    with pytest.raises(
        ConfigError, match=rf"data.{'test' if how == 'test' else 'val'}: .* is a file of data.train, too"
    ):
        train_run(parse_run(text, folder=tmp_path), tmp_path / "run", device="cpu", console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


FILES = "{train: train.parquet, val: val.parquet}"
SPLIT = shop.RUN.replace("{log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}", FILES)
TIMELESS = SPLIT[: SPLIT.index("statistics:")].replace("  time: time\n", "") + SPLIT[SPLIT.index("model:") :]


def doubts(text, folder, train, val):
    train.to_parquet(folder / "train.parquet", index=False)
    val.to_parquet(folder / "val.parquet", index=False)
    said = []
    found = load_data(parse_run(text, folder=folder), ALONE, say=said.append).doubts
    assert [f"WARNING: {line}" for line in found] == [line for line in said if "WARNING" in line]
    return list(found)


def test_rows_of_the_training_split_are_found_again(tmp_path):
    log = shop.log(600)
    line = "data.val: {} of {} rows are rows that the run was trained on; what follows is too good to be true"
    mixed = pd.concat([log[400:], log[:20]])
    assert doubts(SPLIT, tmp_path, log[:400], mixed) == [line.format(20, 220)]
    assert doubts(SPLIT, tmp_path, log[:400], log[400:]) == []
    assert doubts(SPLIT, tmp_path, log[:400], pd.concat([log[400:], log[:1]])) == []  # not many
    # Without a time, a row is known by all that is read of it.
    assert doubts(TIMELESS, tmp_path, log[:400], log[:400]) == [line.format(400, 400)]
    assert doubts(TIMELESS, tmp_path, log[:400], log[400:]) == []


def test_rows_that_chance_repeats_are_no_doubt(tmp_path):
    text = TIMELESS.replace("    - {name: product_id, group: item, embedding_dim: 8}\n", "")
    log = shop.log(3000)
    alike = log.assign(user_id="u", product_id="p", price=1.0, age=2.0, hour=log["hour"] // 12, stars=1.0)
    known = set(alike[:2000].astype(str).agg("|".join, axis=1))
    assert len(known) < 2000
    assert doubts(text, tmp_path, alike[:2000], alike[2000:]) == []


def on_a_rank(folder):
    with ranks("cpu") as where:
        data = load_data(parse_run(SPLIT, folder=folder), where, say=silent)
        encoder, splits = data.preprocessor.encoder, data.splits
        users = user_groups(encoder.schema, splits.raw["val"].frame)
        unsure = unsure_tasks(encoder.resolved_tasks(), splits.encoded["val"].labels.numpy(), users)
        return data.doubts, unsure


def test_ranks_agree_on_what_is_in_doubt_and_on_what_decides_nothing(tmp_path):
    log = shop.log(300)
    log["stars"] = log["stars"].where(log.index < 40)
    log.to_parquet(tmp_path / "train.parquet", index=False)
    log.to_parquet(tmp_path / "val.parquet", index=False)
    one, two = run_ranks(on_a_rank, 2, tmp_path)
    assert one == two
    doubts_of, unsure = one
    assert "300 of 300 rows" in doubts_of[0]
    assert unsure == {"stars": f"too few labels ({log['stars'].notna().sum()})"}


# ---------------------------------------------------------------- which epoch is kept


def test_tasks_of_few_events_decide_nothing():
    tasks = [Task.binary("click"), Task.binary("hide"), Task.regression("minutes")]
    rows, users = 900, np.arange(900) // 9
    labels = np.stack([np.arange(rows) % 3 == 0, np.arange(rows) % 90 == 0, np.arange(rows) % 7], axis=1).astype(float)
    labels[9:, 2] = np.nan
    unsure = unsure_tasks(tasks, labels, users)
    assert unsure == {"hide": "too few events (10)", "minutes": "too few labels (9)"}
    assert [task.name for task in stopping_tasks(tasks, (), unsure)] == ["click"]
    assert [task.name for task in stopping_tasks(tasks, ["hide"], unsure)] == ["hide"]
    assert mean_auc(stopping_tasks(tasks, (), unsure), {"click": auc(0.6), "hide": auc(0.9)}) == 0.6
    few = unsure_tasks(tasks[:2], labels[:50, :2], users[:50])  # 6 users: all decide
    assert set(few) == {"click", "hide"}
    assert [task.name for task in stopping_tasks(tasks[:2], (), few)] == ["click", "hide"]
    numbers = [Task.regression("minutes"), Task.regression("stars"), Task.regression("same")]
    of_numbers = unsure_tasks(numbers, np.stack([labels[:, 2], np.arange(rows), np.full(rows, 3.0)], axis=1), None)
    assert of_numbers == {"minutes": "too few labels (9)", "same": "one label throughout"}
    assert [task.name for task in stopping_tasks(numbers, (), of_numbers)] == ["stars"]


def test_many_events_of_a_user_or_two_decide_nothing_either():
    """What is known of an event is told by users, not by rows: 90 events of one user are one user's taste."""
    rows, users = 900, np.arange(900) // 90
    clicks, of_one = np.arange(rows) % 3 == 0, (np.arange(rows) < 90) * (np.arange(rows) % 2 == 0)
    tasks, labels = [Task.binary("click"), Task.binary("hide")], np.stack([clicks, of_one], axis=1).astype(float)
    assert unsure_tasks(tasks, labels, users) == {"hide": "a single user"}
    assert unsure_tasks(tasks, labels, None) == {}  # without users, every row is one's own
    unknown = np.where(users == 0, np.nan, users)
    assert unsure_tasks(tasks, labels, unknown) == {}


RARE = (
    shop.RUN.replace("    - {name: taste,", "    - {name: hide, kind: binary}\n    - {name: taste,")
    .replace("epochs: 4", "epochs: 5")
    .replace("buy: 3", "buy: 3, hide: -1")
)


def rare(folder):
    frame = shop.log(1200)
    frame["hide"] = (np.random.default_rng(3).random(1200) < 0.04).astype(int)  # about 7 of 180 rows
    frame.to_parquet(folder / "log.parquet", index=False)
    return parse_run(RARE, folder=folder)


class StoppedError(Exception):
    pass


def test_the_epoch_is_kept_that_is_best_for_the_tasks_that_can_be_judged(tmp_path):
    run, said = rare(tmp_path), io.StringIO()
    whole = train_run(run, tmp_path / "whole", device="cpu", console=Console(file=said, width=200)).history
    events = round(whole.epochs[0]["hide"]["count"] * whole.epochs[0]["hide"]["base_rate"])
    assert 0 < events < 20
    assert whole.unsure == {"hide": f"too few events ({events})"}
    line = f"too little is known of hide, too few events ({events}), in validation: the other events decide which epoch"
    assert said.getvalue().count(line) == 1
    means = [(epoch["click"]["auc"] + epoch["buy"]["auc"]) / 2 for epoch in whole.epochs]
    assert whole.best_auc == pytest.approx(max(means), abs=1e-12)
    assert whole.best_epoch == 1 + int(np.argmax(means))

    def stop(history):
        if len(history.epochs) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_run(run, tmp_path / "parts", device="cpu", console=Console(file=io.StringIO()), after_epoch=stop)
    again = io.StringIO()
    parts = train_run(
        run, tmp_path / "parts", existing="resume", device="cpu", console=Console(file=again, width=200)
    ).history
    assert (parts.epochs, parts.best_auc, parts.best_epoch) == (whole.epochs, whole.best_auc, whole.best_epoch)
    assert "too little is known" not in again.getvalue()


def test_what_is_watched_decides_however_few_its_events(tmp_path):
    run, said = rare(tmp_path), io.StringIO()
    run.training.watch, run.training.epochs = ["hide"], 2
    history = train_run(run, tmp_path / "run", device="cpu", console=Console(file=said, width=200)).history
    assert history.best_auc == pytest.approx(max(epoch["hide"]["auc"] for epoch in history.epochs), abs=1e-12)
    assert "too little is known" not in said.getvalue()
