"""Dotted paths into a run: `optimizers.dense.lr`, `schema.tasks.click.weight`, `schema.features.*.embedding_dim`."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, RootModel

from mtcl_torchrec.schema import ConfigError, nearest

Keys = tuple[str | int, ...]
EVERY = "*"


def resolve(path: str, root: type[BaseModel], values: Any) -> list[Keys]:
    """The places that a path means.

    Args:
        path: keys, joined by dots.  Of a list, the element's name or number (from 0); ``*`` is all elements of a list,
            or all keys of a mapping that has any.
        root: the model of the whole.
        values: the whole, as plain data with every default written out.

    Raises:
        ConfigError: no such place; it names the key and the nearest right one.

    Example:
        >>> from mtcl_torchrec.config.training import OptimizersConfig
        >>> resolve("dense.lr", OptimizersConfig, {"dense": {"lr": 0.1}})
        [('dense', 'lr')]
        >>> resolve("dense.lrr", OptimizersConfig, {"dense": {"lr": 0.1}})
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: dense.lrr: no key 'lrr' in dense (did you mean 'lr'?)
    """
    found: list[tuple[Keys, Any, Any]] = [((), root, values)]
    for part in path.split("."):
        found = [step for keys, kind, value in found for step in _steps(path, part, keys, kind, value)]
    return [keys for keys, _, _ in found]


def _steps(path: str, part: str, keys: Keys, kind: Any, value: Any) -> list[tuple[Keys, Any, Any]]:
    """Where one part of a path leads from a place."""
    kinds, here = _alternatives(kind), ".".join(map(str, keys)) or "the run"
    if isinstance(value, list):
        return _elements(path, part, keys, kinds, value)
    inner = [next(iter(k.model_fields.values())).annotation if _is_root(k) else k for k in kinds]
    kinds = [k for of in inner for k in _alternatives(of)]
    models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    mapping = next((k for k in kinds if get_origin(k) is dict), None)
    inside = value if isinstance(value, dict) else {}
    if mapping is not None:
        names = list(inside) if part == EVERY else [part]
        if not names:
            raise ConfigError(f"{path}: {here} has no keys for {EVERY!r}")
        return [((*keys, name), get_args(mapping)[1], inside.get(name)) for name in names]
    if not models:
        raise ConfigError(f"{path}: {here} holds nothing inside it, so there is no {part!r}")
    fields = {field.alias or name: field for model in models for name, field in model.model_fields.items()}
    if part not in fields:
        raise ConfigError(f"{path}: no key {part!r} in {here}{nearest(part, fields)}")
    return [((*keys, part), fields[part].annotation, inside.get(part))]


def _elements(path: str, part: str, keys: Keys, kinds: Sequence[Any], value: list) -> list[tuple[Keys, Any, Any]]:
    element = next((get_args(k)[0] for k in kinds if get_origin(k) in (list, tuple)), Any)
    names = [item.get("name", i) if isinstance(item, dict) else i for i, item in enumerate(value)]
    here = ".".join(map(str, keys))
    if part == EVERY:
        return [((*keys, name), element, item) for name, item in zip(names, value, strict=True)]
    for i, name in enumerate(names):
        if part in (str(name), str(i)):
            return [((*keys, name), element, value[i])]
    raise ConfigError(f"{path}: no {part!r} in {here}{nearest(part, map(str, names))}")


def _is_root(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, RootModel)


def _alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [k for option in get_args(annotation) for k in _alternatives(option)]
    return [] if annotation is type(None) else [annotation]


def model_at(keys: Keys, root: type[BaseModel]) -> type[BaseModel] | None:
    """The model of a mapping at a place, None where there is none or several.

    Example:
        >>> from mtcl_torchrec.config.training import OptimizersConfig
        >>> model_at(("dense",), OptimizersConfig).__name__
        'DenseOptimizerConfig'
    """
    kind: Any = root
    for key in keys:
        alternatives = [
            k
            for k in _alternatives(kind)
            if get_origin(k) in (list, tuple, dict) or (isinstance(k, type) and issubclass(k, BaseModel))
        ]
        if len(alternatives) != 1:
            return None
        (one,) = alternatives
        if get_origin(one) in (list, tuple, dict):
            kind = get_args(one)[1 if get_origin(one) is dict else 0]
            continue
        fields = {field.alias or name: field for name, field in one.model_fields.items()}
        kind = fields[str(key)].annotation if key in fields else None
    models = [k for k in _alternatives(kind) if isinstance(k, type) and issubclass(k, BaseModel)]
    return models[0] if len(models) == 1 else None


def value_at(values: Any, keys: Keys) -> Any:
    """What stands at a place of plain data; None where nothing does.

    Example:
        >>> value_at({"tasks": [{"name": "click", "weight": 2}]}, ("tasks", "click", "weight"))
        2
    """
    for key in keys:
        if isinstance(values, list):
            at = _index(values, key)
            values = None if at is None else values[at]
        elif isinstance(values, dict):
            values = values.get(key)
        else:
            return None
    return values


def put(values: dict, keys: Keys, value: Any) -> None:
    """Write a value to a place of plain data, in place; mappings on the way are made.

    Example:
        >>> run = {"tasks": [{"name": "click"}]}
        >>> put(run, ("tasks", "click", "weight"), 2); put(run, ("optimizers", "dense", "lr"), 0.1)
        >>> run
        {'tasks': [{'name': 'click', 'weight': 2}], 'optimizers': {'dense': {'lr': 0.1}}}
    """
    at: Any = values
    for i, key in enumerate(keys):
        where: Any = _index(at, key) if isinstance(at, list) else key
        if i == len(keys) - 1:
            at[where] = value
        elif isinstance(at, dict) and not isinstance(at.get(where), (dict, list)):
            at[where] = {}
        at = at[where]


def _index(values: list, key: str | int) -> int | None:
    named = next((i for i, item in enumerate(values) if isinstance(item, dict) and item.get("name") == key), None)
    return named if named is not None or not isinstance(key, int) else key if key < len(values) else None
