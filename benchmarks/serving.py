"""How fast a run is served: one user's candidates ranked, eager and exported, with tables of several precisions.

    python benchmarks/serving.py --out results/serving.jsonl                     # trains a run on the demo's data first
    python benchmarks/serving.py runs/kuairand --tables fp32 int8 --compiled no --candidates 500 --out serving.jsonl

`eager` is the trained model as it is; `graph` an export, run by torch; `compiled` the same as machine code (where the
machine has a C++ compiler); of each kind of tables one export.  "times as fast" is candidates/s of one user over those
of `eager`, repeat by repeat.  `model MB` is the network with its tables: its numbers, or what the export has of it;
`file MB` the whole export with graph, machine code, vocabularies, statistics and catalogue.  `differs by` tells how far
the export's predictions are from the eager ones at most.

Each way of serving is asked the same: one user at a time, each with a draw of candidates and a context of their own;
one user with the whole catalogue; 16 users together.  A time runs from the user's key to the data frame with the best
ten: looking up, joining statistics, the network, sorting.  `cpu` is what the calling thread used, which other programs
on the machine disturb less than `p50` and `p99`, which are of the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
import yaml
from document import Table, median, ranged, ratios
from measure import Line, benchmark, commit, counted, figure, options, peak_rss, save
from rich.console import Console

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.config.commands import TablePrecision
from mtcl_torchrec.data import kuairand
from mtcl_torchrec.serving.archive import read_manifest
from mtcl_torchrec.serving.artefact import COMPILED, NETWORK, Artefact
from mtcl_torchrec.serving.export import export_run
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.run import train_run

TOGETHER = 16  # users in one call
EAGER = "eager"


def timed(ask: Callable[[int], Any], times: int, warm: int = 5) -> dict[str, float]:
    """Milliseconds of ``ask(i)`` for i from 0: ``p50`` and ``p99`` on the wall, and ``cpu``, the median of the thread's
    own time."""
    for i in range(warm):
        ask(i)
    wall, cpu = [], []
    for i in range(times):
        start, used = time.perf_counter(), time.thread_time()
        ask(i)
        wall.append(1000 * (time.perf_counter() - start))
        cpu.append(1000 * (time.thread_time() - used))
    p50, p99 = np.percentile(wall, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "cpu": float(np.median(cpu))}


def measure(recommender: Recommender, *, candidates: int, times: int, seed: int = 0) -> dict[str, Any]:
    """Times of one way of serving; the same requests whatever way it is."""
    draw, catalogue = np.random.default_rng(seed), recommender.catalogue
    items, users = catalogue.items.iloc[:, 0].tolist(), catalogue.users.iloc[:, 0].tolist()
    number = min(candidates, len(items))
    asked = [users[i] for i in draw.integers(0, len(users), times + TOGETHER)]
    offered = [[items[i] for i in draw.choice(len(items), number, replace=False)] for _ in asked]
    contexts: list[dict[str, Any]] = [{} for _ in asked]
    if "hour" in catalogue.context:
        contexts = [{"hour": int(hour)} for hour in draw.integers(1, 24, len(asked))]

    def one(i: int) -> Any:
        return recommender.recommend(asked[i], contexts[i], candidates=offered[i], seen=True)

    def whole(i: int) -> Any:
        return recommender.recommend(asked[i], contexts[i])

    def together(i: int) -> Any:
        some = slice(i, i + TOGETHER)
        return recommender.recommend(asked[some], contexts[some], candidates=offered[some], seen=True)

    few = max(times // 10, 3)
    result: dict[str, Any] = {
        "one_user": timed(one, times), "catalogue": timed(whole, few, 2), "together": timed(together, few, 2)
    }  # fmt: skip
    result["candidates_per_s"] = 1000 * number / result["one_user"]["p50"]
    result["together_per_s"] = 1000 * TOGETHER * number / result["together"]["p50"]
    result["items"], result["candidates"] = len(items), number
    return result


# ---------------------------------------------------------------------- what is served


def trained(folder: Path, rows: int | None = None) -> Path:
    """A run on the demo's data, one epoch, trained where it is not there yet.

    Args:
        rows: of training, the first; None takes all.
    """
    name = f"demo-{rows}" if rows else "demo"
    if not (folder / f"{name}.trained").exists():
        shutil.rmtree(folder / name, ignore_errors=True)  # of a training that was broken off
        kuairand.write(folder / name / "data")
        for path in (folder / name / "data").glob("*.parquet"):
            if rows:
                pd.read_parquet(path).head(rows).to_parquet(path, index=False)
        raw = yaml.safe_load(kuairand.example_run())
        raw["training"] |= {"epochs": 1}
        run = parse_run(yaml.safe_dump(raw), folder=folder / name)
        train_run(run, folder / name / "run", device="cpu", console=Console(quiet=True))
        (folder / f"{name}.trained").touch()
    return folder / name / "run"


def exported(run_dir: Path, folder: Path, kinds: list[str], compiled: str) -> dict[str, dict[str, Any]]:
    """Way -> what is known of its export, made where it is not there yet."""
    ways: dict[str, dict[str, Any]] = {EAGER: {}}
    for tables in kinds:
        path, note = (folder / f"{run_dir.parent.name}-{tables}-{compiled}{end}" for end in (".mtcl", ".json"))
        if not note.exists():
            started = time.perf_counter()
            made = export_run(FinishedRun.load(run_dir), path, tables=tables, compiled=compiled)
            known = {"export_s": time.perf_counter() - started, "file_mb": made.bytes / 1e6,
                     "difference": max(made.difference.values()), "compiled": bool(made.compiled)}  # fmt: skip
            note.write_text(json.dumps(known))
        known, parts = json.loads(note.read_text()), read_manifest(path)["members"]
        for way, part in (("graph", NETWORK), *[("compiled", COMPILED)][: known["compiled"]]):
            ways[f"{tables} {way}"] = known | {"file": str(path), "code": way == "compiled",
                                               "model_mb": parts[part]["bytes"] / 1e6}  # fmt: skip
    return ways


def work(what: Line, folder: Path, run_dir: Path) -> Line:
    """One way of serving, in this process."""
    torch.set_num_threads(what["threads"] or 1)
    known = exported(run_dir, folder, what["kinds"], what["compiled"])[what["way"]]
    started = time.perf_counter()
    if what["way"] == EAGER:
        recommender = Recommender.load(run_dir)
        model = FinishedRun.load(run_dir).model
        known = {"model_mb": sum(value.nbytes for value in model.state_dict().values()) / 1e6}
    else:
        recommender = Recommender(Artefact.load(Path(known["file"]), compiled=known["code"]))
    found = {"load_s": time.perf_counter() - started}
    found |= {name: known[name] for name in ("export_s", "model_mb", "file_mb", "difference") if name in known}
    found |= measure(recommender, candidates=what["candidates"], times=what["times"], seed=what["seed"])
    return found | {"peak_rss_bytes": peak_rss()}


# ---------------------------------------------------------------------- shown


def by_way(lines: list[Line]) -> dict[str, list[Line]]:
    """Way -> repeats."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["what"]["way"], []).append(line)
    return groups


