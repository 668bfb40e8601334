"""How fast a run is served: one user's candidates ranked, eager and exported, with tables of several precisions.

    python benchmarks/serving.py runs/kuairand
    python benchmarks/serving.py runs/kuairand --tables fp32,int8 --compiled no --candidates 500 --json serving.json

Each way of serving is asked the same: one user at a time, each with a draw of candidates and a context of their own;
one user with the whole catalogue; 16 users together.  A time runs from the user's key to the data frame with the best
ten: looking up, joining statistics, the network, sorting.  `cpu` is what the calling thread used, which other programs
on the machine disturb less than `p50` and `p99`, which are of the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import about
from rich.console import Console
from rich.table import Table

from mtcl_torchrec.serving.artefact import Artefact
from mtcl_torchrec.serving.export import export_run
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun

TOGETHER = 16  # users in one call


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


def compare(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every way of serving the run."""
    run = FinishedRun.load(given.run_dir)
    ways: list[dict[str, Any]] = []

    def add(name: str, load: Callable[[], Recommender], **about: Any) -> None:
        start = time.perf_counter()
        recommender = load()
        loading = time.perf_counter() - start
        ways.append({"way": name, "load_s": loading, **about})
        ways[-1] |= measure(recommender, candidates=given.candidates, times=given.times, seed=given.seed)

    add("eager", lambda: Recommender.load(given.run_dir))
    for path in given.file:
        artefact, about = Artefact.load(path), {"file_mb": path.stat().st_size / 1e6}
        for compiled in (False, True) if artefact.compiled else (False,):
            way = f"{artefact.manifest['tables']} {'compiled' if compiled else 'graph'}"
            add(way, lambda path=path, code=compiled: Recommender(Artefact.load(path, compiled=code)), **about)
    with tempfile.TemporaryDirectory() as name:
        for tables in given.tables:
            path = Path(name) / f"{tables}.mtcl"
            start = time.perf_counter()
            made = export_run(run, path, tables=tables, compiled=given.compiled)
            about = {"export_s": time.perf_counter() - start, "file_mb": made.bytes / 1e6,
                     "difference": max(made.difference.values())}  # fmt: skip
            add(f"{tables} graph", lambda path=path: Recommender(Artefact.load(path, compiled=False)), **about)
            if made.compiled:
                add(f"{tables} compiled", lambda path=path: Recommender(Artefact.load(path, compiled=True)), **about)
    return ways


def show(ways: list[dict[str, Any]], console: Console) -> None:
    """Print a table: milliseconds, unless it is said."""
    first = ways[0]
    table = Table(title=f"1 user × {first['candidates']} candidates, × {first['items']:,} items, "
                        f"{TOGETHER} users × {first['candidates']}")  # fmt: skip
    for column in ("", "p50", "p99", "cpu", "cand/s", "all p50", "16 users p50", "cand/s", "file MB", "differs by"):
        table.add_column(column, justify="left" if not column else "right")
    for way in ways:
        one = way["one_user"]
        table.add_row(
            way["way"], *(f"{one[n]:.1f}" for n in ("p50", "p99", "cpu")), f"{way['candidates_per_s']:,.0f}",
            f"{way['catalogue']['p50']:.0f}", f"{way['together']['p50']:.0f}", f"{way['together_per_s']:,.0f}",
            f"{way['file_mb']:.1f}" if "file_mb" in way else "",
            f"{way['difference']:.1g}" if "difference" in way else "",
        )  # fmt: skip
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="what `mtcl demo` or `mtcl train` wrote")
    parser.add_argument("--tables", default="fp32,int8", help="precisions to export (%(default)s)")
    parser.add_argument("--compiled", choices=["auto", "yes", "no"], default="auto", help="machine code (%(default)s)")
    parser.add_argument(
        "--file", type=Path, action="append", default=[], help="an export of the run that stands already"
    )
    parser.add_argument("--candidates", type=int, default=500, help="of one user (%(default)s)")
    parser.add_argument("--times", type=int, default=200, help="requests to time (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all numbers")
    given = parser.parse_args()
    given.tables = [name for name in given.tables.split(",") if name]
    return given


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    ways = compare(given)
    show(ways, Console(width=130))
    if given.json:
        given.json.write_text(json.dumps({"about": about(), "ways": ways}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
