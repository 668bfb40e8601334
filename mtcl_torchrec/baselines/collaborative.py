"""Collaborative filtering by `implicit`: who had an event with which item, and nothing else.

Each event has a model of its own.  It scores a row by its user and item; the row's own event, in the validation or test
split, was never seen, but an item that the user met in training is not left out: rows are impressions, judged as they
are.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix, diags_array
from scipy.stats import loguniform
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from mtcl_torchrec.baselines.popularity import item_means
from mtcl_torchrec.baselines.rows import BaselineData, BaselineRows
from mtcl_torchrec.baselines.search import Predictions, Settings
from mtcl_torchrec.schema import Task

KNN_USUAL: Settings = {"weighting": "bm25", "neighbours": 50, "per_event": False}
KNN_SPACE = {
    "weighting": ["cosine", "tfidf", "bm25"],
    "neighbours": [10, 20, 50, 100, 200, 500],
    "per_event": [False, True],
}
ALS_USUAL: Settings = {"factors": 32, "regularization": 10.0, "alpha": 2.0, "negatives": 1.0, "iterations": 15}
ALS_SPACE = {
    "factors": [8, 16, 32, 64, 128],
    "regularization": loguniform(0.01, 100),
    "alpha": loguniform(0.5, 50),
    "negatives": [0.0, 0.1, 0.3, 1.0],
    "iterations": [10, 15, 30],
}
BPR_USUAL: Settings = {"factors": 32, "learning_rate": 0.05, "regularization": 0.01, "iterations": 50}
BPR_SPACE = {
    "factors": [8, 16, 32, 64, 128],
    "learning_rate": loguniform(0.005, 0.2),
    "regularization": loguniform(0.001, 0.3),
    "iterations": [20, 50, 100, 200],
}
_CHUNK = 65_536  # rows scored at once

# (N,) scores of rows whose user and item are known, from their numbers.
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def fit_knn(data: BaselineData, task: Task, settings: Settings) -> Predictions:
    """Item-based nearest neighbours (Sarwar et al., WWW 2001): Σⱼ n_uj s_ji over the items j of the user's events.

    Args:
        settings: ``weighting`` of the counts before items are compared, ``neighbours`` kept for each item, and
            ``per_event``, whether the sum is divided by the number of the user's events.
    """
    library = importlib.import_module("implicit.nearest_neighbours")
    counts, _ = events(data, task)
    kinds = {
        "cosine": library.CosineRecommender,
        "tfidf": library.TFIDFRecommender,
        "bm25": library.BM25Recommender,
    }
    model = kinds[settings["weighting"]](K=settings["neighbours"], num_threads=_threads())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of implicit, about its own matrices
        model.fit(counts, show_progress=False)
    towards = model.similarity.T.tocsr()  # row i: how alike i is to each j that counts it among its neighbours
    of_user = np.maximum(np.asarray(counts.sum(1)).ravel(), 1) if settings["per_event"] else None

    def score(users: np.ndarray, items: np.ndarray) -> np.ndarray:
        sums = np.asarray(counts[users].multiply(towards[items]).sum(1)).ravel()
        return sums if of_user is None else sums / of_user[users]

    return as_probabilities(data, task, score)


def fit_als(data: BaselineData, task: Task, settings: Settings, *, seed: int = 0) -> Predictions:
    """Implicit-feedback matrix factorisation by alternating least squares (Hu, Koren & Volinsky, ICDM 2008).

    Args:
        settings: ``factors``, ``regularization``, ``alpha`` (confidence of one event), ``negatives`` (confidence that
            a user does not like what was shown without an event, as a share of alpha; 0 tells it from what was never
            shown in nothing), ``iterations``.
        seed: of the first factors.
    """
    library = importlib.import_module("implicit.als")
    happened, shown = events(data, task)
    liked = happened.sign()
    # A user or item without any event falls back on popularity: it needs no vector, and would cost time.
    users, items = (diags_array(np.minimum(liked.sum(axis), 1).A1) for axis in (1, 0))
    refused = users @ (shown - shown.multiply(liked)) @ items
    confidence = settings["alpha"] * happened - settings["alpha"] * settings["negatives"] * refused
    confidence = csr_matrix(confidence, dtype=np.float32)
    confidence.eliminate_zeros()
    model = library.AlternatingLeastSquares(
        factors=settings["factors"], regularization=settings["regularization"], iterations=settings["iterations"],
        random_state=seed, num_threads=_threads(), use_gpu=False,
    )  # fmt: skip
    with threadpool_limits(1, "blas"):
        model.fit(confidence, show_progress=False)
    return as_probabilities(data, task, _dot(model))


def fit_bpr(data: BaselineData, task: Task, settings: Settings, *, seed: int = 0) -> Predictions:
    """Matrix factorisation trained on pairs: Bayesian personalised ranking (Rendle et al., UAI 2009).

    Args:
        settings: ``factors``, ``learning_rate``, ``regularization``, ``iterations``.
        seed: of the first factors and the pairs; on one thread, since several would race.
    """
    library = importlib.import_module("implicit.bpr")
    happened, _ = events(data, task)
    model = library.BayesianPersonalizedRanking(
        factors=settings["factors"], learning_rate=settings["learning_rate"],
        regularization=settings["regularization"], iterations=settings["iterations"],
        random_state=seed, num_threads=1, use_gpu=False,
    )  # fmt: skip
    model.fit(happened, show_progress=False)
    return as_probabilities(data, task, _dot(model))


def _dot(model: Any) -> Scorer:
    def score(users: np.ndarray, items: np.ndarray) -> np.ndarray:
        return np.einsum("nd,nd->n", model.user_factors[users], model.item_factors[items])

    return score


def events(data: BaselineData, task: Task) -> tuple[csr_matrix, csr_matrix]:
    """How often each user (U) and item (I) met in training with the event, and without it: two (U, I) float32."""
    column, train = data.column(task), data.train
    at = train.labelled(column)
    at = at[(train.users[at] >= 0) & (train.items[at] >= 0)]
    positive = train.labels[at, column] == 1

    def counted(rows: np.ndarray) -> csr_matrix:
        ones = np.ones(len(rows), np.float32)
        pairs = (train.users[rows], train.items[rows])
        return coo_matrix((ones, pairs), shape=(data.num_users, data.num_items)).tocsr()

    return counted(at[positive]), counted(at[~positive])


def as_probabilities(data: BaselineData, task: Task, score: Scorer) -> Predictions:
    """Scores to probabilities by Platt's logistic function, fitted on the validation split.

    Where the user or the item had no event in training there is nothing to score by: such a row gets the item's
    popularity (which of an item never met is the base rate).
    """
    happened, _ = events(data, task)
    users_known = np.diff(happened.indptr) > 0
    items_known = np.bincount(happened.indices, minlength=data.num_items) > 0
    popular = item_means(data, task)

    def known(rows: BaselineRows) -> np.ndarray:
        return (
            (rows.users >= 0) & (rows.items >= 0)
            & np.r_[users_known, False][rows.users] & np.r_[items_known, False][rows.items]
        )  # fmt: skip

    there = {split: known(rows) for split, rows in data.held_out.items()}
    scores = {split: _scored(score, rows, there[split]) for split, rows in data.held_out.items()}
    labels = data.held_out["val"].labels[there["val"], data.column(task)]
    curve = _platt(scores["val"], labels)
    found: Predictions = {}
    for split, rows in data.held_out.items():
        predicted = popular(rows)
        if curve is not None:
            predicted[there[split]] = curve(scores[split])
        found[split] = {task.name: predicted}
    return found


def _scored(score: Scorer, rows: BaselineRows, there: np.ndarray) -> np.ndarray:
    users, items = rows.users[there], rows.items[there]
    parts = [score(users[i : i + _CHUNK], items[i : i + _CHUNK]) for i in range(0, len(users), _CHUNK)]
    return np.concatenate(parts).astype(np.float64) if parts else np.empty(0)


def _platt(scores: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
    """A logistic function of scores, None where the labels say nothing of one."""
    present = ~np.isnan(labels)
    if len(np.unique(labels[present])) < 2:
        return None
    mean, spread = scores[present].mean(), scores[present].std() or 1.0
    fitted = LogisticRegression(C=1e4).fit(((scores[present] - mean) / spread)[:, None], labels[present])
    return lambda x: fitted.predict_proba(((x - mean) / spread)[:, None])[:, 1]


def _threads() -> int:
    """As many as OpenMP was told to take; 0, all cores, where nobody told."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() else 0


def lacks(module: str) -> str:
    """Why a model of `implicit` cannot be had here, and the extra that brings it; empty where it can.

    Args:
        module: of `implicit`, such as ``"als"``.
    """
    try:
        importlib.import_module(f"implicit.{module}")
    except ImportError as error:
        return f"needs implicit: pip install 'mtcl_torchrec[baselines]' ({error})"
    return ""
