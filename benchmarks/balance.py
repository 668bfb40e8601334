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
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from document import Line, Table
from measure import about, figure, read, save, shown
from rich.console import Console

TASKS = {
    "kuairand": ("click", "long_view", "like"),
    "kuairand_ids": ("click", "long_view", "like"),
    "agreeing": ("like", "share", "hide"),
    "opposed": ("like", "share", "hide"),
}
SUM, TWIN = "mmoe", "single task"  # the weighted sum of an MMoE, and its twins
HELPED = "mmoe, all tasks"  # the weighted sum, with the data's other tasks as helpers


@dataclass(frozen=True)
class Method:
    """What is compared.

    Args:
        name: shown in the table.
        family: architecture, loss weighting or gradient surgery.
        changes: merged into the run's YAML.
    """

    name: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)


def _trunk(name: str, /, *, model: dict[str, Any] | None = None, **trunk: Any) -> Method:
    return Method(name, "architecture", {"model": {"trunk": trunk} | (model or {})})


def _weighting(kind: str, **options: Any) -> Method:
    return Method(kind.replace("_", " "), "loss weighting", {"balance": {"weighting": {"kind": kind, **options}}})


def _surgery(kind: str, cut: str = "trunk", **options: Any) -> Method:
    name = kind.replace("_", "-") + ("" if cut == "trunk" else f" ({cut})")
    return Method(name, "gradient surgery", {"balance": {"surgery": {"kind": kind, "cut": cut, **options}}})


METHODS = (  # trunks of about as many parameters as the MMoE
    Method(SUM, "architecture"),
    _trunk("shared bottom", kind="shared_bottom", expert_layers=[512, 64]),
    _trunk("a network for each task", kind="single_task", expert_layers=[168, 64]),
    _trunk("ple", kind="ple", shared_experts=1, task_experts=1, levels=1),
    _trunk("adatt", kind="adatt", shared_experts=1, task_experts=1, levels=1),
    _trunk("home", kind="home", expert_layers=[144, 64]),
    _trunk("stem", kind="stem", shared_experts=1, task_experts=1, model={"cross_layers": 0}),
    Method("mmoe, epnet", "architecture", {"model": {"epnet": {}}}),
    Method("mmoe, epnet, ppnet", "architecture", {"model": {"epnet": {}, "ppnet": {"hidden": 16}}}),
    Method(HELPED, "architecture"),
    _weighting("uncertainty"),
    _weighting("dwa"),
    _weighting("imtl_l"),
    _weighting("famo"),
    _weighting("tchebycheff"),
    _weighting("geometric_mean"),
    _surgery("upgrad"),
    _surgery("upgrad", "embeddings"),
    _surgery("upgrad", "both"),
    _surgery("upgrad", "tables"),
    _surgery("mgda"),
    _surgery("imtl_g"),
    _surgery("pcgrad"),
    _surgery("gradvac"),
    _surgery("cagrad"),
    _surgery("nash_mtl"),
    _surgery("fairgrad"),
    _surgery("aligned_mtl"),
    _surgery("gradnorm"),
    _surgery("db_mtl"),
)
BY_NAME = {method.name: method for method in METHODS}


@dataclass(frozen=True)
class Training:
    """One training: a method, or the twin of a task, with a factor on the dense learning rate and a seed."""

    data: str
    method: str
    rate: float
    seed: int
    only: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return (self.data, self.method, self.only, self.rate, self.seed)


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


def best_rate(results: list[dict[str, Any]], data: str, name: str, only: str | None) -> float:
    """The rate with the best mean validation AUC."""
    fitting = [r for r in results if (r["data"], r["method"], r["only"]) == (data, name, only)]
    return max(fitting, key=lambda r: statistics.mean(r["val"].values()))["rate"]


