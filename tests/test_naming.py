"""A metric has one name: what `mtcl_torchrec.evaluation.naming` calls otherwise is called so everywhere."""

import io
from dataclasses import replace

import made_run
import pytest
from rich.console import Console

from mtcl_torchrec.baselines.table import print_baselines
from mtcl_torchrec.evaluation import naming
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.report import print_evaluation
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.facts import events
from mtcl_torchrec.report.pictures import learning_curves
from mtcl_torchrec.training import progress
from mtcl_torchrec.training.balance import Balance
from mtcl_torchrec.training.diagnosis import diagnose
from mtcl_torchrec.training.judging import evaluation_as_json

NAMES = {"auc": "area", "gauc": "area within", "ne": "entropy", "r2": "explained"}


@pytest.fixture
def renamed(monkeypatch):
    for metric, label in NAMES.items():
        monkeypatch.setitem(naming.MEASURES, metric, replace(naming.MEASURES[metric], label=label))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=300)


class Pictures:
    """Keeps what is said of a picture."""

    def __init__(self):
        self.said = []

    def draw(self, name, title, alt, paint, **options):
        self.said.append(alt)


def test_all_that_shows_a_metric_takes_its_name_from_one_place(renamed, console, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    metrics = {"click": {"auc": 0.7, "ne": 0.9}, "taste": {"ne": 0.8}, "minutes": {"r2": 0.3, "mse": 2.0}}
    with progress.TrainingProgress(active=True, total_steps=9, console=console) as reports:
        losses = dict.fromkeys(metrics, 1.0)
        reports.step(epoch=1, step=1, rows=1, losses=losses, metrics=metrics)
    shown = console.file.getvalue()
    assert "click 1.0000 (area 0.7000) taste 1.0000 (entropy 0.8000) minutes 1.0000 (explained 0.3000)" in shown

    found = evaluate_table(made_run.table(400), k=[2])
    print_evaluation(found, "test", console)
    entry = {"metrics": {"test": evaluation_as_json(found)}, "trials": 1, "seconds": 1.0, "rows": 1}
    print_baselines({"trees": entry}, console)
    weak = {"click": {"auc": 0.3}, "taste": {"ne": 1.5}, "minutes": {"r2": -1.0}}
    console.print("\n".join(diagnose(Balance(), [weak], 1)), highlight=False)
    pictures = Pictures()
    learning_curves(pictures, {"epochs": [metrics, metrics], "best_epoch": 1}, list(metrics))
    said = "\n".join([console.file.getvalue(), *pictures.said])
    for label in NAMES.values():
        assert label in said, label
    for title, old in (("learning", "AUC of"), ("diagnosis", "validation AUC"), ("baselines", "R²"), ("task", "NE ")):
        assert old not in said, title
    assert [alt.split(" of ")[0] for alt in pictures.said] == ["area", "entropy", "explained"]
    assert {event.metric for event in events(read_contents(made_run.make(tmp_path / "run")))} <= {"area", "area within"}
