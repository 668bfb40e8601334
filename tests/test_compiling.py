"""training.compile dense: the same training, compiled, through the public entry."""

import numpy as np
import pytest
import shop
from ranks import run_ranks
from rich.console import Console
from torch._dynamo.utils import counters

from mtcl_torchrec import ConfigError
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.modules.towers import MultiTaskTower
from mtcl_torchrec.serving.export import export_run
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.run import train_run

CALIBRATED = "\ncalibration: {click: platt}\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log(800).to_parquet(folder / "log.parquet", index=False)
    return folder


@pytest.fixture
def without_code(monkeypatch):
    """Traced and differentiated as ever, but run by torch's own kernels: making machine code takes a minute."""
    whole = MultiTaskTower.compile
    monkeypatch.setattr(MultiTaskTower, "compile", lambda self, **given: whole(self, backend="aot_eager", **given))


def train_shop(data, folder, compiled="dense", epochs=1, existing="refuse", change=lambda text: text):
    """The result, and the number of graphs that were compiled."""
    counters.clear()
    said = shop.RUN.replace("epochs: 4, batch_size: 32", f"epochs: {epochs}, batch_size: 128, compile: {compiled}")
    said = change(said.replace("gate_dropout: 0.1", "gate_dropout: 0.0"))  # compiled dropout draws other numbers
    result = train_run(
        parse_run(said, folder=data), folder, device="cpu", console=Console(quiet=True), existing=existing
    )
    return result, counters["stats"]["unique_graphs"]


def weights(folder):
    return FinishedRun.load(folder).model.state_dict()


def assert_alike(folder, expected):
    ours, theirs = weights(folder), weights(expected)
    assert [name for name in ours if not name.startswith("output.calibration.")] == list(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name].float(), value.float(), atol=2e-4, rtol=1e-3, err_msg=name)


@pytest.mark.usefixtures("without_code")
def test_a_compiled_run_trains_the_same_model_in_one_graph(data, tmp_path):
    _, none = train_shop(data, tmp_path / "eager", "none")
    result, graphs = train_shop(data, tmp_path / "run", change=lambda text: text + CALIBRATED)
    assert none == 0
    assert graphs == 1  # batches of 128 and the rest of the epoch, but no evaluation
    assert_alike(tmp_path / "run", tmp_path / "eager")
    assert result.calibration is not None
    run, rows = FinishedRun.load(tmp_path / "run"), shop.log(800).tail(50)
    assert np.isfinite(predict(run.model, run.encode(rows))["score"]).all()
    assert counters["stats"]["unique_graphs"] == graphs


def test_without_a_compiler_the_error_says_so_in_a_line(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"compile dense: needs a C\+\+ compiler, and 'no-such-compiler' is not"
    ) as told:
        train_shop(data, tmp_path / "run")
    assert "\n" not in str(told.value)


def whole_and_resumed(data, folder):
    """Two epochs eager at once, and compiled one after the other."""

    def steady(text):
        return text.replace("warmup_steps: 5", "warmup_steps: 0, decay: none")

    train_shop(data, folder / "eager", "none", epochs=2, change=steady)
    return [
        train_shop(data, folder / "run", epochs=epochs, existing=existing, change=steady)[1]
        for epochs, existing in ((1, "refuse"), (2, "resume"))
    ]


@pytest.mark.full
def test_two_ranks_compile_the_same_and_go_on_after_an_epoch(data, tmp_path):
    first, second = run_ranks(whole_and_resumed, 2, data, tmp_path, timeout=600)
    assert first == second
    assert first[0] >= 1  # several: under DDP the tower is cut into more graphs than on one rank
    assert_alike(tmp_path / "run", tmp_path / "eager")
    export_run(FinishedRun.load(tmp_path / "run"), tmp_path / "exported", compiled="no")


@pytest.mark.full
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("kind: mmoe, num_experts: 3", "kind: ple"),
        lambda text: text + "\nbalance: {surgery: {kind: pcgrad}}\n",
        lambda text: text.replace("epochs: 1", "epochs: 1, precision: bf16"),
    ],
    ids=["levels", "surgery", "bf16"],
)
def test_other_models_train_the_same_compiled(data, tmp_path, change):
    eager, _ = train_shop(data, tmp_path / "eager", "none", change=change)
    result, graphs = train_shop(data, tmp_path / "run", change=change)
    assert graphs >= 1
    expected = eager.evaluations["val"].tasks["click"]["ne"]
    assert result.evaluations["val"].tasks["click"]["ne"] == pytest.approx(expected, rel=0.02)
