"""Several runs as one deep ensemble: on the command line, behind HTTP, exported."""

import shutil

import numpy as np
import pandas as pd
import pytest
import shop
from rankers import asked
from rich.console import Console

from mtcl_torchrec import ConfigError, DataError
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.serving.http.versions import Models
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.ensemble import load_ensemble
from mtcl_torchrec.training.run import train_run

RUN = (
    shop.RUN.replace("epochs: 4", "epochs: 1").replace("batch_size: 32", "batch_size: 128")
    + "calibration: {click: platt, buy: temperature}\n"
)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    shop.log(1500).to_parquet(folder / "log.parquet", index=False)
    for seed in (0, 1):
        run = parse_run(RUN, folder=folder)
        run.training.seed = seed
        train_run(run, folder / f"run{seed}", device="cpu", console=Console(quiet=True))
    return [folder / "run0", folder / "run1"]


@pytest.fixture
def mtcl(command):
    """Runs a command and gives (exit status, what it printed, what it said on stderr)."""
    return command


def rows(frame, users=6):
    return frame.head(users).drop(columns=["click", "buy", "stars"])


def test_an_ensemble_of_calibrated_runs_is_the_mean_of_what_they_say(members, mtcl):
    log = rows(shop.log(1500))
    both, alone = Recommender.load(members).score(log), [Recommender.load(m).score(log) for m in members]
    np.testing.assert_allclose(both["score"], (alone[0]["score"] + alone[1]["score"]) / 2, atol=1e-6)
    np.testing.assert_allclose(both["click"], (alone[0]["click"] + alone[1]["click"]) / 2, atol=1e-6)
    np.testing.assert_allclose(both["score_std"], np.abs(alone[0]["score"] - alone[1]["score"]) / 2, atol=1e-6)
    assert (both["score_std"] > 1e-4).all()
    assert "score_std" not in alone[0]
    pd.testing.assert_frame_equal(Recommender.load([members[0]]).score(log), alone[0])
    status, shown, _ = mtcl("recommend", *members, "--user", "u3", "--top", 4)
    assert status == 0
    ranked = Recommender.load(members).recommend("u3", k=4)
    assert list(ranked)[:4] == ["user_id", "product_id", "score", "score_std"]
    assert all(f"{spread:.3f}" in shown for spread in ranked["score_std"])
    assert "std" in shown


def test_an_ensemble_is_served_and_a_member_with_new_weights_takes_over(members, tmp_path):
    folders = [shutil.copytree(member, tmp_path / member.name) for member in members]
    models = Models(folders, Recommender.load, max_candidates=100)
    asking = {"user": "u3", "candidates": ["p1", "p2"], "seen": True}

    async def talk(http):
        first = (await http.post("/recommend", json=asking)).json()
        health = (await http.get("/healthz")).json()
        text = (folders[1] / "run.yaml").read_text()
        (folders[1] / "run.yaml").write_text(text.replace("buy: 3", "buy: 30"))
        reloaded = (await http.post("/reload")).json()["result"]
        return first, health, reloaded, (await http.post("/recommend", json=asking)).json()

    first, health, reloaded, second = asked(models, talk)
    expected = Recommender.load(members).recommend("u3", candidates=["p1", "p2"], seen=True)
    assert [row["score_std"] for row in first["items"]] == pytest.approx(expected["score_std"].tolist(), abs=1e-6)
    assert health["model"]["path"] == "run0, run1"
    assert reloaded == "swapped"
    assert first["model"] != second["model"]
    assert first["items"] != second["items"]


def test_members_that_do_not_fit_are_told(members, mtcl, tmp_path):
    other = shutil.copytree(members[0], tmp_path / "other")
    run = (other / "run.yaml").read_text()
    (other / "run.yaml").write_text(run.replace("transform: log", "transform: none"))
    (tmp_path / "model.mtcl").write_bytes(b"")
    for given, kind, said in (
        ([members[0], other], DataError, "encodes its rows in another way than"),
        ([members[0], members[0]], ConfigError, "is given twice"),
        ([members[0], tmp_path / "model.mtcl"], DataError, "is a file: an ensemble is made of run directories"),
        ([members[0], tmp_path / "none"], DataError, "no run here"),
    ):
        with pytest.raises(kind, match=said):
            load_ensemble(given)
        for command in (("recommend", "--user", "u3"), ("export", "--out", tmp_path / "new.mtcl"), ("serve",)):
            status, _, error = mtcl(*command, *given)
            assert status == 2
            assert said in error
            assert error.strip().splitlines()[-1].startswith("mtcl: ")


@pytest.mark.full
def test_an_exported_ensemble_of_calibrated_runs_says_what_the_runs_say(members, mtcl, tmp_path):
    status, shown, error = mtcl("export", *members, "--out", tmp_path / "both.mtcl", "--compiled", "no")
    assert status == 0, error
    made = Recommender.load(tmp_path / "both.mtcl").score(rows(shop.log(1500), 50))
    pd.testing.assert_frame_equal(made, Recommender.load(members).score(rows(shop.log(1500), 50)), atol=1e-5)
    status, shown, _ = mtcl("recommend", tmp_path / "both.mtcl", "--user", "u3")
    assert status == 0
    assert "std" in shown
