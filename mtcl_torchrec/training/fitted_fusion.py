"""The fused score that was fitted after training, in the run directory: `RUN_DIR/fusion/`.

``fusion.yaml`` says what it is (its weights may be edited), ``state.npz`` holds its parameters and buffers,
``report.json`` and ``pareto.png`` what came of fitting it.  The folder is written whole or
not at all; what stood there before is kept in it as ``former/1``, ``former/2`` and so on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from mtcl_torchrec.config import FusionConfig
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.fusion import Stacking
from mtcl_torchrec.modules.fusion.contract import Weighted
from mtcl_torchrec.schema import DataError, nearest
from mtcl_torchrec.training.directory import FUSION, readable_folder, replace_folder
from mtcl_torchrec.training.fitted import REPORT, STATE, load_state
from mtcl_torchrec.training.fused import build_fused_score

DECLARED = "fusion.yaml"
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
        config: says how to build the fused score.
        report: what came of fitting it, as JSON.
        draw: is given the path of the picture to draw.

    Returns:
        The folder that was written.
    """
    target = folder / FUSION
    before = readable_folder(target)
    fused_score = model.output.fused_score
    assert fused_score is not None
    arrays: dict[str, Any] = {name: t.detach().cpu().numpy() for name, t in fused_score.state_dict().items()}
    declared = {"format": _FORMAT, "fusion": config.model_dump(mode="json", exclude_unset=True)}

    def write(fresh: Path) -> None:
        fresh.mkdir(parents=True)
        if before.is_dir():
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


def _keep(before: Path, former: Path) -> None:
    """Copy what stood there, and what was former then, under the next number."""
    if (before / FORMER).is_dir():
        shutil.copytree(before / FORMER, former)
    former.mkdir(exist_ok=True)
    number = 1 + max((int(p.name) for p in former.iterdir() if p.name.isdigit()), default=0)
    shutil.copytree(before, former / str(number), ignore=lambda at, names: [FORMER] if Path(at) == before else [])


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
    there = readable_folder(folder / FUSION)
    path = there / DECLARED
    if not path.is_file():
        return None
    try:
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(declared, dict) or declared.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        config = FusionConfig.model_validate(declared["fusion"])
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:150]})") from None
    names = [task.name for task in model.tasks]
    for task in config.weights or ():
        if task not in names:
            raise DataError(f"{path}: no task {task!r} in the model{nearest(task, names)}")
    fused_score = build_fused_score(config, model.tasks, encoder=encoder, dims=model.output.dims)
    load_state(folder / FUSION, fused_score)
    if config.weights is not None and isinstance(fused_score, (Weighted, Stacking)):
        fused_score.set_weights(config.weights)
    model.output.fused_score = fused_score.eval()
    return config
