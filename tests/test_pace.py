"""How fast a run trains is said in each epoch's line, kept in its metrics, and shown where runs are compared."""

import io
import json
import re
import statistics
import time

import pytest
import shop
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_compiling import without_code  # noqa: F401

from mtcl_torchrec.modules.towers import MultiTaskTower
from mtcl_torchrec.training import progress
from mtcl_torchrec.training.pace import Pace, epoch_speed
from mtcl_torchrec.training.progress import TrainingProgress

FIRST_S = 3.0


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(0.001, 100)), max_size=20))
def test_the_first_step_counts_neither_as_rows_nor_as_time(steps):
    now = [5.0]
    pace = Pace(clock=lambda: now[0])
    for rows, seconds in steps:
        now[0] += seconds
        pace.step(rows)
    if len(steps) < 2:
        assert pace.samples_per_second is None
    else:
        rows, seconds = (sum(column) for column in zip(*steps[1:], strict=True))
        assert pace.samples_per_second == pytest.approx(rows / seconds, rel=1e-6)
    assert pace.first_step_s == (pytest.approx(steps[0][1]) if steps else None)


def test_a_first_step_is_told_where_it_is_long():
    assert epoch_speed(10.0, 100.0, 1.9) == "in 10.0 s, 100 samples/s"
    assert epoch_speed(10.0, 100.0, 2.1) == "in 10.0 s (the first step 2.1), then 100 samples/s"
    assert epoch_speed(0.1, 100.0, 0.09) == "in 0.1 s, 100 samples/s"  # of a tiny epoch it is of no interest


def test_while_training_the_first_step_makes_nobody_wait_for_hours(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with TrainingProgress(active=True, total_steps=101, console=Console(file=out, width=200)) as reports:
        for step in range(1, 12):
            now[0] += 60.0 if step == 1 else 2.0
            reports.step(epoch=1, step=step, rows=100, losses={"total": 1.0})
    first, *_, last = out.getvalue().splitlines()
    assert first == "epoch 1 step 1/101 total 1.0000"  # nothing is known yet
    assert last == "epoch 1 step 11/101 50 samples/s total 1.0000 3.0 min left"  # 90 steps of 2 s


@pytest.fixture
def slow_start(monkeypatch, without_code):  # noqa: F811
    """The first step of a compiled tower takes long, as where machine code is made."""
    whole = MultiTaskTower.compile

    def compiled(self, **given):
        whole(self, **given)
        code, slept = self._compiled_call_impl, []

        def call(*args, **kwargs):
            if not slept:
                slept.append(time.sleep(FIRST_S))
            return code(*args, **kwargs)

        self._compiled_call_impl = call

    monkeypatch.setattr(MultiTaskTower, "compile", compiled)


@pytest.mark.usefixtures("slow_start")
def test_a_run_says_keeps_and_compares_its_speed(mtcl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop.log(1500).to_parquet("log.parquet", index=False)
    said = {}
    for name, compiled in (("plain", "none"), ("compiled", "dense")):
        settings = f"epochs: 2, batch_size: 64, precision: fp32, compile: {compiled}"
        (tmp_path / "run.yaml").write_text(shop.RUN.replace("epochs: 4, batch_size: 32", settings))
        said[name] = mtcl("train", "run.yaml", "--device", "cpu", "--out", name)
    found = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in said}
    for name, metrics in found.items():
        history, cost = metrics["history"], metrics["cost"]
        speeds = history["samples_per_second"]
        # As the epochs' lines have it, and of all rows but the first 64 in the rest of the epoch's time.
        assert re.findall(r"([\d,]+) samples/s; validation", said[name]) == [f"{speed:,.0f}" for speed in speeds]
        for speed, seconds, first in zip(speeds, history["seconds"], history["first_step"], strict=True):
            assert speed >= (1050 - 64) / (seconds - first)
            assert speed == pytest.approx((1050 - 64) / (seconds - first), rel=0.3)
        assert cost["samples_per_second"] == pytest.approx(statistics.median(speeds))
        assert cost["first_step_s"] == max(history["first_step"])
        assert (cost["batch_size"], cost["precision"], cost["ranks"]) == (64, "fp32", 1)
    assert found["compiled"]["cost"]["compile"] == "dense"
    assert found["compiled"]["cost"]["first_step_s"] > FIRST_S
    assert re.search(r"epoch 1/2 in [\d.]+ s \(the first step [\d.]+\), then [\d,]+ samples/s; ", said["compiled"])
    assert "compiled" in next(line for line in said["compiled"].splitlines() if "1 rank on cpu, fp32" in line)
    threads = found["plain"]["cost"]["threads"]
    assert f"1 rank on cpu, fp32, {threads} thread" in said["plain"]

    shown = mtcl("compare", "plain", "compiled")
    speed = f"{found['compiled']['cost']['samples_per_second']:,.0f}"
    assert f"plain: trained {found['plain']['cost']['samples_per_second']:,.0f} samples/s on cpu with 1 rank" in shown
    assert re.search(rf"compiled: trained {speed} samples/s .*, compiled in a first step of [\d.]+ s", shown)
    # A run from before it was kept is compared all the same, and said nothing of.
    metrics = found["plain"]
    metrics["cost"] = {"samples_per_second": 5.0, "device": "cpu", "ranks": 1}
    (tmp_path / "plain/metrics.json").write_text(json.dumps(metrics))
    assert "plain: trained" not in mtcl("compare", "plain", "compiled")
    mtcl("report", "compiled")
    page = (tmp_path / "compiled/report.html").read_text()
    for part in ("first step, not counted in them", "fp32, compiled, batches of 64 rows a rank"):
        assert part in page
