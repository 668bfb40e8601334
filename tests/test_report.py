"""A run's report: its numbers, what it says of what is missing, names from data, the same file for the same run."""

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import made_run
import numpy as np
import pytest
import shop
import yaml
from made_run import TASKS, WEIGHTS, make
from ranks import run_ranks
from rich.console import Console
from sklearn.metrics import mean_absolute_error, r2_score
from typer.testing import CliRunner

from mtcl_torchrec.cli.commands import app
from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.evaluation.compare import Difference
from mtcl_torchrec.evaluation.naming import TASK_MEASURES, label_of
from mtcl_torchrec.evaluation.predictions_file import read_predictions, write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.report import Compared, compare_html, from_differences, write_report
from mtcl_torchrec.report import studio as studio_module
from mtcl_torchrec.report.fusion_verdict import what_does_fusion
from mtcl_torchrec.report.sections import MOST_TASKS
from mtcl_torchrec.report.tables import number
from mtcl_torchrec.schema import ConfigError, DataError, Task
from mtcl_torchrec.training.run import train_run


class Page(HTMLParser):
    """What a browser would make of it: elements, text, tables as lists of rows of text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts, self.tables, self._cell = [], [], [], {}, None
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = re.sub(r"\s+", " ", "".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "table":
            self._table = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._table[-1].append(self._cell)
            self._cell = None
        elif tag == "caption":
            self.tables[self._cell] = self._table
            self._cell = None

    def handle_data(self, data):
        self.texts.append(data)
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="session")
def page(made, tmp_path_factory):
    return Page(write_report(made, tmp_path_factory.mktemp("page") / "report.html"))


@pytest.fixture
def fast(monkeypatch):
    """Pictures that are drawn as nothing, for tests of what is around them; names of those that were asked for."""
    asked = []

    def draw(self, name, title, alt, paint, **kwargs):
        asked.append(name)
        return studio_module.Picture(re.sub(r"\W", "-", name), title, alt, "<svg></svg>", 300)

    monkeypatch.setattr(studio_module.Studio, "draw", draw)
    return asked


def copied(made, folder):
    shutil.copytree(made, folder)
    return folder


def edited(folder, change):
    """With metrics.json changed."""
    metrics = json.loads((folder / "metrics.json").read_text())
    change(metrics)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def read(folder):
    return Page(write_report(folder))


def test_numbers_are_those_of_metrics_json(made, page):
    metrics = json.loads((made / "metrics.json").read_text())
    tasks = metrics["evaluations"]["test"]["tasks"]
    headings = {label_of(key): key for keys in TASK_MEASURES.values() for key in keys}
    headings |= {"base rate": "base_rate", "top class": "base_rate", "mean label": "base_rate"}
    assert headings["PR-AUC"] == "pr_auc"
    seen = 0
    for kind in ("Binary", "Multiclass", "Regression"):
        columns, *rows = page.tables[f"{kind} tasks"]
        for task, *cells in rows:
            for heading, cell in zip(columns[1:], cells, strict=True):
                if heading == "labels":
                    assert cell == f"{int(tasks[task]['count']):,}"
                else:
                    assert cell.split(" ±")[0] == number(tasks[task][headings[heading]]), (task, heading)
                seen += 1
    assert seen == 3 * 11 + 6 + 5
    ranking = metrics["evaluations"]["test"]["ranking"]
    columns, *rows = page.tables[
        "The same rows in the order of the fused score, of the event's own head, and by popularity"
    ]
    assert [row[0] for row in rows] == ["click", "like", "report (lowers the score)"]
    for row, task in zip(rows, WEIGHTS, strict=True):
        shown = dict(zip(columns, row, strict=True))
        assert shown["fused"].split(" ±")[0] == number(ranking["fused"][f"gauc {task}"])
        assert shown["popularity"].split(" ±")[0] == number(ranking["popular"][f"gauc {task}"])
        assert shown["own head"].split(" ±")[0] == number(tasks[task]["gauc"])


def test_tables_say_cost_versions_and_data(made, page):
    cost = dict(page.tables["Cost"][1:])
    assert cost["samples per second"] == "4,321"
    assert cost["peak memory of a rank"] == "1.50 GB"
    assert cost["dense parameters"] == "12,345"
    assert cost["seconds per epoch"] == "2.0, 3.0, 4.0"
    # Both shards of the user's table, and one copy of the item's, which two ranks hold.
    assert page.tables["The largest tables"][1:] == [
        ["table_user", "151", "8", "1,208"],
        ["table_item", "80", "4", "320"],
    ]
    origin = dict(page.tables["Versions and data"][1:])
    assert origin["torch"] == "2.13.0"
    assert "fbgemm-gpu" not in origin
    assert origin["training data"] == "memory, 9000 rows, seed 0, 0123abcd"
    assert origin["test split"].endswith(read_predictions(made / "predictions/test.parquet").fingerprint)
    assert "kind: multiclass" in page.text


QUALITIES = "Each task on the test split"


def test_baselines_have_intervals_and_are_marked(page):
    columns, *rows = page.tables[QUALITIES]
    assert columns == ["predicted by", "click, AUC", "like, AUC", "report, AUC", "taste, NE", "minutes, R²"]
    assert [row[0] for row in rows] == ["this run", "popularity", "logistic", "single_task", "trees"]
    assert all(re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", cell) for cell in rows[0][1:])
    assert all("▲" in cell for cell in rows[1][1:4])
    assert rows[1][4:] == ["–", "–"]  # one score is no prediction of classes or numbers
    assert all("▲" in cell for cell in rows[2][1:])
    assert page.tables["How the baselines were tuned"][-1] == ["trees", "10", "3.0", "c 1"]


def test_every_picture_is_there_with_words_for_it(page):
    drawn = {value for tag, name, value in page.attributes if (tag, name) == ("div", "id")}
    tasks = [task.name for task in TASKS]
    expected = {f"{kind}-{t}" for kind in ("learning", "reliability") for t in tasks}
    expected |= {f"{kind}-{t}" for kind in ("roc", "precision-recall") for t in WEIGHTS}
    expected |= {f"baselines-{t}" for t in tasks}
    expected |= {"experts-level-1", "conflicts-trunk", "fusion-weights", "fusion-influence", "fusion-events-gauc",
                 "pareto-click", "pareto-like"}  # fmt: skip
    assert drawn == expected
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("div", "aria-label")]
    assert sum(len(label) > 20 for label in labels) >= len(expected)
    assert page.tags.count("svg") == len(expected)
    assert set(re.findall(r"#[0-9a-f]{6}", re.sub(r"<style>.*?</style>", "", page.html, flags=re.S))) == set()


def test_nothing_is_loaded_from_elsewhere(page):
    assert "script" not in page.tags
    targets = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(target.startswith(("#", "data:,")) for target in targets)
    assert not re.search(r"url\((?!#)", page.html)
    assert "@import" not in page.html


def test_the_same_run_gives_the_same_file(page, tmp_path):
    one = make(tmp_path / "one", tasks=TASKS[:1], baselines=False)
    first = write_report(one, tmp_path / "first.html").read_bytes()
    assert write_report(copied(one, tmp_path / "other"), tmp_path / "other.html").read_bytes() == first
    assert len(page.html) < 1_000_000


NAME = """<script>alert("1")</script>"><img src=x onerror='a()'>{{7*7}}$x_1$ `code`"""


