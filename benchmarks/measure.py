"""What the benchmarks share: in which order things are measured, what is kept, how it is shown.

Ratios are what these figures are for, so contenders take turns (A B A B, all once and then all again), each in a
process of its own where memory or threads would tell; medians are shown.  Every measurement is a JSON line, written at
once and never made twice at one commit, so that a run that was broken off goes on where it stopped.  What the lines say
together is a document beside them; see `document.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from document import CONSOLE, Line, Table, disturbed, median, said, written
from lines import appended, kept_alone, key, latest, read, wrong_file
from pictures import figure, save
from who import about, commit, computed, cores_of_others

from mtcl_torchrec.training.memory import peak_memory as peak_rss

__all__ = [
    "CONSOLE", "Line", "about", "alternate", "appended", "benchmark", "commit", "counted", "counts", "figure",
    "from_zero", "in_process", "latest", "median", "options", "peak_rss", "read", "run", "said", "save", "shown",
    "sweep",
]  # fmt: skip
PATIENCE_S = 10.0  # with what was interrupted


# ---------------------------------------------------------------------- in which order, and what is kept


def sweep(
    out: Path,
    todo: Sequence[Line],
    repeats: int,
    measure: Callable[[Line], Line | None],
    *,
    versions: Iterable[str] = (),
    again: bool = False,
) -> list[Line]:
    """Measure what the file does not have of this commit, all of `todo` once, then all again.

    Args:
        out: JSON lines: ``what``, ``repeat``, ``about``, and what `measure` returned.
        todo: what is measured; plain data, by which a line is known again.
        measure: one measurement; None where it failed, which is tried again another time.
        versions: see `about`.
        again: measure also what is there.

    Returns:
        The lines of this commit that are of `todo`.
    """
    started = datetime.now().astimezone().isoformat(timespec="seconds")

    done = {key(line["what"], line["repeat"]) for line in kept(out, todo, repeats, since=started if again else "")}
    out.parent.mkdir(parents=True, exist_ok=True)
    for repeat in range(repeats):
        for what in todo:
            if key(what, repeat) in done:
                continue
            who, before, begun = about(*versions), computed(), time.perf_counter()
            result = measure(what)
            if result is None:
                CONSOLE.print(f"FAILED: {what}", markup=False)
                continue
            took = time.perf_counter() - begun
            others = cores_of_others(before, computed(), took)
            if not math.isnan(others):
                who["cores_of_others"] = others
            appended(out, {"what": what, "repeat": repeat, **result, "took_s": took, "about": who})
    return kept(out, todo, repeats, since=started if again else "")


def kept(out: Path, todo: Sequence[Line], repeats: int, *, since: str = "") -> list[Line]:
    """The lines of this commit that a file has of `todo`, of each repeat the newest.

    Args:
        since: older ones are left out.
    """
    wanted = {key(what, repeat) for what in todo for repeat in range(repeats)}
    return latest(
        line for line in read(out)
        if {"what", "repeat", "about"} <= line.keys() and key(line["what"], line["repeat"]) in wanted
        and line["about"]["commit"] == commit() and line["about"]["date"] >= since
    )  # fmt: skip


def in_process(
    script: Path,
    what: Line,
    *,
    timeout_s: float,
    threads: int | None = None,
    flags: Sequence[str] = (),
    ranks: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Line | None:
    """What ``script --worker WHAT --result FILE`` wrote there, run in a process of its own; None where it failed.

    Args:
        threads: of OpenMP; None leaves it to the environment.
        flags: more options of the script.
        ranks: start so many processes by torchrun, of which the first writes; None starts one without it.
        environment: variables added to those there are.
    """
    with tempfile.TemporaryDirectory(prefix="mtcl-benchmark-") as temporary:
        result, log = Path(temporary) / "result.json", Path(temporary) / "log.txt"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        command = [sys.executable, *torchrun, str(script), "--worker", json.dumps(what), "--result", str(result)]
        command += flags
        told = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        run(command, log, timeout_s, os.environ | told | dict(environment or {}))
        if not result.exists():
            CONSOLE.print(log.read_text(errors="replace")[-3000:], markup=False)
            return None
        return json.loads(result.read_text())


def run(command: Sequence[str], log: Path, timeout_s: float, environment: Mapping[str, str]) -> None:
    """Run a command; what takes longer is ended, with the time to end what it has started itself.

    It also ends where this process is told to.  Ctrl-C reaches it, too: it may write what it has before it is ended.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            CONSOLE.print(f"no result after {timeout_s:.0f} s")
        except KeyboardInterrupt:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            raise
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            signal.signal(signal.SIGTERM, before)


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


# ---------------------------------------------------------------------- how it is shown


