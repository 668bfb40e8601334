"""Raw rows to encoded rows: causal statistics first, then vocabularies and scales; fitted once, stored with the
model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from mtcl_torchrec.config import HistoryConfig, NextLabelConfig, StatisticsConfig
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.columns import as_text, canonical
from mtcl_torchrec.data.earlier import Earlier
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.histories import History
from mtcl_torchrec.data.next_labels import with_next_labels
from mtcl_torchrec.data.parquet import ParquetFiles
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.statistics import CausalStatistics, Progress, quiet
from mtcl_torchrec.data.stream import StreamRows
from mtcl_torchrec.schema import ConfigError, DataError, Group, Schema, nearest


class Preprocessor:
    """Everything learnt from the training split that turns raw rows into `EncodedRows`.

    Args:
        schema: features and tasks as declared.
        statistics: what to count.
        histories: what to list.
        next_labels: labels to make of what comes next.

    Raises:
        ConfigError: a statistics key whose feature group is not known, a column produced twice, or a history that
            is not built by a user's column.

    Example:
        >>> from mtcl_torchrec.schema import Feature, Task
        >>> schema = Schema(features=[Feature(name="u", group="user")], tasks=[Task.binary("click")], time="t")
        >>> preprocessor = Preprocessor(schema, [StatisticsConfig(keys=["u"], outcomes=["click"])])
        >>> train = pd.DataFrame({"u": ["a", "b", "a"], "t": [1, 2, 3], "click": [1, 0, 1]})
        >>> preprocessor.fit(Rows(train)).dense.shape  # count and rate
        torch.Size([3, 2])
    """

    def __init__(
        self,
        schema: Schema,
        statistics: Sequence[StatisticsConfig] = (),
        histories: Sequence[HistoryConfig] = (),
        next_labels: Sequence[NextLabelConfig] = (),
    ) -> None:
        self.declared = schema
        self.next_labels = list(next_labels)
        self.config = list(statistics)
        self.groups = _column_groups(schema, statistics)
        self.statistics = [_statistics(block, schema) for block in statistics]
        names = [c for block in self.statistics for c in block.columns()]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"statistics: {name} is computed twice")
        for feature in schema.features:
            if feature.name in names:
                raise ConfigError(f"feature {feature.name!r} has the name of a column that the statistics compute")
        self.histories = [_history(block, schema, self.groups) for block in histories]
        self.encoder = FeatureEncoder(schema)
        self._is_text: dict[str, bool] = {}

    @property
    def schema(self) -> Schema:
        """The declared schema with the statistics as further dense features."""
        return self.encoder.schema

    def columns(self, *, statistics: bool = True) -> list[str]:
        """The columns that must be read.

        Args:
            statistics: True for the splits of a run; False for other rows to be evaluated, whose statistics and
                histories are looked up.
        """
        built = {c for history in self.histories for c in history.columns()}
        prepared = {c for history in self.histories if history.config.prepared for c in history.columns()}
        there = prepared if statistics else set()
        columns = [f.rows_from for f in self.declared.features if f.rows_from not in built - there]
        columns += [c for history in self.histories for c in history.needs(events=statistics)]
        columns += [c for block in self.config for key in block.keys for c in key]
        columns += [c for c in (self.declared.user, self.declared.item) if c]
        # Nothing is trained on other rows: they need no reward.
        read = self.declared if statistics else self.declared.model_copy(update={"reward": None})
        made = [block for block in self.next_labels if not (statistics and block.prepared)]
        columns += [c for c in read.label_columns() if c not in [block.column for block in made]]
        columns += [c for b in made for c in (b.by or read.user, read.time, b.of, *b.where) if c is not None]
        if statistics:
            columns += [self.declared.time] if self.declared.time else []
            for block, computed in zip(self.config, self.statistics, strict=True):
                columns += computed.columns() if block.prepared is not None else [*block.outcomes, *block.given]
        return list(dict.fromkeys(columns))

    def fit(self, rows: Rows, progress: Progress = quiet, *, grown_from: FeatureEncoder | None = None) -> EncodedRows:
        """Learn from the training split and encode it, each row with what was known before it.

        Args:
            grown_from: see `FeatureEncoder.learn`.

        Raises:
            DataError: a column is missing or a value does not fit.
        """
        rows = self.learn(rows, progress, grown_from=grown_from)
        return self.encoder.encode(rows)

    def learn(self, rows: Rows, progress: Progress = quiet, *, grown_from: FeatureEncoder | None = None) -> Rows:
        """As `fit`, without encoding: the rows with the statistics' causal columns and the histories."""
        rows = self.fit_statistics(rows, progress)
        self.encoder = FeatureEncoder(self._whole_schema()).fit(rows, grown_from=grown_from)
        return rows

    def fit_stream(
        self,
        files: ParquetFiles,
        *,
        seed: int,
        workers: int = 1,
        id_dropout: Mapping[str, float] | None = None,
        grown_from: FeatureEncoder | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> StreamRows:
        """Learn from a training split that does not fit into memory; every rank of a process group calls this.

        Args:
            files: opened with `columns`.
            seed: of the shuffle and of dropped ids.
            workers: threads that read and encode ahead.
            id_dropout: see `StreamRows`.
            grown_from: see `FeatureEncoder.learn`.
            progress: called with the share of this rank's part that is read.

        Returns:
            The training rows, which are read and encoded while they are trained on.

        Raises:
            ConfigError: there are statistics or histories that were not prepared: they are made of all rows in order
                of time.
            DataError: a column is missing or a value does not fit.
        """
        if any(history.config.prepared is None for history in self.histories):
            raise ConfigError(
                "histories cannot be built in a stream: run `mtcl prepare` first, and train the run that it writes"
            )
        if any(not block.prepared for block in self.next_labels):
            raise ConfigError(
                "next_labels cannot be found in a stream: run `mtcl prepare` first, and train the run that it writes"
            )
        if any(block.prepared is None for block in self.config):
            raise ConfigError(
                "statistics cannot be counted in a stream: run `mtcl prepare` first, and train the run that it writes"
            )
        empty = files.empty().frame
        for column in self._keys():
            if pa.types.is_nested(files.schema.field(column).type):
                raise DataError(_holds_lists(files.name, column))
            self._is_text[column] = not pd.api.types.is_numeric_dtype(canonical(empty[column]))
        encoder = FeatureEncoder(self._whole_schema())
        self.encoder = encoder.fit_stream(files, workers=workers, grown_from=grown_from, progress=progress)
        return self.stream(files, seed=seed, workers=workers, id_dropout=id_dropout)

    def stream(
        self, files: ParquetFiles, *, seed: int, workers: int = 1, id_dropout: Mapping[str, float] | None = None
    ) -> StreamRows:
        """Training rows in files, for what was learnt from them before; see `fit_stream`."""
        files = files.only(self.encoder.columns())
        return StreamRows(files, self.encoder.encode, seed=seed, workers=workers, id_dropout=id_dropout)

    def _whole_schema(self) -> Schema:
        extra = [feature for block in self.statistics for feature in block.features(self.groups)]
        return self.declared.model_copy(update={"features": (*self.declared.features, *extra)})

    def fit_statistics(self, rows: Rows, progress: Progress = quiet) -> Rows:
        """The training rows with the statistics' causal columns and the histories, unless they have them already.

        Raises:
            DataError: a column of a key or history holds lists, or is not what it should be.
        """
        rows = self.with_next_labels(rows)
        for column in self._keys():
            if rows.frame[column].map(lambda v: hasattr(v, "__len__") and not isinstance(v, str)).any():
                raise DataError(_holds_lists(rows.name, column))
            self._is_text[column] = not pd.api.types.is_numeric_dtype(canonical(rows.frame[column]))
        computed = [
            block.fit_transform(rows.frame, progress)
            for block, config in zip(self.statistics, self.config, strict=True)
            if config.prepared is None
        ]
        earlier: dict[str, Earlier] = {}
        for history in self.histories:
            if history.config.prepared is None:
                earlier |= history.fit(rows)
        return rows.with_frame(pd.concat([rows.frame, *computed], axis=1), earlier)

    def redeclared(self, schema: Schema) -> Preprocessor:
        """The same, fitted as this is, for a schema that differs only in what no encoded row shows: widths of
        embeddings, weights of tasks and the like."""
        other = copy.copy(self)
        other.declared, other.encoder = schema, copy.copy(self.encoder)
        other.encoder.schema = other._whole_schema()
        return other

    def _keys(self) -> list[str]:
        """The columns whose values are compared with those of the training split."""
        columns = [self.declared.user, self.declared.item, *(c for b in self.config for key in b.keys for c in key)]
        columns += [c for history in self.histories for c in (history.by, history.item)]
        return [c for c in dict.fromkeys(columns) if c is not None]

    def conform(self, rows: Rows) -> Rows:
        """Later rows with users, items and keys in the kind (text or number) that the training split had.

        A file format may change it: ids that are text in Parquet are read from CSV as numbers.
        """
        changed = {}
        for column, is_text in self._is_text.items():
            values = canonical(rows.frame[column]) if column in rows.frame else None
            if values is not None and is_text == pd.api.types.is_numeric_dtype(values):
                changed[column] = as_text(values) if is_text else canonical(pd.to_numeric(values, errors="coerce"))
        return rows.with_frame(rows.frame.assign(**changed)) if changed else rows

    def encode(self, rows: Rows, *, with_labels: bool = True) -> EncodedRows:
        """Encode later rows; statistics and histories know what was known at the end of the training split."""
        rows = self.with_next_labels(rows) if with_labels else rows
        return self.encoder.encode(self.with_statistics(rows), with_labels=with_labels, with_rewards=False)

    def with_next_labels(self, rows: Rows) -> Rows:
        """The rows of one split with the labels that follow from what comes next, unless they have them already."""
        return with_next_labels(rows, self.next_labels, self.declared)

    def with_statistics(self, rows: Rows) -> Rows:
        """Later rows with the statistics' columns and the histories, unless they have them already.

        Raises:
            DataError: they have some lists of a history, and not those that stand beside it.
        """
        rows = self.conform(rows)
        there = set(rows.frame.columns)
        computed = [block.transform(rows.frame) for block in self.statistics if not set(block.columns()) <= there]
        earlier = dict(rows.earlier)
        for history in self.histories:
            given = there & set(history.columns())
            if not given:
                earlier |= history.before(rows)
            elif len(given) < len(history.columns()):
                lacking = next(c for c in history.columns() if c not in given)
                raise DataError(f"{rows.name}: no column {lacking!r} beside {min(given)!r}; give all of them, or none")
        return rows.with_frame(pd.concat([rows.frame, *computed], axis=1), earlier)

    def catalogue(self, train: Rows, later: Rows) -> Catalogue:
        """What a log says of users and items, their histories as of its end.

        Args:
            train, later: the training rows and those after it, as they were read and conform.

        Raises:
            ConfigError: the schema names no user or item column.
        """
        built = {c for history in self.histories for c in history.columns()}
        groups = {c: group for c, group in self.groups.items() if c not in built}
        catalogue = Catalogue.build(self.declared, groups, train.frame, later.frame)
        columns = list(dict.fromkeys(c for history in self.histories for c in history.needs()))
        log = Rows(pd.concat([train.frame[columns], later.frame[columns]], ignore_index=True)) if columns else train
        for history in self.histories:
            history.complete(catalogue, log)
        return catalogue

    def compare_rows(self) -> None:
        """From now on, say of later rows which request they belong to, as a fused score may need that was chosen after
        training: the user's, where the schema names no request.

        Raises:
            ConfigError: the schema names neither.
        """
        if self.declared.request_column is not None:
            return
        if self.declared.user is None:
            raise ConfigError("the fused score compares rows of one request: the schema names no request and no user")
        named = {"request": self.declared.user}
        self.declared = self.declared.model_copy(update=named)
        self.encoder.schema = self.encoder.schema.model_copy(update=named)

    def save(self, folder: Path, *, for_network: bool = False) -> None:
        """Store vocabularies, scales, vectors, codes, statistics and histories.

        Args:
            for_network: see `FeatureEncoder.save`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save(folder / "encoder", for_network=for_network)
        (folder / "keys.json").write_text(json.dumps(self._is_text, indent=1))
        for i, block in enumerate(self.statistics):
            block.save(folder / f"statistics_{i}")
        for i, history in enumerate(self.histories):
            history.save(folder / f"history_{i}")

    @classmethod
    def load(
        cls,
        folder: Path,
        schema: Schema,
        statistics: Sequence[StatisticsConfig],
        histories: Sequence[HistoryConfig] = (),
        next_labels: Sequence[NextLabelConfig] = (),
    ) -> Preprocessor:
        """Read what `save` wrote."""
        # What was prepared elsewhere is stored with the run like all else.
        self = cls(
            schema,
            [block.model_copy(update={"prepared": None}) for block in statistics],
            [block.model_copy(update={"prepared": None}) for block in histories],
            [block.model_copy(update={"prepared": False}) for block in next_labels],
        )
        self.encoder = FeatureEncoder.load(folder / "encoder")
        self._is_text = json.loads((folder / "keys.json").read_text())
        self.statistics = [CausalStatistics.load(folder / f"statistics_{i}") for i in range(len(statistics))]
        for i, history in enumerate(self.histories):
            history.load(folder / f"history_{i}")
        return self


def _holds_lists(name: str, column: str) -> str:
    return f"{name}: column {column!r} holds lists, which name no user, item or key"


def _history(config: HistoryConfig, schema: Schema, groups: Mapping[str, Group]) -> History:
    history = History(config, schema)
    if groups.get(history.by) != "user":
        users = [column for column, group in groups.items() if group == "user"]
        raise ConfigError(f"histories.by: {history.by!r} is no user's column of the schema{nearest(history.by, users)}")
    if history.feature.group != ("user",):
        raise ConfigError(f"feature {config.feature!r}: a history that is built is of group user")
    return history if config.prepared is None else history.load(Path(config.prepared))


def _statistics(config: StatisticsConfig, schema: Schema) -> CausalStatistics:
    if config.prepared is not None:
        return CausalStatistics.load(Path(config.prepared))
    assert schema.time is not None
    return CausalStatistics(
        config.keys,
        config.outcomes,
        time=schema.time,
        smoothing=config.smoothing,
        smoothing_of=config.smoothing_of,
        given=config.given,
        given_smoothing=config.given_smoothing,
        counts=config.with_counts,
        last=config.last,
        label=config.label,
    )


def _column_groups(schema: Schema, statistics: Sequence[StatisticsConfig]) -> dict[str, Group]:
    """The group of every input column."""
    groups: dict[str, Group] = {}
    for feature in schema.features:
        if len(feature.group) == 1:
            groups[feature.rows_from] = feature.group[0]
    if schema.user is not None:
        groups.setdefault(schema.user, "user")
    if schema.item is not None:
        groups.setdefault(schema.item, "item")
    for block in statistics:
        groups.update(block.groups)
    for column in (c for block in statistics for key in block.keys for c in key):
        if column not in groups:
            raise ConfigError(
                f"statistics.keys: {column!r} is no feature of the schema{nearest(column, groups)}; "
                "name its group under statistics.groups"
            )
    return groups
