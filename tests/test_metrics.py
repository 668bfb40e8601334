"""Final metrics against scikit-learn, group by group, and where they are not defined."""

import io
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import kendalltau
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    log_loss,
    mean_absolute_error,
    precision_recall_fscore_support,
    r2_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from mtcl_torchrec import Feature, Schema, Task
from mtcl_torchrec.evaluation.metrics import (
    auc,
    gauc,
    log_losses,
    mean_auc,
    task_metrics,
    weighted_metrics,
    whole_task_metrics,
    xauc,
)
from mtcl_torchrec.evaluation.pairs import pairs_in_order
from mtcl_torchrec.evaluation.report import evaluate_predictions, print_evaluation, user_groups
from mtcl_torchrec.evaluation.thresholds import best_threshold

NAN = float("nan")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 1e-20, 0.3, 0.9, 1.0])), min_size=1, max_size=20))
def test_the_terms_of_the_log_loss_are_those_of_scikit_learn_for_certain_predictions_too(rows):
    labels, predicted = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    both = np.stack([1 - predicted, predicted], 1)
    expected = log_loss(labels, predicted, labels=[0, 1])
    assert log_losses(labels, predicted).mean() == pytest.approx(expected)
    assert log_losses(labels, both).mean() == pytest.approx(expected)
    assert log_losses(labels, 0.5 * both).mean() == pytest.approx(expected)  # classes are shares of their sum


def test_many_classes_are_not_copied_to_be_judged():
    """Of 20,000 rows and 400 classes, float32: a copy is 32 MB, and one of float64 64 MB."""
    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(0, 400, 20_000).astype(float), draw.random((20_000, 400), dtype=np.float32)
    tracemalloc.start()
    found = whole_task_metrics(Task.multiclass("next", num_classes=400), labels, predicted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * predicted.nbytes  # the rows with labels, and which classes are above their own
    shares = predicted.astype(np.float64) / predicted.sum(1, keepdims=True, dtype=np.float64)
    assert found["log_loss"] == pytest.approx(log_loss(labels, shares, labels=np.arange(400)), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.2, 0.3, 0.9]), st.sampled_from([1.0, 2.0, 3.0, NAN])),
        min_size=1,
        max_size=30,
    )
)
def test_gauc_is_the_weighted_mean_of_the_groups_auc(rows):
    labels, scores, groups = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    total = weight = 0.0
    for group in {1.0, 2.0, 3.0}:
        mine = groups == group
        if 0 < labels[mine].sum() < mine.sum():
            total += mine.sum() * roc_auc_score(labels[mine], scores[mine])
            weight += mine.sum()
    expected = total / weight if weight else NAN
    assert gauc(labels, scores, groups) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([-np.inf, -1e300, 0.0, 1e-300, 1e300, np.inf])), max_size=30)
)
def test_auc_is_scikit_learns(rows):
    labels, scores = np.array(rows, dtype=float).reshape(-1, 2).T
    one_class = len(set(labels)) < 2
    # scikit-learn takes no infinite scores: their order is all that counts.
    expected = NAN if one_class else roc_auc_score(labels, np.unique(scores, return_inverse=True)[1])
    assert auc(labels, scores) == pytest.approx(expected, nan_ok=True, abs=1e-12)
    if not one_class:
        with pytest.raises(ValueError, match="a score is NaN"):
            auc(labels, np.full(len(labels), NAN))


