"""torch.compile of the part of a training step that holds no table."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from mtcl_torchrec.models import MTCL
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.sharding import Ranks


@contextmanager
def compiled(model: MTCL, part: Literal["none", "dense"], where: Ranks) -> Iterator[None]:
    """While the block runs, the model's tower (everything after the embeddings, up to the logits) is compiled; every
    rank calls this.

    Parameters keep their names, and afterwards the model is what it was before.  Batches of any size share one graph,
    so that the last one of an epoch compiles nothing anew.

    Args:
        part: ``"none"`` compiles nothing.

    Raises:
        ConfigError: a rank has no compiler that inductor could use; the same on every rank.
    """
    if part == "none":
        yield
        return
    missing = [told for told in where.gather(_missing_compiler(where.device)) if told]
    if missing:
        raise ConfigError(f"training.compile dense: {missing[0]}, or leave it out")
    model.tower.compile(dynamic=True)
    try:
        yield
    finally:
        model.tower._compiled_call_impl = None  # which is all that `compile` sets


@contextmanager
def eagerly() -> Iterator[None]:
    """While the block runs, nothing is compiled: evaluation runs once an epoch, and its graphs would cost more than
    they save."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _missing_compiler(device: torch.device) -> str | None:
    """What there is to install; None where nothing is missing."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs the package triton; pip install triton"
    compiler = os.environ.get("CXX", "g++")  # inductor looks for the same
    if shutil.which(compiler):
        return None
    return f"needs a C++ compiler, and {compiler!r} is not on the PATH; install g++ or set CXX"
