"""Fitting the fused score of a finished run, through the command line; what is written, read back, and refused."""

import io
import json
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import shop
import yaml
from rich.console import Console

from mtcl_torchrec import ConfigError, DataError
from mtcl_torchrec.config import FusionConfig, load_run, parse_run
from mtcl_torchrec.data.source import Rows, read_splits
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.fusing import fit_fusion
from mtcl_torchrec.fusing.combiners import known_kinds
from mtcl_torchrec.modules.fusion import Stacking, WeightedMean
from mtcl_torchrec.serving.export import export_run
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun, RunWarning
from mtcl_torchrec.training.fitted_fusion import load_fusion, save_fusion
from mtcl_torchrec.training.held_out import columns_needed, gate_of, held_out_of, rows_of_split
from mtcl_torchrec.training.run import train_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fusing")
    shop.log().to_parquet(folder / "log.parquet", index=False)
    run = parse_run(shop.RUN.replace("epochs: 4", "epochs: 2"), folder=folder)
    train_run(run, folder / "run", device="cpu", console=Console(quiet=True))
    return folder / "run"


def held_out(folder, split="val", **options):
    run = FinishedRun.load(folder)
    return run, held_out_of(run, rows_of_split(load_run(folder / "run.yaml"), columns_needed(run), split), **options)


def test_held_out_rows_are_the_runs_own_predictions_labels_and_requests(trained):
    run, rows = held_out(trained, session_minutes=0)
    raw = rows_of_split(load_run(trained / "run.yaml"), columns_needed(run))
    encoded = run.preprocessor.encode(raw)
    out = predict(run.model, encoded)
    np.testing.assert_allclose(rows.parts["click"], out["click"])
    np.testing.assert_allclose(rows.rankings["as it was"], out["score"], atol=1e-6)
    labels = dict(zip([t.name for t in run.model.tasks], encoded.labels.numpy().T, strict=True))
    np.testing.assert_array_equal(rows.labels["buy"], labels["buy"])
    # a multiclass task: did it come to the item's own class (where the label is known)?
    known = ~np.isnan(rows.labels["taste"])
    assert known.sum() == (raw.frame["click"] == 1).sum()
    assert set(rows.labels["taste"][known]) == {1.0}  # the shop's clicks go to the item's own genre
    assert (rows.request == pd.factorize(raw.frame["user_id"])[0]).all()
    train = read_splits(load_run(trained / "run.yaml").data, ["product_id", "click", "time"], "time")["train"].frame
    of_item, usual = train.groupby("product_id")["click"].agg(["sum", "count"]), train["click"].mean()
    shares = (of_item["sum"] + 20 * usual) / (of_item["count"] + 20)
    expected = raw.frame["product_id"].map(shares).fillna(usual)
    np.testing.assert_allclose(rows.popular["click"], expected.to_numpy(), rtol=1e-6)
    weights, popular = {"click": 1, "buy": 3, "taste": 0.5, "stars": 0.5}, rows.popular  # as the shop fuses
    fused = sum(weight * popular[task] for task, weight in weights.items()) / 5
    np.testing.assert_allclose(rows.rankings["popularity"], fused, rtol=1e-5)
    assert run.model.output.fused_score is not None


def test_requests_are_sessions_users_or_a_declared_column(trained):
    run, rows = held_out(trained, session_minutes=60)
    raw = rows_of_split(load_run(trained / "run.yaml"), columns_needed(run))
    by = pd.DataFrame(
        {"user": raw.frame["user_id"].to_numpy(), "time": raw.frame["time"].to_numpy(), "s": rows.request}
    )
    assert (by.groupby("s")["user"].nunique() == 1).all()
    for _, mine in by.sort_values("time").groupby("user"):
        apart = mine["time"].diff().iloc[1:].to_numpy() > 3600
        assert (mine["s"].diff().iloc[1:].to_numpy() != 0).tolist() == apart.tolist()
    assert "60 min" in rows.requests_are
    small = raw.frame.assign(time=np.arange(len(raw.frame)))
    with pytest.raises(ConfigError, match="too small to be seconds since 1970"):
        held_out_of(run, Rows(small), session_minutes=30)
    # Without either, all rows of a user are ranked together, as in reports.
    together = held_out_of(run, raw)
    assert together.requests_are == "user"
    assert (together.request == together.user).all()
    nobody = raw.frame.assign(user_id=None)
    with pytest.raises(DataError, match="no row has a known user_id"):
        held_out_of(run, Rows(nobody))