def test_binary_metrics_are_scikit_learns_over_the_present_labels():
    draw = np.random.default_rng(0)
    p, y = draw.random(200), (draw.random(200) < 0.3).astype(float)
    y[::7] = NAN
    there = ~np.isnan(y)
    got = task_metrics(Task.binary("a"), y, p, np.zeros(200))
    base = y[there].mean()
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
    assert got == pytest.approx(
        {
            "count": there.sum(), "auc": roc_auc_score(y[there], p[there]), "gauc": roc_auc_score(y[there], p[there]),
            "log_loss": log_loss(y[there], p[there]), "ne": log_loss(y[there], p[there]) / entropy,
            "calibration": p[there].sum() / y[there].sum(), "base_rate": base,
        }
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["binary", "multiclass", "regression"]))
def test_a_row_of_weight_two_counts_as_two_rows(seed, kind):
    draw = np.random.default_rng(seed)
    rows = int(draw.integers(1, 30))
    weights = draw.integers(0, 4, rows)
    task = Task(name="a", kind=kind, **({"num_classes": 3} if kind == "multiclass" else {}))
    if kind == "multiclass":
        labels, predicted = draw.integers(0, 3, rows).astype(float), draw.dirichlet(np.ones(3), rows)
    else:
        labels, predicted = draw.integers(0, 2, rows).astype(float), draw.integers(1, 9, rows) / 10
    labels[draw.random(rows) < 0.2] = NAN
    found = weighted_metrics(task, labels, predicted, weights)
    copies = np.repeat(np.arange(rows), weights)
    expected = task_metrics(task, labels[copies], predicted[copies])
    assert bool(found) == bool(expected["count"])
    for name, value in found.items():
        assert value == pytest.approx(expected[name.removeprefix("weighted_")], nan_ok=True, abs=1e-12)
    names = {"auc", "log_loss", "ne", "calibration", "top1", "mse", "mae", "r2", "base_rate"} & set(expected)
    assert set(found) == {f"weighted_{name}" for name in names}


def test_always_predicting_the_base_rate_has_normalised_entropy_one():
    y = np.array([1.0, 0, 0, 0])
    assert task_metrics(Task.binary("a"), y, np.full(4, 0.25))["ne"] == pytest.approx(1.0)
    classes = np.array([0.0, 0, 1, 2])
    shares = np.tile([0.5, 0.25, 0.25], (4, 1))
    assert task_metrics(Task.multiclass("a", 3), classes, shares)["ne"] == pytest.approx(1.0)


def test_multiclass_metrics():
    draw = np.random.default_rng(1)
    p = draw.dirichlet(np.ones(8), 100)
    y = draw.integers(0, 8, 100).astype(float)
    y[3] = NAN
    there = ~np.isnan(y)
    got = task_metrics(Task.multiclass("a", 8), y, p)
    assert got["count"] == 99
    assert got["log_loss"] == pytest.approx(log_loss(y[there], p[there], labels=range(8)))
    for k in (1, 5):
        expected = top_k_accuracy_score(y[there], p[there], k=k, labels=range(8))
        assert got[f"top{k}"] == pytest.approx(expected)


def test_a_constant_prediction_is_no_hit():
    got = task_metrics(Task.multiclass("a", 8), np.array([0.0, 1.0]), np.full((2, 8), 1 / 8))
    assert got["top1"] == got["top5"] == 0


def test_regression_metrics():
    draw = np.random.default_rng(2)
    y = draw.normal(size=50)
    p = y + draw.normal(size=50)
    got = task_metrics(Task.regression("a"), y, p)
    assert got["mae"] == pytest.approx(mean_absolute_error(y, p))
    assert got["r2"] == pytest.approx(r2_score(y, p))
    assert got["mse"] == pytest.approx(((y - p) ** 2).mean())


ROUNDED = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(ROUNDED)
def test_xauc_is_the_share_of_pairs_in_order(rows):
    y, p = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    right, pairs = np.zeros(len(y)), np.zeros(len(y))
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] != y[j]:
                pairs[i] += 1
                right[i] += 0.5 * (1 + np.sign(p[i] - p[j]) * np.sign(y[i] - y[j]))
    expected = right.sum() / pairs.sum() if pairs.any() else NAN
    assert xauc(y, p) == pytest.approx(expected, nan_ok=True)
    for got, want in zip(pairs_in_order(y, p), (right, pairs), strict=True):
        np.testing.assert_array_equal(got, want)


def test_xauc_follows_from_kendalls_tau():
    draw = np.random.default_rng(5)
    y = draw.normal(size=3000)
    p = y + draw.normal(size=3000)
    assert xauc(y, p) == pytest.approx((1 + kendalltau(y, p).statistic) / 2)


