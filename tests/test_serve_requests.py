"""The HTTP service with a ranker whose answers are known: what it answers, what it refuses, what it scores together."""

import asyncio
import json
import logging
import re
import sys
import threading
import time

import pandas as pd
import pytest
from rankers import SCHEMA, KnownRanker, asked
from typer.testing import CliRunner

from mtcl_torchrec.cli import main
from mtcl_torchrec.cli.commands import app as commands
from mtcl_torchrec.data.columns import ids_of
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.serving.http.app import Limits, create_app
from mtcl_torchrec.serving.http.batching import Batcher
from mtcl_torchrec.serving.http.bodies import BodyError
from mtcl_torchrec.serving.http.description import RecommendResponse, ScoreResponse
from mtcl_torchrec.serving.http.ranking import Ask, rank_together, score_together
from mtcl_torchrec.serving.http.versions import Models

ROW = {"who": 1, "sku": "p3", "price of it": 4.0, "topics": ["a"], "slot": 2, "affinity": None}


@pytest.fixture
def ranker():
    return KnownRanker()


@pytest.fixture
def models(ranker, tmp_path):
    (tmp_path / "model").write_text("one")
    made = Models(tmp_path / "model", lambda path: ranker, max_candidates=50)
    ranker.calls.clear()
    ranker.frames.clear()
    return made


def ask(models, route, body, limits=None, **headers):
    """One request's answer."""
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    return asked(models, lambda http: http.post(route, content=content, headers=headers), limits)


def test_a_ranking_says_why(models):
    answer = ask(models, "/recommend", {"user": 2, "context": {"slot": 3}, "k": 2})
    assert answer.status_code == 200
    assert answer.json() == {
        "user": 2,
        "known_user": True,
        "model": models.current.name,
        "items": [
            {"item": "p5", "score": 0.5, "predictions": {"click": 0.25, "buy": 0.25}, "parts": {"click": 0.5}},
            {"item": "p4", "score": 0.4, "predictions": {"click": 0.2, "buy": 0.25}, "parts": {"click": 0.4}},
        ],
    }


@pytest.mark.parametrize(("body", "items", "known"), [
    ({"user": 99, "candidates": ["p1", "p2", "p1"]}, ["p2", "p1"], False),
    ({"user": 2, "candidates": ["p0", "p1"]}, ["p1"], True),
    ({"user": 2, "candidates": ["p0", "p1"], "seen": True}, ["p1", "p0"], True),
    ({"user": 1}, [], True),
    ({"user": 3, "candidates": None, "context": {}}, ["p5", "p4", "p3", "p2", "p1", "p0"], True),
])  # fmt: skip
def test_strangers_candidates_and_what_was_seen(models, body, items, known):
    answer = ask(models, "/recommend", body).json()
    assert [row["item"] for row in answer["items"]] == items
    assert answer["known_user"] is known


def test_rows_are_scored_in_their_order(models):
    answer = ask(models, "/score", {"rows": [ROW, ROW | {"price of it": 2}, ROW | {"price of it": None}]})
    assert answer.status_code == 200
    assert [row["score"] for row in answer.json()["rows"]] == [0.4, 0.2, 0.0]
    assert answer.json()["rows"][0]["predictions"] == {"click": 0.5, "buy": 0.25}


