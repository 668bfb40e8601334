"""How a training step on one large GPU (H200: 141 GB, 4.8 TB/s) spends its time, against what the device can do.

    python benchmarks/gpu.py --out results/gpu.json --picture results/gpu.png
    python benchmarks/gpu.py --cases middle --batch-sizes 8192 16384 --out try.json
    python benchmarks/gpu.py --cpu-dry-run --out /dev/null

NOT YET RUN ON A GPU: its authors had none.  What is tested is that the code runs, in tiny sizes on a CPU
(--cpu-dry-run); its figures there mean nothing.

For each case and batch size: steps per second of the train pipeline of `mtcl train` (batches that lie on the device);
the step taken apart by CUDA events (`step_parts.py`); the bytes that the lookups and their update must move, against
the measured rate of a copy; the floating-point operations of the dense part, against the measured rate of a matrix
product in bf16; the same step with the dense part compiled, and compiled with CUDA graphs; and how often the host
waited for the device in a step, counted by the profiler.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from measure import CONSOLE, Line, about, figure, save
from step_parts import PARTS, take_apart
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, MMoE, MTCLTrain, Task
from mtcl_torchrec.config import DenseOptimizerConfig, OptimizersConfig, TableOptimizerConfig
from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.training.loop import build_pipeline, parallelise, plain_model
from mtcl_torchrec.training.optimizers import build_schedule
from mtcl_torchrec.training.sharding import Ranks, ranks

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
FORMS = ("eager", "compiled", "CUDA graphs")
BATCHES = 8  # that take turns, so that no step finds its rows in the device's cache


@dataclass(frozen=True)
class Case:
    """Sizes of one model; ids of a feature are one a row, drawn with a density that falls with the id."""

    name: str
    features: int
    table_rows: int
    dim: int
    batch_sizes: tuple[int, ...]
    experts: int = 4
    expert_layers: tuple[int, ...] = (256, 128, 64)
    tasks: int = 3


CASES = (
    Case("middle", 5, 20_000_000, 64, (8_192, 16_384)),  # 100 million rows, 26 GB
    Case("large", 4, 40_000_000, 128, (16_384, 65_536), experts=8, expert_layers=(1024, 512, 256)),  # 82 GB
)
TINY = (
    Case("middle", 3, 500, 8, (32,), experts=2, expert_layers=(16, 8)),
    Case("large", 2, 700, 16, (32, 64), experts=2, expert_layers=(16, 8)),
)


# ---------------------------------------------------------------------- what the device can do


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time of a call on the device, by events; of the host where the device is one."""
    spent = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            spent.append(start.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            call()
            spent.append(time.perf_counter() - started)
    return statistics.median(spent[3:])


def limits(device: torch.device, tiny: bool) -> Line:
    """Measured bytes per second of a copy, read and written, and operations per second of matrix products."""
    numbers, side = (1 << 20, 128) if tiny else (1 << 30, 8192)
    source = torch.empty(numbers, device=device).normal_()
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * source.nbytes / seconds_of(partial(target.copy_, source), device)}
    del source, target  # 8 GB
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[f"{name}_flop_per_s"] = 2 * side**3 / seconds_of(partial(torch.matmul, a, b), device)
    return found


# ---------------------------------------------------------------------- one case


