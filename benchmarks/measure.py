"""What the benchmarks share: who measured, in which order, what is kept, how it is shown.

Ratios are what these figures are for, so contenders take turns (A B A B, all once and then all again), each in a
process of its own where memory or threads would tell; medians are shown.  Every measurement is a JSON line, written at
once and never made twice, so that a run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

DISTRIBUTIONS = ("mtcl_torchrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "pyarrow", "numpy")
Line = dict[str, Any]
CONSOLE = Console(highlight=False, soft_wrap=True, width=150)


# ---------------------------------------------------------------------- who measured


def about(*more: str) -> dict[str, Any]:
    """The machine, the software, the moment and the command.

    Args:
        more: distributions whose version is told, too.
    """
    return {
        "machine": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: found for name in (*DISTRIBUTIONS, *more) if (found := _version(name))},
        "commit": _commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def processor() -> str:
    """What the processor is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_rss() -> int:
    """The most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------- in which order, and what is kept


def read(path: Path) -> list[Line]:
    """The lines of a results file; one that was cut off while it was written is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def sweep(
    out: Path,
    todo: Sequence[Line],
    repeats: int,
    measure: Callable[[Line], Line | None],
    *,
    versions: Iterable[str] = (),
) -> list[Line]:
    """Measure what is not in the file yet, all of `todo` once, then all again.

    Args:
        out: JSON lines: ``what``, ``repeat``, ``about``, and what `measure` returned.
        todo: what is measured; plain data, by which a line is known again.
        measure: one measurement; None where it failed, which is tried again another time.
        versions: see `about`.

    Returns:
        All lines of the file that are of `todo`.
    """
    done = {_key(line["what"], line["repeat"]) for line in read(out)}
    for repeat in range(repeats):
        for what in todo:
            if _key(what, repeat) in done:
                continue
            said, started = about(*versions), time.perf_counter()
            result = measure(what)
            if result is None:
                CONSOLE.print(f"FAILED: {what}", markup=False)
                continue
            took = time.perf_counter() - started
            with out.open("a") as file:
                file.write(json.dumps({"what": what, "repeat": repeat, **result, "took_s": took, "about": said}) + "\n")
    wanted = {_key(what, 0) for what in todo}
    return [line for line in read(out) if _key(line["what"], 0) in wanted]


def _key(what: Line, repeat: int) -> str:
    return json.dumps([what, repeat], sort_keys=True)


def in_process(
    script: Path, what: Line, *, timeout_s: float, threads: int | None = None, flags: Sequence[str] = ()
) -> Line | None:
    """What ``script --worker WHAT --result FILE`` wrote there, run in a process of its own; None where it failed.

    Args:
        threads: of OpenMP; None leaves it to the environment.
        flags: more options of the script.
    """
    with tempfile.TemporaryDirectory(prefix="mtcl-benchmark-") as temporary:
        result, log = Path(temporary) / "result.json", Path(temporary) / "log.txt"
        command = [sys.executable, str(script), "--worker", json.dumps(what), "--result", str(result), *flags]
        environment = dict(os.environ) if threads is None else os.environ | {"OMP_NUM_THREADS": str(threads)}
        run(command, log, timeout_s, environment)
        if not result.exists():
            CONSOLE.print(log.read_text(errors="replace")[-3000:], markup=False)
            return None
        return json.loads(result.read_text())


def run(command: Sequence[str], log: Path, timeout_s: float, environment: Mapping[str, str]) -> None:
    """Run a command; what takes longer is ended, with the time to end what it has started itself."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            CONSOLE.print(f"no result after {timeout_s:.0f} s")
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm: int = 3) -> dict[str, dict[str, float]]:
    """Each call's median milliseconds, ``wall`` and ``cpu`` (processor time of all threads, which other programs on the
    machine disturb less); they take turns, `warm` rounds that do not count, then `rounds`."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(warm + rounds):
        for name, call in calls.items():
            started, used = time.perf_counter(), time.process_time()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm:
                spent[name].append((time.perf_counter() - started, time.process_time() - used))
    return {
        name: dict(zip(("wall", "cpu"), (1000 * statistics.median(t) for t in zip(*of, strict=True)), strict=True))
        for name, of in spent.items()
    }


def median(lines: Iterable[Line], figure: str) -> float:
    """Of a figure of several lines."""
    return statistics.median(line[figure] for line in lines)


# ---------------------------------------------------------------------- how it is shown


def options(parser: argparse.ArgumentParser, *, repeats: int, timeout_s: float) -> None:
    """The options of every benchmark that keeps lines."""
    parser.add_argument("--out", type=Path, help="JSON lines, one a measurement; what is there is not done again")
    parser.add_argument("--show", type=Path, help="measure nothing, print the tables of such a file")
    parser.add_argument("--picture", type=Path, help="draw it, too (PNG)")
    parser.add_argument("--repeats", type=int, default=repeats, help="of each measurement, interleaved (%(default)s)")
    parser.add_argument("--timeout", type=float, default=timeout_s, help="seconds for one measurement (%(default)g)")
    parser.add_argument("--threads", type=int, help="of OpenMP, in every process; default: as each comes")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def carry_out(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    *,
    work: Callable[[Line], Line],
    measured: Callable[[], list[Line]],
    show: Callable[[list[Line]], None],
    draw: Callable[[list[Line], Path], None],
) -> None:
    """What such a benchmark is asked for: one measurement in a worker, or all that are missing, and their table.

    Args:
        parser, given: with `options`.
        work: measures what a worker is told.
        measured: all lines, those that were missing too.
        show, draw: tables, and a picture.
    """
    if given.worker:
        given.result.write_text(json.dumps(work(given.worker)))
        return
    if not (given.out or given.show):
        parser.error("--out FILE to measure, --show FILE to look")
    lines = read(given.show) if given.show else measured()
    show(lines)
    if given.picture:
        draw(lines, given.picture)


def said(lines: Sequence[Line]) -> str:
    """Machine, versions, commit and dates of the lines that a table shows."""
    if not lines:
        return "nothing was measured"
    abouts = [line["about"] for line in lines]
    machine = abouts[-1]
    commits = ", ".join(dict.fromkeys(str(of["commit"]) for of in abouts))
    dates = sorted(of["date"] for of in abouts)
    load = statistics.median(of["load"][0] for of in abouts)
    versions = ", ".join(f"{name} {of}" for name, of in machine["versions"].items())
    return (
        f"{machine['gpu'] or machine['machine']}, {machine['cores']} cores, {machine['capability']}; {versions}; "
        f"commit {commits}; {dates[0][:16]} to {dates[-1][:16]}; load before a measurement, median {load:.1f}"
    )


def figure(*, wide: float = 7.0, high: float = 3.6, columns: int = 1) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, in the style of all pictures here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, columns, figsize=(wide, high), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return drawn, axes[0]


def save(drawn: Any, path: Path) -> None:
    """Write a picture and let go of it."""
    from matplotlib import pyplot

    drawn.savefig(path, dpi=130)
    pyplot.close(drawn)
    CONSOLE.print(f"wrote {path}")
