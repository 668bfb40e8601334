"""How fast this package trains beside what people would use instead: on the same rows, by the same kind of optimizer.

    pip install -e '.[bench]'
    python benchmarks/peers.py --case all --out results/peers.jsonl
    python benchmarks/peers.py --show results/peers.jsonl
    python benchmarks/peers.py --case middle --rows 100_000 --contenders ours torchrec --repeats 1 --out try.jsonl

One pass over a Parquet file, each contender in a process of its own, in turn.  All train an MMoE of the same sizes, by
Adagrad on tables and Adam on everything else (more in `contenders.py`).  The first steps do not count.

    ours                the training loop of `mtcl train`, fp32
    torchrec            the same model by hand on TorchRec, fp32: fused optimizer, TrainPipelineSparseDist
    pytorch             the same by hand on nn.Embedding(sparse=True), fp32
    torchrec_bf16       the loop by hand under bf16 autocast, where the processor is fast in it
    rechub, deepctr     the MMoE of torch-rechub and of deepctr-torch, fp32 (the extra "bench")
    ours_bf16           ours with `training.precision: bf16`, where the processor is fast in it
    ours_bf16_compiled  the same with `training.compile: dense`, where there is a C++ compiler

"ours is … times as fast" comes first: the median of the repeats' ratios (least–most), each of two processes that ran
one after the other, reading included.  `log-loss` of held-out rows shows that a contender has learnt, `parameters` that
all trained as many; `peak GB` is the most memory that its process had.  `samples/s` is of training, with whatever the
contender's loader costs it; `from file` counts what it reads before it trains, too.  `cpu` is the processor time of a
step, of all threads, which other programs on the machine disturb less than the rest.

The cases: `small` is of the size of census-income; `middle` has 5 tables of 150,000 rows; `plain` is the middle one
without normalisation in the experts (torch-rechub's have it always); `large` has one table of 10 million rows;
`growing` is ours alone, the middle one with two tables of 100,000 to 30 million rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from document import Table, median, ranged, ratios
from measure import CONSOLE, Line, benchmark, counted, figure, in_process, options, peak_rss, save
from peer_cases import CASES, GROWING, Case, files_of

from mtcl_torchrec.openmp import SPINS
from mtcl_torchrec.training.precision import has_fast_bf16

DEFAULT = ("ours", "torchrec", "pytorch", "rechub", "deepctr")
FASTER = ("torchrec_bf16", "ours_bf16", "ours_bf16_compiled")
PEERS = ("torch-rechub", "deepctr-torch")
PACKAGES = {"rechub": ("torch_rechub",), "deepctr": ("deepctr_torch", "requests")}  # that a contender imports
COLOURS = {"ours": "#1f77b4", "ours_bf16": "#17becf", "ours_bf16_compiled": "#0b7285"}
OURS = {} if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) else {"GOMP_SPINCOUNT": str(SPINS)}  # as `mtcl`
SAME_SIZE = 0.02  # how far dense parameters may differ: the peers have a bias more in a gate, or none in a head


def work(what: Line, data: Path) -> Line:
    """Train one contender in this process."""
    from contenders import CONTENDERS

    if what["threads"]:
        torch.set_num_threads(what["threads"])
    case = CASES[what["case"]].sized(what["rows"], what["table_rows"])
    train, val = files_of(case, data)
    ran = CONTENDERS[what["contender"]](case, train, val, 0)
    full = case.rows // case.batch_size  # the last step may have fewer rows
    warm = min(case.warmup_steps, full - 1)
    assert len(ran.stamps.wall) == case.steps, (len(ran.stamps.wall), case.steps)
    counted = slice(warm - 1, full)
    seconds, cpu_s = (of[counted][-1] - of[counted][0] for of in (ran.stamps.wall, ran.stamps.cpu))
    samples_per_s = (full - warm) * case.batch_size / seconds
    return {
        "samples_per_s": samples_per_s,
        "from_file_per_s": case.rows / (ran.read_s + case.rows / samples_per_s),
        "step_ms": seconds / (full - warm) * 1000,
        "step_median_ms": float(np.median(np.diff(ran.stamps.wall[counted])) * 1000),
        "step_cpu_ms": cpu_s / (full - warm) * 1000,
        "log_loss": log_loss(labels_of(val, case), ran.predictions),
        "table_parameters": ran.table_parameters,
        "dense_parameters": ran.dense_parameters,
        "read_s": ran.read_s,
        "ready_s": ran.ready_s,
        "peak_rss_bytes": peak_rss(),
        "torch_threads": torch.get_num_threads(),
    }


def labels_of(path: Path, case: Case) -> np.ndarray:
    """(N, T) of a case's file."""
    table = pq.read_table(path, columns=case.labels)
    return np.stack([table[name].to_numpy() for name in case.labels], 1).astype(np.float64)


