"""The fused score that was fitted after training, in the run directory: `RUN_DIR/fusion/`.

``fusion.yaml`` says what it is (its weights may be edited), ``state.npz`` holds its parameters and buffers,
``report.json`` and ``pareto.png`` what came of fitting it.  It stands above the ``fusion`` of run.yaml, until
`reset_fusion` (``mtcl fuse RUN_DIR --reset``).  The folder is written whole or not at all; what stood there before is
kept in it as ``former/1``, ``former/2`` and so on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError
from torch import nn

from mtcl_torchrec.config import FusionConfig
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.fusion import Stacking
from mtcl_torchrec.modules.fusion.contract import Weighted
from mtcl_torchrec.schema import ConfigError, DataError, Task, nearest
from mtcl_torchrec.training.directory import FUSION, readable_folder, replace_folder
from mtcl_torchrec.training.fitted import REPORT, STATE, load_state
from mtcl_torchrec.training.fused import build_fused_score

DECLARED, RUN_YAML = "fusion.yaml", "run.yaml"
PICTURE = "pareto.png"
FORMER = "former"
_FORMAT = 1


def save_fusion(
    folder: Path,
    model: MTCL,
    config: FusionConfig,
    report: Mapping[str, Any],
    *,
    draw: Callable[[Path], object] | None = None,
) -> Path:
    """Write what a run ranks by from now on.

    Args:
        folder: the run directory.
        model: of that run, with the fitted fused score in ``model.output``.
        config: says how to build the fused score; of its weights, those count that the fused score has.
        report: what came of fitting it, as JSON.
        draw: is given the path of the picture to draw.

    Returns:
        The folder that was written.
    """
    target = folder / FUSION
    before = readable_folder(target)
    fused_score = model.output.fused_score
    assert fused_score is not None
    if weights := weights_of(fused_score, config.weights or {}):
        config = config.model_copy(update={"weights": weights})
    arrays: dict[str, Any] = {name: t.detach().cpu().numpy() for name, t in fused_score.state_dict().items()}
    declared = {"format": _FORMAT, "fusion": config.model_dump(mode="json", exclude_unset=True),
                "tasks": list(getattr(fused_score, "tasks", ())), "instead_of": _said_by_run(folder)}  # fmt: skip

    def write(fresh: Path) -> None:
        fresh.mkdir(parents=True)
        _keep(before, fresh / FORMER)
        text = yaml.safe_dump(declared, sort_keys=False, allow_unicode=True, width=110)
        (fresh / DECLARED).write_text(text, encoding="utf-8")
        with (fresh / STATE).open("wb") as file:
            np.savez(file, **arrays)
        (fresh / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
        if draw is not None:
            draw(fresh / PICTURE)

    replace_folder(target, write)
    return target


def _said_by_run(folder: Path) -> Any:
    """The ``fusion`` of run.yaml, so that a change of it, which counts no more, is noticed; None where it says none."""
    path = folder / RUN_YAML
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("fusion") if path.is_file() else None


def _keep(before: Path, former: Path) -> int:
    """Copy what stood there under the next number, which is returned, and what was former then."""
    if (before / FORMER).is_dir():
        shutil.copytree(before / FORMER, former)
    number = max((int(p.name) for p in former.glob("*") if p.name.isdigit()), default=0)
    if (before / DECLARED).is_file():
        number += 1
        shutil.copytree(before, former / str(number), ignore=lambda at, names: [FORMER] if Path(at) == before else [])
    return number


def reset_fusion(folder: Path) -> Path | None:
    """Let the ``fusion`` of run.yaml count again; what was fitted is kept.

    Args:
        folder: the run directory.

    Returns:
        Where it is kept; None where nothing was fitted.
    """
    before, kept = readable_folder(folder / FUSION), 0
    if not (before / DECLARED).is_file():
        return None

    def write(fresh: Path) -> None:
        nonlocal kept
        fresh.mkdir(parents=True)
        kept = _keep(before, fresh / FORMER)

    replace_folder(folder / FUSION, write)
    return folder / FUSION / FORMER / str(kept)


def weights_of(fused_score: nn.Module | None, declared: Mapping[str, float]) -> dict[str, float]:
    """Task -> the weight that a fused score has; nothing, where it has none.

    Args:
        declared: is told as it is where it stands for the same number in float32.
    """
    if not isinstance(fused_score, (Weighted, Stacking)):
        return {}
    found = {}
    for task, weight in zip(fused_score.tasks, fused_score.weights.tolist(), strict=True):
        as_declared = task in declared and np.float32(declared[task]) == np.float32(weight)
        found[task] = declared[task] if as_declared else float(str(np.float32(weight)))
    return found


def set_weights(
    model: MTCL, config: FusionConfig | None, weights: Mapping[str, float], encoder: FeatureEncoder
) -> FusionConfig:
    """Give a model's fused score other weights; whatever else it has been given, or has learnt, stays.

    Args:
        config: how its fused score is built; None: not declared, so a weighted mean.
        weights: task -> weight; those that are not named keep theirs, and a new one joins them.  Of a product of
            powers, one below 0 turns the exponent negative.
        encoder: fitted, of that run.

    Returns:
        How it is built now.

    Raises:
        ConfigError: an unknown task, weights that give no score, or a fused score that has no such weights.
    """
    fused_score = model.output.fused_score
    config = config or FusionConfig(weights=weights_of(fused_score, {}))
    names = [task.name for task in model.tasks]
    for task in weights:
        if task not in names:
            raise ConfigError(f"no task {task!r}{nearest(task, names)}")
    there = weights_of(fused_score, config.weights or {})
    new = [task for task in weights if task not in there]
    if not there or (new and config.kind == "context_gated_mean"):
        raise ConfigError(f"the fused score {config.kind} has no weight of {', '.join(new)}")
    changed: dict[str, Any] = {"weights": there | dict(weights)}
    if config.kind == "power_product":
        exponents = config.exponents or {}
        turned = {task: -abs(exponents.get(task, 1.0)) for task, w in weights.items() if w < 0}
        changed["weights"] = {task: abs(w) if task in turned else w for task, w in changed["weights"].items()}
        changed |= {"exponents": exponents | turned} if turned else {}
    try:
        config = FusionConfig.model_validate(config.model_dump(exclude_unset=True) | changed)
        if not new and isinstance(fused_score, (Weighted, Stacking)) and config.kind != "power_product":
            fused_score.set_weights(weights)
            return config
        made = build_fused_score(config, model.tasks, encoder=encoder, dims=model.output.dims).eval()
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if isinstance(made, Stacking) and isinstance(fused_score, Stacking):
        made.set_weights({}, bias=fused_score.bias.item())
    model.output.fused_score = made
    return config


def fusion_fingerprint(folder: Path) -> str:
    """Names the fused score that was fitted or set after training, by what it says and has learnt; empty without one.

    Args:
        folder: the run directory.
    """
    there = readable_folder(folder / FUSION)
    if not (there / DECLARED).is_file():
        return ""
    digest = sha256((there / DECLARED).read_bytes())
    if (there / STATE).is_file():
        digest.update((there / STATE).read_bytes())
    return digest.hexdigest()[:16]


def edited_beneath(folder: Path) -> str:
    """A line, where run.yaml's fusion was changed after another was fitted, which counts; empty where it was not.

    Args:
        folder: the run directory.
    """
    path = readable_folder(folder / FUSION) / DECLARED
    declared = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "instead_of" not in declared or declared["instead_of"] == _said_by_run(folder):
        return ""
    return (
        f"the fusion in {folder / RUN_YAML} was changed, but {path} was fitted after training, and counts: "
        f"`mtcl fuse {folder} --set ...` changes its weights, `mtcl fuse {folder} --reset` goes back to run.yaml"
    )


def load_fusion(folder: Path, model: MTCL, encoder: FeatureEncoder) -> FusionConfig | None:
    """Put the fitted fused score of a run, if it has one, into its model.

    The weights are those of ``fusion.yaml``, which may be edited.

    Args:
        folder: the run directory.
        model: as it was trained.
        encoder: fitted, of that run.

    Returns:
        How the fused score is built; None where none was fitted.

    Raises:
        DataError: the folder is damaged, or fitted for another model.
    """
    config = fitted_config(folder)
    if config is not None:
        model.output.fused_score = build_fitted(folder, config, model.tasks, encoder, model.output.dims)
    return config


def fitted_config(folder: Path) -> FusionConfig | None:
    """How the fused score is built that was fitted for a run; None where none was.

    Args:
        folder: the run directory.

    Raises:
        DataError: ``fusion.yaml`` is damaged.
    """
    path = readable_folder(folder / FUSION) / DECLARED
    if not path.is_file():
        return None
    try:
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(declared, dict) or declared.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        return FusionConfig.model_validate(declared["fusion"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("fusion", *first["loc"]))
        raise DataError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:150]})") from None


def build_fitted(
    folder: Path, config: FusionConfig, tasks: Sequence[Task], encoder: FeatureEncoder, dims: Mapping[str, int]
) -> nn.Module:
    """The fused score that was fitted for a run, with all that it has learnt.

    Args:
        folder: the run directory.
        config: of `fitted_config`.
        tasks: of the run's model.
        encoder: fitted, of that run.
        dims: as of `mtcl_torchrec.training.fused.build_fused_score`.

    Raises:
        DataError: the folder is damaged, or fitted for another model.
    """
    path = readable_folder(folder / FUSION) / DECLARED
    names = [task.name for task in tasks]
    for task in config.weights or ():
        if task not in names:
            raise DataError(f"{path}: no task {task!r} in the model{nearest(task, names)}")
    try:
        fused_score = build_fused_score(config, tasks, encoder=encoder, dims=dims)
        fitted = yaml.safe_load(path.read_text(encoding="utf-8")).get("tasks")
        _check_tasks(path, fitted, getattr(fused_score, "tasks", ()))
        load_state(folder / FUSION, fused_score)
        if config.weights is not None and isinstance(fused_score, (Weighted, Stacking)):
            fused_score.set_weights(config.weights)
    except DataError:
        raise
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: {error}") from None
    return fused_score.eval()


def _check_tasks(path: Path, fitted: Any, declared: Sequence[str]) -> None:
    """Raise DataError where a task was added to fusion.yaml or taken away by hand."""
    if not isinstance(fitted, list) or fitted == list(declared):
        return
    added, gone = [t for t in declared if t not in fitted], [t for t in fitted if t not in declared]
    if added:
        what = f"names {', '.join(added)}, which the score that was fitted has not"
    elif gone:
        what = f"lacks {', '.join(gone)}, which the score that was fitted has"
    else:
        what = f"names its tasks in another order than that in which they were fitted ({', '.join(fitted)})"
    raise DataError(
        f"{path} {what}: weights may be edited here, but a task joins by "
        f"`mtcl fuse {path.parent.parent} --set {next(iter(added), 'task')}=...`, and a weight of 0 takes it out"
    )
