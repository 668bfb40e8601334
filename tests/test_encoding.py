"""Columns become tensors: from the training split alone, or with an error that names the place."""

import decimal
import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from mtcl_torchrec.data.columns import split_bag
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.source import Rows, read_rows
from mtcl_torchrec.schema import DataError, Feature, Schema, Task

NAN = float("nan")


def rows(**columns):
    """A frame, with the label of `encoder`'s own task."""
    return Rows(pd.DataFrame({"_y": [0] * len(next(iter(columns.values())))} | columns))


def encoder(*features, tasks=None):
    return FeatureEncoder(Schema(features=features, tasks=tasks or [Task.binary("y", label="_y")]))


def unlabelled(fitted, data):
    return fitted.encode(data, with_labels=False)


def ids_of(feature, train, later=None):
    """Row numbers of one id feature, learnt on `train`."""
    fitted = encoder(feature).fit(rows(x=train))
    return unlabelled(fitted, rows(x=train if later is None else later)).ids[:, 0].tolist()


def bags_of(feature, train, later=None):
    fitted = encoder(feature).fit(rows(x=train))
    bag = unlabelled(fitted, rows(x=train if later is None else later)).bags["x"]
    ends = bag.offsets.tolist()
    return [bag.values[a:b].tolist() for a, b in itertools.pairwise(ends)]


def plain(**options):
    return Feature(name="x", group="item", **options)


def bag(**options):
    return Feature(name="x", group="item", kind="bag", **options)


def dense(**options):
    return Feature(name="x", group="item", kind="dense", **options)


def dense_of(feature, train, later=None):
    fitted = encoder(feature).fit(rows(x=train))
    return unlabelled(fitted, rows(x=train if later is None else later)).dense.numpy()


def labels_of(task, data, **more):
    feature = Feature(name="u", group="user")
    n = len(next(iter(data.values())))
    frame = Rows(pd.DataFrame(data | {"u": range(n)}), **more)
    return encoder(feature, tasks=[task]).fit(frame).encode(frame)


# ---------------------------------------------------------------- ids


def test_a_vocabulary_numbers_the_sorted_training_values_from_1_and_others_take_row_0():
    train, later = ["b", "a", "b", None], ["a", "c", None, "b"]
    assert ids_of(plain(), train) == [2, 1, 2, 0]
    assert ids_of(plain(), train, later) == [1, 0, 0, 2]
    fitted = encoder(plain()).fit(rows(x=train))
    assert fitted.num_embeddings("x") == 3
    unlabelled(fitted, rows(x=later))
    assert fitted.num_embeddings("x") == 3


@pytest.mark.parametrize(
    ("train", "later", "expected"),
    [
        ([12, 7], ["12", "7", "x", None], [2, 1, 0, 0]),
        (["12", "7"], [12, 7, 5], [1, 2, 0]),
        (["12", "7"], [12.0, NAN, 7.0], [1, 0, 2]),
        ([12.0, NAN, 7.0], [12, 7, 8], [2, 1, 0]),
        ([12, 7], pd.Categorical(["7", "12"]), [1, 2]),
        (pd.Categorical([12, 7]), [12, 7], [2, 1]),
        (pd.Categorical([12, None]), ["12", "7"], [1, 0]),
        (["12", "7"], pd.Categorical([7, None, 12]), [2, 0, 1]),
        ([2**60, 2**60 + 1], [str(2**60 + 1), None, str(2**60 + 2)], [2, 0, 0]),
        ([2**60, 2**60 + 1], pd.array([2**60 + 1, None], dtype="Int64"), [2, 0]),
        ([2**60, 2**60 + 1], pd.Series([2**60 + 1, None], dtype=object), [2, 0]),
        (np.array([200, 7], np.uint8), np.array([7, 200], np.int64), [1, 2]),
        ([True, False], [False, True], [1, 2]),
        (pd.Series([True, None, False], dtype=object), [True, False], [2, 1]),
        ([1.5, 2.0], [2.0, 1.5, 1.0], [2, 1, 0]),
        ([b"b", b"a"], [b"a", b"c"], [1, 0]),
        ([decimal.Decimal("1.5"), None], [1.5, decimal.Decimal("1.5")], [1, 1]),
        ([None, None], ["a", "b"], [0, 0]),
        ([NAN, NAN], [1, 2], [0, 0]),
        ([1, "a"], ["1", "a", 1], [1, 2, 1]),
        ([1.0, float("inf")], [1.0, 2.0], [1, 0]),
        (pd.to_datetime(["2024", "2025"]), pd.to_datetime(["2025", "2026"]), [2, 0]),
    ],
)
def test_values_are_found_whatever_kind_a_file_gives_them(train, later, expected, tmp_path):
    fitted = encoder(plain()).fit(rows(x=train))
    assert unlabelled(fitted, rows(x=later)).ids[:, 0].tolist() == expected
    fitted.save(tmp_path)
    again = FeatureEncoder.load(tmp_path)
    assert unlabelled(again, rows(x=later)).ids[:, 0].tolist() == expected
    assert again.num_embeddings("x") == fitted.num_embeddings("x")


