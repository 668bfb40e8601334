"""Histories in a run: read or built, prepared, streamed, served; the same wherever they come from."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import run_ranks
from shop import RUN, log

from mtcl_torchrec.config import dump_run, load_run, parse_run
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.prepare import prepare_files
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.splits import load_splits
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.serving.artefact import Artefact
from mtcl_torchrec.serving.candidates import CandidateEncoder
from mtcl_torchrec.serving.export import export_run
from mtcl_torchrec.serving.http.bodies import Bodies
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.run import train_run

FEATURES = """
    - {name: clicked, group: user, kind: history, of: product_id, max_length: 4}
    - {name: clicked_kind, group: user, kind: history, beside: clicked, encoding: index, vocabulary_size: 3,
       embedding_dim: 4}
    - {name: clicked_genre, group: user, kind: history, beside: clicked, embedding_dim: 4}
    - {name: clicked_age, group: user, kind: history, beside: clicked, encoding: log_bucket, embedding_dim: 4}
  tasks:"""
BLOCK = """
histories:
  feature: clicked
  where: [click, buy]
  beside: {clicked_kind: [buy, click], clicked_genre: genre}
model:"""
HISTORIES = ("clicked", "clicked_kind", "clicked_genre", "clicked_age")
WITH = RUN.replace("\n  tasks:", FEATURES).replace("\nmodel:", BLOCK)


def quiet(_):
    pass


def run_in(folder, text=WITH, rows=600):
    log(rows).to_parquet(folder / "log.parquet")
    (folder / "run.yaml").write_text(text)
    return load_run(folder / "run.yaml")


def split_of(run):
    preprocessor = Preprocessor(run.data_schema, run.statistics, run.histories)
    return preprocessor, load_splits(run, preprocessor, say=quiet)


def batches(rows, size=64):
    return list(rows.batches(Position(), rank=0, world_size=1, batch_size=size))


def test_yaml_says_it_all_and_reads_back():
    run = parse_run(WITH)
    assert [f.name for f in run.data_schema.history_features] == list(HISTORIES)
    again = parse_run(dump_run(run))
    assert (again.histories, again.data_schema) == (run.histories, run.data_schema)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("feature: clicked", "feature: clickd", "no history of an id feature 'clickd' (did you mean 'clicked'?)"),
        ("feature: clicked", "feature: clicked_age", "no history of an id feature 'clicked_age'"),
        ("clicked_genre: genre}", "clicked_gen: genre}", "'clicked_gen' is not beside 'clicked'"),
        (", clicked_genre: genre}", "}", "say what 'clicked_genre' holds"),
        ("genre: genre}", "genre: genre, clicked_age: time}", "'clicked_age' holds ages, which follow from"),
        ("[buy, click],", "[buy],", "needs encoding: index and vocabulary_size: 2"),
        ("  time: time\n", "", "need schema.time"),
        ("  user: user_id\n", "", "need schema.user, or by"),
        ("feature: clicked\n", "feature: clicked\n  whre: click\n", "unknown key 'histories.0.whre'"),
    ],
)
def test_what_a_block_cannot_build_is_refused(old, new, part):
    text = (
        WITH.replace(old, new, 1)
        if "user: user_id" not in old and "time: time" not in old
        else WITH.replace(old, new, 1).replace(
            "statistics:\n  keys: [user_id, [user_id, genre]]\n  outcomes: [click]\n", ""
        )
    )
    with pytest.raises(ConfigError) as caught:
        parse_run(text)
    assert part in str(caught.value)


def test_a_time_unit_without_ages_and_two_blocks_of_one_history_are_refused():
    text = "\n".join(line for line in WITH.splitlines() if "name: clicked_age" not in line)
    with pytest.raises(ConfigError, match="time_unit: nothing beside 'clicked' holds ages"):
        parse_run(text.replace("feature: clicked", "feature: clicked\n  time_unit: ms", 1))
    run = parse_run(WITH)
    with pytest.raises(ValueError, match="history 'clicked' is declared twice"):
        type(run).model_validate({**run.model_dump(by_alias=True, exclude_unset=True), "histories": run.histories * 2})


@pytest.mark.parametrize(
    ("by", "part"),
    [
        ("hour", "'hour' is no user's column"),
        ("product_id", "'product_id' is no user's column"),
        ("user_d", "'user_d' is no user's column of the schema \\(did you mean 'user_id'"),
    ],
)
def test_a_history_is_the_users(by, part):
    run = parse_run(WITH.replace("feature: clicked", f"feature: clicked\n  by: {by}", 1))
    with pytest.raises(ConfigError, match=part):
        Preprocessor(run.data_schema, run.statistics, run.histories)


def test_prepared_histories_are_lists_and_give_the_same_batches_in_memory_and_streamed(tmp_path):
    run = run_in(tmp_path)
    _, direct = split_of(run)
    prepare_files(run, tmp_path / "prepared", quiet)
    frame = pd.read_parquet(tmp_path / "prepared" / "train.parquet")
    assert frame["clicked"].map(len).max() == 4
    assert (frame["clicked"].map(len) == frame["clicked_age"].map(len)).all()
    ready = load_run(tmp_path / "prepared" / "run.yaml")
    assert ready.histories[0].prepared == str(tmp_path / "prepared" / "history_0")
    preprocessor, prepared = split_of(ready)
    for one, other in zip(batches(direct.train), batches(prepared.train), strict=True):
        assert torch.equal(one.sparse_features.values(), other.sparse_features.values())
        assert torch.equal(one.sparse_features.lengths(), other.sparse_features.lengths())
    for split in ("val", "test"):
        one, other = direct.encoded[split].batch(), prepared.encoded[split].batch()
        assert torch.equal(one.sparse_features.values(), other.sparse_features.values())
    assert direct.catalogue is not None
    assert prepared.catalogue is not None
    for column in HISTORIES:
        assert [list(x) for x in direct.catalogue.users[column]] == [list(x) for x in prepared.catalogue.users[column]]
    # The stream has the same rows in an order of its own.
    ready.data.stream = True
    _, streamed = split_of(ready)
    assert sum(len(b.labels) for b in batches(streamed.train)) == len(frame)
    total = [sum(int(b.sparse_features.values().sum()) for b in batches(s.train)) for s in (direct, streamed)]
    assert total[0] == total[1]
    # What was prepared is stored with the run, and other rows are looked up.
    preprocessor.save(tmp_path / "stored")
    again = Preprocessor.load(tmp_path / "stored", ready.data_schema, ready.statistics, ready.histories)
    other = Rows(log(50, seed=5).assign(time=2_000_000_000))
    one, two = preprocessor.encode(other).batch(), again.encode(other).batch()
    assert torch.equal(one.sparse_features.values(), two.sparse_features.values())


def test_a_stream_and_a_world_refuse_to_build(tmp_path):
    run = run_in(tmp_path)
    prepare_files(run, tmp_path / "p", quiet)
    ready = load_run(tmp_path / "p" / "run.yaml")
    ready.data.stream, ready.histories[0].prepared = True, None
    with pytest.raises(ConfigError, match="histories cannot be built in a stream: run `mtcl prepare` first"):
        split_of(ready)
    with pytest.raises(ConfigError, match="the data of this run is prepared already"):
        prepare_files(load_run(tmp_path / "p" / "run.yaml"), tmp_path / "q", quiet)


def test_some_lists_of_a_history_without_the_others_are_refused(tmp_path):
    preprocessor, _ = split_of(run_in(tmp_path))
    rows = log(3).assign(clicked=[[], ["p1"], []])
    with pytest.raises(DataError, match="no column 'clicked_kind' beside 'clicked'; give all of them, or none"):
        preprocessor.encode(Rows(rows))


# ---------------------------------------------------------------------- serving


def last_clicks(frame, user, most=4):
    own = frame[(frame["user_id"] == user) & (frame["click"] == 1)].sort_values("time", kind="stable")
    return own.tail(most)


def test_the_catalogue_has_each_users_history_as_of_the_end_of_the_log(tmp_path):
    run = run_in(tmp_path)
    _, splits = split_of(run)
    assert splits.catalogue is not None
    splits.catalogue.save(tmp_path / "catalogue")
    frame = log(600)
    known = frame[frame["time"] < splits.raw["test"].frame["time"].min()]
    for catalogue in (splits.catalogue, type(splits.catalogue).load(tmp_path / "catalogue")):
        assert catalogue.end == catalogue.context["time"] == known["time"].max()
        for row in catalogue.users.itertuples():
            past = last_clicks(known, row.user_id)
            assert list(row.clicked) == past["product_id"].tolist()
            assert list(row.clicked_kind) == [1 if buy else 2 for buy in past["buy"]]
            assert list(row.clicked_genre) == past["genre"].tolist()
            assert list(row.clicked_age) == [known["time"].max() - t for t in past["time"]]


def lists_of(rows, feature):
    jagged = rows.batch().sparse_features[feature]
    return [part.tolist() for part in jagged.values().split(jagged.lengths().tolist())]


def test_candidates_have_their_users_history_and_ages_grow_with_the_requests_time(tmp_path):
    preprocessor, splits = split_of(run_in(tmp_path))
    catalogue = splits.catalogue
    assert catalogue is not None
    encoder = CandidateEncoder(preprocessor, catalogue)
    items = np.array([3, 0, 5])
    user = int(np.argmax(catalogue.users["clicked"].map(len)))
    lists = {c: [list(catalogue.users[c][user])] * 3 for c in HISTORIES}
    for passed in (None, 0, 1000, 10**6, -(10**9)):
        context = {} if passed is None else {"time": catalogue.end + passed}
        got = encoder.rows(user, items, context)
        aged = {**lists, "clicked_age": [[max(s + (passed or 0), 0) for s in ages] for ages in lists["clicked_age"]]}
        part = preprocessor.encoder.only(HISTORIES)
        wanted = part.encode(Rows(pd.DataFrame(aged)), with_labels=False)
        for feature in HISTORIES:
            assert lists_of(got, feature) == lists_of(wanted, feature)
    stranger = encoder.rows(-1, items, {"time": catalogue.end + 5})
    assert all(lists_of(stranger, feature) == [[], [], []] for feature in HISTORIES)
    with pytest.raises(DataError, match="context time = 'soon' is no time"):
        encoder.rows(user, items, {"time": "soon"})


def test_times_that_are_timestamps(tmp_path):
    run = run_in(tmp_path)
    frame = log(600)
    frame.assign(time=pd.to_datetime(frame["time"], unit="s", utc=True)).to_parquet(tmp_path / "log.parquet")
    preprocessor, splits = split_of(run)
    catalogue = splits.catalogue
    assert catalogue is not None
    assert isinstance(catalogue.end, str)
    encoder = CandidateEncoder(preprocessor, catalogue)
    later = (pd.Timestamp(catalogue.end) + pd.Timedelta(1, "D")).isoformat()
    ages = catalogue.users["clicked_age"][0]
    got = lists_of(encoder.rows(0, np.arange(1), {"time": later}), "clicked_age")
    assert got == [[int(np.floor(s + 86400) + 1).bit_length() for s in ages]]
    with pytest.raises(DataError, match="context time = 'tomorrow-ish' is no time"):
        encoder.rows(0, np.arange(1), {"time": "tomorrow-ish"})


# ---------------------------------------------------------------------- whole runs

TRAINED = WITH.replace(
    "- {name: taste, kind: multiclass, label: genre, item_class: genre, mask: click, inputs: [user, context]}",
    "- {name: taste, kind: multiclass, label: next_genre, item_class: genre, inputs: [user, context]}",
).replace("histories:", "next_labels: {column: next_genre, of: genre, where: click}\nhistories:")


def train_on_a_rank(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        run = load_run(f"{folder}/run.yaml")
        run.training.epochs = 1
        result = train_run(run, Path(folder) / "run", device="cpu")
    return {task: found["auc"] for task, found in result.evaluations["test"].tasks.items() if "auc" in found}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that built its histories and next labels and was trained on two ranks."""
    folder = tmp_path_factory.mktemp("histories")
    log(1200).to_parquet(folder / "log.parquet")
    (folder / "run.yaml").write_text(TRAINED)
    one, two = run_ranks(train_on_a_rank, 2, str(folder))
    assert one == two
    assert one["click"] > 0.6
    return FinishedRun.load(folder / "run")


