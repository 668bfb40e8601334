"""How fast this package trains, and where a step's time goes, on a synthetic world of any size.

One setting, on one rank or under torchrun:

    python benchmarks/training.py --vocabulary 1_000_000
    torchrun --nproc_per_node 2 benchmarks/training.py --vocabulary 1_000_000 --trunk ple --json two.json

Lists of settings and of numbers of ranks: each runs in processes of its own, in turn, as often as --repeats says.  Each
rank then has one thread, unless --threads says more: one rank of one thread is not what a machine of several cores can
do.  All is in fp32.

    python benchmarks/training.py --ranks 1,2,4 --vocabulary 100_000,1_000_000,30_000_000 --out results/training.jsonl
    python benchmarks/training.py --show results/training.jsonl

samples/s and ms per step are measured on the train pipeline of `mtcl train`, with nothing added but a clock.  After
that, further steps are made by hand with no overlap and a clock around each part (on CUDA the device is waited for at
each): these are the parts, means over steps and ranks, and they add up to the step taken apart, not to the pipelined
step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml
from document import CONSOLE
from measure import Line, about, benchmark, counted, counts, from_zero, in_process, options, peak_rss
from step_parts import PARTS, take_apart
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from training_tables import draw, tables
from volume import Traffic, by_formula, placed

from mtcl_torchrec.config import RunConfig, parse_run
from mtcl_torchrec.config.sharding import ShardingKind
from mtcl_torchrec.data.batch import MTBatch
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.splits import load_splits
from mtcl_torchrec.data.synthetic_files import write_parquet
from mtcl_torchrec.data.training_rows import MemoryRows, TrainingRows
from mtcl_torchrec.data.worlds import READY_WORLDS, ready_world, world_run
from mtcl_torchrec.models import MTCLTrain
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.loop import build_pipeline, parallelise
from mtcl_torchrec.training.optimizers import build_schedule
from mtcl_torchrec.training.sharding import Ranks, local_shards, ranks, tables_of

INPUTS = ("memory", "generated", "parquet")
MEMORY_ROWS = 500_000


@dataclass(frozen=True)
class Setting:
    """What one run measures; the fields are the options of the command line."""

    world: str = "shop"
    vocabulary: int = 1_000_000
    dim: int = 16
    batch_size: int = 4096
    steps: int = 60
    warmup_steps: int = 10
    apart_steps: int = 20
    trunk: str = "mmoe"
    experts: int = 4
    expert_layers: str = "128,64"
    sharding: str = "auto"
    table_optimizer: str = "rowwise_adagrad"
    pipeline: str = "sparse_dist"
    input: str = "memory"
    rows: int = 0
    window: int = 65_536
    workers: int = 1
    device: str = "auto"

    def rows_for(self, world_size: int) -> int:
        """Rows of the training split, whole steps of all ranks."""
        step = self.batch_size * world_size
        needed = step * (self.warmup_steps + self.steps + self.apart_steps + 4)  # a pipeline reads ahead
        wanted = self.rows or (min(needed, MEMORY_ROWS) if self.input == "memory" else needed)
        return max(wanted // step, 1) * step


# ---------------------------------------------------------------------- one setting, on this process's ranks


def configured(setting: Setting, world_size: int, files: Path) -> RunConfig:
    """The run that `mtcl init --world` would write, with this setting's sizes.

    Args:
        files: folder of the Parquet files, for that input.
    """
    size = {"num_users": setting.vocabulary, "num_items": setting.vocabulary}
    raw = yaml.safe_load(world_run(setting.world, rows=setting.rows_for(world_size), val_rows=1, test_rows=0,
                                   factors=False, **size))  # fmt: skip
    if setting.input == "parquet":
        raw["data"] = {"train": [str(files / "train.parquet")], "val": [str(files / "val.parquet")], "stream": True}
    raw["data"] |= {"window": setting.window, "workers": setting.workers}
    for feature in raw["schema"]["features"]:
        if feature["name"] in (raw["schema"]["user"], raw["schema"]["item"]):
            feature["embedding_dim"] = setting.dim
    experts = {"mmoe": "num_experts", "ple": "shared_experts"}.get(setting.trunk)
    layers = [int(width) for width in setting.expert_layers.split(",")]
    raw["model"]["trunk"] = {"kind": setting.trunk, "expert_layers": layers}
    if experts:
        raw["model"]["trunk"][experts] = setting.experts
    raw["optimizers"]["tables"]["kind"] = setting.table_optimizer
    raw["sharding"] = {} if setting.sharding == "auto" else {"kinds": setting.sharding}
    raw["training"] |= {"batch_size": setting.batch_size, "pipeline": setting.pipeline}
    return parse_run(yaml.safe_dump(raw))


def training_rows(setting: Setting, run: RunConfig, files: Path, where: Ranks) -> tuple[TrainingRows, Preprocessor]:
    """The training split by the setting's kind of input, and what was learnt from it."""
    preprocessor = Preprocessor(run.data_schema, run.statistics)
    rows = setting.rows_for(where.world_size)
    size = {"num_users": setting.vocabulary, "num_items": setting.vocabulary}
    world = ready_world(setting.world, horizon=rows + 1, **size)
    if setting.input == "parquet" and where.first:
        write_parquet(world, files / "train.parquet", rows=rows, row_group_size=setting.window)
        write_parquet(world, files / "val.parquet", rows=1, start=rows)
    where.barrier()
    splits = load_splits(run, preprocessor, say=lambda _: None)
    if setting.input != "memory":
        return splits.train, preprocessor
    encoded = preprocessor.encode(Rows(world.rows(np.arange(rows))))
    return MemoryRows(encoded, seed=run.training.seed), preprocessor


