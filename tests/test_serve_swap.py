"""A newer model takes over while requests are in flight; a broken one does not."""

import asyncio
import json
import os
import shutil
import threading

import pytest
from rankers import KnownRanker, asked

from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.http.app import Limits
from mtcl_torchrec.serving.http.versions import Models, name_of, stamp_of


def load(path):
    """A ranker whose scale stands in the file."""
    scale = float(path.read_text())
    return KnownRanker(scale=scale)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model").write_text("1.0")
    return tmp_path / "model"


def replace(path, text):
    fresh = path.with_name("fresh")
    fresh.write_text(text)
    os.replace(fresh, path)


async def best(http):
    return (await http.post("/recommend", json={"user": 2, "k": 1})).json()["items"][0]["score"]


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_requests_in_flight_are_answered_by_one_of_the_two_models(path):
    models = Models(path, load, max_candidates=50)
    names = [models.current.name]

    async def talk(http):
        answers, over = [], False

        async def client():
            while not over:
                answers.append(await http.post("/recommend", json={"user": 2, "k": 1}))
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for scale in ("0.5", "1.5", "0.25"):
            await until(lambda: any(answer.json()["model"] == names[-1] for answer in answers))
            replace(path, scale)
            assert (await http.post("/reload")).json()["result"] == "swapped"
            names.append(models.current.name)
        await until(lambda: any(answer.json()["model"] == names[-1] for answer in answers))
        over = True
        await asyncio.gather(*clients)
        return answers, (await http.get("/metrics")).text

    answers, metrics = asked(models, talk, Limits(gather_ms=1))
    assert {answer.status_code for answer in answers} == {200}
    by_name = {(answer.json()["model"], answer.json()["items"][0]["score"]) for answer in answers}
    assert by_name == set(zip(names, (0.5, 0.25, 0.75, 0.125), strict=True))
    assert 'mtcl_reloads_total{result="swapped"} 3.0' in metrics
    assert f'mtcl_model{{version="{names[-1]}"}} 1.0' in metrics
    assert f'version="{names[0]}"' not in metrics


def test_a_request_is_answered_by_the_model_that_read_it(path):
    models = Models(path, load, max_candidates=50)
    old = models.current
    old.ranker.gate = threading.Event()

    async def talk(http):
        waiting = asyncio.create_task(http.post("/recommend", json={"user": 2, "k": 1}))
        while len(old.ranker.calls) < 3:  # two calls tried the model when it was loaded
            await asyncio.sleep(0.01)
        replace(path, "0.5")
        await models.reload()
        later = asyncio.create_task(http.post("/recommend", json={"user": 2, "k": 1}))
        await asyncio.sleep(0.05)
        old.ranker.gate.set()
        return [answer.json() for answer in await asyncio.gather(waiting, later)]

    first, second = asked(models, talk)
    assert (first["model"], first["items"][0]["score"]) == (old.name, 0.5)
    assert (second["model"], second["items"][0]["score"]) == (models.current.name, 0.25)


@pytest.mark.parametrize(("text", "reason"), [
    ("nonsense", "could not convert"),
    ("9.0", "not in [0, 1]"),
    ("nan", "not in [0, 1]"),
])  # fmt: skip
def test_a_broken_model_is_refused_and_the_old_one_stays(path, text, reason, caplog):
    models = Models(path, load, max_candidates=50)
    name = models.current.name

    async def talk(http):
        replace(path, text)
        refused = await http.post("/reload")
        health, metrics, score = await http.get("/healthz"), await http.get("/metrics"), await best(http)
        replace(path, "0.5")
        return refused, health.json(), metrics.text, score, await http.post("/reload"), await best(http)

    refused, health, metrics, score, mended, better = asked(models, talk)
    assert (refused.status_code, refused.json()["result"], score) == (409, "refused", 0.5)
    assert health["model"]["version"] == name
    assert reason in health["refused_reload"]
    assert 'mtcl_reloads_total{result="refused"} 1.0' in metrics
    assert reason in caplog.text
    assert (mended.json()["result"], mended.json()["problem"], better) == ("swapped", None, 0.25)


def test_a_first_model_that_is_broken_is_an_error(path):
    path.write_text("9")
    with pytest.raises(ConfigError, match=r"scores are not in \[0, 1\]"):
        Models(path, load, max_candidates=50)


def test_only_this_machine_may_reload(path):
    models = Models(path, load, max_candidates=50)
    assert asked(models, lambda http: http.post("/reload"), client="10.0.0.9").status_code == 403
    assert asked(models, lambda http: http.post("/reload"), client="::1").json()["result"] == "unchanged"


