"""Files of item vectors and codes as a run keeps them: rows by key, growth, damage; and what a schema may say."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mtcl_torchrec.data.contents import CodeRows, VectorRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.prefixes import Prefixes
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.vectors import ItemVectors, write_codes, write_vectors
from mtcl_torchrec.schema import ConfigError, DataError, Feature, Schema, Task


def vectors_of(keys, vectors, data_type="fp32"):
    return VectorRows.of(ItemVectors("item", pd.Series(keys), np.float32(vectors)), data_type)


def codes_of(keys, codes, sizes=(4, 4)):
    codes = np.array(codes)
    return CodeRows(pd.Index(keys), codes, Prefixes.of(codes, sizes))


# ---------------------------------------------------------------------- vectors


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 6), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.sampled_from(["fp32", "fp16"])
)
def test_vectors_have_length_root_d_and_their_direction(count, width, size, data_type):
    given = np.random.default_rng(count).normal(size=(count, width)).astype(np.float32) * np.float32(size)
    rows = vectors_of([f"i{i}" for i in range(count)], given, data_type)
    kept = rows.vectors.astype(np.float64)
    assert rows.vectors.dtype == (np.float16 if data_type == "fp16" else np.float32)
    assert (kept[0] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(kept[1:], axis=1), width**0.5, rtol=1e-2 if data_type == "fp16" else 1e-5)
    wide = given.astype(np.float64)
    cosine = (wide * kept[1:]).sum(1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(kept[1:], axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-4)


def test_a_vector_of_zeros_is_none():
    rows = vectors_of(["a", "b", "c"], [[1, 0], [0, 0], [0, 2]])
    assert rows.rows(pd.Series(["a", "b", "c", "x", None])).tolist() == [1, 0, 2, 0, 0]
    with pytest.raises(DataError, match="zero"):
        vectors_of(["a"], [[0, 0]])


@pytest.mark.parametrize("keys", [[7, 12], ["7", "12"]], ids=["numbers", "text"])
@pytest.mark.parametrize("values", [[12, 7, 3], ["12", "7", "3"], [12.0, 7.0, None]], ids=["numbers", "text", "gaps"])
def test_keys_are_found_in_whatever_kind_they_come(keys, values):
    rows = vectors_of(keys, [[1, 0], [0, 1]])
    codes = codes_of(keys, [[0, 1], [2, 3]])
    assert rows.rows(pd.Series(values)).tolist() == [2, 1, 0]
    assert codes.jagged(pd.Series(values))[1].tolist() == [2, 2, 0]


def test_vectors_grow_at_their_end():
    old = vectors_of(["a", "b"], [[1, 0], [0, 1]])
    newer = vectors_of(["c", "b", "d"], [[1, 1], [0, 1.001], [1, -1]], "fp16")
    grown = old.grown(newer, "text")
    assert grown.keys.tolist() == ["a", "b", "c", "d"]
    assert grown.vectors.dtype == np.float16
    np.testing.assert_allclose(grown.vectors[:3], old.vectors, atol=1e-3)
    np.testing.assert_array_equal(grown.vectors[3:], newer.vectors[[1, 3]])


@pytest.mark.parametrize(
    ("newer", "said"),
    [
        (vectors_of(["a", "b"], [[1, 0], [1, 1]]), "vector of 'b' is another"),
        (vectors_of(["c"], [[1, 0, 0]]), "had 2 numbers and now have 3"),
    ],
)
def test_vectors_that_have_changed_are_refused(newer, said):
    with pytest.raises(ConfigError, match=f"feature 'text': .*{said}"):
        vectors_of(["a", "b"], [[1, 0], [0, 1]]).grown(newer, "text")


def test_vectors_come_back_as_they_were(tmp_path):
    rows = vectors_of([3, 5], [[1, 2], [3, -4]], "fp16")
    rows.save(tmp_path / "vectors.parquet")
    again = VectorRows.load(tmp_path / "vectors.parquet")
    np.testing.assert_array_equal(again.vectors, rows.vectors)
    assert again.digest() == rows.digest() != vectors_of([3, 5], [[1, 2], [3, -5]], "fp16").digest()
    rows.save(tmp_path / "keys.parquet", keys_only=True)
    keys = VectorRows.load(tmp_path / "keys.parquet")
    assert keys.vectors is None
    assert keys.rows(pd.Series(["5"])).tolist() == [2]


# ---------------------------------------------------------------------- codes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_prefixes_of_items_are_those_of_a_dictionary(codes):
    keys = [f"i{i}" for i in range(len(codes))]
    rows = codes_of(keys, codes, (3, 3, 3))
    asked = [*reversed(keys), "x"]
    numbers, lengths = rows.jagged(pd.Series(asked))
    assert lengths.tolist() == [3] * len(keys) + [0]
    known = {}
    for item, of in zip(asked, np.split(numbers, np.cumsum(lengths)[:-1]), strict=True):
        code = codes[keys.index(item)] if item in keys else ()
        for length, number in enumerate(of.tolist(), start=1):
            assert known.setdefault(code[:length], number) == number  # a prefix has one row …
    assert len(set(known.values())) == len(known)  # … and a row one prefix
    assert len(rows) == len(known) == max(known.values())


def test_a_new_code_backs_off_where_the_table_cannot_grow():
    old = codes_of(["a", "b"], [[0, 1], [2, 3]])
    newer = codes_of(["a", "c", "d"], [[0, 1], [0, 2], [3, 3]])
    kept = old.grown(newer, "code", new_prefixes=False)
    numbers, lengths = kept.jagged(pd.Series(["a", "b", "c", "d"]))
    assert lengths.tolist() == [2, 2, 1, 0]
    assert numbers[4] == numbers[0]  # c has the first prefix of a
    grown = old.grown(newer, "code")
    numbers, lengths = grown.jagged(pd.Series(["a", "b", "c", "d"]))
    assert lengths.tolist() == [2, 2, 2, 2]
    assert numbers[:4].tolist() == old.jagged(pd.Series(["a", "b"]))[0].tolist()


@pytest.mark.parametrize(
    ("newer", "said"),
    [
        (codes_of(["b", "a"], [[2, 3], [0, 2]]), "code of 'a' is another"),
        (codes_of(["c"], [[0, 1]], (4, 5)), "levels had"),
    ],
)
def test_codes_that_have_changed_are_refused(newer, said):
    with pytest.raises(ConfigError, match=f"feature 'code': .*{said}"):
        codes_of(["a", "b"], [[0, 1], [2, 3]]).grown(newer, "code")


# ---------------------------------------------------------------------- in an encoder


def encoder_of(folder, more=(), **options):
    write_vectors(folder / "v.parquet", pd.Series([1, 2, 3]), np.float32([[1, 0], [0, 1], [1, 1]]), key="item")
    write_codes(folder / "c.parquet", pd.Series([2, 3]), np.array([[0, 1], [0, 0]]), (2, 2), key="item")
    item = {"group": "item", "column": "item", "embedding_dim": 4}
    schema = Schema(
        features=[
            Feature(name="code", kind="semantic_id", codes=str(folder / "c.parquet"), **item),
            Feature(name="text", kind="vector", vectors=str(folder / "v.parquet"), **item, **options),
            Feature(name="item", **{k: v for k, v in item.items() if k != "column"}),
            *more,
        ],
        tasks=[Task.binary("click")],
    )
    return FeatureEncoder(schema).fit(Rows(pd.DataFrame({"item": ["1", "2"], "click": [0, 1]})))


def test_three_features_read_one_column(tmp_path):
    encoder = encoder_of(tmp_path, trainable=0.1)
    assert encoder.keys == ("code", "text", "item")
    assert [encoder.num_embeddings(table) for table in encoder.keys] == [4, 4, 3]
    rows = encoder.encode(Rows(pd.DataFrame({"item": ["3", "1", None, "2"]})), with_labels=False)
    assert rows.ids.tolist() == [[3, 0], [1, 1], [0, 0], [2, 2]]  # text, item: 3 was never trained on
    assert rows.bags["code"].offsets.tolist() == [0, 2, 2, 2, 4]
    batch = rows.batch()
    assert batch.sparse_features.keys() == ["code", "text", "item"]
    assert batch.sparse_features["code"].lengths().tolist() == [2, 0, 0, 2]
    shares = {feature.name: share for feature, share in encoder.coverage(rows)}
    assert shares == {"code": 0.5, "text": 0.75}


def test_an_encoder_comes_back_with_its_files_contents(tmp_path):
    encoder = encoder_of(tmp_path)
    encoder.save(tmp_path / "kept")
    again = FeatureEncoder.load(tmp_path / "kept")
    np.testing.assert_array_equal(again.vectors("text"), encoder.vectors("text"))
    frame = Rows(pd.DataFrame({"item": [3, 1, 9]}))
    one, other = (e.encode(frame, with_labels=False).batch().sparse_features for e in (encoder, again))
    assert torch.equal(one.values(), other.values())
    about = json.loads((tmp_path / "kept/encoder.json").read_text())
    about["contents"]["text"] = "0" * 32
    (tmp_path / "kept/encoder.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="not what the run was trained with"):
        FeatureEncoder.load(tmp_path / "kept")


def test_beside_a_network_only_keys_are_kept(tmp_path):
    encoder = encoder_of(tmp_path)
    encoder.save(tmp_path / "kept", for_network=True)
    again = FeatureEncoder.load(tmp_path / "kept")
    rows = again.encode(Rows(pd.DataFrame({"item": [3, 9]})), with_labels=False)
    assert rows.ids.tolist() == [[0, 3], [0, 0]]
    with pytest.raises(ConfigError, match="exported network"):
        again.vectors("text")


def test_newer_files_bring_new_items_to_an_encoder(tmp_path):
    encoder = encoder_of(tmp_path)
    write_vectors(tmp_path / "w.parquet", pd.Series([9, 1]), np.float32([[3, 0], [5, 0]]), key="item")
    write_codes(tmp_path / "d.parquet", pd.Series([9]), np.array([[1, 1]]), (2, 2), key="item")
    newer = encoder.with_contents({"text": tmp_path / "w.parquet", "code": tmp_path / "d.parquet"})
    rows = newer.encode(Rows(pd.DataFrame({"item": [9, 1, 2]})), with_labels=False)
    assert rows.ids[:, 1].tolist() == [4, 1, 2]
    assert rows.bags["code"].offsets.tolist() == [0, 0, 0, 2]  # no prefix of 9 has a row
    assert encoder.encode(Rows(pd.DataFrame({"item": [9]})), with_labels=False).ids.tolist() == [[0, 0]]
    with pytest.raises(ConfigError, match=r"no vector or semantic_id feature .txt. .did you mean .text."):
        encoder.with_contents({"txt": "x"})
    with pytest.raises(ConfigError, match="feature 'text': vectors: no such file"):
        encoder.with_contents({"text": tmp_path / "none.parquet"})


def test_what_a_file_does_wrong_is_told_with_the_feature(tmp_path):
    encoder_of(tmp_path)
    pd.DataFrame({"item": [1, 1], "vector": [[1.0], [2.0]]}).to_parquet(tmp_path / "v2.parquet")
    item = {"group": "item", "column": "item", "kind": "vector"}
    schema = Schema(
        features=[Feature(name="text", vectors=str(tmp_path / "v2.parquet"), **item)], tasks=[Task.binary("click")]
    )
    with pytest.raises(
        DataError, match=r"feature 'text': .*v2.parquet, row 1: item = '1' is there already, in .*row 0"
    ):
        FeatureEncoder(schema).fit(Rows(pd.DataFrame({"item": [1], "click": [0]})))


# ---------------------------------------------------------------------- in a schema


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "vector"}, "kind vector needs vectors"),
        ({"kind": "semantic_id"}, "kind semantic_id needs codes"),
        ({"vectors": "v.parquet"}, "vectors belongs to kind vector, not to id"),
        ({"kind": "bag", "codes": "c.parquet"}, "codes belongs to kind semantic_id, not to bag"),
        ({"kind": "dense", "trainable": 0.1}, "trainable belongs to kind vector, not to dense"),
        ({"kind": "vector", "vectors": "v", "trainable": -1.0}, "trainable"),
        ({"kind": "vector", "vectors": "v", "encoding": "hash", "vocabulary_size": 9}, "vocabulary_size does nothing"),
        ({"kind": "vector", "vectors": "v", "table": "items"}, "table does nothing"),
        ({"kind": "vector", "vectors": "v", "data_type": "bf16"}, "fp32 or fp16"),
        ({"kind": "vector", "vectors": "v", "embedding_dim": 6}, "multiple of 4"),
        ({"kind": "vector", "vectors": "v", "clip": 2.0}, "no dense feature"),
        ({"kind": "semantic_id", "codes": "c", "pooling": "mean"}, "pooling does nothing"),
        ({"kind": "semantic_id", "codes": "c", "min_count": 2}, "min_count does nothing"),
    ],
)
def test_wrong_features_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        Feature(name="text", group="item", **options)


@pytest.mark.parametrize(
    ("features", "task", "said"),
    [
        ([{"name": "c", "kind": "semantic_id", "codes": "c"}, {"name": "i", "table": "c"}], None, "agree on kind"),
        (
            [{"name": n, "kind": "semantic_id", "codes": n, "table": "t"} for n in "ab"],
            None,
            "share table 't' and must agree on codes",
        ),
        ([{"name": "c", "kind": "semantic_id", "codes": "c"}], "c", "item_class 'c' is no id feature"),
    ],
)
def test_what_does_not_fit_together_is_refused(features, task, said):
    tasks = [Task.binary("click") if task is None else Task(name="topic", kind="multiclass", item_class=task)]
    with pytest.raises(ValidationError, match=said):
        Schema(features=[Feature(group="item", **f) for f in features], tasks=tasks)
