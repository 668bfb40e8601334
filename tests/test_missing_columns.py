"""A column that files lack: the error says what it is to the run, and how to have it."""

import pandas as pd
import pytest
import shop

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.prepare import prepare_files
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.splits import load_splits
from mtcl_torchrec.schema import ConfigError, DataError

FIRST = "    - {name: user_id, group: user, embedding_dim: 8}\n"


def with_feature(line: str) -> str:
    return shop.RUN.replace(FIRST, f"{FIRST}    - {line}\n")


HISTORY = "{name: clicked, group: user, kind: history, of: product_id}"
AGES = "{name: clicked_age, group: user, kind: history, beside: clicked, encoding: log_bucket, embedding_dim: 4}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (with_feature(HISTORY), ": 'clicked' is a history; build it of the log with histories: [{feature: clicked, "
                                "where: [click]}]"),
        (with_feature("{name: text, group: item, kind: vector, vectors: v.parquet, embedding_dim: 8}"),
         ": vector feature 'text' needs column: the one with the keys of v.parquet, such as sku"),
        (with_feature("{name: code, group: item, kind: semantic_id, codes: none.parquet, embedding_dim: 8}"),
         ": semantic_id feature 'code' needs column: the one with the keys of none.parquet, such as product_id"),
        (with_feature("{name: publisher, group: item, embedding_dim: 8}"),
         ": features are columns of the log; join in first what a file of items or users says"),
        (shop.RUN.replace("label: genre,", "label: next_genre,"),
         ": make the label of the log with next_labels: [{column: next_genre, of: genre}]"),
        (shop.RUN.replace("label: genre,", "label: whither,"),
         "; a label that tells what comes next is made with next_labels: [{column: whither, of: COLUMN}]"),
        (shop.RUN.replace("{name: click, kind: binary}", "{name: click, label: clik, kind: binary}"),
         " (did you mean 'click'?)"),
    ],
    ids=["history", "vector", "code", "join", "next label", "other label", "typo"],
)  # fmt: skip
def test_the_remedy_fits_what_the_column_is(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    shop.log(200).to_parquet("log.parquet")
    pd.DataFrame({"sku": ["p1"], "vector": [[1.0, 2.0]]}).to_parquet("v.parquet")
    run = parse_run(text)
    with pytest.raises(DataError) as error:
        load_splits(run, Preprocessor(run.data_schema, run.statistics), say=print)
    assert str(error.value).startswith("log.parquet: no column '")
    assert str(error.value).endswith(said)


def test_a_stream_and_prepare_say_it_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("log", "val"):
        shop.log(200).to_parquet(f"{name}.parquet")
    run = parse_run(with_feature(HISTORY))
    with pytest.raises(DataError, match=r"histories: \[{feature: clicked, where: \[click\]}\]"):
        prepare_files(run, tmp_path / "out", print)
    text = with_feature(HISTORY).split("statistics:")[0].replace(
        "data: {log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}",
        "data: {train: log.parquet, val: val.parquet, stream: true}",
    )  # fmt: skip
    run = parse_run(text + "model:" + shop.RUN.split("model:")[1])
    with pytest.raises(DataError, match="build it of the log with histories"):
        load_splits(run, Preprocessor(run.data_schema), say=print)


def test_what_stands_beside_a_history_names_the_history(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop.log(200).assign(clicked=[["p1"]] * 200).to_parquet("log.parquet")
    run = parse_run(with_feature(f"{HISTORY}\n    - {AGES}"))
    with pytest.raises(DataError, match=r"'clicked_age' is beside history 'clicked'; build it .*{feature: clicked, "):
        load_splits(run, Preprocessor(run.data_schema, run.statistics), say=print)


def test_text_is_no_kind_but_becomes_vectors():
    with pytest.raises(ConfigError, match=r"no kind 'text': `mtcl embed` makes vectors of texts.* kind: vector"):
        parse_run(with_feature("{name: title, group: item, kind: text}"))
