"""The benchmark for a GPU, on a CPU: that it runs, and that its figures fit together."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_benchmarks import script


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    return script("gpu").main()


def test_a_dry_run_measures_every_case_and_draws(monkeypatch, tmp_path, capsys):
    out, picture = tmp_path / "gpu.json", tmp_path / "gpu.png"
    given = ("--cpu-dry-run", "--forms", "eager", "--steps", 2, "--out", out, "--picture", picture)
    assert called(monkeypatch, *given) == 0
    result, parts = json.loads(out.read_text()), script("step_parts").PARTS
    assert result["dry_run"]
    assert [(line["case"]["name"], line["batch_size"]) for line in result["lines"]] == [
        ("middle", 32), ("large", 32), ("large", 64)
    ]  # fmt: skip
    for line in result["lines"]:
        apart = dict(line["apart_ms"])
        assert sum(apart[part] for part in parts) == pytest.approx(apart["step"])
        assert line["samples_per_s"] == pytest.approx(1000 * line["batch_size"] / line["step_ms"]["eager"])
        assert 0 < line["share_of_matrix_rate"] < 1
        assert all(0 < share < 1 for share in line["share_of_copy_rate"].values())
        # Three products for each weight of each expert's layers, gates, towers and heads: forward, and two backward.
        case = line["case"]
        widths = [case["features"] * case["dim"], *case["expert_layers"]]
        experts = case["experts"] * sum(a * b for a, b in pairwise(widths))
        least = 3 * 2 * line["batch_size"] * experts
        assert least <= line["dense_flop"] < 3 * least
    printed = capsys.readouterr().out
    assert "figures mean nothing" in printed
    assert picture.stat().st_size > 1000


def test_without_a_gpu_it_says_so_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"gpu.py needs a CUDA device, and torch finds none; --cpu-dry-run"):
        called(monkeypatch, "--out", tmp_path / "gpu.json")
    assert not list(Path(tmp_path).iterdir())