def test_names_from_data_are_text(tmp_path, monkeypatch):
    tasks = [Task.binary(NAME), Task.binary("like")]
    monkeypatch.setattr(made_run, "WEIGHTS", {NAME: 1.0})
    folder = make(tmp_path / "run", tasks=tasks, fitted=False, name=NAME)
    baselines = json.loads((folder / "baselines.json").read_text())
    baselines[NAME] = {"settings": {NAME: NAME}, "trials": 1, "seconds": None}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    found = edited(folder, lambda m: m["balance"]["gates"][0].update(gate=NAME) or m.update(diagnosis=[NAME]))
    for path in (write_report(found), compare_html([found, found], None, tmp_path / "compare.html")):
        of = Page(path)
        assert not {"script", "img"} & set(of.tags)
        assert not [name for _, name, _ in of.attributes if name.startswith("on")]
        assert "{{7*7}}" in of.text
        assert "49" not in re.findall(r"\}?49\$", of.text)
        assert NAME.replace("`", "") in of.text.replace("`", "")


# Each takes something away, and says what the page must then say.
def _no_epochs(metrics):
    metrics["history"]["epochs"], metrics["history"]["best_epoch"] = [], 0


def _one_epoch(metrics):
    metrics["history"]["epochs"], metrics["history"]["best_epoch"] = metrics["history"]["epochs"][:1], 1


def _not_a_number(metrics):
    for of in [metrics["evaluations"]["test"]["tasks"], *metrics["history"]["epochs"]]:
        of["click"] |= dict.fromkeys(("auc", "gauc", "ne", "calibration"))
    metrics["evaluations"]["test"]["ranking"]["fused"] |= {"auc click": None, "gauc click": None}


