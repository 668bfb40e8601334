"""`mtcl tune` as a whole: what is searched, kept, gone on with, and written out."""

import dataclasses
import io
import json
import os
import re
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console
from typer.testing import CliRunner

from mtcl_torchrec.cli.commands import app
from mtcl_torchrec.cli.tune import _folder
from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.evaluation.compare import compare_tables
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.schema import ConfigError, DataError, Task
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import Ranks
from mtcl_torchrec.training.tuning import print_tuning, tune_run
from mtcl_torchrec.training.tuning import run as tuning_run
from mtcl_torchrec.training.tuning.noise import DRAWS, half_of_lead
from mtcl_torchrec.training.tuning.objective import Objective
from mtcl_torchrec.training.tuning.space import Space
from mtcl_torchrec.training.tuning.study import Study, about

RUN = shop.RUN.replace("epochs: 4", "epochs: 2, max_skipped_steps: 0").replace(
    "dense: {lr: 0.01}", "dense: {lr: 0.003}"
)
TRIALS = 4
SPACE = """
tuning:
  optimizers.dense.lr: {log: [1e-3, 3e-2]}
  optimizers.dense.kind: [adamw, sgd]
  optimizers.dense.clip_norm: {choices: [1.0, 5.0], when: {optimizers.dense.kind: sgd}}
  schema.features.*.embedding_dim: {times: [1, 2]}
"""
NOT_FINITE = "step 3 (epoch 1): the loss of click is not finite on rank 0; 1 such batches are more than allowed"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    shop.log(500).to_parquet(folder / "log.parquet", index=False)
    return folder


def tuned(data, name, console=None, **options):
    run = parse_run(RUN + SPACE, folder=data)
    console = console or Console(file=io.StringIO(), width=200)
    return tune_run(run, data / name, device="cpu", console=console, **{"trials": TRIALS, "pruner": "none", **options})


def numbers(result):
    return [(t.number, t.state, t.values, t.value) for t in result.trials]


@pytest.fixture(scope="module")
def found(data):
    """A search that nobody interrupts, what it said, and how often it read the data."""
    read, load, judged = [], tuning_run.load_data, []
    train, said = tuning_run.train_run, io.StringIO()

    def loading(run, where, **options):
        read.append(run)
        return load(run, where, **options)

    def training(run, folder, **options):
        if folder.name == "0002":
            raise FloatingPointError(NOT_FINITE)
        result = train(run, folder, **options)
        judged.append(set(result.evaluations))
        return result

    tuning_run.load_data, tuning_run.train_run = loading, training
    try:
        result = tuned(data, "whole", Console(file=said, width=200))
    finally:
        tuning_run.load_data, tuning_run.train_run = load, train
    return result, said.getvalue(), read, judged


def test_the_first_trial_is_the_run_as_it_is(data, found):
    result, _, _, _ = found
    assert result.own is result.trials[0]
    assert result.own.values["optimizers.dense.lr"] == 0.003
    trained, run = load_run(result.folder / "trials/0000/run.yaml"), parse_run(RUN, folder=data)
    trained.training.precision = run.training.precision  # which a run settles when it begins
    assert trained.model_copy(update={"data": run.data}) == run
    assert result.best.value >= result.own.value


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(found):
    result, said, _, _ = found
    assert [t.state for t in result.trials] == ["complete", "complete", "failed", "complete"]
    assert result.trials[2].error == NOT_FINITE
    assert f"failed: {NOT_FINITE}" in said
    assert re.search(r"best so far -?0\.\d+ \(trial \d\); 2 to go, about \d+\.\d min", said)
    assert f"1 trial failed: {NOT_FINITE}" in result.hints


