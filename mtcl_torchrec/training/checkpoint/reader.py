"""Reading a checkpoint without running code from it, into any sharding, and into tables that have grown since."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.sharding import is_table

WEIGHTS = "weights."  # what stands before a parameter's name
AVERAGE = "average."  # and before its moving average's
_HEAD = ".tower.heads."
_COUNTS = ".popularity."  # of the items that a sampled softmax has met


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


class GrownTablesPlanner(DefaultLoadPlanner):
    """Reads tensors only, and lets a table (or the counts of its items) have more rows, or a softmax head more classes,
    than were saved: the further ones keep their first values.

    torch would unpickle, without restriction, what a checkpoint calls an object instead of a tensor.
    """

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads.

        Raises:
            ValueError: what is saved under a wanted name is no tensor.
        """
        assert self.metadata is not None
        saved = dict(self.metadata.state_dict_metadata)
        for name, wanted in self.state_dict.items():
            there = saved.get(name)
            if there is not None and not isinstance(there, TensorStorageMetadata):
                raise ValueError(f"{name} is no tensor there")
            if there is None or not (is_table(name) or _HEAD in name or _COUNTS in name):
                continue
            size = wanted.size()
            if there.size != size and there.size[1:] == size[1:] and there.size[0] < size[0]:
                saved[name] = dataclasses.replace(there, size=size)
        self.metadata = dataclasses.replace(self.metadata, state_dict_metadata=saved)
        return super().create_local_plan()


def saved_tensors(folder: Path) -> Mapping[str, torch.Size]:
    """Name -> shape of everything in a checkpoint.

    Raises:
        DataError: the folder holds no readable checkpoint.
    """
    try:
        metadata = SafeReader(folder).read_metadata()
    except (pickle.UnpicklingError, OSError, EOFError, AttributeError, ImportError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no readable checkpoint ({error})") from None
    return {n: m.size for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}


def read_tensors(tensors: dict[str, Any], folder: Path, *, alone: bool = False) -> None:
    """Fill tensors, in place, from a checkpoint.

    Args:
        tensors: name -> tensor, or this rank's part of one (DTensor).
        folder: the checkpoint.
        alone: in this process only, also where there is a process group.

    Raises:
        DataError: a tensor is missing there or has another shape, or the files are damaged.
    """
    loud = logging.getLogger("torch.distributed.checkpoint").level
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=SafeReader(folder), planner=GrownTablesPlanner(), no_dist=alone)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        raise DataError(f"{folder}: no checkpoint of this model ({reason})") from None
    finally:
        logging.getLogger("torch.distributed.checkpoint").setLevel(loud)


def load_unsharded(model: nn.Module, folder: Path, *, prefix: str) -> None:
    """Read weights, averaged ones where there are, into a plain model in this process, without a process group.

    Args:
        model: its tables on a real device.
        prefix: what stands before the model's own names in the checkpoint.

    Raises:
        DataError: the folder holds no checkpoint of this model.
    """
    own = model.state_dict()
    kind = AVERAGE if any(name.startswith(AVERAGE) for name in saved_tensors(folder)) else WEIGHTS
    tensors = {kind + prefix + name: value for name, value in own.items()}
    read_tensors(tensors, folder, alone=True)
    model.load_state_dict({name: tensors[kind + prefix + name] for name in own})
