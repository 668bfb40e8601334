"""Runs that are still being trained, or died: what they lack is named, and what can be shown is shown."""

import shutil

import pytest
from made_run import make
from test_cli import mtcl, one_line  # noqa: F401  (a fixture)
from test_report import Page, fast  # noqa: F401  (a fixture)

from mtcl_torchrec.training.directory import MARKER
from mtcl_torchrec.training.unfinished import lacking, unfinished_line

ALL = ["preprocessing/", "checkpoints/ (no epoch is kept yet)", "predictions/", "metrics.json"]


@pytest.fixture
def run(tmp_path):
    """One of an epoch, without an end."""
    folder = make(tmp_path / "run", baselines=False, fitted=False)
    (folder / "preprocessing").mkdir()
    (folder / MARKER).touch()
    (folder / "metrics.json").unlink()
    return folder


def test_what_is_missing_is_named(run, tmp_path):
    shutil.rmtree(run / "predictions")
    assert lacking(run) == ALL[2:]  # the best epoch's checkpoint is there
    (run / "run.yaml").write_text("evaluation: {save_predictions: false}\ncalibration: {click: platt}\n")
    assert lacking(run) == ["calibration/", "metrics.json"]
    (run / "run.yaml").write_text("name: run\n")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "preprocessing")
    assert lacking(run) == ALL
    assert ", ".join(ALL) in unfinished_line(run)
    (run / "metrics.json").write_text("{}")
    assert unfinished_line(run) == ""
    assert unfinished_line(tmp_path / "none") == ""
    (run / "metrics.json").unlink()
    (run / "run.yaml").write_text("{")  # being written
    assert unfinished_line(run).startswith(f"training of {run} has not finished: ")
    assert len(unfinished_line(run).splitlines()) == 1


def test_a_report_of_an_unfinished_run(run, mtcl, fast):  # noqa: F811
    status, shown, error = mtcl("report", "run")
    assert status == 0
    assert "report.html" in shown
    assert one_line(error).startswith("mtcl: training of run has not finished: metrics.json missing, last written to")
    found = Page(run / "report.html")
    assert "Training did not finish (metrics.json missing)" in found.text
    assert "learning click" in fast
    for path in ("checkpoints", "preprocessing", "predictions"):
        shutil.rmtree(run / path)
    assert mtcl("report", "run")[0] == 0
    (run / "run.yaml").unlink()
    assert "a run was begun here and has written nothing yet" in one_line(mtcl("report", "run")[2])


def test_runs_are_compared_as_far_as_they_came(run, mtcl, fast):  # noqa: F811
    make(run.parent / "one", baselines=False, fitted=False)
    shutil.copytree(run.parent / "one", run.parent / "two")
    shutil.rmtree(run / "predictions")
    status, _, error = mtcl("compare", "one", "run", "--k", "5")
    assert status == 2
    assert "no predictions for test of run to compare yet: training of run has not finished" in one_line(error)
    status, shown, error = mtcl("compare", "run", "one", "two", "--k", "5", "--draws", "20", "--html", "all.html")
    assert status == 0
    assert one_line(error).startswith("mtcl: training of run has not finished: predictions/, metrics.json missing")
    assert "two (B) against one (A)" in shown
    assert "3 runs side by side" in Page(run.parent / "all.html").text
