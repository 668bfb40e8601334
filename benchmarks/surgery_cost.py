"""What gradient surgery costs: time of a training step with each kind and cut, against the plain sum.

    python benchmarks/surgery_cost.py --out results/surgery_cost.jsonl
    python benchmarks/surgery_cost.py --ranks 2 --cases upgrad/trunk,upgrad/tables --steps 10 --out try.jsonl

All cases are trained in one process, each with a model of its own, and their steps are interleaved: in every round each
case takes one step, in an order that moves on by one from round to round.  Shown are the median step and the median,
over rounds, of its ratio to the plain sum's step of the same round; on a CPU in time of the processor, which others on
the machine disturb less than they do the clock on the wall (--clock wall for that one).  The least time of a step is
what is nearest to a machine of one's own.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from document import Table, ranged
from measure import Line, benchmark, counted, figure, in_process, options, save
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec import MTCL, MMoE, MTBatch, MTCLTrain, Task
from mtcl_torchrec.config import OptimizersConfig
from mtcl_torchrec.modules.balance.surgery import KINDS, CutAt, GradientSurgery
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.sharding import Ranks, ranks

DIM, DENSE = 16, 13
PLAIN = "none"
CUTS = get_args(CutAt)
CASES = [PLAIN, *(f"{kind}/trunk" for kind in KINDS), *(f"upgrad/{cut}" for cut in CUTS if cut != "trunk")]


def batches(size: int, rows: int, features: int, tasks: int, device: torch.device, count: int = 8) -> list[MTBatch]:
    """Batches of single ids and one bag; the labels of the first two tasks partly contradict each other."""
    made = []
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.ones(features, size, dtype=torch.int64)
        lengths[-1] = torch.randint(0, 6, (size,), generator=g)
        ids = torch.randint(rows, (int(lengths.sum()),), generator=g)
        sparse = KeyedJaggedTensor([f"f{i}" for i in range(features)], ids, lengths=lengths.flatten())
        click = torch.randint(2, (size,), generator=g).float()
        other = torch.where(torch.rand(size, generator=g) < 0.7, 1 - click, click)
        more = torch.randint(2, (size, tasks - 2), generator=g).float()
        labels = torch.cat([click[:, None], other[:, None], more], 1)
        made.append(MTBatch(torch.randn(size, DENSE, generator=g), sparse, labels).to(device))
    return made


def train_module(case: str, rows: int, features: int, tasks: int, experts: int, layers: list[int]) -> MTCLTrain:
    """The model of a case: ``none``, or kind/cut."""
    tables = [
        EmbeddingBagConfig(
            name=f"t{i}", num_embeddings=rows, embedding_dim=DIM, feature_names=[f"f{i}"],
            pooling=PoolingType.SUM if i < features - 1 else PoolingType.MEAN,
        )
        for i in range(features)
    ]  # fmt: skip
    torch.manual_seed(0)
    model = MTCL(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        DENSE,
        MMoE(experts, layers),
        [Task.binary(f"task{i}") for i in range(tasks)],
    )
    if case == PLAIN:
        return MTCLTrain(model)
    kind, cut = case.split("/")
    return MTCLTrain(model, gradient_surgery=GradientSurgery(kind, cut=cut))  # type: ignore[arg-type]


def measure(options: argparse.Namespace, where: Ranks) -> dict[str, Any]:
    """Milliseconds of each case's steps."""
    data = batches(options.batch_size, options.rows, options.features, options.tasks, where.device)
    layers = [int(width) for width in options.expert_layers.split(",")]
    running = {}
    for case in options.cases:
        model, optimizer = parallelise(
            train_module(case, options.rows, options.features, options.tasks, options.experts, layers), where,
            OptimizersConfig(), batch_size=options.batch_size,
        )  # fmt: skip
        model.train()
        pipeline = build_pipeline(model, optimizer, where.device, options.pipeline)
        running[case] = (pipeline, itertools.cycle(data))
    now = _processor if where.device.type == "cpu" and options.clock == "processor" else _wall
    times: dict[str, list[float]] = {case: [] for case in options.cases}
    for step in range(options.warmup_steps + options.steps):
        first = step % len(options.cases)
        for case in options.cases[first:] + options.cases[:first]:
            pipeline, endless = running[case]
            where.barrier()
            started = now(where.device)
            pipeline.progress(endless)
            if step >= options.warmup_steps:
                times[case].append((now(where.device) - started) * 1000)
    return {
        case: {
            "median_ms": statistics.median(of),
            "least_ms": min(of),
            "ratio": statistics.median(a / b for a, b in zip(of, times[options.cases[0]], strict=True)),
        }
        for case, of in times.items()
    }


