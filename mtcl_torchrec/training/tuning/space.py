"""The settings among which is searched: paths into the run's configuration, each with its values."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mtcl_torchrec.config import RunConfig, run_as_data, run_from_data
from mtcl_torchrec.config.paths import EVERY, Keys, model_at, put, resolve, value_at
from mtcl_torchrec.config.tuning import ParameterConfig, SpaceConfig, TuningConfig
from mtcl_torchrec.schema import ConfigError

Value = str | int | float | bool | None  # as the study stores it
_SCALAR = (str, int, float, bool, type(None))


def read_space(path: Path) -> TuningConfig:
    """The space of a YAML file: path -> values, and maybe an objective, as in a run's `tuning` part.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TuningConfig.model_validate(raw)
    except ValidationError as error:
        found = error.errors()
        lines = [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in found]
        raise ConfigError("\n".join(lines)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def plain(run: RunConfig) -> dict[str, Any]:
    """The run as plain data, without what tells how to tune it: what was said, defaults left out."""
    raw = run_as_data(run)
    raw.pop("tuning", None)
    return raw


def complete(run: RunConfig) -> dict[str, Any]:
    """The run as plain data with every default written out."""
    return run.model_dump(mode="json", by_alias=True, exclude={"tuning"})


@dataclass(frozen=True)
class Parameter:
    """One path and its values, in one run.

    Args:
        path: as it was given.
        config: its values.
        places: what the path means in the run.
        own: what the run itself has, as the study stores it; None where that is not among the values.
        conditions: places that must hold one of some values.
    """

    path: str
    config: ParameterConfig
    places: tuple[Keys, ...]
    own: Value = None
    conditions: tuple[tuple[Keys, tuple[Any, ...]], ...] = ()

    @property
    def options(self) -> dict[Value, Any]:
        """What the study stores -> what is meant; empty of ranges."""
        if self.config.times is not None:
            return {factor: factor for factor in self.config.times}
        return {v if isinstance(v, _SCALAR) else json.dumps(v): v for v in self.config.choices or ()}

    @property
    def examples(self) -> list[Value]:
        """All its values, or the ends of its range."""
        return list(self.config.bounds) if self.config.bounds is not None else list(self.options)

    def suggest(self, trial: Any) -> Value:
        """A value of an optuna trial."""
        c = self.config
        if c.bounds is None:
            return trial.suggest_categorical(self.path, list(self.options))
        low, high = c.bounds
        if c.integer is not None:
            return trial.suggest_int(self.path, int(low), int(high))
        return trial.suggest_float(self.path, low, high, log=c.log is not None)

    def write(self, raw: dict[str, Any], own: Any, value: Value) -> None:
        """Put a value into a run, in place.

        Args:
            raw: plain data of a run.
            own: the run as it was, complete.
            value: as the study stores it.
        """
        for keys in self.places:
            if self.config.times is not None:
                put(raw, keys, scaled(value_at(own, keys), float(value or 1)))
                continue
            put(raw, keys, copy.deepcopy(self.options[value]) if self.options else value)
            if keys[-1] == "kind":
                _leave_out_what_does_not_belong(raw, keys[:-1])

    def applies(self, values: Any) -> bool:
        """Whether its conditions hold in a complete run."""
        return all(value_at(values, keys) in allowed for keys, allowed in self.conditions)


def scaled(value: Any, factor: float) -> Any:
    """A number, or a list of them, times a factor.

    Example:
        >>> scaled([128, 6], 0.5), scaled(4, 0.25), scaled(0.2, 2.0)
        ([64, 3], 4, 0.4)
    """
    if isinstance(value, list):
        return [scaled(v, factor) for v in value]
    if not isinstance(value, int):
        return value * factor
    unit = 4 if value % 4 == 0 else 1
    return max(unit, unit * round(value * factor / unit))


def _leave_out_what_does_not_belong(raw: dict[str, Any], keys: Keys) -> None:
    """Another kind has other options: those beside it that it does not know go."""
    model, part = model_at(keys, RunConfig), value_at(raw, keys)
    if model is None:
        return
    for option in [name for name in part if name != "kind"]:
        try:
            model.model_validate({"kind": part["kind"], option: part[option]})
        except ValidationError:
            del part[option]


@dataclass(frozen=True)
class Space:
    """All that may be changed in a run.

    Args:
        run: as it is.
        parameters: those that others depend on come first.

    Example:
        >>> from mtcl_torchrec.config import parse_run
        >>> run = parse_run('''
        ... data: {log: events.parquet}
        ... schema: {time: t, features: [{name: user_id, group: user}], tasks: [{name: click, kind: binary}]}
        ... ''')
        >>> space = Space.of(run, {"optimizers.dense.lr": ParameterConfig(log=(1e-4, 1e-2))})
        >>> space.own(), space.with_values({"optimizers.dense.lr": 0.002}).optimizers.dense.lr
        ({'optimizers.dense.lr': 0.001}, 0.002)
    """

    run: RunConfig
    parameters: tuple[Parameter, ...]
    raw: dict[str, Any] = field(default_factory=dict, repr=False)
    whole: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, run: RunConfig, space: SpaceConfig) -> Space:
        """The space in a run, with every path and value looked at.

        Raises:
            ConfigError: a path that the run does not have, or a value that it does not take.
        """
        self = cls(run, (), plain(run), complete(run))
        given = sorted(space.items(), key=lambda item: (item[0].count("."), bool(item[1].when)))
        made: list[Parameter] = []
        for path, config in given:
            parameter = self._parameter(path, config)
            self._check(parameter, made)
            made.append(parameter)
        if not made:
            raise ConfigError("the space to be searched is empty")
        return cls(run, tuple(made), self.raw, self.whole)

    def _parameter(self, path: str, config: ParameterConfig) -> Parameter:
        places = resolve(path, RunConfig, self.whole)
        if EVERY in path.split("."):
            places = [keys for keys in places if self._may_be_said(keys)]
            if not places:
                raise ConfigError(f"{path}: nothing in the run has it")
        conditions = tuple(
            (keys, tuple(allowed) if isinstance(allowed, list) else (allowed,))
            for at, allowed in config.when.items()
            for keys in resolve(at, RunConfig, self.whole)
        )
        bare = Parameter(path, config, tuple(places), conditions=conditions)
        if config.times is not None:
            for keys in places:
                if not _is_number(value_at(self.whole, keys)):
                    raise ConfigError(
                        f"{path}: times multiplies numbers, and the run has {value_at(self.whole, keys)!r}"
                    )
        return Parameter(path, config, bare.places, self._own(bare), conditions)

    def _may_be_said(self, keys: Keys) -> bool:
        """Whether what holds at a place may be written there, and changes nothing: dense features have no width."""
        raw, value = copy.deepcopy(self.raw), value_at(self.whole, keys)
        put(raw, keys, value)
        try:
            return value is not None and complete(run_from_data(raw)) == self.whole
        except ConfigError:
            return False

    def _own(self, parameter: Parameter) -> Value:
        if not parameter.applies(self.whole):
            return None
        values = [value_at(self.whole, keys) for keys in parameter.places]
        bounds = parameter.config.bounds
        if bounds is None:
            return next((v for v in parameter.options if self._changes_nothing(parameter, v)), None)
        alike = all(v == values[0] for v in values)
        return (
            values[0] if alike and isinstance(values[0], (int, float)) and bounds[0] <= values[0] <= bounds[1] else None
        )

    def _changes_nothing(self, parameter: Parameter, value: Value) -> bool:
        try:
            return complete(self.written([(parameter, value)])) == self.whole
        except ConfigError:
            return False

    def written(self, settings: list[tuple[Parameter, Value]]) -> RunConfig:
        """The run with these parameters at these values, which need not be among theirs where they are ranges.

        Raises:
            ConfigError: the run does not take one.
        """
        raw = copy.deepcopy(self.raw)
        for parameter, value in settings:
            parameter.write(raw, self.whole, value)
        return run_from_data(raw)

    def _check(self, parameter: Parameter, earlier: list[Parameter]) -> None:
        """See that the run takes each of its values; where it has a condition, beside a value that fulfils it."""
        beside: list[tuple[Parameter, Value]] = []
        if not parameter.applies(self.whole):
            ways = ([(other, value)] for other in earlier for value in other.examples)
            found = next((way for way in ways if parameter.applies(self._complete_or_own(way))), None)
            if found is None:
                raise ConfigError(f"{parameter.path}: when is never so")
            beside = found
        for value in parameter.examples:
            try:
                self.written([*beside, (parameter, value)])
            except ConfigError as error:
                raise ConfigError(f"tuning of {parameter.path} to {value}: {str(error).splitlines()[0]}") from None

    def _complete_or_own(self, settings: list[tuple[Parameter, Value]]) -> dict[str, Any]:
        try:
            return complete(self.written(settings))
        except ConfigError:
            return self.whole

    def own(self) -> dict[str, Value]:
        """The run's own settings, as far as they are among the values."""
        return {p.path: p.own for p in self.parameters if p.own is not None}

    def suggest(self, trial: Any, *, own: bool = False) -> dict[str, Value]:
        """Values of an optuna trial, of the parameters that apply beside each other.

        Args:
            own: only those of which the run's own value is known.

        Raises:
            ConfigError: what was chosen so far is no run.
        """
        chosen: dict[str, Value] = {}
        for parameter in self.parameters:
            if own and parameter.own is None:
                continue
            if parameter.conditions and not parameter.applies(complete(self.with_values(chosen))):
                continue
            chosen[parameter.path] = parameter.suggest(trial)
        return chosen

    def with_values(self, values: Mapping[str, Value]) -> RunConfig:
        """The run with these settings; the others are its own.

        Raises:
            ConfigError: they do not fit together.
        """
        return self.written([(p, values[p.path]) for p in self.parameters if p.path in values])

    def as_json(self) -> dict[str, Any]:
        """As the YAML would say it."""
        return {p.path: p.config.model_dump(mode="json", exclude_unset=True) for p in self.parameters}


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Value) -> str:
    """A value for a table.

    Example:
        >>> shown(0.00123456), shown("mmoe"), shown(8)
        ('0.001235', 'mmoe', '8')
    """
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def default_space(run: RunConfig) -> SpaceConfig:
    """What is worth looking at in any run, around what it has: learning rates, widths of embeddings and their L2, the
    trunk, dropout, weights of the losses.

    Example:
        >>> from mtcl_torchrec.config import parse_run
        >>> run = parse_run('''
        ... data: {log: events.parquet}
        ... schema: {time: t, features: [{name: user_id, group: user}], tasks: [{name: click, kind: binary}]}
        ... ''')
        >>> default_space(run)["optimizers.dense.lr"].log
        (0.0001, 0.01)
    """
    tables, dense, trunk = run.optimizers.tables, run.optimizers.dense, run.model.trunk
    found: dict[str, dict[str, Any]] = {}
    if run.data_schema.tables():
        found["optimizers.tables.lr"] = {"log": (tables.lr / 10, tables.lr * 10)}
        found["schema.features.*.embedding_dim"] = {"times": [0.5, 1.0, 2.0]}
        if tables.lr_of:
            found["optimizers.tables.lr_of.*"] = {"times": [0.2, 0.5, 1.0, 2.0, 5.0]}
        found |= _around_l2(run)
    found["optimizers.dense.lr"] = {"log": (dense.lr / 10, dense.lr * 10)}
    found["model.embedding_dropout"] = {"uniform": (0.0, max(0.5, run.model.embedding_dropout))}
    if any(task.in_trunk for task in run.data_schema.tasks) and trunk.import_path is None:
        found |= _around_trunk(run)
    if run.balance.weighting.kind in ("sum", "dwa", "tchebycheff"):  # under the others, weights cancel out
        weighed = [task for task in run.data_schema.tasks if task.weight > 0][1:]
        found |= {f"schema.tasks.{t.name}.weight": {"log": (t.weight / 4, t.weight * 4)} for t in weighed}
    return {path: ParameterConfig.model_validate(values) for path, values in found.items()}


