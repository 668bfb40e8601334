"""What fusing is worth: `mtcl fuse`, `mtcl evaluate` and the report say the same of the same run and rows."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import shop
from rich.console import Console

from mtcl_torchrec.baselines import Budget, run_baselines
from mtcl_torchrec.config import load_run, parse_run
from mtcl_torchrec.data.source import read_splits
from mtcl_torchrec.evaluation.compare import compare_tables
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.evaluation.ranked import reward_of
from mtcl_torchrec.evaluation.worth import verdict_of
from mtcl_torchrec.report.contents import read_contents
from mtcl_torchrec.report.sections import _worth
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.held_out import columns_needed, held_out_of, rows_of_split
from mtcl_torchrec.training.run import train_run

K = 2


PLAIN = "fusion: {weights: {click: 1, buy: 3, taste: 0.5, stars: 0.5}}"
PRICED = "fusion: {kind: expected_value, weights: {click: 2, buy: 1}, numbers: {buy: price}, given: {buy: click}}"


@pytest.fixture(scope="module", params=[PLAIN, PRICED], ids=["plain", "priced"])
def trained(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("worth")
    shop.log(3000).to_parquet(folder / "log.parquet", index=False)
    text = shop.RUN.replace("epochs: 4, batch_size: 32", "epochs: 1, batch_size: 256")
    text = text.replace(PLAIN, request.param)
    run = parse_run(f"{text}evaluation: {{k: [{K}, 5]}}\n", folder=folder)
    train_run(run, folder / "run", device="cpu", console=Console(quiet=True))
    return folder / "run"


def held_out(folder):
    """The test rows as `mtcl fuse --test --session-minutes 0` takes them, and as a file for `mtcl evaluate`."""
    run = FinishedRun.load(folder)
    raw = rows_of_split(load_run(folder / "run.yaml"), columns_needed(run), "test")
    raw.frame.to_parquet(folder / "rows.parquet", index=False)
    return held_out_of(run, raw, session_minutes=0)


def said_by(lines):
    """(verdict, numbers) of the line that answers."""
    (line,) = (line for line in lines.splitlines() if line.startswith("Does fusing pay?"))
    return line.split(": ")[0], line.split(" on ", 1)[1].split(", ", 1)[1], re.findall(r"[-+]?\d+\.\d+", line)


def prices(folder):
    """Task -> (N,) what its value is multiplied by on the test rows, from the log alone."""
    run = load_run(folder / "run.yaml")
    if not run.fusion.numbers:
        return {}
    splits = read_splits(run.data, ["price", "time"], "time")
    usual = np.expm1(np.log1p(splits["train"].frame["price"]).mean())
    return {"buy": splits["test"].frame["price"].fillna(usual).to_numpy()}


@pytest.mark.parametrize("weights", ["click=1,buy=3", "click=1,buy=-2"])
def test_fuse_evaluate_and_report_state_the_same_gap(trained, mtcl, weights):
    if load_run(trained / "run.yaml").fusion.kind == "weighted_mean":
        weights += ",taste=0,stars=9" if "-" in weights else ",taste=0.5,stars=0.5"
    shown = mtcl("fuse", trained, "--set", weights, "--test", "--session-minutes", 0)  # value@K, by the run's own k
    of_fuse, rows = said_by(shown), held_out(trained)
    of_evaluate = said_by(mtcl("evaluate", trained, "--data", trained / "rows.parquet", "--k", K))
    assert of_evaluate == of_fuse
    line, explained = _worth(read_contents(trained))
    leads = re.findall(r"[-+]\d+\.\d+ % ± \d+\.\d+ %", of_fuse[1])
    assert len(leads) == 2  # on the best head, on popularity
    for lead in leads:
        assert lead.replace("-", "−") in line
    assert f"the first {K} rows" in line
    assert f"value@{K}" in explained
    # against plain loops over requests
    table = read_predictions(trained / "predictions/test.parquet")
    assert table.fused == tuple(part.split("=")[0] for part in weights.split(","))
    amounts = prices(trained)
    assert ("buy 1 · price" in explained and "buy 1 · price" in shown) == bool(amounts)
    reward = sum(v * amounts.get(t, 1.0) * np.nan_to_num(rows.labels[t]) for t, v in table.values.items())
    np.testing.assert_allclose(rows.reward(table.values), reward, rtol=1e-5)
    np.testing.assert_allclose(reward_of(table, table.values), reward, rtol=1e-5)

    def worth(ranked_by):
        one = [np.flatnonzero(rows.request == r) for r in np.unique(rows.request)]
        return np.array([reward[of[np.argsort(-ranked_by[of], kind="stable")][:K]].sum() for of in one])

    own, found = worth(table.score), verdict_of(table, [K])
    heads = {task: worth(rows.parts[task]) for task in table.fused}  # no event of this run costs anything
    best = max(heads, key=lambda task: heads[task].mean())
    assert found.rivals[0].name == f"head {best}"
    assert found.rivals[0].ahead == pytest.approx((own - heads[best]).mean(), abs=1e-3)
    assert found.worth == pytest.approx(own.mean(), abs=1e-3)
    assert f"{found.rivals[0].worth:.4f}" in of_fuse[2]
    told = json.loads((trained / "metrics.json").read_text())["evaluations"]["test"]["ranking"]["fused"]
    assert told[f"value@{K}"] == pytest.approx(found.worth)


def test_baselines_and_comparisons_count_the_same_prices(trained):
    amounts = prices(trained)
    run_baselines(load_run(trained / "run.yaml"), trained, only=["popularity"], budget=Budget(1), say=lambda line: None)
    own, theirs = (
        read_predictions(p / "predictions/test.parquet") for p in (trained, trained / "baselines/popularity")
    )
    np.testing.assert_array_equal(reward_of(own, own.values), reward_of(theirs, theirs.values))
    bare = replace(theirs, frame=theirs.frame.drop(columns="amount.buy", errors="ignore"))
    assert ("amount.buy" in theirs.frame) == bool(amounts)
    pairs = [(own, theirs), (own, bare), (bare, theirs)]
    found = [{d.metric: d for d in compare_tables(*pair, k=[K], draws=20)}[f"value@{K}"] for pair in pairs]
    assert (found[0].a, found[0].b) == (found[1].a, found[1].b)
    assert (found[2].a == found[0].b) == (not amounts)  # of A without prices, B has none either
    assert found[2].a == found[2].b
