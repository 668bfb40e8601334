"""A whole run in one object, read from one YAML file: data, schema, model, optimizers, training, fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mtcl_torchrec.schema import ConfigError, Group, Schema, check_unique, nearest

Fraction = Annotated[float, Field(ge=0, lt=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DataConfig(_Part):
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


class StatisticsConfig(_Part):
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

    keys: Annotated[list[Annotated[list[str], Field(min_length=1), BeforeValidator(_as_list)]], Field(min_length=1)]
    groups: dict[str, Group] = Field(default_factory=dict)
    outcomes: list[str] = Field(default_factory=list)
    smoothing: PositiveFloat = 20.0
    smoothing_of: dict[str, PositiveFloat] = Field(default_factory=dict)
    given: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
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


def _as_blocks(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class TrunkConfig(_Part):
    """The shared part of the model; see `mtcl_torchrec.modules.trunks`."""

    kind: Literal["shared_bottom", "mmoe", "ple", "single_task"] = "mmoe"
    expert_layers: Annotated[list[PositiveInt], Field(min_length=1)] = [128, 64]
    num_experts: PositiveInt = 4
    shared_experts: PositiveInt = 2
    task_experts: PositiveInt = 1
    levels: PositiveInt = 2
    dropout: Fraction = 0.0
    gate_dropout: Fraction = 0.0
    norm: Literal["layer", "rms", "none"] = "layer"

    @model_validator(mode="after")
    def _fitting(self) -> TrunkConfig:
        belongs = {"num_experts": {"mmoe"}, "shared_experts": {"ple"}, "task_experts": {"ple"}, "levels": {"ple"},
                   "gate_dropout": {"mmoe", "ple"}}  # fmt: skip
        for field, kinds in belongs.items():
            if field in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{field} belongs to {' and '.join(sorted(kinds))}, not to {self.kind}")
        return self


class ModelConfig(_Part):
    """Everything between the embeddings and the predictions.

    Args:
        trunk: what the tasks share.
        tower_layers: widths of each task's own network on top of the trunk.
        cross_layers, cross_rank: low-rank cross layers (DCN v2) before the trunk; 0 layers is none.
        embedding_dropout: share of features whose whole embedding is left out of a row while training.
        dense_dropout, dense_noise: dropout of dense inputs, and standard deviation of noise added to them in training.
        tower_dropout: dropout in the towers.
    """

    trunk: TrunkConfig = Field(default_factory=TrunkConfig)
    tower_layers: list[PositiveInt] = [32]
    cross_layers: NonNegativeInt = 0
    cross_rank: PositiveInt = 64
    embedding_dropout: Fraction = 0.0
    dense_dropout: Fraction = 0.0
    dense_noise: NonNegativeFloat = 0.0
    tower_dropout: Fraction = 0.0


class TableOptimizerConfig(_Part):
    """Optimizer of the embedding tables, fused into backward wherever the table is sharded.

    Args:
        kind: ``adam`` is fused on CUDA only; on the CPU it updates all rows in every step.
        lr: learning rate.
        lr_of: table -> learning rate of its own; large tables overfit where small ones still learn.
        eps: added to the denominator of the adaptive kinds.
        init_scale: tables start uniform in ± this; the default is 1/√rows.
    """

    kind: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    lr: PositiveFloat = 0.02
    lr_of: dict[str, PositiveFloat] = Field(default_factory=dict)
    eps: PositiveFloat = 1e-8
    init_scale: PositiveFloat | None = None


class DenseOptimizerConfig(_Part):
    """Optimizer of everything that is no embedding table.

    Args:
        kind: ``adamw`` decays weights apart from the gradient.
        betas: of Adam.
        weight_decay: of weight matrices; biases and the scales of norms are left alone.
        clip_norm: the gradient of all dense parameters together is cut to this norm; 0 is off.
    """

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: NonNegativeFloat = 10.0


class OptimizersConfig(_Part):
    """The two optimizers of a TorchRec model."""

    tables: TableOptimizerConfig = Field(default_factory=TableOptimizerConfig)
    dense: DenseOptimizerConfig = Field(default_factory=DenseOptimizerConfig)


class TrainingConfig(_Part):
    """How long and in which steps.

    Args:
        epochs: passes over the training split, at most.
        batch_size: rows a step and rank.
        patience: stop after this many epochs without a better mean validation AUC; 0 never stops.
        watch: the tasks whose mean AUC decides which epoch is best; the default is every binary task.
        warmup_steps: the learning rates rise linearly from 0 over this many steps.
        decay: how the learning rates fall from then to the last step of the last epoch.
        averaging: decay of the exponential moving average of all weights that is evaluated and kept; 0 is off.
        l2_embedding: λ of the loss's λR, R being the mean of ‖pooled embeddings‖² over rows.
        pipeline: TorchRec's train pipeline: ``sparse_dist`` overlaps communication with computation, ``base`` does not.
        sharding: how tables are cut; ``auto`` leaves it to the planner.
    """

    epochs: PositiveInt = 10
    batch_size: PositiveInt = 1024
    eval_batch_size: PositiveInt = 8192
    patience: NonNegativeInt = 3
    watch: list[str] = Field(default_factory=list)
    warmup_steps: NonNegativeInt = 100
    decay: Literal["none", "linear", "cosine"] = "linear"
    averaging: Fraction = 0.0
    l2_embedding: NonNegativeFloat = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    pipeline: Literal["sparse_dist", "base"] = "sparse_dist"
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = "auto"


class FusionConfig(_Part):
    """The fused score: a weighted mean of the tasks' predictions in [0, 1]."""

    weights: dict[str, float]

    @model_validator(mode="after")
    def _some_weight(self) -> FusionConfig:
        if not any(self.weights.values()):
            raise ValueError("the fused score needs at least one weight that is not 0")
        return self


