"""Ranks that die: the job goes on under torchrun and ends as if nothing had happened."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.config import load_run
from mtcl_torchrec.training.checkpoint.reader import read_tensors, saved_tensors
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint, read_about
from mtcl_torchrec.training.run import train_run

HERE = Path(__file__).parent

# The fused score learns, too, and what it learns moves the rest.
FUSION = (
    "fusion: {kind: stacking, train: {reward: {click: 1, buy: 3}, missing: zero, heads: through}}\ncalibration: platt"
)
RUN = shop.RUN.replace("epochs: 4", "epochs: 2, averaging: 0.9, checkpoint: {every_steps: 4, keep: 2}").replace(
    "fusion: {weights: {click: 1, buy: 3, taste: 0.5, stars: 0.5}}", FUSION
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mortal")
    shop.log(900).to_parquet(folder / "log.parquet", index=False)
    (folder / "run.yaml").write_text(RUN)
    return folder


def torchrun(*arguments, folder, kills=0, seed=0):
    """What two ranks under torchrun say; they may be started again and again."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MORTAL_KILLS": str(kills), "MORTAL_SEED": str(seed),
        "MORTAL_LOG": str(folder / "deaths.txt"),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        f"--max-restarts={kills}", "--monitor-interval=0.1", str(HERE / "mortal.py"), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(data):
    run_ranks(trained, 2, data / "run.yaml", data / "undisturbed")
    return data / "undisturbed"


def trained(run_yaml, folder):
    train_run(load_run(run_yaml), folder, device="cpu", console=Console(quiet=True))


def state_of(folder):
    newest = newest_checkpoint(folder / "checkpoints")
    tensors = {n: torch.zeros(s, dtype=torch.uint8 if n.startswith("random.") else torch.float32)
               for n, s in saved_tensors(newest).items()}  # fmt: skip
    tensors = {n: t for n, t in tensors.items() if not n.startswith("random.")}
    read_tensors(tensors, newest, alone=True)
    about = read_about(newest)
    for of_clock in ("seconds", "samples_per_second", "first_step", "waiting"):
        about["history"].pop(of_clock)
    return tensors, about


def assert_same_result(folder, expected_folder):
    (tensors, about), (expected, expected_about) = state_of(folder), state_of(expected_folder)
    assert {k: about[k] for k in ("step", "position", "history", "rows")} == {
        k: expected_about[k] for k in ("step", "position", "history", "rows")
    }
    assert set(tensors) == set(expected)
    assert any("fused_score.weights" in name for name in tensors)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    metrics, expected_metrics = (json.loads((f / "metrics.json").read_text()) for f in (folder, expected_folder))
    assert metrics["evaluations"] == expected_metrics["evaluations"]
    assert len(expected) > 20


def kill(times, seed, data, tmp_path, undisturbed, *out, run="run.yaml"):
    said = torchrun("train", data / run, *out, folder=tmp_path, kills=times, seed=seed)
    deaths = (tmp_path / "deaths.txt").read_text().splitlines()
    assert len(deaths) == times
    assert "going on after step" in said
    assert "2 ranks on cpu" in said
    folder = next(p for p in tmp_path.rglob(".mtcl-run")).parent
    assert len(list(tmp_path.rglob(".mtcl-run"))) == 1
    assert not list(folder.rglob("*.writing"))
    assert_same_result(folder, undisturbed)
    return deaths


def test_a_job_whose_rank_is_killed_ends_as_if_nothing_had_happened(data, tmp_path, undisturbed):
    """Also without --out: the ranks that are started again find the folder of their job."""
    (death,) = kill(
        1, 20, data, tmp_path, undisturbed
    )  # at step 11: the checkpoint of step 8 waited for that of step 4
    assert "training" in death


@pytest.mark.full
def test_a_job_whose_ranks_are_killed_twice_ends_so_too(data, tmp_path, undisturbed):
    deaths = kill(2, 14, data, tmp_path, undisturbed)
    assert "training" in deaths[0]
    assert "writing" in deaths[1]


@pytest.mark.full
def test_twenty_deaths_while_training_and_while_writing(data, tmp_path):
    (data / "long.yaml").write_text(RUN.replace("epochs: 2", "epochs: 12"))  # each life comes some steps further
    torchrun("train", data / "long.yaml", "--out", data / "long", folder=data)
    out = ("--out", tmp_path / "run")
    deaths = kill(20, 20, data, tmp_path, data / "long", *out, run="long.yaml")
    assert sum("writing" in death for death in deaths) >= 3
    assert sum("training" in death for death in deaths) >= 3
    assert {death.split("rank ")[1][0] for death in deaths} == {"0", "1"}


@pytest.mark.full
def test_the_agent_of_another_host_restarts_its_ranks_into_the_same_run(data, tmp_path, undisturbed):
    """Two agents stand for two hosts.  The one whose rank did not die restarts it without counting a restart."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MORTAL_KILLS": "1", "MORTAL_SEED": "5",
        "MORTAL_LOG": str(tmp_path / "deaths.txt"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
        "--monitor-interval=0.1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=mortal",
        str(HERE / "mortal.py"), "train", str(data / "run.yaml"), "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    agents = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for agent, (_, error) in [(agent, agent.communicate(timeout=300)) for agent in agents]:
        assert agent.returncode == 0, error[-3000:]
    assert (tmp_path / "deaths.txt").read_text()
    assert_same_result(tmp_path / "run", undisturbed)
