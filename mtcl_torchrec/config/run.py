"""A whole run in one object, read from one YAML file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError, model_validator

from mtcl_torchrec.config.balance import BalanceConfig
from mtcl_torchrec.config.base import Part
from mtcl_torchrec.config.calibration import CalibrationConfig
from mtcl_torchrec.config.data import DataConfig, HistoryConfig, NextLabelConfig, StatisticsConfig
from mtcl_torchrec.config.evaluation import EvaluationConfig
from mtcl_torchrec.config.fusion import FusionConfig
from mtcl_torchrec.config.model import ModelConfig
from mtcl_torchrec.config.sharding import COLUMN_CUTS, ShardingConfig
from mtcl_torchrec.config.training import OptimizersConfig, TrainingConfig
from mtcl_torchrec.config.tuning import TuningConfig
from mtcl_torchrec.schema import ConfigError, Schema, check_unique, nearest


def _as_blocks(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class RunConfig(Part):
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
        mtcl_torchrec.schema.declared.ConfigError: fusion.weights: no task 'clik' (did you mean 'click'?)
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[\w][\w .-]*$")] = "run"
    data: DataConfig
    data_schema: Schema = Field(alias="schema")
    statistics: Annotated[list[StatisticsConfig], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    histories: Annotated[list[HistoryConfig], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    next_labels: Annotated[list[NextLabelConfig], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    model: ModelConfig = Field(default_factory=ModelConfig)
    optimizers: OptimizersConfig = Field(default_factory=OptimizersConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    sharding: ShardingConfig = Field(default_factory=ShardingConfig)
    fusion: FusionConfig | None = None
    calibration: CalibrationConfig | None = None
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tuning: TuningConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.fusion is not None:
            self.fusion.check(self.data_schema)
            self.data_schema = self.fusion.completed(self.data_schema)
        self._check_training()
        self.model.check(self.data_schema)
        if self.calibration is not None:
            self.calibration.check(self.data_schema)
        self.evaluation.check(self.data_schema)
        self._check_tables()
        self._check_surgery()
        self._check_made_columns()
        if self.data.log is not None and self.data_schema.time is None:
            raise ValueError("data.log needs schema.time: the log is split by time")
        return self

    def _check_training(self) -> None:
        tasks = {t.name for t in self.data_schema.tasks}
        for name in self.training.watch:
            if name not in tasks:
                raise ValueError(f"training.watch: no task {name!r}{nearest(name, tasks)}")
        self._check_id_dropout()
        self.training.metrics.check(self.data_schema)
        self.training.regularisers.check(self.data_schema)
        if self.model.trunk.kind in ("shared_bottom", "single_task"):
            for name in ("expert_orthogonality", "gate_balance"):
                if getattr(self.training.regularisers, name):
                    raise ValueError(
                        f"training.regularisers.{name}: a {self.model.trunk.kind} trunk has no gate that mixes experts"
                    )

    def _check_tables(self) -> None:
        tables = self.model.tables(self.data_schema)
        for name in self.optimizers.tables.lr_of:
            if name not in tables:
                raise ValueError(f"optimizers.tables.lr_of: no table {name!r}{nearest(name, tables)}")
        for name in self.sharding.tables:
            if name not in tables:
                raise ValueError(f"sharding.tables: no table {name!r}{nearest(name, tables)}")
        if self.optimizers.tables.kind == "rowwise_adagrad":
            cut = next((k for t in tables for k in self.sharding.kinds_of(t) if k in COLUMN_CUTS), None)
            if cut is not None:
                raise ValueError(
                    f"sharding: {cut} would make row-wise Adagrad another optimizer "
                    "(one state for each piece of a row); take adagrad, or another sharding"
                )

    def _check_made_columns(self) -> None:
        if self.statistics and self.data_schema.time is None:
            raise ValueError("statistics need schema.time: they count strictly earlier rows only")
        for block in self.histories:
            block.check(self.data_schema)
        check_unique("history", [block.feature for block in self.histories])
        for label in self.next_labels:
            label.check(self.data_schema)
        check_unique("next label", [label.column for label in self.next_labels])

    def _check_id_dropout(self) -> None:
        ids = {f.name for f in self.data_schema.sparse_features if f.kind == "id"}
        compared = {t.name: t.head.sampled_softmax for t in self.data_schema.tasks if t.head.sampled_softmax}
        softmaxes = {softmax.item or self.data_schema.item_feature: name for name, softmax in compared.items()}
        for name in self.training.id_dropout:
            if name not in ids:
                raise ValueError(f"training.id_dropout: no feature {name!r} of kind id{nearest(name, ids)}")
            if name in softmaxes:
                raise ValueError(
                    f"training.id_dropout of {name!r} and sampled_softmax of task {softmaxes[name]!r}, which tells "
                    "items apart by it, exclude each other; remove one"
                )

    def _check_surgery(self) -> None:
        surgery = self.balance.surgery
        features = [f.name for f in self.data_schema.sparse_features if f.beside is None]
        for name in (name for group in surgery.groups for name in group):
            if name not in features:
                raise ValueError(f"balance.surgery.groups: no id feature {name!r}{nearest(name, features)}")
        if surgery.kind != "none" and len(self.data_schema.tasks) < 2:
            raise ValueError("balance.surgery needs two tasks at least")
        if surgery.kind != "none" and self.model.tower.kind == "lstm":
            raise ValueError(
                "balance.surgery: an lstm tower reads the shared embeddings past every cut; take model.sequences with "
                "tower: mlp"
            )
        if surgery.kind != "none" and surgery.cut == "tables" and self.data_schema.sequence_tables():
            raise ValueError(
                "balance.surgery.cut: 'tables' needs the gradient of each row, and that of a history's rows goes "
                "through its encoder; take embeddings, trunk or both"
            )
        if surgery.kind != "none" and surgery.cut in ("trunk", "both") and self.model.trunk.kind == "single_task":
            raise ValueError(
                f"balance.surgery.cut: in a single_task trunk nothing is shared, so {surgery.cut!r} cuts nothing; take "
                "embeddings or tables"
            )


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
    """The run that a YAML text describes; see `load_run`.

    Raises:
        ConfigError: as `load_run`.
    """
    where = f"{name}: " if name else ""
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except Exception as error:  # PyYAML's constructors raise what they like, such as ValueError
        raise ConfigError(f"{where}no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}expected keys such as data, schema, model; found {type(raw).__name__}")
    run = run_from_data(raw, name=name)
    if folder is not None:
        for split in ("train", "val", "test", "log"):
            paths = getattr(run.data, split)
            if paths is not None:
                setattr(run.data, split, [str(folder / p) for p in paths])
        made: list[StatisticsConfig | HistoryConfig] = [*run.statistics, *run.histories]
        for block in made:
            if block.prepared is not None:
                block.prepared = str(folder / block.prepared)
        run.data_schema = run.data_schema.with_files(lambda path: str(folder / path))
    return run


def run_from_data(raw: dict[str, Any], *, name: str = "") -> RunConfig:
    """The run of plain data, as YAML holds it; paths are taken as they are.

    Raises:
        ConfigError: one line for each mistake, as `load_run` says them.
    """
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        where = f"{name}: " if name else ""
        raise ConfigError("\n".join(where + line for line in _explain(error))) from None


def run_as_data(run: RunConfig) -> dict[str, Any]:
    """The run as plain data that `run_from_data` reads back to the same run: what was said, defaults left out."""
    _mark_changed(run)
    return run.model_dump(mode="json", by_alias=True, exclude_unset=True)


def dump_run(run: RunConfig) -> str:
    """The run as YAML that `parse_run` reads back to the same run."""
    return yaml.safe_dump(run_as_data(run), sort_keys=False, allow_unicode=True, width=110)


def with_paths_from(run: RunConfig, folder: Path) -> RunConfig:
    """The run with its paths written as seen from `folder`, where its YAML will stand: `load_run` undoes it."""
    seen = run.model_copy(deep=True)
    for split in ("train", "val", "test", "log"):
        paths = getattr(seen.data, split)
        if paths is not None:
            setattr(seen.data, split, [os.path.relpath(path, folder) for path in paths])
    made: list[StatisticsConfig | HistoryConfig] = [*seen.statistics, *seen.histories]
    for block in made:
        if block.prepared is not None:
            block.prepared = os.path.relpath(block.prepared, folder)
    seen.data_schema = seen.data_schema.with_files(lambda path: os.path.relpath(path, folder))
    return seen


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
        # A calibration that was not given as a list stands in one all the same.
        unsaid = 0 if item["loc"][:1] == ("calibration",) else None
        path = ".".join(str(part) for part in item["loc"] if part != unsaid)
        if item["type"] == "extra_forbidden":
            allowed = _keys_at(item["loc"][:-1])
            lines.append(f"unknown key {path!r}{nearest(str(item['loc'][-1]), allowed)}")
        elif item["type"] == "missing":
            lines.append(f"missing key {path!r}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if item["type"] == "value_error" else f" (given: {_short(item['input'])})"
            if item["type"] == "literal_error":
                given += nearest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
            lines.append(f"{path}: {message}{given}" if path else f"{message}{given}")
    return lines


def _short(value: Any) -> str:
    """A value for a message, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    """The keys that are known at a place in the YAML."""
    model: Any = RunConfig
    any_key = False
    for part in path:
        if isinstance(part, int):
            continue
        if any_key:  # of a mapping, whose values are of the model
            any_key = False
            continue
        fields = {f.alias or n: f for n, f in model.model_fields.items()}
        part = "root" if issubclass(model, RootModel) else part  # whatever the key is called
        if part not in fields:
            if model.model_config.get("extra") != "allow":
                return []
            model = _model_in(get_type_hints(model, include_extras=True)["__pydantic_extra__"])
            continue
        any_key = _is_mapping(fields[part].annotation)
        model = _model_in(fields[part].annotation)
        if model is None:
            return []
    return [f.alias or n for n, f in model.model_fields.items()]


def _is_mapping(annotation: Any) -> bool:
    """Whether an annotation is a dict, or one or nothing."""
    return get_origin(annotation) is dict or any(get_origin(part) is dict for part in get_args(annotation))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The declared model inside an annotation such as `tuple[Feature, ...]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m is not None), None)