def _no_labels(metrics):
    metrics["evaluations"]["test"]["tasks"]["like"] = {"count": 0.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_no_epochs, "No epoch was evaluated on validation"),
        (_one_epoch, "There was one epoch: a curve needs two"),
        (_not_a_number, "Of click, only one kind of label is in these rows"),
        (_no_labels, "like has no label in these rows"),
        (lambda m: m["balance"].update(gradients=[]), "balance: {surgery: {kind: measure}}"),
        (lambda m: m["balance"].update(gates=[]), "no gates that choose among experts"),
        (lambda m: m.update(balance={}), "no gates that choose among experts"),
        (lambda m: m.pop("cost"), "were not recorded"),
        (lambda m: m["evaluations"]["test"].update(ranking={}), "it was not evaluated"),
        (lambda m: m.update(evaluations={}), "Training did not finish"),
        (lambda m: m["history"].update(seconds=[None, 1.0]), "What it cost"),
    ],
)
def test_what_the_metrics_lack_is_said(made, tmp_path, fast, change, expected):
    assert expected in read(edited(copied(made, tmp_path / "run"), change)).text


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("predictions", "predictions/test.parquet is not there"),
        ("fusion", "Weights were not fitted, so there is no Pareto front"),
        ("baselines", "The baselines' predictions for this split are missing"),
        ("baselines.json", "No baselines were trained"),
        ("checkpoints", "There is no complete checkpoint"),
        ("metrics.json", "Training did not finish (preprocessing/, metrics.json missing)"),
    ],
)
def test_what_the_directory_lacks_is_said(made, tmp_path, fast, gone, expected):
    path = copied(made, tmp_path / "run") / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = read(tmp_path / "run")
    assert expected in found.text
    if gone == "metrics.json":
        assert "learning click" in fast  # what the checkpoint knows
        assert "of its validation" in found.text
    if gone == "predictions":
        assert found.tables["Binary tasks"][1][0] == "click"


def test_an_empty_run_and_one_with_nothing_but_a_yaml(tmp_path, fast):
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="no run here"):
        write_report(tmp_path / "run")
    (tmp_path / "run/run.yaml").write_text("name: bare\n")
    found = read(tmp_path / "run")
    assert "Nothing was evaluated" in found.text
    assert "No task has labels by which it could be judged" in found.text
    assert fast == []


def test_one_task_without_calibration(tmp_path, fast):
    folder = make(tmp_path / "run", tasks=TASKS[:1], calibrated=False, fitted=False, baselines=False)
    text = read(folder).text
    assert "There is one task" in text
    assert "Nothing was calibrated after training" in text
    assert "reliability click" in fast


def test_a_run_without_a_fused_score(made, tmp_path, fast):
    folder = copied(made, tmp_path / "run")
    shutil.rmtree(folder / "fusion")
    run = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in run.items() if k != "fusion"}))
    of = read_predictions(folder / "predictions/test.parquet")
    bare = PredictionsTable(of.frame.drop(columns=["score", "popularity", "user"]), of.tasks, of.split, of.classes)
    write_predictions(folder / "predictions/test.parquet", bare)
    edited(folder, lambda m: m["evaluations"]["test"].update(ranking={}))
    assert "The run has no fused score" in read(folder).text
    assert "roc click" in fast


def test_a_task_without_labels_in_the_predictions(made, tmp_path, fast):
    folder = copied(made, tmp_path / "run")
    of = read_predictions(folder / "predictions/test.parquet")
    of.frame["label.like"] = np.float32(np.nan)
    write_predictions(folder / "predictions/test.parquet", of)
    edited(folder, _no_labels)
    text = read(folder).text
    assert "like has only one kind of label in these rows, or none" in text
    assert "roc like" not in fast
    assert "roc click" in fast


def test_tasks_of_one_label_are_one_event(made, tmp_path, fast):
    def alike(metrics):
        metrics["evaluations"]["test"]["same_event"] = {"like": "click"}

    found = read(edited(copied(made, tmp_path / "run"), alike))
    caption = "The same rows in the order of the fused score, of the event's own head, and by popularity"
    assert [row[0] for row in found.tables[caption][1:]] == ["click, like", "report (lowers the score)"]
    assert any(row[0].startswith("click ") for row in found.tables["AUC by items"])
    assert "clicks" not in found.text