def test_whether_the_best_is_better_than_chance_is_told(data, found, tmp_path):
    result, _, _, _ = found
    a, b = (result.folder / f"trials/{n:04d}" for n in (0, 3))
    objective = Objective("auc:click", (Task.binary("click"),), "auc")
    # Of one metric of one task, it is the interval that runs are compared by.
    tables = [read_predictions(folder / "predictions/val.parquet") for folder in (a, b)]
    alone = compare_tables(*tables, draws=DRAWS, only=lambda of, metric: (of, metric) == ("click", "auc"))[0]
    assert half_of_lead(a, b, objective) == pytest.approx((alone.high - alone.low) / 2, rel=1e-6)
    assert half_of_lead(a, a, objective) == 0
    assert half_of_lead(a, tmp_path, objective) is None
    # The skill of a binary task is 2 AUC - 1, so that its interval is twice as wide.
    skill = Objective("mean_skill", (Task.binary("click"),))
    assert half_of_lead(a, b, skill) == pytest.approx(alone.high - alone.low, rel=1e-6)

    def shown(**changes):
        out = io.StringIO()
        print_tuning(dataclasses.replace(result, **changes), Console(file=out, width=200))
        return out.getvalue()

    best = dataclasses.replace(result.trials[3], value=result.own.value + 0.01)
    assert "+0.0100 ± 0.0200 (half of a 95 % interval" in shown(best=best, half=0.02)
    assert "within noise, the best is not shown to be better" in shown(best=best, half=0.02)
    assert "more than noise for these two" in shown(best=best, half=0.005)
    assert "how sure that is is not known" in shown(best=best, half=None)
    # Three complete trials tell nothing of five settings.
    assert result.importances == {}
    assert "importance" not in shown(best=best)
    assert any("complete trials say little of" in hint for hint in result.hints)
    assert not any("widen" in hint for hint in result.hints)


def test_an_event_that_hardly_happens_does_not_rank_trials(tmp_path):
    frame = shop.log(1200)
    frame["hide"] = (np.random.default_rng(3).random(1200) < 0.04).astype(int)  # about 7 of 180 rows
    frame.to_parquet(tmp_path / "log.parquet", index=False)
    text = shop.RUN.replace("    - {name: taste,", "    - {name: hide, kind: binary}\n    - {name: taste,").replace(
        "epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256"
    )
    said = io.StringIO()
    result = tune_run(
        parse_run(text + "tuning:\n  optimizers.dense.lr: {choices: [0.01, 0.02]}\n", folder=tmp_path),
        tmp_path / "search", trials=2, pruner="none", device="cpu", console=Console(file=said, width=200),
    )  # fmt: skip
    for trial in result.trials:
        of = trial.metrics
        skills = [2 * of["click"]["auc"] - 1, 2 * of["buy"]["auc"] - 1, 1 - of["taste"]["ne"], of["stars"]["r2"]]
        assert trial.value == pytest.approx(np.mean(skills), abs=1e-9)
    events = round(of["hide"]["count"] * of["hide"]["base_rate"])
    assert 0 < events < 20
    assert result.best.left_out == {"hide": f"too few events ({events})"}
    out = io.StringIO()
    print_tuning(result, Console(file=out, width=200))
    line = f"without hide, too few events ({events})"
    assert (out.getvalue().count(line), said.getvalue().count(line)) == (1, 1)
    assert f"# mean_skill is {line} in validation." in result.best_yaml.read_text()
    assert json.loads((tmp_path / "search/tuning.json").read_text())["left_out"] == result.best.left_out
    if result.best is not result.own:
        assert result.half is not None  # hide alone would have made it unknown


def test_the_test_split_is_not_looked_at_and_the_data_is_read_once(found):
    _, _, read, judged = found
    assert len(read) == 1
    assert all(splits == {"val"} for splits in judged)


def test_the_best_run_is_written_and_trains_to_the_same_number(data, found):
    result, _, _, _ = found
    assert len({t.value for t in result.trials}) == TRIALS  # one of them None
    run = load_run(result.best_yaml)
    assert run.tuning is None
    head = result.best_yaml.read_text().splitlines()[0]
    assert head.startswith(f"# Found by mtcl tune: mean_skill {result.best.value:.5f} on the validation split")
    again = train_run(run, data / "again", device="cpu", console=Console(quiet=True))
    assert Objective.named("mean_skill", run).kept(again.history) == result.best.value
    assert "test" in again.evaluations
    assert "- ../log.parquet" in result.best_yaml.read_text() or "[../log.parquet]" in result.best_yaml.read_text()


