"""Losses, predictions and parts of the score, task by task."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mtcl_torchrec.modules.heads import in_unit_interval, loss_per_row, prediction
from mtcl_torchrec.schema import Task


def test_binary_loss_is_the_negative_log_likelihood():
    logits, labels = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    p = torch.sigmoid(logits)
    expected = -torch.where(labels == 1, p.log(), (1 - p).log())
    torch.testing.assert_close(loss_per_row(Task.binary("a"), logits, labels), expected)


def test_multiclass_loss_is_the_negative_log_probability_of_the_class():
    logits, labels = torch.randn(4, 3), torch.tensor([0.0, 2.0, 1.0, 1.0])
    expected = -torch.log_softmax(logits, 1)[torch.arange(4), labels.long()]
    torch.testing.assert_close(loss_per_row(Task.multiclass("a", 3), logits, labels), expected)


@pytest.mark.parametrize(("loss", "reference"), [("mse", F.mse_loss), ("huber", F.huber_loss)])
def test_regression_loss_is_of_the_standardised_label(loss, reference):
    task = Task.regression("a", loss=loss, mean=10.0, std=4.0)
    logits, labels = torch.randn(5), 10 + 4 * torch.randn(5)
    expected = reference(logits, (labels - 10) / 4, reduction="none")
    torch.testing.assert_close(loss_per_row(task, logits, labels), expected)
    # The minimum is where the prediction is the label.
    torch.testing.assert_close(prediction(task, (labels - 10) / 4), labels)


def test_losses_of_half_precision_logits_are_computed_in_single():
    assert loss_per_row(Task.binary("a"), torch.zeros(2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.float32


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_a_regressions_part_lies_in_the_unit_interval_and_grows_with_the_value(values, mean, std):
    task = Task.regression("a", mean=mean, std=std)
    predicted = torch.tensor(sorted(values))
    part = in_unit_interval(task, predicted)
    assert ((part >= 0) & (part <= 1)).all()
    assert (part.diff() >= 0).all()


def test_a_multiclass_part_is_the_probability_of_the_items_own_class():
    probabilities = torch.tensor([[0.1, 0.9], [0.3, 0.7], [0.6, 0.4]])
    task = Task.multiclass("a", 2)
    assert in_unit_interval(task, probabilities, torch.tensor([0, 1, 0])).tolist() == pytest.approx([0.1, 0.7, 0.6])
    assert in_unit_interval(task, probabilities).tolist() == pytest.approx([0.9, 0.7, 0.6])


def test_a_class_outside_the_task_has_probability_zero():
    probabilities = torch.tensor([[0.1, 0.9], [0.3, 0.7]])
    assert in_unit_interval(Task.multiclass("a", 2), probabilities, torch.tensor([-1, 2])).tolist() == [0, 0]