def test_watching_takes_a_newer_model_once_and_a_broken_one_never(path):
    loads = []

    def counted(path):
        loads.append(path.read_text())
        return load(path)

    models = Models(path, counted, max_candidates=50)

    async def talk(http):
        replace(path, "nonsense")
        await until(lambda: models.problem is not None)
        await asyncio.sleep(0.1)
        replace(path, "0.5")
        await until(lambda: models.problem is None)
        await asyncio.sleep(0.1)
        return await best(http)

    assert asked(models, talk, watch=0.01) == 0.25
    assert loads == ["1.0", "nonsense", "0.5"]


def test_a_run_is_taken_when_its_training_is_over(tmp_path):
    """A run directory as training writes it: the metrics come last, checkpoints come and go before."""
    run = tmp_path / "run"

    def trained(scale, best_step):
        kept = run / "checkpoints" / f"step_{best_step:09d}"
        kept.mkdir(parents=True)
        (kept / "state.json").write_text(json.dumps({"history": {"best_step": best_step}, "scale": scale}))
        (run / "run.yaml").write_text("scale: " + scale)

    def from_run(path):
        return KnownRanker(scale=float((path / "run.yaml").read_text().removeprefix("scale: ")))

    trained("1.0", 3)
    (run / "metrics.json").write_text("{}")
    models = Models(run, from_run, max_candidates=50)
    one = models.current.name

    async def talk(http):
        (run / "metrics.json").unlink()
        shutil.rmtree(run / "checkpoints")
        trained("0.5", 9)
        await asyncio.sleep(0.2)
        during = await best(http)
        (run / "metrics.json").write_text("{}")
        await until(lambda: models.current.name != one)
        after = await best(http)
        # New weights of the fusion, without training.
        two = models.current.name
        (run / "fusion").mkdir()
        (run / "fusion" / "fusion.yaml").write_text("kind: weighted_mean")
        await until(lambda: models.current.name != two)
        three = models.current.name
        (run / "run.yaml").write_text("scale: 0.25")
        await until(lambda: models.current.name != three)
        return during, after, await best(http)

    assert asked(models, talk, watch=0.01) == (0.5, 0.25, 0.125)


def test_a_link_that_is_set_to_another_model_is_a_newer_one(tmp_path):
    for name, scale in (("a", "1.0"), ("b", "0.5")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "artefact").write_text(scale)
    link = tmp_path / "current"
    link.symlink_to("a")
    models = Models(link, lambda path: load(path / "artefact"), max_candidates=50)

    async def talk(http):
        (tmp_path / "fresh").symlink_to("b")
        os.replace(tmp_path / "fresh", link)
        assert (await http.post("/reload")).json()["result"] == "swapped"
        return await best(http)

    assert asked(models, talk) == 0.25


def test_names_follow_from_contents_and_stamps_from_changes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "catalogue").mkdir(parents=True)
        (folder / "tensorboard").mkdir()
        (folder / "catalogue" / "users").write_bytes(b"x" * (3 << 20))
        (folder / "run.yaml").write_text("a: 1")
    assert name_of(one) == name_of(two)
    stamp, name = stamp_of(one), name_of(one)
    (one / "tensorboard" / "events").write_text("noise")
    (one / "catalogue.writing").mkdir()
    assert stamp_of(one) == stamp
    (one / "metrics.json").write_text("{}")
    assert stamp_of(one) != stamp
    assert name_of(one) == name
    with (one / "catalogue" / "users").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"y")
    assert name_of(one) != name
    assert stamp_of(tmp_path / "nothing") == ()


def test_a_file_beside_the_model_is_part_of_it(path, tmp_path):
    beside = tmp_path / "new_items.csv"
    beside.write_text("item\n1\n")
    models = Models(path, load, max_candidates=50, beside=[beside])
    name = models.current.name
    assert asyncio.run(models.reload()) == "unchanged"
    beside.write_text("item\n1\n2\n")
    assert asyncio.run(models.reload()) == "swapped"
    assert models.current.name != name


def test_a_refusal_names_the_file_that_has_changed(path, tmp_path, caplog):
    beside, other = tmp_path / "vectors.parquet", tmp_path / "new_items.csv"
    beside.write_text("good")
    other.write_text("item\n")

    def picky(path):
        if beside.read_text() != "good":
            raise ConfigError("vectors had 4 numbers and now have 8")
        return load(path)

    models = Models(path, picky, max_candidates=50, beside=[beside, other])
    beside.write_text("worse")
    assert asyncio.run(models.reload()) == "refused"
    assert (
        f"refused the new model in {beside}, {models.current.name} goes on (ConfigError: vectors had 4" in caplog.text
    )
