"""What is fitted after training and stored beside the weights: the state of calibration and fusion."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mtcl_torchrec.schema import DataError, nearest
from mtcl_torchrec.training.directory import readable_folder, replace_folder

STATE = "state.npz"
REPORT = "report.json"


def save_state(folder: Path, module: nn.Module, about: Mapping[str, Any]) -> None:
    """Write a folder anew, whole or not at all: a module's parameters and buffers, and what is to be said of them.

    Args:
        folder: is replaced.
        module: its ``state_dict`` goes into ``state.npz``, one array a name.
        about: goes into ``report.json``.
    """
    arrays: dict[str, Any] = {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}

    def write(fresh: Path) -> None:
        fresh.mkdir(parents=True)
        with (fresh / STATE).open("wb") as file:
            np.savez(file, **arrays)
        (fresh / REPORT).write_text(json.dumps(about, indent=1), encoding="utf-8")

    replace_folder(folder, write)


def load_state(folder: Path, module: nn.Module) -> dict[str, Any]:
    """Fill a module, in place, with what `save_state` wrote of one like it.  No code in the file is run.

    Returns:
        What was said of it.

    Raises:
        DataError: the files are damaged, or hold the state of another module.
    """
    folder = readable_folder(folder)
    try:
        arrays = _arrays(folder / STATE)
        about = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f"{folder}: damaged ({error})") from None
    wanted = module.state_dict()
    for name in {**wanted, **arrays}:
        if name not in arrays or name not in wanted:
            where, there = (STATE, arrays) if name in wanted else ("the model", wanted)
            raise DataError(f"{folder}: fitted for another model: {where} has no {name!r}{nearest(name, there)}")
        if arrays[name].shape != tuple(wanted[name].shape):
            raise DataError(
                f"{folder}: fitted for another model: {name!r} has shape {arrays[name].shape}, not "
                f"{tuple(wanted[name].shape)}"
            )
    try:
        module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except (RuntimeError, TypeError) as error:
        raise DataError(f"{folder}: damaged ({' '.join(str(error).split())[:150]})") from None
    return about


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        # `np.savez` compresses nothing: a file that says to hold more than it has was not made by it.
        if sum(member.file_size for member in stored.zip.infolist()) > path.stat().st_size:
            raise ValueError("its arrays say to be larger than the file")
        return {name: stored[name] for name in stored.files}
