"""Files become one frame, errors name the file, and time cuts the log in order."""

import decimal
import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.config import DataConfig
from mtcl_torchrec.data.source import (
    Rows,
    column_names,
    find_files,
    read_rows,
    read_splits,
    split_by_time,
    time_values,
)
from mtcl_torchrec.schema import DataError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def error_of(*args):
    with pytest.raises(DataError) as caught:
        read_rows(*args)
    return str(caught.value)


def test_csv_and_parquet_give_the_same_frame(tmp_path):
    frame = pd.DataFrame(
        {
            "id": pd.array([1, None, 2**60 + 1], dtype="Int64"),
            "plain": [1, 2, 3],
            "x": [0.5, None, 2.0],
            "city": ["Rome", None, "Oslo"],
            "yes": pd.array([True, None, False], dtype="boolean"),
            "when": pd.to_datetime(["2024-01-01 10:00", "2024-01-02 11:30", None]).astype("datetime64[s]"),
        }
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet", coerce_timestamps=None)
    csv = read_rows([str(tmp_path / "a.csv")]).frame
    columnar = read_rows([str(tmp_path / "a.parquet")]).frame
    pd.testing.assert_frame_equal(csv.astype({"when": "datetime64[ns]"}), columnar.astype({"when": "datetime64[ns]"}))
    # Through a float, 2**60 + 1 would become 2**60.
    assert csv["id"].tolist() == [1, pd.NA, 2**60 + 1]
    assert csv["city"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("type_", "dtype"),
    [
        (pa.int8(), "Int8"), (pa.int32(), "Int32"), (pa.uint8(), "UInt8"),
        (pa.uint64(), "UInt64"), (pa.bool_(), "boolean"),
    ],
)  # fmt: skip
def test_kinds_with_missing_values_stay_what_they_are(tmp_path, type_, dtype):
    values = pa.array([1, None, 0]).cast(type_)
    column = read_rows([parquet(tmp_path / "a.parquet", a=values, b=values.drop_null().take([0] * 3))])
    assert str(column.frame["a"].dtype) == dtype
    assert column.frame["a"].isna().tolist() == [False, True, False]
    assert column.frame["b"].dtype == type_.to_pandas_dtype()


def test_dictionaries_and_decimals_become_plain_values(tmp_path):
    path = parquet(
        tmp_path / "a.parquet",
        city=pa.array(["b", None, "a"]).dictionary_encode(),
        number=pa.array([7, None, 5]).dictionary_encode(),
        price=pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("3")]),
    )
    frame = read_rows([path]).frame
    assert isinstance(frame["city"].dtype, pd.StringDtype)
    assert frame["city"].tolist()[::2] == ["b", "a"]
    assert frame["number"].tolist() == [7, pd.NA, 5]
    assert frame["price"].dtype == np.float64
    assert frame["price"].tolist()[::2] == [1.25, 3.0]


def test_an_index_stored_by_pandas_is_a_column_and_rows_are_counted_from_0(tmp_path):
    frame = pd.DataFrame({"user": [5, 9, 7, 8], "x": [0, 1, 2, 3]})
    frame.iloc[2:].to_parquet(tmp_path / "tail.parquet")  # RangeIndex from 2
    rows = read_rows([str(tmp_path / "tail.parquet")])
    assert rows.frame.index.tolist() == [0, 1]
    assert rows.locate(1).endswith("tail.parquet, row 1")
    frame.set_index("user").to_parquet(tmp_path / "user.parquet")
    assert read_rows([str(tmp_path / "user.parquet")], ["user"]).frame["user"].tolist() == [5, 9, 7, 8]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_not_asked_for_are_absent_and_order_and_repeats_do_not_matter(tmp_path, ending):
    frame = pd.DataFrame({"a": [1, 2], "b": [3, 4], "c": [5, 6]})
    path = tmp_path / f"x.{ending}"
    frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    assert column_names(path) == ["a", "b", "c"]
    read = read_rows([str(path)], ["c", "a", "c"]).frame
    assert sorted(read.columns) == ["a", "c"]
    assert read["c"].tolist() == [5, 6]