def test_rare_values_take_row_0():
    assert ids_of(plain(min_count=2), ["a", "b", "a", "c", "c", "c"]) == [1, 0, 1, 2, 2, 2]
    assert ids_of(plain(min_count=9), ["a", "b"]) == [0, 0]


def test_features_of_one_table_share_its_vocabulary_and_its_counts():
    user = Feature(name="user", group="user", table="people", min_count=2)
    author = Feature(name="author", group="item", table="people", min_count=2)
    friends = Feature(name="friends", group="user", kind="bag", table="people", min_count=2)
    data = rows(user=[1, 2, 3], author=["2", "3", "4"], friends=["9", "9|5", ""])
    fitted = encoder(user, author, friends).fit(data)
    got = unlabelled(fitted, data)
    # Of the texts 1 2 2 3 3 4 5 9 9, each at least twice: 2, 3 and 9.
    assert fitted.keys == ("user", "author", "friends")
    assert fitted.num_embeddings("people") == 4
    assert got.ids.tolist() == [[0, 1], [1, 2], [2, 0]]
    assert got.bags["friends"].values.tolist() == [3, 3, 0]


def test_keys_stand_table_by_table():
    schema = [
        Feature(name="a", group="user", table="t"),
        Feature(name="b", group="user"),
        Feature(name="c", group="item", table="t"),
    ]
    data = rows(a=[1], b=[1], c=[2])
    got = unlabelled(encoder(*schema).fit(data), data)
    assert got.keys == ("a", "c", "b")
    assert got.ids.tolist() == [[1, 2, 1]]


def test_a_vocabulary_larger_than_its_table_is_refused():
    with pytest.raises(DataError, match=r"table 'x': the training split has 3 values.*holds 2"):
        ids_of(plain(vocabulary_size=3), [1, 2, 3])
    fitted = encoder(plain(vocabulary_size=10)).fit(rows(x=[1, 2, 3]))
    assert fitted.num_embeddings("x") == 10


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-(2**62), 2**62), min_size=1), size=st.integers(2, 50))
def test_hashes_are_in_range_and_the_same_for_a_number_and_its_text(values, size):
    feature = plain(encoding="hash", vocabulary_size=size)
    hashed = ids_of(feature, values)
    assert all(1 <= h < size for h in hashed)
    assert ids_of(feature, [str(v) for v in values]) == hashed
    assert [ids_of(feature, [v])[0] for v in values] == hashed


def test_hashes_are_stable_over_kinds_and_versions():
    feature = plain(encoding="hash", vocabulary_size=1000)
    # Written down: a trained table is read with these numbers again.
    assert ids_of(feature, ["5", "Rome", "", None]) == [172, 854, 494, 0]
    # A fraction elsewhere in the column changes nothing for 5.
    for five in ([5], [5.0, 2.5], [5.0, NAN], pd.array([5, None], "Int64"), np.array([5], np.uint8)):
        assert ids_of(feature, five)[0] == 172
    assert ids_of(feature, pd.Categorical([5, None])) == [172, 0]


@pytest.mark.parametrize("values", [[0, 4, 2], ["0", "4", "2"], [0.0, 4.0, 2.0], np.array([0, 4, 2], np.uint8)])
def test_indices_are_taken_as_they_are(values):
    assert ids_of(plain(encoding="index", vocabulary_size=5), values) == [0, 4, 2]


