"""`mtcl serve` as a process, over a run that was trained: the same scores as in Python, signals, the load test."""

import asyncio
import importlib
import json
import logging
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import pytest
import shop
import yaml
from rankers import asked
from rich.console import Console
from typer.testing import CliRunner

from mtcl_torchrec.cli import main
from mtcl_torchrec.cli.commands import app as commands
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.serving.http import process
from mtcl_torchrec.serving.http.app import Limits
from mtcl_torchrec.serving.http.versions import Models
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fitted import save_state
from mtcl_torchrec.training.run import train_run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name):
    """A benchmark as a module, by the path on which it finds its neighbours."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def logs_as_before():
    """A process's log goes to its stderr and nowhere else; this one goes on with other tests."""
    loggers = [logging.getLogger(name) for name in (process.log.name, "uvicorn.error")]
    before = [(log, log.handlers, log.propagate, log.level) for log in loggers]
    yield
    for log, log.handlers, log.propagate, level in before:
        log.setLevel(level)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log().to_parquet(folder / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("epochs: 4", "epochs: 1") + "calibration: platt\n", folder=folder)
    return train_run(run, folder / "run", device="cpu", console=Console(quiet=True)).folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def weigh(run, weights):
    """New weights of the fused score, as a person edits them."""
    text = (run / "run.yaml").read_text()
    raw = yaml.safe_load(text)
    assert "click" in raw["fusion"]["weights"]
    (run / "run.yaml").write_text(yaml.safe_dump(raw | {"fusion": {"weights": weights}}))


def test_scored_together_they_are_what_they_are_alone(trained):
    recommender = Recommender.load(trained)
    models = Models(trained, Recommender.load, max_candidates=100)
    bodies = [
        {"user": "u3", "context": {"hour": 20}, "k": 5},
        {"user": "stranger", "k": 60},
        {"user": "u3", "context": {"hour": 3}, "candidates": ["p5", "p7", "p11"], "seen": True},
        {"user": "u8", "candidates": [f"p{i}" for i in range(0, 60, 3)], "k": 20, "seen": True},
        {"user": "u9", "context": {"hour": 23}, "seen": True},
    ]

    async def together(http):
        answers = await asyncio.gather(*(http.post("/recommend", json=body) for body in bodies))
        text = (await http.get("/metrics")).text
        rows = [models.current.bodies.example_row() | {"product_id": f"p{i}", "price": None} for i in range(3)]
        return answers, text, rows, await http.post("/score", json={"rows": rows})

    answers, metrics, rows, scored = asked(models, together, Limits(gather_ms=200))
    assert "mtcl_batch_requests_count 1.0" in metrics
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        alone = recommender.recommend(body["user"], body.get("context"), candidates=body.get("candidates"),
                                      k=body.get("k", 10), seen=body.get("seen", False))  # fmt: skip
        items = answer.json()["items"]
        assert [row["item"] for row in items] == alone["product_id"].tolist()
        assert [row["score"] for row in items] == pytest.approx(alone["score"].tolist(), abs=1e-6)
        for task in ("click", "buy", "taste", "stars"):
            assert [row["predictions"][task] for row in items] == pytest.approx(alone[task].tolist(), abs=1e-5)
    assert answers[1].json()["known_user"] is False
    assert len(answers[1].json()["items"]) == 60
    alone = recommender.score(models.current.bodies.score(json.dumps({"rows": rows}).encode()).frame)
    assert [row["score"] for row in scored.json()["rows"]] == pytest.approx(alone["score"].tolist(), abs=1e-6)


