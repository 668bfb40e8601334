"""The fused score that a run ranks by now, of a baseline's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mtcl_torchrec.baselines.popularity import prior_of
from mtcl_torchrec.baselines.rows import BaselineData
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.labels import requests_of
from mtcl_torchrec.modules.fusion import DenseNumber, RowContext, WeightedMean, fuse
from mtcl_torchrec.modules.heads import in_unit_interval
from mtcl_torchrec.schema import Task
from mtcl_torchrec.training.fitted_fusion import build_fitted, fitted_config
from mtcl_torchrec.training.fused import build_fused_score, is_learned, item_numbers


def score_of(
    run: RunConfig, tasks: Sequence[Task], *, folder: Path | None = None, encoder: FeatureEncoder | None = None
) -> tuple[nn.Module, str]:
    """The fused score that all baselines rank by, and what is to be said of it.

    It is the one that the run ranks by now, so that they compare: fitted after training, or else as declared.  One that
    reads inputs of the model, or learnt in training, gives way to the weighted mean of the declared weights, or of all
    binary tasks where there are none.

    Args:
        folder: the run directory, where there is one.
        encoder: fitted, with `folder`.

    Raises:
        DataError: what was fitted is damaged.
    """
    fitted, said = None if folder is None else fitted_config(folder), stand_in(run, folder)
    if said:
        weights = (fitted or run.fusion).weights  # type: ignore[union-attr]
        return (WeightedMean(weights) if weights else build_fused_score(None, tasks)), said
    if fitted is not None:
        assert folder is not None
        assert encoder is not None
        return build_fitted(folder, fitted, tasks, encoder, {}), ""
    return build_fused_score(run.fusion, tasks), ""


def stand_in(run: RunConfig, folder: Path | None = None) -> str:
    """What baselines rank by where they cannot rank by the run's fused score, in words; empty where they can.

    Args:
        folder: the run directory, where there is one.
    """
    fitted = None if folder is None else fitted_config(folder)
    config = fitted or run.fusion
    if config is None:
        return ""
    if config.numbers or config.features:
        why = "reads inputs of the model"
    elif fitted is None and is_learned(config):
        why = "is a module of its own" if config.import_path is not None else "learns along with the model"
    else:
        return ""
    of = "of its weights" if config.weights else "of the binary tasks"
    return f"the run's fused score ({config.kind}) {why}: baselines rank by the weighted mean {of} instead"


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
    rows, parts, lacking = data.held_out[split], dict[str, torch.Tensor](), list[str]()
    for task in (t for t in data.tasks if t.name in fused.tasks):  # type: ignore[operator]
        found = predictions.get(task.name)
        if found is None:
            lacking.append(task.name)
            prior = prior_of(data, task).astype(np.float32)
            found = np.broadcast_to(prior, (len(rows), *prior.shape))
        own = None
        if task.kind == "multiclass":
            feature = task.item_class or (task.name if task.name in rows.ids else None)
            own = None if feature is None else torch.from_numpy(_single(data, split, feature))
        predicted = torch.from_numpy(np.array(found, np.float32))
        parts[task.name] = in_unit_interval(task, predicted, own).clamp(0, 1)
    requests = data.encoded[split].requests
    if requests is None and getattr(fused, "within_request", False):  # fitted after training, which compared no rows
        schema = data.preprocessor.declared
        requests = requests_of(data.raw[split], schema.request_column or schema.user)
    context = RowContext(torch.zeros(len(rows), 0), {}, requests)
    with torch.no_grad():
        return fuse(fused, parts, context).numpy(), lacking


def _single(data: BaselineData, split: str, feature: str) -> np.ndarray:
    """(N,) the one value of each row; of a bag, the first, and -1 of an empty one."""
    rows = data.held_out[split]
    if feature in rows.ids:
        return rows.ids[feature]
    values, lengths = rows.bags[feature]
    starts = np.cumsum(lengths) - lengths
    padded = np.r_[values, -1]
    return np.where(lengths > 0, padded[np.minimum(starts, len(values))], -1)
