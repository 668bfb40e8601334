"""The benchmark for a GPU, on a CPU: that it runs, and that its figures fit together."""

import ast
import json
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_benchmarks import script

import mtcl_torchrec
from mtcl_torchrec.training.sharding import ranks


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return script("gpu").main()


@pytest.fixture
def dry(monkeypatch):
    """Dry runs in this process."""
    gpu, benchmark = script("gpu"), script("gpu").benchmark
    monkeypatch.setattr(gpu, "benchmark", lambda *of, **options: benchmark(*of, **options, one=gpu.work))
    return monkeypatch


def test_a_dry_run_measures_every_case_and_draws(dry, tmp_path, capsys):
    out, parts = tmp_path / "gpu.jsonl", script("step_parts").PARTS
    assert called(dry, "--cpu-dry-run", "--forms", "eager", "--steps", 2, "--out", out) == 0
    lines, gpu = script("measure").read(out), script("gpu")
    assert [(of["what"]["case"], of["what"]["batch_size"]) for of in lines] == [
        ("middle", 32), ("large", 32), ("large", 64)
    ]  # fmt: skip
    for line in lines:
        [case] = [case for case in gpu.TINY if case.name == line["what"]["case"]]
        batch_size, apart, known = line["what"]["batch_size"], dict(line["apart_ms"]), line["limits"]
        assert sum(apart[part] for part in parts) == pytest.approx(apart["step"])
        assert line["samples_per_s"] == pytest.approx(1000 * batch_size / line["step_ms"]["eager"])
        assert 0 < line["share_of_matrix_rate"] < 1
        assert all(0 < share < 1 for share in line["share_of_copy_rate"].values())
        # Three products for each weight of each expert's layers, gates, towers and heads: forward, and two backward.
        widths = [case.features * case.dim, *case.expert_layers]
        experts = case.experts * sum(a * b for a, b in pairwise(widths))
        least = 3 * 2 * batch_size * experts
        assert least <= line["dense_flop"] < 3 * least
        # Ids that are drawn more than once are one row; the roofline is all bytes and operations, one after the other.
        assert 1 < line["distinct_rows"] < case.features * batch_size
        seconds = (
            sum(line["bytes"].values()) / known["copy_bytes_per_s"] + line["dense_flop"] / known["bf16_flop_per_s"]
        )
        assert sum(line["roofline_ms"].values()) == pytest.approx(1000 * seconds)
        assert line["share_of_roofline"] == pytest.approx(1000 * seconds / line["step_ms"]["eager"])
    [table] = json.loads((tmp_path / "gpu.json").read_text())["tables"]
    assert table["heads"] == ["", "middle, 32", "large, 32", "large, 64"]
    assert all(len(row) == 4 for row in table["rows"])
    printed = capsys.readouterr().out
    assert "figures mean nothing" in printed
    assert (tmp_path / "gpu.png").stat().st_size > 5000


def test_bytes_are_those_counted_by_hand():
    gpu = script("gpu")
    case = gpu.Case("by hand", features=3, table_rows=100, dim=8, batch_sizes=(4,))
    # 12 ids of 8 bytes, of them 5 different; rows of 32 bytes; 12 pooled rows.
    found = gpu.least_bytes(case, 4, 5, 10)
    assert found["embedding forward"] == 5 * 32 + 12 * 8 + 12 * 32
    # 12 gradients of 32 bytes; 5 rows and their number of 4 bytes, read and written.
    assert found["embedding backward"] == 12 * 32 + 5 * (64 + 8)
    assert found["optimizer"] == 10 * 4 * (1 + 3 + 3)  # gradient; weight and two averages read, and written
    batch = gpu._batch(case, 4, ["a", "b", "c"], torch.device("cpu"), 0)
    ids = batch.sparse_features.values().tolist()
    assert gpu._distinct(batch) == sum(len({*ids[start : start + 4]}) for start in (0, 4, 8))


def test_what_the_profiler_does_after_the_steps_is_not_of_the_steps():
    gpu = script("gpu")
    with gpu.profile(activities=[gpu.ProfilerActivity.CPU]) as watched:
        with gpu.record_function(gpu.WATCHED):
            for _ in range(3):
                torch.ones(4).cumsum(0)
        torch.ones(4).cumsum(0)  # as its own wait for the device
        torch.ones(4).sort()
    assert {event.key: event.count for event in watched.key_averages()}["aten::cumsum"] == 4
    assert gpu.counted_within(watched, ("aten::cumsum", "aten::sort")) == {"aten::cumsum": 3, "aten::sort": 0}


def test_places_where_the_host_waits_are_told_by_their_line(monkeypatch):
    gpu, modes = script("gpu"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu.waiting_places(2) as places:
        for _ in range(4):
            warnings.warn(gpu.WAITED, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert list(places.values()) == [2.0]
    assert next(iter(places)).rpartition(":")[0].endswith("tests/test_benchmarks_gpu.py")
    assert modes == ["warn", 0]


def test_a_form_that_cannot_be_compiled_costs_no_other_figure(dry, tmp_path, capsys):
    gpu = script("gpu")

    def broken(self, **_):
        self._compiled_call_impl = lambda *of: (_ for _ in ()).throw(RuntimeError("no compiler\nlong story"))

    dry.setattr(torch.nn.Module, "compile", broken)
    what = {"case": "middle", "batch_size": 32, "steps": 1, "forms": ["eager", "compiled", "graphs"], "dry_run": True}
    with ranks("cpu") as where:
        found = gpu.measured(gpu.TINY[0], what, where)
    assert found["failed"] == dict.fromkeys(("compiled", "graphs"), "RuntimeError: no compiler")
    assert list(found["step_ms"]) == ["eager"]
    [table] = gpu.tables([{"what": what, "repeat": 0, **found, "about": {"gpu": None}}])
    assert "middle, 32: graphs failed: RuntimeError: no compiler." in table.note


def test_it_needs_nothing_that_the_torchrec_of_an_older_torch_lacks():
    """TorchRec 1.6, of torch 2.11, which GPU machines have: these modules are imported where they are used alone."""
    lacking = {"torchrec.metrics.num_positive_samples", "torchrec.metrics.sum_weights"}
    users = set()
    for path in Path(mtcl_torchrec.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        wanted = {id(node) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in lacking}
        users |= {path.name} if wanted else set()
        assert not wanted & {id(node) for node in tree.body}, path
    assert users == {"rec_metrics.py"}


def test_without_a_gpu_it_says_so_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"gpu.py needs a CUDA device, and torch finds none; --cpu-dry-run"):
        called(monkeypatch, "--out", tmp_path / "gpu.jsonl")
    assert not list(Path(tmp_path).iterdir())