WRONG = [
    ("/recommend", {}, ["body", "user"], "Field required"),
    ("/recommend", {"user": "1"}, ["body", "user"], "valid integer"),
    ("/recommend", {"user": True}, ["body", "user"], "valid integer"),
    ("/recommend", {"user": 1, "usr": 1}, ["body", "usr"], "Extra inputs"),
    ("/recommend", {"user": 2**63}, ["body", "user"], "less than or equal"),
    ("/recommend", {"user": 1, "context": {"slt": 1}}, ["body", "context", "slt"], "did you mean 'slot'"),
    ("/recommend", {"user": 1, "context": {"slot": 4}}, ["body", "context", "slot"], "less than 4"),
    ("/recommend", {"user": 1, "context": {"slot": "1"}}, ["body", "context", "slot"], "valid integer"),
    ("/recommend", {"user": 1, "context": []}, ["body", "context"], "an object"),
    ("/recommend", {"user": 1, "candidates": ["p1", "p9"]}, ["body", "candidates", 1], "no item 'p9'"),
    ("/recommend", {"user": 1, "candidates": []}, ["body", "candidates"], "at least 1"),
    ("/recommend", {"user": 1, "candidates": ["p1"] * 51}, ["body", "candidates"], "at most 50"),
    ("/recommend", {"user": 1, "candidates": [1]}, ["body", "candidates", 0], "valid string"),
    ("/recommend", {"user": 1, "k": 0}, ["body", "k"], "greater than or equal to 1"),
    ("/recommend", {"user": 1, "k": 51}, ["body", "k"], "less than or equal to 50"),
    ("/recommend", {"user": 1, "seen": "yes"}, ["body", "seen"], "valid boolean"),
    ("/recommend", "{", ["body"], "Invalid JSON"),
    ("/recommend", "[" * 100_000, ["body"], "Invalid JSON"),
    ("/recommend", b"\xff", ["body"], "Invalid JSON"),
    ("/recommend", {"user": 1, "u" * 10**6: 1}, ["body", "u" * 199 + "…"], "Extra inputs"),
    ("/recommend", {"user": 1, "context": {"u" * 10**6: 1}}, ["body", "context", "u" * 199 + "…"], "no context column"),
    ("/recommend", {"user": 1, "context": {str(i): 1 for i in range(10**5)}}, ["body"], "100,000 mistakes"),
    ("/recommend", {"user": 1, "candidates": ["u" * 10**6]}, ["body", "candidates", 0], "no item 'uuu"),
    ("/recommend", {"user": 1, "candidates": ["p1", *range(10**5)]}, ["body", "candidates", 1], "valid string"),
    ("/recommend", b'{"user": 1, "candidates": ["\\ud800"]}', ["body"], "Invalid JSON"),
    ("/recommend", {"user": 1, "candidates": ["\0"]}, ["body", "candidates", 0], "no item"),
    ("/recommend", b'{"user": NaN}', ["body", "user"], "valid integer"),
    ("/score", {"rows": [ROW] * 3 + [{}] * 10**5}, ["body", "rows", 3, "who"], "Field required"),
    ("/score", {"rows": [ROW | {"topics": [1] * 900}] * 50}, ["body", "rows", 0, "topics", 0], "valid string"),
    ("/score", {"rows": []}, ["body", "rows"], "at least 1"),
    ("/score", {"rows": [ROW] * 51}, ["body", "rows"], "at most 50"),
    ("/score", {"rows": [ROW, ROW | {"price of": 1}]}, ["body", "rows", 1, "price of"], "did you mean 'price of it'"),
    ("/score", {"rows": [{k: v for k, v in ROW.items() if k != "sku"}]}, ["body", "rows", 0, "sku"], "Field required"),
    ("/score", {"rows": [ROW | {"price of it": "4"}]}, ["body", "rows", 0, "price of it"], "valid number"),
    ("/score", json.dumps({"rows": [ROW | {"price of it": float("nan")}]}), ["body", "rows", 0, "price of it"],
     "finite"),
    ("/score", json.dumps({"rows": [ROW]}).replace("4.0", "1e999"), ["body", "rows", 0, "price of it"], "finite"),
    ("/score", {"rows": [ROW | {"topics": ["a", 1]}]}, ["body", "rows", 0, "topics", 1], "valid string"),
    ("/score", {"rows": [ROW | {"topics": ["a"] * 1001}]}, ["body", "rows", 0, "topics"], "at most 1000"),
    ("/score", {"rows": [ROW | {"price of it": 666}]}, ["body"], "not to be scored"),
]  # fmt: skip