def test_rankings_within_requests_and_segments_of_metrics_json(made, tmp_path, fast):
    def more(metrics):
        of = metrics["evaluations"]["test"]
        of["ranking"]["fused"] |= {"requests": 9.0, "choice@5": 0.25, "value@5": 0.5, "value@5 half": 0.0196,
                                   "ndcg@5 click": 0.75, "mrr click": None}  # fmt: skip
        of["ranking"]["popular"] |= {"choice@5": 0.25, "value@5": 0.4}
        of["segments"] = {"hour": {"9 <am>": {"rows": 1234, "tasks": {"click": {"auc": 0.7}}, "ranking": {}}}}

    found = read(edited(copied(made, tmp_path / "run"), more))
    assert found.tables["What the first 5 rows of each request bring"] == [
        ["measure", "fused", "popular"], ["value", "0.5000 ± 0.0196", "0.4000"], ["NDCG of click", "0.7500", "–"],
    ]  # fmt: skip
    assert found.tables["Where in a request the events are"][1] == ["MRR of click", "–", "–"]
    assert "25% of the requests have more than 5 rows" in found.text
    assert found.tables["AUC by hour"][0] == ["hour", "rows", "click", "like", "report"]
    assert found.tables["AUC by hour"][1:] == [["9 <am>", "1,234", "0.700", "–", "–"]]
    assert "AUC by items" in found.tables


def test_a_segment_stands_there_once_and_says_where_nothing_is_sure(made, tmp_path, fast):
    rare = {"value": 0.161, "half": None, "error": None, "events": 1, "unsure": "too few events (1)"}
    sure = {"value": 0.7, "half": 0.02, "error": 0.01, "events": 900, "unsure": ""}
    part = {"rows": 1400, "tasks": {}, "ranking": {}, "quality": {"click": sure, "like": rare}}

    def judged(metrics):
        metrics["evaluations"]["test"]["segments"] = {"item_seen": {"True": part}, "hour": {"0": part}}

    found = read(edited(copied(made, tmp_path / "run"), judged))
    captions = [caption for caption in found.tables if caption.startswith("AUC by ")]
    assert captions == ["AUC by item_seen", "AUC by hour", "AUC by items"]
    assert not any("not in training" in row[0] for row in found.tables["AUC by items"])
    assert found.tables["AUC by hour"][1][:4] == ["0", "1,400", "0.700 ± 0.020 (900)", "0.161 (1: unsure)"]
    assert "unsure (grey): too few events" in found.text


def test_segments_of_classes_and_numbers_in_their_own_terms(made, tmp_path, fast):
    folder = copied(made, tmp_path / "run")
    found, table = read(folder), read_predictions(folder / "predictions/test.parquet")
    assert found.tables["R² and MAE by hour"][0] == ["hour", "rows", "minutes R²", "minutes MAE"]
    assert found.tables["NE and top-1 by hour"][0] == ["hour", "rows", "taste NE", "taste top-1"]
    numbers, classes = (found.tables[f"{of} by hour"][1] for of in ("R² and MAE", "NE and top-1"))
    rows = table.frame["segment.hour"].to_numpy() == int(numbers[0])
    known = rows & ~np.isnan(table.labels("minutes"))
    y, p = table.labels("minutes")[known], table.predicted("minutes")[known]
    assert numbers[1] == f"{rows.sum():,}"
    assert numbers[2].startswith(f"{r2_score(y, p):.3f} ± ")
    assert numbers[2].endswith(f" ({known.sum()})")
    assert numbers[3].startswith(f"{mean_absolute_error(y, p):.3f} ± ")
    known = rows & ~np.isnan(table.labels("taste"))
    hits = (table.predicted("taste")[known].argmax(1) == table.labels("taste")[known]).mean()
    assert classes[3].startswith(f"{hits:.3f} ± ")

    # Without the predictions, what metrics.json has is shown, also where an older command wrote no second metric.
    (folder / "predictions/test.parquet").unlink()
    sure = {"value": 0.25, "half": 0.02, "events": 900, "unsure": ""}
    new, old = {"minutes": sure | {"beside": {"mae": {"value": 3.5, "half": 0.5}}}}, {"minutes": sure}

    def judged(metrics):
        parts = {"0": {"rows": 900, "tasks": {}, "quality": new}, "1": {"rows": 900, "tasks": {}, "quality": old}}
        metrics["evaluations"]["test"]["segments"] = {"hour": parts}

    assert read(edited(folder, judged)).tables["R² and MAE by hour"][1:] == [
        ["0", "900", "0.250 ± 0.020 (900)", "3.500 ± 0.500"], ["1", "900", "0.250 ± 0.020 (900)", "–"],
    ]  # fmt: skip