def test_a_missing_index_takes_row_0():
    assert ids_of(plain(encoding="index", vocabulary_size=5), [3.0, NAN]) == [3, 0]
    assert ids_of(plain(encoding="index", vocabulary_size=5), [None, None]) == [0, 0]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 7], "7"), ([1, -1], "-1"), ([1, 5], "5"), ([1.0, 2.5], "2.5"),
        (["1", "b"], "'b'"), ([1.0, float("inf")], "inf"),
    ],
)  # fmt: skip
def test_an_index_outside_its_table_names_file_row_and_column(values, shown):
    feature = plain(column="c", encoding="index", vocabulary_size=5)
    data = Rows(pd.DataFrame({"c": values, "_y": [0, 1]}), files=("a.csv", "b.csv"), starts=(0, 1))
    with pytest.raises(DataError) as caught:
        unlabelled(encoder(feature).fit(data), data)
    assert str(caught.value).startswith(f"b.csv, row 0: c = {shown} lies outside its table of 5 rows")


def test_an_index_inside_a_bag_names_the_row_that_owns_it():
    data = rows(x=[[1, 2], [], [3], [4, 9, 1]])
    with pytest.raises(DataError, match=r"^row 3: x = 9 lies outside"):
        unlabelled(encoder(bag(encoding="index", vocabulary_size=5)).fit(data), data)


def test_a_missing_column_is_named_when_learning_and_when_encoding():
    for feature in (plain(), bag(), dense(), plain(encoding="hash", vocabulary_size=5)):
        with pytest.raises(DataError, match=r"no column 'x'"):
            unlabelled(encoder(feature).fit(rows(x_=[1])), rows(x_=[1]))
    with pytest.raises(DataError, match=r"no column 'x' \(did you mean 'xx'\?\)"):
        encoder(plain()).fit(rows(xx=[1]))


# ---------------------------------------------------------------- bags


@pytest.mark.parametrize(
    "values",
    [
        ["a|b", "", None, "b", "c|a|a"],
        pd.Series(["a|b", "", None, "b", "c|a|a"], dtype=object),
        pd.Categorical(["a|b", "", None, "b", "c|a|a"]),
        ["a||b|", "|", None, "b", "c|a|a"],
        [["a", "b"], [], None, ["b"], ["c", "a", "a"]],
        [np.array(["a", "b"]), np.array([]), NAN, np.array(["b"]), ("c", "a", "a")],
    ],
)
def test_bags_come_from_texts_and_lists(values):
    assert bags_of(bag(), values) == [[1, 2], [], [], [2], [3, 1, 1]]
    assert bags_of(bag(), values, ["z|a", None]) == [[0, 1], []]


def members():
    """Values of a bag, of one kind or of several."""
    whole, number = st.integers(-(2**63), 2**63 - 1), st.integers(0, 9)
    kinds = (whole, st.integers(0, 2**64 - 1), st.text(max_size=2), whole | st.none(), st.floats(0, 9) | number)
    return st.one_of(*(st.lists(st.lists(kind, max_size=3), min_size=1, max_size=6) for kind in kinds))


@given(members(), st.sampled_from(["list", "tuple", "array", "int32", "object"]))
@settings(max_examples=150, deadline=None)
def test_columns_of_lists_alone_split_as_rows_that_are_taken_one_by_one(lists, form):
    def cell(values):
        if form == "int32" and all(isinstance(v, int) and abs(v) < 2**31 for v in values):
            return np.array(values, np.int32)
        made = {"list": list, "tuple": tuple, "object": lambda v: np.array(v, object)}
        return made.get(form, np.array)(values)

    column = pd.Series([cell(values) for values in lists], dtype=object)
    one_by_one = pd.Series([*column, None], dtype=object)  # a missing bag: each row is looked at by itself
    values, lengths = split_bag(bag(), column)
    expected, expected_lengths = split_bag(bag(), one_by_one)
    assert lengths.tolist() == expected_lengths.tolist()[:-1]
    pd.testing.assert_series_equal(values, expected)


@pytest.mark.parametrize(("separator", "text"), [(",", "a,b"), (".", "a.b"), ("||", "a||b"), ("a+", "1a+2")])
def test_a_separator_is_no_pattern(separator, text):
    assert bags_of(bag(separator=separator), [text, text]) == [[1, 2], [1, 2]]


