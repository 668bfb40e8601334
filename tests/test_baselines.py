"""Baselines: each against a plain reference, on the rows and labels of the run; none sees the test split."""

import dataclasses
import math

import histories
import numpy as np
import pandas as pd
import pytest
import shop
from hypothesis import given, settings
from hypothesis import strategies as st

from mtcl_torchrec.baselines import Budget, collaborative, designs, fused, popularity, run_baselines
from mtcl_torchrec.baselines.kinds import BASELINES, Job
from mtcl_torchrec.baselines.rows import BaselineRows, load_data
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.data.source import read_rows, split_by_time
from mtcl_torchrec.data.vectors import write_vectors
from mtcl_torchrec.evaluation.metrics import auc, task_metrics
from mtcl_torchrec.evaluation.predictions_file import read_predictions

CHAINED = (
    shop.RUN.replace("{name: buy, kind: binary, mask: click, weight: 0.5}", "{name: buy, kind: binary, after: click}")
)  # fmt: skip


def silent(line):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    shop.log(1500).to_parquet(folder / "log.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return parse_run(shop.RUN, folder=folder)


@pytest.fixture(scope="module")
def data(run):
    return load_data(run, max_rows=10**6, seed=0, say=silent)


@pytest.fixture(scope="module")
def raw(folder):
    rows = split_by_time(read_rows([str(folder / "log.parquet")]), "time", 0.15, 0.15)
    return {split: part.frame for split, part in rows.items()}


def task_of(data, name):
    return next(task for task in data.tasks if task.name == name)


# ---------------------------------------------------------------------- rows


def test_rows_labels_users_and_items_are_those_of_the_run(data, raw):
    frame = raw["train"]
    assert np.array_equal(data.train.labels[:, 0], frame["click"])
    masked = np.where(frame["click"] == 1, frame["buy"], np.nan)
    assert np.array_equal(data.train.labels[:, 1], masked, equal_nan=True)
    for column, numbers in (("user_id", data.train.users), ("product_id", data.train.items)):
        pairs = pd.DataFrame({"key": frame[column].to_numpy(), "number": numbers}).drop_duplicates()
        assert pairs["key"].is_unique
        assert sorted(pairs["number"]) == list(range(frame[column].nunique()))
        number_of = dict(zip(pairs["key"], pairs["number"], strict=True))
        for split, rows in data.held_out.items():
            later = rows.users if column == "user_id" else rows.items
            assert later.tolist() == [number_of.get(key, -1) for key in raw[split][column]]


def test_in_a_chain_a_label_is_0_where_the_event_before_did_not_happen(folder, raw):
    of_chain = load_data(parse_run(CHAINED, folder=folder), max_rows=10**6, seed=0, say=silent)
    assert not np.isnan(of_chain.train.labels[:, 1]).any()
    assert np.array_equal(of_chain.train.labels[:, 1], raw["train"]["buy"])


def test_index_0_and_new_keys_are_nobody(tmp_path):
    frame = {"u": [0, 1, 2, 1], "i": ["a", "b", "a", None], "click": [0, 1, 0, 1]}
    later = {"u": [2, 0, 3], "i": ["c", "b", "a"], "click": [0, 1, 1]}
    for split, rows in (("train", frame), ("val", later)):
        pd.DataFrame(rows).to_parquet(tmp_path / f"{split}.parquet")
    text = """
    data: {train: train.parquet, val: val.parquet}
    schema:
      user: u
      item: i
      features: [{name: u, group: user, encoding: index, vocabulary_size: 9}]
      tasks: [{name: click, kind: binary}]
    """
    found = load_data(parse_run(text, folder=tmp_path), max_rows=100, seed=0, say=silent)
    assert found.train.users.tolist() == [-1, 0, 1, 0]
    assert found.train.items.tolist() == [0, 1, 0, -1]
    assert found.held_out["val"].users.tolist() == [1, -1, -1]
    assert found.held_out["val"].items.tolist() == [-1, 1, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_training_split_is_sampled_whole_rows_at_a_time(tmp_path, stream):
    draw = np.random.default_rng(0)
    user = draw.integers(0, 50, 1000)
    frame = pd.DataFrame({"user": user, "who": [f"u{u}" for u in user], "tags": [[u, u + 1] for u in user],
                          "item": draw.integers(0, 9, 1000), "number": user / 50, "click": user % 2})  # fmt: skip
    frame.iloc[:800].to_parquet(tmp_path / "train.parquet", row_group_size=100)
    frame.iloc[800:].to_parquet(tmp_path / "val.parquet")
    streamed = ", stream: true, window: 100" if stream else ""
    text = f"""
    data: {{train: train.parquet, val: val.parquet{streamed}}}
    schema:
      user: who
      item: item
      features:
        - {{name: user, group: user}}
        - {{name: tags, group: user, kind: bag}}
        - {{name: number, group: user, kind: dense}}
      tasks: [{{name: click, kind: binary}}]
    """
    lines = []
    found = load_data(parse_run(text, folder=tmp_path), max_rows=250, seed=0, say=lines.append)
    assert "800 rows: baselines learn from a sample of 250" in " ".join(lines)
    rows = found.train
    assert (len(rows), found.total, len(found.held_out["val"])) == (250, 800, 200)
    # Whatever was drawn, what one row has belongs together: each column tells the same user.
    number = np.unique(np.c_[rows.users, rows.ids["user"], np.round(rows.dense[:, 0], 4), rows.labels[:, 0]], axis=0)
    assert len(number) == len(np.unique(rows.users))
    values, lengths = rows.bags["tags"]
    assert (lengths == 2).all()
    bags = pd.DataFrame(values.reshape(-1, 2)).assign(user=rows.users).drop_duplicates()
    assert bags["user"].is_unique


# ---------------------------------------------------------------------- popularity and collaborative filtering


@pytest.mark.parametrize("name", ["click", "buy", "stars"])
def test_popularity_is_the_smoothed_mean_of_the_items_labels(data, raw, name):
    task, column = task_of(data, name), data.column(task_of(data, name))
    frame = raw["train"].assign(label=data.train.labels[:, column]).dropna(subset="label")
    prior = frame["label"].mean()
    expected = []
    for item in raw["test"]["product_id"]:
        own = frame.loc[frame["product_id"] == item, "label"]
        expected.append((own.sum() + 20 * prior) / (len(own) + 20))
    found = popularity.fit_popularity(data, task, popularity.USUAL)["test"][name]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_of_classes_popularity_says_their_shares(data):
    task = task_of(data, "taste")
    found = popularity.fit_popularity(data, task, popularity.USUAL)["val"]["taste"]
    labels = data.train.labels[:, data.column(task)]
    shares = [np.nanmean(labels == c) / np.nanmean(~np.isnan(labels)) for c in range(task.out_features)]
    assert found.shape == (len(data.held_out["val"]), task.out_features)
    np.testing.assert_allclose(found[0], shares, atol=0.01)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def counts_of(data):
    rows = data.train
    counts = np.zeros((data.num_users, data.num_items))
    np.add.at(counts, (rows.users, rows.items), rows.labels[:, 0])
    return counts


def kept_scores(monkeypatch):
    """What a fit hands over to be turned into probabilities."""
    kept = []
    monkeypatch.setattr(collaborative, "as_probabilities", lambda data, task, score: kept.append(score))
    return kept


def test_knn_adds_up_the_cosines_of_the_users_items(data, monkeypatch):
    kept = kept_scores(monkeypatch)
    every = {"weighting": "cosine", "neighbours": data.num_items, "per_event": False}
    collaborative.fit_knn(data, task_of(data, "click"), every)
    collaborative.fit_knn(data, task_of(data, "click"), {**every, "per_event": True})
    counts = counts_of(data)
    unit = counts / np.linalg.norm(counts, axis=0)
    whole = counts @ (unit.T @ unit)
    users, items = data.held_out["val"].users, data.held_out["val"].items
    np.testing.assert_allclose(kept[0](users, items), whole[users, items], rtol=1e-4)
    per_event = (whole / counts.sum(1, keepdims=True))[users, items]
    np.testing.assert_allclose(kept[1](users, items), per_event, rtol=1e-4)


def test_als_solves_its_weighted_least_squares_with_what_was_refused(data, monkeypatch):
    kept = kept_scores(monkeypatch)
    setting = {"factors": 4, "regularization": 3.0, "alpha": 5.0, "negatives": 0.4, "iterations": 300}
    collaborative.fit_als(data, task_of(data, "click"), setting, seed=1)
    users, items = np.divmod(np.arange(data.num_users * data.num_items), data.num_items)
    scores = kept[0](users, items).reshape(data.num_users, data.num_items)
    counts = counts_of(data)
    shown = np.zeros_like(counts)
    np.add.at(shown, (data.train.users, data.train.items), 1)
    confidence = np.where(counts > 0, 5.0 * counts, np.where(shown > 0, 5.0 * 0.4 * shown, 1.0))

    def alternated(rounds=300):
        draw = np.random.default_rng(0)
        x, y = draw.normal(size=(data.num_users, 4)), draw.normal(size=(data.num_items, 4))
        for _ in range(rounds):
            for a, b, c, p in ((x, y, confidence, counts > 0), (y, x, confidence.T, (counts > 0).T)):
                for i in range(len(a)):
                    weighed = b * c[i][:, None]
                    a[i] = np.linalg.solve(b.T @ weighed + 3.0 * np.eye(4), weighed.T @ p[i])
        return x @ y.T

    def loss(z):
        return (confidence * ((counts > 0) - z) ** 2).sum()

    assert np.corrcoef(scores.ravel(), alternated(60).ravel())[0, 1] > 0.97
    assert loss(scores) < 1.02 * loss(alternated(60))


def test_who_or_what_had_no_event_gets_the_items_popularity(data):
    task = task_of(data, "click")
    # User 0 and item 0 never clicked.
    cold = (data.train.users == 0) | (data.train.items == 0)
    labels = data.train.labels.copy()
    labels[cold, 0] = 0
    changed = BaselineRows(**{**vars(data.train), "labels": labels})
    of = type(data)(**{**vars(data), "train": changed, "designs": {}})
    found = collaborative.fit_bpr(of, task, collaborative.BPR_USUAL)
    popular = popularity.fit_popularity(of, task, popularity.USUAL)
    for split, rows in of.held_out.items():
        alone = (rows.users <= 0) | (rows.items <= 0)
        assert 0 < alone.sum() < len(rows)
        same = np.isclose(found[split]["click"], popular[split]["click"])
        assert same[alone].all()
        assert same[~alone].mean() < 0.1


@pytest.mark.parametrize("fit", ["item_knn", "als", "bpr"])
def test_scores_become_probabilities_that_fit_the_validation_split(data, fit):
    task, baseline = task_of(data, "click"), BASELINES[fit]
    found = baseline.fit(_job(data), [task], baseline.usual)["val"]["click"]
    label = data.held_out["val"].labels[:, 0]
    assert ((found > 0) & (found < 1)).all()
    assert found.mean() == pytest.approx(label.mean(), abs=0.01)


def _job(data):
    return Job(None, data, None)


# ---------------------------------------------------------------------- linear models and trees


def test_one_hot_columns_hold_ids_shares_of_bags_and_numbers(data):
    task = task_of(data, "click")
    design = designs.one_hot(data, task)["val"].toarray()
    rows, expected = data.held_out["val"], []
    for feature in data.encoder.schema.sparse_features:
        columns = np.zeros((len(rows), data.encoder.num_rows(feature)))
        if feature.name in rows.ids:
            columns[np.arange(len(rows)), rows.ids[feature.name]] = 1
        else:
            values, lengths = rows.bags[feature.name]
            for i, bag in enumerate(np.split(values, np.cumsum(lengths)[:-1])):
                for value in bag:
                    columns[i, value] += 1 / len(bag)
        expected.append(columns)
    np.testing.assert_allclose(design, np.hstack([*expected, rows.dense]), rtol=1e-6)
    # A task that may not see the item: no product, genre, topics or price.
    seen = designs.one_hot(data, task_of(data, "taste"))["val"]
    names = [f.name for f in designs.seen_by(data, task_of(data, "taste"))[0]]
    assert names == ["user_id", "hour"]
    assert seen.shape[1] < design.shape[1] - 60


def test_large_tables_share_columns(data, monkeypatch):
    monkeypatch.setattr(designs, "HASHED", 16)
    of = dataclasses.replace(data, designs={})
    design = designs.one_hot(of, task_of(data, "taste"))["val"].toarray()
    user = design[:, :16]
    assert np.array_equal(user.argmax(1), data.held_out["val"].ids["user_id"] % 16)
    assert (user.sum(1) == 1).all()
    assert design.shape[1] < designs.one_hot(data, task_of(data, "taste"))["val"].shape[1]


def test_histories_are_read_as_bags(tmp_path):
    frame = histories.log(200)
    frame.to_parquet(tmp_path / "log.parquet")
    found = load_data(parse_run(histories.RUN, folder=tmp_path), max_rows=10**6, seed=0, say=silent)
    lengths = frame["clicked"].map(len).clip(upper=6).to_numpy()[: len(found.train)]
    for name in ("clicked", "clicked_kind", "clicked_age"):
        assert np.array_equal(found.train.bags[name][1], lengths)
    empty = int(np.argmin(lengths))
    at = np.arange(len(found.train))
    encoded, _ = designs.target_means(found, found.tasks[0], at, found.train.labels[:, 0], 5.0, 0)
    names = [f.name for f in designs.seen_by(found, found.tasks[0])[0]]
    assert np.isnan(encoded[empty, names.index("clicked")])
    assert not np.isnan(encoded[lengths > 0]).any()


def test_vectors_are_read_by_their_principal_components(tmp_path):
    draw = np.random.default_rng(0)
    of_item = (draw.normal(size=(30, 2)) @ draw.normal(size=(2, 24))).astype(np.float32)
    write_vectors(tmp_path / "vectors.parquet", pd.Series([f"i{i}" for i in range(30)]), of_item, key="i")
    item = draw.integers(0, 40, 400)  # a quarter has no vector
    frame = pd.DataFrame({"i": [f"i{i}" for i in item], "click": (item < 30) & (of_item[item % 30, 0] > 0)})
    for split, rows in (("train", frame[:300]), ("val", frame[300:])):
        rows.astype({"click": int}).to_parquet(tmp_path / f"{split}.parquet")
    text = """
    data: {train: train.parquet, val: val.parquet}
    schema:
      item: i
      features: [{name: content, group: item, column: i, kind: vector, vectors: vectors.parquet}]
      tasks: [{name: click, kind: binary}]
    """
    found = load_data(parse_run(text, folder=tmp_path), max_rows=10**6, seed=0, say=silent)
    columns = designs.dense_columns(found, found.tasks[0], found.held_out["val"])
    assert columns.shape == (100, designs.CONTENT_COLUMNS)
    assert (columns[item[300:] >= 30] == 0).all()
    for fit in ("logistic_regression", "trees"):
        predicted = BASELINES[fit].fit(_job(found), found.tasks, BASELINES[fit].usual)["val"]["click"]
        assert auc(found.held_out["val"].labels[:, 0], predicted) > 0.9


def test_a_generated_world_is_sampled(tmp_path):
    text = """
    data: {synthetic: {world: shop, rows: 3000, val_rows: 300, test_rows: 0, num_users: 50, num_items: 40}, window: 500}
    schema:
      user: user_id
      item: product_id
      features: [{name: user_id, group: user, encoding: index, vocabulary_size: 51}]
      tasks: [{name: click, kind: binary}]
    """
    run = parse_run(text)
    entry = run_baselines(run, tmp_path, only=["item_knn"], budget=Budget(1), max_rows=700, say=silent)["item_knn"]
    assert entry["rows"] == 700
    assert set(entry["metrics"]) == {"val"}
    assert read_predictions(tmp_path / "baselines/item_knn/predictions/val.parquet").score is not None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_target_means_are_those_of_the_other_folds(data, seed):
    task = task_of(data, "click")
    at = np.sort(np.random.default_rng(seed).choice(len(data.train), 60, replace=False))
    rows = data.train.at(at)
    label = rows.labels[:, 0]
    found, later = designs.target_means(data, task, at, label, 3.0, seed)
    fold = np.random.default_rng(seed).permutation(60) % designs.FOLDS
    names = [f.name for f in designs.seen_by(data, task)[0]]
    for name in ("user_id", "topics"):
        column, values = names.index(name), _values(rows, name)
        for i in (0, 17, 59):
            means = []
            for value in values[i]:
                others = [j for j in range(60) if fold[j] != fold[i] for v in values[j] if v == value]
                prior = label[fold != fold[i]].mean()
                means.append((label[others].sum() + 3 * prior) / (len(others) + 3))
            assert found[i, column] == pytest.approx(np.mean(means), rel=1e-5)
    whole = later(rows)[:, names.index("user_id")]
    own = [label[[v == value for v in _values(rows, "user_id")]] for value in _values(rows, "user_id")]
    np.testing.assert_allclose(whole, [(o.sum() + 3 * label.mean()) / (len(o) + 3) for o in own], rtol=1e-5)


def _values(rows, name):
    if name in rows.ids:
        return [[v] for v in rows.ids[name].tolist()]
    values, lengths = rows.bags[name]
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def test_labels_that_are_noise_leave_no_trace_in_their_own_encoding(data):
    """Encoded with its own label, each row of a feature without repetition would tell it."""
    draw = np.random.default_rng(0)
    at = np.arange(len(data.train))
    once = {name: at.copy() if name == "user_id" else ids for name, ids in data.train.ids.items()}
    train = BaselineRows(**{**vars(data.train), "ids": once})
    of = type(data)(**{**vars(data), "train": train, "designs": {}})
    of.encoder.num_rows = lambda feature: len(at) + 100  # type: ignore[method-assign]
    try:
        noise = draw.integers(0, 2, len(at)).astype(np.float32)
        encoded, later = designs.target_means(of, task_of(data, "click"), at, noise, 1.0, 0)
        assert abs(np.corrcoef(encoded[:, 0], noise)[0, 1]) < 0.1
        assert np.corrcoef(later(train)[:, 0], noise)[0, 1] > 0.9
    finally:
        del of.encoder.num_rows


def test_no_baseline_sees_labels_of_the_test_split(data):
    draw = np.random.default_rng(1)
    test = data.held_out["test"]
    other = np.where(np.isnan(test.labels), np.nan, draw.integers(0, 2, test.labels.shape)).astype(np.float32)
    blind = {**data.held_out, "test": BaselineRows(**{**vars(test), "labels": other})}
    of = type(data)(**{**vars(data), "held_out": blind, "designs": {}})
    fits = {
        "click": [name for name, b in BASELINES.items() if not b.network],
        "stars": ["popularity", "logistic_regression"],
        "taste": ["logistic_regression"],
    }
    for task, names in fits.items():
        for name in names:
            baseline = BASELINES[name]
            expected, found = (baseline.fit(_job(d), [task_of(data, task)], baseline.usual) for d in (data, of))
            for split in ("val", "test"):
                assert np.array_equal(found[split][task], expected[split][task]), name


@pytest.mark.parametrize("name", ["click", "taste", "stars"])
@pytest.mark.parametrize("fit", ["logistic_regression", "trees"])
def test_models_of_features_learn_every_kind_of_task(data, fit, name):
    task, few = task_of(data, name), {"min_samples_leaf": 20} if fit == "trees" else {}
    found = BASELINES[fit].fit(_job(data), [task], {**BASELINES[fit].usual, **few})
    # On the validation split, which says when trees stop: rows enough for few labels.
    metrics = task_metrics(task, data.held_out["val"].labels[:, data.column(task)], found["val"][name])
    least = {"auc": 0.75, "r2": 0.3}
    assert all(metrics[key] > least[key] for key in least if key in metrics)
    if name == "taste":
        assert metrics["ne"] < 0.99
        np.testing.assert_allclose(found["test"][name].sum(1), 1, rtol=1e-4)


# ---------------------------------------------------------------------- the fused score


def test_what_a_baseline_does_not_predict_enters_the_score_as_a_constant(run, data):
    score, said = fused.score_of(run, data.tasks)
    assert said == ""
    rows = len(data.held_out["val"])
    parts = {"click": np.linspace(0, 1, rows), "buy": np.full(rows, 0.5)}
    found, lacking = fused.fused_score(score, data, "val", parts)
    assert lacking == ["taste", "stars"]
    stars, taste = task_of(data, "stars"), task_of(data, "taste")
    shares = popularity.prior_of(data, taste)[data.held_out["val"].ids["genre"]]
    middle = 1 / (1 + math.exp(-(float(popularity.prior_of(data, stars)) - stars.mean) / stars.std))
    expected = (1 * parts["click"] + 3 * parts["buy"] + 0.5 * shares + 0.5 * middle) / 5
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_score_that_learns_gives_way_to_the_mean_of_its_weights(run):
    learning = run.model_copy(deep=True)
    learning.fusion = type(run.fusion)(kind="stacking", weights={"click": 2, "buy": 1}, train={"reward": "buy"})
    score, said = fused.score_of(learning, learning.data_schema.tasks)
    assert (score.tasks, score.weights.tolist()) == (("click", "buy"), [2, 1])
    assert "stacking" in said