def test_what_is_found_is_kept_for_others(data, found):
    result, _, _, _ = found
    told = json.loads((result.folder / "tuning.json").read_text())
    assert told["best"] == result.best.number
    assert [t["value"] for t in told["trials"]] == [t.value for t in result.trials]
    assert (result.folder / "parallel.png").stat().st_size > 10_000
    trial = result.folder / "trials/0000"
    assert {p.name for p in trial.iterdir()} >= {"run.yaml", "metrics.json"}
    assert not (trial / "checkpoints").exists()
    assert "epoch 2/2" in (result.folder / "logs/0000.txt").read_text()
    out = io.StringIO()
    print_tuning(result, Console(file=out, width=120))
    assert told["hints"] == result.hints
    for part in (f"{TRIALS} trials:", "click auc", "- 1 trial failed: step 3", f"mtcl train {result.best_yaml}"[:40]):
        assert part in out.getvalue()


def killed(folder):
    """Dies after the first epoch of the second trial; the first fails at once, which costs nothing."""
    prune, train = Study.should_prune, tuning_run.train_run

    def training(run, folder, **options):
        if folder.name == "0000":
            raise FloatingPointError(NOT_FINITE)
        return train(run, folder, **options)

    def dying(self, epoch, value):
        if self._trial.number == 1 and epoch == 1:
            prune(self, epoch, value)
            os.kill(os.getpid(), signal.SIGKILL)
        return prune(self, epoch, value)

    Study.should_prune, tuning_run.train_run = dying, training
    tuned(folder, "killed", trials=2)


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(data, found):
    whole, _, _, _ = found
    with pytest.raises(AssertionError, match="rank 0 died with exit code -9"):
        run_ranks(killed, 1, data)
    said = io.StringIO()
    result = tuned(data, "killed", Console(file=said, width=200), trials=2)
    assert "going on in" in said.getvalue()
    assert "1 trial is over" in said.getvalue()
    assert "going on after step" in (result.folder / "logs/0001.txt").read_text()
    assert result.trials[0].state == "failed"
    assert numbers(result)[1] == numbers(whole)[1]


def test_a_folder_is_of_one_search(data, found):
    result, _, _, _ = found
    run = parse_run(RUN, folder=data)
    with pytest.raises(ConfigError, match="holds a search of another run, space or objective, or one of other data"):
        tune_run(run, result.folder, trials=1, device="cpu", console=Console(quiet=True))
    with pytest.raises(FileExistsError, match="no folder of mtcl tune"):
        tune_run(run, data, trials=1, device="cpu", console=Console(quiet=True))
    late = tuned(data, "whole", trials=9, timeout=0.0)
    assert numbers(late) == numbers(result)


