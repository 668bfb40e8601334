"""Histories and next labels of whole logs against pandas: in memory, prepared, streamed, cut for two ranks."""

import datetime
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from mtcl_torchrec.config import load_run
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.prepare import prepare_files
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.splits import load_splits

MOST, ITEMS, ROWS = 3, 9, 64
RUN = f"""
name: oracle
data: {{log: log.parquet, val_fraction: 0.25, test_fraction: 0.25}}
schema:
  user: who
  item: what
  time: at
  features:
    - {{name: who, group: user, embedding_dim: 4}}
    - {{name: what, group: item, encoding: index, vocabulary_size: {ITEMS}, embedding_dim: 4}}
    - {{name: row, group: context, encoding: index, vocabulary_size: {ROWS}, embedding_dim: 4}}
    - {{name: seen, group: user, kind: history, of: what, max_length: {MOST}}}
    - {{name: how, group: user, kind: history, beside: seen, encoding: index, vocabulary_size: 3, embedding_dim: 4}}
    - {{name: ago, group: user, kind: history, beside: seen, encoding: log_bucket, embedding_dim: 4}}
  tasks:
    - {{name: click, kind: binary}}
    - {{name: next, kind: multiclass, num_classes: 4, inputs: [user, context]}}
histories: {{feature: seen, where: [click, like], beside: {{how: [like, click]}}}}
next_labels: {{column: next, of: tag, where: click}}
fusion: {{weights: {{click: 1}}}}
"""


def log(seed):
    """Rows in any order, many of them of one moment, some of nobody or of nothing."""
    draw = np.random.default_rng(seed)
    n = int(draw.integers(20, ROWS))

    def column(*values):
        return [values[i] for i in draw.integers(0, len(values), n)]

    frame = pd.DataFrame(
        {
            "row": range(n),
            "who": column("ann", "bob", "cy", None),
            "what": pd.array(column(*range(1, ITEMS), None), dtype="Int64"),
            "at": draw.integers(0, 20, n),
            "tag": pd.array(column(0, 1, 3, None), dtype="Int64"),
            "click": column(0, 1),
            "like": np.array(column(0, 1, None), float),
        }
    )
    return frame.assign(at=pd.to_datetime(frame["at"], unit="s")) if seed % 2 else frame


def wanted_history(row, train):
    """By a filter and a sort; of one moment, the events are in the order of the log, which is sorted by time."""
    past = train[(train["who"] == row.who) & (train["at"] < row.at) & train["what"].notna()]
    past = past[(past["click"] > 0) | (past["like"] > 0)].sort_values("at", kind="stable").tail(MOST)
    gone = row.at - past["at"]
    seconds = gone.dt.total_seconds() if isinstance(row.at, datetime.datetime) else gone
    return (
        past["what"].tolist(),
        np.where(past["like"] > 0, 1, 2).tolist(),
        [int(s + 1).bit_length() for s in seconds],
    )


def wanted_label(row, split):
    later = split[(split["who"] == row.who) & (split["at"] > row.at) & (split["click"] > 0)]
    first = later.sort_values("at", kind="stable")["tag"].head(1).tolist()
    return first[0] if first and not pd.isna(first[0]) else None


def found(batches):
    """Row of the log -> its lists and its label; and how often each row was met."""
    out, met = {}, Counter()
    for batch in batches:
        sparse = batch.sparse_features
        lists = [
            [part.tolist() for part in sparse[f].values().split(sparse[f].lengths().tolist())]
            for f in ("row", "seen", "how", "ago")
        ]
        for (row, *history), label in zip(zip(*lists, strict=True), batch.labels[:, 1].tolist(), strict=True):
            if row:  # a rank without a row left has a blank one
                out[row[0]] = (*history, None if np.isnan(label) else int(label))
                met[row[0]] += 1
    return out, met


def split_of(run):
    return load_splits(run, Preprocessor(run.data_schema, (), run.histories, run.next_labels), say=lambda _: None)


def batches_of(splits, ranks=1):
    """Of the training split, those of all ranks."""
    return [
        batch
        for rank in range(ranks)
        for batch in splits.train.batches(Position(), rank=rank, world_size=ranks, batch_size=3)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_whole_logs_are_those_of_pandas(tmp_path, seed):
    frame = log(seed)
    frame.to_parquet(tmp_path / "log.parquet")
    (tmp_path / "run.yaml").write_text(RUN)
    run = load_run(tmp_path / "run.yaml")
    direct = split_of(run)
    later = {name: set(rows.frame["row"]) for name, rows in direct.raw.items()}
    kept = frame.sort_values("at", kind="stable")
    parts = {name: kept[kept["row"].isin(later[name])] for name in ("val", "test")}
    train = parts["train"] = kept[~kept["row"].isin(later["val"] | later["test"])]
    assert train["at"].max() < parts["val"]["at"].min() <= parts["val"]["at"].max() < parts["test"]["at"].min()
    wanted = {
        part: {row.row: (*wanted_history(row, train), wanted_label(row, rows)) for row in rows.itertuples()}
        for part, rows in parts.items()
    }
    run.data.window = 5  # rows of a row group
    prepare_files(run, tmp_path / "ready", lambda _: None)
    ready = load_run(tmp_path / "ready" / "run.yaml")
    prepared = split_of(ready)
    ready.data.stream, ready.data.window, ready.data.workers = True, 5, 2
    for splits in (direct, prepared, split_of(ready)):
        for ranks in (1, 2):
            got, met = found(batches_of(splits, ranks))
            assert got == wanted["train"]
            assert set(met.values()) == {1}
        for part in ("val", "test"):
            assert found([splits.encoded[part].batch()])[0] == wanted[part]
