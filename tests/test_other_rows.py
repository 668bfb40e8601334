"""`mtcl evaluate` on files that lack something, or hold values that the run does not know."""

import json

import pytest
import shop
from test_cli import mtcl, one_line  # noqa: F401  (a fixture)

from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.other_rows import unknown_features


@pytest.fixture
def run(mtcl, tmp_path):  # noqa: F811
    shop.log(600).to_parquet(tmp_path / "log.parquet", index=False)
    (tmp_path / "run.yaml").write_text(shop.RUN.replace("epochs: 4", "epochs: 1"))
    assert mtcl("train", "run.yaml", "--out", "run", "--device", "cpu")[0] == 0
    return tmp_path


def test_what_a_file_lacks_is_said_and_the_rest_is_judged(mtcl, run):  # noqa: F811
    new = shop.log(600, seed=1)

    def judged(frame, *options):
        frame.to_parquet(run / "new.parquet", index=False)
        status, shown, error = mtcl("evaluate", "run", "--data", "new.parquet", "--json", "new.json", *options)
        found = json.loads((run / "new.json").read_text()) if status == 0 else None
        return found, shown, error

    whole, _, error = judged(new)
    assert error == ""
    # A label that is not there: the other tasks are judged as ever, and nothing is counted for it.
    less, shown, error = judged(new.drop(columns="buy"), "--all", "--bootstrap", "20", "--segments", "hour")
    assert "--data: no column buy: buy cannot be judged, and value@k counts without" in one_line(error)
    assert less["tasks"]["click"]["auc"] == whole["tasks"]["click"]["auc"]
    assert less["tasks"].keys() == whole["tasks"].keys() - {"buy"}
    assert set(less["values"]) == {"click"}
    assert "buy" not in shown
    # Without the mask, what is masked by it cannot be judged either.
    less, _, error = judged(new.drop(columns="click"))
    assert "no column click: click, buy, taste cannot be judged" in one_line(error)
    assert list(less["tasks"]) == ["stars"]
    found, _, error = judged(new.drop(columns=["click", "buy", "stars"]))
    assert found is None
    assert "no column 'click', 'buy', 'stars': there is nothing to judge by" in one_line(error)

    # Values that mean nothing to the run fail nowhere, and change every figure.
    text = new.assign(topics=new["topics"].map(lambda of: "[" + " ".join(map(repr, of)) + "]"))
    other, _, error = judged(text)
    assert "--data: no value of topics is one that the run knows" in one_line(error)
    assert other["tasks"]["click"]["auc"] != whole["tasks"]["click"]["auc"]
    assert "--data: no column time (schema.time)" in one_line(judged(new.drop(columns="time"))[2])


def test_features_without_a_known_value_are_found(run):
    preprocessor = FinishedRun.load(run / "run").preprocessor
    rows = shop.log(5000, seed=2)
    assert unknown_features(preprocessor, Rows(rows)) == []
    none = rows.assign(price=None, genre="?", hour=99)
    assert [f.name for f in unknown_features(preprocessor, Rows(none))] == ["genre", "price", "hour"]
    assert [f.name for f in unknown_features(preprocessor, Rows(rows.assign(user_id="new")))] == ["user_id"]
