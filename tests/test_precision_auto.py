"""training.precision auto: bf16 where the machines have it and it pays, told in the run, kept when it is resumed."""

import shutil

import numpy as np
import pytest
import shop
import torch
from ranks import run_ranks
from rich.console import Console
from test_distributed import train_module

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.training import precision
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.precision import has_fast_bf16, resolve_precision, set_precision
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import Ranks, ranks

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log().to_parquet(folder / "log.parquet", index=False)
    return folder


def train_shop(data, folder, training="", existing="refuse", epochs=1):
    said = shop.RUN.replace("epochs: 4, batch_size: 32", f"epochs: {epochs}, batch_size: 48{training}")
    with (folder.parent / f"{folder.name}.txt").open("a") as file:
        console = Console(file=file, width=200)
        return train_run(parse_run(said, folder=data), folder, device="cpu", console=console, existing=existing)


def of_machine(monkeypatch, fast, large=True):
    """A machine of one's choice: the real one has bf16 or has not."""
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: fast)
    monkeypatch.setattr(precision, "BF16_FROM", 0 if large else 10**9)


@pytest.mark.parametrize(
    ("fast", "large", "expected"), [(True, True, "bf16"), (True, False, "fp32"), (False, True, "fp32")]
)
def test_auto_takes_bf16_where_the_machine_has_it_and_the_model_is_large_enough(monkeypatch, fast, large, expected):
    of_machine(monkeypatch, fast, large)
    model = train_module("cpu").model
    assert resolve_precision("auto", model, CPU) == expected
    assert {resolve_precision(asked, model, CPU, "fp32") for asked in ("fp32", "bf16")} == {"fp32", "bf16"}
    assert {resolve_precision("auto", model, CPU, before) for before in ("fp32", "bf16")} == {"fp32", "bf16"}


def test_a_machine_says_as_its_flags_do():
    with open("/proc/cpuinfo") as file:
        flags = next(line.split() for line in file if line.startswith(("flags", "Features")))
    assert has_fast_bf16(torch.device("cpu")) == ("avx512_bf16" in flags)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_it_from_ampere_on(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fast_bf16(torch.device("cuda", 0)) == fast


def resolve_on_unlike_ranks(fast):
    with ranks("cpu") as where:
        precision.has_fast_bf16 = lambda device: fast[where.rank]
        precision.BF16_FROM = 0
        return resolve_precision("auto", train_module("cpu").model, where)


@pytest.mark.parametrize(("fast", "expected"), [((True, False), "fp32"), ((True, True), "bf16")])
def test_ranks_of_unlike_machines_agree(fast, expected):
    assert run_ranks(resolve_on_unlike_ranks, 2, fast) == [expected] * 2


def test_a_run_tells_what_auto_was_and_goes_on_with_it_on_another_machine(monkeypatch, data, tmp_path):
    of_machine(monkeypatch, fast=True)
    train_shop(data, tmp_path / "run")
    assert "precision: bf16" in (tmp_path / "run" / "run.yaml").read_text()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    same = train_shop(data, tmp_path / "again", existing="resume", epochs=2)
    of_machine(monkeypatch, fast=False)
    other = train_shop(data, tmp_path / "run", existing="resume", epochs=2)
    assert "precision: bf16" in (tmp_path / "run" / "run.yaml").read_text()
    assert (tmp_path / "run.txt").read_text().count("on cpu, bf16") == 2
    assert same.evaluations["val"].tasks["click"] == other.evaluations["val"].tasks["click"]
    run = FinishedRun.load(tmp_path / "run")
    assert run.config.training.precision == run.model.tower.precision == "bf16"


@pytest.mark.full
def test_both_precisions_validate_alike(data, tmp_path):
    """Within the spread of two seeds, which is what a difference of rounding may be worth."""
    auc = {}
    for name, training in (("fp32", ", precision: fp32"), ("bf16", ", precision: bf16"),
                           ("seed", ", precision: fp32, seed: 1")):  # fmt: skip
        result = train_shop(data, tmp_path / name, training, epochs=2)
        auc[name] = result.evaluations["val"].tasks["click"]["auc"]
    assert auc["fp32"] > 0.7
    assert auc["bf16"] != auc["fp32"]
    assert abs(auc["bf16"] - auc["fp32"]) < max(0.01, 2 * abs(auc["seed"] - auc["fp32"]))
    # What is read back predicts in its precision; forced to the other one, almost the same.
    run = FinishedRun.load(tmp_path / "bf16")
    rows = run.encode(shop.log().tail(200))
    short = predict(run.model, rows)["click"]
    set_precision(run.model, "fp32")
    exact = predict(run.model, rows)["click"]
    assert 0 < np.abs(short - exact).max() < 0.02
    assert len(np.unique(short)) >= 0.9 * len(np.unique(exact))  # the heads tie no rows


def test_a_run_from_before_there_was_a_choice_is_read_in_float32(data, tmp_path):
    train_shop(data, tmp_path / "run")
    path = tmp_path / "run" / "run.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "precision:" not in line))
    assert FinishedRun.load(tmp_path / "run").model.tower.precision == "fp32"
