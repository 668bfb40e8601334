"""What `mtcl baselines` tells: what was left out and why, whole names, whom the run is ahead of, what is not of this
run, and twins of every task."""

import io
import json
import re
import sys
from pathlib import Path

import made_run
import pytest
import shop
from rich.console import Console

from mtcl_torchrec.baselines import BASELINES, print_baselines, read_entries, run_baselines
from mtcl_torchrec.baselines.differences import differences, verdict
from mtcl_torchrec.baselines.keys import CONFIGURATION, FILES, TRAIN_ROWS, configuration_of, of_other_runs
from mtcl_torchrec.baselines.run import Budget
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data import kuairand
from mtcl_torchrec.evaluation.predictions_file import write_predictions
from mtcl_torchrec.report.baseline_tables import twins_table
from mtcl_torchrec.report.comparisons import comparisons, qualities
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.facts import task_facts
from mtcl_torchrec.report.sections import sharing_answer
from mtcl_torchrec.report.verdict import is_it_good
from mtcl_torchrec.schema import ConfigError

# One event alone, of which networks would be the run itself.
CLICKS = re.sub(
    r"    - \{name: (buy|taste|stars),.*\n", "", shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1")
).replace("{click: 1, buy: 3, taste: 0.5, stars: 0.5}", "{click: 1}")
OF_IMPLICIT = ("item_knn", "als", "bpr")
WHY = r"needs implicit: pip install 'mtcl_torchrec\[baselines\]' \(.*implicit.*\)"


