"""The held-out predictions of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.config.commands import SESSION_MINUTES
from mtcl_torchrec.data.batch import EncodedRows, global_batches, iterate
from mtcl_torchrec.data.source import Rows, read_rows, read_splits, time_values
from mtcl_torchrec.data.world_windows import world_split
from mtcl_torchrec.evaluation.calibration import request_groups
from mtcl_torchrec.evaluation.report import user_groups
from mtcl_torchrec.evaluation.segments import TIME_UNITS
from mtcl_torchrec.fusing.combiners import Combiner, context_gated_mean
from mtcl_torchrec.fusing.held_out import HeldOut, sessions
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.fusion import DenseNumber, RowContext
from mtcl_torchrec.schema import ConfigError, DataError, Schema, Task, nearest
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fused import item_numbers, read_by_gate
from mtcl_torchrec.training.popularity import popularity_of, popularity_of_rows, rule_of


def rows_of_split(config: RunConfig, columns: Sequence[str], split: str = "val") -> Rows:
    """The rows of a run's split as they were read.

    Args:
        config: with paths as seen from here, see `mtcl_torchrec.config.load_run`.
        columns: to be read.
        split: ``"val"`` or ``"test"``.

    Raises:
        ConfigError: the run has no such split.
        DataError: its files cannot be read.
    """
    data = config.data
    if data.synthetic is not None:
        return world_split(data.synthetic, split)
    if data.log is not None:
        parts = read_splits(data, columns, config.data_schema.time)
        if split not in parts:
            raise ConfigError(f"the run has no {split} split (data.{split}_fraction is 0)")
        return parts[split]
    files = data.val if split == "val" else data.test
    if files is None:
        raise ConfigError(f"the run has no {split} split (data.{split} is missing)")
    return read_rows(files, columns)


def columns_needed(run: FinishedRun) -> list[str]:
    """What must be read for `held_out_of`: inputs, labels, time and request."""
    schema = run.config.data_schema
    columns = [*run.preprocessor.columns(statistics=False), schema.time, schema.request]
    return list(dict.fromkeys(c for c in columns if c is not None))


def held_out_of(
    run: FinishedRun,
    rows: Rows,
    *,
    session_minutes: float = SESSION_MINUTES,
    context: bool = False,
    batch_size: int = 8192,
) -> HeldOut:
    """Predictions of a run for rows with labels, as a fusion is fitted on them.

    A request is what `Schema.request` names; else all rows of a user, or a session of theirs, by `session_minutes`.
    Rows of which that is not known are left out.  `HeldOut.rankings` holds the run's own fused score (``"as it was"``),
    and popularity, by the same fusion, where the run knows it.  What comes after what (`HeldOut.given`) and what is
    worth its price (`HeldOut.item_numbers`) is what the run's expected value says, or else the tasks' masks.

    Args:
        rows: with the columns of `columns_needed`.
        session_minutes: a user who does nothing for longer begins a new session; 0: all rows of a user are one request.
        context: whether dense features and embeddings are kept, for a fused score that depends on them.

    Raises:
        ConfigError: the schema names neither a request nor a user, or the run is an ensemble, whose members are fitted
            one by one.
        DataError: no row is left, or the rows do not fit the schema.
    """
    if hasattr(run.model, "members"):
        raise ConfigError("an ensemble has no fused score of its own: fit that of each member")
    schema = run.config.data_schema
    rows = run.preprocessor.conform(rows)
    request, user, words = _requests(schema, rows, session_minutes)
    known = ~np.isnan(request)
    if not known.any():
        raise DataError(f"{rows.name}: no row has a known {schema.request or schema.user}")
    rows, user = rows.take(known), None if user is None else user[known].astype(np.int64)
    encoded = run.preprocessor.encode(rows)
    now = run.model.output.fused_score
    needs_context = context or getattr(now, "needs_context", False)
    given, numbers = _chains(run)
    parts, found = _parts(run.model, encoded, needs_context or bool(numbers), batch_size)
    _, popular = popularity_of_rows(popularity_of(run), run.model.tasks, rows, encoded, schema)
    held_out = HeldOut(
        parts=parts,
        labels=_labels(run.model, encoded),
        request=request[known].astype(np.int64),
        user=user,
        dense_features=found.pop("", None),
        embeddings=found,
        popular=popular,
        requests_are=words,
        given=given,
        item_numbers=numbers,
    )
    held_out = held_out.with_popularity(rule_of(run))
    return held_out if now is None else held_out.with_ranking("as it was", held_out.scores(now))


def _chains(run: FinishedRun) -> tuple[dict[str, str], dict[str, DenseNumber]]:
    """What comes after what, and what is worth its price: as the expected value says it that the run's configuration
    has, or else the one fitted after it; without any, as the tasks' masks do."""
    numbers = item_numbers(run.config.fusion, run.fusion, run.preprocessor.encoder)
    for config in (run.config.fusion, run.fusion):
        if config is not None and config.kind == "expected_value":
            return dict(config.given or {}), numbers
    return masked_chains(run.model.tasks), numbers