@pytest.mark.parametrize("size", [None, 50])
def test_bags_of_one_number_each_are_not_lost(size, tmp_path):
    # Without a separator in any row a CSV column is read as numbers.
    options = {"encoding": "index", "vocabulary_size": size} if size else {}
    (tmp_path / "a.csv").write_text("x,_y\n12,1\n7,1\n,1\n")
    data = read_rows([str(tmp_path / "a.csv")])
    got = unlabelled(encoder(bag(**options)).fit(data), data).bags["x"]
    assert got.values.tolist() == ([12, 7] if size else [2, 1])
    assert got.offsets.tolist() == [0, 1, 2, 2]
    assert bags_of(bag(), ["7|12"], [12.0, NAN, 7.0]) == [[1], [], [2]]


def test_bags_of_a_parquet_list_column_with_missing_members(tmp_path):
    lists = pa.array([[1, 2], None, [], [None, 2**60 + 1], [2]])
    pq.write_table(pa.table({"x": lists, "_y": [0] * 5}), tmp_path / "a.parquet")
    data = read_rows([str(tmp_path / "a.parquet")])
    got = unlabelled(encoder(bag()).fit(data), data).bags["x"]
    assert got.offsets.tolist() == [0, 2, 2, 2, 4, 5]
    assert got.values.tolist() == [1, 2, 0, 3, 2]


@pytest.mark.parametrize("values", [[[], []], [None, None], ["", ""], [[], None]])
@pytest.mark.parametrize("encoding", ["vocabulary", "hash", "index"])
def test_a_column_of_empty_bags_only_is_fine(values, encoding):
    feature = bag(encoding=encoding, vocabulary_size=9)
    assert bags_of(feature, values) == [[], []]


@pytest.mark.parametrize("encoding", ["vocabulary", "hash", "index"])
def test_no_rows_encode_to_no_rows(encoding):
    options = {"encoding": encoding, "vocabulary_size": 9}
    schema = [
        Feature(name="i", group="user", **options),
        Feature(name="b", group="item", kind="bag", **options),
        Feature(name="d", group="item", kind="dense"),
    ]
    fitted = encoder(*schema).fit(rows(i=[1], b=["1|2"], d=[0.5]))
    got = fitted.encode(rows(i=[], b=[], d=[], _y=[]))
    assert (got.ids.shape, got.dense.shape, got.labels.shape) == ((0, 1), (0, 1), (0, 1))
    assert got.bags["b"].offsets.tolist() == [0]


# ---------------------------------------------------------------- dense


NUMBERS = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))


