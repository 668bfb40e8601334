"""Calibration: the modules, their fit from a stream against scikit-learn and SciPy, and the numbers of the report."""

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

from mtcl_torchrec import MTCL, SharedBottom, Task, WeightedMean
from mtcl_torchrec.evaluation.calibration import calibration_numbers, report_calibration, shown_rows
from mtcl_torchrec.fusing.calibrate import CalibrationFitter
from mtcl_torchrec.modules.calibration import (
    Calibration,
    IsotonicCalibration,
    IsotonicValue,
    PlattScaling,
    PriorCorrection,
    TemperatureScaling,
    UnitInterval,
    log_odds,
)

WIDTH = 32 / 4096  # of a bin of log-odds
ROWS = 20_000


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.fixture(scope="module")
def rows():
    """Log-odds, labels of σ(0.6 z - 1) with some missing, weights, and a segment that changes both numbers."""
    draw = np.random.default_rng(0)
    z = draw.normal(-0.5, 1.5, ROWS).astype(np.float32)
    segment = draw.choice(6, ROWS, p=[0.05, 0.3, 0.3, 0.3, 0.045, 0.005])
    slope, intercept = np.array([0.6, 1.0, 0.5, 1.5, 0.6, 0.6]), np.array([-1.0, 0.0, -1.0, 1.0, -1.0, -1.0])
    label = (draw.random(ROWS) < sigmoid(slope[segment] * z + intercept[segment])).astype(np.float32)
    label[draw.random(ROWS) < 0.1] = np.nan
    return {"z": z, "label": label, "weight": draw.uniform(0.5, 2, ROWS).astype(np.float32), "segment": segment}


def fitted(task, piece, predicted, label, *, segment=None, weight=None, order=None, cuts=7):
    """A calibration fitted from batches, and what is said of it."""
    pieces = list(piece) if isinstance(piece, (list, tuple)) else [piece]
    calibration = Calibration([task], {task.name: pieces})
    fitter = CalibrationFitter(calibration)
    order = np.arange(len(label)) if order is None else order
    for at in np.array_split(order, cuts):
        fitter.update(
            {task.name: torch.as_tensor(predicted)[at]},
            torch.as_tensor(label)[at].unsqueeze(1),
            None if segment is None else {"tab": torch.as_tensor(segment)[at]},
            None if weight is None else torch.as_tensor(weight)[at].unsqueeze(1),
        )
    return calibration, fitter.fit()


def binary(piece, rows, **options):
    return fitted(Task.binary("click"), piece, torch.sigmoid(torch.tensor(rows["z"])), rows["label"], **options)


