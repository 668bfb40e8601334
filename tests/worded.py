"""A made-up log in which the content of an item explains the label, and whose last items training never sees."""

import numpy as np
import pandas as pd

from mtcl_torchrec.data.vectors import write_codes, write_vectors

TOPICS, WARM, COLD = 8, 120, 40
ITEMS = WARM + COLD


def files(folder, *, extra=0, seed=0):
    """Write vectors.parquet and codes.parquet: of items p0 … of 16 numbers around the direction of their topic.

    Args:
        extra: further items, after the others.
    """
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(TOPICS, 16))
    vectors = np.concatenate(
        [centres[i % TOPICS] + 0.4 * np.random.default_rng([seed, i]).normal(size=16) for i in range(ITEMS + extra)]
    ).reshape(-1, 16)
    keys = pd.Series([f"p{i}" for i in range(ITEMS + extra)])
    write_vectors(folder / "vectors.parquet", keys, vectors.astype(np.float32), key="item_id")
    number = np.arange(ITEMS + extra)
    codes = np.stack([number % TOPICS // 2, number % 2, number // TOPICS % 32], axis=1)
    write_codes(folder / "codes.parquet", keys, codes, (TOPICS // 2, 2, 32), key="item_id")


def log(rows=2000, seed=1):
    """All like two topics, and each user another one; the last fifth of the time has new items alone."""
    draw = np.random.default_rng(seed)
    old = int(0.8 * rows)
    user = draw.integers(0, 30, rows)
    item = np.where(np.arange(rows) < old, draw.integers(0, WARM, rows), draw.integers(WARM, ITEMS, rows))
    topic = item % TOPICS
    likes = (topic < 2) | (topic == 2 + user % 6)
    probability = np.where(likes, 0.85, 0.15)
    return pd.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"p{i}" for i in item],
            "time": 1_700_000_000 + np.arange(rows),
            "click": (draw.random(rows) < probability).astype(int),
            "like": (draw.random(rows) < 0.5 * probability).astype(int),
        }
    )


ID = "{name: item_id, group: item, embedding_dim: 8}"
VECTOR = "{name: text, group: item, kind: vector, column: item_id, vectors: vectors.parquet, embedding_dim: 8}"
CODE = "{name: code, group: item, kind: semantic_id, column: item_id, codes: codes.parquet, embedding_dim: 8}"


def yaml(*features, more=""):
    """A run over the log: the user, and these features of the item."""
    listed = "".join(f"    - {feature}\n" for feature in features)
    return f"""
name: worded
data: {{log: log.parquet, val_fraction: 0.1, test_fraction: 0.2}}
schema:
  user: user_id
  item: item_id
  time: time
  features:
    - {{name: user_id, group: user, embedding_dim: 8}}
{listed}  tasks:
    - {{name: click, kind: binary}}
    - {{name: like, kind: binary}}
model: {{trunk: {{kind: shared_bottom, expert_layers: [32]}}, tower_layers: [8]}}
optimizers: {{tables: {{kind: rowwise_adagrad, lr: 0.1}}, dense: {{lr: 0.02}}}}
training: {{epochs: 4, batch_size: 100, eval_batch_size: 500, warmup_steps: 5, patience: 0}}
fusion: {{weights: {{click: 1, like: 1}}}}
{more}"""
