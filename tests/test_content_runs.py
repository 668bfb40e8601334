"""Whole runs with vectors and semantic ids: cold items, ranks, options, resuming, growing, serving, wrong files."""

import io
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import worded
from ranks import run_ranks
from rich.console import Console

from mtcl_torchrec.cli import main
from mtcl_torchrec.config import dump_run, load_run, parse_run
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.vectors import read_vectors, write_vectors
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.serving.artefact import Artefact
from mtcl_torchrec.serving.export import export_run
from mtcl_torchrec.serving.recommender import Recommender
from mtcl_torchrec.training.checkpoint.reader import saved_tensors
from mtcl_torchrec.training.checkpoint.store import newest_checkpoint
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.planning.offline import plan_offline
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import load_data
from mtcl_torchrec.training.sharding import Ranks

TRAINED = worded.VECTOR.replace("embedding_dim: 8", "embedding_dim: 8, trainable: 0.3")
HALF = worded.VECTOR.replace("embedding_dim: 8", "embedding_dim: 8, data_type: fp16")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worded")
    worded.files(folder)
    worded.log().to_parquet(folder / "log.parquet", index=False)
    return folder


def trained(data, folder, *features, existing="refuse", **changes):
    """The result, and what was said."""
    run, said = parse_run(worded.yaml(*features), folder=data), io.StringIO()
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = run
        for parent in parents:
            at = getattr(at, parent)
        setattr(at, last, value)
    run = parse_run(dump_run(run))
    console = Console(file=said, width=200)
    return train_run(run, folder, existing=existing, device="cpu", console=console), said.getvalue()


def cold(result):
    """AUC of clicks on items that training never saw."""
    return result.evaluations["test"].tasks["click"]["auc"]


@pytest.fixture(scope="module")
def by_content(data, tmp_path_factory):
    """A run with everything at once: id, vector with a trained part, semantic id."""
    folder = tmp_path_factory.mktemp("run") / "all"
    features = (worded.ID, TRAINED, worded.CODE)
    return trained(data, folder, *features, model__embedding_dropout=0.2)


@pytest.mark.full
def test_content_ranks_items_that_training_never_saw(data, tmp_path, by_content):
    alone = {
        name: cold(trained(data, tmp_path / name, feature)[0])
        for name, feature in (("id", worded.ID), ("vector", worded.VECTOR), ("code", worded.CODE))
    }
    assert abs(alone["id"] - 0.5) < 0.08
    assert alone["vector"] > 0.66
    assert alone["code"] > 0.66
    assert cold(by_content[0]) > 0.66
    assert "text: 100.0% of the rows of val have a vector" in by_content[1]


# ---------------------------------------------------------------------- on two ranks

OPTIONS = {
    "surgery": (
        (worded.ID, TRAINED, worded.CODE),
        {
            "balance__surgery": {"kind": "upgrad", "cut": "both"},
            "training__precision": "bf16",
            "sharding__kinds": ["row_wise"],
            "training__regularisers": {"l2_embedding": 1e-4, "l2_dense": 1e-5},
            "training__averaging": 0.9,
        },
    ),
    "stem": (
        (worded.CODE, TRAINED, HALF.replace("text", "half")),
        {
            "model__trunk": {"kind": "stem", "expert_layers": [16]},
            "model__epnet": {"features": ["text", "code"]},
            "sharding__kinds": ["table_wise"],
            "fusion": {"kind": "context_gated_mean", "weights": {"click": 1, "like": 1}, "features": ["text"],
                       "train": {"reward": "click"}},
        },
    ),
    "tables": (
        (worded.VECTOR, worded.CODE),
        {
            "balance__surgery": {"kind": "upgrad", "cut": "tables"},
            "sharding__kinds": ["data_parallel"],
            "model__cross_layers": 1,
        },
    ),
}  # fmt: skip
SAME = {"training__precision": "fp32", "training__epochs": 1}


