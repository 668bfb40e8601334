"""Modules of one's own, named in a configuration by their import path."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from mtcl_torchrec.schema import ConfigError, nearest


def import_module(path: str, options: dict[str, Any], *, key: str) -> nn.Module:
    """A module of one's own.  Importing it runs the code there.

    Args:
        path: ``module:Name``, Name being a class or function that makes an `nn.Module`.
        options: its arguments.
        key: of the configuration that names it, for messages.

    Raises:
        ConfigError: the module cannot be imported, has no such name, or what it makes is no `nn.Module`.

    Example:
        >>> import_module("mtcl_torchrec.modules.trunks:MMoe", {}, key="model.trunk")
        Traceback (most recent call last):
            ...
        mtcl_torchrec.schema.declared.ConfigError: model.trunk.kind: module 'mtcl_torchrec.modules.trunks' has no
        'MMoe' (did you mean 'MMoE'?)
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or " ")
        why = "it is not installed nor on PYTHONPATH" if missing else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}.kind: module {module_name!r} cannot be imported ({why})") from error
    make = getattr(module, name, None)
    if make is None:
        raise ConfigError(f"{key}.kind: module {module_name!r} has no {name!r}{nearest(name, dir(module))}")
    if not callable(make):
        raise ConfigError(f"{key}.kind: {path} is a {type(make).__name__}, not a class or function")
    try:
        made = make(**options)
    except Exception as error:
        raise ConfigError(
            f"{key}.options: {path} cannot be made of {options} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{key}.kind: {path} makes a {type(made).__name__}, not a torch.nn.Module")
    return made