def line_of(z, label, weight=None):
    known = ~np.isnan(label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
        model.fit(z[known, None].astype(np.float64), label[known], None if weight is None else weight[known])
    return model.coef_[0, 0], model.intercept_[0]


# ---------------------------------------------------------------------- fits against references


@pytest.mark.parametrize("weighted", [False, True])
def test_platt_from_a_stream_is_the_logistic_regression_of_all_rows(rows, weighted):
    weight = rows["weight"] if weighted else None
    calibration, notes = binary(PlattScaling(), rows, weight=weight)
    (piece,) = calibration.calibrated["click"]
    a, b = line_of(rows["z"], rows["label"], weight)
    assert notes == []
    assert piece.slope.item() == pytest.approx(a, abs=2e-4)
    assert piece.intercept.item() == pytest.approx(b, abs=2e-4)


def test_a_temperature_from_a_stream_is_the_best_one(rows):
    calibration, _ = binary(TemperatureScaling(), rows)
    (piece,) = calibration.calibrated["click"]
    known = ~np.isnan(rows["label"])
    z, y = rows["z"][known].astype(np.float64), rows["label"][known]
    best = minimize_scalar(lambda a: (np.logaddexp(0, a * z) - y * a * z).sum(), bounds=(0.01, 10), method="bounded")
    assert piece.slope.item() == pytest.approx(best.x, abs=2e-4)


def test_isotonic_knots_are_scikit_learns_curve_within_a_bin(rows):
    known = ~np.isnan(rows["label"])
    z = rows["z"][known].astype(np.float64)
    reference = IsotonicRegression(out_of_bounds="clip").fit(z, rows["label"][known])
    grid = np.linspace(-5, 4, 500)
    # Rows of one bin are pooled first, which may move a step by a few rows; fewer knots leave out small steps.
    for knots, most, mean in ((1024, 0.02, 0.003), (64, 0.05, 0.01)):
        calibration, _ = binary(IsotonicCalibration(knots), rows)
        ours = calibration.calibrate({"click": torch.sigmoid(torch.tensor(grid))}, {})["click"].numpy()
        assert (ours >= reference.predict(grid - WIDTH) - most).all()
        assert (ours <= reference.predict(grid + WIDTH) + most).all()
        assert np.abs(ours - reference.predict(grid)).mean() < mean
    few = {name: of[:300] for name, of in rows.items()}  # hardly two of them in a bin: the same curve
    few["z"] = (np.floor(few["z"] / WIDTH) + 0.5).astype(np.float32) * np.float32(WIDTH)
    known = ~np.isnan(few["label"])
    exact = IsotonicRegression(out_of_bounds="clip").fit(few["z"][known].astype(np.float64), few["label"][known])
    calibration, _ = binary(IsotonicCalibration(512), few)
    ours = calibration.calibrate({"click": torch.sigmoid(torch.tensor(few["z"]))}, {})["click"].numpy()
    least = 0.5 / known.sum()
    assert ours == pytest.approx(exact.predict(few["z"]).clip(least, 1 - least), abs=1e-3)


def test_a_multiclass_temperature_is_the_best_one():
    draw = np.random.default_rng(1)
    true = draw.normal(0, 2, (4000, 5))
    p_true = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    label = (p_true.cumsum(1) < draw.random((4000, 1))).sum(1).clip(max=4).astype(np.float32)
    label[::7] = np.nan
    weight = draw.uniform(0.5, 2, 4000).astype(np.float32)
    p = torch.softmax(torch.tensor(true * 2.5).float(), 1)  # too sure of itself
    task = Task.multiclass("taste", 5)
    calibration, notes = fitted(task, TemperatureScaling(), p, label, weight=weight)
    known = ~np.isnan(label)
    log_p, y = np.log(p.numpy()[known].astype(np.float64)), label[known].astype(int)

    def loss(a):
        z = a * log_p
        return (weight[known] * (np.logaddexp.reduce(z, 1) - z[np.arange(len(y)), y])).sum()

    best = minimize_scalar(loss, bounds=(0.05, 10), method="bounded").x
    assert notes == []
    assert calibration.calibrated["taste"][0].slope.item() == pytest.approx(best, abs=1e-3)
    after = calibration.calibrate({"taste": p}, {})["taste"]
    torch.testing.assert_close(after, torch.softmax(best * torch.log(p), 1), atol=1e-3, rtol=0)


def test_a_regression_is_recalibrated_and_becomes_its_share_of_held_out_predictions():
    draw = np.random.default_rng(2)
    predicted = draw.gamma(2.0, 20.0, 5000).astype(np.float32)
    label = (predicted**2 / 50 + draw.normal(0, 5, 5000)).astype(np.float32)
    task = Task.regression("seconds", mean=40.0, std=30.0)
    calibration, notes = fitted(task, [IsotonicValue(512), UnitInterval(512)], predicted, label)
    assert notes == []
    ours = calibration.calibrate({"seconds": torch.tensor(predicted)}, {})["seconds"]
    reference = IsotonicRegression(out_of_bounds="clip").fit_transform(predicted, label)
    inner = (predicted > 2) & (predicted < 150)
    assert np.abs(ours.numpy() - reference)[inner].mean() < 0.3  # labels go up to 800
    # The last knots are of the whole: shares of what is below, ties counting half.
    part = calibration.unit_interval(task, ours).numpy()
    share = (ours.numpy()[None] < ours.numpy()[:200, None]).mean(1)
    share = share / 2 + (ours.numpy()[None] <= ours.numpy()[:200, None]).mean(1) / 2
    assert np.abs(part[:200] - share).max() < 0.02
    beyond = calibration.unit_interval(task, torch.tensor([-1e9, float(ours.max()) + 10, float(ours.max()) + 20, 1e9]))
    assert beyond[0] == 0
    assert beyond[3] == 1
    assert beyond[1] < beyond[2] < 1


@pytest.mark.parametrize("kind", [PlattScaling, TemperatureScaling, IsotonicCalibration])
def test_any_order_and_any_cut_into_batches_is_the_same_fit(rows, kind):
    one, _ = binary(kind(), rows, weight=rows["weight"])
    order = np.random.default_rng(3).permutation(ROWS)
    other, _ = binary(kind(), rows, weight=rows["weight"], order=order, cuts=100)
    for name, buffer in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], buffer, rtol=1e-5, atol=1e-6)


