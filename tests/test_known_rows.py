"""Rows that were trained on, among others: whatever types two files have for one value."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtcl_torchrec.training.known_rows import _hashes

CELLS = st.one_of(st.integers(-3, 3), st.sampled_from([2**53, 2**53 + 1, 10**15]))
AS = {
    "int64": lambda values: pd.Series(values, dtype="int64"),
    "Int64": lambda values: pd.Series(values, dtype="Int64"),
    "float64": lambda values: pd.Series(values, dtype="float64"),
    "text": lambda values: pd.Series([str(value) for value in values], dtype=object),
}


@given(st.lists(CELLS, min_size=1, max_size=6), st.lists(CELLS, min_size=1, max_size=6), st.data())
def test_rows_are_the_same_where_all_values_are(mine, theirs, data):
    kinds = [data.draw(st.sampled_from([*AS])) for _ in range(2)]
    if "float64" in kinds:  # which cannot tell these apart
        mine, theirs = ([v for v in values if v < 2**53] or [0] for values in (mine, theirs))
    one, other = (pd.DataFrame({"a": AS[kind](v), "b": 1}) for kind, v in zip(kinds, (mine, theirs), strict=True))
    found = np.isin(*_hashes(one, other, ["a", "b"]))
    assert found.tolist() == [value in theirs for value in mine]


@pytest.mark.parametrize("other", [[np.nan, 0.0, 2.0], [None, "0", "2"]], ids=["numbers", "text"])
def test_missing_values_and_signed_zeros_are_alike(other):
    one, two = pd.DataFrame({"a": [np.nan, -0.0, 1.0]}), pd.DataFrame({"a": other})
    assert np.isin(*_hashes(one, two, ["a"])).tolist() == [True, True, False]