class Batches(Iterator[MTBatch]):
    """The batches of epoch after epoch, and how long they were waited for."""

    def __init__(self, rows: TrainingRows, where: Ranks, batch_size: int) -> None:
        cut = {"rank": where.rank, "world_size": where.world_size, "batch_size": batch_size}
        self._batches = (batch for epoch in count(1) for batch in rows.batches(Position(epoch), **cut))
        self.waited_s = 0.0

    def __next__(self) -> MTBatch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited_s += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """End the threads that read ahead."""
        self._batches.close()


def measure(setting: Setting, where: Ranks) -> dict[str, Any]:
    """Train a while and measure; every rank calls this and gets the result."""
    with tempfile.TemporaryDirectory(prefix="mtcl-benchmark-") as temporary:
        files = Path(str(where.broadcast(temporary)))
        started = time.perf_counter()
        run = configured(setting, where.world_size, files)
        rows, preprocessor = training_rows(setting, run, files, where)
        data_s = time.perf_counter() - started
        batches = Batches(rows, where, setting.batch_size)
        try:
            own = _train(setting, run, preprocessor, batches, where) | {"data_s": data_s}
        finally:
            batches.close()
        where.barrier()
    return _over_ranks(setting, where.gather(own))


def _train(
    setting: Setting, run: RunConfig, preprocessor: Preprocessor, batches: Batches, where: Ranks
) -> dict[str, Any]:
    """What this rank measured."""
    started = time.perf_counter()
    model = build_model(run.model, preprocessor.encoder, run.fusion, seed=run.training.seed)
    sharded, optimizer = parallelise(
        MTCLTrain(model), where, run.optimizers, sharding=run.sharding, batch_size=setting.batch_size
    )
    model_s = time.perf_counter() - started
    total = setting.warmup_steps + setting.steps + setting.apart_steps
    schedule = build_schedule(optimizer, run.training.warmup_steps, total, run.training.decay)
    pipeline = build_pipeline(sharded, optimizer, where.device, run.training.pipeline)
    sharded.train()
    for _ in range(setting.warmup_steps):
        pipeline.progress(batches)
        schedule.step()
    _settle(where)
    batches.waited_s = 0.0
    ends = [time.perf_counter()]
    for _ in range(setting.steps):
        pipeline.progress(batches)
        schedule.step()
        ends.append(time.perf_counter())
    _settle(where)
    seconds, waited = time.perf_counter() - ends[0], batches.waited_s
    if isinstance(pipeline, TrainPipelineSparseDist):
        pipeline.detach()
    apart = take_apart(sharded, optimizer, schedule, batches, where.device, setting.apart_steps)
    dense = sum(p.numel() for p in model.tower.parameters())
    sent, computed = _volume(setting, sharded, optimizer, batches, where, dense)
    cuda = where.device.type == "cuda"
    return {
        "seconds": seconds,
        "step_ms": (np.diff(ends) * 1000).tolist(),
        "waited_s": waited,
        "apart_ms": apart,
        "model_s": model_s,
        "peak_rss_bytes": peak_rss(),
        "peak_cuda_bytes": torch.cuda.max_memory_allocated(where.device) if cuda else None,
        "table_bytes": _table_bytes(sharded),
        "dense_parameters": dense,
        "sent_bytes": sent,
        "computed_bytes": computed,
    }