@pytest.mark.parametrize(("rule", "said"), [(None, "F1"), ("accuracy", "accuracy"), ("youden", "Youden")])
def test_the_rule_of_thresholds_is_said(made, tmp_path, fast, rule, said):
    folder = copied(made, tmp_path / "run")
    run = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump(run | ({"evaluation": {"threshold": rule}} if rule else {})))

    def decided(metrics):
        metrics["evaluations"]["test"]["tasks"]["click"] |= {"threshold": 0.3, "accuracy": 0.6, "majority": 0.8}

    found = read(edited(folder, decided))
    (caption,) = [caption for caption in found.tables if caption.startswith("Yes or no")]
    assert said in caption
    assert ("the accuracy is below that of always saying no" in found.text) == (rule != "accuracy")


def test_one_row_is_said_as_one(made, tmp_path, fast):
    def more(metrics):
        metrics["evaluations"]["test"]["ranking"]["fused"] |= {"choice@1": 0.25, "value@1": 0.5}

    found = read(edited(copied(made, tmp_path / "run"), more))
    assert "What the first row of each request brings" in found.tables
    assert "25% of the requests have more than one row to choose from" in found.text
    assert "first 1" not in found.text


def test_a_damaged_file_is_named(made, tmp_path, fast):
    folder = copied(made, tmp_path / "run")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.json: damaged"):
        write_report(folder)


def test_a_damaged_baseline_is_left_out_and_the_rest_is_shown(made, tmp_path, fast):
    folder = copied(made, tmp_path / "run")
    path = next((folder / "baselines").glob("*/predictions/test.parquet"))
    name = path.parts[-3]
    path.write_bytes(path.read_bytes()[:100])
    found = read(folder)
    assert f"Of {name}, nothing is compared: {path}: no file of predictions, or a damaged one (" in found.text
    assert "makes it anew." in found.text
    assert name not in {row[0] for row in found.tables["Each task on the test split"]}
    assert len(found.tables["Each task on the test split"]) > 2
    # Of the run itself there is nothing to show: an error, which names the file once, and whole.
    path = folder / "predictions" / "test.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError) as refused:
        read(folder)
    assert str(refused.value).count(str(path)) == 1
    assert str(refused.value).endswith(")")