def test_missing_labels_and_rows_without_weight_count_nowhere(rows):
    known = ~np.isnan(rows["label"])
    alone = {name: of[known] for name, of in rows.items()}
    one, _ = binary(PlattScaling(), alone)
    weight = np.ones(ROWS, np.float32)
    other, _ = binary(PlattScaling(), {**rows, "label": np.where(known, rows["label"], 1.0)}, weight=weight * known)
    for name, buffer in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], buffer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [PlattScaling, TemperatureScaling, IsotonicCalibration])
def test_the_unit_of_the_weights_does_not_matter(rows, kind):
    one, _ = binary(kind(), rows, weight=rows["weight"])
    for unit in (1e-7, 1e7):
        other, notes = binary(kind(), rows, weight=rows["weight"] * np.float32(unit))
        assert notes == []
        for name, buffer in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], buffer, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- segments


def test_each_value_of_a_segment_has_its_own_line_and_the_rare_and_unknown_the_line_of_all(rows):
    piece = PlattScaling(segment="tab", segment_rows=6, min_rows=300, shrink=0.0)
    calibration, notes = binary(piece, rows, segment=rows["segment"])
    assert notes == ["calibration.click: 4 of 5 values of tab have parameters of their own"]
    of_all = line_of(rows["z"], rows["label"])
    for value in range(7):
        inside = rows["segment"] == value
        a, b = line_of(rows["z"][inside], rows["label"][inside]) if value in (1, 2, 3, 4) else of_all
        assert piece.slope[value].item() == pytest.approx(a, abs=1e-3)
        assert piece.intercept[value].item() == pytest.approx(b, abs=1e-3)
    # unknown, too rare, missing, and beyond the table
    same = torch.full((4,), 0.3)
    out = calibration.calibrate({"click": same}, {"tab": torch.tensor([0, 5, -1, 99])})["click"]
    expected = sigmoid(of_all[0] * log_odds(same).numpy() + of_all[1])
    assert out.numpy() == pytest.approx(expected, abs=1e-3)


def test_shrinking_draws_a_value_to_all_rows(rows):
    slopes = []
    for shrink in (0.0, 3000.0, 1e9):
        piece = PlattScaling(segment="tab", segment_rows=6, shrink=shrink)
        binary(piece, rows, segment=rows["segment"])
        slopes.append(piece.slope.tolist())
    assert slopes[0][3] > slopes[1][3] + 0.05 > slopes[2][3] + 0.1
    assert slopes[2][3] == pytest.approx(slopes[2][6], abs=1e-3)


def test_curves_and_multiclass_temperatures_go_by_segment_too(rows):
    piece = IsotonicCalibration(64, segment="tab", segment_rows=6, shrink=0.0)
    calibration, _ = binary(piece, rows, segment=rows["segment"])
    inside = (rows["segment"] == 3) & ~np.isnan(rows["label"])
    reference = IsotonicRegression(out_of_bounds="clip").fit(rows["z"][inside], rows["label"][inside])
    grid = np.linspace(-3, 3, 100)
    ours = calibration.calibrate({"click": torch.sigmoid(torch.tensor(grid))}, {"tab": torch.full((100,), 3)})["click"]
    assert np.abs(ours.numpy() - reference.predict(grid)).mean() < 0.01

    p = torch.softmax(torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) * 2, 1)
    segment = torch.arange(2000) % 2 + 1
    sure = torch.where((segment == 1).unsqueeze(1), p, torch.softmax(3 * torch.log(p), 1))
    label = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(1)).squeeze(1).float()
    piece = TemperatureScaling(segment="tab", segment_rows=3, shrink=0.0)
    fitted(Task.multiclass("taste", 3), piece, sure, label, segment=segment)
    assert piece.slope[1].item() == pytest.approx(1.0, abs=0.15)
    assert piece.slope[2].item() == pytest.approx(1 / 3, abs=0.05)


