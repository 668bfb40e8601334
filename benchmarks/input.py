"""From Parquet to batches, without a model: how fast, beside what pyarrow takes to read the file alone.

    python benchmarks/input.py --training --out results/input.jsonl
    python benchmarks/input.py --rows 100_000 --files 5x0 --repeats 1 --out try.jsonl

Every step on the way takes its turn, over the same file, which the operating system keeps in memory:

- `pyarrow`: row group after row group decoded on one thread, columns as Arrow arrays: the least that there is to do;
- `windows`: read as this package reads them, as data frames, checksums of pages verified;
- `encoded`: the same, and columns to tensors;
- `batches`: what training gets, shuffled, cut and collated, with one thread that reads ahead;
- `batches_2_threads`: with two of them, `data.workers: 2`.

GB/s count decoded bytes: of an id 8, of a number 4, of a label 1.  `--training` adds what share of a training step is
spent waiting for the next batch: our loop on the same file, MMoE with 4 experts 256-128-64.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from document import Table, median, ranged, ratios
from measure import Line, benchmark, counted, figure, options, peak_rss, save

from mtcl_torchrec.config import RunConfig, parse_run
from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.memory import keep_freed_memory
from mtcl_torchrec.training.sharding import ranks

BATCHES = {"batches": 1, "batches_2_threads": 2}  # way -> threads that read ahead
WAYS = ("pyarrow", "windows", "encoded", *BATCHES)
ROW_GROUP, TABLE_ROWS, TASKS = 65_536, 150_000, 3


def write(path: Path, rows: int, ids: int, numbers: int) -> None:
    """A file of ids, numbers, some of them missing, and labels, where it is not there yet."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draw, unfinished = np.random.default_rng(0), path.with_suffix(f".{os.getpid()}.unfinished")
    names = [f"id_{i}" for i in range(ids)] + [f"number_{i}" for i in range(numbers)]
    kinds = [pa.int64()] * ids + [pa.float32()] * numbers
    schema = pa.schema(list(zip(names, kinds, strict=True)) + [(f"task_{t}", pa.int8()) for t in range(TASKS)])
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            for start in range(0, rows, ROW_GROUP):
                n = min(ROW_GROUP, rows - start)
                columns = [pa.array(draw.integers(0, TABLE_ROWS, n)) for _ in range(ids)]
                columns += [
                    pa.array(draw.normal(size=n).astype(np.float32), mask=draw.random(n) < 0.02) for _ in range(numbers)
                ]
                columns += [pa.array((draw.random(n) < 0.2).astype(np.int8)) for _ in range(TASKS)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        unfinished.rename(path)
    finally:  # on a full disk, what there is of it is in the way
        unfinished.unlink(missing_ok=True)


def configured(path: Path, what: Line) -> RunConfig:
    """The run that streams the file."""
    ids = [
        {"name": f"id_{i}", "group": "item", "encoding": "index", "vocabulary_size": TABLE_ROWS, "embedding_dim": 16}
        for i in range(what["ids"])
    ]
    numbers = [{"name": f"number_{i}", "group": "item", "kind": "dense"} for i in range(what["numbers"])]
    raw = {
        "data": {"train": [str(path)], "val": [str(path)], "stream": True, "window": ROW_GROUP, "workers": 1},
        "schema": {"features": ids + numbers, "tasks": [{"name": f"task_{t}", "kind": "binary"} for t in range(TASKS)]},
        "model": {"trunk": {"kind": "mmoe", "num_experts": 4, "expert_layers": [256, 128, 64]}},
        "training": {"batch_size": what["batch_size"]},
    }
    return parse_run(yaml.safe_dump(raw))


def work(what: Line, folder: Path) -> Line:
    """One way to the end of the file, in this process."""
    keep_freed_memory()  # as `mtcl train` does
    path = folder / f"input-{what['rows']}x{what['ids']}x{what['numbers']}.parquet"
    run = configured(path, what)
    preprocessor = Preprocessor(run.data_schema, run.statistics)
    files = ParquetFiles.open([str(path)], preprocessor.columns(), window_rows=ROW_GROUP)
    preprocessor.learn(files.read(files.windows()[0]))
    if what["way"] == "training":
        return waiting(what, run, preprocessor, files)
    for _ in files.windows()[:1]:  # whatever the first call costs
        preprocessor.encoder.encode(files.read(files.windows()[0]))
    started, used, rows = time.perf_counter(), time.process_time(), 0
    for part in way(what, path, preprocessor, files):
        rows += len(part.labels) if isinstance(part, MTBatch) else len(part)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    assert rows == what["rows"], (rows, what["rows"])
    size = 8 * what["ids"] + 4 * what["numbers"] + TASKS
    return {
        "rows_per_s": rows / seconds, "gb_per_s": rows * size / seconds / 1e9, "cpu_us_per_row": 1e6 * cpu / rows,
        "file_mb": path.stat().st_size / 1e6, "peak_rss_bytes": peak_rss(),
    }  # fmt: skip


def way(what: Line, path: Path, preprocessor: Preprocessor, files: ParquetFiles) -> Iterator[Any]:
    """The parts of the file as this way has them, each with a length."""
    if what["way"] == "pyarrow":
        with pq.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, use_threads=False)
    elif what["way"] == "windows":
        yield from (files.read(window).frame for window in files.windows((0, 1)))
    elif what["way"] == "encoded":
        encode: Callable[..., Any] = preprocessor.encoder.encode
        yield from (encode(files.read(window)) for window in files.windows((0, 1)))
    else:
        stream = StreamRows(files, preprocessor.encoder.encode, seed=0, workers=BATCHES[what["way"]])
        yield from stream.batches(Position(), rank=0, world_size=1, batch_size=what["batch_size"])