def test_other_data_is_another_search_and_another_folder_to_start_from_is_not(data, tmp_path, monkeypatch):
    log = shop.log(500)
    log.to_csv(tmp_path / "log.csv", index=False)
    (tmp_path / "run.yaml").write_text(RUN.replace("log.parquet", "log.csv") + SPACE)

    def told(path):
        run = load_run(path)
        return about(Space.of(run, run.tuning.space), Objective.named("mean_skill", run))

    before = told(tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    assert told("run.yaml") == before
    at = log.index[log["click"] == 0][100]  # a label in the middle: the file keeps its size
    log.loc[at, "click"] = 1
    log.to_csv(tmp_path / "log.csv", index=False)
    assert told("run.yaml") != before


def test_the_objective_of_the_yaml_is_taken_unless_another_is_named(data, tmp_path, monkeypatch):
    judged = []

    def attempted(self, proposal, reached):
        judged.append(self.objective.name)
        raise FloatingPointError(NOT_FINITE)

    monkeypatch.setattr(tuning_run._Search, "_train", attempted)
    run = parse_run(RUN + "tuning: {objective: ne:buy}", folder=data)
    for number, named in enumerate((None, "auc:click")):
        with pytest.raises(ConfigError, match="no trial came to its end: step 3"):
            tune_run(run, tmp_path / str(number), trials=1, objective=named, device="cpu", console=Console(quiet=True))
    assert judged == ["ne:buy", "auc:click"]


@pytest.mark.parametrize("damage", ["no database", "another table"])
def test_a_study_that_cannot_be_read_is_one_clear_line(data, tmp_path, damage):
    (tmp_path / "tuning.lock").touch()
    if damage == "no database":
        (tmp_path / "study.db").write_bytes(b"garbage" * 1000)
    else:
        with sqlite3.connect(tmp_path / "study.db") as base:
            base.execute("create table studies (study_id integer primary key)")
    run = parse_run(RUN + SPACE, folder=data)
    with pytest.raises(DataError, match=r"study\.db: .*; --overwrite begins anew") as refused:
        tune_run(run, tmp_path, trials=1, device="cpu", console=Console(quiet=True))
    assert "\n" not in str(refused.value)


def test_trials_that_drop_other_shares_of_ids_do_so(data, tmp_path):
    run = parse_run(RUN + "tuning:\n  training.id_dropout.user_id: {uniform: [0, 0.5]}\n", folder=data)
    space = Space.of(run, run.tuning.space)
    where = Ranks(0, 1, torch.device("cpu"))
    search = tuning_run._Search(
        tmp_path, space, Objective.named("mean_skill", run), where, "cpu", Console(file=io.StringIO())
    )
    path = "training.id_dropout.user_id"
    shares = [
        search._data_of(space.with_values({path: x}), lambda line: None).splits.train.id_dropout for x in (0.1, 0.4)
    ]
    assert shares == [{"user_id": 0.1}, {"user_id": 0.4}]


def on_ranks(folder):
    run = parse_run(RUN.replace("batch_size: 64", "batch_size: 32") + SPACE, folder=folder)
    pruned, prune = [], Study.should_prune

    def pruning(self, epoch, value):
        prune(self, epoch, value)
        pruned.append(self._trial.number == 1)
        return pruned[-1]

    Study.should_prune = pruning
    result = tune_run(
        run, folder / "ranks", trials=2, pruner="hyperband", device="cpu", console=Console(file=io.StringIO())
    )
    return numbers(result), result.best.number


def test_two_ranks_search_together(data, found):
    whole, _, _, _ = found
    here, there = run_ranks(on_ranks, 2, data)
    assert here == there
    assert [state for _, state, _, _ in here[0]] == ["complete", "pruned"]
    assert [t[2] for t in here[0]] == [t.values for t in whole.trials[:2]]


def test_a_trial_that_is_interrupted_again_and_again_is_given_up(data, monkeypatch):
    class NoMemoryError(BaseException):
        pass

    def dying(self, proposal, reached):
        raise NoMemoryError

    def stopped(self, proposal, reached):
        raise KeyboardInterrupt

    for died, error in ((stopped, KeyboardInterrupt), (dying, NoMemoryError)):
        monkeypatch.setattr(tuning_run._Search, "_train", died)
        for _ in range(3):  # what a person ends does not count
            with pytest.raises(error):
                tuned(data, "dying", trials=1)
    with pytest.raises(ConfigError, match="no trial came to its end: interrupted twice without a new epoch"):
        tuned(data, "dying", trials=1)


def test_memory_that_is_not_there_fails_a_trial(data, monkeypatch):
    def too_large(self, proposal, reached):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(tuning_run._Search, "_train", too_large)
    with pytest.raises(ConfigError, match="no trial came to its end: out of memory"):
        tuned(data, "large", trials=2)


def test_a_search_beside_its_yaml_is_gone_on_with_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _folder(tmp_path / "there/run.yaml", "shop-tuning") == Path("runs/shop-tuning")
    (tmp_path / "there/runs/shop-tuning").mkdir(parents=True)
    assert _folder(tmp_path / "there/run.yaml", "shop-tuning") == tmp_path / "there/runs/shop-tuning"
    (tmp_path / "runs/shop-tuning").mkdir(parents=True)
    assert _folder(tmp_path / "there/run.yaml", "shop-tuning") == Path("runs/shop-tuning")


def test_the_command_shows_what_would_be_searched(data):
    (data / "run.yaml").write_text(RUN)
    shown = CliRunner().invoke(app, ["tune", str(data / "run.yaml"), "--show-space"]).output
    run = parse_run(RUN + shown, folder=data)
    assert set(run.tuning.space) >= {"optimizers.dense.lr", "model.trunk.kind", "schema.tasks.buy.weight"}
    (data / "space.yaml").write_text("optimizers.dense.lrr: {log: [1e-3, 1e-1]}")
    command = ["tune", str(data / "run.yaml"), "--space", str(data / "space.yaml"), "--show-space"]
    error = CliRunner().invoke(app, command).exception
    assert "no key 'lrr' in optimizers.dense (did you mean 'lr'?)" in str(error)
