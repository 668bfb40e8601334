"""History features: what the schema refuses, and lists of a column as rows of tables."""

import numpy as np
import pandas as pd
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.jagged import Bag
from mtcl_torchrec.data.list_histories import log_buckets
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.schema import DataError, Feature, Schema, Task

ITEM = {"name": "item", "group": "item", "embedding_dim": 8}
CLICKED = {"name": "clicked", "group": "user", "kind": "history", "of": "item", "max_length": 3}
KIND = {"name": "kinds", "group": "user", "kind": "history", "beside": "clicked", "embedding_dim": 4}
AGE = {**KIND, "name": "ages", "encoding": "log_bucket"}


def schema_of(*features):
    return Schema(features=[Feature(**f) for f in features], tasks=[Task.binary("click")])


def message_of(*features):
    with pytest.raises(pydantic.ValidationError) as caught:
        schema_of(*features)
    return str(caught.value)


# ---------------------------------------------------------------------- the schema


def test_a_history_takes_table_and_length_from_another_feature_and_still_says_what_it_said():
    item = {**ITEM, "table": "things", "min_count": 2, "encoding": "hash", "vocabulary_size": 99, "data_type": "fp16"}
    schema = schema_of(item, CLICKED, KIND, AGE)
    _, clicked, kinds, ages = schema.features
    assert (clicked.table_name, clicked.vocabulary_size, clicked.encoding, clicked.embedding_dim) == (
        "things", 99, "hash", 8,
    )  # fmt: skip
    assert (clicked.min_count, clicked.data_type) == (2, "fp16")
    assert (kinds.max_length, ages.max_length, ages.vocabulary_size) == (3, 3, 34)
    assert {t: [f.name for f in of] for t, of in schema.sequence_tables().items()} == {
        "things": ["item", "clicked"], "kinds": ["kinds"], "ages": ["ages"],
    }  # fmt: skip
    assert [f.name for f in schema.companions("clicked")] == ["kinds", "ages"]
    said = schema.model_dump(mode="json", exclude_unset=True)
    assert said["features"][1] == {**CLICKED, "group": ["user"]}
    assert Schema.model_validate(said) == schema


def test_every_id_feature_of_the_table_is_looked_up_there_too():
    last = {"name": "last", "group": "user", "table": "item", "embedding_dim": 8, "pooling": "sum"}
    schema = schema_of(ITEM, last, CLICKED, {"name": "city", "group": "user"})
    assert [f.name for f in schema.sequence_tables()["item"]] == ["item", "last", "clicked"]
    assert set(schema.sequence_tables()) < set(schema.tables())
    assert schema_of(ITEM).sequence_tables() == {}