def test_what_is_shown_is_as_long_as_the_run_says_and_a_head_that_costs_is_reversed(trained, fuse):
    """The report begins with the shortest length of evaluation.k, and so does the fit."""
    folder = trained.parent / "of_two"
    shutil.copytree(trained, folder)
    written = yaml.safe_load((folder / "run.yaml").read_text()) | {"evaluation": {"k": [2, 3]}}
    (folder / "run.yaml").write_text(yaml.safe_dump(written))
    quick = ("--value", "click=1,buy=-2", "--session-minutes", 0, "--search", "none", "--folds", 2, "--combiner",
             "weighted_mean", "--dry-run")  # fmt: skip
    status, shown, _ = fuse(folder, *quick)
    assert status == 0
    assert "value@2 on folds left out" in shown
    assert "head buy: reversed, the least likely first, as the event costs something" in shown
    assert "value@4 on folds left out" in fuse(folder, *quick, "--k", 4)[1]
    status, _, error = fuse(folder, *quick, "--k", 4, "--target", "value@3")
    assert status == 2
    assert "--k says how many rows are shown, and so does --target value@3: give one of them" in error


def test_a_fusion_is_fitted_written_and_ranks_from_then_on(trained, fuse, tmp_path):
    status, shown, _ = fuse(
        trained, "--target", "value@3", "--value", "click=1,buy=5", "--session-minutes", 0, "--trials", 5, "--folds", 3,
        "--combiner", "weighted_mean", "--constraint", "weight:buy >= 0.2", "--test",
    )  # fmt: skip
    assert status == 0
    for line in ("head click", "as it was", "popularity", "Chosen: ", "weight:buy >= 0.2: ", "test split: ", "Next:"):
        assert line in shown
    folder = trained / "fusion"
    declared = yaml.safe_load((folder / "fusion.yaml").read_text())
    report = json.loads((folder / "report.json").read_text())
    assert declared["fusion"]["weights"] == report["weights"]
    assert (folder / "pareto.png").stat().st_size > 10_000
    run, rows = held_out(trained, session_minutes=0)
    weights = report["weights"]
    expected = sum(w * rows.parts[t] for t, w in weights.items()) / sum(abs(w) for w in weights.values())
    np.testing.assert_allclose(rows.rankings["as it was"], expected, atol=1e-6)
    assert run.fusion.weights == weights
    first = Recommender.load(trained).recommend("u3", k=5)
    # Weights may be set, without fitting; what was there is kept.
    status, shown, _ = fuse(trained, "--set", "click=0.5,buy=2,stars=-0.1")
    assert status == 0, shown
    changed = FinishedRun.load(trained)
    assert changed.fusion.weights == pytest.approx({**weights, "click": 0.5, "buy": 2, "stars": -0.1})
    assert not Recommender.load(trained).recommend("u3", k=5).equals(first)
    assert yaml.safe_load((folder / "former/1/fusion.yaml").read_text()) == declared
    assert not (folder / "former/1/former").exists()
    assert fuse(trained, "--set", "click=1")[0] == 0
    assert sorted(p.name for p in (folder / "former").iterdir()) == ["1", "2"]
    # The file may be edited, as run.yaml may.
    text = (folder / "fusion.yaml").read_text()
    (folder / "fusion.yaml").write_text(text.replace("click: 1.0", "click: 7.0"))
    assert FinishedRun.load(trained).model.output.fused_score.weights[0] == 7
    (folder / "fusion.yaml").write_text(text)


def test_other_kinds_are_read_back_with_all_they_learnt(trained, fuse):
    options = ("--combiner", "stacking", "--search", "none", "--folds", 2, "--session-minutes", 0)
    fuse(trained, "--value", "click=1", "--value", "buy=5", *options)
    stacked = FinishedRun.load(trained).model.output.fused_score
    assert isinstance(stacked, Stacking)
    fuse(trained, "--set", "click=2")
    changed = FinishedRun.load(trained).model.output.fused_score
    assert isinstance(changed, Stacking)
    then, now = ({t: w.item() for t, w in zip(f.tasks, f.weights, strict=True)} for f in (stacked, changed))
    assert now == then | {"click": 2.0}