# ---------------------------------------------------------------------- what cannot be fitted


@pytest.mark.parametrize(
    ("kind", "z", "label", "note"),
    [
        (PlattScaling, np.linspace(-1, 1, 300), np.zeros(300), "no label is positive; it is left as it is"),
        (TemperatureScaling, np.linspace(-1, 1, 300), np.ones(300), "every label is positive; it is left as it is"),
        (IsotonicCalibration, np.linspace(-1, 1, 300), np.zeros(300), "no label is positive; it is left as it is"),
        (PlattScaling, np.linspace(-1, 1, 20), np.arange(20) % 2, "20 labelled rows are fewer than min_rows (200)"),
        (PlattScaling, np.linspace(-1, 1, 300), np.full(300, np.nan), "0 labelled rows are fewer than min_rows (200)"),
        (PlattScaling, np.linspace(-1, 1, 300), np.arange(300) >= 150, "the predictions part the labels altogether"),
        (TemperatureScaling, np.linspace(-1, 1, 300), np.arange(300) < 150, "the labels do not rise with"),
        (TemperatureScaling, np.zeros(300), np.arange(300) % 2, "the labels do not rise with"),
    ],
)
def test_a_task_that_cannot_be_fitted_is_left_as_it_is_and_said_so(kind, z, label, note):
    rows = {"z": z.astype(np.float32), "label": label.astype(np.float32)}
    calibration, notes = binary(kind(), rows)
    assert len(notes) == 1
    assert note in notes[0]
    p = torch.tensor([0.0, 0.01, 0.4, 0.999, 1.0])
    torch.testing.assert_close(calibration.calibrate({"click": p}, {})["click"], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z", [np.zeros(300), -np.sign(np.arange(300) % 3 - 0.5)])
def test_platt_corrects_only_the_mean_where_predictions_say_nothing_or_the_opposite(z):
    label = (np.arange(300) % 3 == 0).astype(np.float32)
    if z.any():
        label[::30] = 1 - label[::30]
        z = -z
    calibration, notes = binary(PlattScaling(), {"z": z.astype(np.float32), "label": label})
    (piece,) = calibration.calibrated["click"]
    assert "only their mean is corrected" in notes[0]
    assert piece.slope.item() == 1
    after = calibration.calibrate({"click": torch.sigmoid(torch.tensor(z))}, {})["click"]
    assert after.mean().item() == pytest.approx(label.mean(), abs=1e-4)


@pytest.mark.parametrize("kind", [PlattScaling, TemperatureScaling, IsotonicCalibration, "multiclass", "regression"])
@pytest.mark.parametrize("what", ["prediction", "label", "weight"])
def test_one_row_that_is_no_number_leaves_the_task_as_it_is(rows, kind, what):
    few = {name: of[:1000].copy() for name, of in rows.items()}
    few["label"] = np.nan_to_num(few["label"])
    {"prediction": few["z"], "label": few["label"], "weight": few["weight"]}[what][7] = {
        "prediction": np.nan, "label": np.inf, "weight": -1.0
    }[what]  # fmt: skip
    if kind == "multiclass":
        p = torch.softmax(torch.stack([torch.tensor(few["z"]), torch.zeros(1000)], 1), 1)
        task, piece, predicted = Task.multiclass("click", 2), TemperatureScaling(), p
    elif kind == "regression":
        task, piece, predicted = Task.regression("click", mean=0, std=1), [IsotonicValue(), UnitInterval()], few["z"]
    else:
        task, piece, predicted = Task.binary("click"), kind(), torch.sigmoid(torch.tensor(few["z"]))
    calibration, notes = fitted(task, piece, predicted, few["label"], weight=few["weight"])
    assert all("of 1 labelled rows the prediction, label or weight is not finite" in note for note in notes)
    assert len(notes) == (2 if kind == "regression" else 1)
    fresh = Calibration([task], {"click": piece}).calibrate({"click": torch.as_tensor(predicted)[:5]}, {})["click"]
    torch.testing.assert_close(fresh, torch.as_tensor(predicted)[:5], rtol=1e-4, atol=1e-5)
    assert all(buffer.isfinite().all() for buffer in calibration.state_dict().values())


def test_constant_predictions_have_a_defined_outcome_everywhere():
    calibration, _ = binary(
        IsotonicCalibration(), {"z": np.zeros(300, np.float32), "label": np.arange(300, dtype=np.float32) % 3 == 0}
    )
    assert calibration.calibrate({"click": torch.tensor([0.2])}, {})["click"].item() == pytest.approx(1 / 3, abs=1e-5)
    _, notes = fitted(
        Task.multiclass("taste", 3), TemperatureScaling(), torch.full((300, 3), 1 / 3), np.arange(300) % 3 * 1.0
    )
    assert "no temperature within 1/16 … 16" in notes[0]
    task = Task.regression("seconds")
    calibration, notes = fitted(task, UnitInterval(), np.full(300, 2.0, np.float32), np.arange(300.0))
    assert notes == ["calibration.seconds: the predictions are all alike; its part of the fused score is left as it is"]
    part = calibration.unit_interval(task, torch.tensor([1.0]))
    torch.testing.assert_close(part, torch.sigmoid(torch.tensor([1.0])))


# ---------------------------------------------------------------------- the modules


def test_a_known_rate_of_down_sampling_is_undone_exactly():
    p = torch.rand(100, generator=torch.Generator().manual_seed(0))
    sampled = p / (p + 0.05 * (1 - p))  # what p becomes where a twentieth of the negatives is left
    calibration = Calibration([Task.binary("click")], {"click": PriorCorrection(0.05)})
    torch.testing.assert_close(calibration.calibrate({"click": sampled}, {})["click"], p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_a_prior_before_or_after_a_fitted_piece_is_seen_or_not_seen_by_the_fit(rows, first):
    prior, temperature = PriorCorrection(0.1), TemperatureScaling()
    calibration, _ = binary([prior, temperature] if first else [temperature, prior], rows)
    known = ~np.isnan(rows["label"])
    z, y = rows["z"][known] + np.log(0.1) * first, rows["label"][known]
    best = minimize_scalar(lambda a: (np.logaddexp(0, a * z) - y * a * z).sum(), bounds=(0.01, 10), method="bounded").x
    assert temperature.slope.item() == pytest.approx(best, abs=1e-3)
    after = calibration.calibrate({"click": torch.tensor([0.5])}, {})["click"].item()
    assert after == pytest.approx(sigmoid(best * np.log(0.1) if first else np.log(0.1)), abs=1e-4)


CHAIN = [Task.binary("view"), Task.binary("click", after="view"), Task.binary("buy", after="click")]
numbers = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=3, max_size=3), st.floats(0.25, 4), st.floats(-3, 3), st.sampled_from([0, 1, 2]))
def test_no_event_of_a_chain_becomes_likelier_than_the_one_before(probabilities, slope, intercept, which):
    view, click, buy = (torch.tensor([p]) for p in np.cumprod(np.float32(probabilities)))
    piece = PlattScaling()
    piece.fill(0, slope=slope, intercept=intercept)
    raw = {"view": view, "click": click, "buy": buy}
    raw |= {"click|view": torch.tensor([probabilities[1]]), "buy|click": torch.tensor([probabilities[2]])}
    out = Calibration(CHAIN, {CHAIN[which].name: piece}).calibrate(raw, {})
    for child, parent in (("click", "view"), ("buy", "click")):
        if (
            which < 2 or child == "buy"
        ):  # of a chain whose later part alone is calibrated, the earlier part is untouched
            assert out[child] <= out[parent]
            assert 0 <= out[f"{child}|{parent}"] <= 1
            torch.testing.assert_close(out[parent] * out[f"{child}|{parent}"], out[child], rtol=1e-5, atol=1e-7)
    if which == 2:
        assert out["click"] is raw["click"]
        assert out["click|view"] is raw["click|view"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-8, 8), st.floats(0, 1)), min_size=2, max_size=12, unique_by=lambda point: point[0]),
    st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30),
)
def test_a_curve_never_falls_and_stays_between_its_ends(points, values):
    x, y = np.sort([p for p, _ in points]), np.sort([q for _, q in points])
    piece = UnitInterval(len(points))
    piece.fill(0, x=x, y=y, fitted=True)
    at = torch.tensor(sorted(values))
    out = piece(at, at)
    assert (out.diff() >= 0).all()
    assert (out >= 0).all()
    assert (out <= 1).all()
    expected = np.interp(at.numpy(), piece.x[0].numpy(), piece.y[0].numpy())
    apart = np.diff(piece.x[0].numpy()).min() > 1e-3  # else a float32 is more than a step wide
    assert not apart or out.numpy() == pytest.approx(expected, abs=1e-5)
    # A row's number does not depend on who else is in the batch.
    assert torch.equal(out, torch.cat([piece(one.unsqueeze(0), one.unsqueeze(0)) for one in at]))