def test_a_run_that_builds_histories_judges_other_rows_and_ranks(trained):
    encoded = trained.preprocessor.encode(Rows(log(1200)))
    assert lists_of(encoded, "clicked_age")[0] == []
    recommender = Recommender(trained)
    user = str(recommender.catalogue.users.iloc[0, 0])
    now = recommender.recommend(user, k=60, seen=True)
    later = recommender.recommend(user, {"time": recommender.catalogue.end + 10**7}, k=60, seen=True)
    assert not np.allclose(now["score"], later["score"])
    assert np.isfinite(recommender.recommend("nobody", k=5)["score"]).all()
    # Rows of a log without lists are scored with what their users met before them.
    rows = log(5).drop(columns=["click", "buy", "stars"])
    by_hand = rows.assign(**{c: [[]] * 5 for c in HISTORIES})
    early, empty = (recommender.score(frame)["score"] for frame in (rows.assign(time=0), by_hand))
    assert np.allclose(early, empty)
    assert not np.allclose(recommender.score(rows.assign(time=2 * 10**9))["score"], empty)
    # A request names the time, and a row needs none.
    bodies = Bodies(recommender.schema, recommender.catalogue, max_candidates=9)
    asked = bodies.recommend(json.dumps({"user": user, "context": {"time": 1_800_000_000}}).encode())
    assert asked.context == {"time": 1_800_000_000}
    assert set(HISTORIES) < set(bodies.columns)
    assert "time" not in bodies.columns
    assert np.isfinite(
        recommender.score(bodies.score(json.dumps({"rows": [bodies.example_row()]}).encode()).frame)
    ).all(axis=None)


@pytest.mark.full
def test_an_exported_model_knows_the_histories(trained, tmp_path):
    export_run(trained, tmp_path / "model.mtcl", compiled="no")
    one, other = Recommender(trained), Recommender(Artefact.load(tmp_path / "model.mtcl"))
    user = str(one.catalogue.users.iloc[0, 0])
    wanted, got = (
        r.recommend(user, {"time": one.catalogue.end + 10**7}, k=60, seen=True).sort_values("product_id")
        for r in (one, other)
    )
    assert np.allclose(got["score"], wanted["score"], atol=1e-5)
    rows = log(5).assign(time=2 * 10**9)
    assert np.allclose(one.score(rows)["score"], other.score(rows)["score"], atol=1e-5)
