"""An exported model read back: the network as a graph, and what turns columns into its inputs."""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtcl_torchrec.config import HistoryConfig, StatisticsConfig
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.schema import ConfigError, DataError, Schema, Task
from mtcl_torchrec.serving.archive import check_sizes, extract
from mtcl_torchrec.serving.network import Network

FORMAT, VERSION = "mtcl model", 1
NETWORK, COMPILED = "network.pt2", "compiled.pt2"
PREPROCESSING, CATALOGUE = "preprocessing", "catalogue"
_RAW = re.compile(r"(weight|tensor)_\d+")  # a tensor that is stored as its bytes
_OF_A_GRAPH = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|"
    r"data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)"
)


@dataclass
class Artefact:
    """An exported model, see `mtcl_torchrec.serving.export.export_run`.

    A file of this kind is a program: its graph, and machine code where it was compiled, run in the process that loads
    it.  The manifest's hashes tell damage, not who made the file; `sha256` tells that it is the one you made.  No
    pickle in it is ever read: tensors are raw bytes, the rest JSON and Parquet, and a network that holds a pickle,
    which `torch.export.load` would open without restriction, or anything else than a graph and its tensors, is refused
    before.

    Args:
        manifest: what the file says of itself.
        preprocessor: fitted.
        tasks: with their label scales and numbers of classes.
        network: inputs by name -> outputs by name, as `ServingNetwork`; may be called from several threads.
        features, inputs: its sparse features and its inputs, in its order.
        histories: its histories, likewise.
        within_request: whether the score of a row depends on the others of its request.
        catalogue: users, items and contexts; None where the run had none.
        compiled: whether the network is machine code.
    """

    manifest: dict[str, Any]
    preprocessor: Preprocessor
    tasks: tuple[Task, ...]
    network: Network
    features: tuple[str, ...]
    histories: tuple[str, ...]
    inputs: tuple[str, ...]
    within_request: bool
    catalogue: Catalogue | None
    compiled: bool

    @classmethod
    def load(
        cls, path: str | Path, *, compiled: bool | None = None, sha256: str | None = None, threads: int = 4
    ) -> Artefact:
        """Read an exported model.

        Args:
            path: of the file.
            compiled: True takes the machine code, False the portable graph; None the machine code where it fits this
                machine and version of torch.
            sha256: of the file, as it was told when it was made.
            threads: how many calls of the machine code may run at once; more wait.

        Raises:
            ConfigError: there is no machine code for this machine.
            DataError: no such file, another format, a damaged file, not the one of `sha256`, or a pickle in it.
        """
        path = Path(path)
        with tempfile.TemporaryDirectory(prefix="mtcl-") as name:
            folder = Path(name)
            manifest = extract(path, folder, sha256=sha256)
            if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
                raise DataError(f"{path}: its format is {manifest.get('format')} {manifest.get('version')}, which this "
                                f"version does not read ({FORMAT} {VERSION})")  # fmt: skip
            fits = manifest.get("compiled_for") == this_machine()
            if compiled and not fits:
                raise ConfigError(f"{path}: compiled for {manifest.get('compiled_for')}, this is {this_machine()}")
            machine_code = fits if compiled is None else compiled
            try:
                statistics = [StatisticsConfig.model_validate(block) for block in manifest["statistics"]]
                histories = [HistoryConfig.model_validate(block) for block in manifest.get("histories", [])]
                schema = Schema.model_validate(manifest["schema"])
                preprocessor = Preprocessor.load(folder / PREPROCESSING, schema, statistics, histories)
                known = folder / CATALOGUE
                catalogue = Catalogue.load(known) if known.is_dir() else None
                about = manifest["network"]
                network = _machine_code(folder / COMPILED, threads) if machine_code else portable(folder / NETWORK)
                return cls(
                    manifest=manifest,
                    preprocessor=preprocessor,
                    tasks=tuple(Task.model_validate(task) for task in manifest["tasks"]),
                    network=network,
                    features=tuple(about["features"]),
                    histories=tuple(about.get("histories", ())),
                    inputs=tuple(about["inputs"]),
                    within_request=about["within_request"],
                    catalogue=catalogue,
                    compiled=machine_code,
                )
            except DataError:
                raise
            except (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                first = " ".join(str(error).split())[:200]
                raise DataError(f"{path}: the exported model is damaged ({type(error).__name__}: {first})") from None


def this_machine() -> dict[str, str]:
    """What machine code depends on."""
    return {
        "torch": torch.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def portable(path: Path) -> Network:
    """The graph of a file that `torch.export.save` wrote, run by torch operator by operator.

    `torch.export.load` opens pickles in several places of such a file, and takes older kinds of file that are pickles
    altogether.  So it is given a copy that holds nothing but what a graph with raw tensors is made of.

    Raises:
        DataError: it holds a pickle or anything else that does not belong there, or is no such file.
    """
    checked = path.with_name(f"{path.stem}.checked.pt2")
    try:
        try:
            with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
                _copy_graph(path.name, archive, copy)
        except DataError:
            raise
        except (
            zipfile.BadZipFile,
            EOFError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
        ) as error:
            raise DataError(f"{path.name}: no exported network ({error})") from None
        try:
            return torch.export.load(checked).module()
        except Exception as error:  # whatever torch finds wrong in a graph
            first = next(iter(str(error).splitlines()), "")
            raise DataError(f"{path.name}: no exported network ({type(error).__name__}: {first[:150]})") from None
    finally:
        checked.unlink(missing_ok=True)


def _machine_code(path: Path, threads: int) -> Network:
    log = logging.getLogger("torch.export.pt2_archive._package")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of details of the device, which `this_machine` compares
    try:
        from torch._inductor.package import load_package

        return load_package(str(path), num_runners=threads)
    finally:
        log.setLevel(level)


def _copy_graph(name: str, archive: zipfile.ZipFile, copy: zipfile.ZipFile) -> None:
    """Copy the members of a network; DataError for one that `torch.export.load` would unpickle, or run as code."""
    check_sizes(archive)
    root, seen = archive.namelist()[0].partition("/")[0], set[str]()
    for member in archive.infolist():
        top, _, what = member.filename.partition("/")
        if what.endswith(".pt") and member.file_size > 0:
            raise DataError(f"{name}: {what} is a pickle, which is not loaded")
        if top != root or what in seen or not _OF_A_GRAPH.fullmatch(what):
            raise DataError(f"{name}: {member.filename!r} does not belong into a network")
        seen.add(what)
        if what.endswith("_config.json"):
            for key, about in json.loads(archive.read(member))["config"].items():
                if about["use_pickle"] or not _RAW.fullmatch(about["path_name"]):
                    raise DataError(f"{name}: {key} is stored as a pickle, which is not loaded")
        with archive.open(member) as source, copy.open(member.filename, "w", force_zip64=True) as target:
            shutil.copyfileobj(source, target, 2**20)


def described(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Names, shapes and kinds of tensors for a manifest."""
    return {
        name: {"shape": shapes.get(name, ["B", *tensor.shape[1:]]), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }
