"""A run is judged: its predictions for the rows of a split, kept in its directory, and what they are worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.columns import as_text, canonical
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.data.splits import Splits
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.predictions_file import write_predictions
from mtcl_torchrec.evaluation.predictions_table import AMOUNT, POPULAR, PredictionsTable, predictions_table
from mtcl_torchrec.evaluation.progress import Progress, quiet
from mtcl_torchrec.evaluation.report import Evaluation, user_groups
from mtcl_torchrec.evaluation.segments import hours_of_day
from mtcl_torchrec.evaluation.thresholds import chosen_thresholds
from mtcl_torchrec.evaluation.worth import values_of_events
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.fusion.value import DenseNumber, amounts_of
from mtcl_torchrec.schema import DataError, Task, nearest
from mtcl_torchrec.training.calibration import CalibrationResult
from mtcl_torchrec.training.counted_items import counted_popularity
from mtcl_torchrec.training.directory import METRICS, PREDICTIONS
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fused import item_numbers
from mtcl_torchrec.training.history import finite
from mtcl_torchrec.training.oracle import knowable_of
from mtcl_torchrec.training.popularity import (
    applied_rule,
    fuse_parts,
    part_of,
    popularity_of,
    popularity_of_rows,
    rule_of,
)
from mtcl_torchrec.training.sharding import Ranks


def predictions_path(folder: Path, split: str) -> Path:
    """Where a run directory, or a baseline's, keeps the predictions for a split."""
    return folder / PREDICTIONS / f"{split}.parquet"


def judge(
    run: RunConfig,
    folder: Path,
    model: MTCL,
    preprocessor: Preprocessor,
    splits: Splits,
    calibration: CalibrationResult | None,
    where: Ranks,
) -> dict[str, Evaluation]:
    """Evaluate the model that training has ended with on each split, and keep its predictions.

    Every rank takes part and gets the result; the first writes.

    Args:
        folder: the run directory, without predictions of an earlier run.
        calibration: what it came to, of a run that has one.
    """
    config, evaluations = run.evaluation, {}
    thresholds: dict[str, float] = {}
    rule, _ = applied_rule(run.fusion, model.tasks, encoder=preprocessor.encoder)
    popularity = counted_popularity(folder) if splits.catalogue is None else splits.catalogue.rates
    for name, encoded in splits.encoded.items():
        predictions = predict(model, encoded, batch_size=run.training.eval_batch_size, device=where.device)
        table = rows_predicted(
            model.tasks, preprocessor, splits.raw[name], encoded, splits.catalogue, predictions,
            uncalibrated=None if calibration is None else calibration.before[name], split=name,
            segments=config.columns(), values=worth_of(run), fused=fused_tasks(model),
            numbers=item_numbers(run.fusion, None, preprocessor.encoder), rule=rule, popularity=popularity,
        )  # fmt: skip
        if name == "val":
            thresholds = chosen_thresholds(table, config.threshold)
        table = replace(table, thresholds=thresholds)
        draws = config.bootstrap if name == "test" else 0
        evaluations[name] = evaluate_table(
            table, fused_tasks=fused_tasks(model), k=config.k, segments=config.segments, bootstrap=draws,
            seed=run.training.seed,
        )  # fmt: skip
        evaluations[name].knowable = knowable_of(run, model, splits.raw[name], encoded, table)
        if where.first and config.save_predictions:
            write_predictions(predictions_path(folder, name), table)
    return evaluations


def evaluation_as_json(evaluation: Evaluation) -> dict[str, Any]:
    """All of an evaluation; what is not defined is None, ``"knowable"`` stands there of a world only,
    ``"same_event"`` where tasks have the same labels, ``"against_popularity"`` where that is known."""
    values = finite(asdict(evaluation))
    return {k: v for k, v in values.items() if v or k not in ("knowable", "same_event", "against_popularity")}


def worth_of(run: RunConfig) -> dict[str, float]:
    """Task -> what its event is worth, in value@k; see `mtcl_torchrec.evaluation.worth.values_of_events`."""
    weights = None if run.fusion is None else run.fusion.weights
    binary = [task.name for task in run.data_schema.tasks if task.kind == "binary"]
    return values_of_events(run.evaluation.values, weights, binary)


