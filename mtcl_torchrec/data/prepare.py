"""A run's statistics computed once and written beside its data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mtcl_torchrec.config import DataConfig, RunConfig, dump_run
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import read_splits
from mtcl_torchrec.schema import ConfigError

ROW_GROUP = 131_072  # rows; the least that a stream reads at once


def prepare_files(run: RunConfig, out: Path, say: Callable[[str], None]) -> None:
    """Compute a run's statistics once: its splits with their columns, the statistics, and a YAML that uses both.

    Args:
        out: a new or empty folder.
        say: called with a line for each key and each file.

    Raises:
        ConfigError: there is nothing to prepare, or `out` is not empty.
    """
    if not run.statistics:
        raise ConfigError("nothing to prepare, the run has no statistics")
    if any(block.prepared is not None for block in run.statistics):
        raise ConfigError("the data of this run is prepared already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    preprocessor = Preprocessor(run.data_schema, run.statistics)
    splits = read_splits(run.data, preprocessor.columns(), run.data_schema.time)
    prepared = {"train": preprocessor.fit_statistics(splits["train"], lambda key: say(f"  counted per {key}"))}
    prepared |= {name: preprocessor.with_statistics(rows) for name, rows in splits.items() if name != "train"}
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in prepared.items():
        rows.frame.to_parquet(out / f"{name}.parquet", index=False, row_group_size=min(run.data.window, ROW_GROUP))
        say(f"{name}: {len(rows):,} rows, {rows.frame.shape[1]} columns")
    ready = run.model_copy(deep=True)
    streamed = (
        run.data.model_dump(include={"stream", "window", "workers"}, exclude_unset=True) if run.data.stream else {}
    )
    ready.data_schema = ready.data_schema.with_files(lambda path: os.path.relpath(path, out))
    ready.data = DataConfig(**{name: [f"{name}.parquet"] for name in prepared}, **streamed)
    for i, (block, config) in enumerate(zip(preprocessor.statistics, ready.statistics, strict=True)):
        block.save(out / f"statistics_{i}")
        config.prepared = f"statistics_{i}"
    (out / "run.yaml").write_text(dump_run(ready), encoding="utf-8")
