"""Where the rows come from, and what is counted in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mtcl_torchrec.config.base import Fraction, Part, Paths, as_list
from mtcl_torchrec.schema import Group, Schema, check_unique, nearest


class SyntheticConfig(Part):
    """Rows of a world with known probabilities, generated while they are trained on; nothing is stored.

    The dials are those of `mtcl_torchrec.data.synthetic.World`; what is left out is as the ready world has it.

    Args:
        world: a ready world.
        rows, val_rows, test_rows: of each split; they follow each other in time.
        seed: of the world: another seed is another world.
        num_users, num_items: ids run from 1; the tables have one row more.
        user_exponent, item_exponent: of the Zipf laws by which users and items come; 0 is uniform.
        latent_dim: coordinates of the users' and items' vectors, above the number of tasks.
        categories: of the items.
        rates: task -> base rate of its event (mean of its label).
        imbalance: divides the base rates.
        correlation, conflict: how alike the tastes behind the tasks are, and how far one task's is turned against them.
        signal, context: how much is knowable at all, and how much of that is context.
        missing: share of labels that are not known.
        cold_items, cold_after: share of items that appear only after that share of all rows.
        days: that all rows span.
        text: share of the variance of an item's vector that the words of its title explain; above 0, there are titles.
        position_bias: how fast the probability that a user looks at a position falls; above 0, rows have a position.
        positions: how many, from 1.
        delay: days until an event is recorded, on average: train and val are the log as it was when val ended, where
            an event yet to come is a 0, and test is what came of it.
        delay_spread: standard deviation of their logarithm, where they are log-normal; 0: they are exponential.
    """

    world: Literal["shop", "social", "video", "courses", "health"]
    rows: PositiveInt = 1_000_000
    val_rows: PositiveInt = 50_000
    test_rows: NonNegativeInt = 50_000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    num_users: Annotated[int, Field(ge=1, le=10**12)] = 100_000
    num_items: Annotated[int, Field(ge=2, le=10**12)] = 100_000
    user_exponent: Annotated[float, Field(ge=0, le=3)] = 0.5
    item_exponent: Annotated[float, Field(ge=0, le=3)] = 1.0
    latent_dim: Annotated[int, Field(ge=6, le=64)] = 8
    categories: Annotated[int, Field(ge=2, le=256)] = 16
    signal: Annotated[float, Field(ge=0, le=5)] = 1.8
    context: Annotated[float, Field(ge=0, le=0.95)] = 0.2
    correlation: Annotated[float, Field(ge=0, le=1)] = 0.5
    conflict: Annotated[float, Field(ge=0, le=1)] | None = None
    missing: Annotated[float, Field(ge=0, le=0.95)] = 0.0
    cold_items: Annotated[float, Field(ge=0, le=0.95)] = 0.0
    cold_after: Fraction = 0.9
    days: Annotated[int, Field(ge=1, le=3650)] = 30
    text: Annotated[float, Field(ge=0, le=1)] = 0.0
    position_bias: Annotated[float, Field(ge=0, le=5)] = 0.0
    positions: Annotated[int, Field(ge=2, le=1000)] | None = None
    delay: Annotated[float, Field(ge=0, le=3650)] = 0.0
    delay_spread: Annotated[float, Field(ge=0, le=4)] = 0.0
    rates: dict[str, PositiveFloat] = Field(default_factory=dict)
    imbalance: Annotated[float, Field(ge=1)] = 1.0

    def dials(self) -> dict[str, Any]:
        """What `ready_world` takes beside the name: the dials that were set, and all rows as the horizon."""
        given = self.model_dump(exclude_unset=True, exclude={"world", "rows", "val_rows", "test_rows"})
        return {**given, "horizon": self.rows + self.val_rows + self.test_rows}


class DataConfig(Part):
    """Where the rows are: train / val / test, or one `log` that is split by time, or a `synthetic` world.

    A path may be a Parquet or CSV file, a folder of them, or a pattern such as ``part-*.parquet``; relative
    paths start at the folder of the YAML file.

    Args:
        train, val, test: files of each split.
        log: files that are split by time.
        val_fraction, test_fraction: shares of the log, the newest rows.
        synthetic: a world instead of files.
        stream: read the training split (Parquet) while it is trained on, instead of keeping it in memory.
        window: rows of a stream that are shuffled among each other, and read at once.
        workers: threads of each rank that read and encode a stream ahead of training.
    """

    train: Paths | None = None
    val: Paths | None = None
    test: Paths | None = None
    log: Paths | None = None
    val_fraction: Fraction = 0.1
    test_fraction: Fraction = 0.1
    synthetic: SyntheticConfig | None = None
    stream: bool = False
    window: PositiveInt = 262_144
    workers: PositiveInt = 1

    @model_validator(mode="after")
    def _one_way(self) -> DataConfig:
        if sum(part is not None for part in (self.log, self.train, self.synthetic)) != 1:
            raise ValueError(
                "give either 'train' and 'val' (and 'test'), or one 'log' to be split by time, or a 'synthetic' world"
            )
        if self.train is not None and self.val is None:
            raise ValueError("'train' needs 'val': early stopping and the choice of the best epoch use it")
        if self.train is None and (self.val is not None or self.test is not None):
            raise ValueError("'val' and 'test' stand beside 'train': a log is split by time, a world has its own")
        if self.log is not None and self.stream:
            raise ValueError("a stream needs 'train' and 'val' files: 'log' is split by time, in memory")
        if self.log is not None and self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction leave nothing to train on")
        if self.log is not None and self.val_fraction == 0:
            raise ValueError("val_fraction must be above 0: early stopping uses the validation part")
        if self.model_fields_set & {"window", "workers"} and not (self.stream or self.synthetic):
            raise ValueError("window and workers belong to a stream")
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


class HistoryConfig(Part):
    """A history feature of the schema, built from the log: what its user met before each row, strictly earlier.

    See `mtcl_torchrec.data.histories.History`; a run may have several of these.

    Args:
        feature: the history feature (``kind: history, of: FEATURE``) whose lists are built; its column, and those of
            its companions, are not read.
        by: column that says whose history it is; the default is the schema's user.
        where: columns of numbers; a row is an event where one of them is above 0, or any row where none is named.
        beside: companion -> what it says of an event: a column of the event's row, or a list of columns, which gives
            the number of the first of them that is above 0, counted from 1, and 0 where none is.  A companion with
            ``encoding: log_bucket`` holds the events' ages and is not named here.
        time_unit: of times that are numbers, for ages; the default is seconds.
        prepared: folder in which ``mtcl prepare`` stored the events, where the data has the columns already.
    """

    feature: str
    by: str | None = None
    where: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    beside: dict[str, str | Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    time_unit: Literal["s", "ms", "us", "ns"] | None = None
    prepared: str | None = None

    def check(self, schema: Schema) -> None:
        """See that the schema declares what is built.

        Raises:
            ValueError: naming the key and, if there is one, the nearest right name.
        """
        histories = {f.name: f for f in schema.history_features if f.of is not None}
        if self.feature not in histories:
            raise ValueError(
                f"histories.feature: no history of an id feature {self.feature!r}{nearest(self.feature, histories)}"
            )
        if self.by is None and schema.user is None:
            raise ValueError(f"histories of {self.feature!r} need schema.user, or by: the column that says whose it is")
        if schema.time is None:
            raise ValueError(f"histories of {self.feature!r} need schema.time: they hold strictly earlier events only")
        companions = {f.name: f for f in schema.companions(self.feature)}
        ages = [name for name, f in companions.items() if f.encoding == "log_bucket"]
        for name in self.beside:
            if name not in companions:
                raise ValueError(
                    f"histories.beside: {name!r} is not beside {self.feature!r}{nearest(name, companions)}"
                )
            if name in ages:
                raise ValueError(f"histories.beside: {name!r} holds ages, which follow from schema.time")
        for name, feature in companions.items():
            if name not in ages and name not in self.beside:
                raise ValueError(f"histories.beside: say what {name!r} holds: a column of the event's row, or events")
            kinds = self.beside.get(name)
            if isinstance(kinds, list) and (feature.encoding, feature.vocabulary_size) != ("index", len(kinds) + 1):
                raise ValueError(
                    f"histories.beside: {name!r} holds numbers from 0 to {len(kinds)}: its feature needs encoding: "
                    f"index and vocabulary_size: {len(kinds) + 1}"
                )
        if self.time_unit is not None and not ages:
            raise ValueError(f"histories.time_unit: nothing beside {self.feature!r} holds ages (encoding: log_bucket)")


class NextLabelConfig(Part):
    """A label column that is added to each split: what the user turns to next, in the same split.

    See `mtcl_torchrec.data.next_labels.next_label`; a run may have several of these.

    Args:
        column: name of the label, for `Task.label`.
        of: column whose value in the next row is the label, such as the item's category.
        by: column that says whose row it is; the default is the schema's user.
        where: columns of numbers; only a row where one of them is above 0 is a next one.
        prepared: whether ``mtcl prepare`` has written the column already.
    """

    column: str
    of: str
    by: str | None = None
    where: Annotated[list[str], BeforeValidator(as_list)] = Field(default_factory=list)
    prepared: bool = False

    def check(self, schema: Schema) -> None:
        """See that a task wants the label, and no feature is it.

        Raises:
            ValueError: naming the key and, if there is one, the nearest right name.
        """
        labels = schema.label_columns()
        if self.column not in labels:
            raise ValueError(f"next_labels.column: no task has the label {self.column!r}{nearest(self.column, labels)}")
        if self.column == self.of:
            raise ValueError(f"next_labels.column: {self.column!r} would be the label of its own row")
        reader = next((f.name for f in schema.features if f.rows_from == self.column), None)
        if reader is not None:
            raise ValueError(f"next_labels.column: feature {reader!r} reads {self.column!r}, which is a label")
        if self.by is None and schema.user is None:
            raise ValueError(
                f"next_labels: {self.column!r} needs schema.user, or by: the column that says whose row it is"
            )
        if schema.time is None:
            raise ValueError(f"next_labels: {self.column!r} needs schema.time")
