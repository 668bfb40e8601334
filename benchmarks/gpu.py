"""How a training step on one large GPU (H200: 141 GB, 4.8 TB/s) spends its time, against what the device can do.

    python benchmarks/gpu.py --out results/gpu.jsonl
    python benchmarks/gpu.py --cases middle --batch-sizes 8192 16384 --out try.jsonl
    python benchmarks/gpu.py --cpu-dry-run --forms eager --out try.jsonl

NOT YET RUN ON A GPU: its authors had none.  What is tested is that the code runs, in tiny sizes on a CPU
(--cpu-dry-run); its figures there mean nothing.

Each case and batch size is a process of its own.  Measured are steps of the train pipeline of `mtcl train` (batches
that lie on the device), with the dense part as it is, compiled as `training.compile: dense` does it, and compiled with
CUDA graphs; the eager step taken apart by CUDA events (`step_parts.py`); how often, and where, the host waited for the
device in a step, by the profiler and by torch's own warnings.  One wait is TorchRec's: for the sizes of what ranks
exchange of the next batch, on a stream of its own.

"roofline" is the least that a step could take: the bytes that lookups, their update and Adam must move at the measured
rate of a copy (read and written bytes both count), and the dense part's floating-point operations at the measured rate
of a large bf16 product, one after the other.  A row that a batch looks up several times is read and written once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from gpu_tables import FORMS, WAITS, draw, tables
from measure import Line, benchmark, counted, options
from step_parts import take_apart
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, MMoE, MTCLTrain, Task
from mtcl_torchrec.config import DenseOptimizerConfig, OptimizersConfig, TableOptimizerConfig
from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.training.compiling import compiled
from mtcl_torchrec.training.loop import build_pipeline, parallelise, plain_model
from mtcl_torchrec.training.optimizers import build_schedule
from mtcl_torchrec.training.sharding import Ranks, ranks

WAITED = "called a synchronizing CUDA operation"  # says torch
WATCHED = "the steps that are watched"
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
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()  # 8 GB, for tables
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
        self.where, self.device = where, where.device
        self.model, self.optimizer = parallelise(MTCLTrain(model), where, config, batch_size=batch_size)
        self.plain = plain_model(self.model)
        self.schedule = build_schedule(self.optimizer, 0, 10**6, "none")
        made = [_batch(case, batch_size, keys, where.device, seed) for seed in range(BATCHES)]
        self.distinct = statistics.fmean(map(_distinct, made))
        self.batches = cycle(made)
        self.model.train()

    def seconds(self, steps: int, form: str = "eager") -> float:
        """A step of the pipeline, once it is warm, with the dense part in this form."""
        with self._in_form(form), self._pipeline(form) as progress:
            for _ in range(max(steps // 4, 5)):  # CUDA graphs are recorded in the second
                progress()
            self._settle()
            started = time.perf_counter()
            for _ in range(steps):
                progress()
            self._settle()
            return (time.perf_counter() - started) / steps

    @contextmanager
    def _in_form(self, form: str) -> Iterator[None]:
        tower = self.plain.tower
        with compiled(self.plain, "dense", self.where) if form == "compiled" else nullcontext():
            if form == "graphs":
                tower.compile(mode="reduce-overhead")
            try:
                yield
            finally:
                tower._compiled_call_impl = None
        if form != "eager":
            torch.compiler.reset()

    @contextmanager
    def _pipeline(self, form: str = "eager") -> Iterator[Callable[[], Any]]:
        pipeline = build_pipeline(self.model, self.optimizer, self.device)

        def progress() -> Any:
            if form == "graphs":
                torch.compiler.cudagraph_mark_step_begin()  # what the last step returned is not read any more
            return pipeline.progress(self.batches)

        try:
            yield progress
        finally:
            pipeline.detach()

    def waits(self, steps: int) -> dict[str, float]:
        """Events of the profiler in which the host waits for the device, in each step."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with self._pipeline() as progress:
            for _ in range(3):
                progress()
            with profile(activities=activities) as watched, record_function(WATCHED):
                for _ in range(steps):
                    progress()
        counts = counted_within(watched, WAITS)
        return {name: times / steps for name, times in counts.items()}

    def waits_at(self, steps: int) -> dict[str, float]:
        """Where in the code the host waits for the device, times a step, by torch's own warnings."""
        with self._pipeline() as progress:
            for _ in range(3):
                progress()
            with waiting_places(steps) as places:
                for _ in range(steps):
                    progress()
        return places

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
    sparse = KeyedJaggedTensor(keys, ids, lengths=ones)
    sparse.offset_per_key()  # known of a batch that comes from the host; asked of a GPU, it is waited for
    return MTBatch(torch.empty(batch_size, 0, device=device), sparse, labels)


def _distinct(batch: MTBatch) -> int:
    """Rows of all tables that a batch looks up."""
    features = batch.sparse_features.values().view(len(batch.sparse_features.keys()), -1)
    return sum(len(ids.unique()) for ids in features)


def counted_within(watched: profile, names: Sequence[str]) -> dict[str, int]:
    """How often each of these events began within the block that is marked as WATCHED.

    The profiler itself waits for the device when it ends, which is not of the steps.
    """
    events = watched.events() or []
    end = max(of.time_range.end for of in events if of.name == WATCHED and of.device_type == DeviceType.CPU)
    counts = Counter(of.name for of in events if of.time_range.start < end)
    return {name: counts[name] for name in names}


