"""Where the rows come from, and what is counted in them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from mtcl_torchrec.config.base import Fraction, Part, Paths, as_list
from mtcl_torchrec.schema import Group, check_unique, nearest


class DataConfig(Part):
    """Where the rows are: either train / val / test, or one `log` that is split by time.

    A path may be a Parquet or CSV file, a folder of them, or a pattern such as ``part-*.parquet``; relative
    paths start at the folder of the YAML file.
    """

    train: Paths | None = None
    val: Paths | None = None
    test: Paths | None = None
    log: Paths | None = None
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.1

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if (self.log is None) == (self.train is None):
            raise ValueError("give either 'train' and 'val' (and 'test'), or one 'log' to be split by time")
        if self.train is not None and self.val is None:
            raise ValueError("'train' needs 'val': early stopping and the choice of the best epoch use it")
        if self.log is not None and (self.val is not None or self.test is not None):
            raise ValueError("'log' is split by time: it takes no 'val' and no 'test' beside it")
        if self.log is not None and self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction leave nothing to train on")
        if self.log is not None and self.val_fraction == 0:
            raise ValueError("val_fraction must be above 0: early stopping uses the validation part")
        return self


class StatisticsConfig(Part):
    """Causal counts and smoothed rates, computed from strictly earlier rows of the training split.

    See `mtcl_torchrec.data.statistics.CausalStatistics`; a run may have several of these.

    Args:
        keys: columns, or lists of columns, to count by: ``[user_id, [user_id, tag]]``.
        groups: feature group of each column that a key uses and the schema does not declare.
        outcomes: numeric columns (0/1 events, or a quantity such as watch time) whose mean is taken.
        smoothing: pseudo-count that pulls a rate towards the overall rate of its time.
        smoothing_of: outcome -> pseudo-count of its own; rare events need more.
        given: take the rates beyond what these columns' own rates predict.
        given_smoothing: pseudo-count in those rates.
        counts: whether counts are features, too; the default is yes without `given`, no with it.
        last: look at the latest so many rows of a key only.
        label: goes into the names of the features, to tell two blocks with other smoothing apart.
        prepared: folder in which ``mtcl prepare`` stored the statistics whose columns the data already has.
    """

    keys: Annotated[list[Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]], Field(min_length=1)]
    groups: dict[str, Group] = Field(default_factory=dict)
    outcomes: list[str] = Field(default_factory=list)
    smoothing: PositiveFloat = 20.0
    smoothing_of: dict[str, PositiveFloat] = Field(default_factory=dict)
    given: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    given_smoothing: PositiveFloat = 20.0
    counts: bool | None = None
    last: PositiveInt | None = None
    label: str = ""
    prepared: str | None = None

    @property
    def with_counts(self) -> bool:
        """Whether counts are features."""
        return not self.given if self.counts is None else self.counts

    @model_validator(mode="after")
    def _consistent(self) -> StatisticsConfig:
        check_unique("outcome", self.outcomes)
        check_unique("given column", self.given)
        check_unique("key", [",".join(key) for key in self.keys])
        for key in self.keys:
            check_unique(f"in key {key}, column", key)
        if not self.outcomes and not self.with_counts:
            raise ValueError("without outcomes and without counts there is nothing to compute")
        if self.given and not self.outcomes:
            raise ValueError("given needs outcomes")
        for outcome in self.smoothing_of:
            if outcome not in self.outcomes:
                raise ValueError(f"smoothing_of: {outcome!r} is no outcome{nearest(outcome, self.outcomes)}")
        return self