class RunConfig(_Part):
    """One run.

    Example:
        >>> text = '''
        ... data: {log: events.parquet}
        ... schema:
        ...   features: [{name: user_id, group: user}]
        ...   tasks: [{name: click, kind: binary}]
        ... fusion: {weights: {clik: 1.0}}
        ... '''
        >>> parse_run(text)
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.ConfigError: fusion.weights: no task 'clik' (did you mean 'click'?)
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[\w][\w .-]*$")] = "run"
    data: DataConfig
    data_schema: Schema = Field(alias="schema")
    statistics: Annotated[list[StatisticsConfig], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizers: OptimizersConfig = Field(default_factory=OptimizersConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    fusion: FusionConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        tasks = {t.name for t in self.data_schema.tasks}
        for name in self.fusion.weights if self.fusion else ():
            if name not in tasks:
                raise ValueError(f"fusion.weights: no task {name!r}{nearest(name, tasks)}")
        if self.training.sharding == "column_wise" and self.optimizers.tables.kind == "rowwise_adagrad":
            raise ValueError(
                "training.sharding: column_wise would make row-wise Adagrad another optimizer "
                "(one state for each piece of a row); take adagrad, or another sharding"
            )
        for name in self.training.watch:
            if name not in tasks:
                raise ValueError(f"training.watch: no task {name!r}{nearest(name, tasks)}")
        tables = self.data_schema.tables()
        for name in self.optimizers.tables.lr_of:
            if name not in tables:
                raise ValueError(f"optimizers.tables.lr_of: no table {name!r}{nearest(name, tables)}")
        if self.statistics and self.data_schema.time is None:
            raise ValueError("statistics need schema.time: they count strictly earlier rows only")
        if self.data.log is not None and self.data_schema.time is None:
            raise ValueError("data.log needs schema.time: the log is split by time")
        return self


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which would let the last of two equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a node.

        Raises:
            yaml.YAMLError: a key stands there twice.
        """
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((k for k in keys if keys.count(k) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"key {twice!r} stands there twice, line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


def load_run(path: str | Path) -> RunConfig:
    """Read a run from a YAML file.  Relative data paths are taken from the file's folder.

    Raises:
        ConfigError: one line for each mistake, with the key and the nearest right one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    return parse_run(text, name=str(path), folder=path.parent)


def parse_run(text: str, *, name: str = "", folder: Path | None = None) -> RunConfig:
    """The run that a YAML text describes; see `load_run`."""
    where = f"{name}: " if name else ""
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except Exception as error:  # PyYAML's constructors raise what they like, such as ValueError
        raise ConfigError(f"{where}no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}expected keys such as data, schema, model; found {type(raw).__name__}")
    try:
        run = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(where + line for line in _explain(error))) from None
    if folder is not None:
        for split in ("train", "val", "test", "log"):
            paths = getattr(run.data, split)
            if paths is not None:
                setattr(run.data, split, [str(folder / p) for p in paths])
        for block in run.statistics:
            if block.prepared is not None:
                block.prepared = str(folder / block.prepared)
    return run


def dump_run(run: RunConfig) -> str:
    """The run as YAML that `parse_run` reads back to the same run."""
    _mark_changed(run)
    raw = run.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=110)


def _mark_changed(part: BaseModel) -> bool:
    """Count a part of which a value was assigned later as set, so that it is dumped too."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, BaseModel) and _mark_changed(value):
            part.model_fields_set.add(name)
    return bool(part.model_fields_set)


def _explain(error: ValidationError) -> list[str]:
    """One readable line for each thing pydantic found wrong."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            allowed = _keys_at(item["loc"][:-1])
            lines.append(f"unknown key {path!r}{nearest(str(item['loc'][-1]), allowed)}")
        elif item["type"] == "missing":
            lines.append(f"missing key {path!r}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if item["type"] == "value_error" else f" (given: {_short(item['input'])})"
            lines.append(f"{path}: {message}{given}" if path else f"{message}{given}")
    return lines


def _short(value: Any) -> str:
    """A value for a message, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    """The keys that are known at a place in the YAML."""
    model: Any = RunConfig
    for part in path:
        if isinstance(part, int):
            continue
        fields = {f.alias or n: f for n, f in model.model_fields.items()}
        if part not in fields:
            return []
        model = _model_in(fields[part].annotation)
        if model is None:
            return []
    return [f.alias or n for n, f in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The declared model inside an annotation such as `tuple[Feature, ...]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)