def test_an_unread_column_is_not_decoded(tmp_path):
    # Column b is no text at all; decoding it fails, reading column a does not.
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,\xff\n2,\xfe\n")
    assert read_rows([str(path)], ["a"]).frame["a"].tolist() == [1, 2]
    said = error_of([str(path)])
    assert "x.csv, row 0: column 'b' is no UTF-8 text" in said
    assert "iconv -f cp1252 -t utf-8 x.csv > utf8_x.csv" in said
    path.write_bytes(b"a,b\n1,plain\n2,\xfe\n")
    assert "x.csv, row 1: column 'b' is no UTF-8 text" in error_of([str(path)])
    path.write_bytes(b"a,stra\xdfe\n1,2\n")
    assert "iconv -f cp1252" in error_of([str(path)])


@pytest.mark.parametrize(("between", "text"), [(";", "a;b\n1;2\n"), ("\t", "a\tb\n1\t2\n")])
def test_another_separator_is_recognised(tmp_path, between, text):
    said = error_of([write(tmp_path / "x.csv", text)], ["a", "b"])
    assert said.endswith(f"columns have commas between, not {between!r}")
    assert "no column 'a'; it has one column only" in said


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_missing_column_is_named_with_the_nearest_one(tmp_path, ending):
    path = write(tmp_path / "x.csv", "user_id,is_click\n1,0\n")
    if ending == "parquet":
        path = parquet(tmp_path / "x.parquet", user_id=[1], is_click=[0])
    assert error_of([path], ["user_id", "is_clik"]) == (f"{path}: no column 'is_clik' (did you mean 'is_click'?)")


@pytest.mark.parametrize("columns", [None, ["a"]])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, ending, columns):
    path = write(tmp_path / "x.csv", "a,a,b\n1,2,3\n")
    if ending == "parquet":
        path = str(tmp_path / "x.parquet")
        pq.write_table(pa.table([[1], [2], [3]], names=["a", "a", "b"]), path)
    assert error_of([path], columns) == f"{path}: 2 columns are named 'a'"
    assert read_rows([path], ["b"]).frame["b"].tolist() == [3]