def test_a_process_under_load_swaps_weights_on_a_hangup_and_finishes_what_is_in_flight(run, tmp_path, capsys):
    load, ask = script("load"), {"user": "u3", "k": 1, "seen": True}
    with load.service(run, ["--threads=1"]) as at, httpx.Client(base_url=at.url, timeout=30) as http:
        assert at.url.startswith("http://127.0.0.1:")
        options = ["--clients=1,3", "--seconds=0.5", "--warmup-seconds=0.1", "--candidates=20", "--k=5"]
        assert load.main([str(run), f"--url={at.url}", *options, f"--json={tmp_path / 'load.json'}"]) == 0
        check_figures(json.loads((tmp_path / "load.json").read_text()))
        assert "one user × 20 candidates" in capsys.readouterr().out

        first = http.post("/recommend", json=ask).json()
        weigh(run, {"click": 0, "buy": 0, "taste": 0, "stars": 1})
        at.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 60
        while (health := http.get("/healthz").json())["model"]["version"] == first["model"]:
            assert time.monotonic() < until, health
            time.sleep(0.05)
        weighed = http.post("/recommend", json=ask).json()
        assert weighed["model"] == health["model"]["version"]
        assert weighed["items"][0]["score"] != pytest.approx(first["items"][0]["score"], abs=1e-4)

        # In flight: half of its body is still to come when the process is told to end.
        body = json.dumps(ask).encode()
        head = f"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        with socket.create_connection(("127.0.0.1", int(at.url.rsplit(":", 1)[1])), timeout=30) as flight:
            flight.sendall(head.encode() + b"\r\n\r\n" + body[:9])
            while "mtcl_open_requests 1.0" not in http.get("/metrics").text:
                time.sleep(0.01)
            at.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert at.process.poll() is None
            flight.sendall(body[9:])
            answer = b"".join(iter(lambda: flight.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["items"] == weighed["items"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{at.url}/healthz")
        assert at.process.wait(60) == 0


def recalibrate(run):
    """Another calibration, as a fit on newer rows would write it."""
    calibration = FinishedRun.load(run).model.output.calibration
    calibration.calibrated["click"][0].fill(0, slope=0.3, intercept=-1.0)
    save_state(run / "calibration", calibration, {})


def fuse(run):
    done = CliRunner().invoke(commands, ["fuse", str(run), "--set", "click=0.1,stars=7"])
    assert done.exit_code == 0, done.output


def test_a_new_calibration_and_new_weights_take_over_while_requests_are_in_flight(run):
    models = Models(run, Recommender.load, max_candidates=100)
    names, answers, over = [models.current.name], [], False

    async def talk(http):
        async def client():
            while not over:
                answers.append(await http.post("/recommend", json={"user": "u3", "k": 3, "seen": True}))

        async def until(condition):
            async with asyncio.timeout(60):
                while not condition():
                    await asyncio.sleep(0.01)

        clients = [asyncio.create_task(client()) for _ in range(3)]
        for change in (recalibrate, fuse):
            await until(lambda: any(answer.json()["model"] == names[-1] for answer in answers))
            await asyncio.to_thread(change, run)
            await until(lambda: models.current.name not in names)
            names.append(models.current.name)
        await until(lambda: answers[-1].json()["model"] == names[-1])
        nonlocal over
        over = True
        await asyncio.gather(*clients)

    asked(models, talk, Limits(gather_ms=1), watch=0.05)
    assert {answer.status_code for answer in answers} == {200}
    scores = {answer.json()["model"]: answer.json()["items"][0]["score"] for answer in answers}
    assert list(scores) == names
    now = Recommender.load(run).recommend("u3", k=1, seen=True)["score"].item()
    assert scores[names[-1]] == pytest.approx(now, abs=1e-6)
    assert len({round(score, 4) for score in scores.values()}) == 3


def check_figures(content):
    assert [result["clients"] for result in content["results"]] == [1, 3]
    for result in content["results"]:
        assert result["requests"] >= result["clients"]
        assert result["failed"] == 0
        assert 0 < result["p50_ms"] <= result["p90_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert content["load"]["candidates"] == 20


def test_answers_that_are_wrong_count_as_failed():
    load = script("load")
    asked_for = {"k": 2, "candidates": ["a", "b", "c"]}

    def judged(status, *rows):
        items = [{"item": item, "score": score} for item, score in rows]
        return load._failure(httpx.Response(status, json={"items": items}), asked_for)

    assert judged(200, ("a", 0.5), ("c", 0.5)) is None
    assert judged(503) == "status 503"
    assert judged(200, ("a", 0.5)) is not None
    assert judged(200, ("a", 0.4), ("b", 0.5)) is not None
    assert judged(200, ("a", 0.5), ("x", 0.4)) is not None


def test_what_cannot_be_served_is_one_line(trained, tmp_path, monkeypatch, capsys):
    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtcl", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("mtcl: ")]

    assert said(tmp_path, "--port=0") == [f"mtcl: {tmp_path}: no run here (run.yaml is missing)"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert said(trained, f"--port={port}") == [f"mtcl: cannot listen on 127.0.0.1:{port} (Address already in use)"]


def test_an_address_beyond_this_machine_is_warned_of(trained, monkeypatch, capsys):
    monkeypatch.setattr(process._Server, "run", lambda self, sockets: [s.close() for s in sockets])
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        process.serve(trained, Recommender.load, host=host, port=0)
        assert ("there is no authentication" in capsys.readouterr().err) is warned
