"""A finished run is judged anew, by the fused score that it ranks by now: after `mtcl fuse`, predictions and
metrics.json speak of the score that recommends.

What the tasks predict has not changed, so their columns and metrics stay; the score, and whatever ranks by it, is new.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mtcl_torchrec.config import load_run
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.source import Rows
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.predictions_file import read_predictions, write_predictions
from mtcl_torchrec.evaluation.predictions_table import AMOUNT, POPULAR, PredictionsTable
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.directory import METRICS, replace_file
from mtcl_torchrec.training.finished import FinishedRun
from mtcl_torchrec.training.fitted_fusion import fusion_fingerprint
from mtcl_torchrec.training.fused import item_numbers
from mtcl_torchrec.training.held_out import columns_needed, rows_of_split
from mtcl_torchrec.training.judging import (
    evaluation_as_json,
    fused_tasks,
    predictions_path,
    rows_predicted,
    thresholds_of,
    worth_of,
)
from mtcl_torchrec.training.oracle import knowable_of
from mtcl_torchrec.training.popularity import popularity_of, rule_of

JUDGED_BY = "fusion"  # in metrics.json: the fingerprint of the fused score that its rankings are of
ROUNDED = 0.05  # of a prediction's spread: by so much may it differ on average, and not be another model's
# What of an evaluation hangs on the score.
_OF_SCORE = ("values", "ranking", "segments", "intervals", "knowable", "against_popularity")


def rejudge(folder: Path) -> list[str]:
    """Write the predictions of a finished run's splits with the score that it has now, and judge them by it.

    Each file is replaced as a whole; metrics.json comes last, and says then of which fused score it is
    (`is_judged_by_its_fusion`), so that an interruption shows.

    Args:
        folder: the run directory.

    Returns:
        The splits that were judged; none of a run that has not finished.

    Raises:
        ConfigError, DataError: the rows of a split cannot be read, or are others than the run was judged by.  Nothing
            is written then.
    """
    path = folder / METRICS
    if not path.is_file():
        return []
    run, metrics = FinishedRun.load(folder), json.loads(path.read_text(encoding="utf-8"))
    judged: dict[str, tuple[PredictionsTable, dict[str, Any]]] = {}
    for split, before in metrics["evaluations"].items():
        judged[split] = _judged(folder, run, split, before)
    for split, (table, evaluation) in judged.items():
        if predictions_path(folder, split).is_file():
            write_predictions(predictions_path(folder, split), table)
        metrics["evaluations"][split] |= {key: evaluation[key] for key in _OF_SCORE if key in evaluation}
    metrics[JUDGED_BY] = fusion_fingerprint(folder)
    replace_file(path, json.dumps(metrics, indent=1))
    return list(judged)


def is_judged_by_its_fusion(folder: Path) -> bool:
    """Whether the rankings in metrics.json and the scores in the predictions are of the fused score that counts."""
    path = folder / METRICS
    if not path.is_file():
        return not fusion_fingerprint(folder)
    return json.loads(path.read_text(encoding="utf-8")).get(JUDGED_BY, "") == fusion_fingerprint(folder)


def _judged(
    folder: Path, run: FinishedRun, split: str, before: dict[str, Any]
) -> tuple[PredictionsTable, dict[str, Any]]:
    """The rows of a split with the score that counts, and what `evaluation_as_json` says of them."""
    config = run.config.evaluation
    columns = list(dict.fromkeys([*columns_needed(run), *config.columns()]))
    raw = run.preprocessor.conform(rows_of_split(load_run(folder / "run.yaml"), columns, split))
    encoded = run.preprocessor.encode(raw)
    table = _with_score(folder, run, split, raw, encoded, config.columns())
    bootstrap = config.bootstrap if before.get("intervals") else 0
    found = evaluate_table(
        table, fused_tasks=fused_tasks(run.model), k=config.k, segments=config.segments, bootstrap=bootstrap,
        seed=run.config.training.seed,
    )  # fmt: skip
    if "knowable" in before:
        found.knowable = knowable_of(run.config, run.model, raw, encoded, table)
    return table, evaluation_as_json(found)


def _with_score(
    folder: Path, run: FinishedRun, split: str, raw: Rows, encoded: EncodedRows, segments: Sequence[str]
) -> PredictionsTable:
    predictions = predict(run.model, encoded, batch_size=run.config.training.eval_batch_size)
    fresh = rows_predicted(
        run.model.tasks, run.preprocessor, raw, encoded, run.catalogue, predictions, split=split, segments=segments,
        thresholds=thresholds_of(folder), values=worth_of(run.config), fused=fused_tasks(run.model),
        numbers=item_numbers(run.config.fusion, run.fusion, run.preprocessor.encoder), rule=rule_of(run),
        popularity=popularity_of(run),
    )  # fmt: skip
    path = predictions_path(folder, split)
    if not path.is_file():
        return fresh
    stored = read_predictions(path)
    if stored.fingerprint != fresh.fingerprint or not _agree(stored, fresh):
        raise DataError(
            f"{raw.name}: these are not the rows that the run was judged by, or its model is another: {path} keeps the "
            "score that it had"
        )
    # What the score is made of is another than it was, and so may be what events are worth.
    of_score = {name: fresh.frame[name].to_numpy() for name in map(str, fresh.frame) if _is_of_score(name)}
    kept = stored.frame[[name for name in map(str, stored.frame) if not _is_of_score(name)]]
    return replace(stored, frame=kept.assign(**of_score), values=fresh.values, fused=fresh.fused)


def _is_of_score(column: str) -> bool:
    # The popularities of the events, too, so that a file from before there were any has them from now on.
    return column in ("score", "popular") or column.startswith(("part.", AMOUNT, POPULAR))


def _agree(stored: PredictionsTable, fresh: PredictionsTable) -> bool:
    """Whether the tasks' predictions are the same, but for what another device or precision rounds off."""
    if stored.predicted_names != fresh.predicted_names:
        return False
    pairs = [(stored.predicted(name), fresh.predicted(name)) for name in stored.predicted_names]
    return all(
        a.shape == b.shape and float(np.nanmean(np.abs(a - b))) <= ROUNDED * float(np.nanstd(a)) + 1e-6
        for a, b in pairs
    )
