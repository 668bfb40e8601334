"""`mtcl baselines` as a person uses it: files, tables, what is done is not done again; mistakes are one line."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import shop

from mtcl_torchrec.baselines import BASELINES, Budget, run_baselines
from mtcl_torchrec.baselines import run as baselines_run
from mtcl_torchrec.baselines.entries import ABOUT, NETWORKS, is_tuned
from mtcl_torchrec.baselines.networks import _with_settings, is_unweighted, unweighted
from mtcl_torchrec.baselines.progress import Doing
from mtcl_torchrec.baselines.search import Found
from mtcl_torchrec.baselines.store import load_part, save_part
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.files import files_fingerprint
from mtcl_torchrec.evaluation.metrics import auc
from mtcl_torchrec.evaluation.predictions_file import read_predictions, write_predictions
from mtcl_torchrec.evaluation.thresholds import best_threshold
from mtcl_torchrec.report.baseline_tables import baseline_tables
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import locked

# One epoch in large batches, two tasks in a chain and a number: networks take a second or two.
SMALL = (
    shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256")
    .replace("mask: click, weight: 0.5}", "after: click, weight: 0.5}")
    .replace("    - {name: taste, kind: multiclass, label: genre, item_class: genre, mask: click, "
             "inputs: [user, context]}\n", "")
    .replace("taste: 0.5, ", "")
    .replace("expert_layers: [16]", "expert_layers: [8]")
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    shop.log(1500).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def mtcl(command, monkeypatch, tmp_path):
    """Runs the command in an empty folder and gives (exit status, what it printed, what it said on stderr)."""
    monkeypatch.chdir(tmp_path)
    return command


def test_every_baseline_from_the_command_line(mtcl, folder, monkeypatch):
    monkeypatch.setattr("mtcl_torchrec.cli.baselines._TELL_EVERY", 0.0)
    status, shown, error = mtcl("baselines", "run.yaml", "--trials", 1, "--device", "cpu", "-o", "out")
    assert status == 0
    # Each trial says that it begins, and from the second of a baseline on, what the baseline will probably take.
    left = r"(; \w+ takes (\d+ s|\d+ min \d+ s) more, if trials go on as before)?"
    told = [
        re.fullmatch(rf"mtcl: (\w+) \((\d) of 8\): [\w ]+, trial 1 of 1{left}", line) for line in error.splitlines()
    ]
    assert list(dict.fromkeys((line[1], line[2]) for line in told)) == [
        (name, str(place)) for place, name in enumerate(BASELINES, 1)
    ]
    assert all((line[3] is None) == (line[1] not in {before[1] for before in told[:i]}) for i, line in enumerate(told))
    entries = json.loads((folder / "out" / "baselines.json").read_text())
    assert list(entries) == list(BASELINES)
    for name, entry in entries.items():
        assert entry["seconds"] > 0
        assert entry["rows"] == 1050
        tables = {split: read_predictions(folder / f"out/baselines/{name}/predictions/{split}.parquet")
                  for split in ("val", "test")}  # fmt: skip
        for split, table in tables.items():
            # The file and the metrics are of the same predictions, the labels those of the run.
            of_chain = shop.log(1500)["buy"].iloc[{"val": slice(1050, 1275), "test": slice(1275, 1500)}[split]]
            assert np.array_equal(table.labels("buy"), of_chain)
            for task, metrics in entry["metrics"][split]["tasks"].items():
                if table.task(task).kind == "binary":
                    assert auc(table.labels(task), table.predicted(task)) == pytest.approx(metrics["auc"], abs=1e-5)
            fused = entry["metrics"][split]["ranking"]["fused"]
            assert {"value@5", "value@5 half", "rate@10 buy", "ndcg@5 click", "mrr click"} <= set(fused)
            assert "f1" in entry["metrics"][split]["tasks"]["click"]
            assert auc(table.labels("click"), table.score) == pytest.approx(fused["auc click"], abs=1e-5)
        assert tables["val"].thresholds == tables["test"].thresholds
        assert set(tables["test"].thresholds) == {"click", "buy"}
        assert tables["test"].users is not None
        assert not (folder / "out/baselines" / name / "parts").exists()
        assert not list((folder / "out/baselines" / name).glob("network-*"))
    # What has the features knows more than what has not.
    quality = {name: entry["metrics"]["test"]["tasks"]["click"]["auc"] for name, entry in entries.items()}
    assert (
        min(quality["trees"], quality["logistic_regression"]) > max(quality["popularity"], quality["item_knn"]) + 0.05
    )
    assert entries["single_task"]["trials"] == 3
    assert entries["unweighted"]["trials"] == 1
    assert set(entries["unweighted"]["metrics"]["test"]["tasks"]) == {"click", "buy", "stars"}
    assert "in the fused score, stars enters as the mean of the training rows" in entries["als"]["notes"]
    assert re.search(r"rate@5\s", shown)
    # The table: the best of each column has the star, and only that.
    rows = {line.split()[0]: line.split()[1:] for line in shown.split("split: quality")[1].splitlines()[3:11]}
    assert set(rows) == set(BASELINES)
    for i, task in enumerate(("click", "buy")):
        column = {name: cells[i] for name, cells in rows.items()}
        starred = [name for name, cell in column.items() if cell.endswith("*")]
        values = {name: float(cell.rstrip("*")) for name, cell in column.items()}
        assert max(values, key=values.get) in starred, task
        assert {values[name] for name in starred} == {max(values.values())}


def test_what_is_done_is_not_done_again(mtcl, folder, monkeypatch):
    arguments = ("baselines", "run.yaml", "--only", "popularity,logistic_regression", "--trials", 2)
    assert mtcl(*arguments)[0] == 0
    where = folder / "runs" / "shop-baselines"
    before = json.loads((where / "baselines.json").read_text())
    loaded = []
    load = baselines_run.load_data
    monkeypatch.setattr(baselines_run, "load_data", lambda *a, **k: loaded.append(1) or load(*a, **k))
    status, shown, _ = mtcl(*arguments)
    assert (status, loaded) == (0, [])
    assert shown.count("done before") == 2
    assert json.loads((where / "baselines.json").read_text()) == before
    status, shown, _ = mtcl("baselines", "run.yaml", "--list")
    assert re.search(r"popularity +3 +[\d.]+ +what an item usually gets", shown)
    assert re.search(r"trees +– +– +gradient-boosted, ", shown)
    # Networks hang on all of the run, the others on its data: another trunk leaves them done, other rows do not.
    (folder / "run.yaml").write_text(SMALL.replace("num_experts: 3", "num_experts: 2"))
    assert mtcl(*arguments)[1].count("done before") == 2
    shop.log(1500, seed=1).to_parquet(folder / "log.parquet", index=False)
    assert "done before" not in mtcl(*arguments)[1]
    assert ": done before" not in mtcl(*arguments[:-1], 3)[1]
    assert len(loaded) == 2


LEARNT = "kind: stacking, weights: {click: 2, buy: 1, stars: 1}, train: {reward: {click: 1, buy: 3}}"


def test_a_score_that_baselines_cannot_rank_by_is_said_to_be_another(mtcl, folder):
    text = SMALL.replace("weights: {click: 1, buy: 3, stars: 0.5}", LEARNT)
    (folder / "run.yaml").write_text(text)
    assert mtcl("train", "run.yaml", "--out", "runs/one", "--device", "cpu")[0] == 0
    arguments = ("baselines", "runs/one", "--only", "popularity", "--trials", 1)
    of_words = re.compile(
        r"^the run's fused score \(stacking\) learns along with the model: baselines rank by the weighted mean of its "
        r"weights instead$",
        re.M,
    )
    for _ in range(2):  # also where all was done before
        status, shown, _ = mtcl(*arguments)
        assert status == 0
        assert of_words.search(shown.split("split: quality")[1])
    table = read_predictions(folder / "runs/one/baselines/popularity/predictions/test.parquet")
    stars = table.part("stars")
    mean = (2 * table.predicted("click") + table.predicted("buy") + stars) / 4
    np.testing.assert_allclose(table.score, mean, atol=1e-5)
    kept = json.loads((folder / "runs/one/baselines.json").read_text())["popularity"]["ranked_by_instead"]
    (note,) = (t.note for t in baseline_tables(read_contents(folder / "runs/one"), {}, []))
    assert note == kept[0].upper() + kept[1:] + "."
    # Of one that was ranked before that was said, too.
    path = folder / "runs/one/baselines.json"
    entries = json.loads(path.read_text())
    del entries["popularity"]["ranked_by_instead"]
    entries["popularity"]["judged_by"] = "before"
    path.write_text(json.dumps(entries))
    assert of_words.search(mtcl(*arguments)[1].split("split: quality")[1])
    # By a score that they can rank by, nothing is said.
    assert mtcl("fuse", "runs/one", "--value", "click=1,buy=3", "--combiner", "weighted_mean", "--search", "none",
                "--session-minutes", 0, "--target", "value@2", "--folds", 2)[0] == 0  # fmt: skip
    assert "weighted mean of its weights" not in mtcl(*arguments)[1]
    assert [t.note for t in baseline_tables(read_contents(folder / "runs/one"), {}, [])] == [""]


def test_more_trials_are_those_that_were_not_done(folder, monkeypatch):
    names, called = ["logistic_regression", "unweighted"], []
    for name in names:
        usual = BASELINES[name]

        def fit(job, tasks, settings, fit=usual.fit):
            called.append((tasks[0].name, str(settings)))
            return fit(job, tasks, settings)

        monkeypatch.setitem(BASELINES, name, dataclasses.replace(usual, fit=fit))
    run, lines = parse_run(SMALL, folder=folder), list[str]()

    def go(trials, out="out", **options):
        called.clear()
        budget = Budget(trials, network_trials=trials - 1)
        options = {"only": names, "device": "cpu", "say": lines.append} | options
        return run_baselines(run, folder / out, budget=budget, **options)

    first = go(2)
    assert len(called) == 2 * 3 + 1
    lines.clear()
    more = go(3)
    assert len(called) == len(set(called)) == 3 + 1  # one for each task; of a network for all, one
    assert any(
        line.startswith("logistic_regression: goes on after 6 trials done before, which took ") for line in lines
    )
    done = list(called)
    whole = go(3, "whole")
    assert set(done) < set(called)
    for name in names:
        assert more[name]["settings"] == whole[name]["settings"]
        assert (
            more[name]["trials"] == whole[name]["trials"] == first[name]["trials"] + (1 if name == "unweighted" else 3)
        )
        found, expected = (of[name]["metrics"]["test"]["tasks"]["click"]["auc"] for of in (more, whole))
        assert found == pytest.approx(expected, abs=1e-6)
        earlier = first[name]["searched"]
        assert all(more[name]["searched"][title][: len(of)] == of for title, of in earlier.items())
    go(3)
    assert called == []
    # Fewer trials, another seed, or predictions of another search beside the entry: nothing of it counts.
    only = {"only": ["logistic_regression"]}
    go(2, **only)
    assert len(called) == 6
    go(3, seed=1, **only)
    assert len(called) == 9
    place = folder / "out/baselines/logistic_regression/predictions"
    table = read_predictions(place / "val.parquet")
    write_predictions(place / "val.parquet", dataclasses.replace(table, frame=table.frame.assign(**{"p.click": 0.5})))
    go(4, seed=1, **only)
    assert len(called) == 4 + 1 + 1  # of click all, of the others one more


def test_after_an_interruption_the_search_goes_on_with_the_next_trial(folder, monkeypatch):
    run = parse_run(SMALL, folder=folder)
    usual, called = BASELINES["logistic_regression"], []

    lines, told = list[str](), list[Doing]()

    def fit(job, tasks, settings, until=99):
        if len(called) == until:
            raise KeyboardInterrupt
        called.append(tasks[0].name)
        return usual.fit(job, tasks, settings)

    def go(**changes):
        monkeypatch.setitem(BASELINES, "logistic_regression", dataclasses.replace(usual, **changes))
        options = {"budget": Budget(2), "say": lines.append, "progress": told.append}
        return run_baselines(run, folder / "out", only=["logistic_regression"], **options)

    with pytest.raises(KeyboardInterrupt):
        go(fit=lambda *a: fit(*a, until=3))
    assert called == ["buy", "buy", "click"]  # buy counts most in the fused score, and is done
    assert not (folder / "out" / "baselines.json").exists()
    entry = go(fit=fit)["logistic_regression"]
    assert called[3:] == ["click", "stars", "stars"]
    assert entry["trials"] == 6
    assert any(
        re.fullmatch(r"logistic_regression: goes on after 3 trials done before, which took \d+ s", line)
        for line in lines
    )
    assert [(doing.title, doing.trial, doing.done) for doing in told[-3:]] == [
        ("click", 2, 3), ("stars", 1, 4), ("stars", 2, 5),
    ]  # fmt: skip
    assert all(doing.total == 6 and doing.seconds >= 0 for doing in told[-3:])
    again = run_baselines(run, folder / "again", only=["logistic_regression"], budget=Budget(2), say=lambda line: None)
    assert again["logistic_regression"]["metrics"] == entry["metrics"]


def test_an_interrupted_search_goes_on_after_the_weights_of_the_score_have_changed(folder, monkeypatch):
    """The tasks are then searched for in another order."""
    usual = BASELINES["logistic_regression"]
    runs = [parse_run(SMALL.replace("click: 1, buy: 3", weights), folder=folder) for weights in
            ("click: 1, buy: 3", "click: 3, buy: 1")]  # fmt: skip
    assert runs[0].fusion.weights != runs[1].fusion.weights

    def fit(job, tasks, settings):
        if tasks[0].name == "click":
            raise KeyboardInterrupt
        return usual.fit(job, tasks, settings)

    def go(run, out, **changes):
        monkeypatch.setitem(BASELINES, "logistic_regression", dataclasses.replace(usual, **changes))
        return run_baselines(run, folder / out, only=["logistic_regression"], budget=Budget(2), say=lambda line: None)[
            "logistic_regression"
        ]

    with pytest.raises(KeyboardInterrupt):
        go(runs[0], "out", fit=fit)
    gone_on, at_once = go(runs[1], "out"), go(runs[1], "again")
    assert set(gone_on["settings"]) == {"click", "buy", "stars"}
    assert gone_on["settings"] == at_once["settings"]
    assert gone_on["metrics"] == at_once["metrics"]


def test_a_label_that_changes_in_the_middle_of_a_file_is_seen(tmp_path):
    log = shop.log(4000)
    log.to_csv(tmp_path / "log.csv", index=False)
    run = parse_run(SMALL.replace("log.parquet", "log.csv"), folder=tmp_path)
    before, size = files_fingerprint(run), (tmp_path / "log.csv").stat().st_size
    assert files_fingerprint(run) == before
    assert size > 3 * 65_536
    log.loc[log.index[log["click"] == 0][1000], "click"] = 1
    log.to_csv(tmp_path / "log.csv", index=False)
    assert (tmp_path / "log.csv").stat().st_size == size
    assert files_fingerprint(run) != before


def test_a_baseline_whose_predictions_are_damaged_or_gone_is_made_anew(folder):
    run = parse_run(SMALL, folder=folder)

    def go():
        lines = list[str]()
        entries = run_baselines(run, folder / "out", only=["popularity"], budget=Budget(1), say=lines.append)
        return entries["popularity"]["metrics"], any("done before" in line for line in lines)

    first, path = go(), folder / "out/baselines/popularity/predictions/test.parquet"
    whole = path.read_bytes()
    assert go() == (first[0], True)
    for damage in (lambda: path.write_bytes(whole[:100]), path.unlink):
        damage()
        assert go() == (first[0], False)
        assert read_predictions(path).predicted_names


def test_damaged_parts_are_made_anew_and_two_processes_do_not_mix(folder):
    run = parse_run(SMALL, folder=folder)
    part = folder / "out/baselines/popularity/parts/0.npz"
    save_part(part, "key", Found({"smoothing": 1.0}, 0.6, {"val": {"click": np.ones(3)}}, []))
    assert load_part(part, "key").settings == {"smoothing": 1.0}
    assert load_part(part, "another key") is None
    whole = part.read_bytes()
    for damaged in (b"", whole[:-30], b"no archive"):
        part.write_bytes(damaged)
        assert load_part(part, "key") is None
    with (
        locked(folder / "out" / "baselines", "mtcl baselines"),
        pytest.raises(ConfigError, match="another mtcl baselines is at work in"),
    ):
        run_baselines(run, folder / "out", only=["popularity"], budget=Budget(1), say=lambda line: None)
    entry = run_baselines(run, folder / "out", only=["popularity"], budget=Budget(1), say=lambda line: None)
    assert entry["popularity"]["trials"] == 3


def test_thresholds_are_chosen_as_the_run_says(folder):
    found = {}
    for rule in ("f1", "accuracy"):
        text = SMALL + f"evaluation: {{threshold: {rule}, values: {{click: 2}}}}\n"
        run = parse_run(text, folder=folder)
        run_baselines(run, folder / "out", only=["popularity"], budget=Budget(1), say=lambda line: None)
        table = read_predictions(folder / "out/baselines/popularity/predictions/val.parquet")
        found[rule] = table.thresholds["click"]
        assert table.values == {"click": 2}
        assert found[rule] == best_threshold(table.labels("click"), table.predicted("click"), rule)
    assert found["f1"] != found["accuracy"]


def test_the_seconds_are_shared_among_the_tasks(folder):
    run = parse_run(SMALL, folder=folder)
    entry = run_baselines(run, folder / "out", only=["popularity"], budget=Budget(5, 1e-9), say=lambda line: None)
    assert entry["popularity"]["trials"] == 3  # the first of each task always runs
    assert entry["popularity"]["budget"] == {"trials": 5, "seconds": 1e-9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "popularty"), r"no baseline 'popularty' \(did you mean 'popularity'\?\); there are popularity, "),
        (("--only", "als"), r"als: needs schema.user, the column that names the user; leave it out of --only"),
        (("nowhere.yaml",), r"no such file: nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(mtcl, folder, arguments, message):
    (folder / "run.yaml").write_text(SMALL.replace("  user: user_id\n", ""))
    given = arguments if arguments[0].endswith(".yaml") else ("run.yaml", *arguments)
    status, _, error = mtcl("baselines", *given)
    assert status == 2
    assert re.fullmatch(f"mtcl: {message}.*\n", error)


def test_without_implicit_the_extra_is_named(mtcl, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "implicit.bpr", None)
    status, _, error = mtcl("baselines", "run.yaml", "--only", "bpr", "--trials", 1)
    assert status == 2
    assert "pip install 'mtcl_torchrec[baselines]'" in error
    assert error.count("\n") == 1


def test_what_cannot_be_run_says_so(folder, monkeypatch):
    run = parse_run(SMALL, folder=folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        run_baselines(run, folder / "out")
    monkeypatch.delenv("WORLD_SIZE")
    (folder / "out").mkdir()
    (folder / "out" / "baselines.json").write_text("[1]")
    with pytest.raises(DataError, match=r"baselines.json: cannot be read .*remove it"):
        run_baselines(run, folder / "out", only=["popularity"])
    (folder / "out" / "baselines.json").write_text('{"trees": {"trials": 3}}')
    with pytest.raises(DataError, match=r"baselines.json: cannot be read \(trees has no seconds\)"):
        run_baselines(run, folder / "out", only=["popularity"])
    only_stars = SMALL
    for part in ("{name: click, kind: binary}", "{name: buy, kind: binary, after: click, weight: 0.5}"):
        only_stars = only_stars.replace(f"    - {part}\n", "")
    only_stars = only_stars.replace("click: 1, buy: 3, ", "")
    numbers = parse_run(only_stars, folder=folder)
    with pytest.raises(
        ConfigError, match="als: predicts events only, and 'stars' is a regression task; leave it out of --only"
    ):
        run_baselines(numbers, folder / "other", only=["als"], say=lambda line: None)


def test_beside_a_run_its_own_figures_stand_in_the_table_and_all_rank_by_its_score_of_now(mtcl, folder, monkeypatch):
    asked = ("--only", "popularity,als", "--trials", 1)
    shown = mtcl("baselines", "run.yaml", *asked)[1]
    assert "runs/ holds no finished run of run.yaml as it stands: the baselines stand alone in runs/shop-base" in shown
    assert "this run" not in shown.split("What the search cost")[0]
    assert mtcl("train", "run.yaml", "-o", "runs/one", "--device", "cpu")[0] == 0
    status, shown, _ = mtcl("baselines", "run.yaml", *asked)
    assert status == 0
    place = folder / "runs/one"
    assert "run.yaml is the run in runs/one: the baselines are set beside it" in shown
    of_run = json.loads((place / "metrics.json").read_text())["evaluations"]["test"]["tasks"]["click"]["auc"]
    assert re.search(rf"this run +{of_run:.4f}", shown)
    assert "* is the best of its column" in shown
    assert "± is half of a 95 % interval, paired over users" in shown
    assert "– als: predicts events only, and 'stars' is a regression task" in shown
    assert re.search(r"Who is ahead, beyond chance.*\n  (this run is ahead of|no difference|click|buy|stars)", shown)
    table = read_predictions(place / "baselines/popularity/predictions/test.parquet")
    own = read_predictions(place / "predictions/test.parquet")
    labels = own.labels("click")
    apart = auc(labels, table.predicted("click")) - auc(labels, own.predicted("click"))
    assert f"{apart:+.4f} ± " in shown.split("split: quality")[1].split("AUC within")[0]

    # The run ranks by another score: nothing is trained again, and nothing stale is left, whatever is asked for.
    for name in ("popularity", "als"):
        monkeypatch.setitem(BASELINES, name, dataclasses.replace(BASELINES[name], fit=None))
    before = json.loads((place / "baselines.json").read_text())
    status, shown, _ = mtcl("fuse", "runs/one", "--set", "click=1,buy=0,stars=0")
    assert status == 0
    assert "baselines that rank by it now, too, without training: popularity, als" in shown
    table = read_predictions(place / "baselines/popularity/predictions/test.parquet")
    np.testing.assert_allclose(table.score, table.predicted("click"), atol=1e-6)
    after = json.loads((place / "baselines.json").read_text())
    for name, entry in after.items():
        same = {key: value for key, value in entry.items() if key not in ("metrics", "judged_by", "notes")}
        assert same == {key: before[name][key] for key in same}
        tasks = entry["metrics"]["test"]["tasks"]
        assert tasks == before[name]["metrics"]["test"]["tasks"]
        assert entry["metrics"]["test"]["ranking"]["fused"]["auc click"] == pytest.approx(tasks["click"]["auc"])
    # So too by `mtcl baselines` alone, after the score was set by another hand.
    text = (place / "fusion/fusion.yaml").read_text()
    (place / "fusion/fusion.yaml").write_text(text.replace("click: 1.0", "click: 0.0").replace("buy: 0.0", "buy: 1.0"))
    status, shown, _ = mtcl("baselines", "runs/one", "--only", "popularity", "--trials", 1)
    assert status == 0
    assert "without training: popularity, als" in shown
    table = read_predictions(place / "baselines/als/predictions/val.parquet")
    np.testing.assert_allclose(table.score, table.predicted("buy"), atol=1e-6)
    assert "without training" not in mtcl("baselines", "runs/one", "--only", "als", "--trials", 1)[1]


def test_another_configuration_or_other_files_are_another_run(folder):
    from mtcl_torchrec.baselines.beside import run_directory_of

    run = parse_run(SMALL, folder=folder)
    assert run_directory_of(run, folder / "runs") is None
    for name, text in (("one", SMALL), ("two", SMALL.replace("epochs: 1", "epochs: 2")), ("damaged", "schema: [")):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "run.yaml").write_text(text.replace("log: log", "log: ../../log"))
    assert run_directory_of(run, folder / "runs") is None  # none has finished
    for name in ("one", "two", "damaged"):
        (folder / "runs" / name / "metrics.json").write_text("{}")
    assert run_directory_of(run, folder / "runs") == folder / "runs/one"
    shop.log(1500, seed=1).to_parquet(folder / "runs/log.parquet", index=False)
    (folder / "runs/one/run.yaml").write_text(SMALL.replace("log: log", "log: ../log"))
    assert run_directory_of(run, folder / "runs") is None


def test_a_network_has_trials_of_its_own(mtcl, folder):
    arguments = ("baselines", "run.yaml", "--only", "unweighted,popularity", "-o", "out", "--device", "cpu")
    status, shown, _ = mtcl(*arguments, "--trials", 3, "--network-trials", 2)
    assert status == 0
    assert "unweighted: all tasks, 2 trials, " in shown
    entry = json.loads((folder / "out/baselines.json").read_text())["unweighted"]
    assert (entry["trials"], entry["budget"]["trials"]) == (2, 2)
    assert entry["searched"]["all tasks"][0]["settings"] == {
        "tables_lr": 1.0, "dense_lr": 1.0, "weight_decay": 0.0, "l2_embedding": 0.0,
    }  # fmt: skip
    # More trials of the others leave it as it is.
    shown = mtcl(*arguments, "--trials", 2, "--network-trials", 2)[1]
    assert "unweighted: done before" in shown
    assert "popularity: done before" not in shown


@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        ("regression", "{name: stars, kind: regression}, {name: again, kind: regression, label: stars, weight: 0.5}"),
        ("multiclass", "{name: genre, kind: multiclass, item_class: genre, inputs: [user]}"),
    ],
)
def test_without_events_what_predicts_events_is_skipped_and_the_others_go_on(mtcl, folder, kind, tasks):
    before, after = SMALL.split("  tasks:")[0], SMALL.split("statistics:")[1].split("fusion:")[0]
    (folder / "run.yaml").write_text(f"{before}  tasks: [{tasks}]\nstatistics:{after}")
    name = "stars" if kind == "regression" else "genre"
    arguments = ("baselines", "run.yaml", "--trials", 1, "-o", "out", "--device", "cpu")
    status, shown, error = mtcl(*arguments)
    assert status == 0, error
    for left in ("item_knn", "als", "bpr"):
        assert f"{left}: skipped: predicts events only, and '{name}' is a {kind} task\n" in shown
    entries = json.loads((folder / "out/baselines.json").read_text())
    quality = {of: entry["metrics"]["test"]["tasks"][name] for of, entry in entries.items()}
    if kind == "regression":
        assert list(entries) == ["popularity", "logistic_regression", "trees", "single_task", "unweighted"]
        assert quality["trees"]["r2"] > quality["popularity"]["r2"] + 0.2
    else:
        assert list(entries) == ["popularity", "logistic_regression", "trees"]
        assert quality["trees"]["ne"] < quality["popularity"]["ne"]
        assert f"single_task: skipped: would be the run itself, which trains '{name}' alone\n" in shown
        assert "unweighted: skipped: would be the run itself, whose tasks weigh the same" in shown
    assert mtcl(*arguments)[1].count("done before") == len(entries)
    for asked in ("als", *(["unweighted"] if kind == "multiclass" else [])):
        status, _, error = mtcl("baselines", "run.yaml", "--only", asked, "-o", "out")
        assert status == 2
        assert error.count("\n") == 1
        assert error.endswith("; leave it out of --only\n")


def test_where_training_has_no_task_with_both_classes_what_there_is_goes_on(folder):
    log = shop.log(1500)
    log["click"] = 1
    log["buy"] = np.where(np.arange(1500) < 1100, 0, log["buy"])
    log.to_parquet(folder / "log.parquet", index=False)
    run, lines = parse_run(SMALL, folder=folder), list[str]()
    entries = run_baselines(run, folder / "out", budget=Budget(1), say=lines.append, device="cpu")
    assert set(entries) == {"popularity", "logistic_regression", "trees", "single_task", "unweighted"}
    assert set(entries["trees"]["metrics"]["val"]["tasks"]) == {"stars"}
    why = "skipped: all training labels of 'click' are the same, or missing"
    assert [line for line in lines if "skipped" in line] == [f"{name}: {why}" for name in ("item_knn", "als", "bpr")]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ([], False),
        ([(", weight: 0.5", ""), (", weight: 0.2", "")], True),
        (
            [(", weight: 0.5", ""), (", weight: 0.2", ""), ("model:", "balance: {surgery: {kind: measure}}\nmodel:")],
            True,
        ),
        (
            [(", weight: 0.5", ""), (", weight: 0.2", ""), ("model:", "balance: {surgery: {kind: cagrad}}\nmodel:")],
            False,
        ),
        (
            [(", weight: 0.5", ""), (", weight: 0.2", ""), ("model:", "balance: {weighting: {kind: famo}}\nmodel:")],
            False,
        ),
        ([(", weight: 0.5", ""), (", weight: 0.2", ""), ("patience: 0", "patience: 0, task_patience: 1")], False),
        ([(", weight: 0.5", ", weight: 0"), (", weight: 0.2", "")], True),
    ],
)
def test_unweighted_is_skipped_where_it_would_be_the_run_itself(change, same):
    text = SMALL
    for before, after in change:
        assert before in text
        text = text.replace(before, after)
    run = parse_run(text)
    assert is_unweighted(run) == same
    assert (BASELINES["unweighted"].why_not_in(run) != "") == same
    if same:  # it is trained with what the run is trained with
        plain = unweighted(run)
        assert plain.data_schema == run.data_schema
        assert (plain.training, plain.model, plain.optimizers) == (run.training, run.model, run.optimizers)


def test_networks_are_said_to_be_tuned_as_they_were(mtcl, folder):
    best = folder / "runs/shop-tuning/best.yaml"
    best.parent.mkdir(parents=True)
    best.write_text("# Found by mtcl tune\n" + SMALL.replace("log: log", "log: ../../log"))
    arguments = (
        "baselines",
        "run.yaml",
        "--only",
        "popularity,unweighted",
        "--trials",
        2,
        "-o",
        "out",
        "--device",
        "cpu",
    )
    told = "the run is the best of 7 trials of mtcl tune (runs/shop-tuning); single_task and unweighted have "

    def tuned():
        entries = json.loads((folder / "out/baselines.json").read_text())
        assert is_tuned(entries["popularity"])
        assert entries["popularity"]["tuned"] == "it has nothing to tune"
        return entries["unweighted"]["tuned"], is_tuned(entries["unweighted"])

    shown = mtcl(*arguments)[1]
    assert "mtcl tune" not in shown
    assert re.search(r"unweighted: all tasks, 1 trial, .* on val \(not tuned: the run's own settings\)\n", shown)
    assert tuned() == ("not tuned: the run's own settings", False)
    (best.parent / "tuning.json").write_text(json.dumps({"trials": [{}] * 7}))
    shown = mtcl(*arguments)[1]
    assert told + "1 trial, the run's own settings: --network-trials 7 gives them as many\n" in shown
    shown = mtcl(*arguments, "--network-trials", 2)[1]
    assert told + "2 trials: --network-trials 7" in shown
    assert tuned() == ("the best of 2 trials", True)
    assert re.search(r"unweighted +2 +[\d.]+ +1,050 +the best of 2 trials", shown.split("What the search cost")[1])
    assert "mtcl tune" not in mtcl(*arguments[:3], "popularity", *arguments[4:])[1]
    (folder / "run.yaml").write_text(SMALL.replace("epochs: 1", "epochs: 2"))  # it is not that of the search any more
    assert "mtcl tune" not in mtcl(*arguments)[1]


def test_the_trials_of_a_network_are_of_penalties_too(folder):
    text = SMALL.replace("patience: 0}", "patience: 0, regularisers: {l2_embedding: {user_id: 0.1}}}")
    run = parse_run(text.replace("{lr: 0.01}", "{lr: 0.01, weight_decay: 0.02}"), folder=folder)
    entry = run_baselines(run, folder / "out", only=["unweighted"], budget=Budget(network_trials=3), device="cpu",
                          say=lambda line: None)["unweighted"]  # fmt: skip
    first, *others = (trial["settings"] for trial in entry["searched"]["all tasks"])
    assert first == {"tables_lr": 1.0, "dense_lr": 1.0, "weight_decay": 0.02, "l2_embedding_times": 1.0}
    assert len({trial["quality"] for trial in entry["searched"]["all tasks"]}) == 3
    for setting in others:
        assert 0.002 <= setting["weight_decay"] <= 0.2
        assert 0.1 <= setting["l2_embedding_times"] <= 10
        changed = _with_settings(run, setting)
        assert changed.optimizers.dense.weight_decay == setting["weight_decay"]
        assert changed.training.regularisers.l2_embedding == {
            "user_id": pytest.approx(0.1 * setting["l2_embedding_times"])
        }
    assert run.optimizers.dense.weight_decay == 0.02
    plain = _with_settings(parse_run(SMALL), {**first, "l2_embedding": 0.3})
    assert plain.training.regularisers.l2_embedding == 0.3


def test_which_baselines_there_are_is_told(mtcl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    status, shown, _ = mtcl("baselines", "--list")
    assert status == 0
    assert list(ABOUT) == list(BASELINES)
    assert [name for name, baseline in BASELINES.items() if baseline.network] == list(NETWORKS)
    heading, _, *lines = shown.splitlines()
    assert heading.strip() == "Baselines"
    assert [line.split()[0] for line in lines] == list(ABOUT)
    assert all(line.rstrip().endswith(about) for line, about in zip(lines, ABOUT.values(), strict=True))
    status, _, error = mtcl("baselines")
    assert (status, error) == (
        2, "mtcl: which run is it to be compared with?  mtcl baselines run.yaml, or mtcl baselines RUN_DIR\n",
    )  # fmt: skip
