"""All benchmarks of a CPU, one after the other: what `make bench` runs.

    python benchmarks/suite.py                       # less than 15 minutes on two idle cores
    python benchmarks/suite.py --full                # larger sizes and more repeats, hours
    python benchmarks/suite.py --only peers memory
    python benchmarks/suite.py --list                # what would be run, and how long it takes

Each script is a process of its own with a time limit.  What it has measured stands in benchmarks/results/ as soon as it
is measured; a script that fails, or takes too long, loses nothing of the others.  What has been measured at this
commit, in this size, is not measured again, unless --again says so; a suite that was broken off goes on where it
stopped.  Afterwards the tables of benchmarks/README.md are filled.  The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from measure import CONSOLE, commit, run

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A script of the suite.

    Args:
        script: its name; that of its results, too.
        quick, full, tiny: its options in each size; `tiny` proves that it runs, and says nothing of speed.
        minutes, full_minutes: how long it takes on two idle cores, about; the time limit is four times as long.
    """

    script: str
    quick: str
    full: str
    tiny: str
    minutes: float
    full_minutes: float


SUITE = (
    Entry("peers", "--case small middle --repeats 1", "--case all --repeats 3",
          "--case small --rows 3000 --table-rows 50 --contenders ours pytorch --repeats 1", 5.7, 50),
    Entry("scaling", "--ranks 1 2 4 --kind weak --vocabulary 100_000 --steps 10 --repeats 1",
          "--ranks 1 2 4 --repeats 3",
          "--ranks 1 2 --kind weak --vocabulary 300 --batch-size 32 --steps 2 --warmup-steps 1 --apart-steps 1 "
          "--repeats 1", 1.0, 20),
    Entry("scaling_paper", "--world-size 8 64 1024 --planning-s 20", "--planning-s 60",
          "--world-size 8 --planning-s 1", 0.8, 10),
    Entry("input", "--rows 600_000 --training --repeats 1", "--training --repeats 3",
          "--rows 3000 --files 2x1 --ways pyarrow batches --batch-size 256 --repeats 1", 1.7, 15),
    Entry("serving", "--tables int8 --times 60 --repeats 1", "--repeats 3",
          "--train-rows 3000 --tables fp32 --compiled no --candidates 20 --times 5 --repeats 1", 1.8, 12),
    Entry("load", "--clients 1,4 --seconds 4", "--repeats 3",
          "--train-rows 3000 --clients 1 --seconds 1 --candidates 20", 0.5, 4),
    Entry("memory", "--rows 1_000_000 4_000_000 --repeats 1",
          "--rows 1_000_000 10_000_000 100_000_000 --repeats 1 --timeout 7200",
          "--rows 2000 4000 --vocabulary 200 --window 1000 --batch-size 256 --repeats 1", 0.5, 25),
    Entry("sequences", "--repeats 1", "--repeats 3", "--encoders mean --rows 16 --rounds 1 --repeats 1", 0.6, 3),
    Entry("experts", "--rows 4096 --sizes 4x256 64x32 --eager --repeats 1", "--rows 512 4096 --repeats 3",
          "--rows 16 --sizes 2x8 --rounds 1 --eager --repeats 1", 0.5, 25),
    Entry("surgery_cost", "--steps 10 --cases upgrad/trunk,upgrad/embeddings,upgrad/tables", "--steps 40 --repeats 3",
          "--steps 2 --warmup-steps 1 --batch-size 32 --rows 50 --features 3 --cases upgrad/trunk", 0.5, 10),
    Entry("training", "--ranks 1,2 --vocabulary 100_000 --steps 20", "--ranks 1,2 --repeats 3 "
          "--vocabulary 100_000,1_000_000,30_000_000",
          "--ranks 1 --vocabulary 300 --batch-size 32 --steps 2 --warmup-steps 1 --apart-steps 1", 0.7, 25),
)  # fmt: skip
SIZES = ("quick", "full", "tiny")


def minutes(entry: Entry, size: str) -> float:
    """How long it takes, about."""
    return {"quick": entry.minutes, "full": entry.full_minutes, "tiny": 1.0}[size]


def measured(entry: Entry, size: str, results: Path) -> bool:
    """Whether all of it has been measured at this commit in this size."""
    path = results / f"{entry.script}.json"
    if not path.exists():
        return False
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        of, complete = document["about"] or {}, document["complete"]
    except (json.JSONDecodeError, KeyError, TypeError):  # cut off, or another file
        return False
    wanted = " ".join(getattr(entry, size).split())
    return complete and of.get("commit") == commit() and f" {wanted} " in f" {of.get('command', '')} "