def counted(text: str) -> int:
    """A whole number of at least 1, as an option's type.

    Example:
        >>> counted("100_000")
        100000
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def from_zero(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text.strip() == "0" else counted(text)


def counts(text: str) -> list[int]:
    """Such numbers, with commas between them."""
    return [counted(part) for part in text.split(",")]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def options(parser: argparse.ArgumentParser, *, repeats: int, timeout_s: float) -> None:
    """The options of every benchmark that keeps lines."""
    parser.add_argument("--out", type=Path, help="JSON lines, one a measurement; what is there of this commit is not "
                        "done again; beside it, .json has the figures and tables, .png the picture")  # fmt: skip
    parser.add_argument("--show", type=Path, help="measure nothing, print the tables of such a file")
    parser.add_argument("--picture", type=Path, help="draw it there (PNG; default: beside --out)")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--repeats", type=counted, default=repeats, help="of each measurement, in turn (%(default)s)")
    parser.add_argument("--timeout", type=_seconds, default=timeout_s, help="seconds for one measurement (%(default)g)")
    parser.add_argument("--threads", type=counted, help="of OpenMP, in every process; default: as each comes")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def benchmark(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    *,
    work: Callable[[Line], Line | None],
    todo: Callable[[], Sequence[Line]],
    tables: Callable[[list[Line]], list[Table]],
    draw: Callable[[list[Line], Path], None],
    one: Callable[[Line], Line | None] | None = None,
    flags: Sequence[str] = (),
    versions: Sequence[str] = (),
) -> int:
    """What a benchmark is asked for: one measurement in a worker, or all that are missing, their tables and picture.

    Args:
        parser, given: with `options`.
        work: measures what a worker is told; None where another rank tells.
        todo: all that is to be measured, in the order in which contenders take turns.
        tables, draw: of lines.
        one: makes one measurement; the default starts the script as a worker, with `flags`.
        versions: see `about`.

    Returns:
        What a process ends with: 1 where a measurement has failed, 130 after Ctrl-C, else 0.  What was measured until
        then is shown and kept.
    """
    if given.worker:
        if (found := work(given.worker)) is not None:
            given.result.write_text(json.dumps(found))
        return 0
    if not (given.out or given.show):
        parser.error("--out FILE to measure, --show FILE to look")
    script = Path(sys.argv[0]).resolve()

    def started(what: Line) -> Line | None:
        return in_process(script, what, timeout_s=given.timeout, threads=given.threads, flags=flags)

    for option, path in (("--out", given.out), ("--show", given.show)):
        if path and (why := wrong_file(path, Path(sys.argv[0]).name)):
            parser.error(f"{option} {path} {why}")
    picture = given.picture or (given.out.with_suffix(".png") if given.out else None)
    document = given.out.with_suffix(".json") if given.out else None
    if given.picture and given.picture in (given.out, given.show, document):
        parser.error(f"--picture {given.picture} would replace the measurements")
    complete: bool | None = None  # of lines that are only looked at nobody knows whether some are missing
    if given.show:
        if not given.show.is_file():
            parser.error(f"--show {given.show}: there is no such file")
        lines, status = latest(read(given.show)), 0
    else:
        try:
            wanted = todo()
            with kept_alone(given.out):  # tried before hours are spent
                lines, broken_off = _swept(given, wanted, one or started, versions)
        except OSError as error:
            parser.error(f"{error.filename or given.out}: {error.strerror or error}")
        except KeyboardInterrupt:
            CONSOLE.print("broken off before anything was measured")
            return 130
        complete = len(lines) == given.repeats * len(wanted)
        status = 130 if broken_off else int(not complete)
        if broken_off:
            CONSOLE.print(f"broken off: {len(lines)} of {given.repeats * len(wanted)} measurements are in {given.out}; "
                          "the same command goes on there", markup=False)  # fmt: skip
    try:
        shown(lines, tables, draw, picture=picture, document=document, complete=complete)
    except OSError as error:
        raise SystemExit(
            f"{error.filename or document}: {error.strerror or error}; measurements are kept, "
            f"--show {given.show or given.out} makes the rest of them"
        ) from None
    return status


def _swept(
    given: argparse.Namespace, wanted: Sequence[Line], one: Callable[[Line], Line | None], versions: Sequence[str]
) -> tuple[list[Line], bool]:
    """The lines that there are afterwards, and whether it was broken off."""
    try:
        return sweep(given.out, wanted, given.repeats, one, versions=versions, again=given.again), False
    except KeyboardInterrupt:
        return kept(given.out, wanted, given.repeats), True


def shown(
    lines: list[Line],
    tables: Callable[[list[Line]], list[Table]],
    draw: Callable[[list[Line], Path], None],
    *,
    picture: Path | None,
    document: Path | None = None,
    complete: bool | None = True,
    markdown: bool = False,
) -> None:
    """Print the tables of lines and who measured them, draw them, and write the document; the last two where asked for.

    Where there are no lines, what an earlier run has drawn and written stays.

    Args:
        markdown: print that instead.
    """
    made = tables(lines) if lines else []
    for table in made:
        if markdown:
            print(f"{table.markdown()}\n")
        else:
            table.print()
    if not markdown:
        CONSOLE.print(said(lines))
        if warning := disturbed(lines):
            CONSOLE.print(warning, markup=False)
    if picture and lines:
        draw(lines, picture)
    if document and lines:
        written(document, lines, made, complete=complete, picture=picture)
