"""What a step frees is there for the next one, without asking the kernel again."""

import os
import subprocess
import sys

import pytest

from mtcl_torchrec.training import memory

# As a step does: tensors of some MB, all let go of at its end.
FAULTS = """
import resource, sys, torch
from mtcl_torchrec.training.memory import keep_freed_memory
torch.set_num_threads(1)
done = keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    return [torch.ones(2_000_000) for _ in range(10)] and None
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(done, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


def faults(keep, **environment):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", FAULTS, keep], env=plain | environment, capture_output=True, text=True)
    told, count = done.stdout.split()
    return told, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_kept():
    _, by_default = faults("leave")
    told, kept = faults("keep")
    assert told == "True"
    assert kept < 30  # of 80 MB: 20,000 pages of 4 KB, or 40 of 2 MB where the kernel has them at hand
    assert kept <= by_default  # which glibc may keep as well, by what it has seen so far


def test_what_the_environment_says_stays():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"


STARTS_ANOTHER = """
import subprocess, sys
large = bytearray(b"x" * 300_000_000)
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
PEAK = """
from mtcl_torchrec.training.memory import peak_memory
before = peak_memory()
gone = bytearray(b"x" * 100_000_000)
del gone
print(before, peak_memory())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others tell no better than ru_maxrss")
def test_the_peak_is_of_this_process_alone_and_not_of_who_started_it():
    done = subprocess.run([sys.executable, "-c", STARTS_ANOTHER, PEAK], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    assert 5_000_000 < before < 200_000_000  # no torch, and not the 300 MB of the program that started it
    assert 100_000_000 < peak < before + 250_000_000


def test_where_linux_does_not_tell_the_peak_it_is_that_of_the_accounts(monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert 5_000_000 < memory.peak_memory() < 100_000_000_000
