"""What every baseline is given: the run's own rows, encoded as the run encodes them, and who met which item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.columns import ids_of
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, read_splits
from mtcl_torchrec.data.splits import Splits, load_splits
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.data.training_rows import MemoryRows
from mtcl_torchrec.evaluation.report import user_groups
from mtcl_torchrec.evaluation.supports import unsure_tasks
from mtcl_torchrec.schema import Schema, Task
from mtcl_torchrec.training.run_data import RunData

Say = Callable[[str], None]
UNKNOWN = -1  # a user or item that the training rows do not have


@dataclass(frozen=True)
class BaselineRows:
    """N rows of one split as arrays.

    Args:
        dense: (N, D) float32, standardised, statistics included.
        ids: feature -> (N,) int64 rows of its table, 0 for unknown.
        bags: feature -> (its values one after the other, (N,) how many each row has).
        labels: (N, T) float32 as the run learns them: NaN where missing or masked out, 0 in a chain where the event
            before did not happen.
        weights: (N, T) float32, or None where all are 1.
        users, items: (N,) int64 numbers of users and items, -1 where they are not in the training rows.
    """

    dense: np.ndarray
    ids: dict[str, np.ndarray]
    bags: dict[str, tuple[np.ndarray, np.ndarray]]
    labels: np.ndarray
    weights: np.ndarray | None
    users: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, encoded: EncodedRows, users: np.ndarray, items: np.ndarray) -> BaselineRows:
        """Encoded rows beside the numbers of their users and items."""
        single = [key for key in encoded.keys if key not in encoded.bags]
        bags = {}
        for key, bag in encoded.bags.items():
            values, lengths = bag.all()
            bags[key] = (values.numpy(), lengths.numpy())
        return cls(
            dense=encoded.dense.numpy(),
            ids={key: encoded.ids[:, i].numpy() for i, key in enumerate(single)},
            bags=bags,
            labels=encoded.labels.numpy(),
            weights=None if encoded.weights is None else encoded.weights.numpy(),
            users=users,
            items=items,
        )

    @property
    def known_items(self) -> pd.Series:
        """(N,) numbers of items, missing where they are not in the training rows."""
        return pd.Series(self.items).where(self.items != UNKNOWN)

    def at(self, positions: np.ndarray) -> BaselineRows:
        """The rows at `positions`, in their order."""
        bags = {}
        for key, (values, lengths) in self.bags.items():
            starts, kept = (np.cumsum(lengths) - lengths)[positions], lengths[positions]
            within = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
            bags[key] = (values[np.repeat(starts, kept) + within], kept)
        return BaselineRows(
            dense=self.dense[positions],
            ids={key: column[positions] for key, column in self.ids.items()},
            bags=bags,
            labels=self.labels[positions],
            weights=None if self.weights is None else self.weights[positions],
            users=self.users[positions],
            items=self.items[positions],
        )

    def labelled(self, column: int) -> np.ndarray:
        """Positions of the rows whose label of a task is known."""
        return np.flatnonzero(~np.isnan(self.labels[:, column]))


@dataclass
class BaselineData:
    """The splits of a run, for its baselines.

    Args:
        train: training rows, a sample of them where there are more than asked for.
        held_out: val, and test where there is one.
        encoded, raw: the same splits as the model takes them, and as they were read.
        preprocessor: fitted on the whole training split.
        tasks: the run's tasks, classes and scales known.
        catalogue: of a run in memory with user and item.
        popularity: by number of the item, of the whole training split, where that is in memory, or else of the sample.
        total: rows of the whole training split.
        splits: as they were loaded, for networks.
        unsure: of the validation split, see `mtcl_torchrec.evaluation.supports.unsure_tasks`.
        designs: matrices that several trials share, by whoever makes them.
    """

    train: BaselineRows
    held_out: dict[str, BaselineRows]
    encoded: dict[str, EncodedRows]
    raw: dict[str, Rows]
    preprocessor: Preprocessor
    tasks: tuple[Task, ...]
    catalogue: Catalogue | None
    popularity: Popularity
    total: int
    splits: Splits
    unsure: Mapping[str, str] = field(default_factory=dict)
    designs: dict[Any, Any] = field(default_factory=dict)

    @property
    def encoder(self) -> FeatureEncoder:
        """Knows tables, scales and vectors."""
        return self.preprocessor.encoder

    def column(self, task: Task) -> int:
        """The task's column in the labels."""
        return [t.name for t in self.tasks].index(task.name)

    @property
    def num_users(self) -> int:
        """Users in the training rows."""
        return int(self.train.users.max(initial=UNKNOWN)) + 1

    @property
    def num_items(self) -> int:
        """Items in the training rows."""
        return int(self.train.items.max(initial=UNKNOWN)) + 1