def test_what_is_measured_at_the_end_is_scikit_learns():
    draw = np.random.default_rng(4)
    p, y = draw.random(300).round(2), (draw.random(300) < 0.2).astype(float)
    y[::7] = NAN
    there = ~np.isnan(y)
    got = whole_task_metrics(Task.binary("a"), y, p, None, 0.6)
    yes = p[there] >= 0.6
    precision, recall, f1, _ = precision_recall_fscore_support(y[there], yes, average="binary")
    expected = {
        "pr_auc": average_precision_score(y[there], p[there]), "brier": brier_score_loss(y[there], p[there]),
        "accuracy": accuracy_score(y[there], yes), "precision": precision, "recall": recall, "f1": f1,
        "majority": 1 - y[there].mean(), "f1_all_yes": f1_score(y[there], np.ones(there.sum())),
        "said_yes": yes.mean(), "threshold": 0.6,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert "f1" not in whole_task_metrics(Task.binary("a"), y, p)
    honest = draw.random(200_000)
    happened = (draw.random(200_000) < honest).astype(float)
    assert whole_task_metrics(Task.binary("a"), happened, honest)["ece"] < 0.01
    assert whole_task_metrics(Task.binary("a"), happened, honest**2)["ece"] > 0.1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, NAN]), st.sampled_from([0.1, 0.2, 0.3, 0.4])), min_size=1),
    st.sampled_from(["f1", "accuracy", "youden"]),
)
def test_no_threshold_is_better_than_the_chosen_one(rows, rule):
    y, p = (np.array(column) for column in zip(*rows, strict=True))
    there = ~np.isnan(y)

    def reached(threshold):
        yes = p[there] >= threshold
        if rule == "f1":
            return f1_score(y[there], yes, zero_division=0)
        return (accuracy_score if rule == "accuracy" else balanced_accuracy)(y[there], yes)

    found = best_threshold(y, p, rule)
    if not (y[there] == 1).any():
        assert np.isnan(found)
        return
    tried = [reached(t) for t in (0.1, 0.2, 0.3, 0.4, *([2.0] if rule == "accuracy" else []))]
    assert reached(found) == pytest.approx(max(tried))


def balanced_accuracy(y, yes):
    return yes[y == 1].mean() - (yes[y == 0].mean() if (y == 0).any() else 0)


@pytest.mark.parametrize("labels", [[1.0, 1.0], [0.0, 0.0], [NAN, NAN], [NAN, 1.0]])
def test_one_class_alone_has_no_auc(labels):
    got = task_metrics(Task.binary("a"), np.array(labels), np.array([0.3, 0.6]), np.array([1.0, 1.0]))
    assert np.isnan(got.get("auc", NAN))
    assert np.isnan(got.get("gauc", NAN))
    assert np.isnan(got.get("ne", NAN))


def test_early_stopping_watches_the_mean_auc_and_leaves_out_what_is_not_defined():
    tasks = [Task.binary("a"), Task.binary("b"), Task.multiclass("c", 3)]
    assert mean_auc(tasks, {"a": {"auc": 0.7}, "b": {"auc": NAN}, "c": {"ne": 0.5}}) == pytest.approx(0.7)
    assert mean_auc(tasks[2:], {"c": {"ne": 0.8}}) == pytest.approx(0.2)
    assert np.isnan(mean_auc(tasks[:1], {"a": {"count": 0.0}}))


def test_rankings_are_measured_by_the_events_of_the_score():
    schema = Schema(
        features=[Feature(name="u", group="user", encoding="index", vocabulary_size=9)],
        tasks=[Task.binary("click"), Task.binary("helper")],
        user="u",
    )
    draw = np.random.default_rng(3)
    labels = (draw.random((60, 2)) < 0.5).astype(float)
    scores, popularity = draw.random(60), draw.random(60)
    predictions = {"click": scores, "helper": scores, "score": scores}

    users = user_groups(schema, pd.DataFrame({"u": draw.integers(0, 4, 60)}))
    got = evaluate_predictions(schema.tasks, predictions, labels, users, {"click": popularity}, ["click"])
    assert got.ranking["fused"] == {
        "auc click": auc(labels[:, 0], scores), "gauc click": gauc(labels[:, 0], scores, users),
    }  # fmt: skip
    assert got.ranking["popular"]["auc click"] == auc(labels[:, 0], popularity)
    shown = io.StringIO()
    print_evaluation(got, "here", Console(file=shown, width=80))
    assert "here: 60 rows" in shown.getvalue()
    assert "…" not in shown.getvalue()


def test_the_unknown_user_is_no_group():

    index = Feature(name="u", group="user", encoding="index", vocabulary_size=9)
    text = Feature(name="u", group="user")
    frame = pd.DataFrame({"u": [0, 1, 1]})
    for feature, expected in ((index, [True, False, False]), (text, [False, False, False])):
        schema = Schema(features=[feature], tasks=[Task.binary("a")], user="u")
        assert np.isnan(user_groups(schema, frame)).tolist() == expected
