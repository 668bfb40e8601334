"""The popularity that a run's fused score is held against: those of the events, fused as the run fuses its predictions.

Whatever predicts tasks can be ranked so, baselines as well; all give the fused score what `parts_of` makes of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from mtcl_torchrec.config import FusionConfig
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.encoding import FeatureEncoder
from mtcl_torchrec.data.labels import requests_of
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.modules.fusion import RowContext, WeightedMean, fuse
from mtcl_torchrec.modules.heads import in_unit_interval
from mtcl_torchrec.schema import Schema, Task
from mtcl_torchrec.training.counted_items import counted_feature
from mtcl_torchrec.training.directory import RunWarning
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fused import build_fused_score, is_learned


def applied_rule(
    declared: FusionConfig | None,
    tasks: Sequence[Task],
    *,
    encoder: FeatureEncoder | None = None,
    fitted: tuple[FusionConfig, nn.Module] | None = None,
) -> tuple[nn.Module, str]:
    """The fused score of a run as other predictions than its own can be ranked by it, and what is to be said of it.

    It is the run's own: fitted after training, or else as declared.  One that reads embeddings of the model, or learnt
    in training, gives way to the weighted mean of its weights, or of all binary tasks where it has none.

    Args:
        declared: in run.yaml.
        tasks: with classes and scales.
        encoder: fitted; needed where an event is worth a number of the item.
        fitted: what was fitted after training, and how it is built.
    """
    config = declared if fitted is None else fitted[0]
    if said := gives_way(config, fitted=fitted is not None):
        assert config is not None
        return (WeightedMean(config.weights) if config.weights else build_fused_score(None, tasks)), said
    return (build_fused_score(config, tasks, encoder=encoder) if fitted is None else fitted[1]), ""


def gives_way(config: FusionConfig | None, *, fitted: bool) -> str:
    """Why other predictions than the run's own cannot be ranked by its fused score, and by what they are instead; empty
    where they can be.

    Args:
        config: the fused score, as declared or as fitted after training.
        fitted: whether it is that; what it has learnt is then kept with the run.

    Example:
        >>> gives_way(FusionConfig(kind="monotone_network", signs={"click": 1}), fitted=False).split(": ")[1]
        'baselines rank by the weighted mean of the binary tasks instead'
        >>> gives_way(FusionConfig(weights={"click": 1.0}), fitted=False)
        ''
    """
    if config is None:
        return ""
    if config.features:
        why = "reads inputs of the model"
    elif not fitted and is_learned(config):
        why = "is a module of its own" if config.import_path is not None else "learns along with the model"
    else:
        return ""
    of = "of its weights" if config.weights else "of the binary tasks"
    return f"the run's fused score ({config.kind}) {why}: baselines rank by the weighted mean {of} instead"


def rule_of(run: FinishedRun) -> nn.Module:
    """By what the popularities of a finished run's events are fused: what it ranks by now, where it can be."""
    now, fitted = run.model.output.fused_score, None
    if now is not None and run.fusion is not None and run.fusion is not run.config.fusion:
        fitted = (run.fusion, now)
    return applied_rule(run.config.fusion, run.model.tasks, encoder=run.preprocessor.encoder, fitted=fitted)[0]


def part_of(task: Task, predicted: np.ndarray | torch.Tensor, encoded: EncodedRows) -> np.ndarray:
    """(N,) float32: what a task gives the fused score.

    Args:
        predicted: (N,), or (N, C) of a multiclass task.
    """
    own = None
    if task.kind == "multiclass":
        feature = task.item_class or task.name
        own = encoded.first_values(feature) if feature in encoded.keys else None
    given = (
        torch.from_numpy(np.require(predicted, requirements="W")) if isinstance(predicted, np.ndarray) else predicted
    )
    return in_unit_interval(task, given.float(), own).clamp(0, 1).numpy()


def popularity_of(run: FinishedRun) -> Popularity | None:
    """How popular items are in a finished run's training rows; None where it does not know, with a warning where runs
    from before did not keep it."""
    streamed = run.config.data.stream or run.config.data.synthetic is not None
    if run.popularity is None and (
        run.catalogue is not None or (streamed and counted_feature(run.config.data_schema) is not None)
    ):
        said = "the run is from before it kept how popular items are for each event: it is held against no popularity "
        warnings.warn(f"{said}(train it again for that)", RunWarning, stacklevel=2)
    return run.popularity


def popularity_of_rows(
    popularity: Popularity | None, tasks: Sequence[Task], raw: Rows, encoded: EncodedRows, schema: Schema
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of N rows, task -> (N,) float32, twice: how popular the item is for the event, of binary and regression tasks;
    and what the popularity of each task gives the fused score, of a multiclass task the share of the item's own class.
    Both are empty where the run knows of no popularity.
    """
    if popularity is None or schema.item is None:
        return {}, {}
    by_event, parts = popularity.of_rows(raw.frame[schema.item], encoded), dict[str, np.ndarray]()
    for task in tasks:
        if task.kind != "multiclass":
            parts[task.name] = part_of(task, by_event[task.name], encoded)
        else:
            shares = torch.tensor(popularity.usual[task.name], dtype=torch.float32)
            parts[task.name] = part_of(task, shares.expand(len(encoded), -1), encoded)
    return by_event, parts


@torch.no_grad()
def fuse_parts(
    fused: nn.Module, parts: Mapping[str, np.ndarray], raw: Rows, encoded: EncodedRows, schema: Schema
) -> np.ndarray:
    """(N,) float32 scores by what `applied_rule` returned.

    Args:
        parts: of all its tasks at least.
        raw, encoded: the same rows.
        schema: tells which rows are ranked against each other.
    """
    requests = encoded.requests
    if requests is None and getattr(fused, "within_request", False):  # fitted after training, which compared no rows
        requests = requests_of(raw, schema.request_column or schema.user)
    given = {name: torch.from_numpy(parts[name]) for name in fused.tasks}  # type: ignore[union-attr]
    return fuse(fused, given, RowContext(encoded.dense.float(), {}, requests)).numpy()