@settings(max_examples=60, deadline=None)
@given(
    train=st.lists(NUMBERS, min_size=2, max_size=30),
    later=st.lists(NUMBERS, min_size=1, max_size=9),
)
def test_standardising_equals_scikit_learn_on_the_training_split(train, later):
    scaler = StandardScaler().fit(np.array(train)[:, None])
    if min(train) != max(train) and scaler.var_[0] < 1e-6 * np.abs(train).max() ** 2:
        return  # nearly constant: both are right only up to rounding
    expected = scaler.transform(np.array(later)[:, None]).clip(-1e4, 1e4)
    got = dense_of(dense(clip=1e4), train, later)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_log_and_logit_come_before_standardising_and_clipping_after():
    values = np.array([0.0, 3.0, -7.0, 1000.0])
    logs = np.sign(values) * np.log(1 + np.abs(values))
    expected = (logs - logs.mean()) / logs.std()
    np.testing.assert_allclose(dense_of(dense(transform="log"), values)[:, 0], expected, rtol=1e-5)
    rates = np.array([0.1, 0.5, 0.9, 0.2])
    logits = np.log(rates / (1 - rates))
    expected = (logits - logits.mean()) / logits.std()
    got = dense_of(dense(transform="logit"), rates)[:, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.isfinite(dense_of(dense(transform="logit"), rates, [0.0, 1.0])).all()
    clipped = dense_of(dense(clip=1.5), [0.0, 2.0], [1.0, 2.0, 100.0, -100.0])[:, 0]
    assert clipped.tolist() == [0.0, 1.0, 1.5, -1.5]


def test_missing_values_are_marked_only_where_the_training_split_had_some():
    with_missing = encoder(dense()).fit(rows(x=[0.0, 2.0, NAN]))
    got = unlabelled(with_missing, rows(x=[2.0, None])).dense
    assert got.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert with_missing.dense_groups == (("item",), ("item",))
    unmarked = encoder(dense(mark_missing=False)).fit(rows(x=[0.0, 2.0, NAN]))
    assert unlabelled(unmarked, rows(x=[2.0, None])).dense.tolist() == [[1.0], [0.0]]
    assert unmarked.dense_groups == (("item",),)
    whole = encoder(dense()).fit(rows(x=[0.0, 2.0]))
    assert unlabelled(whole, rows(x=[2.0, None])).dense.tolist() == [[1.0], [0.0]]
    assert whole.dense_groups == (("item",),)


@pytest.mark.parametrize("constant", [0.0, 3.0, 0.1, -1e9 / 3])
@pytest.mark.parametrize("n", [1, 7, 1001])
def test_a_constant_column_becomes_0_and_not_its_rounding_error(constant, n):
    got = dense_of(dense(), np.full(n, constant))
    np.testing.assert_allclose(got, np.zeros((n, 1)), atol=1e-6)


def test_a_spread_that_underflows_is_none():
    assert dense_of(dense(), [0.0, 5e-324], [0.0, 2.0]).tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize(
    "values",
    [
        np.array([200, 0, 100], np.uint8),
        np.array([100, -100, 0], np.int8),
        [True, False, True],
        pd.array([True, None, False], dtype="boolean"),
        pd.Series([True, None, False], dtype=object),
        pd.array([1, None, 3], dtype="Int16"),
        [decimal.Decimal("1.5"), None, decimal.Decimal("2")],
        ["1.5", "2", None],
        pd.Categorical([1, 2, 1]),
        pd.Categorical(["1", "2", "1"]),
    ],
)
def test_numbers_of_every_kind_are_standardised(values):
    numbers = np.array([NAN if pd.isna(v) else float(v) for v in pd.Series(values)])
    expected = np.nan_to_num((numbers - np.nanmean(numbers)) / np.nanstd(numbers))
    np.testing.assert_allclose(dense_of(dense(), values)[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "values", "part"),
    [
        ({}, [1.0, float("inf")], "row 1: x = inf; a dense value is finite"),
        ({}, ["1", "many"], "row 1: x = 'many' is no number (dense feature 'x')"),
        ({}, [[1], [2]], "row 0: x = [1] is no number"),
        ({}, pd.to_datetime(["2024", None]), "column 'x' holds times, no numbers"),
        ({}, [None, None], "dense column 'x' holds no value at all"),
        ({"transform": "logit"}, [0.5, 1.5], "row 1: x = 1.5; transform 'logit' takes rates"),
    ],
)
def test_dense_columns_that_do_not_fit_are_refused(options, values, part):
    with pytest.raises(DataError) as caught:
        dense_of(dense(**options), values)
    assert part in str(caught.value)


# ---------------------------------------------------------------- labels


def test_labels_are_float32_with_nan_where_missing_and_none_when_scoring():
    got = labels_of(Task.binary("y"), {"y": [1, None, 0]})
    assert got.labels.dtype == torch.float32
    np.testing.assert_array_equal(got.labels.numpy(), [[1.0], [NAN], [0.0]])
    assert got.weights is None
    fitted = encoder(plain(), tasks=[Task.binary("y"), Task.binary("z")]).fit(rows(x=[1], y=[1], z=[0]))
    assert fitted.encode(rows(x=[1, 2]), with_labels=False).labels.isnan().all()
    with pytest.raises(DataError, match="no column 'y'"):
        fitted.encode(rows(x=[1, 2]))


@pytest.mark.parametrize("values", [[True, False], pd.array([1, 0], "Int8"), ["1", "0"]])
def test_labels_of_every_kind_are_read(values):
    assert labels_of(Task.binary("y"), {"y": values}).labels.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("task", "values", "part"),
    [
        (Task.binary("y"), [0, 1, 2], "y = 2; a label of binary task 'y' is 0 or 1"),
        (Task.binary("y"), [0, 1, 0.5], "y = 0.5; a label of binary task 'y' is 0 or 1"),
        (Task.binary("y"), [0, 1, -1], "y = -1;"),
        # Rounded to float32, these would be 0 and infinite.
        (Task.binary("y"), [0, 1, 1e-60], "y = 1e-60;"),
        (Task.regression("y"), [0, 1, 1e39], "y = 1e+39; a regression label is finite"),
        (Task.multiclass("y", 3), [0, 2, 3], "y = 3; a label of multiclass task 'y' is an integer"),
        (Task.multiclass("y", 3), [0, 2, 1.5], "from 0 to 2"),
        (Task.multiclass("y", 3), [0, 2, -1], "y = -1;"),
        (Task.regression("y"), [0, 1, float("inf")], "y = inf; a regression label is finite"),
        (Task.binary("y"), ["0", "1", "yes"], "y = 'yes' is no number (label of task 'y')"),
    ],
)
def test_labels_that_do_not_fit_name_file_row_and_column(task, values, part):
    with pytest.raises(DataError) as caught:
        labels_of(task, {"y": values}, files=("a.csv", "b.csv"), starts=(0, 1))
    assert str(caught.value).startswith("b.csv, row 1: ")
    assert part in str(caught.value)