def test_what_does_not_fit_is_refused_with_the_field_named(models):
    async def all_of_them(http):
        sent = [body if isinstance(body, (str, bytes)) else json.dumps(body) for _, body, _, _ in WRONG]
        headers = {"content-type": "application/json"}
        answers = []
        for (route, *_), content in zip(WRONG, sent, strict=True):
            used = time.process_time()
            answers.append(await http.post(route, content=content, headers=headers))
            # Nobody else is answered meanwhile.
            assert time.process_time() - used < 1, content[:200]
        return answers

    for (_, body, where, said), answer in zip(WRONG, asked(models, all_of_them), strict=True):
        assert answer.status_code == 422, (body, answer.text[:300])
        first = answer.json()["detail"][0]
        assert first["loc"] == where, body
        assert said in first["msg"], body
        assert first["type"]
        assert len(answer.content) < 10_000


def test_only_json_of_bounded_size_is_read(models):
    small = Limits(max_body=1000, body_seconds=0.2)
    body = json.dumps({"user": 1})
    assert ask(models, "/recommend", body, content_type="text/plain").status_code == 415
    assert ask(models, "/recommend", body, content_type="application/json; charset=utf-8").status_code == 200
    assert ask(models, "/recommend", body, content_encoding="gzip").status_code == 415
    assert ask(models, "/recommend", body + " " * 1000, small).status_code == 413
    read = 0

    async def chunks(pause):  # no Content-Length: only what arrives tells
        nonlocal read
        for _ in range(100):
            read += 100
            await asyncio.sleep(pause)
            yield b" " * 100

    def stream(pause):
        headers = {"content-type": "application/json"}
        return asked(models, lambda http: http.post("/recommend", content=chunks(pause), headers=headers), small)

    assert stream(0).status_code == 413
    answer = stream(0.05)
    assert answer.status_code == 408
    assert "0.2 seconds" in answer.json()["detail"]


def test_requests_at_the_same_time_are_scored_together(models, ranker):
    users = [1, 2, 3, 7, 2]

    async def together(http):
        bodies = [{"user": u, "candidates": ["p1", "p2", f"p{i}"], "k": i + 1, "seen": True}
                  for i, u in enumerate(users)]  # fmt: skip
        rows = [{"rows": [ROW | {"price of it": i}] * (i + 1)} for i in range(3)]
        found = await asyncio.gather(
            *(http.post("/recommend", json=b) for b in bodies), *(http.post("/score", json=b) for b in rows)
        )
        return found, (await http.get("/metrics")).text

    found, metrics = asked(models, together, Limits(gather_ms=200, max_batch=21))
    expected = [["p2"], ["p2", "p1"], ["p2", "p1"], ["p3", "p2", "p1"], ["p4", "p2", "p1"]]
    assert [[row["item"] for row in answer.json()["items"]] for answer in found[:5]] == expected
    assert [[row["score"] for row in answer.json()["rows"]] for answer in found[5:]] == [[0], [0.1] * 2, [0.2] * 3]
    # A ranking is known by its user: the second request of user 2 is in a call of its own.
    assert [users for users, _, _ in ranker.calls] == [(1, 2, 3, 7), (2,)]
    assert ranker.calls[0][1] == 4
    assert ranker.frames == [6]
    assert "mtcl_batch_requests_sum 8.0" in metrics
    assert "mtcl_batch_requests_count 1.0" in metrics
    assert 'mtcl_requests_total{route="/recommend",status="200"} 5.0' in metrics
    assert re.search(r"mtcl_candidates_scored_total (\d+)", metrics)[1] == str(13 + 6)


def test_large_ids_stay_what_they_are_beside_missing_ones(models, ranker):
    """Also where the missing one is another request's, which happened to come at the same time."""
    seen, large = [], 2**60 + 1
    ranker.score = lambda frame: seen.append(frame) or pd.DataFrame({"score": [0.5] * len(frame)})
    bodies = [[ROW | {"who": large, "slot": None}, ROW | {"who": None}], [ROW | {"who": large + 1}], [ROW]]
    frames = [models.current.bodies.score(json.dumps({"rows": rows}).encode()).frame for rows in bodies]
    assert [len(scored) for scored in score_together(ranker, frames)] == [2, 1, 1]
    assert ids_of(Rows(seen[0]), "who").tolist() == [large, pd.NA, large + 1, 1]
    assert ids_of(Rows(seen[0]), "slot").tolist() == [pd.NA, 2, 2, 2]


