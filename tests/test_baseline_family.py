"""What is concluded from a run and its baselines: the same in the terminal and in the report, and seldom by chance."""

import io
import json
import shutil

import made_run
import numpy as np
import pandas as pd
import pytest
from made_run import TASKS, WEIGHTS, make
from rich.console import Console

from mtcl_torchrec.baselines import print_baselines
from mtcl_torchrec.baselines.differences import half_of
from mtcl_torchrec.baselines.entries import read_entries
from mtcl_torchrec.baselines.family import against_run
from mtcl_torchrec.evaluation.predictions_file import read_predictions, write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.report.comparisons import comparisons, qualities
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.sections import sharing_answer
from mtcl_torchrec.report.verdict import is_it_good
from mtcl_torchrec.schema import Task

NOISES = {"popularity": 3.0, "trees": 0.05, "logistic_regression": 1.5, "single_task": 0.05, "unweighted": 0.31}


def judged(folder, tables, run=None):
    """Put baselines beside a run as `mtcl baselines` leaves them, and judge the run by value@5 too."""
    run = read_predictions(folder / "predictions/test.parquet") if run is None else run
    write_predictions(folder / "predictions/test.parquet", run)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["evaluations"]["test"]["ranking"]["fused"] |= {"value@5": 1.0, "choice@5": 0.5}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    entries = {}
    for name, table in tables.items():
        write_predictions(folder / f"baselines/{name}/predictions/test.parquet", table)
        evaluation = made_run.evaluation(table, table.tasks) | {"intervals": {}}
        evaluation["ranking"]["fused"] |= {"value@5": 1.0}
        budget = {"trials": 1 if name in ("single_task", "unweighted") else 8, "seconds": None}
        entries[name] = {"trials": 8, "seconds": 1.0, "rows": 9, "budget": budget, "metrics": {"test": evaluation}}
    (folder / "baselines.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose baselines are ahead on some tasks, level or behind on others, and one of whose events is rare."""
    folder = make(tmp_path_factory.mktemp("family") / "run", baselines=False, fitted=False)
    tables = {"": made_run.table(noise=0.9), **{name: made_run.table(noise=noise) for name, noise in NOISES.items()}}
    for name, table in tables.items():
        own = table.frame["label.report"].to_numpy()
        rare = np.where(np.cumsum(np.nan_to_num(own)) > 5, np.where(np.isnan(own), np.nan, 0), own)
        frame = table.frame.assign(**{"label.report": rare.astype(np.float32)})
        tables[name] = PredictionsTable(frame, table.tasks, table.split, table.classes, values=WEIGHTS)
    own = tables.pop("")
    return judged(folder, tables, own)


def terminal(folder, only=None):
    entries = read_entries(folder)
    console = Console(record=True, width=250, file=io.StringIO())
    print_baselines({name: entries[name] for name in only or entries}, console, folder=folder)
    return console.export_text()


def test_the_best_of_an_unwanted_event_has_the_least_of_it(run, tmp_path):
    """`report` costs something; a ranking is the better the less of it comes first."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    entries = json.loads((folder / "baselines.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    every = [of["metrics"] for of in entries.values()] + [metrics["evaluations"]]
    for place, of in enumerate(every):
        of["test"]["values"] = {"click": 1.0, "report": -5.0}
        of["test"]["ranking"]["fused"] = {"auc click": 0.6 + place / 100, "auc report": 0.3 + place / 100}
    for name, content in (("baselines.json", entries), ("metrics.json", metrics)):
        (folder / name).write_text(json.dumps(content))
    shown = terminal(folder).split("ranked by the fused score")[1]
    assert "0.3000*" in shown
    assert f"{0.6 + (len(every) - 1) / 100:.4f}*" in shown
    assert "* is the best of its column (of NE, rankings of report the lowest)" in shown


def answer(folder):
    contents = read_contents(folder)
    facts = made_facts(contents)
    return contents, is_it_good(facts, comparisons(contents), [])


def made_facts(contents):
    from mtcl_torchrec.report.facts import task_facts

    return task_facts(contents)


def test_terminal_and_report_say_the_same(run):
    shown = terminal(run)
    contents, good = answer(run)
    said = {line.split(":")[0].strip(): line for line in shown.split("Who is ahead")[1].splitlines() if ":" in line}
    found = [c for c in comparisons(contents) if not c.unsure]
    tasks = [task.name for task in TASKS if task.name != "report"]
    assert {c.of for c in found} == {*tasks, "ranking"}
    ahead = {task: {c.against for c in found if c.of == task and c.sign < 0} for task in tasks}
    assert {"trees", "single_task"} <= ahead["click"]  # something to agree on, and of every kind
    assert ahead["taste"]
    assert ahead["minutes"]
    for task in tasks:
        if ahead[task]:
            named = said[task].split(": ")[1].split(" ahead of this run")[0].removesuffix(" is").removesuffix(" are")
            assert set(named.split(", ")) == ahead[task]
            line = next(line for line in good.sentences if line.startswith(f"On {task}, "))
            assert all((name in line) == (name != "single_task") for name in ahead[task])
        else:
            assert task not in said or "ahead of this run" not in said[task]
    # Differences are the same numbers: here with the run's sign, there with the baseline's.
    for c in found:
        assert f"{-c.difference:+.4f} ± {c.half:.4f}" in shown
    assert "report: cannot be judged, too few events (5)" in shown
    assert any("report, too few events (5)" in line for line in good.sentences)


def test_showing_fewer_baselines_makes_no_difference_more_sure(run):
    def of_trees(folder, only):
        lines = terminal(folder, only).split("Who is ahead")[1].splitlines()
        return {line.strip().split(":")[0] for line in lines if "trees" in line and "ahead of this run" in line}

    assert of_trees(run, ["trees"]) == of_trees(run, None)


def test_the_report_marks_what_was_not_tuned(run):
    contents, _ = answer(run)
    assert any("The twins have the run's own settings" in line for line in sharing_answer(contents).sentences)


def test_a_run_of_numbers_alone_can_be_beaten(tmp_path):
    tasks = [Task.regression("minutes")]
    folder = make(tmp_path / "run", tasks=tasks, baselines=False, fitted=False)
    judged(folder, {"trees": made_run.table(noise=0.05, tasks=tasks)}, made_run.table(noise=2.0, tasks=tasks))
    contents, good = answer(folder)
    assert set(qualities(contents)["minutes"]) == {"this run", "trees"}
    assert good.short == "No: a baseline is better"
    assert "minutes: trees is ahead of this run" in terminal(folder)


def test_equal_baselines_seldom_win():
    """Of runs and seven baselines that are equally good on four tasks, at most about 5 in 100 are told to be beaten;
    by intervals of each alone, half of them would be."""
    tasks, beaten, alone = tuple(Task.binary(name) for name in "abcd"), 0, 0
    worlds = 16
    for seed in range(worlds):
        draw = np.random.default_rng(seed)
        rows = 400
        logits = draw.normal(size=(4, rows))
        labels = (draw.random((4, rows)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
        users = [f"u{u}" for u in draw.integers(0, 100, rows)]
        tables = []
        for _ in range(8):
            seen = logits + draw.normal(size=(4, rows))
            frame = {"user": users} | {f"label.{t.name}": y for t, y in zip(tasks, labels, strict=True)}
            frame |= {
                f"p.{t.name}": (1 / (1 + np.exp(-s))).astype(np.float32) for t, s in zip(tasks, seen, strict=True)
            }
            tables.append(PredictionsTable(pd.DataFrame(frame), tasks))
        found = against_run(tables[0], {f"b{n}": table for n, table in enumerate(tables[1:])}, [])
        every = [d for of in found.values() for d in of.values()]
        assert len(every) == 28
        beaten += any(d.better == "b" for d in every)
        alone += any(d.difference > half_of(d) for d in every)
    assert beaten <= 2  # of 16; 3 or more happen once in 20 times
    assert alone >= 0.25 * worlds