def _train_missing(trainings: list[Training], arguments: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
    done = {(r["data"], r["method"], r["only"], r["rate"], r["seed"]) for r in read(arguments.out)}
    missing = [training for training in trainings if training.key not in done]
    workers = threading.local()
    for i, result in enumerate(pool.map(lambda t: _in_a_worker(t, arguments.small, workers), missing), 1):
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
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


def configured(training: Training, small: bool, folder: Path) -> Any:
    """The run of a training."""
    from mtcl_torchrec.config import parse_run

    if training.data.startswith("kuairand"):
        raw = kuairand_run(small, folder)
        if training.data == "kuairand_ids":
            del raw["statistics"]
            raw["optimizers"]["tables"]["lr_of"] = dict.fromkeys(("user_id", "video_id", "author_id"), 0.01)
    else:
        raw = world_run(training.data == "opposed", small)
    if training.method != HELPED:
        tasks = [task for task in raw["schema"]["tasks"] if task["name"] in TASKS[training.data]]
        raw["schema"]["tasks"] = [task for task in tasks if training.only in (None, task["name"])]
    raw["fusion"] = {"weights": {task["name"]: 1 for task in raw["schema"]["tasks"]}}
    raw["training"] |= {"watch": [], "patience": 0, "seed": training.seed}
    raw["optimizers"]["dense"]["lr"] *= training.rate
    merge(raw, BY_NAME[training.method].changes if training.method != TWIN else {})
    return parse_run(yaml.safe_dump(raw, sort_keys=False), folder=folder)


def merge(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    """Write changes into nested dictionaries.  What names its own `kind` keeps only the widths and dropout it had."""
    for key, value in changes.items():
        if not isinstance(value, dict):
            raw[key] = value
            continue
        if "kind" in value:
            kept = {k: v for k, v in raw.get(key, {}).items() if k in ("expert_layers", "dropout")}
            raw[key] = kept | value
        else:
            merge(raw.setdefault(key, {}), value)


def kuairand_run(small: bool, folder: Path) -> dict[str, Any]:
    """The demo's data and model, with its statistics counted once for all trainings."""
    from mtcl_torchrec.config import parse_run
    from mtcl_torchrec.data import kuairand
    from mtcl_torchrec.data.prepare import prepare_files

    prepared = Path(tempfile.gettempdir()) / f"mtcl-balance-{os.getuid()}"
    if not (prepared / "run.yaml").exists():
        part = Path(tempfile.mkdtemp(dir=prepared.parent))
        kuairand.write(part / "data")
        prepare_files(parse_run(kuairand.example_run(), folder=part), part / "prepared", lambda _: None)
        with contextlib.suppress(OSError):  # another process was faster
            (part / "prepared").rename(prepared)
    raw = yaml.safe_load((prepared / "run.yaml").read_text())
    for split in ("train", "val", "test"):
        raw["data"][split] = str(prepared / f"{split}.parquet")
    for block in raw["statistics"]:
        block["prepared"] = str(prepared / block["prepared"])
    raw["training"]["epochs"] = 1 if small else 3
    return raw


def world_run(opposed: bool, small: bool) -> dict[str, Any]:
    """The synthetic world "social", its tasks of one mind or the third against the first two."""
    from mtcl_torchrec.data.worlds import world_run as ready_run

    size = 10 if small else 1
    text = ready_run(
        "social", rows=200_000 // size, val_rows=50_000 // size, test_rows=100_000 // size, num_users=3000,
        num_items=3000, factors=False, correlation=0.9, conflict=float(opposed),
        rates={"like": 0.25, "share": 0.15, "hide": 0.1},
    )  # fmt: skip
    raw = yaml.safe_load(text)
    raw["training"]["epochs"] = 2
    return raw


def by_method(results: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each method's trainings at its best rate."""
    for name in [TWIN, *BY_NAME]:
        of = [r for r in results if r["method"] == name]
        if not of:
            continue
        first = min(r["seed"] for r in of)
        tried = [r for r in of if r["seed"] == first]
        best = {only: best_rate(tried, of[0]["data"], name, only) for only in {r["only"] for r in of}}
        yield name, [r for r in of if r["rate"] == best[r["only"]]]


def twin_aucs(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Task -> test AUC of its twins, one for each seed."""
    aucs: dict[str, list[float]] = {}
    for name, of in by_method(results):
        for r in of if name == TWIN else []:
            aucs.setdefault(r["only"], []).append(r["test"][r["only"]])
    return aucs


def gain(result: dict[str, Any], twins: dict[str, list[float]]) -> float:
    """Δm of one training, in percent."""
    gains = [(result["test"][t] - statistics.mean(a)) / (statistics.mean(a) - 0.5) for t, a in twins.items()]
    return 100 * statistics.mean(gains)


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


def rows_of(
    results: list[dict[str, Any]], data: str, steps: dict[str, dict[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of one set of data; `steps` is what `step_times` gave, or empty."""
    twins, tasks = twin_aucs(results), TASKS[data]
    rows = []
    for name, of in by_method(results):
        if name == TWIN:
            rows.append([name, *(_spread(twins[task], 4) for task in tasks), "", ""])
            continue
        below = ["↓" if _mean_below(of, twins, task) else "" for task in tasks]
        aucs = [_spread([r["test"][task] for r in of], 4) + mark for task, mark in zip(tasks, below, strict=True)]
        step = f"{steps[name]['ratio']:.2f}" if name in steps else ""
        rows.append([name, *aucs, _spread([gain(r, twins) for r in of], 2), step])
    return ["", *tasks, "Δm %", "step"], rows


def as_lines(results: list[dict[str, Any]]) -> list[Line]:
    """The trainings as the other benchmarks have their lines."""
    settings = ("data", "method", "only", "rate")
    return [
        {"what": {key: result[key] for key in settings}, "repeat": result["seed"],
         **{key: value for key, value in result.items() if key not in (*settings, "seed")}}
        for result in results
    ]  # fmt: skip


def by_data(lines: list[Line]) -> dict[str, list[dict[str, Any]]]:
    """Data -> trainings, each as its file has it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["what"]["data"], []).append({**line, **line["what"], "seed": line["repeat"]})
    return found


def tables(lines: list[Line], steps: dict[str, dict[str, float]]) -> list[Table]:
    """A table for each set of data; `steps` is what `step_times` gave, or empty."""
    title = "test AUC and Δm, mean ± standard deviation over seeds"
    return [Table(f"{data}: {title}", *rows_of(of, data, steps)) for data, of in by_data(lines).items()]


def _mean_below(of: list[dict[str, Any]], twins: dict[str, list[float]], task: str) -> bool:
    """Whether a task is below its twin by more than the twin's spread."""
    spread = statistics.stdev(twins[task]) if len(twins[task]) > 1 else 0.0
    return statistics.mean(r["test"][task] for r in of) < statistics.mean(twins[task]) - spread


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def draw(lines: list[Line], path: Path) -> None:
    """Δm of every method, a panel for each set of data."""
    sets = by_data(lines)
    colours = {"architecture": "#4477aa", "loss weighting": "#ccbb44", "gradient surgery": "#aa3377"}
    drawn, panels = figure(wide=1 + 4 * len(sets), high=7, columns=len(sets), grid="x")
    from matplotlib.lines import Line2D

    for panel, (data, of_data) in zip(panels, sets.items(), strict=True):
        twins = twin_aucs(of_data)
        rows = [(n, [gain(r, twins) for r in of]) for n, of in by_method(of_data) if n != TWIN][::-1]
        for y, (name, gains) in enumerate(rows):
            error = statistics.stdev(gains) if len(gains) > 1 else 0
            panel.errorbar(statistics.mean(gains), y, xerr=error, fmt="o", color=colours[BY_NAME[name].family])
        panel.set_yticks(range(len(rows)), [name for name, _ in rows])
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(data)
        panel.set_xlabel("Δm over single-task twins, %")
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=f) for f, c in colours.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(drawn, path)


if __name__ == "__main__":
    main()
