"""Ctrl-C in real processes that search: one line, exit status 130, and what was done is kept and gone on with."""

import json
import sys
import time

import numpy as np
import pytest
import shop
from test_startup import RUN, begun, stopped

NAME, TRIALS = "logistic_regression", 6
EPOCHS = 15
TUNED = (
    RUN.replace("epochs: 500", f"epochs: {EPOCHS}")
    + """
tuning:
  optimizers.dense.lr: {log: [1e-3, 3e-2]}
"""
)


def mtcl(*arguments):
    return [sys.executable, "-m", "mtcl_torchrec", *map(str, arguments)]


def interrupted_when(ready, command, folder):
    """What a process said that got Ctrl-C as soon as it was ready: its last line, after it ended with 130."""
    process, until = begun(command, folder), time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    status, out, error = stopped(process)
    assert status == 130, (out, error)
    assert "Traceback" not in error
    return [line for line in error.splitlines() if line.startswith("mtcl: stopped")]


def whole(command, folder):
    process = begun(command, folder)
    out, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    return out


@pytest.mark.full
def test_ctrl_c_while_baselines_are_tuned_and_the_same_command_goes_on(tmp_path):
    shop.log(4000).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(shop.RUN)
    command = mtcl("baselines", "run.yaml", "--only", NAME, "--trials", TRIALS, "-o", "out")
    parts = tmp_path / "out/baselines" / NAME / "parts"
    said = interrupted_when(lambda: len(list(parts.glob("*.npz"))) >= 2, command, tmp_path)  # the second task has begun
    assert said == ["mtcl: stopped; what is done is kept in out, the same command goes on"]
    assert not (tmp_path / "out/baselines.json").exists()
    kept, tasks = {}, ("click", "buy", "taste", "stars")  # parts are numbered as tasks are
    for path in parts.glob("*.npz"):
        with np.load(path) as stored:
            kept[tasks[int(path.stem)]] = json.loads(str(stored["about"]))["trials"]
    done = sum(map(len, kept.values()))
    assert TRIALS < done < 4 * TRIALS
    assert f"{NAME}: goes on after {done} trials done before" in whole(command, tmp_path)
    searched = json.loads((tmp_path / "out/baselines.json").read_text())[NAME]["searched"]
    assert {task: len(trials) for task, trials in searched.items()} == dict.fromkeys(tasks, TRIALS)
    assert {task: searched[task][: len(before)] for task, before in kept.items()} == kept  # seconds and all


@pytest.mark.full
def test_ctrl_c_while_settings_are_searched_and_the_same_command_goes_on(tmp_path):
    shop.log(500).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(TUNED)
    command = mtcl("tune", "run.yaml", "--trials", 2, "--pruner", "none", "--device", "cpu", "-o", "out")
    second = tmp_path / "out/trials/0001"
    said = interrupted_when(lambda: list(second.glob("checkpoints/step_*/state.json")), command, tmp_path)
    assert said == ["mtcl: stopped; what was tried is kept in out, the same command goes on"]
    logs = [(tmp_path / f"out/logs/{number:04d}.txt").read_text() for number in range(2)]
    assert f"epoch {EPOCHS}/{EPOCHS}" in logs[0]
    assert f"epoch {EPOCHS}/{EPOCHS}" not in logs[1]
    assert "going on in out: 1 trial is over" in whole(command, tmp_path)
    after = [(tmp_path / f"out/logs/{number:04d}.txt").read_text() for number in range(2)]
    assert after[0] == logs[0]  # the first was not run again
    assert after[1].startswith(logs[1])
    further = [line for line in after[1][len(logs[1]) :].splitlines() if line.startswith("epoch ")]
    epochs = [int(line.removeprefix("epoch ").split("/")[0]) for line in further]
    assert epochs[0] > 1  # the second went on after its newest checkpoint
    assert epochs == list(range(epochs[0], EPOCHS + 1))
    assert (tmp_path / "out/best.yaml").is_file()