def test_the_command(made, tmp_path, fast):
    done = CliRunner().invoke(app, ["report", str(made), "--out", str(tmp_path / "new/page.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new/page.html").is_file()
    assert "page.html" in done.output
    refused = CliRunner().invoke(app, ["report", str(made), "--out", str(tmp_path)])
    assert isinstance(refused.exception, ConfigError)
    elsewhere = copied(made, tmp_path / "run")
    (elsewhere / "baselines.json").rename(tmp_path / "baselines.json")
    shutil.move(elsewhere / "baselines", tmp_path / "baselines")
    done = CliRunner().invoke(app, ["report", str(elsewhere), "--baselines", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "baselines click" in fast
    with pytest.raises(DataError, match=r"no baselines\.json here"):
        write_report(elsewhere, baselines=tmp_path / "new")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_a_library_the_extra_is_named(made, tmp_path, fast, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"mtcl_torchrec\[plots\]"):
        write_report(made, tmp_path / "page.html")
    from mtcl_torchrec.cli.report import report_of_demo

    console = Console(record=True, width=200, file=io.StringIO())
    report_of_demo(made, console)
    assert "No report was written: a report needs" in console.export_text()


def test_intervals_of_metrics_json_are_those_that_are_shown(made, tmp_path, fast):
    def more(metrics):
        of = metrics["evaluations"]["test"]
        auc, gauc = of["tasks"]["click"]["auc"], of["ranking"]["fused"]["gauc click"]
        of["intervals"] = {
            "click": {"auc": {"value": auc, "error": 0.01, "low": auc - 0.0321, "high": auc + 0.0321}},
            "ranking": {"gauc click": {"value": gauc, "error": 0.01, "low": gauc - 0.0456, "high": gauc + 0.0456},
                        "value@5": {"value": 0.5, "error": 0.1, "low": 0.4433, "high": 0.5567}},
        }  # fmt: skip
        of["ranking"]["fused"] |= {"value@5": 0.5, "value@5 half": 0.0196, "choice@5": 0.25}
        of["ranking"]["popular"] |= {"value@5": 0.4, "value@5 half": 0.0196, "choice@5": 0.25}

    found = read(edited(copied(made, tmp_path / "run"), more))
    columns, first, *_ = found.tables["Binary tasks"]
    assert first[columns.index("AUC")].endswith(" ± 0.0321")
    assert "±" not in first[columns.index("log-loss")]
    assert found.tables[QUALITIES][1][1].endswith(" ± 0.0321")
    title = "The same rows in the order of the fused score, of the event's own head, and by popularity"
    assert found.tables[title][1][2].endswith(" ± 0.0456")
    assert found.tables["What the first 5 rows of each request bring"][1][1:] == ["0.5000 ± 0.0567", "0.4000 ± 0.0196"]
    assert found.text.count("± is half of a 95 % interval, over users") >= 3


def test_twins_stand_beside_the_run(page):
    columns, *rows = page.tables["Together and alone"]
    assert columns == ["task", "measure", "together", "alone", "difference", "together is"]
    assert [row[:2] for row in rows] == [
        ["click", "AUC"], ["like", "AUC"], ["report", "AUC"], ["taste", "NE"], ["minutes", "R²"],
    ]  # fmt: skip
    for _, _, together, alone, difference, verdict in rows:
        gap = float(together.split()[0]) - float(alone.split()[0])
        assert float(difference.split()[0].replace("−", "-")) == pytest.approx(gap, abs=1.01e-4)
        assert verdict == "better ▲"
    assert "Of 5 tasks that twins were trained on alone, 5 are predicted better together" in page.text


def test_a_twin_is_no_rival_for_tasks_that_it_was_not_trained_on(made, tmp_path, fast):
    folder = copied(made, tmp_path / "run")
    path = folder / "baselines/single_task/predictions/test.parquet"
    of = read_predictions(path)
    kept = of.frame.drop(columns=[c for c in of.frame if c in ("p.like", "uncalibrated.like")])
    write_predictions(path, PredictionsTable(kept, of.tasks, of.split, of.classes, of.thresholds))
    found = read(folder)
    assert [row[0] for row in found.tables["Together and alone"][1:]] == ["click", "report", "taste", "minutes"]
    assert "Not compared: like." in found.text
    rows = {row[0]: row[1:] for row in found.tables[QUALITIES][1:]}
    assert rows["single_task"][1] == "–"
    assert "▲" in rows["popularity"][1]


def test_baselines_of_other_rows_are_left_out(made, tmp_path, fast):
    """As after training anew on changed data: rows of another number, of others, and with other labels."""
    folder = copied(made, tmp_path / "run")
    names = ["popularity", "single_task", "trees"]

    def shorter(frame):
        return frame.iloc[1:]

    def of_others(frame):
        return frame.assign(user=frame["user"].to_numpy()[::-1].copy())

    def labelled_anew(frame):
        return frame.assign(**{"label.click": 1 - frame["label.click"]})

    for name, change in zip(names, (shorter, of_others, labelled_anew), strict=True):
        path = folder / f"baselines/{name}/predictions/test.parquet"
        of = read_predictions(path)
        changed = change(of.frame).reset_index(drop=True)
        write_predictions(path, PredictionsTable(changed, of.tasks, of.split, of.classes, of.thresholds))
    found = read(folder)
    assert f"Left out, since they were judged by other rows than this run: {', '.join(names)}" in found.text
    shown = [row[0] for row in found.tables[QUALITIES][1:]]
    assert not {*names} & {*shown}


KNOWN = {
    "click": {"count": 9.0, "share": 0.934, "regret": 0.01, "nats": 0.1, "oracle_nats": 0.11, "auc": 0.75,
              "oracle_auc": 0.7677, "auc_of_labels": 0.751, "oracle_auc_of_labels": 0.768},
    "taste": {"count": 9.0, "share": -0.051, "regret": 0.02, "nats": -0.01, "oracle_nats": 0.2},
    "minutes": {"count": 9.0, "share": 0.5, "regret": 2.0, "r2": 0.2, "oracle_r2": 0.4},
    "like": {"count": 0.0},
    "score": {"share": 0.8, "requests@1": 9.0, "value@1": 0.4, "oracle@1": 0.5, "random@1": 0.1, "regret@1": 0.1,
              "regret@1 half": 0.0196, "share@1": 0.75, "share@1 half": 0.039, "rule_share@1": 0.9, "requests@5": 0.0},
}  # fmt: skip


def test_a_run_of_many_tasks_is_not_said_task_by_task(tmp_path, fast):
    tasks = [*TASKS[:3], *(Task.binary(f"other{n}") for n in range(27))]
    found = read(make(tmp_path / "run", tasks=tasks, baselines=False, fitted=False))
    assert (
        f"Drawn are {MOST_TASKS} tasks; other21, other22, other23, other24, other25 and other26 are not." in found.text
    )
    drawn = [name for name in fast if name.startswith("reliability ")]
    assert len(drawn) == MOST_TASKS
    verdict = found.text.split("How the verdict is reached")[0]
    assert re.search(r"other\d.*\b\d+ more", verdict)
    assert not re.search(r"(\bother\d+[^.;]*){8}", verdict)  # in one part of a sentence
    assert len(found.tables["Binary tasks"]) == 31  # where all are


def test_a_task_whose_part_is_overruled_does_not_lead():
    said = what_does_fusion({"like": 1.6, "click": -0.7, "buy": 0.1}, [], True)
    assert said.short == "Ranks mostly by like"
    assert said.sentences == [
        "The order within a request is decided by like (160%) and buy (10%), against click (−70%), whose part in the "
        "score is overruled."
    ]
    assert what_does_fusion({"like": 0.6, "click": -0.5, "buy": 0.4}, [], True).short == "Led by like and buy"


def test_classes_alone_have_no_popularity_of_before(made, tmp_path, fast):
    """Of no event, so that of each is not lacking."""
    folder = copied(made, tmp_path / "run")
    path = folder / "predictions" / "test.parquet"
    table = read_predictions(path)
    of_click = table.frame.drop(columns=[c for c in table.frame if c.startswith("popular.")])
    for kept, expected in ((table.tasks, True), (table.tasks[3:4], False)):
        write_predictions(path, replace(table, frame=of_click, tasks=kept))
        assert ("before it knew how popular items are" in read(folder).text) == expected


def test_what_is_knowable_is_shown(made, page, tmp_path, fast):
    folder = edited(copied(made, tmp_path / "run"), lambda m: m["evaluations"]["test"].update(knowable=KNOWN))
    found = read(folder)
    assert "Of what is knowable in this world it knows 93% of click, −5% of taste and 50% of minutes" in found.text
    assert "of what its ranking can gain, the fused score gains 75% (first row)" in found.text
    assert found.tables["Beside the truth"][1:] == [
        ["click", "93.4 %", "expected AUC", "0.7500", "0.7677", "0.0100"],
        ["taste", "−5.1 %", "information, nats", "−0.0100", "0.2000", "0.0200"],
        ["minutes", "50.0 %", "R²", "0.2000", "0.4000", "2.0000"],
        ["fused score, all rows", "80.0 %", "gain of ranking", "–", "–", "–"],
        ["fused score, first row", "75.0 % ± 3.9", "value@1", "0.4000", "0.5000", "0.1000"],
    ]
    assert "the same fused score of the true probabilities gets 90.0 %; the rest is for another rule" in found.text
    assert "knowable" in fast
    assert "nobody can predict better" in found.text
    side = Page(compare_html([folder, made], None, tmp_path / "compare.html"))
    assert side.tables["Known, of what is knowable"][1] == ["click", "93.4%", "–"]
    assert "knowable" not in page.text


def test_pictures_go_into_a_folder_too(tmp_path):
    draws = studio_module.Studio(tmp_path / "png")
    names = [
        draws.draw("the <same> name", "T", "a", lambda axes, c: axes.plot([0, 1], color=c["a"])).name for _ in "ab"
    ]
    assert names == ["the-same-name", "the-same-name-2"]
    files = sorted((tmp_path / "png").iterdir())
    assert [f.name for f in files] == ["the-same-name-2.png", "the-same-name.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") and f.stat().st_size > 2000 for f in files)


def test_runs_side_by_side(made, tmp_path, fast):
    other = make(tmp_path / "other", baselines=False, fitted=False)
    worse = made_run.table(noise=2.0)
    write_predictions(other / "predictions/test.parquet", worse)
    run = yaml.safe_load((other / "run.yaml").read_text())
    run["training"] = {"epochs": 7}
    (other / "run.yaml").write_text(yaml.safe_dump(run))
    found = Page(compare_html([made, other], None, tmp_path / "compare.html"))
    assert "Is other better than run?" in found.text
    assert "No, worse on 3 of 3" in found.text
    assert "Yes, on 3 of 3" in Page(compare_html([other, made], None, tmp_path / "compare.html")).text
    assert "No difference that counts" in Page(compare_html([made, made], None, tmp_path / "compare.html")).text
    assert found.tables["Keys of the YAML whose values differ"][1:] == [["training.epochs", "–", "7"]]
    given = [Compared("ranking", "NDCG@10", [0.4, 0.5], [(0.1, 0.05, 0.15)]),
             Compared("click", "log-loss", [0.4, 0.5], [(0.1, 0.05, 0.15)], more_is_better=False)]  # fmt: skip
    text = Page(compare_html([made, other], given, tmp_path / "compare.html")).text
    assert "Better on 1, worse on 1" in text
    assert "Better: ranking (NDCG@10)." in text
    numbers = {"a": 0.5, "b": 0.4, "difference": -0.1, "low": -0.2, "high": -0.01, "unsure": "",
               "unwanted": False}  # fmt: skip
    pair = [SimpleNamespace(of=of, metric=metric, better=better, **numbers)
            for of, metric, better in (("click", "ne", "b"), ("ranking", "novelty", None))]  # fmt: skip
    assert [c.sign(1) for c in from_differences([pair, pair[:1]])] == [1, 0]
    assert [c.sign(2) for c in from_differences([pair, pair[:1]])] == [1, 0]
    found = Page(compare_html([made, other], from_differences([pair]), tmp_path / "compare.html"))
    assert "Better: click (NE). Too close to call: ranking (novelty)." in found.text.replace(".Too", ". Too")
    assert found.tables["Compared"][1] == ["click", "NE", "0.5000", "0.4000", "−0.1000 (−0.2000 to −0.0100) ▲"]
    assert "▼ worse, all tested together (Holm); the rest" in found.text
    costly = Difference("ranking", "rate@5 hide", 0.5, 0.4, -0.1, -0.2, -0.01, 0.01, 0.02, unwanted=True)
    few = Difference("ranking", "rate@5 buy", 0.5, 0.4, -0.1, np.nan, np.nan, np.nan, unsure="too few events (3)")
    found = Page(compare_html([made, other], from_differences([[costly, few]]), tmp_path / "compare.html"))
    assert "Better: ranking (rate@5 of hide, less is better)." in found.text
    assert "Cannot be sure: ranking (rate@5 of buy), too few events (3)." in found.text
    with pytest.raises(ConfigError, match="two runs or more"):
        compare_html([made], None, tmp_path / "compare.html")


def train(data, folder):
    run = parse_run(shop.RUN, folder=data)
    run.training.epochs = 1
    changed = yaml.safe_load(dump_run(run)) | {
        "calibration": {"click": "platt"},
        "balance": {"surgery": {"kind": "measure"}},
    }
    return train_run(parse_run(yaml.safe_dump(changed)), folder, device="cpu", console=Console(quiet=True)).evaluations


def test_a_run_of_two_ranks_is_reported(tmp_path):
    shop.log(1200).to_parquet(tmp_path / "log.parquet", index=False)
    run_ranks(train, 2, tmp_path, tmp_path / "run")
    stored = json.loads((tmp_path / "run/metrics.json").read_text())
    cost, history = stored["cost"], stored["history"]
    rows = 840 - 2 * cost["batch_size"]  # of both ranks, the first step left out
    seconds = history["seconds"][0] - history["first_step"][0]
    assert cost["samples_per_second"] == pytest.approx(rows / seconds, rel=0.2)
    assert cost["ranks"] == 2
    assert cost["device"] == "cpu"
    assert cost["peak_device_memory_gb"] is None
    assert 0.05 < cost["peak_memory_gb"] < 10
    assert cost["dense_parameters"] > 100
    found = Page(write_report(tmp_path / "run"))
    drawn = {value for tag, name, value in found.attributes if (tag, name) == ("div", "id")}
    assert {
        "roc-click",
        "roc-buy",
        "conflicts-trunk",
        "experts-level-1",
        "reliability-taste",
        "fusion-weights",
    } <= drawn
    assert found.tables["Binary tasks"][1][1].split(" ±")[0] == number(
        stored["evaluations"]["test"]["tasks"]["click"]["auc"]
    )
    assert "before" in next(v for t, n, v in found.attributes if n == "aria-label" and "Reliability of click" in v)


def test_a_comparison_of_a_run_that_still_rose_says_so(made, tmp_path, fast):
    def rising(metrics):
        task = next(iter(metrics["history"]["epochs"][0]))
        of = {"count": 10_000.0, "base_rate": 0.3}
        metrics["history"]["epochs"] = [{task: of | {"auc": value}} for value in (0.6, 0.65, 0.7)]
        metrics["history"]["best_epoch"] = 3

    said = "Training ended while 1 task was still getting better"
    run = edited(copied(made, tmp_path / "run"), rising)
    assert said in read(run).text
    assert said not in read(made).text