def carried_out(entry: Entry, size: str, results: Path, *, again: bool, data: Path | None, limit: float = 4.0) -> bool:
    """Run one script; whether it ended well.

    Args:
        data: folder of what scripts write to measure on; None is their own.
        limit: it may take so many times as long as it should, and ten minutes more.
    """
    out, log = results / f"{entry.script}.jsonl", results / f"{entry.script}.log"
    command = [sys.executable, str(HERE / f"{entry.script}.py"), *getattr(entry, size).split(), "--out", str(out)]
    command += ["--again"] if again else []
    if data and entry.script in ("peers", "input", "serving", "load"):
        command += ["--data", str(data / ("serving" if entry.script == "load" else entry.script))]
    before = _written(results, entry)
    run(command, log, 60 * (limit * minutes(entry, size) + 10), dict(os.environ))
    document = results / f"{entry.script}.json"
    done = _written(results, entry) != before and json.loads(document.read_text(encoding="utf-8"))["complete"]
    said = log.read_text(errors="replace")
    CONSOLE.print(said if done else said[-3000:], markup=False)
    if done:
        log.unlink()
    return done


def _written(results: Path, entry: Entry) -> float:
    path = results / f"{entry.script}.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def main() -> int:
    """Run what is missing; 1 where something has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="larger sizes, more repeats")
    parser.add_argument("--only", nargs="+", choices=[entry.script for entry in SUITE], metavar="NAME")
    parser.add_argument("--again", action="store_true", help="measure also what was measured at this commit")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="(%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of what is measured on; default: as each script has it")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes that only prove that the scripts run; needs --results"
    )
    given = parser.parse_args()
    given.results, own = given.results.resolve(), (HERE / "results").resolve()  # the same folder by another name, too
    if given.tiny and given.results == own:
        parser.error("--tiny needs --results FOLDER: its figures say nothing, and are not to be kept with the others")
    size = "tiny" if given.tiny else "full" if given.full else "quick"
    wanted = [entry for entry in SUITE if not given.only or entry.script in given.only]
    todo = [entry for entry in wanted if given.again or not measured(entry, size, given.results)]
    for entry in wanted:
        state = f"{minutes(entry, size):g} min" if entry in todo else "measured at this commit"
        CONSOLE.print(f"{entry.script:14} {state:24} {getattr(entry, size)}", markup=False)
    CONSOLE.print(f"about {sum(minutes(entry, size) for entry in todo):.0f} min on two idle cores")
    if given.list:
        return 0
    try:
        given.results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=given.results).close()  # before hours are spent
    except OSError as error:
        parser.error(f"--results {given.results}: {error.strerror or error}")
    failed, started, planned, status = [], time.monotonic(), 0.0, 0
    for i, entry in enumerate(todo):
        took = (time.monotonic() - started) / 60
        pace = min(max(took / planned, 0.5), 5.0) if planned else 1.0  # of this machine, by what is done
        left = pace * sum(minutes(of, size) for of in todo[i:])
        CONSOLE.print(f"[{i + 1} of {len(todo)}] {entry.script}; {took:.0f} min so far, about {left:.0f} min left",
                      markup=False)  # fmt: skip
        try:
            done = carried_out(entry, size, given.results, again=given.again, data=given.data)
        except OSError as error:  # no space left, say
            CONSOLE.print(f"{error.filename or given.results}: {error.strerror or error}", markup=False)
            done = False
        except KeyboardInterrupt:
            failed += [of.script for of in todo[i:]]
            CONSOLE.print("broken off; what was measured is kept")
            status = 130
            break
        if not done:
            failed.append(entry.script)
            CONSOLE.print(f"FAILED: {entry.script}; see {given.results / entry.script}.log", markup=False)
        planned += minutes(entry, size)
    if given.results == own:
        subprocess.run([sys.executable, str(HERE / "tables.py")], check=False)
    CONSOLE.print(f"{len(todo) - len(failed)} of {len(todo)} done in {(time.monotonic() - started) / 60:.0f} min"
                  + (f"; {'not done' if status else 'failed'}: {', '.join(failed)}; run it again to go on"
                     if failed else ""))  # fmt: skip
    return status or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
