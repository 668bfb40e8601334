"""The recommender ranks as the slow and plain way does, for one user and for many, from a run and from an export."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import shop
import slow
import torch
from rich.console import Console
from typer.testing import CliRunner

from mtcl_torchrec.cli.commands import app
from mtcl_torchrec.cli.recommend import _context, print_recommendations
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.catalogue import NothingLeftError
from mtcl_torchrec.modules.fusion import WeightedGeometricMean, WeightedMean
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.run import train_run

STATISTICS = """
statistics:
  - {keys: [user_id, product_id, [user_id, genre], [product_id, hour], [user_id, hour], hour], outcomes: [click, buy]}
  - {keys: [[genre, user_id, hour]], outcomes: [stars], counts: false, smoothing: 3}
"""
TOPICS = "    - {name: topics,"
MORE = (
    "    - {name: moods, group: user, kind: bag, embedding_dim: 4}\n"
    "    - {name: distance, group: [user, item], kind: dense}\n"
    "    - {name: shelf, group: [user, item], embedding_dim: 4}\n"
)


def log():
    """The shop's log with a bag of the user's, and columns of a user and an item together."""
    frame, draw = shop.log(900), np.random.default_rng(5)
    moods = [[f"m{n % 5}", f"m{n % 3}"][: n % 3] for n in range(40)]
    frame["moods"] = [moods[int(user[1:])] for user in frame["user_id"]]
    frame["distance"], frame["shelf"] = draw.random(len(frame)), draw.integers(0, 9, len(frame))
    frame.loc[::5, "distance"] = np.nan
    return frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("recommender")
    log().to_parquet(where / "log.parquet", index=False)
    text = shop.RUN.replace(TOPICS, MORE + TOPICS).replace("epochs: 4", "epochs: 1")
    start, stop = text.index("statistics:"), text.index("model:")
    text = text[:start] + STATISTICS.lstrip() + text[stop:]
    text += "calibration: {'*': {kind: platt, min_rows: 20}}\n"
    train_run(parse_run(text, folder=where), where / "run", device="cpu", console=Console(quiet=True))
    fused = CliRunner().invoke(app, ["fuse", str(where / "run"), "--set", "click=2,stars=0.25"])
    assert fused.exit_code == 0, fused.output
    return where / "run"


@pytest.fixture(scope="module")
def run(folder):
    return FinishedRun.load(folder)


@pytest.fixture(scope="module")
def recommender(folder):
    return Recommender.load(folder)


@pytest.fixture(scope="module")
def exported(folder):
    file = folder.parent / "shop.mtcl"
    result = CliRunner().invoke(app, ["export", str(folder), "--out", str(file), "--compiled", "no"])
    assert result.exit_code == 0, result.output
    assert "sha256" in result.output
    return file


def same(fast, plain, atol=1e-6):
    item = str(plain.columns[0])
    fast = fast[list(plain.columns)].sort_values(item).reset_index(drop=True)
    pd.testing.assert_frame_equal(fast, plain.sort_values(item).reset_index(drop=True), atol=atol, check_dtype=False)


CASES = [
    ("u3", {}, None, False),
    ("u7", {"hour": 22}, None, True),
    ("nobody", {"hour": 3}, None, False),
    ("u11", {}, ["p5", "p0", "p59", "p21"], True),
    ("u0", {"hour": 5}, ["p1", "p2", "p3", "p4", "p5", "p6", "p7"], False),
]


@pytest.mark.parametrize(("user", "context", "candidates", "seen"), CASES)
def test_it_ranks_as_the_slow_way_does(run, recommender, user, context, candidates, seen):
    fast = recommender.recommend(user, context, candidates=candidates, k=1000, seen=seen)
    plain = slow.recommend(run, user, context, candidates, 1000, seen)
    assert len(plain) > 1
    same(fast, plain)
    assert fast["score"].is_monotonic_decreasing
    assert (fast["user_id"] == user).all()
    np.testing.assert_allclose(fast.filter(like="part:").sum(axis=1), fast["score"], atol=1e-6)


def test_an_exported_run_recommends_the_same(run, exported):
    recommender = Recommender.load(exported)
    assert recommender.run is None
    for user, context, candidates, seen in CASES:
        fast = recommender.recommend(user, context, candidates=candidates, k=1000, seen=seen)
        same(fast, slow.recommend(run, user, context, candidates, 1000, seen), atol=2e-6)
    # The weights that were set after training, and the calibration, have come along.
    ranked = recommender.recommend("u3", k=9)
    np.testing.assert_allclose(ranked["part:click"], ranked["click"] * 2 / (2 + 3 + 0.5 + 0.25), rtol=1e-4)
    plain = FinishedRun.load(run_folder := exported.parent / "run")
    plain.model.output.calibration = None
    uncalibrated = Recommender(plain).recommend("u3", candidates=ranked["product_id"].tolist(), k=9)
    both = ranked.merge(uncalibrated, on="product_id")
    assert (both["click_x"] - both["click_y"]).abs().mean() > 1e-3
    frame = slow.rows_of(run, "u3", seen=True)
    pd.testing.assert_frame_equal(recommender.score(frame), Recommender(run).score(frame), atol=2e-6)
    shown = CliRunner().invoke(app, ["recommend", str(exported), "--user", "u3", "--top", "2", "--why"])
    assert shown.exit_code == 0, shown.output
    assert "What each task adds to the score of the top 2 for user u3" in " ".join(shown.output.split())
    again = CliRunner().invoke(app, ["export", str(run_folder), "--out", str(exported)])
    assert "--overwrite" in str(again.exception)


def test_what_is_shown_says_which_context_is_unknown_and_what_comes_to_the_parts(run, recommender):
    def shown(fused_score, top):
        model = copy.copy(run)
        model.model = copy.deepcopy(run.model)
        model.model.output.fused_score = fused_score
        console = Console(file=io.StringIO(), width=200)
        print_recommendations(Recommender(model), "u3", {"hour": "3"}, top, True, console, why=True)
        return " ".join(console.file.getvalue().split())

    text = shown(WeightedMean({"click": 1.0, "buy": -3.0}), 1)
    assert "What each task adds to the score of the top 1 for user u3" in text
    assert "To these come 0.750, which every item has." in text
    text = shown(WeightedGeometricMean({"click": 1.0, "buy": 3.0}), 2)
    assert "adds to the sum that orders the items, not to the score itself, of the top 2 for user u3" in text
    assert "To these come" not in text
    assert "To these come" not in shown(WeightedMean({"click": 1.0}), 2)
    assert recommender.unknown_context({"hour": "3"}) == []
    assert recommender.unknown_context({"hour": 77}) == ["hour"]
    assert recommender.unknown_context({}) == []
    with pytest.raises(DataError, match="no context column 'hours'"):
        recommender.unknown_context({"hours": 3})


def test_many_users_are_ranked_as_each_is_alone(recommender):
    users, contexts = ["u3", "nobody", "u7"], [{"hour": 3}, {}, {"hour": 20}]
    lists = [None, ["p1", "p2", "p3"], ["p9", "p3"]]
    together = recommender.recommend(users, contexts, candidates=lists, k=4, seen=True)
    alone = [
        recommender.recommend(u, c, candidates=items, k=4, seen=True)
        for u, c, items in zip(users, contexts, lists, strict=True)
    ]
    pd.testing.assert_frame_equal(together, pd.concat(alone, ignore_index=True), atol=1e-6)
    assert together["user_id"].tolist() == ["u3"] * 4 + ["nobody"] * 3 + ["u7"] * 2
    common = recommender.recommend(users, {"hour": 3}, candidates=["p1", "p2"], k=1, seen=True)
    assert common["user_id"].tolist() == users


def test_rows_are_scored_in_pieces_without_a_difference(recommender, monkeypatch):
    users = ["u1", "u2", "u3"]
    whole = recommender.recommend(users, k=1000, seen=True)
    monkeypatch.setattr("mtcl_torchrec.serving.recommender.MAX_ROWS", 37)
    pd.testing.assert_frame_equal(recommender.recommend(users, k=1000, seen=True), whole, atol=1e-6)


def test_a_score_does_not_depend_on_the_other_candidates(recommender):
    every = recommender.recommend("u5", k=1000, seen=True).set_index("product_id")
    for item in ("p3", "p40"):
        one = recommender.recommend("u5", candidates=[item], seen=True).iloc[0]
        assert one["score"] == pytest.approx(every.loc[item, "score"], abs=1e-6)


def test_candidates_are_known_ranked_once_and_not_seen_before(run, recommender):
    catalogue = recommender.catalogue
    met = catalogue.seen.loc[catalogue.seen["user_id"] == "u4", "product_id"].tolist()
    assert met
    with pytest.raises(NothingLeftError, match="user 'u4' has seen every candidate"):
        recommender.recommend("u4", candidates=met)
    both = recommender.recommend(["u4", "nobody"], candidates=met, k=1)
    assert both["user_id"].tolist() == ["nobody"]
    assert recommender.recommend("u4", candidates=["p1", "p1"], seen=True)["product_id"].tolist() == ["p1"]
    with pytest.raises(DataError, match="knows no item 'p999', 'x1', 'x2', 'x3', 'x4' and 2 more"):
        recommender.recommend("u4", candidates=["p999", "p1", *(f"x{i}" for i in range(1, 7))])
    with pytest.raises(ValueError, match="2 lists of candidates for 1 users"):
        recommender.recommend(["u1"], candidates=[["p1"], ["p2"]])
    with pytest.raises(ValueError, match="1 contexts for 2 users"):
        recommender.recommend(["u1", "u2"], [{}])


def test_a_context_may_be_text_or_a_number_and_is_not_mixed_up(run, recommender):
    for value in (22, "22", np.int64(22), 3, "3"):
        fast = recommender.recommend("u7", {"hour": value}, k=1000, seen=True)
        same(fast, slow.recommend(run, "u7", {"hour": int(value)}, None, 1000, True))
    with pytest.raises(DataError, match="context hour = 'late' is no number"):
        recommender.recommend("u7", {"hour": "late"})
    with pytest.raises(DataError, match="no context column 'huor' \\(did you mean 'hour'"):
        recommender.recommend("u7", {"huor": 3})


def test_several_contexts_may_stand_in_one_option():
    assert _context(["hour=20, day=3", "place=Paris, Texas"]) == {"hour": "20", "day": "3", "place": "Paris, Texas"}
    with pytest.raises(ConfigError, match="takes column=value, such as hour=20, not 'hour'"):
        _context(["hour"])


def test_several_threads_may_ask_at_once(recommender):
    users = [f"u{n}" for n in range(24)]
    expected = [recommender.recommend(u, {"hour": n % 24}, k=5, seen=True) for n, u in enumerate(users)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: recommender.recommend(users[n], {"hour": n % 24}, k=5, seen=True), range(24)))
    for one, other in zip(got, expected, strict=True):
        pd.testing.assert_frame_equal(one, other, atol=1e-6)


def test_new_weights_of_the_fused_score_act_at_once(folder):
    recommender = Recommender.load(folder)
    recommender.run.model.output.fused_score.set_weights({"click": 1.0, "buy": 0.0, "taste": 0.0, "stars": 0.0})
    ranked = recommender.recommend("u3", k=20, seen=True)
    torch.testing.assert_close(torch.tensor(ranked["score"]), torch.tensor(ranked["click"]))


def invoked(*arguments):
    """What the command line printed, errors too."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.output + (str(result.exception) if result.exception else "")


