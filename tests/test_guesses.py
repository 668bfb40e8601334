"""What `mtcl init` takes columns for: from their names, and from what they hold."""

import re

import numpy as np
import pandas as pd
import pytest
import shop
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.draft import draft_run
from mtcl_torchrec.data.roles import guess_roles, lengths_to_judge, request_sizes
from mtcl_torchrec.schema import DataError


def drafted(frame, tmp_path, **given):
    path = tmp_path / "log.parquet"
    frame.to_parquet(path, index=False)
    text = draft_run([str(path)], **given)
    parse_run(text)
    return yaml.safe_load(text), text


def requested(rows=3000, size=6, seed=0):
    """The shop's log, whose rows come in requests of a user each."""
    frame = shop.log(rows, seed).drop(columns="stars")
    number = np.arange(rows) // size
    users = np.random.default_rng(seed).integers(0, 40, number.max() + 1)
    return frame.assign(user_id=[f"u{users[n]}" for n in number], request=number)


@pytest.mark.parametrize(
    ("user", "item", "time", "request_"),
    [
        ("customer_key", "articleId", "eventTs", "request_id"),
        ("visitorId", "SKU", "seen_at", "impressionId"),
        ("member_uuid", "track_key", "played_time", "session"),
        ("user", "video", "timestamp", "visit"),
        ("Account No", "clicked_item_id", "created_at", "search_uuid"),
    ],
)
def test_roles_are_found_by_names_of_many_kinds(tmp_path, user, item, time, request_):
    frame = requested().rename(columns={"user_id": user, "product_id": item, "time": time, "request": request_})
    schema = drafted(frame, tmp_path)[0]["schema"]
    assert [schema.get(role) for role in ("user", "item", "time", "request")] == [user, item, time, request_]
    assert request_ not in [feature["name"] for feature in schema["features"]]


def test_a_name_is_not_believed_where_the_column_says_otherwise(tmp_path):
    frame = requested()
    frame["impression_id"] = [f"x{i}" for i in range(len(frame))]  # one for each row: no request
    frame["visit"] = frame.pop("request") % 7  # of many users: no request either
    frame["user_version"] = 3
    frame["customer"] = [f"c{i}" for i in range(len(frame))]
    found, text = drafted(frame, tmp_path)
    assert found["schema"]["user"] == "user_id"
    assert "request" not in found["schema"]
    names = [feature["name"] for feature in found["schema"]["features"]]
    assert not {"impression_id", "user_version", "customer"} & set(names)
    assert "#   impression_id: another value in each row" in text
    assert "#   user_version: always 3" in text
    assert drafted(frame, tmp_path, request="visit")[0]["schema"]["request"] == "visit"


def test_ids_without_telling_names_are_told_apart_by_how_long_they_stay(tmp_path):
    frame = requested().rename(columns={"user_id": "a_id", "product_id": "b_id"}).drop(columns="request")
    found, text = drafted(frame, tmp_path)
    assert (found["schema"]["user"], found["schema"]["item"]) == ("a_id", "b_id")
    assert text.count("CHECK THIS, its name does not tell") == 2


def podcasts(rows=3000, size=6):
    """The shop's log under names that tell little."""
    frame = requested(rows, size)
    named = {"user_id": "listenerUUID", "product_id": "ep_guid", "request": "feedLoad#", "time": "evt_ts"}
    frame = frame.rename(columns={**named, "click": "didTap", "buy": "flagged"})
    frame["feedLoad#"] = "fl" + frame["feedLoad#"].astype(str)
    frame["didTap"] = frame["didTap"].astype(bool)
    frame["slot_idx"] = np.arange(rows) % size
    frame["ipw"] = np.clip(1 / (1.2 - 0.07 * frame["slot_idx"]), 0.5, 5)
    frame["fold"] = np.random.default_rng(3).integers(0, 6, rows)
    frame["legacy_score"] = np.nan
    frame["minutes"] = np.random.default_rng(4).exponential(9, rows)
    return frame