def test_broken_and_empty_files_are_data_errors_that_hide_the_readers_traceback(tmp_path):
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read") as caught:
        read_rows([str(broken)])
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    whole = parquet(tmp_path / "cut.parquet", a=list(range(5000)))
    data = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + bytes(len(data) // 2) + data[len(data) // 2 + 4 :])
    assert error_of([whole], ["a"]).startswith(f"{whole}: cannot be read")
    assert "cannot be read" in error_of([write(tmp_path / "e.csv", "")])
    assert "cannot be read" in error_of([write(tmp_path / "r.csv", "a,b\n1\n1,2,3\n")])
    assert error_of([write(tmp_path / "h.csv", "a,b\n")]).endswith("h.csv: no rows")
    (tmp_path / "n.csv").write_bytes(b"\xff,b\n1,2\n")
    assert "cannot be read" in error_of([str(tmp_path / "n.csv")], ["b"])
    assert "no rows" in error_of([parquet(tmp_path / "z.parquet", a=pa.array([], pa.int64()))])


def test_missing_files_and_other_kinds_are_refused(tmp_path):
    assert error_of([str(tmp_path / "none.csv")]) == f"no Parquet or CSV file at {tmp_path}/none.csv"
    assert "no Parquet or CSV file" in error_of([str(tmp_path / "part-*.csv")])
    (tmp_path / "empty").mkdir()
    assert "no Parquet or CSV file" in error_of([str(tmp_path / "empty")])
    text = write(tmp_path / "x.txt", "a\n1\n")
    assert error_of([text]) == f"{text}: expected a file that ends in .parquet or .csv"


def test_folders_and_patterns_give_sorted_files_and_skip_other_ones(tmp_path):
    for name in ("d/b.csv", "d/a.csv", "d/sub.parquet/c.CSV", "d/_SUCCESS", "d/readme.txt"):
        write(tmp_path / name, "a\n1\n")
    names = [p.name for p in find_files([str(tmp_path / "d")])]
    assert names == ["a.csv", "b.csv", "c.CSV"]
    assert [p.name for p in find_files([str(tmp_path / "d" / "?.csv")])] == ["a.csv", "b.csv"]
    both = find_files([str(tmp_path / "d" / "b.csv"), str(tmp_path / "d" / "a.csv")])
    assert [p.name for p in both] == ["b.csv", "a.csv"]
    assert len(read_rows([str(tmp_path / "d")])) == 3


def test_rows_keep_their_file_through_taking(tmp_path):
    first = write(tmp_path / "a.csv", "x\n1\n2\n3\n")
    second = parquet(tmp_path / "b.parquet", x=[4])
    third = write(tmp_path / "c.csv", "x\n5\n6\n")
    rows = read_rows([first, second, third])
    assert rows.frame["x"].tolist() == [1, 2, 3, 4, 5, 6]
    places = [rows.locate(i) for i in range(6)]
    assert places == [
        f"{first}, row 0", f"{first}, row 1", f"{first}, row 2",
        f"{second}, row 0", f"{third}, row 0", f"{third}, row 1",
    ]  # fmt: skip
    odd = rows.take(rows.frame["x"].to_numpy() % 2 == 0)
    assert [odd.locate(i) for i in range(3)] == [places[1], places[3], places[5]]
    assert rows.name == f"{first}, {second}, {third}"


def test_an_empty_file_among_others_is_no_place_of_a_row(tmp_path):
    paths = [write(tmp_path / f"{i}.csv", text) for i, text in enumerate(["x\n", "x\n7\n", "x\n"])]
    rows = read_rows(paths)
    assert rows.frame["x"].tolist() == [7]
    assert rows.locate(0) == f"{paths[1]}, row 0"


def test_a_frame_without_files_is_located_by_its_index():
    assert Rows(pd.DataFrame({"a": [1, 2]}, index=["x", "y"])).locate(1) == "row y"
    assert Rows(pd.DataFrame({"a": [1]})).name == "the data frame"


def test_files_whose_columns_differ_in_kind_are_joined_without_loss(tmp_path):
    # "12" in the first file and 12 in the second are one id; ints stay ints beside an empty column.
    first = write(tmp_path / "a.csv", "id,n,m\nu12,,1\n12,,2\n")
    second = write(tmp_path / "b.csv", "id,n,m\n12,5,\n7,6,3\n")
    frame = read_rows([first, second]).frame
    assert frame["id"].tolist() == ["u12", "12", "12", "7"]
    assert frame["n"].tolist() == [pd.NA, pd.NA, 5, 6]
    assert frame["m"].tolist() == [1, 2, pd.NA, 3]
    lists = parquet(tmp_path / "c.parquet", id=["a"], n=[[1]], m=[1])
    assert "columns differ in kind" in error_of([second, lists])


# ---------------------------------------------------------------- time


@settings(max_examples=60, deadline=None)
@given(
    more=st.lists(st.integers(-100, 100), max_size=8),
    val=st.floats(0.06, 0.45),
    test=st.sampled_from([0.0, 0.1, 0.3, 0.45]),
)
def test_split_keeps_every_row_once_in_order_of_time_and_ties_together(more, val, test):
    times = [*more, *range(-100, 101)]  # fewer ties than any part has rows: none is left empty
    parts = split_by_time(Rows(pd.DataFrame({"t": times})), "t", val, test)
    assert list(parts) == (["train", "val", "test"] if test else ["train", "val"])
    index = np.concatenate([p.frame.index for p in parts.values()])
    assert sorted(index) == list(range(len(times)))
    moments = [p.frame["t"] for p in parts.values()]
    for earlier, later in itertools.pairwise(moments):
        assert earlier.max() < later.min()


def test_split_takes_the_fractions_and_keeps_the_rows_order():
    times = np.random.default_rng(0).permutation(1000)
    parts = split_by_time(Rows(pd.DataFrame({"t": times})), "t", 0.2, 0.1)
    assert {k: len(v) for k, v in parts.items()} == {"train": 700, "val": 200, "test": 100}
    assert parts["train"].frame.index.is_monotonic_increasing
    assert parts["test"].frame["t"].min() == 900


def test_rows_of_one_moment_go_to_the_later_part_together():
    parts = split_by_time(Rows(pd.DataFrame({"t": [0, 0, 1, 1, 1, 1, 2, 2]})), "t", 0.5, 0.25)
    assert [sorted(set(p.frame["t"])) for p in parts.values()] == [[0], [1], [2]]


@pytest.mark.parametrize("times", [[5], [5, 5, 5, 5], [1, 1, 1, 1, 1, 1, 1, 2]])
def test_too_few_distinct_times_are_refused(times):
    with pytest.raises(DataError, match=r"leaves no row for (train|val).*too few distinct times"):
        split_by_time(Rows(pd.DataFrame({"t": times})), "t", 0.3, 0.3)


@pytest.mark.parametrize(
    "values",
    [
        pd.to_datetime(["2024-01-01", "2024-01-02"]),
        pd.to_datetime(["2024-01-01", "2024-01-02"]).tz_localize("UTC"),
        pd.to_datetime(["2024-01-01 02:00", "2024-01-02 02:00"]).tz_localize("Europe/Helsinki"),
        ["2024-01-01", "2024-01-02"],
        [pd.Timestamp("2024-01-01").date(), pd.Timestamp("2024-01-02").date()],
    ],
)
def test_timestamps_of_every_kind_are_nanoseconds(values):
    times = time_values(pd.DataFrame({"t": values}), "t")
    assert times.dtype == np.int64
    assert times.tolist() == [1704067200 * 10**9, (1704067200 + 86400) * 10**9]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([1, 2], np.uint8), np.int64),
        (pd.array([1, 2], dtype="Int32"), np.int64),
        (np.array([0.5, 2], np.float32), np.float64),
    ],
)
def test_numeric_times_keep_their_values(values, dtype):
    times = time_values(pd.DataFrame({"t": values}), "t")
    assert times.dtype == dtype
    assert times.tolist() == [float(v) for v in values]