def log_loss(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over rows and tasks; both (N, T)."""
    p = np.clip(predictions.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def todo(given: argparse.Namespace) -> list[Line]:
    """What is to be measured, contenders of a case in turn."""
    found = []
    for name in CASES if "all" in given.case else given.case:
        case = CASES[name].sized(given.rows)
        sizes = (given.table_rows,) if given.table_rows else GROWING if name == "growing" else (case.table_rows,)
        for size in sizes:
            contenders = given.contenders or by_default(name)
            found += [
                {"case": name, "rows": case.rows, "table_rows": size, "contender": who, "threads": given.threads}
                for who in contenders
            ]
    return found


def by_default(case: str) -> list[str]:
    """Who is measured in a case."""
    if case == "growing":
        return ["ours"]
    always_normed = ("rechub",) if case == "plain" else ()
    return [who for who in (*DEFAULT, *faster()) if who not in always_normed]


def faster() -> tuple[str, ...]:
    """Ours in forms that this machine gains from."""
    if not has_fast_bf16(torch.device("cpu")):
        return ()
    return FASTER if shutil.which(os.environ.get("CXX", "g++")) else FASTER[:-1]


def missing(contenders: Iterable[str]) -> str:
    """What there is to install for these contenders; empty where nothing is missing."""
    lacking = {
        who: package
        for who in contenders for package in PACKAGES.get(who, ()) if importlib.util.find_spec(package) is None
    }  # fmt: skip
    if not lacking:
        return ""
    whole = f"{' and '.join(lacking)} need{'s' * (len(lacking) == 1)} {' and '.join(lacking.values())}"
    left = [who for who in (*DEFAULT, *faster()) if who not in lacking]
    return f"{whole}: pip install 'mtcl_torchrec[bench]', or leave them out: --contenders {' '.join(left)}"


# ---------------------------------------------------------------------- shown


def by_size(lines: list[Line]) -> dict[tuple[Any, ...], dict[str, list[Line]]]:
    """(case, rows, rows of a table, threads) -> contender -> its repeats."""
    groups: dict[tuple[Any, ...], dict[str, list[Line]]] = {}
    for line in lines:
        what = line["what"]
        size = (what["case"], what["rows"], what["table_rows"], what["threads"])
        groups.setdefault(size, {}).setdefault(what["contender"], []).append(line)
    return groups


def tables(lines: list[Line]) -> list[Table]:
    """A table for each case."""
    found = []
    for (case, rows, table_rows, threads), of in by_size(lines).items():
        repeats = max(map(len, of.values()))
        title = f"{case}: {rows:,} rows, tables of {table_rows:,}, threads: {threads or 'default'}, median of {repeats}"
        heads = ["", "ours is … times as fast", "log-loss", "peak GB", "samples/s", "from file", "ms a step", "cpu",
                 "ready, s", "parameters"]  # fmt: skip
        cells = [
            [
                who, ranged(ratios(of.get("ours", []), repeated, "from_file_per_s")),
                f"{median(repeated, 'log_loss'):.4f}", f"{median(repeated, 'peak_rss_bytes') / 1e9:.2f}",
                f"{median(repeated, 'samples_per_s'):,.0f}", f"{median(repeated, 'from_file_per_s'):,.0f}",
                f"{median(repeated, 'step_ms'):.1f}", f"{median(repeated, 'step_cpu_ms'):.1f}",
                f"{median(repeated, 'ready_s'):.1f}",
                f"{repeated[0]['table_parameters']:,} + {repeated[0]['dense_parameters']:,}",
            ]
            for who, repeated in of.items()
        ]  # fmt: skip
        found.append(Table(title, heads, cells, " ".join(f"NOT EQUAL: {problem}." for problem in unequal(of))))
    return found


def unequal(of: dict[str, list[Line]]) -> list[str]:
    """What makes a comparison unfair: other numbers of parameters."""
    first = next(iter(of.values()))[0]
    found = []
    for who, (line, *_) in of.items():
        if line["table_parameters"] != first["table_parameters"]:
            found.append(f"{who} has {line['table_parameters']:,} parameters in tables")
        if abs(line["dense_parameters"] / first["dense_parameters"] - 1) > SAME_SIZE:
            found.append(f"{who} has {line['dense_parameters']:,} parameters beside tables")
    return found


def draw(lines: list[Line], path: Path) -> None:
    """Samples a second, from the file, of each case; the growing one by the size of its tables."""
    groups = by_size(lines)
    bars = [size for size, of in groups.items() if size[0] != "growing" and len(of) > 1]
    grown = sorted(
        (size[2], median(of["ours"], "samples_per_s")) for size, of in groups.items() if size[0] == "growing"
    )
    drawn, axes = figure(wide=3.4 * (len(bars) + bool(grown)), high=3.4, columns=max(len(bars) + bool(grown), 1))
    for axis, size in zip(axes, bars, strict=False):
        of = groups[size]
        values = {who: median(repeated, "from_file_per_s") for who, repeated in of.items()}
        placed = axis.barh(list(values), list(values.values()), color=[COLOURS.get(who, "#b0b0b0") for who in values])
        axis.bar_label(placed, [f"{v / 1000:,.1f}" for v in values.values()], fontsize=8, padding=2)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(values.values()))
        axis.set_title(f"{size[0]}: tables of {size[2]:,} rows", fontsize=9)
        axis.set_xlabel("thousand samples/s, reading included", fontsize=8)
        axis.xaxis.set_major_formatter(lambda of, _: f"{of / 1000:.0f}")
        axis.tick_params(labelsize=8)
    if grown:
        axes[-1].plot(*zip(*grown, strict=True), marker="o", color=COLOURS["ours"])
        axes[-1].set(xscale="log", ylim=(0, 1.15 * max(speed for _, speed in grown)))
        axes[-1].set_title("ours, as tables grow (rows of a table)", fontsize=9)
        axes[-1].tick_params(labelsize=8)
        axes[-1].set_ylabel("thousand samples/s", fontsize=8)
        axes[-1].yaxis.set_major_formatter(lambda of, _: f"{of / 1000:.0f}")
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=[*CASES, "all"], default=["small", "middle", "large"])
    parser.add_argument(
        "--contenders", nargs="+", choices=[*DEFAULT, *FASTER], help="default: all that this machine is fit for"
    )
    parser.add_argument("--rows", type=counted, help="of the training file, instead of the case's")
    parser.add_argument("--table-rows", type=counted, help="of each table, instead of the case's")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "mtcl-peers",
                        help="folder of the files, which are written where they are missing (%(default)s)")  # fmt: skip
    options(parser, repeats=3, timeout_s=1200)
    given = parser.parse_args()
    if not given.worker:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU

    def one(what: Line) -> Line | None:
        result = in_process(
            Path(__file__).resolve(), what, timeout_s=given.timeout, threads=given.threads,
            flags=["--data", str(given.data)],
            environment=OURS if what["contender"].startswith("ours") else {},
        )  # fmt: skip
        if result:
            CONSOLE.print(f"{what['case']}, {what['contender']}: {result['from_file_per_s']:,.0f} samples/s from file")
        return result

    return benchmark(
        parser, given, work=lambda what: work(what, given.data), todo=lambda: _todo(parser, given), tables=tables,
        draw=draw, one=one, versions=PEERS,
    )  # fmt: skip


def _todo(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[Line]:
    wanted = todo(given)
    if told := missing(what["contender"] for what in wanted):
        parser.error(told)
    for what in wanted:
        case = CASES[what["case"]].sized(what["rows"], what["table_rows"])
        if case.rows < 2 * case.batch_size:
            parser.error(f"--rows {case.rows}: {case.name} needs two steps of {case.batch_size:,} rows at least")
        files_of(case, given.data)
    return wanted


if __name__ == "__main__":
    sys.exit(main())
