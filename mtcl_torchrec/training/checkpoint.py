"""Model weights on disk, through torch.distributed.checkpoint: any sharding and number of ranks reads any other's."""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.sharding import Ranks


class _MetadataUnpickler(pickle.Unpickler):
    """Reads a checkpoint's description: plain values and the classes that describe tensors, nothing that runs code."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of those that a description is made of."""
        if "." in name:
            raise pickle.UnpicklingError(f"a checkpoint may not hold {module}.{name}")
        found = super().find_class(module, name)
        describes = module in self.MODULES and isinstance(found, type) and found.__module__ in self.MODULES
        plain = module == "torch" and (isinstance(found, torch.dtype) or name == "Size")
        known = (module, name) in {
            ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"),
        }  # fmt: skip
        if not (describes or plain or known):
            raise pickle.UnpicklingError(f"a checkpoint may not hold {module}.{name}")
        return found


class SafeReader(FileSystemReader):
    """torch's reader of checkpoints, which unpickles their description; here, without running code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of the checkpoint.

        Raises:
            pickle.UnpicklingError: it holds something else than a description.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("no description of a checkpoint")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint at `folder`: after a crash in the middle of a replacement, the one before."""
    old = folder.with_name(folder.name + ".old")
    return next((f for f in (folder, old) if f.is_dir()), None)


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
    dcp.load(state, storage_reader=SafeReader(folder))
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
    reader = SafeReader(folder)
    try:
        reader.read_metadata()
    except (pickle.UnpicklingError, OSError, EOFError, AttributeError, ImportError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no readable checkpoint ({error})") from None
    loud = logging.getLogger("torch.distributed.checkpoint").level
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        raise DataError(f"{folder}: no checkpoint of this model ({reason})") from None
    finally:
        logging.getLogger("torch.distributed.checkpoint").setLevel(loud)
    model.load_state_dict({name: state["model"][prefix + name] for name in own})
