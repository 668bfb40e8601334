"""What a run on a synthetic world knows, of what can be known: its predictions beside the world's own probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.batch import EncodedRows, global_batches
from mtcl_torchrec.data.outcomes import Outcome
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.synthetic import World
from mtcl_torchrec.data.world_windows import world_of
from mtcl_torchrec.evaluation.knowable import knowable_score, of_tasks
from mtcl_torchrec.evaluation.metrics import Metrics
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.fusion import ExpectedValue, RowContext, fuse
from mtcl_torchrec.schema import Schema, Task

_KINDS = {"event": "binary", "content": "multiclass", "stars": "regression", "amount": "regression"}


def knowable_of(
    run: RunConfig, model: MTCL, raw: Rows, encoded: EncodedRows, table: PredictionsTable
) -> dict[str, Metrics] | None:
    """How much of what is knowable of these rows the predictions know, see `mtcl_torchrec.evaluation.knowable`.

    Args:
        run: its data may be a world.
        model: what predicts; an ensemble, too.
        raw, encoded: the same rows.
        table: predictions for them.

    Returns:
        Task, or conditional prediction of a chain -> its figures; under ``"score"`` those of the fused score, where
        that depends on nothing but the predictions of a row.  Nothing of rows that are not the world's.  None where no
        world is behind the run.
    """
    if run.data.synthetic is None:
        return None
    world = world_of(run.data.synthetic)
    if len(raw) == 0 or not world.is_of(raw.frame):
        return {}
    true = true_predictions(world, run.data_schema, model.tasks, raw.frame)
    found = of_tasks(table, true)
    score = true_score(model, encoded, true)
    if score is not None and table.score is not None and table.requests is not None:
        worth = true_worth(world, table, raw.frame)
        found["score"] = knowable_score(table.requests, table.score, score, table.users, worth=worth)
    return found


def truth_columns(run: RunConfig) -> tuple[str, ...]:
    """The columns from which the truth about a row of the run's world follows; none where no world is behind it."""
    return () if run.data.synthetic is None else world_of(run.data.synthetic).telling_columns


def true_predictions(
    world: World, schema: Schema, tasks: tuple[Task, ...], frame: pd.DataFrame
) -> dict[str, np.ndarray]:
    """The truth of what each task predicts, as `mtcl_torchrec.evaluation.predict.predict` names it.

    A task that comes after another (`Task.after`) predicts the probability of both events, any other one that of its
    event given the one before it, if there is one.  Tasks whose label the world does not draw are left out.
    """
    outcomes = {outcome.name: outcome for outcome in world.outcomes}
    by_name = {task.name: task for task in tasks}
    oracle = world.oracle_of(frame)
    true: dict[str, np.ndarray] = {}

    def of(task: Task) -> np.ndarray | None:
        outcome = outcomes.get(task.label_column)
        if outcome is None or not _predicts(task, outcome, world, schema):
            return None
        given = oracle[outcome.name]
        if task.after is None:
            return given
        parent = by_name[task.after]
        before = of(parent)
        if before is None or parent.label_column != outcome.after:
            return None
        if task.conditional_name is not None:
            true[task.conditional_name] = given
        return given * before

    for task in tasks:
        found = of(task)
        if found is not None:
            true[task.name] = found
    return true


def _predicts(task: Task, outcome: Outcome, world: World, schema: Schema) -> bool:
    """Whether a task predicts what the world draws, classes in the same order."""
    if task.kind != _KINDS[outcome.kind]:
        return False
    if task.kind != "multiclass":
        return True
    classes = {feature.name: feature for feature in schema.sparse_features}.get(task.item_class or "")
    numbered = task.item_class is None or (classes is not None and classes.encoding == "index")
    return numbered and task.num_classes == world.categories + 1


def true_worth(world: World, table: PredictionsTable, frame: pd.DataFrame) -> np.ndarray | None:
    """(N,) float64: what the events of each row are worth on average, as value@k counts them: Σ valueᵢ · E[labelᵢ],
    where nothing that follows an event happens without it.  None where the table has no values, or one of a label that
    the world does not draw so.

    Labels that a world hides (`World.missing`), or has not recorded yet, count here: the event happens all the same.

    Args:
        table: predictions for the rows of `frame`.
    """
    outcomes = {outcome.name: outcome for outcome in world.outcomes}
    labels = {task.name: task.label_column for task in table.tasks}
    joint, given = world.oracle_of(frame, joint=True), world.oracle_of(frame)
    worth = np.zeros(len(frame))
    for name, value in table.values.items():
        task, outcome = table.task(name), outcomes.get(labels[name])
        if outcome is None or task.kind == "multiclass" or task.kind != _KINDS[outcome.kind]:
            return None
        before = _before(outcome, outcomes)
        if task.mask is not None and labels.get(task.mask, task.mask) not in before:
            return None
        expected = joint[outcome.name] if outcome.kind == "event" or outcome.after is None else (
            given[outcome.name] * joint[outcome.after]
        )  # fmt: skip
        worth += value * table.amounts(name) * expected
    return worth if any(table.values.values()) else None


def _before(outcome: Outcome, outcomes: Mapping[str, Outcome]) -> list[str]:
    """The events without which an outcome does not come about, the nearest first."""
    found = []
    while outcome.after is not None:
        found.append(outcome.after)
        outcome = outcomes[outcome.after]
    return found


@torch.no_grad()
def true_score(model: MTCL, rows: EncodedRows, true: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """(N,) float64: the model's fused score of the true predictions; None where it needs what is not known so.

    Args:
        true: by task.
    """
    output = model.output
    fused: Any = output.fused_score
    if hasattr(model, "members") or fused is None or getattr(fused, "within_request", False):
        return None
    reads_embeddings = getattr(fused, "needs_context", False) and not isinstance(fused, ExpectedValue)
    if reads_embeddings or not set(fused.tasks) <= set(true):
        return None
    device = next((t.device for t in (*fused.buffers(), *fused.parameters())), torch.device("cpu"))
    known = {name: torch.from_numpy(values).float() for name, values in true.items()}
    scores = []
    for index in global_batches(len(rows), 65_536):
        batch = rows.batch(index).to(device)
        # A task that the score does not read needs no truth.
        predictions = {
            name: known[name][index].to(device)
            if name in known
            else torch.zeros((len(index), task.out_features), device=device).squeeze(1)
            for name, task in output.tasks.items()
        }
        parts = output.parts(predictions, batch.sparse_features)
        scores.append(fuse(fused, parts, RowContext(batch.dense_features, {})).double().cpu())
    return torch.cat(scores).numpy()