def _is_case(text: str) -> bool:
    kind, _, cut = text.partition("/")
    return text == PLAIN or (kind in KINDS and cut in CUTS)


def _processor(device: torch.device) -> float:
    return time.process_time()


def _wall(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def work(what: Line) -> Line | None:
    """All cases in turn, on this process's ranks; the first tells."""
    with ranks(what["device"]) as where:
        found = measure(argparse.Namespace(**what), where)
        return {"cases": found} if where.first else None


def tables(lines: list[Line]) -> list[Table]:
    """A row for each case."""
    what, cells = lines[0]["what"], []
    for case in what["cases"]:
        of = [line["cases"][case] for line in lines]
        cells.append([case, *(ranged([one[name] for one in of]) for name in ("ratio", "median_ms", "least_ms"))])
    title = f"surgery: {what['ranks']} ranks, {what['batch_size']:,} rows a rank, {what['tasks']} tasks"
    return [Table(title, ["", "× the plain sum's step", "ms a step", "least"], cells)]


def draw(lines: list[Line], path: Path) -> None:
    """The ratio of each case."""
    drawn, (axis,) = figure(wide=6.4)
    cases = lines[0]["what"]["cases"]
    values = [statistics.median(line["cases"][case]["ratio"] for line in lines) for case in cases]
    axis.bar_label(axis.bar(cases, values), fmt="%.2f", fontsize=8)
    axis.tick_params(axis="x", labelsize=7, rotation=30)
    axis.set_ylabel("a step over the plain sum's", fontsize=8)
    save(drawn, path)


def main() -> int:
    """Measure what is missing, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--ranks", type=counted, default=1, help="(%(default)s)")
    option("--batch-size", type=counted, default=2048, help="rows a step and rank")
    option("--rows", type=counted, default=100_000, help="of each table")
    option("--features", type=counted, default=26, help="single ids but for one bag, each with its table")
    option("--tasks", type=counted, default=3, help="two at least")
    option("--experts", type=counted, default=4)
    option("--expert-layers", default="128,64")
    option("--steps", type=counted, default=40)
    option("--warmup-steps", type=counted, default=5)
    option("--pipeline", choices=["sparse_dist", "base"], default="sparse_dist")
    option("--device", choices=["auto", "cpu", "cuda"], default="auto")
    option("--clock", choices=["processor", "wall"], default="processor")
    option("--cases", default=",".join(CASES), help="kind/cut, ...; the plain sum is always the first")
    options(parser, repeats=1, timeout_s=1800)
    given = parser.parse_args()
    if given.tasks < 2:
        parser.error("--tasks: surgery needs two at least")
    wrong = [case for case in given.cases.split(",") if not _is_case(case)]
    if wrong:
        parser.error(f"--cases: {wrong[0]!r} is no kind/cut; kinds are {', '.join(KINDS)}, cuts {', '.join(CUTS)}")
    names = ("ranks", "batch_size", "rows", "features", "tasks", "experts", "expert_layers", "steps", "warmup_steps",
             "pipeline", "device", "clock")  # fmt: skip
    cases = [PLAIN, *(case for case in given.cases.split(",") if case != PLAIN)]
    what = {name: getattr(given, name) for name in names} | {"cases": cases}

    def one(what: Line) -> Line | None:
        several = what["ranks"] if what["ranks"] > 1 else None
        script = Path(__file__).resolve()
        return in_process(script, what, timeout_s=given.timeout, threads=given.threads or 1, ranks=several)

    return benchmark(parser, given, work=work, todo=lambda: [what], tables=tables, draw=draw, one=one)


if __name__ == "__main__":
    sys.exit(main())