def load_data(run: RunConfig, *, max_rows: int, seed: int, say: Say, loaded: RunData | None = None) -> BaselineData:
    """Read the splits of a run as its training does: same rows, features, statistics and labels.

    Args:
        run: its paths are taken as they are.
        max_rows: a training split that has more is sampled: rows drawn one by one from one in memory, whole windows
            from one that is streamed or generated.
        seed: of the sample.
        say: called with lines for the user.
        loaded: what `mtcl_torchrec.training.run_data.load_data` read for this configuration; None reads it.

    Raises:
        DataError: the data does not fit the schema.
    """
    if loaded is None:
        preprocessor = Preprocessor(run.data_schema, run.statistics, run.histories, run.next_labels)
        splits = load_splits(run, preprocessor, say=say)
    else:
        preprocessor, splits = loaded.preprocessor, loaded.splits
    total = splits.train.rows_per_epoch
    if total > max_rows:
        say(f"the training split has {total:,} rows: baselines learn from a sample of {max_rows:,} (--max-rows)")
    if isinstance(splits.train, MemoryRows):
        encoded, keys = splits.train.rows, _keys_in_memory(run, preprocessor)
    else:
        assert isinstance(splits.train, StreamRows)
        encoded, keys = _sampled(run, splits.train, preprocessor, max_rows, seed)
    frames = [keys, *(rows.frame for rows in splits.raw.values())]
    sizes = [len(encoded), *(len(rows) for rows in splits.raw.values())]
    users = _numbered(run.data_schema, run.data_schema.user, frames, sizes)
    items = _numbered(run.data_schema, run.data_schema.item, frames, sizes)
    train, tasks = BaselineRows.of(encoded, users[0], items[0]), preprocessor.encoder.resolved_tasks()
    popularity = Popularity.count(train.known_items, tasks, train.labels, train.weights)
    if len(train) > max_rows:
        kept = np.random.default_rng(seed).choice(len(train), max_rows, replace=False)
        train = train.at(np.sort(kept))
    held_out = {
        name: BaselineRows.of(rows, users[i], items[i]) for i, (name, rows) in enumerate(splits.encoded.items(), 1)
    }
    return BaselineData(
        train,
        held_out,
        splits.encoded,
        splits.raw,
        preprocessor,
        tasks,
        splits.catalogue,
        popularity,
        total,
        splits,
        unsure_tasks(tasks, held_out["val"].labels, user_groups(run.data_schema, splits.raw["val"].frame)),
    )


def _key_columns(schema: Schema) -> list[str]:
    return [column for column in (schema.user, schema.item) if column is not None]


def _keys_in_memory(run: RunConfig, preprocessor: Preprocessor) -> pd.DataFrame:
    """Users and items of the training split in its order, which encoding has left behind."""
    columns = list(dict.fromkeys(_key_columns(run.data_schema)))
    if not columns:
        return pd.DataFrame()
    more = [run.data_schema.time] if run.data.log is not None and run.data_schema.time is not None else []
    rows = read_splits(run.data, list(dict.fromkeys([*columns, *more])), run.data_schema.time)["train"]
    return preprocessor.conform(rows).frame[columns]


def _sampled(
    run: RunConfig, train: StreamRows, preprocessor: Preprocessor, max_rows: int, seed: int
) -> tuple[EncodedRows, pd.DataFrame]:
    """Windows in an order that follows from the seed, until there are enough rows, and their users and items."""
    source = train.source
    if run.data.train is not None:  # the stream reads no user or item that is no feature
        source = ParquetFiles.open(run.data.train, preprocessor.columns(), window_rows=run.data.window)
    parts, keys, missing = list[EncodedRows](), list[pd.DataFrame](), max_rows
    for window in source.windows((seed, 0)):
        rows = source.read(window)
        if len(rows) > missing:
            drawn = np.random.default_rng((seed, 1)).choice(len(rows), missing, replace=False)
            rows = rows.at(np.sort(drawn))
        parts.append(train.encode(rows))
        keys.append(preprocessor.conform(rows).frame[_key_columns(run.data_schema)])
        missing -= len(rows)
        if missing <= 0:
            break
    return EncodedRows.cat(parts), pd.concat(keys, ignore_index=True)


def _numbered(
    schema: Schema, column: str | None, frames: Sequence[pd.DataFrame], sizes: Sequence[int]
) -> list[np.ndarray]:
    """Numbers of one column's values: (N,) of the first frame, and of each later one with -1 for a new value."""
    if column is None:
        return [np.full(size, UNKNOWN) for size in sizes]
    # Numbered in the order in which they are met: those of the training rows come first.
    parts = [ids_of(Rows(frame), column) for frame in frames]
    codes = pd.factorize(pd.concat(parts, ignore_index=True))[0].astype(np.int64)
    found = np.split(codes, np.cumsum(sizes)[:-1])
    feature = next((f for f in schema.sparse_features if f.kind == "id" and f.rows_from == column), None)
    if feature is not None and feature.encoding == "index":  # whose 0 says unknown: many users, or items, in one
        for part, of in zip(parts, found, strict=True):
            of[(part == 0).to_numpy(dtype=bool, na_value=False)] = UNKNOWN
    known = np.unique(found[0][found[0] >= 0])
    number = np.full(int(codes.max(initial=0)) + 2, UNKNOWN)  # its last is that of code -1, a missing value
    number[known] = np.arange(len(known))
    return [number[of] for of in found]
