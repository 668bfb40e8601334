"""Real processes, really killed (`kill -9`): what `mtcl baselines` and `mtcl fuse` leave, and how it goes on."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import shop
from rich.console import Console

from mtcl_torchrec.baselines import BASELINES, Budget, read_entries, run_baselines
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.rejudging import is_judged_by_its_fusion
from mtcl_torchrec.training.run import train_run

HERE = Path(__file__).parent
NAME, TRIALS = "logistic_regression", 6


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}


def test_baselines_that_are_killed_go_on_after_their_last_trial(tmp_path, monkeypatch):
    shop.log(4000).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(shop.RUN)
    command = [sys.executable, "-m", "mtcl_torchrec", "baselines", "run.yaml", "--only", NAME, "--trials", str(TRIALS)]
    process = subprocess.Popen(
        [*command, "-o", "out"], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts, until = tmp_path / "out/baselines" / NAME / "parts", time.monotonic() + 120
    while len(list(parts.glob("*.npz"))) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)  # the second task has begun
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out/baselines.json").exists()
    done = 0
    for path in parts.glob("*.npz"):
        with np.load(path) as stored:  # whole, whenever that was
            done += len(json.loads(str(stored["about"]))["trials"])
    assert done > TRIALS

    usual, fitted, lines = BASELINES[NAME], [], []
    monkeypatch.setitem(
        BASELINES, NAME, dataclasses.replace(usual, fit=lambda *a: fitted.append(a) or usual.fit(*a))
    )  # fmt: skip
    run, options = parse_run(shop.RUN, folder=tmp_path), {"only": [NAME], "budget": Budget(TRIALS)}
    entry = run_baselines(run, tmp_path / "out", **options, say=lines.append)[NAME]
    assert len(fitted) == 4 * TRIALS - done
    assert any(line.startswith(f"{NAME}: goes on after {done} trials done before") for line in lines)
    assert not parts.exists()
    whole = run_baselines(run, tmp_path / "whole", **options, say=lambda line: None)[NAME]
    assert entry["metrics"] == whole["metrics"]
    assert entry["settings"] == whole["settings"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    shop.log(1200).to_parquet(folder / "log.parquet", index=False)
    text = shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256")
    run = parse_run(text, folder=folder)
    train_run(run, folder / "run", device="cpu", console=Console(quiet=True))
    run_baselines(run, folder / "run", only=["popularity"], budget=Budget(1), say=lambda line: None)
    return folder / "run"


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.full)])
def test_fuse_that_is_killed_at_any_step_leaves_the_old_score_or_the_new_one(trained, fuse, stride):
    place = trained.parent / f"lives-{stride}"
    place.mkdir()
    shutil.copy(trained.parent / "log.parquet", place)  # where the runs there look for it
    old, new = "click=9,buy=1,taste=0,stars=0", "click=1,buy=9,taste=0,stars=0"
    assert fuse(trained, "--set", old)[0] == 0
    lives = subprocess.run(
        [sys.executable, str(HERE / "mortal_fuse.py"), str(trained), str(place), new, str(stride)], env=environment(),
        capture_output=True, text=True, timeout=500, check=True,
    )  # fmt: skip
    ends = [line.rsplit(" ", 1) for line in lives.stdout.splitlines()]
    assert [int(end) for _, end in ends[:-1]] == [-9] * (len(ends) - 1)
    assert int(ends[-1][1]) == 0, lives.stderr
    assert len(ends) > 20 // stride
    found = []
    for folder in (Path(folder) for folder, _ in ends):
        weights = FinishedRun.load(folder).fusion.weights
        found.append((weights["click"], weights["buy"]))
        for split in ("val", "test"):
            table = read_predictions(folder / f"predictions/{split}.parquet")
            share = {(9, 1): 0.9, (1, 9): 0.1}[found[-1]]
            score = share * table.predicted("click") + (1 - share) * table.predicted("buy")
            if is_judged_by_its_fusion(folder):  # else that is told, and --rejudge mends it
                np.testing.assert_allclose(table.score, score, atol=1e-5)
        assert set(read_entries(folder)) == {"popularity"}
        assert len(read_predictions(folder / "baselines/popularity/predictions/test.parquet")) == len(table)
    assert set(found) == {(9, 1), (1, 9)}
    turned = found.index((1, 9))
    assert found == [(9, 1)] * turned + [(1, 9)] * (len(found) - turned)  # once new, it stays
    for folder, _ in (ends[turned - 1], ends[turned], ends[-2]):  # it is done again, and then whole
        assert fuse(folder, "--set", new)[0] == 0
        assert is_judged_by_its_fusion(Path(folder))
        table = read_predictions(Path(folder) / "baselines/popularity/predictions/test.parquet")
        np.testing.assert_allclose(
            table.score, 0.1 * table.predicted("click") + 0.9 * table.predicted("buy"), atol=1e-5
        )  # fmt: skip