class Training:
    """A model of a case, sharded on this rank, and its batches."""

    def __init__(self, case: Case, batch_size: int, where: Ranks) -> None:
        keys = [f"id_{i}" for i in range(case.features)]
        tables = [
            EmbeddingBagConfig(
                name=f"t_{key}", num_embeddings=case.table_rows, embedding_dim=case.dim, feature_names=[key]
            )
            for key in keys
        ]
        torch.manual_seed(0)
        bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        trunk = MMoE(case.experts, case.expert_layers)
        model = MTCL(bags, 0, trunk, [Task.binary(f"task_{t}") for t in range(case.tasks)], precision="bf16")
        config = OptimizersConfig(
            tables=TableOptimizerConfig(kind="rowwise_adagrad", lr=0.05), dense=DenseOptimizerConfig(kind="adam")
        )
        self.device = where.device
        self.model, self.optimizer = parallelise(MTCLTrain(model), where, config, batch_size=batch_size)
        self.tower = plain_model(self.model).tower
        self.schedule = build_schedule(self.optimizer, 0, 10**6, "none")
        self.batches = cycle([_batch(case, batch_size, keys, where.device, seed) for seed in range(BATCHES)])
        self.model.train()

    def seconds(self, steps: int) -> float:
        """A step of the pipeline, once it is warm."""
        pipeline = build_pipeline(self.model, self.optimizer, self.device)
        for _ in range(max(steps // 4, 3)):
            pipeline.progress(self.batches)
        self._settle()
        started = time.perf_counter()
        for _ in range(steps):
            pipeline.progress(self.batches)
        self._settle()
        spent = (time.perf_counter() - started) / steps
        pipeline.detach()
        return spent

    def compiled_seconds(self, steps: int, form: str) -> float:
        """The same with the dense part compiled."""
        options: Line = {"mode": "reduce-overhead"} if form == "CUDA graphs" else {}
        self.tower.compile(**options)
        try:
            return self.seconds(steps)
        finally:
            self.tower._compiled_call_impl = None
            torch.compiler.reset()

    def waits(self, steps: int) -> dict[str, float]:
        """Events of the profiler in which the host waits for the device, in each step."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        pipeline = build_pipeline(self.model, self.optimizer, self.device)
        for _ in range(3):
            pipeline.progress(self.batches)
        with profile(activities=activities) as watched:
            for _ in range(steps):
                pipeline.progress(self.batches)
        pipeline.detach()
        counts = {event.key: event.count for event in watched.key_averages()}
        return {name: counts.get(name, 0) / steps for name in WAITS}

    def flop(self) -> int:
        """Floating-point operations of the dense part in a step, forward and backward."""
        batch = next(self.batches)
        with FlopCounterMode(display=False) as counted:
            self.model(batch)[0].backward()
        self.optimizer.zero_grad()
        return counted.get_total_flops()

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _batch(case: Case, batch_size: int, keys: list[str], device: torch.device, seed: int) -> MTBatch:
    draw = torch.Generator(device).manual_seed(seed)
    shape = (case.features * batch_size,)
    ids = (case.table_rows * torch.rand(shape, generator=draw, device=device, dtype=torch.float64) ** 3).long()
    labels = torch.randint(0, 2, (batch_size, case.tasks), generator=draw, device=device).float()
    ones = torch.ones(shape, dtype=torch.int64, device=device)
    return MTBatch(torch.empty(batch_size, 0, device=device), KeyedJaggedTensor(keys, ids, lengths=ones), labels)


def lookup_bytes(case: Case, batch_size: int) -> dict[str, int]:
    """What lookup and update must move at least: rows read and pooled rows written; then gradients read, rows read and
    written, and one number of the optimizer a row.  Rows that a batch looks up twice count twice."""
    rows = case.features * batch_size
    row = 4 * case.dim
    return {"embedding forward": rows * 2 * row, "embedding backward": rows * (3 * row + 8)}


def measure(case: Case, batch_size: int, where: Ranks, steps: int, known: Line, forms: tuple[str, ...]) -> Line:
    """Everything about one case and batch size."""
    training = Training(case, batch_size, where)
    step_s = {"eager": training.seconds(steps)}
    apart = take_apart(
        training.model, training.optimizer, training.schedule, training.batches, where.device, max(steps // 2, 2)
    )
    waits, flop = training.waits(min(steps, 5)), training.flop()
    for form in forms:
        if form != "eager":
            step_s[form] = training.compiled_seconds(steps, form)
    dense_s = (apart["trunk"] + apart["heads"] + apart["dense backward"]) / 1000
    cuda = where.device.type == "cuda"
    line: Line = {
        "case": asdict(case), "batch_size": batch_size, "step_ms": {f: s * 1000 for f, s in step_s.items()},
        "samples_per_s": batch_size / min(step_s.values()), "apart_ms": apart,
        "share_of_copy_rate": {
            part: moved / (apart[part] / 1000) / known["copy_bytes_per_s"]
            for part, moved in lookup_bytes(case, batch_size).items()
        },
        "dense_flop": flop, "share_of_matrix_rate": flop / dense_s / known["bf16_flop_per_s"], "waits_per_step": waits,
        "peak_bytes": torch.cuda.max_memory_allocated(where.device) if cuda else None,
    }  # fmt: skip
    del training
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(where.device)
    return line


# ---------------------------------------------------------------------- what is shown


def rows_of(lines: list[Line]) -> Iterator[tuple[str, list[str]]]:
    """Of the table: a name, and a figure for each line."""
    yield "samples/s, fastest form", [f"{line['samples_per_s']:,.0f}" for line in lines]
    for form in FORMS:
        if any(form in line["step_ms"] for line in lines):
            yield f"step, {form}, ms", [f"{line['step_ms'].get(form, float('nan')):.2f}" for line in lines]
    for part in ("step", *PARTS):
        name = "the step taken apart, ms" if part == "step" else f"  {part}"
        yield name, [f"{line['apart_ms'][part]:.2f}" for line in lines]
    for part in ("embedding forward", "embedding backward"):
        yield f"{part}, of the copy rate", [f"{line['share_of_copy_rate'][part]:.0%}" for line in lines]
    yield "dense part, of the matrix rate", [f"{line['share_of_matrix_rate']:.0%}" for line in lines]
    for name in WAITS:
        yield f"{name}, a step", [f"{line['waits_per_step'][name]:.1f}" for line in lines]


def show(result: Line) -> None:
    """The table."""
    known, lines = result["limits"], result["lines"]
    device = result["about"]["gpu"] or "CPU, tiny sizes: figures mean nothing"
    title = (
        f"{device}; copy {known['copy_bytes_per_s'] / 1e9:,.0f} GB/s, bf16 {known['bf16_flop_per_s'] / 1e12:,.1f} "
        f"TFLOP/s, fp32 {known['fp32_flop_per_s'] / 1e12:,.1f}"
    )
    table = plain_table(title, ["", *(f"{line['case']['name']}, {line['batch_size']:,}" for line in lines)])
    for name, figures in rows_of(lines):
        table.add_row(name, *figures)
    CONSOLE.print(table)


def draw(result: Line, path: Path) -> None:
    """The parts of the step, stacked, one bar for each case and batch size."""
    lines = result["lines"]
    drawn, (axis,) = figure(wide=7.5, high=4.2)
    names = [f"{line['case']['name']}\n{line['batch_size']:,}" for line in lines]
    below = [0.0] * len(lines)
    for part in PARTS:
        heights = [line["apart_ms"][part] for line in lines]
        if max(heights) > 0.02 * max(line["apart_ms"]["step"] for line in lines):
            axis.bar(names, heights, bottom=below, label=part, width=0.6)
            below = [at + height for at, height in zip(below, heights, strict=True)]
    axis.set(ylabel="ms of a step, nothing overlapping", xlabel="case and batch size")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save(drawn, path)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="instead of each case's own")
    parser.add_argument("--steps", type=int, default=50, help="that are measured (%(default)s)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the dense part")
    parser.add_argument("--cpu-dry-run", action="store_true", help="tiny sizes on the CPU: does the code run?")
    parser.add_argument("--out", type=Path, required=True, help="all results as JSON")
    parser.add_argument("--picture", type=Path, help="draw it, too (PNG)")
    given = parser.parse_args()
    if not (given.cpu_dry_run or torch.cuda.is_available()):
        raise SystemExit("gpu.py needs a CUDA device, and torch finds none; --cpu-dry-run tries the code on the CPU")
    forms = tuple(f for f in given.forms if f != "CUDA graphs" or not given.cpu_dry_run)
    with ranks("cpu" if given.cpu_dry_run else "cuda") as where:
        known = limits(where.device, given.cpu_dry_run)
        result: Line = {"about": about(), "dry_run": given.cpu_dry_run, "limits": known, "lines": []}
        for case in TINY if given.cpu_dry_run else CASES:
            if case.name not in given.cases:
                continue
            case = replace(case, batch_sizes=tuple(given.batch_sizes or case.batch_sizes))
            for batch_size in case.batch_sizes:
                result["lines"].append(measure(case, batch_size, where, given.steps, known, forms))
                given.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    if given.picture:
        draw(result, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
