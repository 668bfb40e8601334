"""A small log of a made-up shop, in which who buys what follows from the columns."""

import numpy as np
import pandas as pd

GENRES = ["drama", "crime", "poetry", "travel"]


def log(rows: int = 3000, seed: int = 0) -> pd.DataFrame:
    """Events with text ids, a list column, numbers with gaps, and three labels: click, buy (if clicked), stars."""
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, 40, rows), draw.integers(0, 60, rows)
    genre, hour = item % 4, draw.integers(0, 24, rows)
    likes = user % 4
    logit = 4.0 * (genre == likes) - 2.0 + 2.5 * (hour > 15)
    click = (draw.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    buy = click * (draw.random(rows) < 0.1 + 0.8 * (item % 3 == 0))
    return pd.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "product_id": [f"p{i}" for i in item],
            "genre": [GENRES[g] for g in genre],
            "topics": [[GENRES[g], "book"] if g % 2 else [GENRES[g]] for g in genre],
            "price": np.where(item % 7 == 0, np.nan, 5.0 + item),
            "age": 20.0 + user,
            "hour": hour,
            "time": 1_700_000_000 + np.sort(draw.integers(0, 10**6, rows)),
            "click": click,
            "buy": buy,
            "stars": np.where(buy == 1, 1.0 + 4 * (genre == likes), np.nan),
        }
    )


RUN = """
name: shop
data: {log: log.parquet, val_fraction: 0.15, test_fraction: 0.15}
schema:
  user: user_id
  item: product_id
  time: time
  features:
    - {name: user_id, group: user, embedding_dim: 8}
    - {name: product_id, group: item, embedding_dim: 8}
    - {name: genre, group: item, embedding_dim: 4}
    - {name: topics, group: item, kind: bag, embedding_dim: 4, pooling: sum}
    - {name: price, group: item, kind: dense, transform: log}
    - {name: age, group: user, kind: dense}
    - {name: hour, group: context, embedding_dim: 4}
  tasks:
    - {name: click, kind: binary}
    - {name: buy, kind: binary, mask: click, weight: 0.5}
    - {name: taste, kind: multiclass, label: genre, item_class: genre, mask: click, inputs: [user, context]}
    - {name: stars, kind: regression, loss: huber, weight: 0.2}
statistics:
  keys: [user_id, [user_id, genre]]
  outcomes: [click]
model:
  trunk: {kind: mmoe, num_experts: 3, expert_layers: [16], gate_dropout: 0.1}
  tower_layers: [8]
  cross_layers: 1
optimizers:
  tables: {kind: rowwise_adagrad, lr: 0.1}
  dense: {lr: 0.01}
training: {epochs: 4, batch_size: 32, eval_batch_size: 100, warmup_steps: 5, patience: 0}
fusion: {weights: {click: 1, buy: 3, taste: 0.5, stars: 0.5}}
"""