def whole(segment_rows=6):
    """A calibration of every kind with parameters that differ."""
    tasks = [Task.binary("click"), Task.binary("buy", after="click"), Task.binary("like")]
    tasks += [Task.multiclass("taste", 4), Task.regression("seconds", mean=30.0, std=10.0)]
    at = {"segment": "tab", "segment_rows": segment_rows}
    pieces = {
        "click": [PriorCorrection(0.3), PlattScaling(**at)],
        "buy": TemperatureScaling(),
        "like": IsotonicCalibration(5, **at),
        "taste": TemperatureScaling(**at),
        "seconds": [IsotonicValue(4), UnitInterval(6)],
    }
    calibration = Calibration(tasks, pieces)
    draw = torch.Generator().manual_seed(0)
    for name, buffer in calibration.named_buffers():
        if buffer.is_floating_point() and not name.endswith("shift"):
            new = torch.rand(buffer.shape, generator=draw) + 0.5
            buffer.copy_(new.cumsum(-1) / new.sum(-1, keepdim=True) if buffer.dim() == 2 else new)
        elif buffer.dtype == torch.bool:
            buffer.fill_(True)
    return calibration


def some_predictions(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    click, given_click = torch.rand(2, n, generator=draw)
    return {
        "click": click,
        "buy": click * given_click,
        "buy|click": given_click,
        "like": torch.rand(n, generator=draw),
        "taste": torch.softmax(torch.randn(n, 4, generator=draw), 1),
        "seconds": 30 + 10 * torch.randn(n, generator=draw),
    }


class _Exported(torch.nn.Module):
    def __init__(self, calibration):
        super().__init__()
        self.calibration = calibration

    def forward(self, predictions, tab):
        out = self.calibration.calibrate(predictions, {"tab": tab})
        out["part"] = self.calibration.unit_interval(self.calibration.tasks[-1], out["seconds"])
        return out


def test_every_kind_is_exported_with_its_state_and_for_any_batch():
    module = _Exported(whole())
    inputs = (some_predictions(8), torch.arange(8) - 1)
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = {"predictions": {name: {0: batch} for name in inputs[0]}, "tab": {0: batch}}
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes).module()
    others = (some_predictions(33, seed=1), torch.randint(-1, 8, (33,)))
    for name, value in module(*others).items():
        torch.testing.assert_close(exported(*others)[name], value)