def test_every_kind_that_is_fitted_is_read_back_as_it_was_and_tells_what_else_it_has(trained, fuse):
    folder = shutil.copytree(trained, trained.parent / "kinds")
    shutil.rmtree(folder / "fusion", ignore_errors=True)
    options = ("--value", "click=1,buy=5", "--search", "none", "--folds", 2, "--session-minutes", 0)
    gated = ("--feature", "hour", "--feature", "age")
    status, shown, said = fuse(folder, *options, "--combiner", "all", *gated, "--dry-run")
    assert status == 0, said
    assert all(f"{kind}, " in shown for kind in known_kinds())
    rows = held_out(folder, session_minutes=0, context=True)[1]
    assert rows.given == {"buy": "click"}  # its label counts where there was a click
    run = FinishedRun.load(folder)
    for kind in ("soft_voting", "expected_value", "monotone_network", "context_gated_mean"):
        asked = gate_of(run, ["hour", "age"]) if kind == "context_gated_mean" else kind
        fitted = fit_fusion(
            rows, values={"click": 1, "buy": 5}, combiners=[asked], search="none", folds=2, front_points=0
        )
        run.model.output.fused_score = fitted.fused_score
        save_fusion(folder, run.model, fitted.config, fitted.report())
        load_fusion(folder, run.model, run.preprocessor.encoder)
        again = run.model.output.fused_score
        assert again is not fitted.fused_score
        np.testing.assert_array_equal(rows.scores(again), rows.scores(fitted.fused_score), err_msg=kind)
    assert "score" in Recommender.load(folder).recommend("u3", k=3)
    status, shown, _ = fuse(folder, *options, "--combiner", "hard_voting", "--test")
    assert status == 0, shown  # what was there reads the context, what is fitted does not
    assert "as it was" in shown
    assert "thresholds: click" in shown


@pytest.mark.full
def test_a_score_that_is_trained_after_training_travels_in_an_exported_model(trained, tmp_path):
    rows = held_out(trained, session_minutes=0, context=True)[1]
    raw = rows_of_split(load_run(trained / "run.yaml"), columns_needed(FinishedRun.load(trained))).frame.head(40)
    run = FinishedRun.load(trained)
    options = {"values": {"click": 1, "buy": 5}, "search": "none", "folds": 2, "front_points": 0}
    run.model.output.fused_score = fit_fusion(rows, combiners=[gate_of(run)], **options).fused_score
    export_run(run, tmp_path / "model.mtcl", compiled="no")
    made = Recommender.load(tmp_path / "model.mtcl").score(raw)
    pd.testing.assert_frame_equal(made, Recommender(run).score(raw), atol=1e-5)


def test_ranks_within_a_request_are_those_of_whole_requests_wherever_they_are_told(trained, fuse):
    """The run itself compares no rows, so that nothing but the fitted score asks for requests."""
    options = ("--value", "click=1,buy=5", "--combiner", "borda", "--search", "none", "--folds", 2)
    status, shown, _ = fuse(trained, *options, "--session-minutes", 0)
    assert status == 0, shown
    run, rows = held_out(trained, session_minutes=0)
    encoded = run.preprocessor.encode(rows_of_split(load_run(trained / "run.yaml"), columns_needed(run)))
    in_batches = predict(run.model, encoded, batch_size=50)["score"]
    # Two rows that are equal but for rounding may change places with the size of a batch.
    assert np.isclose(in_batches, rows.rankings["as it was"]).mean() > 0.98
    recommender, users = Recommender(run), ["u3", "u5", "nobody"]
    together = recommender.recommend(users, k=4)
    for user in users:
        alone = recommender.recommend(user, k=4)
        pd.testing.assert_frame_equal(together[together["user_id"] == user].reset_index(drop=True), alone)
    run.model.members = [run.model]
    with pytest.raises(ConfigError, match="fit that of each member"):
        held_out_of(run, Rows(pd.DataFrame()))


def test_what_is_missing_of_a_run_and_what_a_new_training_takes_away_is_said(trained, fuse, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    assert fuse(folder, "--set", "click=3")[0] == 0
    former = len([*(folder / "fusion").glob("former/*")])
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text + "calibration: platt\n")
    with pytest.raises(DataError, match="says calibration, and none was fitted"):
        FinishedRun.load(folder)
    said = io.StringIO()
    config = parse_run(shop.RUN.replace("epochs: 4", "epochs: 2") + "calibration: platt\n", folder=trained.parent)
    train_run(config, folder, existing="resume", device="cpu", console=Console(file=said, width=200))
    assert f"{folder / 'fusion'} goes to {folder / 'fusion/former'}: it was fitted" in said.getvalue()
    assert [p.name for p in (folder / "fusion").iterdir()] == ["former"]
    assert len([*(folder / "fusion/former").iterdir()]) > former
    run, rows = held_out(folder, session_minutes=0)
    assert run.model.output.calibration is not None
    raw = rows_of_split(load_run(folder / "run.yaml"), columns_needed(run))
    calibrated = predict(run.model, run.preprocessor.encode(raw))["click"]
    np.testing.assert_allclose(rows.parts["click"], calibrated)
    assert not np.allclose(calibrated, held_out(trained, session_minutes=0)[1].parts["click"])
    recommended = Recommender(run).score(raw.frame.head(5))["click"]
    np.testing.assert_allclose(recommended, calibrated[:5], atol=1e-6)