@pytest.mark.parametrize(
    ("features", "part"),
    [
        ([ITEM, {**CLICKED, "of": "itm"}], "'clicked': of: no id feature 'itm' (did you mean 'item'?)"),
        ([{**ITEM, "kind": "bag"}, CLICKED], "of: no id feature 'item'; it is a bag"),
        ([{"name": "item", "group": "item", "kind": "dense"}, CLICKED], "of: no id feature 'item'; it is a dense"),
        ([ITEM, CLICKED, {**CLICKED, "name": "b", "of": "clicked"}], "of: no id feature 'clicked'; it is a history"),
        ([ITEM, {"name": "h", "group": "user", "kind": "history"}], "either 'of', the id feature"),
        ([ITEM, CLICKED, {**KIND, "of": "item"}], "either 'of', the id feature"),
        ([ITEM, {**CLICKED, "embedding_dim": 4}], "a history of 'item' shares its table and has no embedding_dim"),
        ([ITEM, {**CLICKED, "table": "t"}], "has no table"),
        ([ITEM, {**CLICKED, "pooling": "sum"}], "a history has no pooling"),
        ([ITEM, {**CLICKED, "transform": "log"}], "is no dense feature"),
        ([ITEM, {**CLICKED, "max_length": 0}], "greater than 0"),
        ([ITEM, CLICKED, {**KIND, "max_length": 3}], "max_length is that of 'clicked'"),
        ([ITEM, CLICKED, {**KIND, "beside": "clickd"}], "no history of an id feature 'clickd' (did you mean"),
        ([ITEM, CLICKED, KIND, {**AGE, "beside": "kinds"}], "beside: no history of an id feature 'kinds'"),
        ([ITEM, CLICKED, {**KIND, "group": "item"}], "'kinds': group is that of 'clicked'"),
        ([ITEM, CLICKED, {**AGE, "min_count": 2}], "encoding 'log_bucket' has no min_count"),
        ([{**ITEM, "encoding": "log_bucket"}], "'item': encoding 'log_bucket' belongs to the ages beside a history"),
        ([{**ITEM, "of": "item"}], "'item': of belongs to kind: history"),
        ([{**ITEM, "max_length": 5}], "'item': max_length belongs to kind: history"),
        ([{"name": "d", "group": "user", "kind": "dense", "beside": "item"}], "beside belongs to kind: history"),
        (
            [ITEM, CLICKED, {"name": "friends", "group": "user", "kind": "bag", "table": "item", "embedding_dim": 8}],
            "feature 'friends' is a bag and shares table 'item' with history 'clicked'",
        ),
        ([ITEM, CLICKED, {"name": "b", "group": "user", "table": "item"}], "must agree on embedding_dim"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(features, part):
    assert part in message_of(*features)


def test_classes_of_a_task_are_no_history():
    with pytest.raises(pydantic.ValidationError, match=r"item_class 'clicked' is no id feature"):
        Schema(
            features=[Feature(**ITEM), Feature(**CLICKED)],
            tasks=[{"name": "next", "kind": "multiclass", "item_class": "clicked"}],
        )


# ---------------------------------------------------------------------- columns of lists


def rows(**columns):
    return Rows(pd.DataFrame(columns), files=("log.parquet",), starts=(0,))


def encoded(data, *features, later=None):
    encoder = FeatureEncoder(schema_of(*features)).fit(data)
    return encoder.encode(data if later is None else later, with_labels=False)


def lists_of(bag):
    values, lengths = bag.all()
    return [part.tolist() for part in values.split(lengths.tolist())]


TRAIN = {"item": ["a", "b", "c"], "click": [0, 1, 0]}


def test_a_history_is_looked_up_in_its_features_vocabulary_and_cut_to_the_newest():
    data = rows(**TRAIN, clicked=[["a", "b", "c", "a"], [], ["c", "new", None]], kinds=[[1, 2, 1, 2], [], [2, 2, 1]],
                ages=[[900.0, 7.0, 1.5, 0.0], [], [3.0, np.nan, None]])  # fmt: skip
    got = encoded(data, ITEM, CLICKED, KIND, AGE)
    assert got.keys == ("item", "clicked", "kinds", "ages")
    assert got.ids.tolist() == [[1], [2], [3]]
    assert lists_of(got.bags["clicked"]) == [[2, 3, 1], [], [3, 0, 0]]  # unknown and missing: row 0, still an event
    assert lists_of(got.bags["kinds"]) == [[2, 1, 2], [], [2, 2, 1]]
    assert lists_of(got.bags["ages"]) == [[4, 2, 1], [], [3, 0, 0]]
    assert got.batch().sparse_features["clicked"].lengths().tolist() == [3, 0, 3]


def test_values_of_a_history_alone_do_not_enter_the_vocabulary_of_the_table():
    data = rows(item=["a", "b"], click=[0, 1], clicked=[["z", "a"], ["z"]])
    encoder = FeatureEncoder(schema_of(ITEM, CLICKED)).fit(data)
    assert encoder.num_embeddings("item") == 3
    assert lists_of(encoder.encode(data).bags["clicked"]) == [[0, 1], [0]]


def test_a_missing_list_is_empty_and_text_is_split():
    data = rows(**TRAIN, clicked=["a|b", None, "c"], kinds=["x|y", None, "y"])
    got = encoded(data, ITEM, CLICKED, KIND)
    assert lists_of(got.bags["clicked"]) == [[1, 2], [], [3]]
    assert lists_of(got.bags["kinds"]) == [[1, 2], [], [2]]


def test_arrays_as_parquet_gives_them(tmp_path):
    frame = pd.DataFrame({"item": [1, 2], "click": [0, 1], "clicked": [[1, 2], None]})
    frame.to_parquet(tmp_path / "a.parquet")
    got = encoded(Rows(pd.read_parquet(tmp_path / "a.parquet")), ITEM, CLICKED)
    assert lists_of(got.bags["clicked"]) == [[1, 2], []]


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"clicked": [["a"], ["b"], []], "kinds": [[1], [1, 2], []]},
         "log.parquet, row 1: kinds holds 2 values beside 1 of 'clicked'"),
        ({"clicked": [["a"], [], []], "kinds": [None, [], []]}, "row 0: kinds holds 0 values beside 1"),
        ({"clicked": [["a"], [], []]}, "no column 'kinds'"),
    ],
)  # fmt: skip
def test_a_companion_of_another_length_is_refused_with_file_and_row(columns, part):
    with pytest.raises(DataError, match=part):
        encoded(rows(**TRAIN, **columns), ITEM, CLICKED, KIND)


@pytest.mark.parametrize("age", [-1.0, np.inf, "soon"])
def test_an_age_from_the_future_or_no_number_is_refused(age):
    data = rows(**TRAIN, clicked=[[], ["a", "b"], []], ages=[[], [1, age], []])
    with pytest.raises(DataError, match=r"log.parquet, row 1: ages = .*an age is the seconds"):
        encoded(data, ITEM, CLICKED, AGE)


def test_an_index_beyond_the_table_names_its_row():
    data = rows(**TRAIN, clicked=[[], ["a", "b"], []], kinds=[[], [1, 7], []])
    with pytest.raises(DataError, match=r"log.parquet, row 1: kinds = 7 lies outside its table of 3 rows"):
        encoded(data, ITEM, CLICKED, {**KIND, "encoding": "index", "vocabulary_size": 3})


@given(st.lists(st.one_of(st.integers(0, 2**40), st.floats(0, 1e13), st.just(float("nan"))), min_size=1))
def test_log_buckets_are_floors_of_logarithms_of_whole_seconds(ages):
    found = log_buckets(np.array(ages, dtype=np.float64), 34)
    whole = [None if np.isnan(age) else int(np.floor(age)) for age in ages]
    assert found.tolist() == [0 if s is None else min((s + 1).bit_length(), 33) for s in whole]


def test_rows_with_histories_are_sliced_joined_and_batched_like_bags():
    values, lengths = torch.arange(6), torch.tensor([2, 0, 3, 1])
    bag = Bag.of(values, lengths)
    data = EncodedRows(torch.empty(4, 0), ("h",), torch.empty(4, 0, dtype=torch.int64), torch.zeros(4, 1), {"h": bag})
    again = EncodedRows.cat([data.slice(0, 1), data.slice(1, 4)])
    assert lists_of(again.bags["h"]) == lists_of(bag)
    assert data.batch(torch.tensor([2, 1])).sparse_features.values().tolist() == [2, 3, 4]
