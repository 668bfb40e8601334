"""The world with titles: its probabilities are true, its titles tell what they should, and nothing else."""

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mtcl_torchrec.data.cold_split import cold_split
from mtcl_torchrec.data.synthetic_text import TextWorld

WORLD = TextWorld(num_users=300, num_items=200, ratings=60, signal=2.0)


@pytest.fixture(scope="module")
def log():
    return WORLD.log()


def test_labels_follow_their_probabilities(log):
    for name in ("liked", "loved", "disliked"):
        p, y = log[f"p_{name}"].to_numpy(), log[name].to_numpy()
        for low, high in zip(np.quantile(p, [0, 0.25, 0.5, 0.75]), np.quantile(p, [0.25, 0.5, 0.75, 1]), strict=True):
            part = (p >= low) & (p <= high)
            spread = 4.5 * np.sqrt((p[part] * (1 - p[part])).sum()) / part.sum()
            assert abs(y[part].mean() - p[part].mean()) < spread, name
    assert (log.liked.to_numpy() >= log.loved.to_numpy()).all()
    assert not (log.liked & log.disliked).any()
    assert log.rating.between(1, 5).all()


def test_a_log_is_its_seeds_and_rates_nothing_twice(log):
    assert log.equals(WORLD.log())
    assert not log.equals(TextWorld(num_users=300, num_items=200, ratings=60, signal=2.0, seed=1).log())
    assert not log.duplicated(["user_id", "item_id"]).any()
    assert not log.duplicated(["user_id", "position"]).any()
    assert log.position.is_monotonic_increasing
    parts = cold_split(log)
    assert set(parts["test"].item_segment) == {"head", "tail", "never seen"}


def test_titles_tell_the_topics():
    items = TextWorld().items()
    topics = np.array([genres[0] if len(genres) == 1 else "" for genres in items.genres])
    words = sorted({word for title in items.title for word in title.split()})
    counts = np.array([[title.split().count(word) for word in words] for title in items.title])
    known = topics != ""
    found = LogisticRegression(max_iter=300).fit(counts[known][:250], topics[known][:250])
    assert found.score(counts[known][250:], topics[known][250:]) > 0.4  # of twelve


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_the_share_of_the_text_is_what_the_topics_tell(share):
    """Of the utility, users' and items' own means taken off."""
    world = TextWorld(num_users=300, num_items=200, ratings=60, signal=2.0, text_share=share)
    z, theta = world.utility(), world._mixture()
    z = z - z.mean(0) - z.mean(1, keepdims=True) + z.mean()
    theta = theta - theta.mean(0)
    explained = z @ theta @ np.linalg.pinv(theta.T @ theta) @ theta.T
    assert (explained**2).sum() / (z**2).sum() == pytest.approx(share, abs=0.1)
    oracle = roc_auc_score(world.log().liked, world.log().p_liked)
    assert oracle > 0.8


def test_what_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="no user can rate 60 of 50 items"):
        TextWorld(num_items=50)
    with pytest.raises(ValidationError, match="text_share"):
        TextWorld(text_share=1.5)