@contextmanager
def waiting_places(steps: int) -> Iterator[dict[str, float]]:
    """Place -> times a step, once the block is left: where the host waited for a CUDA device in it."""
    found: dict[str, float] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode(before)
    places = Counter(
        f"{'/'.join(Path(of.filename).parts[-3:])}:{of.lineno}" for of in caught if WAITED in str(of.message)
    )
    found |= {place: times / steps for place, times in places.most_common()}


def least_bytes(case: Case, batch_size: int, distinct: float, dense_parameters: int) -> dict[str, float]:
    """What a step must move at least.

    Args:
        distinct: rows of tables that a batch looks up, each counted once.
        dense_parameters: each is read and written by Adam with its two averages, and its gradient read.

    Example:
        >>> least_bytes(Case("one", 1, 100, 4, (2,)), 2, 1.0, 10)
        {'embedding forward': 64.0, 'embedding backward': 72.0, 'optimizer': 280}
    """
    rows, row = case.features * batch_size, 4 * case.dim
    return {
        "embedding forward": distinct * row + rows * (8 + row),  # rows and ids are read, pooled rows written
        # Gradients of pooled rows are read; rows and the one number that the optimizer keeps of each, read and written.
        "embedding backward": rows * row + distinct * (2 * row + 8),
        "optimizer": 7 * 4 * dense_parameters,
    }


def work(what: Line) -> Line:
    """Everything about one case and batch size, in this process."""
    [case] = [case for case in (TINY if what["dry_run"] else CASES) if case.name == what["case"]]
    with ranks("cpu" if what["dry_run"] else "cuda") as where:
        return measured(case, what, where)


def measured(case: Case, what: Line, where: Ranks) -> Line:
    """The same on this rank."""
    batch_size, steps = what["batch_size"], what["steps"]
    known = limits(where.device, what["dry_run"])
    training = Training(case, batch_size, where)
    step_s, failed = {"eager": training.seconds(steps)}, {}
    apart = take_apart(
        training.model, training.optimizer, training.schedule, training.batches, where.device, max(steps // 2, 2)
    )
    watched = min(steps, 5)
    waits, waits_at, flop = training.waits(watched), training.waits_at(watched), training.flop()
    cuda = where.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(where.device) if cuda else None
    for form in (form for form in FORMS if form in what["forms"] and form != "eager"):
        try:
            step_s[form] = training.seconds(steps, form)
        except Exception as error:  # whatever a compiler meets: the rest is measured all the same
            failed[form] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
    moved = least_bytes(case, batch_size, training.distinct, sum(p.numel() for p in training.plain.tower.parameters()))
    roofline_s = {part: of / known["copy_bytes_per_s"] for part, of in moved.items()}
    roofline_s["dense part"] = flop / known["bf16_flop_per_s"]
    dense_ms = apart["trunk"] + apart["heads"] + apart["dense backward"]
    fastest_s = min(step_s.values())
    return {
        "limits": known, "step_ms": {form: s * 1000 for form, s in step_s.items()}, "failed": failed,
        "samples_per_s": batch_size / fastest_s, "apart_ms": apart, "distinct_rows": training.distinct,
        "bytes": moved, "dense_flop": flop, "roofline_ms": {part: s * 1000 for part, s in roofline_s.items()},
        "share_of_roofline": sum(roofline_s.values()) / fastest_s,
        "share_of_copy_rate": {
            part: 1000 * roofline_s[part] / apart[part] for part in ("embedding forward", "embedding backward")
        },
        "share_of_matrix_rate": 1000 * roofline_s["dense part"] / dense_ms,
        "waits_per_step": waits, "waits_at": waits_at, "peak_cuda_bytes": peak,
    }  # fmt: skip


# ---------------------------------------------------------------------- the command


def todo(given: argparse.Namespace) -> list[Line]:
    """Every case in each of its batch sizes."""
    return [
        {"case": case.name, "batch_size": batch_size, "steps": given.steps, "forms": list(given.forms),
         "dry_run": given.cpu_dry_run}
        for case in (TINY if given.cpu_dry_run else CASES) if case.name in given.cases
        for batch_size in given.batch_sizes or case.batch_sizes
    ]  # fmt: skip


def main() -> int:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--batch-sizes", type=counted, nargs="+", help="instead of each case's own")
    parser.add_argument("--steps", type=counted, default=50, help="that are measured (%(default)s)")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the dense part; eager always"
    )
    parser.add_argument("--cpu-dry-run", action="store_true", help="tiny sizes on the CPU: does the code run?")
    options(parser, repeats=1, timeout_s=1200)
    given = parser.parse_args()
    if not (given.cpu_dry_run or given.worker or given.show or torch.cuda.is_available()):
        raise SystemExit("gpu.py needs a CUDA device, and torch finds none; --cpu-dry-run tries the code on the CPU")
    if given.cpu_dry_run:
        given.forms = [form for form in given.forms if form != "graphs"]
    return benchmark(parser, given, work=work, todo=lambda: todo(given), tables=tables, draw=draw)


if __name__ == "__main__":
    sys.exit(main())
