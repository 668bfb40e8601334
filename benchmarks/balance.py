"""Every architecture, loss weighting and gradient surgery beside the weighted sum and single-task twins of equal size.

    python benchmarks/balance.py --data kuairand --jobs 2 --out results/balance.jsonl    # train what is not there yet
    python benchmarks/balance.py --time results/balance_steps.json                       # what a step of each costs
    python benchmarks/balance.py --show results/balance.jsonl --steps results/balance_steps.json --picture b.png

Each method gets the same budget: every learning rate of --rates once (first seed), the best of which by mean validation
AUC trains the other seeds too.  A twin is the MMoE of the weighted sum, as large as it is, trained on one task alone.
Δm is the mean over the tasks of the relative gain on AUC − 0.5 over the twins' mean, on the test split, in percent.
A step's cost is the processor time of training steps, taken in turn by all methods, over that of the weighted sum.

Data: `kuairand`, three tasks of the demo with its features, in which every twin reads what the user did of *all* events
before; `kuairand_ids`, the same without these statistics; `agreeing` and `opposed`, synthetic, the two ends of a dial
for conflict.

Every finished training is a line of --out; a run that was interrupted goes on where it stopped.  Beside it, .json has
the figures and tables of the whole file, .png the picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from balance_methods import BY_NAME, HELPED, SUM, TASKS, TWIN, Training, configured
from balance_tables import as_lines, best_rate, draw, tables
from measure import about, appended, read, shown
from rich.console import Console


def main() -> None:
    """Train what is missing, or show what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(TASKS), default=["kuairand"])
    parser.add_argument("--methods", nargs="+", choices=[*BY_NAME, TWIN], metavar="METHOD", help="default: all of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0], help="factors on the dense learning rate")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each of one thread")
    parser.add_argument("--out", type=Path, help="JSON lines, one for each training; what is there is not done again")
    parser.add_argument("--show", type=Path, help="print the tables of such a file")
    parser.add_argument("--picture", type=Path, help="Δm of every method (PNG; default: beside --out)")
    parser.add_argument("--markdown", action="store_true", help="with --show: as Markdown")
    parser.add_argument("--small", action="store_true", help="a tenth of the rows, to try the script")
    parser.add_argument("--time", type=Path, help="measure the steps of --methods on KuaiRand, write them there")
    parser.add_argument("--rounds", type=int, default=40, help="with --time: steps of each method")
    parser.add_argument("--steps", type=Path, help="what --time wrote, for the tables")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.small)
    elif arguments.time:
        measured = step_times(arguments.methods or list(BY_NAME), arguments.rounds)
        arguments.time.write_text(json.dumps(measured, indent=1) + "\n")
    elif arguments.show or arguments.out:
        for data in () if arguments.show else arguments.data:
            sweep(data, arguments)
        steps = json.loads(arguments.steps.read_text()) if arguments.steps else {}
        out = arguments.out
        shown(
            as_lines(read(arguments.show or out)), lambda lines: tables(lines, steps), draw,
            picture=arguments.picture or (out.with_suffix(".png") if out else None),
            document=out.with_suffix(".json") if out else None, markdown=arguments.markdown,
        )  # fmt: skip
    else:
        parser.error("--out FILE to train, --show FILE to look")


def sweep(data: str, arguments: argparse.Namespace) -> None:
    """Train every method on one set of data: the first seed with every rate, then the best rate with the others."""
    names = [name for name in arguments.methods or [TWIN, *BY_NAME] if name != HELPED or data == "kuairand"]
    first, *others = arguments.seeds
    kinds = [(name, only) for name in names for only in (TASKS[data] if name == TWIN else (None,))]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        tried = [Training(data, name, rate, first, only) for name, only in kinds for rate in arguments.rates]
        _train_missing(tried, arguments, pool)
        results = [r for r in read(arguments.out) if r["seed"] == first and r["rate"] in arguments.rates]
        again = [
            Training(data, name, best_rate(results, data, name, only), seed, only)
            for seed in others
            for name, only in kinds
        ]
        _train_missing(again, arguments, pool)


