"""How many threads a process's kernels have, and that nobody but the training opens a team of them."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from mtcl_torchrec.config import TrainingMetricsConfig
from mtcl_torchrec.openmp import SPINS, calm_threads, lone_workers, wait_briefly
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.rec_metrics import TrainingMetrics
from mtcl_torchrec.training.sharding import ranks

# Prints the process's threads: before a pool of two, and after a kernel on each of its threads that is large enough to
# be cut; and how many threads the caller has by then.
TEAMS = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from mtcl_torchrec.openmp import lone_workers
count = lambda: len(os.listdir("/proc/self/task"))
large = lambda _: torch.ones(1_000_000).add_(1).sum().item()
torch.set_num_threads(3)
large(0)
before = count()
pool = lone_workers(2, "reading") if sys.argv[1] == "lone" else ThreadPoolExecutor(2)
import threading
met = threading.Barrier(2)
list(pool.map(lambda _: (met.wait(), large(0), met.wait()), range(2)))
print(count() - before, torch.get_num_threads(), *pool.map(lambda _: torch.get_num_threads(), range(1)))
"""


@pytest.mark.parametrize(("kind", "told"), [("lone", "2 3 1"), ("plain", "6 3 3")])
def test_kernels_on_lone_workers_open_no_team(kind, told):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TEAMS, kind], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stdout.split() == told.split()


def test_lone_workers_do_as_any_pool():
    with lone_workers(3, "adding") as pool:
        assert sorted(pool.map(lambda x: x + 1, range(20))) == list(range(1, 21))


def test_a_process_takes_all_cores_where_its_threads_do_not_spin_for_long(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert calm_threads() == 4
    wait_briefly()
    assert os.environ.pop("GOMP_SPINCOUNT") == str(SPINS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert calm_threads() == 8
    wait_briefly()  # what the environment says stays
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert calm_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert calm_threads() == 1


def test_the_command_waits_briefly():
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    script = "import os, sys; from mtcl_torchrec.cli import main; sys.argv = ['mtcl', '--version']\n"
    script += "try: main()\nexcept SystemExit: print(os.environ['GOMP_SPINCOUNT'])"
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split()[-1] == str(SPINS)


def test_metrics_of_one_rank_ask_nobody(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a collective on one rank")

    with ranks("cpu") as where:
        config = TrainingMetricsConfig(kinds=["auc", "calibration", "ne"])
        metrics = TrainingMetrics([Task.binary("click")], config, where, batch_size=4)
        metrics.add({"click": torch.tensor([-1.0, 1.0, 5.0, 0.0])}, torch.tensor([[0.0], [1.0], [1.0], [1.0]]),
                    torch.zeros(()))  # fmt: skip
        for name in ("all_gather", "all_reduce", "all_gather_object", "all_gather_into_tensor", "barrier"):
            monkeypatch.setattr(dist, name, refused)
        found = metrics.read()["click"]
        monkeypatch.undo()
    assert (found["count"], found["auc"]) == (4, 1)
