"""A finished run as one file that needs no code of this package to be run."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mtcl_torchrec.config.commands import Compile
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.modules.towers import MultiTaskTower
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.serving.archive import write_archive
from mtcl_torchrec.serving.artefact import (
    CATALOGUE,
    COMPILED,
    FORMAT,
    NETWORK,
    PREPROCESSING,
    VERSION,
    described,
    portable,
    this_machine,
)
from mtcl_torchrec.serving.network import AnyNetwork, serving_network
from mtcl_torchrec.serving.tables import TablePrecision
from mtcl_torchrec.training.finished import FinishedRun

EXAMPLE_ROWS = 2 * 757  # that torch.export sees: a size that no layer has, lest it should take the two for one
# Of the graph against the modules it was made of, relative to 1 + the value.  bf16 has steps of 2⁻⁸ of a value, and
# compiled code rounds to it in other places.
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2}
_SHAPES: dict[str, list[Any]] = {
    "dense": ["B", "D"], "values": ["V"], "lengths": ["F", "B"], "request": ["B"], "alike": ["B"], "first": ["R"],
    "histories": ["W"], "history_lengths": ["H", "R"],
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the file.
        bytes: its size.
        sha256: of the file, in hex; give it to `Artefact.load` where the file may have been changed on its way.
        compiled: whether machine code for this kind of machine is in it.
        difference: output -> largest difference from the model on random rows; of probabilities and scores absolute,
            of values relative to 1 + the value.
    """

    path: Path
    bytes: int
    sha256: str
    compiled: bool
    difference: dict[str, float]


def export_run(
    run: FinishedRun, path: str | Path, *, tables: TablePrecision = "fp32", compiled: Compile = "auto"
) -> Exported:
    """Write tables, trunk, heads, calibration and fused score as one graph, with all it takes to fill its inputs.

    The file is an uncompressed ZIP with a manifest of sizes and SHA-256:

    - ``manifest.json``: inputs and outputs of the network, schema, tasks, statistics.
    - ``network.pt2``: the graph for `torch.export.load`, and its tensors; operators of torch alone, any batch size.
    - ``compiled.pt2``: the same as machine code for `torch._inductor.aoti_load_package` or C++, where a compiler was
      there.  It holds the tensors once more.
    - ``preprocessing/``, ``catalogue/``: vocabularies, scales, statistics, users and items as Parquet and JSON.

    ``network.pt2`` runs wherever torch does, without this package, TorchRec or FBGEMM:
    ``torch.export.load("network.pt2").module()(dense=..., values=..., lengths=...)`` gives a dict of tensors.  See
    `mtcl_torchrec.serving.network.ServingNetwork.forward` for the inputs, and the manifest for their names and order.

    Args:
        run: read back.
        path: of the new file; a file that stands there is replaced.
        tables: how embeddings are stored: ``"fp16"`` halves them, ``"int8"`` keeps each row in eight bits with a scale
            and a bias of its own.  All else is float32, or bf16 where the run says so.
        compiled: whether machine code is made, which takes a minute or several; "auto": where there is a C++ compiler.

    Raises:
        ConfigError: a module of the model cannot be exported, or "yes" without a compiler.
    """
    path = Path(path)
    if compiled == "yes" and not _has_compiler():
        raise ConfigError("compiling needs a C++ compiler (g++ or clang++), and none is on PATH")
    encoder = run.preprocessor.encoder
    network = serving_network(run.model, tables).eval()
    program = _exported(network, encoder)
    sample = sample_inputs(network, encoder, 5)
    with tempfile.TemporaryDirectory(prefix="mtcl-export-") as name:
        folder = Path(name)
        _save(program, folder / NETWORK)
        difference = _compare(portable(folder / NETWORK), network, encoder)
        makes_code = compiled == "yes" or (compiled == "auto" and _has_compiler())
        if makes_code:
            difference = _merge(difference, _compile(program, folder / COMPILED, network, encoder))
        if tables != "fp32":
            difference = _differences(serving_network(run.model).eval(), network, encoder)
        run.preprocessor.save(folder / PREPROCESSING, for_network=True)
        if run.catalogue is not None:
            run.catalogue.save(folder / CATALOGUE)
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            outputs = network(**sample)
        about = {
            "format": FORMAT, "version": VERSION,
            "made_with": {"mtcl_torchrec": version("mtcl_torchrec"), "torch": torch.__version__},
            "compiled_for": this_machine() if makes_code else None,
            "tables": tables,
            "network": {
                "inputs": described(sample, _SHAPES), "outputs": described(outputs, {}),
                "features": list(network.features), "histories": list(network.histories),
                "within_request": network.within_request,
            },
            "tasks": [task.model_dump(mode="json", exclude_unset=True) for task in run.model.tasks],
            "schema": run.preprocessor.declared.model_dump(mode="json", exclude_unset=True),
            "statistics": [block.model_dump(mode="json", exclude={"prepared"}) for block in run.preprocessor.config],
            "histories": [
                history.config.model_dump(mode="json", exclude={"prepared"}) for history in run.preprocessor.histories
            ],
        }  # fmt: skip
        digest = write_archive(path, folder, about)
    return Exported(path, path.stat().st_size, digest, makes_code, difference)