def every_option(data, folder):
    """Each option: which tables that start at zero have moved; and the validation metrics of an epoch with the same
    global batches on any number of ranks."""
    moved = {}
    for name, (features, changes) in OPTIONS.items():
        result, _ = trained(data, folder / name, *features, **{**changes, "training__epochs": 1})
        tables = FinishedRun.load(result.folder).model.embedding_bag_collection.embedding_bags
        moved[name] = {t: bool((of.weight != 0).any()) for t, of in tables.items() if "user" not in t}
    result, _ = trained(data, folder / "same", worded.ID, TRAINED, worded.CODE, **SAME, training__batch_size=50)
    return moved, result.history.epochs


def test_two_ranks_train_every_option_and_the_same_model(data, tmp_path):
    worded.log(700).to_parquet(tmp_path / "log.parquet", index=False)
    worded.files(tmp_path)
    (moved, two), other = run_ranks(every_option, 2, tmp_path, tmp_path)
    assert (moved, two) == other
    assert {name: len(tables) for name, tables in moved.items()} == {"surgery": 3, "stem": 4, "tables": 1}
    assert all(all(tables.values()) for tables in moved.values()), moved
    one = trained(tmp_path, tmp_path / "one", worded.ID, TRAINED, worded.CODE, **SAME)[0].history.epochs
    for task in ("click", "like"):
        assert two[0][task]["auc"] == pytest.approx(one[0][task]["auc"], abs=2e-3)


# ---------------------------------------------------------------------- kept, resumed, grown


def test_checkpoints_hold_the_trained_part_and_not_the_vectors(by_content):
    result, _ = by_content
    saved = saved_tensors(newest_checkpoint(result.folder / "checkpoints"))
    of_text = {name: tuple(shape) for name, shape in saved.items() if "lookups" in name or "table_text" in name}
    assert (8, 16) in of_text.values()  # the projection
    assert (worded.ITEMS + 1, 8) in of_text.values()
    assert (worded.ITEMS + 1, 16) not in of_text.values()