def _train_missing(trainings: list[Training], arguments: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
    done = {(r["data"], r["method"], r["only"], r["rate"], r["seed"]) for r in read(arguments.out)}
    missing = [training for training in trainings if training.key not in done]
    workers = threading.local()
    for i, result in enumerate(pool.map(lambda t: _in_a_worker(t, arguments.small, workers), missing), 1):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        appended(arguments.out, result)
        aucs = " ".join(f"{task} {auc:.4f}" for task, auc in result["test"].items())
        what = f"{result['data']}: {result['method']} rate {result['rate']} seed {result['seed']}"
        print(f"{i}/{len(missing)} {what} in {result['seconds']:.0f} s: {aucs}", flush=True)


def _in_a_worker(training: Training, small: bool, workers: threading.local) -> dict[str, Any]:
    """The result of a training in this thread's process, of one thread, which takes one training after the other."""
    if not hasattr(workers, "process"):
        command = [sys.executable, __file__, "--worker"] + ["--small"] * small
        workers.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (of a process that lives as long as this one)
        workers.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=workers.errors, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    who = about()
    workers.process.stdin.write(json.dumps(training.__dict__) + "\n")
    workers.process.stdin.flush()
    for line in workers.process.stdout:
        if line.startswith("{"):
            return json.loads(line) | {"about": who}
    workers.errors.seek(0)
    raise SystemExit(f"{training}:\n{workers.errors.read()[-3000:]}")


def work(small: bool) -> None:
    """Train what the lines of standard input ask for, and answer each with a line; ends with the input."""
    for line in sys.stdin:
        print(json.dumps(train_one(Training(**json.loads(line)), small)), flush=True)


def train_one(training: Training, small: bool) -> dict[str, Any]:
    """Train one model and say how well it predicts."""
    from mtcl_torchrec.training.finished import FinishedRun
    from mtcl_torchrec.training.run import train_run

    with tempfile.TemporaryDirectory() as temporary:
        run = configured(training, small, Path(temporary))
        started = time.perf_counter()
        result = train_run(run, Path(temporary) / "run", device="cpu", console=Console(quiet=True))
        parameters = sum(p.numel() for p in FinishedRun.load(Path(temporary) / "run").model.tower.parameters())
        aucs = {
            split: {task: result.evaluations[split].tasks[task]["auc"] for task in TASKS[training.data]
                    if training.only in (None, task)}
            for split in ("val", "test")
        }  # fmt: skip
    return (
        training.__dict__
        | aucs
        | {
            "dense_parameters": parameters,
            "epoch": result.history.best_epoch,
            "train_seconds": round(sum(result.history.seconds), 2),
            "seconds": round(time.perf_counter() - started, 1),
        }
    )


def step_times(names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Processor time of training steps on KuaiRand, those of all methods in turn: method -> milliseconds and ratio.

    The ratio is the median, over the rounds, to the weighted sum's step of the same round.
    """
    from mtcl_torchrec.data.batch import global_batches, iterate
    from mtcl_torchrec.data.preprocessing import Preprocessor
    from mtcl_torchrec.data.splits import load_splits
    from mtcl_torchrec.models import MTCLTrain
    from mtcl_torchrec.training.build import build_loss_weighting, build_model, build_surgery, for_modules
    from mtcl_torchrec.training.loop import build_pipeline, parallelise
    from mtcl_torchrec.training.sharding import ranks

    names = [SUM, *(name for name in names if name != SUM)]
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary, ranks("cpu") as where:
        pipelines, encoded = {}, {}
        for name in names:
            run = configured(Training("kuairand", name, 1.0, 0), False, Path(temporary))
            asked = tuple(task.name for task in run.data_schema.tasks)
            if asked not in encoded:  # the same rows for methods of the same tasks
                preprocessor = Preprocessor(run.data_schema, run.statistics)
                splits = load_splits(run, preprocessor, say=lambda _: None)
                rows = splits.encoded["val"]
                some = global_batches(len(rows), run.training.batch_size)[:16]
                encoded[asked] = preprocessor.encoder, list(iterate(rows, some))
            encoder, batches = encoded[asked]
            optimizers, sharding = for_modules(run)
            module = MTCLTrain(
                build_model(run.model, encoder, run.fusion),
                loss_weighting=build_loss_weighting(run.balance.weighting, len(asked)),
                gradient_surgery=build_surgery(run.balance.surgery),
            )
            model, optimizer = parallelise(
                module, where, optimizers, sharding=sharding, batch_size=run.training.batch_size
            )
            model.train()
            pipelines[name] = build_pipeline(model, optimizer, where.device), itertools.cycle(batches)
        for round_ in range(-5, rounds):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                pipeline, endless = pipelines[name]
                started = time.process_time()
                pipeline.progress(endless)
                if round_ >= 0:
                    times[name].append(1000 * (time.process_time() - started))
    return {
        name: {
            "median_ms": round(statistics.median(of), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(of, times[SUM], strict=True)), 4),
        }
        for name, of in times.items()
    }


if __name__ == "__main__":
    main()