def test_the_model_applies_it_before_the_score_and_only_then():
    tables = [EmbeddingBagConfig(name="t", num_embeddings=50, embedding_dim=8, feature_names=["user", "tab"])]
    calibration = whole(segment_rows=50)
    torch.manual_seed(0)
    model = MTCL(
        EmbeddingBagCollection(tables=tables), 0, SharedBottom([8]), calibration.tasks,
        WeightedMean({"click": 1.0, "buy": 2.0, "like": 1.0, "seconds": 3.0}), calibration=calibration,
    ).eval()  # fmt: skip
    ids = torch.arange(14)
    features = KeyedJaggedTensor(["user", "tab"], values=ids, lengths=torch.ones(14, dtype=torch.int64))
    after = model(torch.empty(7, 0), features)
    model.output.calibration = None
    before = model(torch.empty(7, 0), features)
    expected = calibration.calibrate(before, {"tab": ids[7:]})
    for task in calibration.tasks:
        torch.testing.assert_close(after[task.name], expected[task.name])
        assert not torch.allclose(after[task.name], before[task.name])
    parts = [expected["click"], expected["buy"], expected["like"]]
    parts.append(calibration.unit_interval(calibration.tasks[-1], expected["seconds"]))
    torch.testing.assert_close(after["score"], torch.stack(parts, 1) @ torch.tensor([1.0, 2.0, 1.0, 3.0]) / 7)
    names = {name for name in model.state_dict() if "calibration" in name}
    assert names == set()  # it was taken off; the training checkpoint of a model without it holds nothing of it


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ({"clik": PlattScaling()}, "no task 'clik' (did you mean 'click'?)"),
        ({"click": IsotonicValue()}, "IsotonicValue is nothing for a binary task"),
        ({"seconds": PlattScaling()}, "PlattScaling is nothing for a regression task; there are IsotonicValue, Unit"),
        ({"click": [PlattScaling(), TemperatureScaling()]}, "more than one piece would have to be fitted"),
        ({"seconds": [UnitInterval(), IsotonicValue()]}, "UnitInterval comes last"),
        ({"click": []}, "it has no piece"),
    ],
)
def test_pieces_that_do_not_belong_are_refused(pieces, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Calibration([Task.binary("click"), Task.regression("seconds")], pieces)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"lies in \(0, 1\], not at 0"):
        PriorCorrection(0.0)
    with pytest.raises(ValueError, match="needs the feature and the rows of its table"):
        PlattScaling(segment="tab")
    with pytest.raises(ValueError, match="min_rows is at least 1"):
        PlattScaling(min_rows=0)
    with pytest.raises(ValueError, match="at least 2 knots"):
        UnitInterval(1)


