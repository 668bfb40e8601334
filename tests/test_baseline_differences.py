"""By how much baselines differ from a run, against formulas that draw nothing; who is told to be ahead."""

import made_run
import numpy as np
import pytest

from mtcl_torchrec.baselines.differences import differences, half_of, verdict
from mtcl_torchrec.evaluation.confidence import SURE
from mtcl_torchrec.evaluation.estimates import auc_estimate, clusters_of
from mtcl_torchrec.evaluation.predictions_file import PredictionsTable

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
    assert lines[0] == "click: no difference that counts between this run and same; it is ahead of the others"