def _around_l2(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Of the embeddings: one number for all features where the run has none, else around what it has."""
    path, own = "training.regularisers.l2_embedding", run.training.regularisers.l2_embedding
    if isinstance(own, dict):
        said = {name: weight for name, weight in own.items() if weight > 0 and "." not in name}
        return {f"{path}.{name}": {"log": (weight / 10, weight * 10)} for name, weight in said.items()}
    return {path: {"log": (own / 10, own * 10)} if own > 0 else {"choices": [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1]}}


def _around_trunk(run: RunConfig) -> dict[str, dict[str, Any]]:
    trunk, found = run.model.trunk, dict[str, dict[str, Any]]()
    kinds = list(dict.fromkeys([trunk.kind, "shared_bottom", "mmoe", "ple"]))
    whole, raw = complete(run), plain(run)
    at = Parameter("model.trunk.kind", ParameterConfig(choices=kinds), (("model", "trunk", "kind"),))

    def fits(kind: str) -> bool:
        changed = copy.deepcopy(raw)
        at.write(changed, whole, kind)
        try:
            run_from_data(changed)
        except ConfigError:
            return False
        return True

    several = sum(task.in_trunk for task in run.data_schema.tasks) > 1
    kinds = [kind for kind in kinds if kind == trunk.kind or (several and fits(kind))]
    if len(kinds) > 1:
        found["model.trunk.kind"] = {"choices": kinds}
    if "mmoe" in kinds:
        experts = sorted({2, 4, 8} | ({trunk.num_experts} if trunk.kind == "mmoe" else set()))
        found["model.trunk.num_experts"] = {"choices": experts, "when": {"model.trunk.kind": "mmoe"}}
    if "ple" in kinds:
        levels = sorted({1, 2} | ({trunk.levels} if trunk.kind == "ple" and trunk.levels else set()))
        found["model.trunk.levels"] = {"choices": levels, "when": {"model.trunk.kind": "ple"}}
        shared = sorted({1, 2, 4} | ({trunk.shared_experts} if trunk.kind == "ple" and trunk.shared_experts else set()))
        found["model.trunk.shared_experts"] = {"choices": shared, "when": {"model.trunk.kind": "ple"}}
    if trunk.expert_layers:
        found["model.trunk.expert_layers"] = {"times": [0.5, 1.0, 2.0]}
    found["model.trunk.dropout"] = {"uniform": (0.0, max(0.4, trunk.dropout))}
    if run.model.tower_layers:
        found["model.tower_dropout"] = {"uniform": (0.0, max(0.4, run.model.tower_dropout))}
    return found
