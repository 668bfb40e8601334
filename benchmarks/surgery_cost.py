"""What gradient surgery costs: time of a training step with each kind and cut, against the plain sum.

    python benchmarks/surgery_cost.py --batch-size 2048
    torchrun --nproc_per_node 2 benchmarks/surgery_cost.py --cases upgrad/trunk,upgrad/tables

All cases are trained in one process, each with a model of its own, and their steps are interleaved: in every round each
case takes one step, in an order that moves on by one from round to round.  Shown are the median step and the median,
over rounds, of its ratio to the plain sum's step of the same round; on a CPU in time of the processor, which others on
the machine disturb less than they do the clock on the wall (--clock wall for that one).  The least time of a step is
what is nearest to a machine of one's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtcl_torchrec import MTCL, MMoE, MTBatch, MTCLTrain, Task
from mtcl_torchrec.config import OptimizersConfig
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.modules.balance.surgery import KINDS, GradientSurgery
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.sharding import Ranks, ranks

DIM, DENSE = 16, 13
PLAIN = "none"
CASES = [PLAIN, *(f"{kind}/trunk" for kind in KINDS), *(f"upgrad/{cut}" for cut in ("embeddings", "both", "tables"))]


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


def _processor(device: torch.device) -> float:
    return time.process_time()


def _wall(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2048, help="rows a step and rank")
    parser.add_argument("--rows", type=int, default=100_000, help="of each table")
    parser.add_argument("--features", type=int, default=26, help="single ids but for one bag, each with its table")
    parser.add_argument("--tasks", type=int, default=3, help="two at least")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--expert-layers", default="128,64")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--pipeline", choices=["sparse_dist", "base"], default="sparse_dist")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    parser.add_argument("--cases", default=",".join(CASES), help="kind/cut, ...; the plain sum is always the first")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    options.cases = [PLAIN, *(case for case in options.cases.split(",") if case != PLAIN)]
    with ranks(options.device) as where:
        found = measure(options, where)
        if where.first:
            table = plain_table(
                f"{where.world_size} ranks, {options.batch_size} rows", ["case", "ms a step", "least", "ratio"]
            )
            for case, of in found.items():
                table.add_row(case, f"{of['median_ms']:.2f}", f"{of['least_ms']:.2f}", f"{of['ratio']:.3f}")
            Console(highlight=False).print(table)
            if options.json:
                about = {name: str(value) for name, value in vars(options).items() if name != "json"}
                options.json.write_text(json.dumps({"options": about, "ranks": where.world_size, "cases": found}))


if __name__ == "__main__":
    main()
