"""Who measured: the machine, the software, the commit and the command."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

DISTRIBUTIONS = ("mtcl_torchrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy")
# Of a processor's flags, those by which kernels are chosen.
FLAGS = ("avx2", "fma", "avx512", "avx_vnni", "amx", "f16c", "bf16", "asimd", "sve")
# Options that only say where something is kept; --data is one where it is a folder.
PLACES = ("--out", "--picture", "--folder", "--show", "--json", "--ratios")


def about(*more: str) -> dict[str, Any]:
    """The machine, the software, the moment and the command.

    Args:
        more: distributions whose version is told, too.
    """
    return {
        "machine": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in _cpuinfo("flags", "Features").split() if any(of in flag for of in FLAGS)],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: found for name in (*DISTRIBUTIONS, *more) if (found := _version(name))},
        "commit": commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_told(sys.argv[1:])]),
    }


def _told(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that only say where something is kept."""
    told: list[str] = []
    before = ""
    for word in arguments:
        place = before in PLACES or (before == "--data" and (os.sep in word or Path(word).is_dir()))
        if place and before == "--data":
            told.pop()  # of a name, such as "kuairand", it says what was measured
        if not place and word not in (*PLACES, "--again"):
            told.append(word)
        before = "" if place else word
    return told


def processor() -> str:
    """What the processor is called."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@cache
def _cpuinfo(*names: str) -> str:
    """What Linux says of the first processor under one of these names; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in names), "")


def computed() -> tuple[float, float]:
    """Seconds that all processors have computed since the machine started, and those of this process and of its
    children that are over; NaN where the system does not tell."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(of.ru_utime + of.ru_stime for of in used)
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return math.nan, own
    idle = sum(ticks[3:5])  # and waiting for a disk; the last is what other guests of the same host took
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), own


def cores_of_others(before: tuple[float, float], after: tuple[float, float], seconds: float) -> float:
    """How many cores others kept at work between two looks at `computed`.

    Example:
        >>> cores_of_others((100.0, 10.0), (118.0, 19.0), 10.0)  # 18 s in all, 9 of them ours
        0.9
    """
    return max((after[0] - before[0] - (after[1] - before[1])) / seconds, 0.0)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The last commit that changed the package or a benchmark, and a digest of what has changed since.

    Results and documents do not count: figures that are committed are still of the code that was measured.
    """
    root, code = Path(__file__).parents[1], ["mtcl_torchrec", "benchmarks/*.py", "pyproject.toml"]

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(root), *words, "--", *code], capture_output=True, check=True).stdout

    try:
        last = git("log", "-1", "--format=%h", "--abbrev=12").decode().strip()
        changed = git("diff", "HEAD")
        for name in git("ls-files", "--others", "--exclude-standard", "-z", "--full-name").split(b"\0")[:-1]:
            changed += name + (root / os.fsdecode(name)).read_bytes()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{last}-dirty-{hashlib.sha256(changed).hexdigest()[:8]}" if changed else last
