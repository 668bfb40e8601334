"""Model weights on disk, through torch.distributed.checkpoint: any sharding and number of ranks reads any other's."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.sharding import Ranks


def save_weights(model: nn.Module, folder: Path, where: Ranks) -> None:
    """Write the model's weights; an earlier checkpoint in `folder` is replaced only when the new one is complete.

    Every rank must call this with the same folder, on a file system that all share.
    """
    fresh = folder.with_name(folder.name + ".writing")
    if where.first:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
    where.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=fresh)
    where.barrier()
    if where.first:
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    where.barrier()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read weights into a model with tables sharded over the current ranks."""
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])


def load_unsharded(model: nn.Module, folder: Path, *, prefix: str) -> None:
    """Read weights into a plain model in this process alone, without a process group.

    Args:
        model: its tables on a real device.
        prefix: what stands before the model's own names in the checkpoint.

    Raises:
        DataError: the folder holds no checkpoint of this model.
    """
    own = model.state_dict()
    state: dict[str, dict[str, torch.Tensor]] = {"model": {prefix + name: value for name, value in own.items()}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=folder, no_dist=True)
    except (CheckpointException, FileNotFoundError, RuntimeError, ValueError) as error:
        raise DataError(f"{folder}: no checkpoint of this model ({str(error).splitlines()[0]})") from None
    model.load_state_dict({name: state["model"][prefix + name] for name in own})