def fused_tasks(model: MTCL) -> Sequence[str]:
    """The tasks that the model's fused score is made of."""
    return getattr(model.output.fused_score, "tasks", ())


def thresholds_of(folder: Path) -> dict[str, float]:
    """From which probability on a finished run says yes, by binary task: chosen on its validation split; none where it
    has not finished.

    Raises:
        DataError: its metrics.json holds something else.
    """
    path = folder / METRICS
    if not path.is_file():
        return {}
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["evaluations"].get("val", {}).get("tasks", {})
        return {name: float(of["threshold"]) for name, of in tasks.items() if of.get("threshold") is not None}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not the metrics of a run ({error!r})") from None


def rows_predicted_by(
    run: FinishedRun,
    raw: Rows,
    *,
    batch_size: int = 8192,
    split: str = "test",
    segments: Sequence[str] = (),
    progress: Progress = quiet,
) -> PredictionsTable:
    """What a finished run predicts for rows with labels; see `rows_predicted`.

    Args:
        raw: rows as they conform to the training split.
        progress: told of the rows.
    """
    progress("encoding rows", 0, 0)
    rows, model = run.preprocessor.encode(raw), run.model
    before = dict[str, np.ndarray]()
    predictions = predict(model, rows, batch_size=batch_size, before=before, progress=progress)
    return rows_predicted(
        model.tasks, run.preprocessor, raw, rows, run.catalogue, predictions, uncalibrated=before or None, split=split,
        segments=segments, values=worth_of(run.config), fused=fused_tasks(model),
        numbers=item_numbers(run.config.fusion, run.fusion, run.preprocessor.encoder), rule=rule_of(run),
        popularity=popularity_of(run),
    )  # fmt: skip


def rows_predicted(
    tasks: Sequence[Task],
    preprocessor: Preprocessor,
    raw: Rows,
    encoded: EncodedRows,
    catalogue: Catalogue | None,
    predictions: Mapping[str, np.ndarray],
    *,
    uncalibrated: Mapping[str, np.ndarray] | None = None,
    split: str = "test",
    segments: Sequence[str] = (),
    thresholds: Mapping[str, float] | None = None,
    values: Mapping[str, float] | None = None,
    fused: Sequence[str] = (),
    numbers: Mapping[str, DenseNumber] | None = None,
    rule: nn.Module | None = None,
    popularity: Popularity | None = None,
) -> PredictionsTable:
    """Predictions beside the labels, the keys and whatever else of the rows they are judged by.

    Args:
        tasks: of the model.
        raw, encoded: the same rows, raw ones as they conform to the training split.
        predictions: what `mtcl_torchrec.evaluation.predict.predict` returned.
        uncalibrated: the same before calibration.
        segments: columns of the data to be kept.
        thresholds, values, fused: see `PredictionsTable`.
        numbers: see `mtcl_torchrec.training.fused.item_numbers`.
        rule: fuses the popularities of the events; of `mtcl_torchrec.training.popularity.applied_rule`.
        popularity: of the training rows' items.

    Raises:
        DataError: the rows have no column that is asked for as a segment.
    """
    keys = _keys(preprocessor, raw, encoded, catalogue)
    declared = preprocessor.declared
    by_event, parts = popularity_of_rows(popularity, tasks, raw, encoded, declared)
    keys |= {POPULAR + name: of for name, of in by_event.items()}
    if rule is not None and parts:
        keys["popular"] = fuse_parts(rule, parts, raw, encoded, declared)
    same = {"user": declared.user, "item": declared.item, "request": declared.request, "time": declared.time}
    for column in segments:
        if same.get(column) == column or (column in keys and column not in raw.frame):
            continue  # a column of the data that merely has the name of a key is one of its own
        keys[f"segment.{column}"] = _segment_column(raw, column)
    for name, amount in amounts_of(numbers or {}, encoded.dense).items():
        keys[AMOUNT + name] = amount.float().numpy()
    for task in tasks:
        if task.name in fused and task.name in predictions and task.kind != "binary":
            keys[f"part.{task.name}"] = part_of(task, predictions[task.name], encoded)
    return predictions_table(
        tasks,
        predictions,
        encoded.labels.numpy(),
        keys=keys,
        uncalibrated=uncalibrated,
        weights=None if encoded.weights is None else encoded.weights.numpy(),
        split=split,
        thresholds=thresholds,
        values=values,
        fused=fused,
    )


