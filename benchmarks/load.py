"""How many requests `mtcl serve` answers, and how fast, with a real HTTP client against a real process.

    python benchmarks/load.py --out results/load.jsonl                  # trains a run on the demo's data first
    python benchmarks/load.py RUN_DIR
    python benchmarks/load.py model.mtcl
    python benchmarks/load.py RUN_DIR --clients 1,4,16 --candidates 500 --seconds 10 --json load.json
    python benchmarks/load.py RUN_DIR --url http://127.0.0.1:8000 --serve-option=--gather-ms=0

Each client asks for a ranking of random candidates for a random user, waits for the answer, checks it, asks again.
The latency is that of the client, from sending to the whole answer; client and service share the machine's cores.
A request fails if it is not answered 200 with as many items, best first, as were asked for.  Batches are the service's
own figure: requests that it scored together, on average.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from document import Table, median, ranged, ratios
from measure import Line, benchmark, commit, counted, counts, figure, options, save
from rich.console import Console
from serving import trained

from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.evaluation.plain_table import plain_table
from mtcl_torchrec.serving.artefact import Artefact
from mtcl_torchrec.training.directory import CATALOGUE, readable_folder

METHOD = (__doc__ or "").rsplit("\n\n", 1)[-1].strip().replace("\n", " ")
_LISTENS = re.compile(r" on (http://\S+)")


@dataclass(frozen=True)
class Load:
    """What the clients do."""

    candidates: int = 500
    k: int = 10
    seconds: float = 10.0
    warmup_seconds: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """What was measured with so many clients at a time."""

    clients: int
    requests: int
    failed: int
    requests_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    requests_per_batch: float
    failures: dict[str, int]


@dataclass(frozen=True)
class Running:
    """A service."""

    url: str
    process: subprocess.Popen | None = None


@contextlib.contextmanager
def service(run_dir: Path, options: list[str], *, start_seconds: float = 120) -> Iterator[Running]:
    """A process of `mtcl serve` on a free port; it is told to end afterwards, and must."""
    command = [sys.executable, "-m", "mtcl_torchrec", "serve", str(run_dir), "--port=0", "--watch=0", *options]
    process = subprocess.Popen([*command, "--log-level=info"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url, said, until = None, "", time.monotonic() + start_seconds
        while url is None and time.monotonic() < until and (line := process.stderr.readline()):
            said += line
            url = found[1] if (found := _LISTENS.search(line)) else None
        if url is None:
            raise SystemExit(f"mtcl serve did not start:\n{said}")
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # a full pipe would stop it
        yield Running(url, process)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"mtcl serve ended with status {process.returncode}")
        drain.wait(10)
    finally:
        if process.poll() is None:
            process.kill()


def _wait_until_healthy(url: str, until: float) -> None:
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        time.sleep(0.05)
    raise SystemExit(f"{url} does not answer")


def measure(url: str, catalogue: Catalogue, clients: int, load: Load) -> Figures:
    """Let the clients ask until the time is over."""
    users, items = (frame.iloc[:, 0].tolist() for frame in (catalogue.users, catalogue.items))
    with (
        httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=clients)) as http,
        ThreadPoolExecutor(clients) as threads,
    ):

        def ask(name: str, seconds: float) -> list[list[tuple[float, str | None]]]:
            return list(threads.map(lambda n: _ask(http, users, items, load, f"{name} {n}", seconds), range(clients)))

        ask("warm-up", load.warmup_seconds)
        before = _batches(http)
        started = time.perf_counter()
        results = ask("client", load.seconds)
        took = time.perf_counter() - started
        after = _batches(http)
    answers = [answer for result in results for answer in result]
    good = np.array([ms for ms, failure in answers if failure is None])
    failures = [failure for _, failure in answers if failure is not None]
    p50, p90, p99, longest = np.percentile(good, [50, 90, 99, 100]) if len(good) else [float("nan")] * 4
    batches = after[0] - before[0]
    return Figures(
        clients=clients,
        requests=len(answers),
        failed=len(failures),
        requests_per_s=len(good) / took,
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        max_ms=float(longest),
        requests_per_batch=(after[1] - before[1]) / batches if batches else float("nan"),
        failures={failure: failures.count(failure) for failure in sorted(set(failures))},
    )


def answered(figures: Line) -> Line | None:
    """The figures, or None where a request has failed or there was none: then they are not of this service."""
    return figures if figures["requests"] and not figures["failed"] else None


def _ask(
    http: httpx.Client, users: list, items: list, load: Load, name: str, seconds: float
) -> list[tuple[float, str | None]]:
    """One client's requests, one after the other: milliseconds, and what was wrong."""
    draw = random.Random(f"{load.seed} {name}")
    answers = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        asked = {
            "user": draw.choice(users),
            "candidates": draw.sample(items, min(load.candidates, len(items))),
            "k": load.k,
            "seen": True,
        }
        body = json.dumps(asked)
        started = time.perf_counter()
        try:
            response = http.post("/recommend", content=body, headers={"content-type": "application/json"})
            failure = _failure(response, asked)
        except httpx.HTTPError as error:
            failure = type(error).__name__
        answers.append((1000 * (time.perf_counter() - started), failure))
    return answers