def test_a_mask_takes_labels_away_wherever_it_is_not_true():
    data = {"y": [1, 0, 1, 1, None], "m": [1.0, 0.0, NAN, 2.0, 1.0]}
    got = labels_of(Task.binary("y", mask="m"), data).labels.numpy()
    np.testing.assert_array_equal(got, [[1.0], [NAN], [NAN], [1.0], [NAN]])


def test_a_masked_label_counts_nowhere():
    # -1 marks "not watched"; it is neither refused nor part of the mean.
    data = {"s": [-1, 3, 5], "y": [-1, 0, 1], "m": [False, True, True]}
    task = Task.regression("s", mask="m")
    fitted = encoder(Feature(name="y", group="user"), tasks=[task]).fit(rows(**data))
    assert [(t.mean, t.std) for t in fitted.resolved_tasks()] == [(4.0, 1.0)]
    got = labels_of(Task.binary("y", mask="m"), data).labels.numpy()
    np.testing.assert_array_equal(got, [[NAN], [0.0], [1.0]])


def test_sample_weights_are_read_and_others_are_1():
    tasks = [Task.binary("a"), Task.binary("b", sample_weight="w")]
    data = rows(x=[1, 2], a=[0, 1], b=[1, 0], w=[0.0, 2.5])
    got = encoder(plain(), tasks=tasks).fit(data).encode(data)
    assert got.weights.tolist() == [[1.0, 0.0], [1.0, 2.5]]
    assert got.weights.dtype == torch.float32


@pytest.mark.parametrize("weight", [-0.5, NAN, float("inf"), 1e39])
def test_sample_weights_that_are_no_weights_are_refused(weight):
    with pytest.raises(DataError, match=r"row 1: w = .*; a sample weight is a number of at least 0"):
        labels_of(Task.binary("y", sample_weight="w"), {"y": [0, 1], "w": [1.0, weight]})


def test_regression_tasks_take_mean_and_spread_of_the_training_labels():
    data = rows(x=[1, 2, 3], y=[2.0, 4.0, NAN], k=[0, 1, 0])
    tasks = [
        Task.regression("y"),
        Task.regression("z", label="y", mean=1.0),
        Task.regression("w", label="y", std=9.0),
        Task.binary("k"),
    ]
    fitted = encoder(plain(), tasks=tasks).fit(data)
    resolved = fitted.resolved_tasks()
    assert [(t.mean, t.std) for t in resolved] == [(3.0, 1.0), (1.0, 1.0), (3.0, 9.0), (None, None)]
    # The labels themselves keep their unit.
    np.testing.assert_array_equal(fitted.encode(data).labels[:, 0].numpy(), [2.0, 4.0, NAN])
    constant = encoder(plain(), tasks=[Task.regression("y")]).fit(rows(x=[1] * 3, y=[0.1] * 3))
    assert constant.resolved_tasks()[0].std == 1.0
    with pytest.raises(DataError, match="label column 'y' holds no value at all"):
        encoder(plain(), tasks=[Task.regression("y")]).fit(rows(x=[1], y=[None]))