def masked_chains(tasks: Sequence[Task]) -> dict[str, str]:
    """Task -> the task whose event must happen first, as the tasks' masks say it: a binary task whose label only counts
    where another task's label is true predicts its probability given that.

    Example:
        >>> masked_chains([Task.binary("click"), Task.binary("buy", mask="click"), Task.binary("like", mask="seen")])
        {'buy': 'click'}
    """
    first = {task.label_column: task.name for task in tasks if task.kind == "binary"}
    return {t.name: first[t.mask] for t in tasks if t.kind == "binary" and t.after is None and t.mask in first}


def gate_of(run: FinishedRun, names: Sequence[str] = ()) -> Combiner:
    """A `ContextGatedMean` to be fitted, whose weights depend on features of the user and of the context.

    Args:
        names: of features; by default those that the run's configuration names, or else all of user and context.

    Raises:
        ConfigError: no such feature, or none at all.
    """
    schema, declared = run.config.data_schema, run.config.fusion
    if not names and declared is not None and declared.features:
        names = declared.features
    known = [feature.name for feature in schema.features]
    for name in names:
        if name not in known:
            raise ConfigError(f"no feature {name!r} in the schema{nearest(name, known)}")
    names = list(names) or [f.name for f in schema.features if "item" not in f.group]
    if not names:
        raise ConfigError("context_gated_mean: the schema has no feature of user or context to depend on")
    return context_gated_mean(names=names, **read_by_gate(names, run.preprocessor.encoder, run.model.output.dims))


def _requests(schema: Schema, rows: Rows, session_minutes: float) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Request and user of each row as (N,) float, NaN where not known, and what a request is in words."""
    user = user_groups(schema, rows.frame)
    if schema.request not in (None, schema.user):  # the user, where a fused score compares rows and none was named
        request = request_groups(schema, rows.frame)
        assert request is not None
        if user is None:
            return request, None, "request"
        request[np.isnan(user)] = np.nan
        return request, user, "request"
    if user is None:
        raise ConfigError("a fusion ranks the rows of a request: the schema needs a request, or a user")
    if schema.time is None or session_minutes == 0:
        return user, user, "user"
    times = time_values(rows.frame, schema.time, rows).astype(float)
    known = ~np.isnan(user)
    request = np.full(len(user), np.nan)
    if known.any():
        gap = (
            session_minutes
            * 60
            * _per_second(times, schema.time, pd.api.types.is_numeric_dtype(rows.frame[schema.time]))
        )
        request[known] = sessions(user[known], times[known], gap)
    return request, user, f"session (of a user, {session_minutes:g} min apart)"


def _per_second(times: np.ndarray, column: str, is_number: bool) -> float:
    if not is_number:
        return 1e9  # timestamps are read as nanoseconds
    size = float(np.median(np.abs(times)))
    for least, per_second in TIME_UNITS:
        if size >= least:
            return per_second
    raise ConfigError(
        f"time column {column!r} holds numbers too small to be seconds since 1970, so that sessions cannot be told "
        "apart; give schema.request, or times as timestamps, or rank all rows of a user together: --session-minutes 0"
    )


class _Recorder(nn.Module):
    """In the place of the fused score: keeps what that is given."""

    needs_context = True

    def __init__(self, context: bool) -> None:
        super().__init__()
        self.context = context
        self.parts: dict[str, list[np.ndarray]] = {}
        self.found: dict[str, list[np.ndarray]] = {}

    def forward(self, parts: Mapping[str, torch.Tensor], context: RowContext) -> torch.Tensor:
        for name, part in parts.items():
            self.parts.setdefault(name, []).append(part.float().numpy())
        if self.context:
            for name, value in {"": context.dense_features, **context.embeddings}.items():
                self.found.setdefault(name, []).append(value.float().numpy())
        return next(iter(parts.values()))


@torch.no_grad()
def _parts(model: MTCL, rows: EncodedRows, context: bool, batch_size: int) -> tuple[dict, dict]:
    """Each task's part (N,); and with `context`, dense features (under ``""``) and embeddings by feature."""
    recorder, fused = _Recorder(context), model.output.fused_score
    was_training = model.training
    model.eval()
    model.output.fused_score = recorder
    try:
        for batch in iterate(rows, global_batches(len(rows), batch_size)):
            model(batch.dense_features, batch.sparse_features)
    finally:
        model.output.fused_score = fused
        model.train(was_training)

    def joined(pieces: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate(values) for name, values in pieces.items()}

    return {n: np.clip(p.astype(np.float64), 0, 1) for n, p in joined(recorder.parts).items()}, joined(recorder.found)


def _labels(model: MTCL, rows: EncodedRows) -> dict[str, np.ndarray]:
    """What happened, by task; a multiclass task without an item's own class has no event to count."""
    labels = {}
    for i, task in enumerate(model.tasks):
        label = rows.labels[:, i].double().numpy()
        if task.kind == "multiclass":
            feature = model.output.item_classes.get(task.name)
            if feature is None:
                continue
            own = rows.first_values(feature).numpy()
            label = np.where(np.isnan(label), np.nan, (label == own).astype(float))
        labels[task.name] = label
    return labels