def test_without_gathering_each_is_scored_by_itself(models, ranker):
    bodies = [{"user": u} for u in (2, 3, 4)]
    asked(models, lambda http: asyncio.gather(*(http.post("/recommend", json=b) for b in bodies)), Limits(gather_ms=0))
    assert sorted(users for users, _, _ in ranker.calls) == [(2,), (3,), (4,)]


def test_a_request_that_fails_does_not_fail_its_neighbours(models, ranker):
    ranker.fails_for = 3

    async def together(http):
        return await asyncio.gather(
            *(http.post("/recommend", json={"user": user}) for user in (2, 3, 4)),
            *(http.post("/score", json={"rows": [ROW | {"price of it": price}]}) for price in (1, 666)),
        )

    answers = asked(models, together, Limits(gather_ms=50))
    assert [answer.status_code for answer in answers] == [200, 422, 200, 200, 422]
    assert answers[1].json()["detail"][0]["msg"] == "user 3 is not to be scored"


def test_an_unforeseen_fault_is_one_500_and_told_to_no_one_but_the_log(models, ranker, caplog):
    ranker.recommend = lambda *_, **__: 1 / 0
    answer = ask(models, "/recommend", {"user": 2})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "internal error"}
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_goes_away_in_the_middle_of_its_body_is_no_fault(models, ranker, caplog):
    said = [{"type": "http.request", "body": b'{"us', "more_body": True}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/recommend", "query_string": b"", "raw_path": b"/recommend",
             "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1)}  # fmt: skip
    sent = []

    async def talk():
        async def receive():
            return said.pop(0)

        async def send(message):
            sent.append(message)

        app = create_app(models)
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(talk())
    assert sent[0]["status"] == 400
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert not ranker.calls


def test_more_requests_than_are_taken_on_are_told_to_come_again(models, ranker):
    ranker.gate = threading.Event()

    async def crowd(http):
        waiting = [asyncio.create_task(http.post("/recommend", json={"user": u})) for u in (2, 3, 4)]
        while not ranker.calls:
            await asyncio.sleep(0.01)
        metrics = (await http.get("/metrics")).text
        refused = await http.post("/recommend", json={"user": 5})
        ranker.gate.set()
        taken = await asyncio.gather(*waiting)
        return metrics, refused, taken, await http.post("/recommend", json={"user": 5})

    metrics, refused, taken, later = asked(models, crowd, Limits(max_open=3, gather_ms=0))
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in [*taken, later]] == [200] * 4
    assert "mtcl_queue_length 2.0" in metrics
    assert "mtcl_open_requests 3.0" in metrics


def test_health_metrics_and_description(models):
    async def look(http):
        return [await http.get(p) for p in ("/healthz", "/metrics", "/openapi.json", "/docs", "/recommend", "/etc")]

    health, metrics, described, docs, wrong_method, nowhere = asked(models, look)
    assert health.json()["model"]["version"] == models.current.name
    assert health.json()["schema"]["tasks"] == [{"name": t.name, "kind": "binary"} for t in SCHEMA.tasks]
    assert (health.json()["schema"]["users"], health.json()["schema"]["items"]) == (3, 6)
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert f'mtcl_model{{version="{models.current.name}"}} 1.0' in metrics.text
    assert 'mtcl_reloads_total{result="refused"} 0.0' in metrics.text
    schemas = described.json()["components"]["schemas"]
    assert set(schemas["Row"]["properties"]) == set(ROW)
    assert schemas["Context"]["properties"]["slot"]["exclusiveMaximum"] == 4
    for route, answer in (("/recommend", RecommendResponse), ("/score", ScoreResponse)):
        operation = described.json()["paths"][route]["post"]
        asking, answered = (
            part["content"]["application/json"] for part in (operation["requestBody"], operation["responses"]["200"])
        )
        for part in (asking, answered):
            assert part["schema"]["$ref"].rsplit("/", 1)[1] in schemas
        given = ask(models, route, asking["example"])
        assert given.status_code == 200
        answer.model_validate(given.json())
        answer.model_validate(answered["example"])
    assert "/openapi.json" in docs.text
    assert (wrong_method.status_code, nowhere.status_code) == (405, 404)