def test_odd_names_are_guessed_from_what_they_hold(tmp_path):
    found, text = drafted(podcasts(), tmp_path)
    schema = found["schema"]
    assert [schema.get(role) for role in ("user", "item", "time", "request")] == [
        "listenerUUID", "ep_guid", "evt_ts", "feedLoad#",
    ]  # fmt: skip
    assert "CHECK THIS, its name does not tell; each is of one listenerUUID" in text
    assert "CHECK THIS, its name does not tell; the only id of many users" in text
    names = [feature["name"] for feature in schema["features"]]
    assert not {"feedLoad#", "ipw", "fold", "didTap", "legacy_score"} & set(names)
    assert [task["name"] for task in schema["tasks"]] == ["didTap", "flagged"]
    assert found["fusion"]["weights"]["flagged"] < 0 < found["fusion"]["weights"]["didTap"]
    assert "#   ipw: a weight, by its name: a task may count rows by it, with sample_weight: ipw" in text
    assert "#   fold: a fold of a split" in text


def test_a_property_of_the_user_is_no_visit_and_no_event(tmp_path):
    frame = podcasts()
    frame["device"] = [f"{user}-{n % 2}" for n, user in enumerate(frame["listenerUUID"])]  # of one user, for long
    frame["opened"] = frame["ep_guid"].str[1:].astype(int) % 2  # of the item: known before
    found, _ = drafted(frame.drop(columns="feedLoad#"), tmp_path)
    assert "request" not in found["schema"]
    assert "device" in [feature["name"] for feature in found["schema"]["features"]]
    assert "opened" not in [task["name"] for task in found["schema"]["tasks"]]


def test_a_request_of_many_users_is_doubted(tmp_path):
    assert (
        "CHECK THIS, rows of several values of listenerUUID are in one request"
        in (drafted(podcasts(), tmp_path, request="slot_idx")[1])
    )
    assert "rows of several" not in drafted(podcasts(), tmp_path, request="feedLoad#")[1]


def test_a_label_that_cannot_be_one_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="--label legacy_score: it has no value at all"):
        drafted(podcasts(), tmp_path, labels=["legacy_score"])
    with pytest.raises(DataError) as error:
        drafted(podcasts(), tmp_path, labels=["minutes"])
    task = re.search(
        r"a regression task: leave --label minutes out, and uncomment or add (- .*) under tasks", str(error.value)
    )
    text = drafted(podcasts(), tmp_path)[1]
    assert f"# {task[1]}" in text
    parse_run(text.replace(f"# {task[1]}", task[1]))


def test_outcomes_are_no_inputs_and_are_offered_as_tasks(tmp_path):
    frame = requested()
    draw = np.random.default_rng(1)
    frame["watch_seconds"] = draw.exponential(30, len(frame))
    frame["rating"] = draw.integers(1, 6, len(frame))
    frame["returned"] = draw.integers(0, 2, len(frame))
    frame["length_seconds"] = frame["product_id"].str[1:].astype(float) + 20  # of the item: known before
    found, text = drafted(frame, tmp_path)
    features = {feature["name"]: feature for feature in found["schema"]["features"]}
    assert not {"watch_seconds", "rating", "returned"} & features.keys()
    assert features["length_seconds"]["group"] == "item"
    assert [task["name"] for task in found["schema"]["tasks"]] == ["click", "buy"]
    for line in (
        "# - {name: watch_seconds, kind: regression, label: watch_seconds}   # an amount",
        "# - {name: rating, kind: regression, label: rating}   # a rating",
        "# - {name: returned, kind: binary, label: returned}",
    ):
        assert f"    {line}" in text
    uncommented = text.replace("    # - {name: rating, kind", "    - {name: rating, kind")
    assert [task.name for task in parse_run(uncommented).data_schema.tasks] == ["click", "buy", "rating"]


def test_a_log_of_ratings_alone_has_a_task(tmp_path):
    frame = shop.log().drop(columns=["click", "buy", "stars"])
    frame["stars"] = np.random.default_rng(5).integers(1, 6, len(frame))
    found, _ = drafted(frame, tmp_path)
    assert found["schema"]["tasks"] == [{"name": "stars", "kind": "regression", "label": "stars"}]
    assert found["fusion"]["weights"] == {"stars": 1}


