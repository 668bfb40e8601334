"""A log in which who clicks what follows from the newest things met before, and from nothing else."""

import numpy as np
import pandas as pd

CLUSTERS, ITEMS = 2, 6


def log(rows: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Events of 60 users and 6 items of 2 clusters: a click is likely where the item is of the cluster that most of
    the user's newest three items are of.  Histories are drawn anew for each row, some are empty, some long."""
    draw = np.random.default_rng(seed)
    item, user = draw.integers(0, ITEMS, rows), draw.integers(0, 60, rows)
    hour = draw.integers(0, 24, rows)
    lengths = np.minimum(draw.geometric(1 / 4, rows) - 1, 9)
    seen, kinds, ages, clicks, likes = [], [], [], [], []
    for n, candidate in zip(lengths, item, strict=True):
        taste = draw.integers(CLUSTERS)
        past = draw.integers(0, ITEMS, n)
        newest = draw.integers(0, ITEMS // CLUSTERS, 3) * CLUSTERS + taste
        past[-3:] = newest[: min(3, n)] if n else past[-3:]
        same = n > 0 and candidate % CLUSTERS == taste
        seen.append([f"i{i}" for i in past])
        kinds.append([("view", "buy")[k] for k in draw.integers(0, 2, n)])
        ages.append(np.sort(draw.integers(1, 10**6, n))[::-1].astype(float).tolist())
        clicks.append(int(draw.random() < (0.9 if same else 0.1)))
        likes.append(int(draw.random() < (0.7 if same else 0.3)))
    return pd.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in item],
            "hour": hour,
            "time": 1_700_000_000 + np.sort(draw.integers(0, 10**6, rows)),
            "clicked": seen,
            "clicked_kind": kinds,
            "clicked_age": ages,
            "click": clicks,
            "like": likes,
        }
    )


RUN = """
name: histories
data: {log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}
schema:
  user: user_id
  item: item_id
  time: time
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: hour, group: context, embedding_dim: 4}
    - {name: item_id, group: item, embedding_dim: 8}
    - {name: clicked, group: user, kind: history, of: item_id, max_length: 6}
    - {name: clicked_kind, group: user, kind: history, beside: clicked, embedding_dim: 4}
    - {name: clicked_age, group: user, kind: history, beside: clicked, encoding: log_bucket, embedding_dim: 8}
  tasks:
    - {name: click, kind: binary}
    - {name: like, kind: binary}
model:
  trunk: {kind: shared_bottom, expert_layers: [32]}
  tower_layers: [16]
  cross_layers: 1
optimizers:
  tables: {kind: adagrad, lr: 0.2, init_scale: 0.5}
  dense: {lr: 0.02}
training: {epochs: 3, batch_size: 64, eval_batch_size: 200, warmup_steps: 5, patience: 0}
fusion: {weights: {click: 1, like: 1}}
"""
