"""Calibration through the public entry point: configured, fitted after training on any number of ranks, read back."""

import contextlib
import io
import json
import random
import warnings
import zipfile

import numpy as np
import pytest
import shop
import torch
import torch.distributed as dist
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec import DataError, Task
from mtcl_torchrec.config import dump_run, parse_run
from mtcl_torchrec.data.source import read_rows, split_by_time
from mtcl_torchrec.evaluation.calibration import print_calibration
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.fusing.calibrate import CalibrationFitter
from mtcl_torchrec.modules.calibration import (
    Calibration,
    IsotonicCalibration,
    IsotonicValue,
    PlattScaling,
    PriorCorrection,
    TemperatureScaling,
    UnitInterval,
)
from mtcl_torchrec.modules.rare import UncalibratedWarning
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fitted import load_state, save_state
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.sharding import ranks

RUN = """
name: calibrated
data: {log: log.parquet, val_fraction: 0.3, test_fraction: 0.3}
schema:
  user: user_id
  time: time
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8}
    - {name: genre, group: item, embedding_dim: 4}
    - {name: age, group: user, kind: dense}
    - {name: hour, group: context, embedding_dim: 4}
  tasks:
    - {name: click, kind: binary}
    - {name: buy, kind: binary, after: click}
    - {name: again, kind: binary, label: click, focal_gamma: 3.0, pos_weight: 4.0}
    - {name: taste, kind: multiclass, label: genre, item_class: genre, mask: click, inputs: [user, context]}
    - {name: stars, kind: regression, weight: 0.2}
model: {trunk: {kind: shared_bottom, expert_layers: [16]}, tower_layers: [8]}
optimizers: {tables: {lr: 0.3}, dense: {lr: 0.03}}
training: {epochs: 2, batch_size: 64, eval_batch_size: 97, warmup_steps: 5, patience: 0}
fusion: {weights: {click: 1, buy: 3, again: 1, stars: 0.5}}
calibration:
  "*": platt
  again: {kind: isotonic, knots: 32}
  buy: {kind: platt, segment: hour, min_rows: 20}
  taste: temperature
  stars: [{kind: isotonic, min_rows: 50}, {kind: cdf, min_rows: 50}]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log(4000).to_parquet(folder / "log.parquet", index=False)
    return folder


def trained(data, folder, batch_size):
    run = parse_run(RUN, folder=data)
    run.training.batch_size = batch_size
    said = io.StringIO()
    result = train_run(run, folder, device="cpu", console=Console(file=said, width=200))
    return result, said.getvalue()


def stream(rank, world_size, weighted):
    """A rank's rows of one data set, the first rank having most of them: fitted calibrations' states and notes."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(5000, generator=draw) * 2
    segment = torch.randint(0, 4, (5000,), generator=draw)
    labels = torch.bernoulli(torch.sigmoid(0.5 * z - 1), generator=draw)
    labels[torch.rand(5000, generator=draw) < 0.1] = float("nan")
    weights = torch.rand(5000, 3, generator=draw) + 0.5 if weighted else None
    p = torch.softmax(torch.randn(5000, 4, generator=draw) * 3, 1)
    classes = torch.randint(0, 4, (5000,), generator=draw).float()
    seconds = z**3 + torch.randn(5000, generator=draw)
    tasks = [Task.binary("click"), Task.binary("like"), Task.multiclass("taste", 4)]
    tasks += [Task.binary("buy"), Task.regression("seconds", mean=0.0, std=9.0)]
    weights = None if weights is None else torch.cat([weights, weights[:, :2]], 1)
    at = {"segment": "tab", "segment_rows": 4}
    pieces = {
        "click": PlattScaling(**at), "like": IsotonicCalibration(), "taste": TemperatureScaling(**at),
        "buy": [PriorCorrection(0.5), IsotonicCalibration(16, **at)], "seconds": [IsotonicValue(32), UnitInterval(32)],
    }  # fmt: skip
    calibration = Calibration(tasks, pieces)
    fitter = CalibrationFitter(calibration)
    cut = 5000 if world_size == 1 else 4100
    mine = torch.arange(5000)[:cut] if rank == 0 else torch.arange(5000)[cut:]
    for rows in mine.split(300):
        fitter.update(
            {**dict.fromkeys(("click", "like", "buy"), torch.sigmoid(z[rows])), "taste": p[rows], "seconds": z[rows]},
            torch.stack([labels, labels, classes, labels, seconds], 1)[rows],
            {"tab": segment[rows]},
            None if weights is None else weights[rows],
        )
    return {"notes": fitter.fit(), **{name: buffer.numpy() for name, buffer in calibration.state_dict().items()}}