@pytest.mark.parametrize(
    ("task", "data", "part"),
    [
        (Task.binary("y"), {"y": [NAN, NAN]}, "label column 'y' holds no value at all"),
        (Task.multiclass("y", 3), {"y": [None, None]}, "label column 'y' holds no value at all"),
        (
            Task.binary("y", mask="m"),
            {"y": [1, 0, NAN], "m": [0, 0, 1]},
            "label column 'y' holds no value where 'm' is",
        ),
    ],
)
def test_a_label_column_without_a_value_is_refused_before_training(task, data, part):
    with pytest.raises(DataError, match=part):
        labels_of(task, data)


# ---------------------------------------------------------------- stored


def test_what_is_saved_and_loaded_encodes_alike(tmp_path):
    schema = [
        Feature(name="user", group="user"),
        Feature(name="city", group="user", min_count=2),
        Feature(name="tags", group="item", kind="bag", encoding="hash", vocabulary_size=40),
        Feature(name="age", group="user", kind="dense", transform="log", clip=2.0),
        Feature(name="price", group="item", kind="dense"),
    ]
    tasks = [Task.binary("click"), Task.regression("watch"), Task.multiclass("c", 3, weight=2.0)]
    draw = np.random.default_rng(0)
    n = 40
    frame = pd.DataFrame(
        {
            "user": draw.integers(0, 9, n),
            "city": draw.choice(["Rome", "Oslo", "Bern"], n),
            "tags": draw.choice(["a|b", "c", ""], n),
            "age": draw.exponential(30, n),
            "price": np.where(draw.random(n) < 0.3, NAN, draw.random(n)),
            "click": draw.integers(0, 2, n),
            "watch": draw.exponential(9, n),
            "c": draw.integers(0, 3, n),
        }
    )
    fitted = encoder(*schema, tasks=tasks).fit(Rows(frame[:30]))
    fitted.save(tmp_path / "e")
    loaded = FeatureEncoder.load(tmp_path / "e")
    assert loaded.schema == fitted.schema
    assert loaded.keys == fitted.keys
    assert loaded.dense_groups == fitted.dense_groups
    assert loaded.resolved_tasks() == fitted.resolved_tasks()
    assert [loaded.num_embeddings(k) for k in loaded.keys] == [fitted.num_embeddings(k) for k in fitted.keys]
    one, other = fitted.encode(Rows(frame)), loaded.encode(Rows(frame))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.dense, other.dense)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.bags["tags"].values, other.bags["tags"].values)
    assert torch.equal(one.bags["tags"].offsets, other.bags["tags"].offsets)


# ---------------------------------------------------------------- labels that are an item's class


def class_schema(encoding="vocabulary", **task):
    size = {"vocabulary_size": 4} if encoding == "index" else {}
    return Schema(
        features=[Feature(name="genre", group="item", encoding=encoding, **size), Feature(name="user", group="user")],
        tasks=[Task(name="taste", kind="multiclass", item_class="genre", **task)],
    )


def test_labels_of_an_items_class_are_the_rows_of_its_table():
    train = pd.DataFrame({"genre": ["b", "a", "c"], "user": [1, 2, 3], "next": ["a", "c", "b"], "shown": [1, 1, 0]})
    encoder = FeatureEncoder(class_schema(label="next", mask="shown")).fit(Rows(train))
    later = train.assign(next=["c", "unheard of", "b"])
    labels = encoder.encode(Rows(later)).labels.flatten().tolist()
    assert labels[0] == 3  # a, b, c are rows 1, 2, 3 of the genre table
    assert np.isnan(labels[1])
    assert np.isnan(labels[2])
    assert encoder.resolved_tasks()[0].num_classes == 4


def test_row_0_of_ready_rows_is_no_label():
    frame = pd.DataFrame({"genre": [0, 2, 3], "user": [1, 2, 3]})
    labels = FeatureEncoder(class_schema("index", label="genre")).fit(Rows(frame)).encode(Rows(frame)).labels
    assert np.isnan(labels[0, 0])
    assert labels[1:, 0].tolist() == [2, 3]


def test_too_few_classes_for_the_table_are_refused_with_the_row():
    frame = pd.DataFrame({"genre": [1, 2, 3], "user": [1, 2, 3]})
    encoder = FeatureEncoder(class_schema("index", label="genre", num_classes=3)).fit(Rows(frame))
    with pytest.raises(DataError, match="row 2: genre = 3; its row lies outside the 3 classes of task 'taste'"):
        encoder.encode(Rows(frame))
