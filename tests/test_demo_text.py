"""`mtcl demo --text`: MovieLens from a folder, a made-up one here, the real one where MTCL_MOVIELENS names it."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import yaml
from ranks import run_ranks

from mtcl_torchrec.cli.demo import demo
from mtcl_torchrec.config import load_run
from mtcl_torchrec.data.synthetic_text import TextWorld
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.training.finished import FinishedRun

RULES = ("popularity", "liked (towers)", "taste (dot product)", "fused score")


@pytest.fixture
def mtcl(command, monkeypatch, tmp_path):
    """Runs the command in an empty folder and gives (exit status, what it printed, what it said on stderr)."""
    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as MovieLens-1M's, of a world whose genres matter; one film has no genre."""
    folder = tmp_path_factory.mktemp("films")
    world = TextWorld(num_users=60, num_items=80, ratings=25, topics=4, signal=2.0)
    items, log = world.items(), world.log()
    genres = items["genres"].map(lambda of: "|".join(f"Genre {genre}" for genre in of))
    genres[7] = ""
    lines = [
        f"{i}::{title} ({1990 + i % 9})::{g}" for i, title, g in zip(items.item_id, items.title, genres, strict=True)
    ]
    (folder / "movies.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    people = [f"{u}::{'FM'[u % 2]}::{[18, 25, 56][u % 3]}::{u % 5}::{10_000 + u}" for u in range(1, 61)]
    (folder / "users.dat").write_text("\n".join(people) + "\n")
    ratings = [
        f"{u}::{i}::{r}::{p}" for u, i, r, p in zip(log.user_id, log.item_id, log.rating, log.position, strict=True)
    ]
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    return folder


def test_the_demo_runs_from_the_folder_to_lists_of_films(mtcl, folder, tmp_path):
    arguments = (
        "demo",
        "--text",
        "--folder",
        folder,
        "--out",
        "run",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--seed",
        "5",
    )
    status, shown, said = mtcl(*arguments)
    assert status == 0, said
    for part in ("liked", "loved", "disliked", "taste", "next_genre", *RULES, "never seen", "new users"):
        assert part in shown
    assert "of whom training knew nothing" in shown
    assert "films that training never saw" in shown
    assert "not to be passed on" in shown
    assert shown.splitlines()[-1] == "The report, to be opened in a browser: run/report.html"
    assert "Whether the tasks help each other was not measured (--twins)" in shown
    assert "too good to be true" not in shown
    assert "doubts" not in json.loads((tmp_path / "run/metrics.json").read_text())
    assert not (tmp_path / "run/baselines.json").exists()
    assert "Not measured" in (tmp_path / "run/report.html").read_text()

    run, test = FinishedRun.load("run"), pd.read_parquet("run/data/test.parquet")
    items = pd.read_parquet("run/data/items.parquet")
    assert run.config.training.seed == 5
    assert 4 <= run.model.tasks[-1].num_classes <= 1 + items["genre"].nunique()
    # What comes next is told from the user alone: all films have the same prediction.
    person = test[~test.new_user].iloc[[0]][["user_id", "gender", "age", "occupation", "position"]]
    asked = items.merge(person, how="cross")
    told = predict(run.model, run.encode(asked))
    assert np.ptp(told["next_genre"], axis=0).max() < 1e-6
    assert np.ptp(told["taste"]) > 1e-3
    other = predict(run.model, run.encode(asked.assign(user_id=person.user_id.iloc[0] + 1)))
    assert np.abs(other["next_genre"] - told["next_genre"]).max() > 1e-4

    # A YAML to read and to go on with stands beside the data.
    text = (tmp_path / "run/data/run.yaml").read_text()
    assert text.count("#") > 5
    assert (
        load_run(tmp_path / "run/data/run.yaml").data_schema.features
        == run.config.data_schema.with_files(lambda path: str(tmp_path / "run" / path)).features
    )
    before = sorted(p.name for p in tmp_path.rglob("*"))
    status, _, error = mtcl(*arguments)
    assert (status, "holds a run already" in error, error.count("\n")) == (2, True, 1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def demo_on_ranks(folder, out):
    demo(out=out, text=True, folder=folder, epochs=1, overwrite=True, device="cpu")
    return yaml.safe_load((out / "metrics.json").read_text())["evaluations"]["test"]["tasks"]["liked"]["auc"]


@pytest.mark.full
def test_two_ranks_run_it_too(folder, tmp_path):
    one, two = run_ranks(demo_on_ranks, 2, folder, tmp_path / "run")
    assert one == two
    assert 0.4 < one < 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text"], "--text needs --folder: MovieLens-1M, unpacked; https://grouplens.org/datasets/movielens/1m/ has"),
        (["--folder", "films"], "--folder belongs to --text"),
        (["--encoder", "tfidf"], "--encoder belongs to --text"),
        (["--text", "--folder", "films"], "films: no such folder; it should hold MovieLens-1M, see https://grouplens"),
        (["--text", "--folder", "FOLDER", "--encoder", "minilmm"], "no encoder 'minilmm' (did you mean 'minilm'?)"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(mtcl, folder, tmp_path, arguments, says):
    status, _, error = mtcl("demo", *(folder if a == "FOLDER" else a for a in arguments), "--device", "cpu")
    assert status == 2
    assert error.startswith("mtcl: ")
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.full
@pytest.mark.skipif("MTCL_MOVIELENS" not in os.environ, reason="MTCL_MOVIELENS names no folder with MovieLens-1M")
def test_the_real_thing_ranks_new_films_and_new_users(mtcl, tmp_path):
    status, shown, said = mtcl("demo", "--text", "--folder", os.environ["MTCL_MOVIELENS"], "--out", "run")
    assert status == 0, said
    figures = {line[:20].strip(): line[20:].split() for line in shown.splitlines()}
    head, _, never, new = map(float, figures["fused score"])
    popular = list(map(float, figures["popularity"]))
    assert head > popular[0] + 0.05
    assert never > 0.68
    assert new > popular[3] - 0.003
    stored = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "doubts" not in stored
    metrics = stored["evaluations"]["val"]["tasks"]
    assert metrics["next_genre"]["ne"] < 0.98  # later, the histories that end with training say less