def waiting(what: Line, run: RunConfig, preprocessor: Preprocessor, files: ParquetFiles) -> Line:
    """What share of training steps is spent waiting for the next batch."""
    stream = StreamRows(files, preprocessor.encoder.encode, seed=0)
    with ranks("cpu") as where:
        model = build_model(run.model, preprocessor.encoder, run.fusion)
        sharded, optimizer = parallelise(MTCLTrain(model), where, run.optimizers, batch_size=what["batch_size"])
        pipeline = build_pipeline(sharded, optimizer, where.device)
        sharded.train()
        waits = [0.0]

        def clocked() -> Iterator[MTBatch]:
            batches = stream.batches(Position(), rank=0, world_size=1, batch_size=what["batch_size"])
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                waits[0] += time.perf_counter() - started
                if batch is None:
                    return
                yield batch

        fed, steps = clocked(), -(-what["rows"] // what["batch_size"])
        warm = min(4, steps - 2)
        for step in range(steps):
            if step == warm:
                started, before = time.perf_counter(), waits[0]
            pipeline.progress(fed)
        seconds, waited = time.perf_counter() - started, waits[0] - before
        pipeline.detach()
    return {"waiting_share": waited / seconds, "rows_per_s": (what["rows"] - warm * what["batch_size"]) / seconds}


def tables(lines: list[Line]) -> list[Table]:
    """A table for each kind of file."""
    found = []
    for (rows, ids, numbers, _), of in by_file(lines).items():
        heads = ["", "of pyarrow's speed", "rows/s", "GB/s", "cpu µs a row", "peak GB"]
        cells = [
            [
                name, ranged(ratios(of[name], of.get("pyarrow", []), "rows_per_s")),
                f"{median(of[name], 'rows_per_s'):,.0f}", f"{median(of[name], 'gb_per_s'):.3f}",
                f"{median(of[name], 'cpu_us_per_row'):.2f}", f"{median(of[name], 'peak_rss_bytes') / 1e9:.2f}",
            ]
            for name in WAYS if name in of
        ]  # fmt: skip
        note = ""
        if "training" in of:
            share, speed = [line["waiting_share"] for line in of["training"]], median(of["training"], "rows_per_s")
            note = f"training: {ranged(share, '.1%')} of a step is spent waiting for input, at {speed:,.0f} samples/s."
        title = f"input: {rows:,} rows of {ids} ids, {numbers} numbers and {TASKS} labels"
        found.append(Table(title, heads, cells, note))
    return found


def by_file(lines: list[Line]) -> dict[tuple[Any, ...], dict[str, list[Line]]]:
    """(rows, ids, numbers, threads) -> way -> its repeats."""
    groups: dict[tuple[Any, ...], dict[str, list[Line]]] = {}
    for line in lines:
        what = line["what"]
        key = tuple(what[name] for name in ("rows", "ids", "numbers", "threads"))
        groups.setdefault(key, {}).setdefault(what["way"], []).append(line)
    return groups


def draw(lines: list[Line], path: Path) -> None:
    """Rows a second of each way, for each kind of file."""
    groups = by_file(lines)
    drawn, axes = figure(wide=3.8 * len(groups), high=3.2, columns=len(groups))
    for axis, (key, of) in zip(axes, groups.items(), strict=True):
        values = {name: median(of[name], "rows_per_s") / 1e6 for name in WAYS if name in of}
        axis.bar_label(axis.bar(list(values), list(values.values())), fmt="%.2f", fontsize=8)
        axis.set_title(f"{key[1]} ids, {key[2]} numbers", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="x", rotation=20)
    axes[0].set_ylabel("million rows/s", fontsize=8)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=counted, default=2_000_000)
    parser.add_argument(
        "--files", nargs="+", type=_columns, default=["5x0", "26x13"], metavar="IDSxNUMBERS", help="(%(default)s)"
    )
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "training"], default=list(WAYS))
    parser.add_argument("--training", action="store_true", help="the share of a step that is spent waiting, too")
    parser.add_argument("--batch-size", type=counted, default=4096)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "mtcl-input",
                        help="folder of the files, which are written where they are missing (%(default)s)")  # fmt: skip
    options(parser, repeats=3, timeout_s=900)
    given = parser.parse_args()
    if given.worker and given.worker["threads"]:
        torch.set_num_threads(given.worker["threads"])
    return benchmark(
        parser, given, work=lambda what: work(what, given.data), todo=lambda: _todo(parser, given), tables=tables,
        draw=draw, flags=["--data", str(given.data)],
    )  # fmt: skip


def _columns(text: str) -> str:
    """``IDSxNUMBERS``, one column at least."""
    ids, by, numbers = text.partition("x")
    if not (by and ids.isdecimal() and numbers.isdecimal() and int(ids) + int(numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not IDSxNUMBERS with a column at least, such as 5x0")
    return f"{int(ids)}x{int(numbers)}"


def _todo(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[Line]:
    ways = [*given.ways, *(["training"] if given.training and "training" not in given.ways else [])]
    if "training" in ways and given.rows <= given.batch_size:
        parser.error(f"--rows {given.rows}: training needs two steps of {given.batch_size:,} rows at least")
    todo = []
    for kind in given.files:
        ids, numbers = map(int, kind.split("x"))
        write(given.data / f"input-{given.rows}x{ids}x{numbers}.parquet", given.rows, ids, numbers)
        todo += [
            {"way": name, "rows": given.rows, "ids": ids, "numbers": numbers, "batch_size": given.batch_size,
             "threads": given.threads}
            for name in ways
        ]  # fmt: skip
    return todo


if __name__ == "__main__":
    sys.exit(main())
