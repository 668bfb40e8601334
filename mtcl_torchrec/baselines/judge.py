"""Baselines are judged as a run is: by its tasks, and ranked by the fused score that the run has now.

What a baseline predicts is kept, so that another fused score, other values or other thresholds need no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mtcl_torchrec.baselines.entries import INSTEAD
from mtcl_torchrec.baselines.fused import fused_score
from mtcl_torchrec.baselines.rows import BaselineData
from mtcl_torchrec.baselines.search import Predictions
from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.evaluation.judged import evaluate_table
from mtcl_torchrec.evaluation.predictions_file import read_predictions, write_predictions
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.evaluation.thresholds import chosen_thresholds
from mtcl_torchrec.modules.fusion import DenseNumber
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.judging import evaluation_as_json, predictions_path, rows_predicted, worth_of

JUDGED_BY = "judged_by"  # in an entry: names what it was judged by, see `mtcl_torchrec.baselines.store.judged_by`
_LACKING = "in the fused score, "


@dataclass(frozen=True)
class Judge:
    """What all baselines of a run are judged by.

    Args:
        run: they are compared with.
        data: its rows.
        fused: what ranks.
        by: names all that.
        instead: what is said where it is not the run's fused score, see `mtcl_torchrec.baselines.fused.stand_in`.
        numbers: see `mtcl_torchrec.training.fused.item_numbers`.
    """

    run: RunConfig
    data: BaselineData
    fused: nn.Module
    by: str
    instead: str = ""
    numbers: Mapping[str, DenseNumber] = field(default_factory=dict)

    def entry(self, folder: Path, predictions: Predictions, notes: Sequence[str]) -> dict[str, Any]:
        """Write predictions, and judge them.

        Args:
            folder: of the baseline.
            notes: what there is to say of it.

        Returns:
            Of its entry: metrics, notes, what stood in for the fused score, and what it was judged by.
        """
        metrics, thresholds, lacking = dict[str, Any](), dict[str, float](), list[str]()
        fused_tasks: Sequence[str] = self.fused.tasks  # type: ignore[assignment]
        for split, of_split in predictions.items():
            score, lacking = fused_score(self.fused, self.data, split, of_split)
            table = self._table(split, of_split, score)
            if split == "val":
                thresholds = chosen_thresholds(table, self.run.evaluation.threshold)
            table = replace(table, thresholds=thresholds)
            write_predictions(predictions_path(folder, split), table)
            metrics[split] = evaluation_as_json(evaluate_table(table, fused_tasks=fused_tasks, k=self.run.evaluation.k))
        said = [note for note in notes if not note.startswith(_LACKING)]
        if lacking:
            said.append(f"{_LACKING}{', '.join(lacking)} enters as the mean of the training rows")
        return {"metrics": metrics, "notes": said, INSTEAD: self.instead, JUDGED_BY: self.by}

    def entry_anew(self, folder: Path, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """The entry of a baseline that was judged by something else, by the predictions that it keeps; None where they
        are of other rows, or cannot be read."""
        names, predictions = {task.name for task in self.data.tasks}, Predictions()
        for split in entry["metrics"]:
            try:
                stored = read_predictions(predictions_path(folder, split))
            except (DataError, OSError):
                return None
            of_split = {name: stored.predicted(name) for name in stored.predicted_names if name in names}
            if split not in self.data.raw or len(stored) != len(self.data.held_out[split]):
                return None
            if self._table(split, of_split, np.zeros(len(stored), np.float32)).fingerprint != stored.fingerprint:
                return None
            predictions[split] = of_split
        return {**entry, **self.entry(folder, predictions, entry.get("notes") or [])}

    def _table(self, split: str, predictions: dict[str, Any], score: np.ndarray) -> PredictionsTable:
        """The predictions for one split, as those of a run."""
        data = self.data
        return rows_predicted(
            data.tasks, data.preprocessor, data.raw[split], data.encoded[split], data.catalogue,
            {**predictions, "score": score}, split=split, values=worth_of(self.run),
            fused=self.fused.tasks, numbers=self.numbers, rule=self.fused,  # type: ignore[arg-type]
            popularity=None if data.catalogue is None else data.catalogue.rates,
        )  # fmt: skip