def test_the_page_of_the_description_needs_no_network(models):
    async def look(http):
        page = await http.get("/docs")
        assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        return page, [await http.get(asset) for asset in assets], await http.get("/redoc")

    page, assets, redoc = asked(models, look)
    assert page.status_code == 200
    assert not re.search(r"https?:|//[a-z]", page.text)
    kinds = [asset.headers["content-type"].partition(";")[0] for asset in assets]
    assert [asset.status_code for asset in assets] == [200] * 3
    assert sorted(kinds) == ["image/png", "text/css", "text/javascript"]
    for asset in assets:
        assert "@import" not in asset.text
        assert not re.search(r"url\((?!\"?data:)", asset.text) or not asset.headers["content-type"].startswith(
            "text/css"
        )
    assert redoc.status_code == 404


def test_the_log_names_users_only_when_asked_to(models, caplog):
    caplog.set_level(logging.INFO, "mtcl_torchrec.serving.http")
    ask(models, "/recommend?token=secret", {"user": 7123})
    assert re.search(r"POST /recommend 200 \d+\.\d ms", caplog.text)
    assert "7123" not in caplog.text
    assert "secret" not in caplog.text
    caplog.set_level(logging.DEBUG, "mtcl_torchrec.serving.http")
    ask(models, "/recommend", {"user": 7123})
    assert "7123" in caplog.text


def test_rows_that_are_compared_are_scored_request_by_request(ranker):
    ranker.rows_alone = False
    frames = [pd.DataFrame([ROW] * n) for n in (1, 2)]
    assert [len(found) for found in score_together(ranker, frames)] == [1, 2]
    assert ranker.frames == [1, 2]


def test_an_answer_for_another_user_is_not_passed_on(ranker):
    known = ranker.recommend
    ranker.recommend = lambda users, *a, **kw: known([u + 1 for u in users], *a, **kw)
    assert isinstance(rank_together(ranker, [Ask(2)])[0], Exception)


def test_a_batcher_finishes_what_waits_and_skips_who_left():
    seen = []

    def work(jobs):
        seen.append(list(jobs))
        return [job if job else ValueError("no") for job in jobs]

    async def run():
        async with Batcher(work, wait_s=0.05, max_rows=10) as batcher:
            tasks = [asyncio.create_task(batcher.submit(job, rows=4)) for job in (1, 2, 3, 0)]
            big = asyncio.create_task(batcher.submit(5, rows=100))
            await asyncio.sleep(0)
            tasks[1].cancel()
        return await asyncio.gather(*tasks, big, return_exceptions=True)

    results = asyncio.run(asyncio.wait_for(run(), 10))
    assert results[0] == 1
    assert isinstance(results[1], asyncio.CancelledError)
    assert results[2] == 3
    assert isinstance(results[3], ValueError)
    assert results[4] == 5
    assert seen == [[1], [3, 0], [5]]


def test_kinds_of_values_follow_from_the_catalogue(models):
    bodies = models.current.bodies
    assert bodies.example_row() == {"who": 1, "sku": "p0", "price of it": 1.0, "topics": ["a"], "slot": 1,
                                    "affinity": None}  # fmt: skip
    assert bodies.stranger() == 4
    frame = bodies.score(json.dumps({"rows": [ROW]}).encode()).frame
    assert frame.iloc[0].to_dict() == ROW
    with pytest.raises(BodyError, match=r"body\.rows\.0\.affinity: .*number"):
        bodies.score(json.dumps({"rows": [ROW | {"affinity": "much"}]}).encode())


def test_without_the_extra_the_command_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [n for n in sys.modules if n.startswith("mtcl_torchrec.serving.http")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "run.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["mtcl", "serve", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "pip install 'mtcl_torchrec[serve]'" in capsys.readouterr().err


def test_the_command_explains_itself():
    shown = CliRunner().invoke(commands, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--host", "--port", "--watch", "--max-candidates", "--max-batch", "--threads", "--gather-ms"):
        assert option in shown