def sample_inputs(network: AnyNetwork, encoder: FeatureEncoder, rows: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of a network.

    Args:
        rows: B; every two of them have the same user and context where the network makes use of it.
    """
    draw = torch.Generator().manual_seed(seed)
    features = {f.name: f for f in encoder.schema.sparse_features}
    kinds = torch.arange(rows) // 2
    values, lengths = [], []
    for name in network.features:
        feature, size = features[name], encoder.num_rows(features[name])
        shared = "item" not in feature.group and "alike" in network.inputs
        count = torch.ones(rows, dtype=torch.int64)
        if feature.kind in ("bag", "semantic_id"):
            count = torch.randint(0, 4, (rows,), generator=draw)
            count = count[kinds] if shared else count
        drawn = torch.randint(size, (rows, int(count.max())), generator=draw)
        drawn = drawn[kinds] if shared else drawn
        values.append(torch.cat([row[:n] for row, n in zip(drawn, count.tolist(), strict=True)]))
        lengths.append(count)
    past, past_lengths = _sample_histories(network, encoder, int(kinds[-1]) + 1, draw)
    groups = encoder.dense_groups
    dense = torch.randn(rows, len(groups), generator=draw)
    if "alike" in network.inputs:
        of_user = torch.tensor(["item" not in of for of in groups], dtype=torch.bool)
        dense = torch.where(of_user, dense[kinds], dense)
    all_inputs = {
        "dense": dense,
        "values": torch.cat(values) if values else torch.empty(0, dtype=torch.int64),
        "lengths": torch.stack(lengths) if lengths else torch.empty(0, rows, dtype=torch.int64),
        "request": kinds,
        "alike": kinds,
        "first": torch.arange(0, rows, 2),
        "histories": past,
        "history_lengths": past_lengths,
    }
    return {name: all_inputs[name] for name in network.inputs}


def _sample_histories(
    network: AnyNetwork, encoder: FeatureEncoder, users: int, draw: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and lengths of histories, some empty, some beyond their cap."""
    features = {f.name: f for f in encoder.schema.sparse_features}
    lengths: dict[str, torch.Tensor] = {}
    values = [torch.empty(0, dtype=torch.int64)]
    for name in network.histories:
        feature = features[name]
        count = torch.randint(0, feature.max_length + 2, (users,), generator=draw)
        lengths[name] = lengths[feature.beside] if feature.beside else count  # as long as what it stands beside
        size = encoder.num_rows(feature)
        values.append(torch.randint(size, (int(lengths[name].sum()),), generator=draw))
    return torch.cat(values), torch.stack(list(lengths.values())) if lengths else torch.empty(0, users).long()


def _exported(network: AnyNetwork, encoder: FeatureEncoder) -> ExportedProgram:
    dynamic: dict[str, dict[int, Any]] = {name: {0: Dim.AUTO} for name in network.inputs}
    dynamic |= {name: {1: Dim.AUTO} for name in ("lengths", "history_lengths") if name in network.inputs}
    try:
        with torch.no_grad(), _quietly():
            program = torch.export.export(
                network, (), kwargs=sample_inputs(network, encoder, EXAMPLE_ROWS), strict=False, dynamic_shapes=dynamic
            )
    except Exception as error:  # whatever a module of one's own does that a graph cannot hold
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"this model cannot be exported ({type(error).__name__}: {first}); a trunk or fused score of your own must "
            "be one that torch.export takes: no branches on values, x.shape[0] instead of len(x)"
        ) from error
    return program


def _save(program: ExportedProgram, path: Path) -> None:
    inputs, program._example_inputs = program._example_inputs, None  # they would be stored as a pickle
    try:
        with _quietly():
            torch.export.save(program, path)
    finally:
        program._example_inputs = inputs


def _compile(program: ExportedProgram, path: Path, network: AnyNetwork, encoder: FeatureEncoder) -> dict[str, float]:
    try:
        with _quietly():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            code = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"this model cannot be compiled here ({type(error).__name__}: {first}); export it without"
        ) from error
    return _compare(code, network, encoder)


def _compare(made: Any, network: nn.Module, encoder: FeatureEncoder) -> dict[str, float]:
    """Largest differences of what was made; ConfigError where they are more than rounding."""
    try:
        difference = _differences(made, network, encoder)
    except (AssertionError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"the exported model does not run with another number of rows ({first}); a trunk or fused score of your "
            "own must take x.shape[0] instead of len(x)"
        ) from error
    name = max(difference, key=lambda name: difference[name])
    towers = [module for module in network.modules() if isinstance(module, MultiTaskTower)]
    if difference[name] > max(TOLERANCE[tower.precision] for tower in towers):
        raise ConfigError(f"the exported model gives another {name!r} than the run, by {difference[name]:.2g}")
    return difference


def _differences(made: Any, network: Any, encoder: FeatureEncoder) -> dict[str, float]:
    difference: dict[str, float] = {}
    with torch.no_grad():
        for rows in (1, 2, 9, 64):
            sample = sample_inputs(network, encoder, rows, seed=rows)
            expected, got = network(**sample), made(**sample)
            of = {n: float(((got[n] - v).abs() / v.abs().clamp(min=1)).max()) for n, v in expected.items()}
            difference = _merge(difference, of)
    return difference


def _merge(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: max(value, one.get(name, 0.0)) for name, value in other.items()}


def _has_compiler() -> bool:
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else [config.cpp.cxx]
    return any(name is not None and shutil.which(name) is not None for name in (*names, "g++", "clang++"))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch says of itself while it traces."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.export", "torch.fx", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