def check_segments(run: RunConfig, splits: Splits) -> None:
    """See, before a run trains, that its rows can be told apart as it says.

    Raises:
        DataError: a segment's column is missing, holds lists, or no times.
    """
    for rows in splits.raw.values():
        for column in run.evaluation.columns():
            _segment_column(rows, column)
        if "hour_of_day" in run.evaluation.segments:
            hours_of_day(rows.frame[run.data_schema.time])


def shared_requests(run: RunConfig, splits: Splits) -> str:
    """What to say, before a run trains, of requests that are of several users, whose rows would be ranked against each
    other; empty where there are none.
    """
    request, user = run.data_schema.request, run.data_schema.user
    if request is None or user is None or request == user:
        return ""
    for name, rows in splits.raw.items():
        if not {request, user} <= set(rows.frame):
            continue
        pairs = pd.DataFrame({"request": canonical(rows.frame[request]), "user": canonical(rows.frame[user])}).dropna()
        users = pairs.drop_duplicates().groupby("request").size()
        if (users > 1).any():
            return (
                f"schema.request: {int((users > 1).sum()):,} of {len(users):,} values of {request!r} in {name} are of "
                f"several users, whose rows would be ranked against each other; if it is numbered anew for each user, "
                f"make it one per user, such as {user} and {request} joined"
            )
    return ""


def _segment_column(raw: Rows, column: str) -> pd.Series:
    if column not in raw.frame:
        raise DataError(f"{raw.name}: segments: no column {column!r}{nearest(column, raw.frame.columns)}")
    of_rows = canonical(raw.frame[column])
    lists = of_rows.map(lambda value: hasattr(value, "__len__") and not isinstance(value, str))
    if lists.any():
        raise DataError(f"{raw.name}: segments: column {column!r} holds lists; a row is in one segment")
    return as_text(of_rows) if of_rows.dtype == object else of_rows


def _keys(
    preprocessor: Preprocessor, raw: Rows, encoded: EncodedRows, catalogue: Catalogue | None
) -> dict[str, pd.Series | np.ndarray]:
    schema, frame = preprocessor.declared, raw.frame
    keys: dict[str, Any] = {}
    if schema.user is not None:
        known = ~np.isnan(user_groups(schema, frame))  # type: ignore[arg-type]
        users = canonical(frame[schema.user])
        keys["user"] = users if known.all() else users.astype(object).where(known, None).infer_objects()
        keys["user"] = canonical(keys["user"])
    if schema.item is not None:
        keys["item"] = canonical(frame[schema.item])
    if schema.request not in (None, schema.user) and schema.request in frame:
        keys["request"] = canonical(frame[schema.request])
    if schema.time is not None and schema.time in frame:
        keys["time"] = frame[schema.time]
    if catalogue is not None and schema.item is not None:
        popularity = frame[schema.item].map(catalogue.popularity)
        keys["popularity"] = popularity.to_numpy(dtype=np.float32, na_value=np.nan)
    seen = {"item": schema.item, "user": schema.user}
    of_catalogue = {
        "item": None if catalogue is None else catalogue.popularity.index,
        "user": None if catalogue is None else catalogue.trained_users,
    }
    for what, column in seen.items():
        trained = of_catalogue[what]
        if column is not None and trained is not None:
            keys[f"{what}_seen"] = frame[column].isin(trained).to_numpy(dtype=bool, na_value=False)
        elif column is not None and (rows := _table_rows(preprocessor, encoded, column)) is not None:
            keys[f"{what}_seen"] = rows > 0  # of a stream there is no catalogue
    return keys


def _table_rows(preprocessor: Preprocessor, encoded: EncodedRows, column: str) -> np.ndarray | None:
    """(N,) rows of the vocabulary of a column, 0 where a value is not in it; None where there is no vocabulary."""
    for feature in preprocessor.declared.sparse_features:
        if feature.kind == "id" and feature.rows_from == column and feature.encoding == "vocabulary":
            ids = [key for key in encoded.keys if key not in encoded.bags]
            return encoded.ids[:, ids.index(feature.name)].numpy()
    return None