def test_a_label_called_like_a_key_of_predictions_names_no_task(tmp_path):
    frame = shop.log().rename(columns={"click": "ranking", "stars": "score"}).drop(columns="buy")
    found, _ = drafted(frame, tmp_path, labels=["ranking"])  # it can be read
    assert found["schema"]["tasks"] == [{"name": "ranking_label", "kind": "binary", "label": "ranking"}]
    assert list(found["fusion"]["weights"]) == ["ranking_label"]
    found, _ = drafted(frame.drop(columns="ranking"), tmp_path)
    assert found["schema"]["tasks"] == [{"name": "score_label", "kind": "regression", "label": "score"}]


@pytest.mark.parametrize("separator", ["|", ",", ";", ", "])
def test_lists_in_texts_are_bags_and_prose_is_not(tmp_path, separator):
    frame = requested()
    words = [" ".join(["a", "good", "thing", str(i)]) for i in range(60)]
    frame["title"] = [f"{words[int(p[1:])]}, and more" for p in frame["product_id"]]
    frame["topics"] = frame["topics"].map(separator.join)
    found, text = drafted(frame, tmp_path)
    features = {feature["name"]: feature for feature in found["schema"]["features"]}
    assert (features["topics"]["kind"], features["topics"]["separator"]) == ("bag", separator.strip())
    assert "title" not in features
    assert "#   title: a text; mtcl embed makes vectors of it" in text


def test_lists_of_anything_are_looked_at(tmp_path):
    frame = requested(600)
    frame["nested"] = [[{"a": i % 3}] for i in range(len(frame))]
    frame.loc[3, "topics"] = None
    features = {feature["name"]: feature for feature in drafted(frame, tmp_path)[0]["schema"]["features"]}
    assert features["topics"]["kind"] == "bag"
    assert features["nested"]["group"] == "context"


def test_k_leaves_a_choice(tmp_path):
    found, text = drafted(requested(size=6), tmp_path)
    assert found["evaluation"]["k"] == [1, 3]
    assert "half of the requests with several rows have 6 or fewer" in text
    assert "evaluation" not in drafted(requested(size=40), tmp_path)[0]
    single = requested(size=1)
    found, text = drafted(single.drop(columns="request").assign(user_id=np.arange(len(single)) // 2), tmp_path)
    assert found["evaluation"]["k"] == [1]


@given(st.lists(st.integers(1, 60), max_size=40))
def test_at_least_half_of_the_requests_of_several_rows_leave_a_choice(sizes):
    lengths = lengths_to_judge(np.array(sizes, dtype=np.int64))
    several = [size for size in sizes if size > 1]
    assert lengths == sorted(set(lengths))
    assert min(lengths) >= 1
    assert sum(size > max(lengths) for size in several) >= len(several) / 2


def test_sizes_are_those_of_the_newest_rows():
    frame = requested(1000, 5)
    roles = guess_roles(frame)
    assert request_sizes(frame.sample(frac=1, random_state=0), roles).tolist() == [5] * 20
    assert request_sizes(frame, guess_roles(frame.drop(columns=["request", "user_id"]))).size == 0
    assert pd.Series(request_sizes(frame, roles, share=1.0)).sum() == 1000


def test_a_finer_id_than_the_item_is_named(tmp_path):
    frame = requested()
    dishes = frame.pop("product_id")
    frame["restaurant"], frame["dish"] = "r" + (pd.factorize(dishes)[0] // 4).astype(str).astype(object), dishes
    assert "CHECK THIS, each dish is of one restaurant: --item dish" in drafted(frame, tmp_path)[1]
    assert "CHECK THIS" not in drafted(frame, tmp_path, item="dish")[1]
    assert "CHECK THIS" not in drafted(frame.assign(dish="d" + frame.restaurant), tmp_path)[1]  # as many of them


def test_an_event_that_never_comes_without_another_is_marked(tmp_path):
    frame = shop.log(3000).drop(columns="stars")
    frame["order"] = frame.click * (np.arange(3000) % 2)
    frame["reorder"] = frame.order * (np.arange(3000) % 3 == 0)
    text = drafted(frame, tmp_path)[1]
    assert re.search(r"label: order}   # [\d.]+% of rows, never without click\n", text)
    assert re.search(r"label: reorder}   # [\d.]+% of rows, never without order\n", text)  # the nearest
    assert re.search(r"label: click}   # [\d.]+% of rows\n", text)
