"""After `mtcl fuse`, predictions and metrics are of the score that ranks; whatever is interrupted, files stay whole."""

import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import shop
from rich.console import Console

from mtcl_torchrec.cli import main
from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.evaluation.metrics import auc
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.facts import events
from mtcl_torchrec.training import rejudging
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.held_out import columns_needed, rows_of_split
from mtcl_torchrec.training.known_rows import trained_on
from mtcl_torchrec.training.rejudging import is_judged_by_its_fusion, rejudge
from mtcl_torchrec.training.run import train_run

RUN = shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256") + (
    "evaluation: {segments: [hour], bootstrap: 20, k: [3]}\n"
)
CHANGED = ("--set", "click=0.1,buy=9,taste=0,stars=-2")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rejudging")
    shop.log(1200).to_parquet(folder / "log.parquet", index=False)
    train_run(parse_run(RUN, folder=folder), folder / "run", device="cpu", console=Console(quiet=True))
    return folder


@pytest.fixture
def trained(once, tmp_path):
    shutil.copytree(once, tmp_path / "copy")
    return tmp_path / "copy/run"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def tables(folder):
    return {split: read_predictions(folder / f"predictions/{split}.parquet") for split in ("val", "test")}


def scored(folder, split):
    """What the run gives the rows of a split now."""
    run = FinishedRun.load(folder)
    raw = run.preprocessor.conform(rows_of_split(load_run(folder / "run.yaml"), columns_needed(run), split))
    return predict(run.model, run.preprocessor.encode(raw))["score"]


def test_predictions_and_metrics_are_of_the_score_that_ranks(trained, fuse):
    before, was = tables(trained), metrics_of(trained)
    status, shown, _ = fuse(trained, *CHANGED)
    assert status == 0
    assert "judged by it: metrics.json and predictions/ of val and test" in shown
    after, now = tables(trained), metrics_of(trained)
    for split in ("val", "test"):
        np.testing.assert_allclose(after[split].score, scored(trained, split), atol=1e-6)
        assert np.abs(after[split].score - before[split].score).max() > 0.01
        same = [column for column in before[split].frame if column not in ("score", "popular")]
        pd.testing.assert_frame_equal(after[split].frame[same], before[split].frame[same])
        assert after[split].thresholds == before[split].thresholds
        assert after[split].values == before[split].values
        of, old = now["evaluations"][split], was["evaluations"][split]
        assert of["tasks"] == old["tasks"]
        # How popular an item is for an event is as it was; the popularities are fused by the new score.
        popular, once = of["ranking"]["popular"], old["ranking"]["popular"]
        alike = [key for key in once if key.split(" ")[0] in ("auc", "gauc", "mrr") or "ndcg@" in key]
        assert {key: popular[key] for key in alike} == {key: once[key] for key in alike}
        assert len(alike) > 4
        assert np.abs(after[split].popular - before[split].popular).max() > 0.01
        known = after[split].labels("click")
        there = ~np.isnan(known)
        assert of["ranking"]["fused"]["auc click"] == pytest.approx(auc(known[there], after[split].score[there]))
        assert of["ranking"]["fused"] != old["ranking"]["fused"]
        assert of["segments"]["hour"].keys() == old["segments"]["hour"].keys()
    assert "low" in now["evaluations"]["test"]["intervals"]["ranking"]["auc click"]
    assert (
        now["evaluations"]["test"]["intervals"]["ranking"]["auc click"]["value"]
        == now["evaluations"]["test"]["ranking"]["fused"]["auc click"]
    )
    contents = read_contents(trained)
    assert not contents.fused_anew
    shown = {event.task: event.rankings["fused"][0] for event in events(contents)}
    assert shown["click"] == now["evaluations"]["test"]["ranking"]["fused"]["gauc click"]
    # Back again: everything is as it was.
    assert fuse(trained, "--reset")[0] == 0
    np.testing.assert_allclose(tables(trained)["test"].score, before["test"].score, atol=1e-6)
    assert metrics_of(trained)["evaluations"]["test"]["ranking"] == was["evaluations"]["test"]["ranking"]
    assert not read_contents(trained).fused_anew


def test_dry_runs_write_nothing_and_options_that_clash_are_refused(trained, fuse):
    before = (trained / "predictions/test.parquet").read_bytes(), metrics_of(trained)
    assert fuse(trained, *CHANGED, "--dry-run")[0] == 0
    assert ((trained / "predictions/test.parquet").read_bytes(), metrics_of(trained)) == before
    status, _, error = fuse(trained, "--rejudge", *CHANGED)
    assert (status, error.count("\n")) == (2, 1)
    assert "--rejudge judges the run by the score that it has and does nothing else: leave --set out" in error


