"""A run's statistics, histories and next labels computed once and written beside its data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mtcl_torchrec.config import DataConfig, HistoryConfig, NextLabelConfig, RunConfig, StatisticsConfig, dump_run
from mtcl_torchrec.data.missing_columns import explained
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, read_splits
from mtcl_torchrec.schema import ConfigError

ROW_GROUP = 131_072  # rows; the least that a stream reads at once


def prepare_files(run: RunConfig, out: Path, say: Callable[[str], None]) -> None:
    """Compute a run's statistics, histories and next labels once: its splits with their columns, what was learnt, and a
    YAML that uses both.

    Args:
        out: a new or empty folder.
        say: called with a line for each key and each file.

    Raises:
        ConfigError: there is nothing to prepare, or `out` is not empty.
    """
    blocks: list[StatisticsConfig | HistoryConfig | NextLabelConfig]
    blocks = [*run.statistics, *run.histories, *run.next_labels]
    if not blocks:
        raise ConfigError("nothing to prepare, the run has no statistics, no histories and no next_labels")
    if any(block.prepared for block in blocks):
        raise ConfigError("the data of this run is prepared already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    preprocessor = Preprocessor(run.data_schema, run.statistics, run.histories, run.next_labels)
    with explained(run.data_schema):
        splits = read_splits(run.data, preprocessor.columns(), run.data_schema.time)
    splits = {name: preprocessor.with_next_labels(rows) for name, rows in splits.items()}
    prepared = {"train": preprocessor.fit_statistics(splits["train"], lambda key: say(f"  counted per {key}"))}
    for history in preprocessor.histories:
        say(f"  built {history.feature.name} by {history.by}")
    prepared |= {name: preprocessor.with_statistics(rows) for name, rows in splits.items() if name != "train"}
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in prepared.items():
        _write(rows, out / f"{name}.parquet", min(run.data.window, ROW_GROUP))
        say(f"{name}: {len(rows):,} rows, {rows.frame.shape[1] + len(rows.earlier)} columns")
    ready = run.model_copy(deep=True)
    streamed = (
        run.data.model_dump(include={"stream", "window", "workers"}, exclude_unset=True) if run.data.stream else {}
    )
    ready.data_schema = ready.data_schema.with_files(lambda path: os.path.relpath(path, out))
    ready.data = DataConfig(**{name: [f"{name}.parquet"] for name in prepared}, **streamed)
    for i, (block, config) in enumerate(zip(preprocessor.statistics, ready.statistics, strict=True)):
        block.save(out / f"statistics_{i}")
        config.prepared = f"statistics_{i}"
    for i, (history, built) in enumerate(zip(preprocessor.histories, ready.histories, strict=True)):
        history.save(out / f"history_{i}")
        built.prepared = f"history_{i}"
    for label in ready.next_labels:
        label.prepared = True
    (out / "run.yaml").write_text(dump_run(ready), encoding="utf-8")


def _write(rows: Rows, path: Path, row_group: int) -> None:
    """Rows as Parquet; of the histories, the lists of one row group are in memory."""
    plain = pa.Table.from_pandas(rows.frame, preserve_index=False).replace_schema_metadata(None)
    lists = {column: earlier.in_parts(row_group) for column, earlier in rows.earlier.items()}
    types = [(column, earlier.lists(0, 0).type) for column, earlier in rows.earlier.items()]
    with pq.ParquetWriter(path, pa.schema([*plain.schema, *(pa.field(*named) for named in types)])) as writer:
        for start in range(0, len(rows), row_group):
            part = plain.slice(start, row_group)
            for column, parts in lists.items():
                part = part.append_column(column, next(parts))
            writer.write_table(part, row_group_size=row_group)