def test_some_items_only_are_ranked(folder, recommender, tmp_path):
    ranked = recommender.recommend("u3", candidates=["p1", "p7", "p9"], seen=True)["product_id"].tolist()
    pd.DataFrame({"product_id": ["p7", "p9"], "note": ["a", "b"]}).to_csv(tmp_path / "some.csv", index=False)
    ways = (["--candidates", "p9, p1,p7"], ["--candidates", tmp_path / "some.csv", "--candidates", "p1"])
    for way in ways:
        shown = invoked("recommend", folder, "--user", "u3", "--seen", *way)
        assert "Top 3 for user u3" in shown
        assert sorted(ranked, key=lambda item: shown.index(f" {item} ")) == ranked
    assert "the catalogue knows no item 'p777'" in invoked("recommend", folder, "--user", "u3", "--candidates", "p777")
    assert "--candidates names no item" in invoked("recommend", folder, "--user", "u3", "--candidates", ",")


def test_a_users_column_is_no_context(folder):
    said = invoked("recommend", folder, "--user", "u3", "--context", "age=30")
    assert "'age' is a column of the user, and what the log says of it counts" in said
    assert "Recommender.score or POST /score" in said


def test_the_catalogue_says_what_it_is_made_of(folder, exported, recommender):
    line = f"The catalogue has {len(recommender.catalogue.items)} items and 40 users of train and val"
    assert line in " ".join(invoked("recommend", folder, "--user", "u3").split())


def test_new_items_tell_what_training_did_not_see(folder, recommender, tmp_path):
    new = recommender.catalogue.items.head(3).assign(product_id=["n1", "n2", "p1"], genre=["opera", "drama", "drama"])
    new.to_parquet(tmp_path / "new.parquet")
    said = invoked("recommend", folder, "--user", "u3", "--items", tmp_path / "new.parquet")
    assert "mtcl: 2 new items; 1 was in the catalogue already, where the log's columns stay: p1\n" in said
    assert "mtcl: 1 of the new items have a genre that training did not see: it counts as unknown\n" in said


def test_rows_of_training_among_those_that_are_judged_are_counted(folder):
    said = invoked("evaluate", folder, "--data", folder.parent / "log.parquet")
    assert "mtcl: --data: 630 of 900 rows are rows that the run was trained on; what follows is too good" in said
