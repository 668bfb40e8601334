"""The splits of a run: rows to train on, in memory or as a stream, and encoded rows to be judged by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mtcl_torchrec.config import DataConfig, RunConfig
from mtcl_torchrec.data.base_rates import BaseRates, LabelTotals, stream_totals
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.missing_columns import explained
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.popularity import Popularity, known_items
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, find_files, read_rows, read_splits
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.data.training_rows import MemoryRows, TrainingRows
from mtcl_torchrec.data.world_windows import WorldWindows, recorded_by, world_of, world_split
from mtcl_torchrec.schema import ConfigError

QUIET_SECONDS = 20.0  # what takes longer says how far it is
SAMPLE_ROWS = 200_000  # of a world, from which scales and base rates are learnt

Say = Callable[[str], None]


@dataclass(frozen=True)
class Splits:
    """What a run trains on and is judged by.

    Args:
        train: the training split.
        raw: split (val, test) -> its rows as they were read.
        encoded: the same splits, encoded.
        catalogue: what the log says of users and items, or None: of a stream, there is none, and items are
            counted while it goes by; see `mtcl_torchrec.training.counted_items`.
        base_rates: how often each event happens in the training split; see `mtcl_torchrec.data.base_rates`.
    """

    train: TrainingRows
    raw: dict[str, Rows]
    encoded: dict[str, EncodedRows]
    catalogue: Catalogue | None = None
    base_rates: BaseRates = field(default_factory=dict)


def load_splits(
    run: RunConfig, preprocessor: Preprocessor, *, grown_from: FeatureEncoder | None = None, say: Say
) -> Splits:
    """Read a run's splits and fit its preprocessing; every rank of a process group calls this.

    Args:
        run: its paths are taken as they are.
        preprocessor: is fitted on the training split.
        grown_from: an earlier run's encoder, whose rows and scales stay as they are.
        say: called with lines for the user.

    Raises:
        ConfigError: what is asked for cannot be streamed, or a file to be judged by is one to be trained on.
        DataError: the data does not fit the schema.
    """
    _refuse_training_files(run.data)
    if run.data.synthetic is not None:
        return _synthetic(run, preprocessor, grown_from, say)
    if run.data.stream:
        return _streamed(run, preprocessor, grown_from, say)
    return _in_memory(run, preprocessor, grown_from, say)


def _refuse_training_files(data: DataConfig) -> None:
    """A model looks perfect on the rows that it was trained on, and stops too late."""
    training = {file.resolve() for file in find_files(data.train)} if data.train else set()
    for split, paths in (("val", data.val), ("test", data.test)):
        same = [file for file in find_files(paths) if file.resolve() in training] if paths and training else []
        if same:
            raise ConfigError(
                f"data.{split}: {same[0]} is a file of data.train, too, and rows that the model was trained on prove "
                "nothing: name other rows, or a log that has a time column, which is split by it"
            )


def _in_memory(run: RunConfig, preprocessor: Preprocessor, grown_from: FeatureEncoder | None, say: Say) -> Splits:
    columns = list(dict.fromkeys([*preprocessor.columns(), *run.evaluation.columns()]))
    with explained(run.data_schema):
        raw = read_splits(run.data, columns, run.data_schema.time)
    raw = {name: preprocessor.with_next_labels(rows) for name, rows in raw.items()}
    say("read " + ", ".join(f"{len(rows):,} rows of {name}" for name, rows in raw.items()))
    keys = sum(len(block.keys) for block in run.statistics if block.prepared is None)
    if keys:
        say(f"counting what came before each row, by {keys} key{'s' if keys > 1 else ''}")
    building = sum(block.prepared is None for block in run.histories)
    if building:
        say(f"building what came before each row, {building} histor{'ies' if building > 1 else 'y'}")
    started = time.monotonic()

    def progress(key: str) -> None:
        if time.monotonic() - started > QUIET_SECONDS:
            say(f"  {key}")

    train = preprocessor.fit(raw["train"], progress, grown_from=grown_from)
    for line in filter(None, (history.doubtful_unit() for history in preprocessor.histories)):
        say(line)
    later = {name: preprocessor.conform(rows) for name, rows in raw.items() if name != "train"}
    catalogue = None
    if run.data_schema.user is not None and run.data_schema.item is not None:
        catalogue = preprocessor.catalogue(raw["train"], later["val"])
        items = known_items(run.data_schema, raw["train"].frame[run.data_schema.item])
        catalogue.rates = Popularity.count(
            items, preprocessor.encoder.resolved_tasks(), train.labels.numpy(),
            None if train.weights is None else train.weights.numpy(),
        )  # fmt: skip
    memory = MemoryRows(train, seed=run.training.seed, id_dropout=run.training.id_dropout)
    totals = LabelTotals(preprocessor.encoder.resolved_tasks())
    totals.add((train.labels, train.weights))
    return _with_later(memory, later, preprocessor, totals, catalogue)


def _streamed(run: RunConfig, preprocessor: Preprocessor, grown_from: FeatureEncoder | None, say: Say) -> Splits:
    assert run.data.train is not None
    with explained(run.data_schema):
        files = ParquetFiles.open(run.data.train, preprocessor.columns(), window_rows=run.data.window)
    say(f"{files.rows:,} rows of train in {len(files.windows()):,} windows; one pass to learn from them")
    said = time.monotonic()

    def progress(share: float) -> None:
        nonlocal said
        if time.monotonic() - said > QUIET_SECONDS:
            said = time.monotonic()
            say(f"  {share:.0%} read")

    train = preprocessor.fit_stream(
        files,
        seed=run.training.seed,
        workers=run.data.workers,
        id_dropout=run.training.id_dropout,
        grown_from=grown_from,
        progress=progress,
    )
    encoder = preprocessor.encoder
    totals = stream_totals(
        files.only(encoder.schema.label_columns()), encoder.resolved_tasks(), encoder.labels, workers=run.data.workers
    )
    named = {"val": run.data.val, "test": run.data.test}
    columns = list(dict.fromkeys([*preprocessor.columns(), *run.evaluation.columns()]))
    with explained(run.data_schema):
        later = {
            name: preprocessor.conform(read_rows(paths, columns)) for name, paths in named.items() if paths is not None
        }
    say("read " + ", ".join(f"{len(rows):,} rows of {name}" for name, rows in later.items()))
    return _with_later(train, later, preprocessor, totals)


def _synthetic(run: RunConfig, preprocessor: Preprocessor, grown_from: FeatureEncoder | None, say: Say) -> Splits:
    config = run.data.synthetic
    assert config is not None
    if run.statistics:
        raise ConfigError("statistics are counted in memory: write the world to files with `mtcl synth` for them")
    if run.histories:
        raise ConfigError("histories are built in memory: write the world to files with `mtcl synth` for them")
    if run.next_labels:
        raise ConfigError("next_labels are found in memory: write the world to files with `mtcl synth` for them")
    world = world_of(config)
    sample = np.unique(np.linspace(0, config.rows - 1, min(config.rows, SAMPLE_ROWS)).astype(np.int64))
    as_of = recorded_by(config, world)
    sampled = Rows(world.rows(sample, as_of=as_of))
    preprocessor.learn(sampled, grown_from=grown_from)
    totals = LabelTotals(preprocessor.encoder.resolved_tasks())
    totals.add(preprocessor.encoder.labels(sampled))
    later = {name: world_split(config, name) for name in ("val", "test") if name == "val" or config.test_rows}
    say(f"world {config.world!r}: {config.rows:,} rows of train, generated on the way")
    if as_of is not None:
        say("train and val are the log as it was when val ended, with events yet to come; test is what came of it")
    source = WorldWindows(world, config.rows, run.data.window, as_of)
    train = StreamRows(
        source,
        preprocessor.encoder.encode,
        seed=run.training.seed,
        workers=run.data.workers,
        id_dropout=run.training.id_dropout,
    )
    return _with_later(train, later, preprocessor, totals)


def _with_later(
    train: TrainingRows,
    later: dict[str, Rows],
    preprocessor: Preprocessor,
    totals: LabelTotals,
    catalogue: Catalogue | None = None,
) -> Splits:
    encoded = {name: preprocessor.encode(rows) for name, rows in later.items()}
    return Splits(train, later, encoded, catalogue, totals.base_rates())
