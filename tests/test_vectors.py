"""Files of vectors and codes, and the numbers of a code's prefixes."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.data.prefixes import Prefixes
from mtcl_torchrec.data.vectors import read_codes, read_vectors, write_codes, write_vectors
from mtcl_torchrec.schema import DataError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.parquet"


# ---------------------------------------------------------------------- vectors


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("keys", [[3, 1, 2**60], ["b", "a", "7"]])
def test_vectors_come_back_as_they_were(path, kind, keys):
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(kind)
    write_vectors(path, pd.Series(keys), vectors, key="product", about={"encoder": "x"})
    read = read_vectors(path)
    assert (read.key, read.keys.tolist(), read.about, read.width) == ("product", keys, {"encoder": "x"}, 5)
    assert read.vectors.dtype == kind
    assert np.array_equal(read.vectors, vectors)
    assert [p.name for p in path.parent.iterdir()] == ["file.parquet"]


def test_many_row_groups_come_back_in_order(path):
    vectors = np.arange(200_000, dtype=np.float32)[:, None]
    write_vectors(path, pd.Series(range(200_000)), vectors, key="k")
    read = read_vectors(path, "k")
    assert np.array_equal(read.vectors, vectors)
    assert np.array_equal(read.keys, np.arange(200_000))


def test_a_file_of_another_tool_is_read(path):
    """pandas writes lists of float64 of no fixed size, and further columns."""
    frame = pd.DataFrame({"title": ["x", "y"], "id": pd.Categorical(["a", "b"]), "vector": [[1.0, 2.0], [3.0, 4.0]]})
    frame.to_parquet(path)
    read = read_vectors(path, "id")
    assert read.vectors.dtype == np.float32
    assert read.vectors.tolist() == [[1, 2], [3, 4]]
    assert read.keys.tolist() == ["a", "b"]
    with pytest.raises(DataError, match=r"which of the columns \['title', 'id'\] is the key"):
        read_vectors(path)
    with pytest.raises(DataError, match=r"no column 'idd' \(did you mean 'id'\?\)"):
        read_vectors(path, "idd")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"k": [1, 2, 1], "vector": [[1.0]] * 3}, "row 2: k = '1' is there already, in .*row 0"),
        ({"k": ["a", None], "vector": [[1.0]] * 2}, "row 1: key 'k' is missing"),
        ({"k": [2.0, 1.5], "vector": [[1.0]] * 2}, "row 1: k = '1.5' is a decimal number; keys are integers or text"),
        ({"k": [1, 2], "codes": [[1]] * 2}, "no column 'vector', but codes: they go under codes: of a semantic_id"),
        ({"k": [True, False], "vector": [[1.0]] * 2}, "integers or text"),
        ({"k": [1, 2], "vector": [[1.0], None]}, r"row 1 \(key '2'\): vector is missing"),
        ({"k": [1, 2], "vector": [[1.0], []]}, r"row 1 \(key '2'\): vector is missing"),
        ({"k": [1, 2], "vector": [[1.0, 2.0], [1.0]]}, r"row 1 \(key '2'\): vector has 1 values, the first row 2"),
        ({"k": [1, 2], "vector": [[1.0, None], [1.0, 1.0]]}, r"row 0 \(key '1'\): vector has a missing value"),
        ({"k": [1, 2], "vector": [[1.0], [float("inf")]]}, r"row 1 \(k = '2'\): vector is not finite"),
        ({"k": [1, 2], "vector": [[1.0], [1e300]]}, r"row 1 \(k = '2'\): vector is not finite"),
        ({"k": [1, 2], "vector": [["a"], ["b"]]}, "holds lists of string, not of numbers"),
        ({"k": [1, 2], "vector": [1.0, 2.0]}, "holds double, no lists of one length"),
        ({"k": [1, 2], "vektor": [[1.0], [2.0]]}, r"no column 'vector' \(did you mean 'vektor'\?\)"),
        ({"k": pa.array([], pa.int64()), "vector": pa.array([], pa.list_(pa.float32(), 2))}, "no rows"),
    ],
)
def test_wrong_vectors_are_refused_by_row_and_key(path, columns, said):
    pa.parquet.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=said) as error, np.errstate(over="ignore"):
        read_vectors(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_whole_numbers_that_pandas_made_decimal_are_integers(path):
    pd.DataFrame({"k": [7.0, 9.0], "vector": [[1.0], [2.0]]}).to_parquet(path)
    assert read_vectors(path).keys.tolist() == [7, 9]
    assert str(read_vectors(path).keys.dtype) == "int64"


def test_vectors_where_codes_are_wanted(path):
    pd.DataFrame({"k": [7, 9], "vector": [[1.0], [2.0]]}).to_parquet(path)
    with pytest.raises(DataError, match="no column 'codes', but vectors: they go under vectors: of a vector feature"):
        read_codes(path)


def test_what_is_no_parquet_is_refused(path):
    path.write_bytes(b"item_id,title\n1,hello\n")
    with pytest.raises(DataError, match=r"cannot be read.*no Parquet file of vectors, such as `mtcl embed` writes"):
        read_vectors(path)
    with pytest.raises(
        DataError, match=r"cannot be read.*no Parquet file of codes, such as `mtcl semantic-ids` writes"
    ):
        read_codes(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_codes(path.with_name("absent.parquet"))


def test_nothing_is_left_of_a_file_that_could_not_be_written(path):
    with pytest.raises(DataError, match=r"row 1 .*not finite"):
        write_vectors(path, pd.Series([1, 2]), np.float32([[1], [np.nan]]), key="k")
    with pytest.raises(DataError, match="float32 or float16"):
        write_vectors(path, pd.Series([1]), np.ones((1, 1)), key="k")
    with pytest.raises(DataError, match="2 keys need vectors"):
        write_vectors(path, pd.Series([1, 2]), np.ones((1, 1), np.float32), key="k")
    assert list(path.parent.iterdir()) == []


# ---------------------------------------------------------------------- codes


def test_codes_come_back_with_their_sizes(path):
    write_codes(path, pd.Series(["a", "b"]), np.array([[0, 3], [1, 2]]), (2, 9), key="k", about={"codebook": "c"})
    read = read_codes(path)
    assert (read.codes.tolist(), read.sizes, read.about) == ([[0, 3], [1, 2]], (2, 9), {"codebook": "c"})


def test_codes_without_sizes_have_those_they_need(path):
    pa.parquet.write_table(pa.table({"k": [1, 2], "codes": [[0, 3], [1, 2]]}), path)
    assert read_codes(path).sizes == (2, 4)


def test_wrong_codes_are_refused(path):
    with pytest.raises(DataError, match=r"row 1 \(k = '9'\): codes \[0, 4\] are outside"):
        write_codes(path, pd.Series([8, 9]), np.array([[0, 3], [0, 4]]), (2, 4), key="k")
    for codes, said in (([[0, -1]], "outside"), ([[0.5]], "not of integers"), ([[0], [1, 1]], "has 2 values")):
        pa.parquet.write_table(pa.table({"k": range(len(codes)), "codes": codes}), path)
        with pytest.raises(DataError, match=said):
            read_codes(path)
    kind = pa.schema({"k": pa.int64(), "codes": pa.list_(pa.int32(), 1)}, metadata={"mtcl_torchrec": '{"sizes": [0]}'})
    pa.parquet.write_table(pa.table({"k": [1], "codes": [[0]]}, schema=kind), path)
    with pytest.raises(DataError, match="positive sizes"):
        read_codes(path)


# ---------------------------------------------------------------------- prefixes


def by_hand(catalogue, codes):
    """Number of each prefix by a dictionary: levels first, then codes; 0 from where one is not in the catalogue."""
    rows = sorted({tuple(c[:n]) for c in catalogue.tolist() for n in range(1, len(c) + 1) if -1 not in c[:n]},
                  key=lambda p: (len(p), p))  # fmt: skip
    known = {p: i + 1 for i, p in enumerate(rows)}
    return [[known.get(tuple(c[: n + 1]), 0) for n in range(len(c))] for c in codes.tolist()], len(known)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_prefixes_are_those_of_a_dictionary(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    one = st.tuples(*(st.integers(0, s - 1) for s in sizes))
    catalogue = np.array(data.draw(st.lists(one, min_size=1, max_size=12)))
    asked = np.array([*catalogue.tolist(), *data.draw(st.lists(st.tuples(*(st.integers(-1, s) for s in sizes))))])
    prefixes = Prefixes.of(catalogue, sizes)
    numbers, count = by_hand(catalogue, asked)
    assert prefixes.numbers(asked).tolist() == numbers
    assert len(prefixes) == count
    flat, lengths = prefixes.jagged(asked)
    assert flat.tolist() == [n for row in numbers for n in row if n]
    assert lengths.tolist() == [sum(n > 0 for n in row) for row in numbers]
    for row, codes in zip(prefixes.numbers(catalogue).tolist(), catalogue.tolist(), strict=True):
        assert [prefixes.codes_of(n) for n in row] == [tuple(codes[: i + 1]) for i in range(len(codes))]


def test_a_grown_dictionary_keeps_its_numbers():
    old, new = np.array([[0, 1], [2, 0]]), np.array([[0, 0], [1, 1], [0, 1]])
    prefixes = Prefixes.of(old, (3, 2))
    grown = prefixes.grown(new)
    assert np.array_equal(grown.numbers(old), prefixes.numbers(old))
    assert prefixes.numbers(new)[:2].tolist() == [[1, 0], [0, 0]]
    assert sorted(set(grown.numbers(new).ravel()) | set(grown.numbers(old).ravel())) == list(range(1, len(grown) + 1))
    assert np.array_equal(Prefixes(grown.sizes, grown.keys).numbers(new), grown.numbers(new))


def test_a_code_may_end_early():
    prefixes = Prefixes.of(np.array([[1, -1], [0, 1]]), (2, 2))
    assert len(prefixes) == 3
    assert prefixes.numbers(np.array([[1, 0], [0, 1]])).tolist() == [[2, 0], [1, 3]]


def test_wrong_codes_have_no_dictionary():
    with pytest.raises(DataError, match="level 2 has 2 codes"):
        Prefixes.of(np.array([[0, 0], [0, 2]]), (2, 2))
    with pytest.raises(DataError, match="-1 ends a code"):
        Prefixes.of(np.array([[-1, 1]]), (2, 2))
    with pytest.raises(DataError, match=r"\(N, 2\)"):
        Prefixes.of(np.array([[0, 0, 0]]), (2, 2))
    with pytest.raises(DataError, match=r"\(N, 2\)"):
        Prefixes.of(np.array([[0.0, 0.0]]), (2, 2))
