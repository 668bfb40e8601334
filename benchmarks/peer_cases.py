"""What the contenders of `peers.py` train on: the cases' sizes, and their rows as Parquet files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 65_536
VAL_ROWS = 16_384


@dataclass(frozen=True)
class Case:
    """Sizes of data and model, the same for all contenders.

    Args:
        rows: of the training file; one pass is made over it.
        features: ids, one a row each.
        table_rows: of each feature's table.
        dim: of all tables.
        warmup_steps: that do not count.
        normed: whether experts normalise what they compute.
    """

    name: str
    rows: int
    features: int
    table_rows: int
    dim: int
    tasks: int
    experts: int
    expert_layers: tuple[int, ...]
    tower_layers: tuple[int, ...]
    batch_size: int = 4096
    warmup_steps: int = 10
    normed: bool = True

    @property
    def columns(self) -> list[str]:
        """Of the ids."""
        return [f"id_{i}" for i in range(self.features)]

    @property
    def labels(self) -> list[str]:
        """Of the binary tasks."""
        return [f"task_{t}" for t in range(self.tasks)]

    @property
    def steps(self) -> int:
        """Of one pass; the last one may have fewer rows."""
        return -(-self.rows // self.batch_size)

    def sized(self, rows: int | None = None, table_rows: int | None = None) -> Case:
        """The case in another size."""
        return replace(self, rows=rows or self.rows, table_rows=table_rows or self.table_rows)


CASES = {
    case.name: case
    for case in (
        # As the census-income data that the multi-task literature begins with.
        Case("small", 200_000, 30, 100, 8, 2, 8, (16,), (8,), batch_size=1024),
        Case("middle", 1_000_000, 5, 150_000, 16, 3, 4, (256, 128, 64), (32,)),
        # Products and little else, of which bf16 has most.
        Case("plain", 1_000_000, 5, 150_000, 16, 3, 4, (256, 128, 64), (32,), normed=False),
        # One table of 10 million rows and little else: whoever touches all of it in a step shows.
        Case("large", 100_000, 1, 10_000_000, 64, 3, 4, (256, 128, 64), (32,), warmup_steps=4),
        # The middle one with fewer tables, so that they may be of any size; see GROWING.
        Case("growing", 200_000, 2, 100_000, 16, 3, 4, (256, 128, 64), (32,)),
    )
}
GROWING = (100_000, 1_000_000, 10_000_000, 30_000_000)  # rows of each of its tables


def files_of(case: Case, folder: Path) -> tuple[Path, Path]:
    """The training file and the validation file, written where they are not there yet."""
    size = f"{case.rows}x{case.features}x{case.table_rows}x{case.tasks}"
    train, val = folder / f"train-{size}.parquet", folder / f"val-{size}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows, seed in ((train, case.rows, 1), (val, VAL_ROWS, 2)):
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")  # two runs may write it at once
            try:
                with pq.ParquetWriter(unfinished, _schema(case)) as writer:
                    for table in _tables(case, rows, seed):
                        writer.write_table(table, row_group_size=ROW_GROUP)
                unfinished.rename(path)
            finally:  # on a full disk, what there is of it is in the way
                unfinished.unlink(missing_ok=True)
    return train, val


def _schema(case: Case) -> pa.Schema:
    return pa.schema([(c, pa.int64()) for c in case.columns] + [(c, pa.int8()) for c in case.labels])


def _tables(case: Case, rows: int, seed: int) -> Iterator[pa.Table]:
    """Ids, the small ones more often, and labels whose odds are a sum of what each id adds to each task."""
    draw = np.random.default_rng(seed)
    for start in range(0, rows, ROW_GROUP):
        n = min(ROW_GROUP, rows - start)
        ids = (case.table_rows * draw.random((case.features, n)) ** 3).astype(np.int64)
        columns = [pa.array(of) for of in ids]
        for task in range(case.tasks):
            logit = sum(_effects(of, feature, task) for feature, of in enumerate(ids))
            odds = 1 / (1 + np.exp(1.0 + 0.5 * task - logit * np.sqrt(3 / case.features)))
            columns.append(pa.array((draw.random(n) < odds).astype(np.int8)))
        yield pa.Table.from_arrays(columns, schema=_schema(case))


def _effects(ids: np.ndarray, feature: int, task: int) -> np.ndarray:
    """Uniform in ±1, the same for the same id; half of it is common to the tasks."""

    def uniform(salt: int) -> np.ndarray:
        x = (ids.astype(np.uint64) + np.uint64(salt * 0x9E3779B9 + 1)) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(29)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(32)
        return x.astype(np.float64) / 2.0**63 - 1

    return 0.5 * uniform(1000 * feature) + 0.5 * uniform(1000 * feature + 1 + task)