@pytest.mark.full
def test_a_resumed_run_ends_as_one_that_went_through(data, tmp_path):
    features, same = (worded.ID, TRAINED, worded.CODE), {"training__decay": "none", "training__patience": 0}
    trained(data, tmp_path / "a", *features, **same, training__epochs=2)
    trained(data, tmp_path / "b", *features, **same, training__epochs=1)
    trained(data, tmp_path / "b", *features, **same, training__epochs=2, existing="resume")
    one, other = (FinishedRun.load(tmp_path / name).model.state_dict() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_longer_file_makes_a_resumed_run_longer(data, tmp_path, by_content):
    folder = tmp_path / "run"
    shutil.copytree(by_content[0].folder, folder)
    worded.files(tmp_path, extra=9)
    worded.log().to_parquet(tmp_path / "log.parquet", index=False)
    features = (worded.ID, TRAINED, worded.CODE)
    before = FinishedRun.load(folder)
    result, _ = trained(tmp_path, folder, *features, existing="resume", training__epochs=4)  # nothing left to train
    after = FinishedRun.load(folder)
    frame = worded.log().tail(300).reset_index(drop=True)
    encoded = [run.encode(frame).batch() for run in (before, after)]
    assert torch.equal(encoded[0].sparse_features.values(), encoded[1].sparse_features.values())  # old rows stay
    table = after.model.embedding_bag_collection.embedding_bags["table_text"].weight
    assert len(table) == worded.ITEMS + 10
    assert (table[-9:] == 0).all()
    with torch.no_grad():
        outs = [run.model(b.dense_features, b.sparse_features) for run, b in zip((before, after), encoded, strict=True)]
    torch.testing.assert_close(outs[0]["score"], outs[1]["score"])
    new = frame.assign(item_id=[f"p{worded.ITEMS + i % 9}" for i in range(len(frame))])
    assert (after.encode(new).ids > 0).any(0).tolist() == [True, False, True]  # user, item_id and text
    assert cold(result) == pytest.approx(cold(by_content[0]), abs=1e-4)
    vectors = read_vectors(tmp_path / "vectors.parquet")
    write_vectors(tmp_path / "vectors.parquet", vectors.keys, vectors.vectors[:, ::-1].copy(), key="item_id")
    with pytest.raises(ConfigError, match="feature 'text': the vector of 'p0' is another"):
        trained(tmp_path, folder, *features, existing="resume", training__epochs=5)


# ---------------------------------------------------------------------- serving


def test_a_run_serves_as_it_was_trained(data, tmp_path, by_content):
    folder = by_content[0].folder
    run, recommender = FinishedRun.load(folder), Recommender.load(folder)
    best = recommender.recommend("u3", k=worded.ITEMS, seen=True)
    frame = pd.DataFrame({"user_id": "u3", "item_id": best["item_id"]})
    batch = run.encode(frame).batch()
    with torch.no_grad():
        expected = run.model(batch.dense_features, batch.sparse_features)["score"]
    np.testing.assert_allclose(best["score"], expected, atol=1e-6)
    exported = export_run(run, tmp_path / "model.mtcl", compiled="no")
    served = Recommender.load(tmp_path / "model.mtcl")
    again = served.recommend("u3", k=worded.ITEMS, seen=True)
    np.testing.assert_allclose(again["score"].to_numpy(), best["score"].to_numpy(), atol=1e-5)
    assert max(exported.difference.values()) < 1e-4
    assert Artefact.load(tmp_path / "model.mtcl").preprocessor.encoder._contents["text"].vectors is None
    with pytest.raises(ConfigError, match="export the run again"):
        Recommender.load(tmp_path / "model.mtcl", contents={"text": "x"})


def test_new_items_are_scored_by_newer_files(tmp_path, by_content):
    worded.files(tmp_path, extra=worded.TOPICS)
    files = {"text": tmp_path / "vectors.parquet", "code": tmp_path / "codes.parquet"}
    recommender = Recommender.load(by_content[0].folder, contents=files)
    stale = Recommender.load(by_content[0].folder)
    new = [f"p{worded.ITEMS + i}" for i in range(worded.TOPICS)]  # one of each topic
    frame = pd.DataFrame({"user_id": "u3", "item_id": new})
    scores = recommender.score(frame)["click"].to_numpy()
    assert stale.score(frame)["click"].nunique() == 1  # it knows nothing of them
    liked = [i for i in range(worded.TOPICS) if i in (0, 1, 2 + 3 % 6)]
    others = [i for i in range(worded.TOPICS) if i not in liked]
    assert scores[liked].mean() > scores[others].mean() + 0.15
    old = pd.DataFrame({"user_id": "u3", "item_id": ["p0", "p5"]})
    np.testing.assert_allclose(recommender.score(old)["click"], stale.score(old)["click"], atol=1e-6)


def test_new_items_join_the_catalogue_and_are_ranked_by_their_content(tmp_path, by_content):
    folder = by_content[0].folder
    worded.files(tmp_path, extra=worded.TOPICS)
    files = {"text": tmp_path / "vectors.parquet", "code": tmp_path / "codes.parquet"}
    new = [f"p{worded.ITEMS + i}" for i in range(worded.TOPICS)]
    pd.DataFrame({"title": "?", "item_id": ["p3", *new]}).to_csv(tmp_path / "new.csv", index=False)
    newer = Recommender.load(folder, contents=files, items=[tmp_path / "new.csv"])
    stale = Recommender.load(folder)
    ranked = newer.recommend("u3", k=500, seen=True).set_index("item_id")
    assert len(ranked) == len(stale.catalogue.items) + worded.TOPICS  # p3 was known
    frame = pd.DataFrame({"user_id": "u3", "item_id": new})
    np.testing.assert_allclose(ranked.loc[new, "click"], newer.score(frame)["click"], atol=1e-6)
    before = stale.recommend("u3", k=500, seen=True).set_index("item_id")
    np.testing.assert_allclose(ranked.loc[before.index, "click"], before["click"], atol=1e-6)
    assert len(newer.recommend("u3", candidates=new, k=3)) == 3  # nobody has met them


@pytest.mark.full
def test_an_exported_model_has_new_items(tmp_path, by_content):
    worded.files(tmp_path, extra=worded.TOPICS)
    files = {"text": tmp_path / "vectors.parquet", "code": tmp_path / "codes.parquet"}
    pd.DataFrame({"item_id": [f"p{worded.ITEMS}"]}).to_csv(tmp_path / "new.csv", index=False)
    run = FinishedRun.load(by_content[0].folder, contents=files, items=[tmp_path / "new.csv"])
    export_run(run, tmp_path / "model.mtcl", compiled="no")
    ranked, served = (
        r.recommend("u3", k=500, seen=True).set_index("item_id")
        for r in (Recommender(run), Recommender.load(tmp_path / "model.mtcl"))
    )
    assert f"p{worded.ITEMS}" in served.index
    np.testing.assert_allclose(served.loc[ranked.index, "click"], ranked["click"], atol=1e-5)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ({"item": ["x"]}, r"new.csv: no column 'item_id' .*; new items have the item columns item_id"),
        ({"item_id": ["x", "x"]}, "new.csv, row 1: item_id = 'x' is there already, in .*new.csv, row 0"),
        ({"item_id": ["x", None], "more": 1}, "new.csv, row 1: key 'item_id' is missing"),
    ],
    ids=["column", "twice", "missing"],
)
def test_new_items_that_are_none_are_refused(tmp_path, by_content, frame, said):
    pd.DataFrame(frame).to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(DataError, match=said):
        Recommender.load(by_content[0].folder, items=[tmp_path / "new.csv"])