@pytest.mark.parametrize(
    "at", ["second file", *(pytest.param(at, marks=pytest.mark.full) for at in ("first file", "metrics"))]
)
def test_an_interruption_leaves_whole_files_and_shows(trained, fuse, monkeypatch, at):
    before = tables(trained)
    calls = []

    class KilledError(BaseException):
        """As if the process had gone."""

    def dies(real, when):
        def write(path, *rest):
            calls.append(path)
            if len(calls) == when:
                path.with_name(path.name + ".writing").write_bytes(b"half of it")
                raise KilledError
            real(path, *rest)

        return write

    name, when = {"first file": ("write_predictions", 1), "second file": ("write_predictions", 2)}.get(
        at, ("replace_file", 1)
    )
    real = getattr(rejudging, name)
    monkeypatch.setattr(rejudging, name, dies(real, when))
    monkeypatch.setattr(sys, "argv", ["mtcl", "fuse", str(trained), *CHANGED])
    with pytest.raises(KilledError):
        main()
    new = scored(trained, "test")
    for split, table in tables(trained).items():
        old = np.array_equal(table.score, before[split].score)
        assert old == (at == "first file" or (at, split) == ("second file", "test"))
        if not old and split == "test":
            np.testing.assert_allclose(table.score, new, atol=1e-6)
    assert read_contents(trained).fused_anew
    assert not is_judged_by_its_fusion(trained)
    monkeypatch.setattr(rejudging, name, real)
    status, shown, _ = fuse(trained, "--rejudge")
    assert (status, "judged by it" in shown) == (0, True)
    assert is_judged_by_its_fusion(trained)
    np.testing.assert_allclose(tables(trained)["test"].score, new, atol=1e-6)


def test_an_edited_fusion_shows_until_it_is_judged(trained, fuse):
    assert fuse(trained, *CHANGED)[0] == 0
    path = trained / "fusion/fusion.yaml"
    path.write_text(path.read_text().replace("buy: 9.0", "buy: 4.0"))
    assert read_contents(trained).fused_anew
    assert rejudge(trained) == ["val", "test"]
    assert not read_contents(trained).fused_anew
    np.testing.assert_allclose(tables(trained)["val"].score, scored(trained, "val"), atol=1e-6)


def test_without_the_rows_or_with_others_the_score_before_stays_and_that_is_said(trained, fuse):
    before = (trained / "predictions/test.parquet").read_bytes()
    log = trained.parent / "log.parquet"
    shop.log(1200, seed=3).to_parquet(log, index=False)
    status, shown, _ = fuse(trained, *CHANGED)
    assert status == 0
    assert "these are not the rows that the run was judged by" in shown
    log.unlink()
    status, shown, _ = fuse(trained, "--set", "click=2")
    assert status == 0
    assert "still hold the score before: " in shown
    assert (trained / "predictions/test.parquet").read_bytes() == before
    assert read_contents(trained).fused_anew


def test_training_rows_are_told_and_left_out(trained, fuse, tmp_path):
    config = load_run(trained / "run.yaml")
    log = shop.log(1200)
    seen = trained_on(config, Rows(log.sample(frac=1.0, random_state=0)))
    order = log.sample(frac=1.0, random_state=0).index
    assert set(order[seen]) == set(range(840))
    log.iloc[:840].to_csv(tmp_path / "seen.csv", index=False)
    log.to_csv(tmp_path / "all.csv", index=False)
    options = ("--value", "click=1,buy=5", "--combiner", "weighted_mean", "--search", "none", "--folds", 2, "--dry-run")
    status, _, error = fuse(trained, "--data", tmp_path / "seen.csv", *options)
    assert (status, error.count("\n")) == (2, 1)
    assert "--data: 840 of 840 rows are rows that the run was trained on" in error
    status, shown, error = fuse(trained, "--data", tmp_path / "all.csv", *options, "--session-minutes", 0)
    assert status == 0
    assert "840 of 1,200 rows are rows that the run was trained on; they are left out" in error
    assert "on folds left out: 360 rows" in shown
    gone = config.model_copy(update={"data": config.data.model_copy(update={"log": ["nowhere.parquet"]})})
    assert trained_on(gone, Rows(log)) is None
    assert trained_on(config, Rows(log.drop(columns="time"))) is None


@pytest.mark.full
def test_what_stood_there_is_said_with_what_it_was_worth(trained, fuse):
    options = ("--value", "click=1,buy=5", "--combiner", "weighted_mean", "--search", "none", "--folds", 2)
    status, shown, _ = fuse(trained, *options)
    assert (status, "in its place stood" in shown) == (0, False)
    status, shown, _ = fuse(trained, *options)
    assert status == 0
    assert "in its place stood weighted_mean, " in shown
    assert "value@3 " in shown.split("in its place stood")[1]  # of the lengths of evaluation.k, the least
    assert ", no better" in shown
    assert 'the line "as it was"' in shown
    assert "of other rows, requests or another target" in fuse(trained, *options, "--target", "auc:click")[1]
    assert fuse(trained, *CHANGED)[0] == 0
    assert "which was not judged on folds left out" in fuse(trained, *options)[1]