def silent(line):
    """Say nothing."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shop.log(900).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(CLICKS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_implicit(monkeypatch):
    for module in ("implicit", *(f"implicit.{of}" for of in ("als", "bpr", "nearest_neighbours"))):
        monkeypatch.setitem(sys.modules, module, None)


# ---------------------------------------------------------------- what is left out


def test_without_implicit_the_others_are_done_and_the_end_says_what_is_not(mtcl, folder, no_implicit, monkeypatch):
    shown = mtcl("baselines", "run.yaml", "--trials", 1, "--device", "cpu", "-o", "out")
    assert list(read_entries(folder / "out")) == ["popularity", "logistic_regression", "trees"]
    end = shown[shown.index("What the search cost") :]
    reasons = re.findall(rf"^Skipped: (.*): {WHY}$", end, re.MULTILINE)
    assert ", ".join(reasons) == ", ".join(OF_IMPLICIT)
    assert re.search(r"^Skipped: single_task: would be the run itself", end, re.MULTILINE)
    assert end.rstrip().splitlines()[-1] == "The baselines are in out/baselines.json."
    # By name, it is a mistake, before anything is read.
    (folder / "log.parquet").write_bytes(b"not read")
    for name in OF_IMPLICIT:
        with pytest.raises(ConfigError, match=rf"^{name}: {WHY}; leave it out of --only$"):
            run_baselines(parse_run(CLICKS, folder=folder), folder / "named", only=["popularity", name], say=silent)


def test_what_implicit_has_done_stays_when_it_is_gone(folder, request):
    run, budget = parse_run(CLICKS, folder=folder), Budget(trials=1)
    before = run_baselines(run, folder / "out", only=["bpr"], budget=budget, say=silent)
    request.getfixturevalue("no_implicit")
    left = {}
    found = run_baselines(run, folder / "out", budget=budget, say=silent, left_out=left.__setitem__)
    assert found["bpr"] == before["bpr"]
    assert list(found) == ["popularity", "bpr", "logistic_regression", "trees"]
    assert set(left) == {"item_knn", "als", "single_task", "unweighted"}


# ---------------------------------------------------------------- names and figures


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run with five tasks, and baselines that predict all of them, or one."""
    folder = made_run.make(tmp_path_factory.mktemp("told") / "run", baselines=False, fitted=False)
    entries = {}
    for name, tasks in (("popularity", made_run.TASKS), ("logistic_regression", made_run.TASKS[:1])):
        table = made_run.table(noise=4.0, tasks=made_run.TASKS)
        others = [t.name for t in made_run.TASKS if t not in tasks]
        frame = table.frame.drop(columns=[f"p.{n}" for n in others if f"p.{n}" in table.frame])
        classes = {k: v for k, v in table.classes.items() if k.removeprefix("p.") not in others}
        table = type(table)(frame, table.tasks, table.split, classes)
        write_predictions(folder / f"baselines/{name}/predictions/test.parquet", table)
        evaluation = made_run.evaluation(made_run.table(noise=4.0), made_run.TASKS)
        evaluation["tasks"] = {t: of for t, of in evaluation["tasks"].items() if t not in others}
        budget = {"trials": 8, "seconds": None}
        entries[name] = {"trials": 8, "seconds": 1234.5, "rows": 149_732, "budget": budget, "tuned": "the best of 20 "
                         "trials for each task", "metrics": {"test": evaluation}}  # fmt: skip
    (folder / "baselines.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("width", [60, 80, 110, 250])
def test_no_name_and_no_figure_is_cut(judged, width):
    console = Console(file=io.StringIO(), width=width, record=True)
    print_baselines(read_entries(judged), console, folder=judged)
    shown = console.export_text()
    assert "…" not in shown
    tables = shown[: shown.index("* is the best of its column")].strip()
    assert all(len(line.rstrip()) <= width for line in tables.splitlines())
    assert sum(line.startswith("logistic_regression ") for line in tables.splitlines()) >= 3
    # Every figure, each with its difference, and once in whatever part of the table it stands.
    for task, metric in (("click", "auc"), ("minutes", "r2")):
        value = read_entries(judged)["popularity"]["metrics"]["test"]["tasks"][task][metric]
        assert re.search(rf"{value:.4f}\b", tables), task
    assert re.search(r"[+-]0\.\d{4} ± 0\.\d{4}", tables)
    assert "logistic_regression" in shown[shown.index("What the search cost") :]


def test_baselines_are_listed_with_whole_names(mtcl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    shown = mtcl("baselines", "--list")
    assert "…" not in shown
    assert all(any(line.startswith(f"{name} ") for line in shown.splitlines()) for name in BASELINES)


# ---------------------------------------------------------------- whom the run is ahead of


def test_the_run_is_ahead_of_who_predicts_the_same(judged):
    console = Console(file=io.StringIO(), width=200, record=True)
    print_baselines(read_entries(judged), console, folder=judged)
    said = console.export_text().split("Who is ahead, beyond chance")[1].split("What the search cost")[0]
    assert "this run is ahead of popularity, logistic_regression on click" in said
    assert "this run is ahead of popularity on like, report, taste, minutes (nothing else here predicts them)" in said
    assert "all" not in said
    contents = read_contents(judged)
    sentences = is_it_good(task_facts(contents), comparisons(contents), []).sentences
    assert "Of these baselines, only popularity predicts like, report, taste and minutes." in sentences


def test_of_many_baselines_the_number_is_said():
    key, tables = ("click", "auc"), {n: made_run.table(noise=n, tasks=made_run.TASKS[:1]) for n in (0.3, 4.0, 5.0, 6.0)}
    own = tables.pop(0.3)
    found = differences(own, {f"b{n:.0f}": of for n, of in tables.items()}, only=lambda of, metric: (of, metric) == key)
    assert verdict(found, {key: "click"}) == ["this run is ahead of all 3 that are here on click"]
    several = {"same": differences(own, {"same": own}, only=lambda of, metric: (of, metric) == key)["same"], **found}
    assert verdict(several, {key: "click"}) == [
        "click: no difference that counts between this run and same; it is ahead of b4, b5, b6"
    ]


# ---------------------------------------------------------------- entries of another run

TWO = re.sub(
    r"    - \{name: (taste|stars),.*\n",
    "",
    shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256")
    .replace("taste: 0.5, stars: 0.5", "")
    .replace("{log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}",
             "{train: train.parquet, val: val.parquet, test: test.parquet}"),
)  # fmt: skip


def test_what_is_of_another_configuration_or_other_rows_is_never_shown(mtcl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    log, place = shop.log(900), tmp_path / "one"
    for name, rows in (("train", slice(0, 500)), ("val", slice(500, 700)), ("test", slice(700, 900))):
        log[rows].to_parquet(f"{name}.parquet", index=False)
    other = TWO.replace("tower_layers: [8]", "tower_layers: [4]")

    def train(text):
        (tmp_path / "run.yaml").write_text(text)
        mtcl("train", "run.yaml", "-o", "one", "--overwrite", "--device", "cpu")

    def baselines(*names):
        asked = ("--only", ",".join(names), "--trials", 1, "--device", "cpu")
        return mtcl("baselines", "one", *asked)

    def there():
        found = read_contents(place)
        assert set(found.baselines) == set(found.of_baselines)
        return set(found.baselines), " ".join(line for line in found.missing if line.startswith("Left out"))

    train(TWO)
    baselines("popularity", "unweighted")
    assert there() == ({"popularity", "unweighted"}, "")
    # Another network: popularity is what it was, the twin of the former one is not of this run.
    train(other)
    beside, said = there()
    assert beside == {"popularity"}
    why = "they are not of this run's configuration and training rows, as far as known"
    assert said == f"Left out, since {why}: unweighted. `mtcl baselines RUN_DIR` trains them anew."
    shown = baselines("popularity")
    assert "unweighted: not of this configuration and data, as far as known: left out until trained anew" in shown
    assert "unweighted" not in shown.split("test split: quality of each task")[1]
    listed = mtcl("baselines", "one", "--list")
    assert re.search(r"^unweighted +– +– +the run's network.*; done for another configuration *$", listed, re.MULTILINE)
    assert re.search(r"^popularity +2 +[\d.]+ +what an item usually gets *$", listed, re.MULTILINE)
    stored = json.loads((place / "baselines.json").read_text())
    said = mtcl("fuse", "one", "--set", "click=1,buy=0")
    assert "without training: popularity\n" in said
    assert json.loads((place / "baselines.json").read_text())["unweighted"] == stored["unweighted"]
    # Nothing is lost: beside the former run it counts again, ranked as that ranks.
    train(TWO)
    assert there()[0] == {"popularity", "unweighted"}
    # Other training rows, the same ones to judge by.
    log[100:500].to_parquet("train.parquet", index=False)
    train(TWO)
    assert there()[0] == set()
    shown = baselines("popularity")
    assert "unweighted: not of this configuration and data" in shown
    assert "popularity: click, 1 trial" in shown
    assert there()[0] == {"popularity"}


def test_an_entry_of_an_older_version_is_known_by_its_key(folder):
    run = parse_run(CLICKS, folder=folder)
    options = {"only": ["popularity"], "budget": Budget(trials=1), "say": silent}
    run_baselines(run, folder / "out", **options)
    whole = read_entries(folder / "out")["popularity"]
    old = {key: value for key, value in whole.items() if key not in (CONFIGURATION, FILES, TRAIN_ROWS)}
    (folder / "out/baselines.json").write_text(json.dumps({"popularity": old, "theirs": {**old, "key": None}}))
    assert of_other_runs({"popularity": old, "unkeyed": {"trials": 1}}, run) == ["popularity"]
    run_baselines(run, folder / "out", **options)
    found = read_entries(folder / "out")
    assert found["popularity"] == {key: value for key, value in whole.items() if key != TRAIN_ROWS}
    assert of_other_runs(found, run) == ["theirs"]


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ({"name: shop": "name: other"}, []),
        ({"fusion: {weights: {click: 1}}": "fusion: {weights: {click: 2}}"}, []),
        ({"training: {": "training: {precision: fp32, "}, []),
        ({"tower_layers: [8]": "tower_layers: [4]"}, ["single_task"]),
        ({"epochs: 1": "epochs: 2"}, ["single_task"]),
        (
            {"price, group: item, kind: dense, transform: log": "price, group: item, kind: dense"},
            ["trees", "single_task"],
        ),
        ({"val_fraction: 0.15": "val_fraction: 0.2"}, ["trees", "single_task"]),
    ],
)
def test_what_an_entry_hangs_on(change, others):
    run, text = parse_run(CLICKS), CLICKS
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    entries = {name: {"key": "k", CONFIGURATION: configuration_of(run, name)} for name in ("trees", "single_task")}
    assert of_other_runs(entries, run) == []
    assert of_other_runs(entries, parse_run(text)) == others


# ---------------------------------------------------------------- twins of every task


def twins_of_all(mtcl, place):
    """Train them, and give what the report shows of each task."""
    shown = mtcl("baselines", place, "--only", "single_task", "--device", "cpu")
    contents = read_contents(place)
    assert shown.splitlines()[-1] == f"The baselines are in {place}/baselines.json."
    for task in contents.tasks:
        assert re.search(rf"^single_task: {task}, 1 trial, ", shown, re.MULTILINE), task
    assert read_entries(place)["single_task"]["trials"] == len(contents.tasks)
    found = comparisons(contents)
    table = twins_table(qualities(contents), found)
    assert not [line for line in sharing_answer(contents, found).sentences if line.startswith("Not compared")]
    return contents.tasks, {row[0]: row[2:4] for row in table.rows}


def test_the_report_shows_the_twins_of_tasks_of_every_kind(mtcl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop.log(1200).to_parquet("log.parquet", index=False)
    text = shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256")
    (tmp_path / "run.yaml").write_text(text)
    mtcl("train", "run.yaml", "-o", "one", "--device", "cpu")
    tasks, shown = twins_of_all(mtcl, Path("one"))
    assert list(shown) == tasks == ["click", "buy", "taste", "stars"]
    assert all("–" not in both for both in shown.values())


@pytest.mark.full
def test_the_report_shows_the_twins_of_all_tasks_of_the_demo(mtcl, tmp_path, monkeypatch):
    """Of every sixth row, one epoch."""
    load = kuairand.load
    monkeypatch.setattr(kuairand, "load", lambda split: load(split)[::6])
    monkeypatch.chdir(tmp_path)
    mtcl("demo", "--out", "demo", "--epochs", 1, "--device", "cpu", "--no-twins")
    tasks, shown = twins_of_all(mtcl, Path("demo"))
    assert len(tasks) == 8
    assert list(shown) == tasks
