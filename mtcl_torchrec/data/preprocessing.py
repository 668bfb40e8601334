"""Raw rows to encoded rows: causal statistics first, then vocabularies and scales; fitted once, stored with the model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mtcl_torchrec.config import StatisticsConfig
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.source import Rows, time_values
from mtcl_torchrec.data.statistics import CausalStatistics, Progress, _quiet
from mtcl_torchrec.schema import ConfigError, Group, Schema, nearest


class Preprocessor:
    """Everything learnt from the training split that turns raw rows into `EncodedRows`.

    Args:
        schema: features and tasks as declared.
        statistics: what to count; may be empty.

    Raises:
        ConfigError: a statistics key whose feature group is not known.

    Example:
        >>> from mtcl_torchrec.schema import Feature, Task
        >>> schema = Schema(features=[Feature(name="u", group="user")], tasks=[Task.binary("click")], time="t")
        >>> preprocessor = Preprocessor(schema, StatisticsConfig(keys=["u"], outcomes=["click"]))
        >>> train = pd.DataFrame({"u": ["a", "b", "a"], "t": [1, 2, 3], "click": [1, 0, 1]})
        >>> preprocessor.fit(Rows(train)).dense.shape  # count, rate, and a mark where the rate is missing
        torch.Size([3, 3])
    """

    def __init__(self, schema: Schema, statistics: StatisticsConfig) -> None:
        self.declared = schema
        self.config = statistics
        self.groups = _column_groups(schema, statistics)
        self.statistics: CausalStatistics | None = None
        if statistics.keys:
            assert schema.time is not None
            if statistics.prepared is not None:
                self.statistics = CausalStatistics.load(Path(statistics.prepared))
            else:
                self.statistics = CausalStatistics(
                    statistics.keys, statistics.outcomes, time=schema.time, smoothing=statistics.smoothing
                )
        self.encoder = FeatureEncoder(schema)

    @property
    def schema(self) -> Schema:
        """The declared schema with the statistics as further dense features."""
        return self.encoder.schema

    def columns(self, *, statistics: bool = True) -> list[str]:
        """The columns that must be read.

        Args:
            statistics: True for the splits of a run; False for other rows to be evaluated, whose statistics are looked up.
        """
        columns = [f.rows_from for f in self.declared.features]
        columns += [c for key in self.config.keys for c in key]
        columns += [c for c in (self.declared.user, self.declared.item) if c]
        columns += self.declared.label_columns()
        if statistics:
            columns += [self.declared.time] if self.declared.time else []
            if self.statistics is not None and self.config.prepared is not None:
                columns += self.statistics.columns()
            else:
                columns += self.config.outcomes
        return list(dict.fromkeys(columns))

    def fit(self, rows: Rows, progress: Progress = _quiet) -> EncodedRows:
        """Learn from the training split and encode it, each row with what was known before it.

        Raises:
            DataError: a column is missing or a value does not fit.
        """
        if self.statistics is not None:
            rows = self.fit_statistics(rows, progress)
            extra = self.statistics.features(self.groups)
            self.encoder = FeatureEncoder(
                self.declared.model_copy(update={"features": (*self.declared.features, *extra)})
            )
        return self.encoder.fit(rows).encode(rows)

    def fit_statistics(self, rows: Rows, progress: Progress = _quiet) -> Rows:
        """The training rows with the statistics' causal columns, unless they have them already."""
        if self.statistics is None or self.config.prepared is not None:
            return rows
        assert self.declared.time is not None
        frame = rows.frame.assign(**{self.declared.time: time_values(rows.frame, self.declared.time)})
        causal = self.statistics.fit_transform(frame, progress)
        return Rows(pd.concat([rows.frame, causal], axis=1), rows.files, rows.starts)

    def encode(self, rows: Rows, *, with_labels: bool = True) -> EncodedRows:
        """Encode later rows; the statistics stand as they were at the end of the training split."""
        return self.encoder.encode(self.with_statistics(rows), with_labels=with_labels)

    def with_statistics(self, rows: Rows) -> Rows:
        """Later rows with the statistics' columns, unless they have them already."""
        if self.statistics is None or set(self.statistics.columns()) <= set(rows.frame.columns):
            return rows
        return Rows(pd.concat([rows.frame, self.statistics.transform(rows.frame)], axis=1), rows.files, rows.starts)

    def save(self, folder: Path) -> None:
        """Store vocabularies, scales and statistics."""
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save(folder / "encoder")
        if self.statistics is not None:
            self.statistics.save(folder / "statistics")

    @classmethod
    def load(cls, folder: Path, schema: Schema, statistics: StatisticsConfig) -> Preprocessor:
        """Read what `save` wrote."""
        self = cls(schema, statistics)
        self.encoder = FeatureEncoder.load(folder / "encoder")
        if self.statistics is not None:
            self.statistics = CausalStatistics.load(folder / "statistics")
        return self


def _column_groups(schema: Schema, statistics: StatisticsConfig) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for feature in schema.features:
        if len(feature.group) == 1:
            groups[feature.rows_from] = feature.group[0]
    if schema.user is not None:
        groups.setdefault(schema.user, "user")
    if schema.item is not None:
        groups.setdefault(schema.item, "item")
    groups.update(statistics.groups)
    for key in statistics.keys:
        for column in key:
            if column not in groups:
                raise ConfigError(
                    f"statistics.keys: {column!r} is no feature of the schema{nearest(column, groups)}; "
                    "name its group under statistics.groups"
                )
    return groups