def test_what_run_yaml_says_is_not_silently_passed_over_and_comes_back(trained, fuse, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(folder / "fusion", ignore_errors=True)
    assert "no other was fitted" in fuse(folder, "--reset")[2]
    assert fuse(folder, "--set", "click=9,buy=1")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FinishedRun.load(folder).fusion.weights["click"] == 9
    text = (folder / "run.yaml").read_text()
    changed = yaml.safe_load(text)
    changed["fusion"]["weights"]["click"] = 5
    (folder / "run.yaml").write_text(yaml.safe_dump(changed))
    with pytest.warns(RunWarning, match=r"run.yaml was changed, but .*fusion.yaml was fitted .*--reset"):
        assert FinishedRun.load(folder).fusion.weights["click"] == 9
    with pytest.warns(RunWarning) as said:
        assert fuse(folder, "--set", "buy=2", "--dry-run")[0] == 0
    line = warnings.formatwarning(said[0].message, RunWarning, "finished.py", 1)
    assert line.startswith(f"mtcl: the fusion in {folder / 'run.yaml'} was changed, but ")
    assert "leave --set out" in fuse(folder, "--reset", "--set", "buy=2")[2]
    assert fuse(folder, "--reset", "--dry-run")[0] == 0
    fitted = (folder / "fusion/fusion.yaml").read_bytes()
    status, shown, _ = fuse(folder, "--reset")
    assert status == 0
    assert f"is kept as {folder / 'fusion/former/1'}" in shown
    assert (folder / "fusion/former/1/fusion.yaml").read_bytes() == fitted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FinishedRun.load(folder).fusion.weights["click"] == 5
    assert fuse(folder, "--set", "click=3")[0] == 0
    assert [p.name for p in (folder / "fusion/former").iterdir()] == ["1"]  # nothing stood there to be kept
    where = folder / "fusion/fusion.yaml"
    for task, weights in (("taste", {"click": 1, "buy": 2, "stars": 1}), ("nobody", None)):
        declared = yaml.safe_load(where.read_text())
        if weights is None:
            declared["fusion"]["weights"] = dict(reversed(declared["fusion"]["weights"].items()))
        else:
            declared["fusion"]["weights"] = weights
        (tmp_path / "fusion.yaml").write_bytes(where.read_bytes())
        where.write_text(yaml.safe_dump(declared, sort_keys=False))
        reason = f"lacks {task}" if weights else "another order"
        with pytest.raises(DataError, match=rf"fusion.yaml .*{reason}.*weights may be edited here.*--set"):
            FinishedRun.load(folder)
        where.write_bytes((tmp_path / "fusion.yaml").read_bytes())
    run = FinishedRun.load(folder)
    run.model.output.fused_score = WeightedMean({"click": 1.0})
    save_fusion(folder, run.model, FusionConfig(weights={"click": 1}), {})
    where.write_text(where.read_text().replace("click: 1.0", "click: 1.0\n    buy: 2.0"))
    with pytest.raises(DataError, match=r"names buy, which the score that was fitted has not.*--set buy="):
        FinishedRun.load(folder)


def test_a_dry_run_writes_nothing_and_the_seed_decides(trained, fuse):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    options = ("--value", "click=1", "--value", "buy=5", "--target", "ndcg@3", "--trials", 3, "--folds", 2, "--dry-run")
    first, again = fuse(trained, *options, "--test")[1], fuse(trained, *options, "--test")[1]
    *_, fused, was = (line.split() for line in first.splitlines() if line.startswith(("fused ", "as it was ")))
    assert fused[1:4] != was[3:6]  # what was found is judged, written or not
    assert first == again
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert "requests have more than" not in first
    status, _, error = fuse(trained, "--dry-run", "--session-minutes", 30)
    assert status == 2  # 30-minute sessions of this shop are short
    usable = re.search(r"no request has more than 5 rows, .*: take (value@\d)", error)[1]
    shown = fuse(trained, "--trials", 2, "--folds", 2, "--dry-run", "--target", usable)[1]
    said = "values are the weights of the run's fusion: click 1, buy 3; nothing is counted for taste, stars, as in the"
    assert said in shown  # what the run itself counts
    assert "nan" not in shown
    assert "-0.0000" not in shown
    assert re.search(r"Does fusing pay\?  (Yes|No|Not shown): value@\d [\d.]+ on folds left out, ", shown)


def test_values_are_those_that_the_run_is_judged_by(trained, fuse, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    said = yaml.safe_load((folder / "run.yaml").read_text()) | {"evaluation": {"values": {"click": 2, "buy": 7}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    shown = fuse(folder, "--trials", 1, "--folds", 2, "--dry-run", "--target", "value@2")[1]
    assert "values are evaluation.values of the run: click 2, buy 7" in shown


def test_what_takes_long_says_how_far_it_is_without_a_terminal(trained, fuse, monkeypatch):
    monkeypatch.setattr("mtcl_torchrec.cli.fuse._TELL_EVERY", 0.0)
    options = ("--value", "click=1,buy=5", "--combiner", "weighted_mean", "--search", "none", "--folds", 2, "--dry-run")
    options += ("--session-minutes", 0)
    lines = fuse(trained, *options)[2].splitlines()
    assert all(re.fullmatch(r"mtcl: \d+% fitted, now .*", line) for line in lines)
    assert any("weighted_mean, values, fold 1" in line for line in lines)
    assert lines[-1].startswith("mtcl: 100% fitted")
    monkeypatch.setattr("mtcl_torchrec.cli.fuse._TELL_EVERY", 1000.0)
    assert fuse(trained, *options)[2] == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--value", "click"), "--value takes task=number, such as like=8, not 'click'"),
        (("--value", "click=1,click=2"), "--value: 'click' is given twice"),
        (("--value", "clck=1"), "values: no task 'clck' has predictions (did you mean 'click'?)"),
        (("--target", "value@x"), "no target 'value@x'"),
        (("--set", "clck=1"), "--set: no task 'clck' (did you mean 'click'?)"),
        (("--set", "click=0,buy=0,taste=0,stars=0"), "at least one"),
        (("--set", "click=1", "--combiner", "weighted_mean"), "--combiner says how to fit them"),
        (("--combiner", "mean"), "no combiner 'mean'"),
        (("--constraint", "auc:click >= 0.9999", "--search", "none"), "no weights keep to all constraints"),
        (("--influence", "click=2"), "the share of 'click' lies above 0 and at most at 1"),
        (("--feature", "hour"), "it needs --combiner context_gated_mean"),
        (
            ("--combiner", "context_gated_mean", "--feature", "hur"),
            "no feature 'hur' in the schema (did you mean 'hour'?)",
        ),
        (("--data", "nowhere.parquet"), "no Parquet or CSV file at nowhere.parquet"),
    ],
)
def test_mistakes_are_one_line(trained, fuse, options, said):
    status, _, error = fuse(trained, "--session-minutes", 0, *options)
    assert status == 2
    assert error.count("\n") == 1, error
    assert said in error


def test_a_damaged_fusion_is_refused_and_a_broken_off_one_leaves_the_former(trained):
    run = FinishedRun.load(trained)
    where = save_fusion(trained, run.model, run.fusion, {"method": "set"})
    whole = (where / "fusion.yaml").read_bytes()

    def fails(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_fusion(trained, run.model, run.fusion, {}, draw=fails)
    assert FinishedRun.load(trained).fusion == run.fusion
    for content, said in (
        (b"fusion: [", "damaged"),
        (b"format: 9\nfusion: {weights: {click: 1}}", "expected format 1"),
        (b"format: 1\nfusion: {weights: {clck: 1}}", "no task 'clck' in the model"),
        (b"format: 1\nfusion: {weights: {click: 1, buy: 2}, nope: 1}", "fusion.nope: .*not permitted"),
        (b"format: 1\nfusion: {weights: {click: much}}", "fusion.yaml: fusion.weights.click: Input should be a valid"),
        (b"format: 1\nfusion: {weights: {click: 1}}", "fitted for another model"),
    ):
        (where / "fusion.yaml").write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_fusion(trained, run.model, run.preprocessor.encoder)
    (where / "fusion.yaml").write_bytes(whole)
    (where / "state.npz").write_bytes(b"PK\x03\x04 not a state")
    with pytest.raises(DataError, match="damaged"):
        FinishedRun.load(trained)
