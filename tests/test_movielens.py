"""MovieLens from a folder: a tiny made-up one here, the real one where MTCL_MOVIELENS names it; and splits of it."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.data import movielens
from mtcl_torchrec.data.cold_split import cold_split, item_segments
from mtcl_torchrec.schema import DataError

MOVIES = "1::Amélie (2001)::Comedy|Romance\n2::Nowhere::\n7::1984 (1956)::Sci-Fi\n"
USERS = "1::F::25::3::12345\n2::M::56::16::70072-1\n"
RATINGS = "1::7::5::300\n2::1::2::100\n1::1::4::100\n1::2::3::300\n2::7::1::400\n"


def made_up(folder, *, movies=MOVIES, users=USERS, ratings=RATINGS, encoding="latin-1"):
    folder.mkdir(exist_ok=True)
    (folder / "movies.dat").write_bytes(movies.encode(encoding))
    (folder / "users.dat").write_text(users)
    (folder / "ratings.dat").write_text(ratings)
    return folder


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
def test_a_folder_is_read_in_time_order_with_labels_and_what_is_known_of_films_and_people(tmp_path, encoding):
    log = movielens.load(made_up(tmp_path, encoding=encoding))
    assert log.timestamp.tolist() == [100, 100, 300, 300, 400]
    assert list(zip(log.user_id, log.item_id, log.position, strict=True)) == [
        (2, 1, 0), (1, 1, 0), (1, 7, 1), (1, 2, 2), (2, 7, 1)]  # fmt: skip
    assert log[["liked", "loved", "disliked"]].to_numpy().tolist() == [
        [0, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]]  # fmt: skip
    assert log.title[0] == "Amélie (2001)"
    assert [log.genres[row] for row in (0, 1, 3)] == [["Comedy", "Romance"], ["Comedy", "Romance"], []]
    assert log.year.tolist()[2:4] == [1956, pd.NA]
    assert (log.gender[0], log.age[0], log.occupation[0]) == ("M", 56, 16)


def test_without_times_everybodys_first_rating_comes_before_anybodys_second(tmp_path):
    folder = made_up(tmp_path)
    (folder / "ratings.dat").unlink()
    frame = pd.DataFrame({"user_id": [1, 1, 2], "item_id": [7, 1, 7], "rating": [5, 3, 1], "pos": [1, 0, 0]})
    frame.to_parquet(folder / "ratings_ordered.parquet")
    log = movielens.load(folder)
    assert list(zip(log.user_id, log.item_id, strict=True)) == [(1, 1), (2, 7), (1, 7)]
    assert "timestamp" not in log
    for change, message in (
        ({"rating": [5, 6, 1]}, r"ratings_ordered.parquet, row 1: rating = 6; a rating is 1, 2, 3, 4 or 5"),
        ({"pos": [0, 0, 0]}, r"row 1: user 1 has two ratings at place 0"),
        ({"item_id": [7, 1, 8]}, r"row 2: item_id 8 is not in movies.dat"),
        ({"rating": [5.5, 3, 1]}, r"column 'rating' holds float64, no whole numbers"),
    ):
        frame.assign(**change).to_parquet(folder / "ratings_ordered.parquet")
        with pytest.raises(DataError, match=message):
            movielens.load(folder)
    frame.rename(columns={"pos": "position"}).to_parquet(folder / "ratings_ordered.parquet")
    with pytest.raises(DataError, match=r"no column 'pos'"):
        movielens.load(folder)
    (folder / "ratings_ordered.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match=r"ratings_ordered.parquet: cannot be read"):
        movielens.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"movies": MOVIES + "8::Half a line\n"}, r"movies.dat, line 4: 2 fields between '::', expected 3"),
        ({"movies": "x::A::B\n"}, r"movies.dat, line 1: 'x' is no whole number"),
        ({"movies": MOVIES + "7::Again::Drama\n"}, r"movies.dat, line 4: item_id 7 stands there twice"),
        ({"movies": ""}, r"movies.dat: empty"),
        ({"movies": MOVIES, "encoding": "utf-16"}, r"movies.dat, line 1: a zero byte; .*UTF-16"),
        ({"users": USERS + "3::X::25::1::1\n"}, r"users.dat, line 3: 'X'; MovieLens writes F or M"),
        ({"ratings": RATINGS + "1::2::6::500\n"}, r"ratings.dat, line 6: '6'; a rating is 1, 2, 3, 4 or 5"),
        ({"ratings": RATINGS + "1::2::5::4.5\n"}, r"ratings.dat, line 6: '4.5' is no whole number"),
        ({"ratings": RATINGS + "\n"}, r"ratings.dat, line 6: 1 fields"),
        ({"ratings": "1::2::5::10\n1::3::5::10\n"}, r"ratings.dat, line 2: item_id 3 is not in movies.dat"),
        ({"ratings": "9::2::5::10\n"}, r"ratings.dat, line 1: user_id 9 is not in users.dat"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        movielens.load(made_up(tmp_path, **change))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; .*grouplens.org"):
        movielens.load(tmp_path / "nowhere")
    folder = made_up(tmp_path)
    (folder / "ratings.dat").unlink()
    with pytest.raises(DataError, match=r"neither ratings.dat nor ratings_ordered.parquet is there"):
        movielens.load(folder)
    (folder / "users.dat").unlink()
    with pytest.raises(DataError, match=r"users.dat: no such file"):
        movielens.load(folder)


# ---------------------------------------------------------------------- the split


def random_log(seed, users=30, items=40):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 25, users)
    log = pd.DataFrame({"user_id": np.repeat(np.arange(users), sizes)})
    log["position"] = log.groupby("user_id").cumcount() * 3  # gaps do no harm
    log["item_id"] = draw.integers(items, size=len(log))
    return log.sample(frac=1, random_state=seed, ignore_index=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), val=st.sampled_from([0.0, 0.1, 0.3]), test=st.sampled_from([0.0, 0.1, 0.4]))
def test_no_split_sees_the_future_of_a_user_nor_a_cold_item_or_user(seed, val, test):
    log = random_log(seed)
    parts = cold_split(log, val=val, test=test, cold_items=0.2, cold_users=0.1, seed=seed)
    train, later = parts["train"], parts["test"]
    assert sum(map(len, parts.values())) <= len(log)
    assert not set(train.index) & (set(later.index) | set(parts["val"].index))
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        newest = parts[first].groupby("user_id").position.max()
        oldest = parts[second].groupby("user_id").position.min()
        both = newest.index.intersection(oldest.index)
        assert (newest[both] < oldest[both]).all()
    strangers = set(later.user_id) - set(train.user_id)
    assert set(later[later.new_user].user_id) == strangers
    gone = log.drop(index=[*train.index, *parts["val"].index, *later.index])
    trained = set(train.item_id)
    assert not set(gone.item_id) & trained  # only rows of cold items are left out
    assert set(later[later.item_segment == "never seen"].item_id) == set(later.item_id) - trained
    again = cold_split(log, val=val, test=test, cold_items=0.2, cold_users=0.1, seed=seed)
    assert all(parts[name].equals(again[name]) for name in parts)


def test_cold_items_and_users_are_drawn_by_the_seed_alone():
    """Other rows of the same ids draw the same."""
    log = random_log(1)
    parts = cold_split(log, cold_users=0.2, cold_items=0.0)
    cold = set(parts["test"].user_id[parts["test"].new_user])
    assert len(cold & set(log.user_id)) >= 6
    assert cold == set(
        cold_split(log.assign(item_id=0), cold_users=0.2, cold_items=0.0)["test"].query("new_user").user_id
    )
    assert cold != set(cold_split(log, cold_users=0.2, cold_items=0.0, seed=1)["test"].query("new_user").user_id)


def test_the_head_holds_its_share_of_the_training_rows():
    trained = pd.Series([1] * 50 + [2] * 30 + [3] * 15 + [4] * 5)
    segments = item_segments(pd.Series([1, 2, 3, 4, 5]), trained)
    assert segments.tolist() == ["head", "head", "tail", "tail", "never seen"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"val": 0.5, "test": 0.5}, ValueError, "leave nothing to train on"),
        ({"cold_items": 1.0}, ValueError, "cold_items is a share of at least 0 and below 1, not 1.0"),
        ({"user": "user"}, DataError, r"no column 'user' \(did you mean 'user_id'\?\)"),
        ({"position": "item_id"}, DataError, "has two rows of item_id"),
        ({"cold_users": 0.99}, DataError, "nothing is left to train on"),
    ],
)
def test_a_split_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        cold_split(random_log(2), **options)


@pytest.mark.skipif("MTCL_MOVIELENS" not in os.environ, reason="MTCL_MOVIELENS names no folder with MovieLens-1M")
def test_the_real_thing():
    log = movielens.load(Path(os.environ["MTCL_MOVIELENS"]))
    assert len(log) == 1_000_209
    assert (log.user_id.nunique(), log.item_id.nunique()) == (6040, 3706)
    assert log.year.notna().all()
    assert log.title[log.item_id == 2858].iloc[0] == "American Beauty (1999)"
    assert log.groupby("user_id").position.max().add(1).equals(log.groupby("user_id").size().rename("position"))
    parts = cold_split(log)
    share = parts["test"].item_segment.value_counts(normalize=True)
    assert share["never seen"] == pytest.approx(0.1, abs=0.03)
    assert parts["test"].user_id[parts["test"].new_user].nunique() == 302
