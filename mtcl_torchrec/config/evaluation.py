"""How a run is judged when its training has ended."""

from __future__ import annotations

from mtcl_torchrec.config.base import Part


class EvaluationConfig(Part):
    """How a run is judged when its training has ended.

    Args:
        save_predictions: whether the predictions for the validation and test split are kept in ``predictions/``: 4
            bytes a row for each label, prediction and class, before compression.
    """

    save_predictions: bool = True
