"""How much memory it takes to go through more and more rows: as much for 100 million as for one, or it grows.

    python benchmarks/memory.py --out results/memory.jsonl                               # 1 and 4 million rows
    python benchmarks/memory.py --rows 1_000_000 10_000_000 100_000_000 --timeout 7200 --out long.jsonl
    python benchmarks/memory.py --case training --rows 100_000 400_000 --out try.jsonl

A synthetic world's rows are generated on the way, encoded, shuffled and cut into batches, window by window, each size
in a process of its own:

- `stream`: batches alone, as fast as they come;
- `training`: the train pipeline of `mtcl train` takes them (MMoE of 4 experts 128-64, dim 16).

Peak memory is the process's own (RSS), interpreter and libraries included.  "bytes a row" is what it grew by from the
fewest rows to these, over the rows in between: near 0 where memory does not depend on the length of the log.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from document import Table, median, ranged, ratios
from measure import Line, benchmark, counted, figure, options, peak_rss, save

from mtcl_torchrec.config import RunConfig, parse_run
from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.splits import load_splits
from mtcl_torchrec.data.worlds import world_run
from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.sharding import ranks

CASES = ("stream", "training")


def configured(what: Line) -> RunConfig:
    """The run that `mtcl init --world shop` would write, in this size."""
    size = {"num_users": what["vocabulary"], "num_items": what["vocabulary"]}
    raw = yaml.safe_load(world_run("shop", rows=what["rows"], val_rows=1, test_rows=0, factors=False, **size))
    raw["data"] |= {"window": what["window"], "workers": what["workers"]}
    raw["model"]["trunk"] = {"kind": "mmoe", "num_experts": 4, "expert_layers": [128, 64]}
    raw["training"] |= {"batch_size": what["batch_size"]}
    return parse_run(yaml.safe_dump(raw))


def work(what: Line) -> Line:
    """Go through all rows once, in this process."""
    if what["threads"]:
        torch.set_num_threads(what["threads"])
    run = configured(what)
    preprocessor = Preprocessor(run.data_schema, run.statistics)
    train = load_splits(run, preprocessor, say=lambda _: None).train
    batches = train.batches(Position(), rank=0, world_size=1, batch_size=what["batch_size"])
    seen, started = _Seen(what["rows"]), time.perf_counter()
    if what["case"] == "stream":
        for batch in batches:
            seen.note(len(batch.labels))
    else:
        _trained(run, preprocessor, seen.noted(batches))
    seconds = time.perf_counter() - started
    assert seen.rows == what["rows"], (seen.rows, what["rows"])
    return {
        "rows_per_s": seen.rows / seconds, "peak_rss_bytes": peak_rss(), "rss_by_share": seen.rss,
    }  # fmt: skip


def _trained(run: RunConfig, preprocessor: Preprocessor, batches: Iterator[MTBatch]) -> None:
    with ranks("cpu") as where:
        model = build_model(run.model, preprocessor.encoder, run.fusion)
        sharded, optimizer = parallelise(
            MTCLTrain(model), where, run.optimizers, batch_size=run.training.batch_size
        )  # fmt: skip
        pipeline = build_pipeline(sharded, optimizer, where.device)
        sharded.train()
        try:
            while True:
                pipeline.progress(batches)
        except StopIteration:
            pipeline.detach()


class _Seen:
    """Rows so far, and this process's memory after each tenth of them."""

    def __init__(self, total: int) -> None:
        self.total, self.rows, self.rss = total, 0, list[int]()

    def note(self, rows: int) -> None:
        self.rows += rows
        if self.rows >= self.total * (len(self.rss) + 1) / 10:
            self.rss.append(rss())

    def noted(self, batches: Iterator[MTBatch]) -> Iterator[MTBatch]:
        for batch in batches:
            self.note(len(batch.labels))
            yield batch


def rss() -> int:
    """What this process holds now, bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# ---------------------------------------------------------------------- shown


def by_case(lines: list[Line]) -> dict[str, dict[int, list[Line]]]:
    """Case -> rows, the fewest first -> repeats."""
    groups: dict[str, dict[int, list[Line]]] = {}
    for line in sorted(lines, key=lambda of: of["what"]["rows"]):
        what = line["what"]
        groups.setdefault(what["case"], {}).setdefault(what["rows"], []).append(line)
    return groups


def growth(of: dict[int, list[Line]], rows: int) -> float:
    """Bytes of peak memory for each row more than the fewest."""
    fewest = min(of)
    if rows == fewest:
        return float("nan")
    return (median(of[rows], "peak_rss_bytes") - median(of[fewest], "peak_rss_bytes")) / (rows - fewest)


def tables(lines: list[Line]) -> list[Table]:
    """A table for each case."""
    found = []
    for case, of in by_case(lines).items():
        rows_of = [
            [
                f"{rows:,} rows",
                ranged(ratios(repeated, of[min(of)], "peak_rss_bytes")),
                ranged([line["peak_rss_bytes"] / 1e9 for line in repeated]),
                "" if rows == min(of) else f"{growth(of, rows):.1f}",
                f"{median(repeated, 'rows_per_s'):,.0f}",
            ]
            for rows, repeated in of.items()
        ]
        heads = ["", "× peak of the fewest rows", "peak GB", "bytes a row more", "rows/s"]
        found.append(Table(f"memory, {case}: generated rows", heads, rows_of))
    return found


def draw(lines: list[Line], path: Path) -> None:
    """Memory while rows go by."""
    groups = by_case(lines)
    drawn, axes = figure(wide=4.4 * len(groups), high=3.2, columns=len(groups))
    for axis, (case, of) in zip(axes, groups.items(), strict=True):
        for rows, repeated in of.items():
            held = repeated[0]["rss_by_share"]
            seen = [rows * (i + 1) / len(held) / 1e6 for i in range(len(held))]
            axis.plot(seen, [b / 1e9 for b in held], "-", marker=".", label=f"{rows / 1e6:g} M rows")
        highest = max(b for repeated in of.values() for b in repeated[0]["rss_by_share"])
        axis.set(xscale="log", ylim=(0, 1.15 * highest / 1e9))
        axis.set_xlabel("million rows so far", fontsize=8)
        axis.set_title(case, fontsize=9)
        axis.legend(fontsize=7, frameon=False, loc="lower right")
    axes[0].set_ylabel("memory of the process, GB", fontsize=8)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=counted, nargs="+", default=[1_000_000, 4_000_000], help="(%(default)s)")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["stream"], help="(%(default)s)")
    parser.add_argument("--vocabulary", type=counted, default=100_000, help="users, and as many items (%(default)s)")
    parser.add_argument("--window", type=counted, default=262_144, help="rows that are read at once (%(default)s)")
    parser.add_argument("--workers", type=counted, default=1, help="threads that read ahead (%(default)s)")
    parser.add_argument("--batch-size", type=counted, default=4096)
    options(parser, repeats=2, timeout_s=1800)
    given = parser.parse_args()
    return benchmark(parser, given, work=work, todo=lambda: _todo(given), tables=tables, draw=draw)


def _todo(given: argparse.Namespace) -> list[dict[str, Any]]:
    same = {name: getattr(given, name) for name in ("vocabulary", "window", "workers", "batch_size", "threads")}
    return [{"case": case, "rows": rows} | same for case in given.case for rows in sorted(given.rows)]


if __name__ == "__main__":
    sys.exit(main())
