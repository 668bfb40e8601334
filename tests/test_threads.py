"""How many threads a run takes, and how they wait for each other."""

import os
import subprocess
import sys

import pytest

from mtcl_torchrec.training.sharding import _calm_threads

# Without FBGEMM, importing the package ends before it takes its time.
ASK = """
import os, sys
sys.modules["fbgemm_gpu"] = None
try:
    import mtcl_torchrec
except ImportError:
    print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(("policy", "ranks", "threads"), [("PASSIVE", 1, 8), ("passive", 2, 4), ("ACTIVE", 1, 4),
                                                          (None, 2, 2), ("PASSIVE", 20, 1)])  # fmt: skip
def test_threads_that_spin_while_they_wait_leave_half_of_the_cores(policy, ranks, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert _calm_threads() == threads


@pytest.mark.parametrize(("loaded", "policy", "found"), [(False, None, "PASSIVE"), (True, None, "None"),
                                                         (False, "ACTIVE", "ACTIVE")])  # fmt: skip
def test_threads_are_asked_to_sleep_before_torch_is_loaded(loaded, policy, found):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if policy is None else {"OMP_WAIT_POLICY": policy}
    before = "import sys; sys.modules['torch'] = sys" if loaded else ""
    done = subprocess.run([sys.executable, "-c", before + ASK], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [found], done.stderr