def test_times_in_a_csv_are_read_and_split(tmp_path):
    days = pd.date_range("2024-03-01", periods=10).strftime("%Y-%m-%d %H:%M:%S")
    path = write(tmp_path / "log.csv", "t,x\n" + "".join(f"{d},{i}\n" for i, d in enumerate(days)))
    parts = split_by_time(read_rows([path]), "t", 0.2, 0.2)
    assert [p.frame["x"].tolist() for p in parts.values()] == [list(range(6)), [6, 7], [8, 9]]


@pytest.mark.filterwarnings("ignore:Could not infer format")
def test_a_missing_time_names_file_and_row_and_no_time_is_refused(tmp_path):
    paths = [write(tmp_path / "a.csv", "t\n1\n2\n"), write(tmp_path / "b.csv", "t,x\n3,0\n,0\n")]
    with pytest.raises(DataError, match=r"b\.csv, row 1: time 't' is missing"):
        split_by_time(read_rows(paths, ["t"]), "t", 0.2, 0.2)
    with pytest.raises(DataError, match=r"time column 't' holds neither numbers nor timestamps.*row 0 has 'soon'"):
        time_values(pd.DataFrame({"t": ["soon", "later"]}), "t")


def test_read_splits_reads_named_files_or_splits_the_log(tmp_path):
    one = write(tmp_path / "1.csv", "t,x,y\n1,1,1\n2,2,2\n3,3,3\n4,4,4\n5,5,5\n")
    two = write(tmp_path / "2.csv", "t,x\n9,9\n")
    named = read_splits(DataConfig(train=one, val=two), ["x"], None)
    assert {k: v.frame.to_dict("list") for k, v in named.items()} == {
        "train": {"x": [1, 2, 3, 4, 5]},
        "val": {"x": [9]},
    }
    log = read_splits(DataConfig(log=one, val_fraction=0.2, test_fraction=0.2), ["t", "x"], "t")
    assert {k: v.frame["x"].tolist() for k, v in log.items()} == {
        "train": [1, 2, 3], "val": [4], "test": [5],
    }  # fmt: skip
