"""By how much baselines differ from a run, against formulas that draw nothing; who is told to be ahead."""

import made_run
import numpy as np
import pandas as pd
import pytest

from mtcl_torchrec import Task
from mtcl_torchrec.baselines.differences import differences, half_of, verdict
from mtcl_torchrec.evaluation.compare import compare_tables, is_headline
from mtcl_torchrec.evaluation.confidence import SURE
from mtcl_torchrec.evaluation.estimates import auc_estimate, clusters_of
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable

KEYS = {("click", "auc"): "click", ("like", "auc"): "like", ("minutes", "r2"): "minutes"}


def asked(of, metric):
    return (of, metric) in KEYS


@pytest.fixture(scope="module")
def tables():
    return {noise: made_run.table(noise=noise) for noise in (0.3, 0.31, 2.0)}


def test_intervals_are_those_of_the_formula_for_paired_aucs(tables):
    own, other = tables[0.3], tables[2.0]
    found = differences(own, {"other": other}, only=asked)["other"]
    assert set(found) == set(KEYS)
    clusters = clusters_of(own.users, len(own))
    for task in ("click", "like"):
        a, b = (auc_estimate(own.labels(task), of.predicted(task), clusters) for of in (own, other))
        difference, error = b.minus(a)
        of = found[(task, "auc")]
        assert (of.a, of.b, of.difference) == (
            pytest.approx(a.value), pytest.approx(b.value), pytest.approx(difference),
        )  # fmt: skip
        assert half_of(of) == pytest.approx(SURE * error, rel=0.2)  # 200 draws know an error to 5 %, and its quantile
        assert of.better == "a"


def test_a_baseline_of_other_rows_is_left_out(tables):
    own = tables[0.3]
    fewer = PredictionsTable(own.frame.iloc[1:].reset_index(drop=True), own.tasks,
                             classes={n: c[1:] for n, c in own.classes.items()})  # fmt: skip
    moved = PredictionsTable(own.frame.assign(item=own.frame["item"].to_numpy()[::-1]), own.tasks, classes=own.classes)
    assert differences(own, {"fewer": fewer, "moved": moved}, only=asked) == {}


def test_who_is_ahead_is_told_for_each_task(tables):
    weak, strong, near = tables[2.0], tables[0.3], tables[0.31]
    lines = verdict(differences(weak, {"trees": strong, "same": weak}, only=asked), KEYS)
    assert len(lines) == 3
    for line, task in zip(lines, KEYS.values(), strict=True):
        assert line.startswith(f"{task}: trees is ahead of this run (+")
    assert verdict(differences(strong, {"als": weak}, only=asked), KEYS) == [
        "this run is ahead of als on click, like, minutes"
    ]
    found = differences(strong, {"near": near, "same": strong, "als": weak}, only=asked)
    assert found["same"][("click", "auc")].difference == 0
    assert np.isnan(found["near"][("click", "auc")].p_holm) or found["near"][("click", "auc")].p_holm <= 1
    lines = verdict({name: found[name] for name in ("same", "als")}, KEYS)
    assert lines[0] == "click: no difference that counts between this run and same; it is ahead of als"


def test_a_handful_of_events_makes_nobody_ahead():
    """Random against random, and random against the truth: three events tell nothing of either."""
    draw, rows = np.random.default_rng(0), 600
    happened = np.zeros(rows)
    happened[draw.choice(rows, 3, replace=False)] = 1

    def table(predicted):
        frame = pd.DataFrame({"user": np.arange(rows) // 10, "label.buy": happened, "p.buy": predicted})
        return PredictionsTable(frame, (Task.binary("buy"),))

    run = table(draw.random(rows))
    found = differences(run, {"luck": table(draw.random(rows)), "truth": table(happened)}, only=lambda of, m: True)
    for of in found.values():
        assert {d.unsure for d in of.values()} == {"too few events (3)"}
        assert {d.better for d in of.values()} == {None}
    assert verdict(found, {("buy", "auc"): "buy"}) == ["buy: cannot be judged, too few events (3)"]


def test_differences_are_those_of_mtcl_compare(tables):
    own, other = tables[0.3], tables[2.0]
    found = differences(own, {"other": other}, only=is_headline, k=[5, 1000])["other"]
    of_two = compare_tables(own, other, k=[5, 1000], draws=200)
    assert list(found.values()) == of_two
    assert ("ranking", "rate@1000 click") not in found  # the same in any order
