"""Causal statistics against a loop over all pairs of rows, and what must never leak into them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.data.statistics import CausalStatistics, earlier_sums
from mtcl_torchrec.schema import DataError

NAN = float("nan")


def same(value, key):
    """Whether a key occurs again; a missing one never does."""
    return all(not pd.isna(a) and a == b for a, b in zip(value, key, strict=True))


def reference(keys, outcomes, smoothing, train, rows=None):
    """Every column by looking at all pairs of rows; `rows` see the whole training split."""
    seen = [r for _, r in train.iterrows()]
    table = []
    for _, row in (train if rows is None else rows).iterrows():
        earlier = [r for r in seen if rows is not None or r["t"] < row["t"]]
        out = []
        for key in keys:
            mine = [r for r in earlier if same([r[c] for c in key], [row[c] for c in key])]
            out.append(float(len(mine)))
            for o in outcomes:
                known = [r[o] for r in earlier if not pd.isna(r[o])]
                own = [r[o] for r in mine if not pd.isna(r[o])]
                prior = sum(known) / len(known) if known else NAN
                out.append((sum(own) + smoothing * prior) / (len(own) + smoothing))
        table.append(out)
    return np.array(table, dtype=float)


USERS = st.sampled_from(["ann", "bob", "eve", None])
TAGS = st.sampled_from([1, 2, 3])


def logs(min_size=1, max_size=14):
    row = st.fixed_dictionaries(
        {
            "user": USERS,
            "tag": TAGS,
            "t": st.integers(0, 5),  # few moments, so many ties
            "click": st.sampled_from([0.0, 1.0, NAN]),
            "watch": st.sampled_from([0.1, 7.3, 1e6, NAN]),
        }
    )
    return st.lists(row, min_size=min_size, max_size=max_size).map(pd.DataFrame)


KEYS = [["user"], ["tag"], ["user", "tag"]]


def made(keys=KEYS, outcomes=("click", "watch"), smoothing=2.5):
    return CausalStatistics(keys, list(outcomes), time="t", smoothing=smoothing)


def log(n=60, seed=0):
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user": draw.choice(["ann", "bob", "eve"], n),
            "tag": draw.integers(0, 4, n),
            "t": draw.integers(0, 20, n),
            "click": draw.integers(0, 2, n).astype(float),
            "watch": draw.exponential(9.0, n),
        }
    )


@settings(max_examples=80, deadline=None)
@given(train=logs(), later=logs())
def test_columns_equal_a_loop_over_all_pairs_of_rows(train, later):
    statistics = made()
    got = statistics.fit_transform(train)
    expected = reference(KEYS, ["click", "watch"], 2.5, train)
    np.testing.assert_allclose(got.to_numpy(), expected, rtol=1e-9)
    frozen = reference(KEYS, ["click", "watch"], 2.5, train, later)
    np.testing.assert_allclose(statistics.transform(later).to_numpy(), frozen, rtol=1e-9)


def test_names_follow_the_keys_and_the_index_is_the_frames():
    train = log().iloc[::-2]
    got = made([["user"], ["user", "tag"]], ["click"]).fit_transform(train)
    assert list(got.columns) == [
        "count(user)", "rate(click|user)", "count(user,tag)", "rate(click|user,tag)",
    ]  # fmt: skip
    assert got.index.equals(train.index)
    assert (got.dtypes == np.float64).all()


@settings(max_examples=60, deadline=None)
@given(train=logs(min_size=2), data=st.data())
def test_a_label_reaches_no_row_of_its_own_or_an_earlier_time(train, data):
    at = data.draw(st.integers(0, len(train) - 1))
    value = data.draw(st.sampled_from([0.0, 1.0, 12345.678, -3.0, NAN]))
    changed = train.copy()
    changed.loc[at, ["click", "watch"]] = value
    before, after = made().fit_transform(train), made().fit_transform(changed)
    hidden = (train["t"] <= train["t"][at]).to_numpy()
    # To the last bit: a rounding error that depends on the label would be a leak as well.
    pd.testing.assert_frame_equal(before[hidden], after[hidden], check_exact=True)


def test_a_label_reaches_the_later_rows_of_its_key_and_through_the_prior_all_later_rows():
    train = pd.DataFrame({"user": ["a", "b", "a", "b"], "t": [0, 0, 1, 1], "click": [0.0, 0, 0, 0]})
    changed = train.assign(click=[1.0, 0, 0, 0])
    before = made([["user"]], ["click"]).fit_transform(train)["rate(click|user)"]
    after = made([["user"]], ["click"]).fit_transform(changed)["rate(click|user)"]
    assert np.isnan(before[:2]).all()
    assert np.isnan(after[:2]).all()
    assert before[2:].tolist() == [0.0, 0.0]
    # Prior 1/2: (1 + 2.5 / 2) / (1 + 2.5) for a, (0 + 2.5 / 2) / (1 + 2.5) for b.
    assert after[2:].tolist() == pytest.approx([2.25 / 3.5, 1.25 / 3.5])


def test_sums_of_one_group_do_not_depend_on_the_size_of_values_in_another():
    values = np.array([1e18, 0.1, 0.1, 0.1])[:, None]
    sums = earlier_sums(np.array([0, 1, 1, 1]), np.array([0, 1, 2, 3]), values)
    assert sums.ravel().tolist() == [0.0, 0.0, 0.1, 0.2]


def test_sums_of_no_rows_have_no_rows():
    empty = earlier_sums(np.empty(0, np.int64), np.empty(0), np.empty((0, 2)))
    assert empty.shape == (0, 2)
    got = made().fit_transform(log().iloc[:0])
    assert got.shape == (0, 9)


@pytest.mark.parametrize("smoothing", [0.5, 20.0])
def test_a_rate_is_smoothed_towards_the_rate_of_all_earlier_rows(smoothing):
    train = pd.DataFrame({"user": list("aabbb"), "t": [0, 1, 2, 3, 4], "click": [1.0, 1.0, 0.0, NAN, 0.0]})
    rate = made([["user"]], ["click"], smoothing).fit_transform(train)["rate(click|user)"]
    # Before time 4: of a 2 of 2, of b 0 of 1 (the missing outcome counts nowhere).
    assert rate[4] == pytest.approx((0 + smoothing * 2 / 3) / (1 + smoothing))
    assert rate[2] == pytest.approx(1.0)
    assert np.isnan(rate[0])


def test_a_missing_outcome_still_counts_as_a_row_but_in_no_rate():
    train = pd.DataFrame({"user": ["a"] * 3, "t": [0, 1, 2], "click": [NAN, 1.0, 0.0]})
    got = made([["user"]], ["click"]).fit_transform(train)
    assert got["count(user)"].tolist() == [0.0, 1.0, 2.0]
    assert np.isnan(got["rate(click|user)"][:2]).all()
    assert got["rate(click|user)"][2] == 1.0


def test_later_rows_get_the_totals_of_the_whole_training_split_and_change_nothing():
    train, later = log(seed=1), log(seed=2)
    statistics = made()
    statistics.fit_transform(train)
    first = statistics.transform(later)
    for users in (later, later.assign(user="bob", click=1.0), later.iloc[:3]):
        statistics.transform(users)
    pd.testing.assert_frame_equal(statistics.transform(later), first)
    totals = train.groupby("user").size()
    assert first["count(user)"].tolist() == totals[later["user"]].tolist()
    # Outcome and time columns of later rows are not even looked at.
    pd.testing.assert_frame_equal(statistics.transform(later[["user", "tag"]]), first)


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        (["a", "b"], "z"),
        (["a", "b"], None),
        ([1, 2], 9),
        (pd.array([1, 2], dtype="Int64"), 9),
        (pd.Categorical(["a", "b"]), "z"),
        ([True, False], None),
        ([1.5, 2.5], NAN),
        (pd.to_datetime(["2024-01-01", "2024-01-02"]), pd.Timestamp("2020-01-01")),
    ],
)
def test_keys_of_every_kind_are_found_and_others_get_count_0_and_the_prior(known, unknown):
    train = pd.DataFrame({"k": known, "t": [0, 1], "click": [1, 0]})
    statistics = made([["k"]], ["click"], smoothing=1.0)
    statistics.fit_transform(train)
    got = statistics.transform(train[["k"]])
    assert got["count(k)"].tolist() == [1.0, 1.0]
    assert got["rate(click|k)"].tolist() == [0.75, 0.25]
    other = statistics.transform(pd.DataFrame({"k": [unknown]}))
    assert other.to_numpy().tolist() == [[0.0, 0.5]]


def test_integer_keys_are_found_beside_missing_ones():
    train = pd.DataFrame({"k": [2**60, 2**60 + 1, 7], "t": [0, 1, 2], "click": [1, 0, 0]})
    statistics = made([["k"]], ["click"])
    statistics.fit_transform(train)
    later = pd.DataFrame({"k": pd.array([7, None, 2**60 + 1, 2**60 + 2], dtype="Int64")})
    assert statistics.transform(later)["count(k)"].tolist() == [1.0, 0.0, 1.0, 0.0]
    floats = statistics.transform(pd.DataFrame({"k": [7.0, None]}))
    assert floats["count(k)"].tolist() == [1.0, 0.0]


def test_a_pair_with_one_missing_or_unknown_part_is_unknown():
    train = pd.DataFrame({"a": ["x", "x", "y"], "b": [1, 2, 1], "t": [0, 1, 2]})
    statistics = made([["a", "b"]], [])
    statistics.fit_transform(train)
    later = pd.DataFrame({"a": ["x", "y", "x", None, "z"], "b": [2.0, 2.0, NAN, 1.0, 1.0]})
    assert statistics.transform(later)["count(a,b)"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_key_that_is_always_missing_counts_nothing():
    train = pd.DataFrame({"k": [None, None], "t": [0, 1], "click": [1, 0]})
    statistics = made([["k"]], ["click"])
    assert statistics.fit_transform(train)["count(k)"].tolist() == [0.0, 0.0]
    assert statistics.transform(train).to_numpy().tolist() == [[0.0, 0.5], [0.0, 0.5]]


@pytest.mark.parametrize(
    "click",
    [
        np.array([1, 0, 1], np.int8),
        np.array([1, 0, 1], np.uint8),
        [True, False, True],
        pd.array([True, False, True], dtype="boolean"),
        pd.array([1, 0, 1], dtype="Int8"),
    ],
)
def test_outcomes_of_small_kinds_are_summed_without_overflow(click):
    n = 300
    train = pd.DataFrame({"k": ["a"] * 3 * n, "t": range(3 * n)})
    train["click"] = pd.concat([pd.Series(click)] * n, ignore_index=True)
    statistics = made([["k"]], ["click"], smoothing=1.0)
    statistics.fit_transform(train)
    assert statistics.transform(train.iloc[:1]).to_numpy()[0].tolist() == pytest.approx([900.0, 2 / 3])


def test_outcomes_with_missing_booleans_or_nothing_at_all_are_accepted():
    train = pd.DataFrame({"k": ["a"] * 3, "t": [0, 1, 2], "yes": [True, None, False], "none": [None] * 3})
    got = made([["k"]], ["yes", "none"], smoothing=1.0).fit_transform(train)
    assert got["rate(yes|k)"][1:].tolist() == [1.0, 1.0]
    assert got["rate(none|k)"].isna().all()


@pytest.mark.parametrize("outcome", [["a", "b"], ["1", "0"], pd.to_datetime(["2024", "2025"])])
def test_outcomes_that_are_no_numbers_are_refused(outcome):
    train = pd.DataFrame({"k": [1, 1], "t": [0, 1], "o": outcome})
    with pytest.raises(DataError, match=r"statistics\.outcomes: column 'o' is not numeric"):
        made([["k"]], ["o"]).fit_transform(train)


def test_infinite_outcomes_missing_times_and_unusable_keys_are_refused():
    train = pd.DataFrame({"k": [1, 1], "t": [0.0, NAN], "o": [1.0, float("inf")]})
    with pytest.raises(DataError, match="column 'o' holds an infinite value"):
        made([["k"]], ["o"]).fit_transform(train)
    with pytest.raises(DataError, match="row 1: time 't' is missing"):
        made([["k"]], []).fit_transform(train)
    for mixed in ([[1], [2]], [1, "a"]):
        with pytest.raises(DataError, match="column 'k' must hold one kind of single values"):
            made([["k"]], []).fit_transform(pd.DataFrame({"k": mixed, "t": [0, 1]}))
    # 70000⁴ combinations have no 64-bit number each.
    wide = pd.DataFrame({c: range(70_000) for c in "abcdt"})
    with pytest.raises(DataError, match="a × b × c × d has too many combinations"):
        made([list("abcd")], []).fit_transform(wide)


def test_times_may_be_timestamps_or_texts():
    train = log()
    expected = made().fit_transform(train)
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta(train["t"], unit="h")
    pd.testing.assert_frame_equal(made().fit_transform(train.assign(t=stamps)), expected)
    texts = stamps.dt.tz_localize("UTC").astype(str)
    pd.testing.assert_frame_equal(made().fit_transform(train.assign(t=texts)), expected)


def test_transform_before_fit_is_refused_and_progress_names_each_key():
    with pytest.raises(RuntimeError, match="fit_transform the training split first"):
        made().transform(log())
    done = []
    made().fit_transform(log(), progress=done.append)
    assert done == ["user", "tag", "user × tag"]


@pytest.mark.parametrize(
    "train",
    [
        log(),
        log().astype({"user": "category", "tag": "Int64"}),
        log().assign(user=lambda f: f["user"].where(f["t"] > 5)),
        log().assign(user=None),
        log().assign(click=NAN),
    ],
)
def test_what_is_saved_and_loaded_transforms_alike(train, tmp_path):
    statistics = made()
    statistics.fit_transform(train)
    statistics.save(tmp_path / "s")
    loaded = CausalStatistics.load(tmp_path / "s")
    later = log(seed=5).assign(tag=lambda f: f["tag"] + 2)
    pd.testing.assert_frame_equal(loaded.transform(later), statistics.transform(later))
    groups = {"user": "user", "tag": "item"}
    assert loaded.features(groups) == statistics.features(groups)
    assert (loaded.columns(), loaded.time) == (statistics.columns(), "t")


def test_a_key_may_be_called_like_a_column_of_totals(tmp_path):
    train = log().rename(columns={"user": "count", "tag": "sum:click"})
    statistics = made([["count"], ["count", "sum:click"]], ["click"])
    statistics.fit_transform(train)
    statistics.save(tmp_path)
    loaded = CausalStatistics.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.transform(train), statistics.transform(train))


def test_features_of_a_pair_belong_to_both_groups_and_quantities_are_logs():
    statistics = made([["user"], ["user", "tag"], ["tag", "shop"]], ["click", "watch"])
    statistics.fit_transform(log().assign(shop=1))
    features = statistics.features({"user": "user", "tag": "item", "shop": "item"})
    assert [f.name for f in features] == statistics.columns()
    assert [f.group for f in features[::3]] == [("user",), ("user", "item"), ("item",)]
    assert [f.transform for f in features[:3]] == ["log", "logit", "log"]
    assert {f.kind for f in features} == {"dense"}


# ---------------------------------------------------------------- the latest rows only; beyond what others explain


@settings(max_examples=60, deadline=None)
@given(train=logs(), later=logs(), last=st.integers(1, 4))
def test_the_latest_rows_of_a_key_equal_a_loop(train, later, last):
    statistics = CausalStatistics([["user"]], ["click"], time="t", smoothing=2.0, last=last)
    got, frozen = statistics.fit_transform(train), statistics.transform(later)
    clicks = train["click"]

    def expected(user, before, prior_rows):
        prior = clicks[prior_rows].mean()
        mine = train[before & (train["user"] == user)].sort_values("t", kind="stable").tail(last)
        known = mine["click"].dropna()
        return len(mine), (known.sum() + 2.0 * prior) / (len(known) + 2.0)

    for i, row in train.iterrows():
        before = train["t"] < row["t"]
        count, rate = expected(row["user"], before, before)
        assert got.loc[i].tolist() == pytest.approx([count, rate], nan_ok=True)
    everything = pd.Series(True, index=train.index)
    for i, row in later.iterrows():
        count, rate = expected(row["user"], everything, everything)
        assert frozen.loc[i].tolist() == pytest.approx([count, rate], nan_ok=True)


def test_rates_beyond_given_columns_equal_their_formula_row_by_row():
    train = log(80)
    smoothing, given_smoothing = 3.0, 4.0
    statistics = CausalStatistics(
        [["user"]], ["click", "watch"], time="t", smoothing=smoothing, given=["tag"], given_smoothing=given_smoothing
    )
    got = statistics.fit_transform(train)

    def logit(p):
        p = np.clip(p, 1e-4, 1 - 1e-4)
        return np.log(p / (1 - p))

    residual = pd.DataFrame(index=train.index, columns=["click", "watch"], dtype=float)
    for i, row in train.iterrows():
        before = train[train["t"] < row["t"]]
        of_tag = before[before["tag"] == row["tag"]]
        for o in ("click", "watch"):
            prior = before[o].mean()
            rate = (of_tag[o].sum() + given_smoothing * prior) / (len(of_tag) + given_smoothing)
            predicted = 1 / (1 + np.exp(-logit(rate))) if o == "click" else rate
            residual.loc[i, o] = row[o] - predicted
    for i, row in train.iterrows():
        before = train["t"] < row["t"]
        mine = before & (train["user"] == row["user"])
        for o in ("click", "watch"):
            known = residual.loc[mine, o].dropna()
            prior = residual.loc[before, o].mean()
            expected = (known.sum() + smoothing * prior) / (len(known) + smoothing)
            assert got.loc[i, f"rate({o}|user;given tag)"] == pytest.approx(expected, nan_ok=True)


def test_rates_beyond_given_columns_find_the_user_who_clicks_more_than_the_items_explain():
    draw = np.random.default_rng(0)
    n = 4000
    user, item = draw.integers(0, 2, n), draw.integers(0, 2, n)
    # User 1 is shown the good item far more often, but both users click alike on each item.
    item = np.where(draw.random(n) < 0.9, user, item)
    train = pd.DataFrame({"user": user, "item": item, "t": np.arange(n)})
    train["click"] = (draw.random(n) < np.where(item == 1, 0.8, 0.2)).astype(float)
    ask = pd.DataFrame({"user": [0, 1]})
    plain = CausalStatistics([["user"]], ["click"], time="t")
    plain.fit_transform(train)
    beyond = CausalStatistics([["user"]], ["click"], time="t", given=["item"], counts=False)
    beyond.fit_transform(train)
    low, high = plain.transform(ask)["rate(click|user)"]
    assert high - low > 0.4
    low, high = beyond.transform(ask)["rate(click|user;given item)"]
    assert abs(high - low) < 0.05


@settings(max_examples=40, deadline=None)
@given(train=logs(min_size=2), data=st.data())
def test_no_label_leaks_through_given_columns_or_windows(train, data):
    at = data.draw(st.integers(0, len(train) - 1))
    changed = train.copy()
    changed.loc[at, ["click", "watch"]] = data.draw(st.sampled_from([0.0, 1.0, NAN]))
    hidden = (train["t"] <= train["t"][at]).to_numpy()
    for options in ({"given": ["tag"]}, {"given": ["tag", "user"]}, {"last": 2}):
        made_with = [CausalStatistics([["user"]], ["click"], time="t", **options) for _ in range(2)]
        before, after = made_with[0].fit_transform(train), made_with[1].fit_transform(changed)
        pd.testing.assert_frame_equal(before[hidden], after[hidden], check_exact=True)


def test_every_option_survives_saving(tmp_path):
    train, later = log(), log(20, seed=1)
    options = {"given": ["tag"], "given_smoothing": 2.0, "smoothing_of": {"click": 7.0}, "last": 3, "label": "x"}
    statistics = CausalStatistics([["user"], ["user", "tag"]], ["click"], time="t", counts=False, **options)
    statistics.fit_transform(train)
    statistics.save(tmp_path)
    again = CausalStatistics.load(tmp_path)
    assert again.columns() == statistics.columns() == [
        "rate(click|user;given tag;last 3;x)", "rate(click|user,tag;given tag;last 3;x)",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(again.transform(later), statistics.transform(later))
    groups = {"user": "user", "tag": "item"}
    assert again.features(groups) == statistics.features(groups)
    assert [f.group for f in again.features(groups)] == [("user",), ("user", "item")]
