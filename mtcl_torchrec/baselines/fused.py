"""The fused score that a run ranks by now, of a baseline's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from mtcl_torchrec.baselines.popularity import prior_of
from mtcl_torchrec.baselines.rows import BaselineData
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.modules.fusion import DenseNumber
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.fitted_fusion import build_fitted, fitted_config
from mtcl_torchrec.training.fused import item_numbers
from mtcl_torchrec.training.popularity import applied_rule, fuse_parts, gives_way, part_of


def score_of(
    run: RunConfig, tasks: Sequence[Task], *, folder: Path | None = None, encoder: FeatureEncoder | None = None
) -> tuple[nn.Module, str]:
    """The fused score that all baselines rank by, and what is to be said of it.

    It is the one that the run ranks by now, so that they compare, and by which its popularity is fused; see
    `mtcl_torchrec.training.popularity.applied_rule`.

    Args:
        folder: the run directory, where there is one.
        encoder: fitted, with `folder`.

    Raises:
        DataError: what was fitted is damaged.
    """
    config = None if folder is None else fitted_config(folder)
    if config is None or config.features:
        fitted = None if config is None else (config, nn.Identity())  # it gives way, unbuilt
        return applied_rule(run.fusion, tasks, encoder=encoder, fitted=fitted)
    assert folder is not None
    assert encoder is not None
    return applied_rule(run.fusion, tasks, fitted=(config, build_fitted(folder, config, tasks, encoder, {})))


def stand_in(run: RunConfig, folder: Path | None = None) -> str:
    """What baselines rank by where they cannot rank by the run's fused score, in words; empty where they can.

    Args:
        folder: the run directory, where there is one.
    """
    fitted = None if folder is None else fitted_config(folder)
    return gives_way(fitted or run.fusion, fitted=fitted is not None)


def numbers_of(run: RunConfig, folder: Path, encoder: FeatureEncoder) -> dict[str, DenseNumber]:
    """See `mtcl_torchrec.training.fused.item_numbers`: baselines are worth what the run is, whatever they rank by.

    Args:
        folder: the run directory, or where there is none.
        encoder: fitted.
    """
    return item_numbers(run.fusion, fitted_config(folder), encoder)


def fused_score(
    fused: nn.Module, data: BaselineData, split: str, predictions: dict[str, np.ndarray]
) -> tuple[np.ndarray, list[str]]:
    """Scores (N,) of a split's rows, and the tasks of the score that the baseline does not predict.

    Those enter as what a model without inputs would predict: the training split's base rate, shares of classes or mean.
    """
    encoded, parts, lacking = data.encoded[split], dict[str, np.ndarray](), list[str]()
    for task in (t for t in data.tasks if t.name in fused.tasks):  # type: ignore[operator]
        found = predictions.get(task.name)
        if found is None:
            lacking.append(task.name)
            prior = prior_of(data, task).astype(np.float32)
            found = np.broadcast_to(prior, (len(encoded), *prior.shape))
        parts[task.name] = part_of(task, np.array(found, np.float32), encoded)
    return fuse_parts(fused, parts, data.raw[split], encoded, data.preprocessor.declared), lacking