def tables(lines: list[Line]) -> list[Table]:
    """One table: milliseconds, unless it is said."""
    first, groups, cells = lines[0], by_way(lines), []
    for way, of in groups.items():
        one = [line["one_user"] for line in of]
        cells.append([
            way, ranged(ratios(of, groups.get(EAGER, []), "candidates_per_s")),
            f"{median(of, 'candidates_per_s'):,.0f}", *(f"{median(one, n):.1f}" for n in ("p50", "p99", "cpu")),
            f"{median([line['catalogue'] for line in of], 'p50'):.0f}",
            f"{median([line['together'] for line in of], 'p50'):.0f}", f"{median(of, 'together_per_s'):,.0f}",
            f"{median(of, 'model_mb'):.1f}", f"{median(of, 'file_mb'):.1f}" if "file_mb" in of[0] else "",
            f"{of[0]['difference']:.1g}" if "difference" in of[0] else "",
            f"{median(of, 'load_s'):.1f}",
        ])  # fmt: skip
    heads = ["", "times as fast", "cand/s", "p50 ms", "p99 ms", "cpu ms", "catalogue, p50", f"{TOGETHER} users, p50",
             "their cand/s", "model MB", "file MB", "differs by", "loads in s"]  # fmt: skip
    title = f"serving: 1 user × {first['candidates']} candidates of {first['items']:,} items"
    return [Table(title, heads, cells)]


def draw(lines: list[Line], path: Path) -> None:
    """Candidates a second, and sizes, of each way."""
    groups = by_way(lines)
    drawn, axes = figure(wide=8.4, high=3.2, columns=2)
    for axis, name, said, form in ((axes[0], "candidates_per_s", "candidates/s, one user at a time", "{:,.0f}"),
                                   (axes[1], "model_mb", "MB of the network with its tables", "{:.1f}")):  # fmt: skip
        there = {way: median(of, name) for way, of in groups.items() if all(name in line for line in of)}
        axis.bar_label(axis.bar(list(there), list(there.values())), fmt=form, fontsize=8)
        axis.tick_params(axis="x", labelsize=7, rotation=20)
        axis.set_title(said, fontsize=9)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="?", help="what `mtcl demo` or `mtcl train` wrote")
    parser.add_argument("--tables", nargs="+", choices=get_args(TablePrecision), default=["fp32", "int8"],
                        help="precisions to export (%(default)s)")  # fmt: skip
    parser.add_argument("--compiled", choices=["auto", "yes", "no"], default="auto", help="machine code (%(default)s)")
    parser.add_argument("--candidates", type=counted, default=500, help="of one user (%(default)s)")
    parser.add_argument("--times", type=counted, default=200, help="requests to time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=counted, help="where no run is given: train on the first rows alone")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / f"mtcl-serving-{commit()}",
                        help="folder of the run and of its exports (%(default)s)")  # fmt: skip
    options(parser, repeats=3, timeout_s=600)
    given = parser.parse_args()
    given.data.mkdir(parents=True, exist_ok=True)
    run_dir = given.run_dir or Path()

    flags = ["--data", str(given.data)]

    def todo() -> list[Line]:
        nonlocal run_dir
        run_dir = given.run_dir or trained(given.data, given.train_rows)
        flags[:0] = [str(run_dir)]
        return [
            {
                "way": way, "run": given.run_dir.name if given.run_dir else "demo", "train_rows": given.train_rows,
                "kinds": given.tables, "compiled": given.compiled, "candidates": given.candidates,
                "times": given.times, "seed": given.seed, "threads": given.threads,
            }
            for way in exported(run_dir, given.data, given.tables, given.compiled)
        ]  # fmt: skip

    return benchmark(
        parser, given, work=lambda what: work(what, given.data, run_dir), todo=todo, tables=tables, draw=draw,
        flags=flags,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