def _failure(response: httpx.Response, asked: dict[str, Any]) -> str | None:
    if response.status_code != 200:
        return f"status {response.status_code}"
    ranked = response.json()["items"]
    scores = [row["score"] for row in ranked]
    if len(ranked) != min(asked["k"], len(asked["candidates"])) or scores != sorted(scores, reverse=True):
        return "not a ranking of as many items as asked for"
    return None if {row["item"] for row in ranked} <= set(asked["candidates"]) else "an item that was no candidate"


def _batches(http: httpx.Client) -> tuple[float, float]:
    """Batches scored so far, and requests in them."""
    text = http.get("/metrics").text
    count, total = (re.search(rf"^mtcl_batch_requests_{part} (\S+)", text, re.M) for part in ("count", "sum"))
    assert count is not None
    assert total is not None
    return float(count[1]), float(total[1])


def show(figures: list[Figures], load: Load) -> None:
    """Print one line for each number of clients."""
    table = plain_table(
        f"one user × {load.candidates} candidates a request, on {_cores()} cores",
        ["clients", "requests/s", "p50 ms", "p90 ms", "p99 ms", "max ms", "in a batch", "requests", "failed"],
    )
    for f in figures:
        table.add_row(
            str(f.clients), f"{f.requests_per_s:.1f}", f"{f.p50_ms:.1f}", f"{f.p90_ms:.1f}", f"{f.p99_ms:.1f}",
            f"{f.max_ms:.1f}", f"{f.requests_per_batch:.1f}", str(f.requests), str(f.failed),
        )  # fmt: skip
    Console(width=110).print(table)
    for f in figures:
        for failure, times in f.failures.items():
            print(f"{f.clients} clients: {times} × {failure}")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def tables(lines: list[Line]) -> list[Table]:
    """One table, a row for each number of clients."""
    groups: dict[int, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["what"]["clients"], []).append(line)
    fewest = groups[min(groups)]
    cells = [
        [
            str(clients), ranged(ratios(of, fewest, "requests_per_s")), f"{median(of, 'requests_per_s'):.1f}",
            *(f"{median(of, name):.1f}" for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms", "requests_per_batch")),
            f"{sum(line['failed'] for line in of)} of {sum(line['requests'] for line in of)}",
        ]
        for clients, of in groups.items()
    ]  # fmt: skip
    heads = ["clients", "× requests/s of the fewest", "requests/s", "p50 ms", "p90 ms", "p99 ms", "max ms",
             "in a batch", "failed"]  # fmt: skip
    title = f"load: mtcl serve, one user × {lines[0]['what']['candidates']} candidates a request, clients beside it"
    return [Table(title, heads, cells)]


def draw(lines: list[Line], path: Path) -> None:
    """Latency by requests a second."""
    drawn, (axis,) = figure(wide=4.6, high=3.2)
    for name in ("p50_ms", "p99_ms"):
        axis.plot([line["requests_per_s"] for line in lines], [line[name] for line in lines], "o", label=name[:3])
    for line in lines:
        clients = line["what"]["clients"]
        axis.annotate(f"{clients} client{'s' * (clients > 1)}", (line["requests_per_s"], line["p99_ms"]), fontsize=7,
                      xytext=(0, 6), textcoords="offset points", ha="center")  # fmt: skip
    highest = [1.2 * max(line[name] for line in lines) for name in ("requests_per_s", "p99_ms")]
    axis.set(xlabel="requests/s", ylabel="latency of a request, ms", xlim=(0, highest[0]), ylim=(0, highest[1]))
    axis.legend(fontsize=8, frameon=False)
    save(drawn, path)


def main(arguments: list[str] | None = None) -> int:
    """Measure what the command line says; 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="?", help="a run directory with a catalogue, or an export")
    parser.add_argument(
        "--clients",
        type=counts,
        default=[1, 4, 16],
        metavar="N[,N…]",
        help="numbers of clients at a time (default: 1,4,16)",
    )
    parser.add_argument("--candidates", type=counted, default=Load.candidates)
    parser.add_argument("--k", type=counted, default=Load.k)
    parser.add_argument("--seconds", type=float, default=Load.seconds, help="for each number of clients")
    parser.add_argument("--warmup-seconds", type=float, default=Load.warmup_seconds)
    parser.add_argument("--seed", type=int, default=Load.seed)
    parser.add_argument("--url", help="a service that runs already, instead of one that is started here")
    parser.add_argument("--serve-option", action="append", default=[], help="of mtcl serve; may be repeated")
    parser.add_argument("--json", type=Path, help="without --out: write the figures to this file")
    parser.add_argument("--train-rows", type=counted, help="where no run is given: train on the first rows alone")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / f"mtcl-serving-{commit()}",
                        help="folder of the run that is trained where none is given (%(default)s)")  # fmt: skip
    options(parser, repeats=1, timeout_s=600)
    given = parser.parse_args(arguments)
    if given.show:
        return benchmark(parser, given, work=lambda what: None, todo=lambda: [], tables=tables, draw=draw)
    if given.run_dir is None:
        given.data.mkdir(parents=True, exist_ok=True)
        given.run_dir = trained(given.data, given.train_rows)
    load = Load(given.candidates, given.k, given.seconds, given.warmup_seconds, given.seed)
    catalogue = (
        Catalogue.load(readable_folder(given.run_dir / CATALOGUE))
        if given.run_dir.is_dir()
        else Artefact.load(given.run_dir).catalogue
    )
    if catalogue is None:
        parser.error(f"{given.run_dir} has no catalogue: its schema names no user or no item column")
    running = contextlib.nullcontext(Running(given.url)) if given.url else service(given.run_dir, given.serve_option)
    with running as at:
        _wait_until_healthy(at.url, time.monotonic() + 10)
        if given.out:
            todo = [
                {"clients": n, **asdict(load), "train_rows": given.train_rows, "serve_options": given.serve_option}
                for n in given.clients
            ]  # fmt: skip
            return benchmark(
                parser, given, work=lambda what: None, todo=lambda: todo, tables=tables, draw=draw,
                one=lambda what: answered(asdict(measure(at.url, catalogue, what["clients"], load))),
            )  # fmt: skip
        figures = [measure(at.url, catalogue, clients, load) for clients in given.clients]
    show(figures, load)
    if given.json is not None:
        about = {"method": METHOD, "machine": platform.processor() or platform.machine(), "cores": _cores(),
                 "python": platform.python_version(), "serve_options": given.serve_option}  # fmt: skip
        content = {"about": about, "load": asdict(load), "results": [asdict(f) for f in figures]}
        given.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 1 if any(f.failed or not f.requests for f in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