def _volume(
    setting: Setting, model: DistributedModelParallel, optimizer: Any, batches: Batches, where: Ranks, dense: int
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Bytes that this rank sends in one step, and what all ranks must send by formula; see `volume.py`."""
    with Traffic() as traffic:
        optimizer.zero_grad()
        loss, _ = model(next(batches).to(where.device))
        loss.backward()
        optimizer.step()
    try:
        cut = {"ranks": where.world_size, "batch_size": setting.batch_size}
        return dict(traffic.bytes), by_formula(placed(model), dense, **cut)
    except NotImplementedError:
        return dict(traffic.bytes), None


def _settle(where: Ranks) -> None:
    """Until the devices of all ranks have done what they were given."""
    if where.device.type == "cuda":
        torch.cuda.synchronize(where.device)
    where.barrier()


def _table_bytes(model: DistributedModelParallel) -> int:
    """This rank's embedding rows, without optimizer state."""
    shards = [shard for table in tables_of(model).values() for shard, *_ in local_shards(table)]
    return sum(shard.numel() * shard.element_size() for shard in shards)


def _over_ranks(setting: Setting, of_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One result from those of all ranks."""
    seconds = max(own["seconds"] for own in of_ranks)
    steps = np.array([own.pop("step_ms") for own in of_ranks]).max(0)
    world_size = len(of_ranks)
    return {
        "ranks": world_size,
        "setting": asdict(setting) | {"rows": setting.rows_for(world_size)},
        "samples_per_s": setting.batch_size * world_size * setting.steps / seconds,
        "step_ms": {
            "mean": seconds * 1000 / setting.steps,
            "median": float(np.median(steps)),
            "p90": float(np.quantile(steps, 0.9)),
            "waiting for input": statistics.fmean(own["waited_s"] for own in of_ranks) * 1000 / setting.steps,
        },
        "apart_ms": {part: statistics.fmean(own["apart_ms"][part] for own in of_ranks) for part in ("step", *PARTS)},
        "setup_s": {name: max(own[f"{name}_s"] for own in of_ranks) for name in ("data", "model")},
        "peak_rss_bytes": max(own["peak_rss_bytes"] for own in of_ranks),
        "peak_cuda_bytes": max(own["peak_cuda_bytes"] or 0 for own in of_ranks) or None,
        "table_bytes": sum(own["table_bytes"] for own in of_ranks),
        "sent_bytes": {
            part: sum(own["sent_bytes"].get(part, 0.0) for own in of_ranks)
            for part in sorted({part for own in of_ranks for part in own["sent_bytes"]})
        },
        "computed_bytes": of_ranks[0]["computed_bytes"],
        "of_ranks": of_ranks,
    }


# ---------------------------------------------------------------------- several settings, and what is shown


def work(what: Line) -> Line | None:
    """One setting on this process's ranks; the first tells."""
    with ranks(what["setting"]["device"]) as where:
        result = measure(Setting(**what["setting"]), where)
        return {name: value for name, value in result.items() if name != "setting"} if where.first else None


def started(what: Line, *, timeout_s: float, threads: int | None) -> Line | None:
    """The same in processes of its own; one thread each where nothing is said, so that ranks can be compared."""
    result = in_process(
        Path(__file__).resolve(), what, timeout_s=timeout_s, threads=threads or 1, ranks=what["ranks"]
    )  # fmt: skip
    if result:
        CONSOLE.print(f"{what['ranks']} × {what['setting']['batch_size']:,} rows: {result['samples_per_s']:,.0f}/s")
    return result


def _widths(text: str) -> str:
    return ",".join(map(str, counts(text)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, default = parser.add_argument, Setting()
    option("--world", choices=READY_WORLDS, default=default.world)
    option("--vocabulary", "--rows-per-table", type=counts, default=[default.vocabulary], metavar="N[,N…]",
           help="users, and as many items: rows of the two large tables")  # fmt: skip
    option("--dim", type=counted, default=default.dim, help="of the two large tables")
    option("--batch-size", type=counted, default=default.batch_size, help="rows of a step, for each rank")
    option("--steps", type=counted, default=default.steps, help="that are measured")
    option("--warmup-steps", type=from_zero, default=default.warmup_steps, help="before that")
    option("--apart-steps", type=counted, default=default.apart_steps, help="after that, taken apart")
    option("--trunk", choices=["mmoe", "ple", "shared_bottom", "single_task"], default=default.trunk)
    option("--experts", type=counted, default=default.experts, help="of MMoE; shared ones of PLE")
    option("--expert-layers", type=_widths, default=default.expert_layers, metavar="W[,W…]", help="widths")
    option("--sharding", choices=["auto", *get_args(ShardingKind)], default=default.sharding)
    option("--table-optimizer", choices=["rowwise_adagrad", "adagrad", "sgd", "adam"], default=default.table_optimizer)
    option("--pipeline", choices=["sparse_dist", "base"], default=default.pipeline)
    option("--input", default=[default.input], type=lambda text: text.split(","), metavar="KIND[,KIND…]",
           help="memory: rows encoded once, what the model alone can do; generated: computed and encoded while "
           "training; parquet: written first, then read and encoded as a stream")  # fmt: skip
    option("--rows", type=from_zero, default=default.rows, help="of the training split; 0: as many as are trained on, "
           f"in memory {MEMORY_ROWS:,} at most")  # fmt: skip
    option("--window", type=counted, default=default.window, help="rows of a stream that are read at once")
    option("--workers", type=counted, default=default.workers, help="threads of each rank that read ahead of a stream")
    option("--device", choices=["auto", "cpu", "cuda"], default=default.device)
    option("--ranks", type=counts, metavar="N[,N…]", help="numbers of ranks to start; without it, and under torchrun, "
           "one setting is measured in this process")  # fmt: skip
    option("--json", type=Path, help="of one setting in this process: write its result")
    options(parser, repeats=1, timeout_s=600)
    return parser


def main() -> int:
    """Measure, print, keep; 1 where a run of several failed."""
    parser = _parser()
    given = parser.parse_args()
    wrong = [kind for kind in given.input if kind not in INPUTS]
    if wrong:
        parser.error(f"--input: {wrong[0]!r} is none of {', '.join(INPUTS)}")
    single = {f.name: getattr(given, f.name) for f in fields(Setting) if f.name not in ("vocabulary", "input")}
    settings = [
        replace(Setting(**single), input=source, vocabulary=vocabulary)
        for source, vocabulary in product(given.input, given.vocabulary)
    ]
    if given.worker or given.out or given.show:
        todo = [{"ranks": n, "setting": asdict(setting)} for setting in settings for n in given.ranks or [1]]
        return benchmark(
            parser, given, work=work, todo=lambda: todo, tables=tables, draw=draw,
            one=lambda what: started(what, timeout_s=given.timeout, threads=given.threads),
        )  # fmt: skip
    if given.ranks or len(settings) > 1:
        parser.error("several settings need --out FILE")
    with ranks(given.device) as where:
        result, first = measure(settings[0], where), where.first
    if first:
        line = {"what": {"ranks": result["ranks"], "setting": result["setting"]}, "repeat": 0, **result}
        for table in tables([line]):
            table.print()
        if given.json:
            given.json.write_text(json.dumps({"about": about(), "parts": PARTS, "result": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
