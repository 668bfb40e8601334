"""A deep ensemble of finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from mtcl_torchrec.evaluation.predict import compares_candidates
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.modules.fusion import DeepEnsemble
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import PREPROCESSING, readable_folder
from mtcl_torchrec.training.finished import FinishedRun


def load_ensemble(
    folders: Sequence[str | Path],
    *,
    contents: Mapping[str, str | Path] | None = None,
    items: Sequence[str | Path] = (),
) -> FinishedRun:
    """Several run directories as one finished run, whose model is a `DeepEnsemble` of theirs.

    Its predictions and its score are the means over the runs, and ``"score_std"`` says how far their scores are apart.
    The rest (configuration, preprocessing, catalogue) is that of the first run.

    Args:
        folders: runs that were trained on the same data with the same schema, of other seeds or other models.
        contents, items: newer files for all of them; see `FinishedRun.load`.

    Raises:
        ConfigError: there is none, or one is given twice.
        DataError: a folder holds no run, or one that learnt other vocabularies or scales than the first.
    """
    if not folders:
        raise ConfigError("an ensemble needs a run at least")
    whole = [Path(folder).resolve() for folder in folders]
    if again := next((folder for n, folder in enumerate(whole) if folder in whole[:n]), None):
        raise ConfigError(f"an ensemble of other runs: {again} is given twice")
    if exported := next((folder for folder in whole if folder.is_file()), None):
        raise DataError(
            f"{exported} is a file: an ensemble is made of run directories; export them together "
            "(mtcl export RUN_A RUN_B --out ensemble.mtcl)"
        )
    runs = [FinishedRun.load(folder, contents=contents, items=items) for folder in folders]
    learnt = [_learnt(Path(folder)) for folder in folders]
    for folder, run, of in zip(folders, runs, learnt, strict=True):
        if run.config.data_schema.features != runs[0].config.data_schema.features or of != learnt[0]:
            raise DataError(
                f"{folder}: this run encodes its rows in another way than {folders[0]} (other features, vocabularies, "
                "scales or statistics); train the members of an ensemble on the same data"
            )
    try:
        ensemble = DeepEnsemble([run.model for run in runs])
    except ValueError as error:
        raise DataError(f"the runs make no ensemble: {error}") from None
    if compares_candidates(cast(MTCL, ensemble)):
        runs[0].preprocessor.compare_rows()
    return replace(runs[0], model=cast(MTCL, ensemble.eval()), finished=all(run.finished for run in runs))


def _learnt(folder: Path) -> dict[str, object]:
    """What a run's preprocessing learnt: the content of its files, by name."""
    root = readable_folder(folder / PREPROCESSING)
    found: dict[str, object] = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    scales = json.loads((root / "encoder" / "encoder.json").read_text())
    del scales["schema"]  # members may weigh their tasks as they like
    return found | {"encoder/encoder.json": scales}