# ---------------------------------------------------------------------- the report


def test_calibration_numbers_are_those_of_a_loop():
    draw = np.random.default_rng(4)
    p, weight = draw.random(1000) ** 2, draw.uniform(0.5, 2, 1000)
    y = (draw.random(1000) < p**1.3).astype(float)
    y[::9] = np.nan
    numbers = calibration_numbers(Task.binary("click"), y, p, weight)
    known = ~np.isnan(y)
    y, p, weight = y[known], p[known], weight[known]
    assert numbers["ratio"] == pytest.approx((weight * p).sum() / (weight * y).sum())
    wide = sum(
        abs((weight * (p - y))[(p >= low / 15) & (p < (low + 1) / 15)].sum()) for low in range(15)
    ) / weight.sum()  # fmt: skip
    assert numbers["ece_width"] == pytest.approx(wide)
    mass = sum(abs((weight * (p - y))[part].sum()) for part in np.array_split(np.argsort(p), 15)) / weight.sum()
    assert numbers["ece_mass"] == pytest.approx(mass, rel=0.05)  # a row at an edge may belong to either side
    assert numbers["labels"] == len(y)
    constant = calibration_numbers(Task.binary("click"), np.array([0.0, 1.0, 0.0, 1.0]), np.full(4, 0.75))
    assert (constant["ratio"], constant["ece_mass"], constant["ece_width"]) == (1.5, 0.25, 0.25)


def test_the_report_compares_all_rows_and_those_that_are_shown():
    tasks = [Task.binary("click"), Task.binary("buy", after="click")]
    labels = np.array([[1, 1], [1, 0], [0, 0], [0, 0]], float)
    before = {"click": np.full(4, 0.9), "buy": np.full(4, 0.3), "buy|click": np.full(4, 1 / 3)}
    after = {"click": np.full(4, 0.5), "buy": np.full(4, 0.25), "buy|click": np.full(4, 0.5)}
    after["score"] = np.array([0.9, 0.1, 0.5, 0.6])
    requests = np.array([1.0, 1.0, 2.0, np.nan])
    report = report_calibration(tasks, before, after, labels, requests, k=1)
    assert report.tasks["click"]["before"]["ratio"] == pytest.approx(1.8)
    assert report.tasks["click"]["after"]["ratio"] == pytest.approx(1.0)
    assert report.tasks["buy|click"]["after"]["labels"] == 2  # where click happened
    assert report.shown["click"]["after"]["labels"] == 2
    assert report.shown["click"]["before"]["ratio"] == pytest.approx(1.8)  # of rows 0 and 2, one was clicked
    assert shown_rows(after["score"], requests, 1).tolist() == [True, False, True, False]
    assert report_calibration(tasks, before, before, labels).shown == {}
