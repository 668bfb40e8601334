"""The fused score: worked examples and what must hold for any weights and predictions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtcl_torchrec import WeightedMean


def score(weights, **parts):
    return WeightedMean(weights)({k: torch.tensor(v, dtype=torch.float32).reshape(-1) for k, v in parts.items()})


def test_worked_examples():
    assert score({"a": 0.5, "b": 0.3, "c": 0.2}, a=0.8, b=0.9, c=0.85).item() == pytest.approx(0.84, abs=1e-6)
    assert score({"a": 0.6, "b": 0.4}, a=0.8, b=0.9).item() == pytest.approx(0.84, abs=1e-6)


def test_weights_need_not_sum_to_one():
    assert score({"a": 6, "b": 4}, a=0.8, b=0.9).item() == pytest.approx(0.84, abs=1e-6)


def test_a_negative_weight_lowers_the_score_within_the_unit_interval():
    weights = {"like": 2.0, "report": -6.0}
    assert score(weights, like=1.0, report=0.0).item() == 1.0
    assert score(weights, like=0.0, report=1.0).item() == 0.0
    # (2·0.5 - 6·0.25 + 6) / 8
    assert score(weights, like=0.5, report=0.25).item() == pytest.approx(5.5 / 8)


unit = st.floats(0, 1)
weight = st.floats(-100, 100).filter(lambda w: abs(w) > 1e-3)


@given(st.lists(weight, min_size=1, max_size=5), st.data())
def test_any_weights_give_a_score_in_the_unit_interval_that_follows_their_signs(weights, data):
    names = [f"t{i}" for i in range(len(weights))]
    fused = WeightedMean(dict(zip(names, weights, strict=True)))
    parts = {n: torch.tensor([data.draw(unit)]) for n in names}
    base = fused(parts).item()
    assert 0 <= base <= 1
    for name, w in zip(names, weights, strict=True):
        higher = fused({**parts, name: torch.ones(1)}).item()
        assert higher >= base - 1e-5 if w > 0 else higher <= base + 1e-5


@given(st.lists(st.tuples(unit, unit), min_size=2, max_size=10))
def test_a_score_does_not_depend_on_who_else_is_scored(rows):
    fused = WeightedMean({"a": 1.0, "b": -0.5})
    a, b = (torch.tensor(column) for column in zip(*rows, strict=True))
    together = fused({"a": a, "b": b})
    alone = torch.cat([fused({"a": a[i : i + 1], "b": b[i : i + 1]}) for i in range(len(rows))])
    assert torch.equal(together, alone)


def test_tasks_without_a_weight_do_not_matter():
    fused = WeightedMean({"a": 1.0})
    assert fused({"a": torch.tensor([0.3]), "b": torch.tensor([0.9])}).item() == pytest.approx(0.3)


def test_weights_are_replaced_without_training_and_stored_with_the_model():
    fused = WeightedMean({"a": 1.0, "b": 1.0})
    fused.set_weights({"b": 3.0})
    other = WeightedMean({"a": 9.0, "b": 9.0})
    other.load_state_dict(fused.state_dict())
    parts = {"a": torch.tensor([1.0]), "b": torch.tensor([0.0])}
    assert fused(parts).item() == other(parts).item() == pytest.approx(0.25)
    with pytest.raises(KeyError, match="'c' is not part of this score"):
        fused.set_weights({"c": 1.0})


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": float("nan")}, {"a": float("inf"), "b": 1.0}])
def test_weights_that_give_no_score_are_refused(weights):
    with pytest.raises(ValueError, match="at least one that is not 0"):
        WeightedMean(weights)


def test_a_refused_weight_changes_nothing():
    fused = WeightedMean({"a": 1.0})
    with pytest.raises(ValueError, match="not 0"):
        fused.set_weights({"a": 0.0})
    assert fused.weights.tolist() == [1.0]


def test_the_gradient_reaches_every_part():
    parts = {n: torch.rand(4, requires_grad=True) for n in ("a", "b")}
    WeightedMean({"a": 1.0, "b": -3.0})(parts).sum().backward()
    torch.testing.assert_close(parts["a"].grad, torch.full((4,), 0.25))
    torch.testing.assert_close(parts["b"].grad, torch.full((4,), -0.75))