def on_two_ranks(data, folder):
    with ranks("cpu"):
        streams = [stream(dist.get_rank(), 2, weighted) for weighted in (False, True)]
    result, said = trained(data, folder, 32)
    return streams, result, said


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The run on one rank and on two."""
    folder = tmp_path_factory.mktemp("runs")
    one = trained(data, folder / "one", 64)
    two = run_ranks(on_two_ranks, 2, data, folder / "two")
    return one, two


def test_two_ranks_with_unequal_rows_fit_what_one_does(runs):
    _, two = runs
    for weighted in (False, True):
        expected = stream(0, 1, weighted)
        for streams, _, _ in two:
            found = streams[weighted]
            assert found.pop("notes") == expected["notes"]
            for name, value in found.items():
                # Sums of ones are the same bit for bit, sums of fractions up to rounding.
                np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
        expected.pop("notes")


def test_calibration_is_nearer_to_what_happens_afterwards(runs):
    for result in (runs[0][0], *(result for _, result, _ in runs[1])):
        for split in ("val", "test"):
            again = result.calibration.splits[split].tasks["again"]
            assert abs(again["after"]["ratio"] - 1) < abs(again["before"]["ratio"] - 1)
            assert again["after"]["ece_mass"] < again["before"]["ece_mass"]
            assert again["after"]["ece_width"] < again["before"]["ece_width"]
        of_val = result.calibration.splits["val"].tasks  # on which it was fitted
        assert of_val["click"]["after"]["ratio"] == pytest.approx(1, abs=1e-3)
        assert of_val["again"]["after"]["ratio"] == pytest.approx(1, abs=0.02)
        assert of_val["stars"]["after"]["ece_mass"] < of_val["stars"]["before"]["ece_mass"]
        assert set(of_val) == {"click", "buy", "buy|click", "again", "taste", "stars"}
        shown = result.calibration.splits["test"].shown["again"]["after"]
        assert 0 < shown["labels"] < of_val["again"]["after"]["labels"]
        # The metrics of the evaluation are those of the calibrated model.
        after = result.calibration.splits["test"].tasks["again"]["after"]["ratio"]
        assert result.evaluations["test"].tasks["again"]["calibration"] == pytest.approx(after, rel=1e-5)


def test_two_ranks_calibrate_as_one_does(runs):
    (one, said), two = runs
    assert "values of hour have parameters of their own" in said
    assert "no probabilities" not in said  # the focal loss is made good
    for _, result, _ in two:
        assert result.calibration.notes == one.calibration.notes
        for task, of in one.calibration.splits["test"].tasks.items():
            found = result.calibration.splits["test"].tasks[task]["after"]
            assert found == pytest.approx(of["after"], rel=0.02, abs=2e-3, nan_ok=True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_read_back_predicts_the_same_calibrated_numbers(data, runs, world_size):
    result = runs[0][0] if world_size == 1 else runs[1][0][1]
    stored = json.loads((result.folder / "metrics.json").read_text())
    assert stored["calibration"] == result.calibration.to_json()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncalibratedWarning)  # the focal loss is made good
        run = FinishedRun.load(result.folder)
    raw = split_by_time(read_rows([str(data / "log.parquet")]), "time", 0.3, 0.3)["test"]
    rows = run.preprocessor.encode(raw)
    found = predict(run.model, rows)
    labels = rows.labels.numpy()[:, 2]
    assert found["again"].sum() / labels.sum() == pytest.approx(
        result.calibration.splits["test"].tasks["again"]["after"]["ratio"], rel=1e-5
    )
    assert (found["buy"] <= found["click"]).all()
    np.testing.assert_allclose(found["buy"], found["click"] * found["buy|click"], rtol=1e-4, atol=1e-6)
    parts = run.model.output.calibration.unit_interval(run.model.tasks[4], torch.tensor(found["stars"])).numpy()
    score = (found["click"] + 3 * found["buy"] + found["again"] + 0.5 * parts) / 5.5
    np.testing.assert_allclose(found["score"], score, rtol=1e-4, atol=1e-5)
    assert 0.2 < parts.mean() < 0.8

    # What was said before calibration comes with it, in one pass; it is what the model says without.
    before = {}
    again = predict(run.model, rows, before=before)
    assert all(np.array_equal(again[name], of) for name, of in found.items())
    run.model.output.calibration = None
    plain = predict(run.model, rows, before=(none := {}))
    assert none == {}
    assert before.keys() == plain.keys() - {"score"}
    for name, of in before.items():
        np.testing.assert_array_equal(of, plain[name])
    assert not np.array_equal(before["again"], found["again"])


def test_the_table_names_what_it_shows(runs):
    screen = Console(file=io.StringIO(), width=80)
    print_calibration(runs[0][0].calibration.splits["test"], "test split", screen)
    text = screen.file.getvalue()
    assert "all 1,200 rows" in text
    assert "The first 10 of each request by the fused score" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("{clik: platt}", "calibration: no task 'clik' (did you mean 'click'?)"),
        ("{click: plat}", "calibration.click.kind: Input should be 'prior', 'platt'"),
        ("{click: {kind: isotonic, knotz: 3}}", "unknown key 'calibration.click.knotz' (did you mean 'knots'?)"),
        ("{click: {kind: platt, knots: 3}}", "calibration.click: knots belongs to isotonic and cdf, not to platt"),
        ("{click: prior}", "calibration.click: prior needs rate"),
        ("{click: {kind: platt, shrink: 3}}", "it needs segment"),
        ("{click: [platt, isotonic]}", "platt and isotonic would both have to be fitted"),
        ("{stars: [cdf, isotonic]}", "stars: cdf comes last"),
        ("{taste: isotonic}", "calibration.taste: isotonic is nothing for a multiclass task; take temperature"),
        ("{stars: platt}", "calibration.stars: platt is nothing for a regression task; take isotonic or cdf"),
        ("{click: {kind: platt, segment: hou}}", "calibration.click.segment: no id feature 'hou'"),
        ("{click: {kind: platt, segment: topics}}", "'topics' is a bag"),
        ("cdf", "calibration.click: cdf is nothing for a binary task"),
    ],
)
def test_a_wrong_calibration_is_refused_with_the_key(calibration, message):
    with pytest.raises(ConfigError) as error:
        parse_run(shop.RUN + f"calibration: {calibration}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "calibration", ["platt", "[{kind: prior, rate: 0.1}, temperature]", "{'*': platt, stars: cdf}"]
)
def test_a_short_form_stands_for_all_binary_tasks_and_is_dumped_whole(calibration):
    run = parse_run(shop.RUN + f"calibration: {calibration}")
    assert parse_run(dump_run(run)) == run
    assert [name for name in run.calibration.pieces(run.data_schema.tasks) if name != "stars"] == ["click", "buy"]


def test_a_stored_state_is_whole_and_of_the_same_module(tmp_path):
    def calibration(knots=8, kind=IsotonicCalibration):
        return Calibration([Task.binary("click")], {"click": kind(knots) if kind is IsotonicCalibration else kind()})

    one = calibration()
    one.calibrated["click"][0].fill(0, x=np.arange(8), y=np.linspace(0.1, 0.9, 8), fitted=True)
    save_state(tmp_path / "fusion", one, {"why": "a test"})
    other = calibration()
    assert load_state(tmp_path / "fusion", other) == {"why": "a test"}
    for name, buffer in one.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name])
    with pytest.raises(DataError, match=r"has shape \(1, 8\), not \(1, 9\)"):
        load_state(tmp_path / "fusion", calibration(9))
    with pytest.raises(DataError, match=r"state.npz has no '_pieces.0.0.slope'"):
        load_state(tmp_path / "fusion", calibration(kind=PlattScaling))

    class Stopped(Exception):  # noqa: N818
        pass

    class Breaking(dict):
        def items(self):
            raise Stopped

    with pytest.raises(Stopped):
        save_state(tmp_path / "fusion", calibration(), Breaking(why="never"))
    assert load_state(tmp_path / "fusion", other) == {"why": "a test"}
    whole = (tmp_path / "fusion" / "state.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        (tmp_path / "fusion" / "state.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            load_state(tmp_path / "fusion", other)
    np.savez(tmp_path / "fusion" / "state.npz", a=np.array([object()], dtype=object))
    with pytest.raises(DataError, match="damaged"):
        load_state(tmp_path / "fusion", other)
    np.savez_compressed(tmp_path / "fusion" / "state.npz", **{"_pieces.0.0.x": np.zeros(10**6)})
    with pytest.raises(DataError, match="larger than the file"):
        load_state(tmp_path / "fusion", other)
    with zipfile.ZipFile(tmp_path / "fusion" / "state.npz", "w") as archive:  # a header alone, of many terabytes
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**43,)})
        archive.writestr("a.npy", header.getvalue())
    with pytest.raises(DataError, match="damaged"):
        load_state(tmp_path / "fusion", other)
    draw = random.Random(0)
    for _ in range(300):  # whatever byte is wrong, it is that error, or makes no difference
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        (tmp_path / "fusion" / "state.npz").write_bytes(damaged)
        with contextlib.suppress(DataError):
            load_state(tmp_path / "fusion", other)
        for name, buffer in one.state_dict().items():
            assert torch.equal(buffer, other.state_dict()[name])