def test_a_column_of_new_items_is_what_the_log_has():
    known = pd.DataFrame({"item": ["a", "b"], "code": ["007", None], "price": [1.5, 2.0], "tags": [["x"], []]})
    catalogue = Catalogue(pd.DataFrame(), known, {}, pd.DataFrame(), pd.Series(dtype=float))
    more = pd.DataFrame({"item": [5, 6], "code": [8, None], "price": [None, 3], "tags": [None, ["y"]]})
    items = catalogue.with_items(Rows(more)).items
    assert items["item"].tolist() == ["a", "b", "5", "6"]
    assert items["code"].dropna().tolist() == ["007", "8"]
    for column, values in {"price": ["cheap", "dear"], "tags": ["x|y", "z"]}.items():
        with pytest.raises(DataError, match=f"column '{column}' holds text, and (numbers|lists) in the log"):
            catalogue.with_items(Rows(more.assign(**{column: values})))


def test_the_command_line_takes_newer_files(tmp_path, by_content, monkeypatch, capsys):
    folder = by_content[0].folder
    worded.files(tmp_path, extra=1)
    pd.DataFrame({"item_id": [f"p{worded.ITEMS}"]}).to_csv(tmp_path / "new.csv", index=False)

    def mtcl(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtcl", "recommend", str(folder), "--user", "u3", *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr()

    files = ["--contents", f"text={tmp_path}/vectors.parquet", "--contents", f"code={tmp_path}/codes.parquet"]
    assert f"p{worded.ITEMS} " in mtcl("--top", 500, "--seen", *files, "--items", tmp_path / "new.csv").out
    items = ["--items", tmp_path / "new.csv"]
    assert "mtcl: 1 new item: 1 with text, 1 with code\n" in mtcl(*files, *items).err
    assert "1 new item: 1 with text, 0 with code" in (half := mtcl(*files[:2], *items).err)
    assert "the model reads code, which no new item has: --contents code=FILE gives newer ones" in half
    assert "newer text, code, and no new items to rank: --items names them" in mtcl(*files).err
    pd.DataFrame({"item_id": ["p1", f"p{worded.ITEMS}"]}).to_csv(tmp_path / "new.csv", index=False)
    assert "; 1 was in the catalogue already, where the log's columns stay: p1" in mtcl(*files, *items).err
    assert mtcl().err == ""
    assert "--contents takes FEATURE=FILE" in mtcl("--contents", "vectors.parquet").err
    assert "--contents: 'text' is given twice" in mtcl(*files[:2], *files[:2]).err
    assert "no vector or semantic_id feature 'txt' (did you mean 'text'?)" in mtcl("--contents", "txt=a.parquet").err


def test_a_plan_knows_the_tables_of_contents(data):
    run = parse_run(worded.yaml(TRAINED, worded.CODE), folder=data)
    plan = plan_offline(run, 2, "cpu", num_rows_of={"user_id": 31})
    prefixes = len({i % 8 // 2 for i in range(8)}) + worded.TOPICS + worded.ITEMS
    rows = {table.name: table.rows for table in plan.tables}
    assert rows == {"user_id": 31, "text": worded.ITEMS + 1, "code": prefixes + 1}


# ---------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("columns", "error", "said"),
    [
        (None, ConfigError, "feature 'text': vectors: no such file: .*vectors.parquet"),
        ({"item_id": ["x", "y"], "vector": [[1.0, 2.0], [2.0, 3.0]]}, DataError,
         "feature 'text': no row of val has a vector: the keys in column 'item_id' are not those of"),
        ({"item_id": ["p1", "p2"], "vector": [[1.0, 2.0], [2.0]]}, DataError,
         r"feature 'text': .*vectors.parquet, row 1 \(key 'p2'\): vector has 1 values, the first row 2"),
        ({"item_id": ["p1", "p2"], "vector": [[1.0, 2.0], [2.0, np.inf]]}, DataError, "row 1 .*is not finite"),
        ({"item_id": ["p1", "p1"], "vector": [[1.0], [2.0]]}, DataError, "'p1' is there already, in .*row 0"),
        ({"item_id": ["p1", "p2"], "vectr": [[1.0], [2.0]]}, DataError, "no column 'vector'"),
    ],
    ids=["missing", "other keys", "width", "infinite", "twice", "column"],
)  # fmt: skip
def test_wrong_files_are_refused(data, tmp_path, columns, error, said):
    shutil.copy(data / "log.parquet", tmp_path)
    if columns is not None:
        pd.DataFrame(columns).to_parquet(tmp_path / "vectors.parquet")
    with pytest.raises(error, match=said):
        trained(tmp_path, tmp_path / "run", worded.VECTOR)
    assert not (tmp_path / "run").exists()


def test_a_run_says_where_its_files_are_from_wherever_it_stands(data, tmp_path, by_content):
    kept = load_run(by_content[0].folder / "run.yaml").data_schema
    text = next(f for f in kept.features if f.name == "text")
    assert len(read_vectors(text.vectors and (by_content[0].folder / text.vectors).resolve())) == worded.ITEMS


def test_keys_that_match_few_rows_are_shown_and_doubted(data, tmp_path):
    shutil.copy(data / "log.parquet", tmp_path)
    run = parse_run(worded.yaml(worded.VECTOR), folder=tmp_path)
    worded.files(tmp_path)
    vectors = read_vectors(tmp_path / "vectors.parquet")
    said: list[str] = []
    for kept in (slice(10, None), slice(3)):
        keys, rows = vectors.keys[kept].reset_index(drop=True), vectors.vectors[kept]
        write_vectors(tmp_path / "vectors.parquet", keys, rows, key=vectors.key)
        load_data(run, Ranks(0, 1, torch.device("cpu")), say=said.append)
    many, few = (line for line in said if line.startswith("text: "))
    assert "; item_id = 'p" in many
    assert many.endswith("' has none")
    assert few.endswith(f"' has none: do the keys of log and {tmp_path / 'vectors.parquet'} mean the same?")
