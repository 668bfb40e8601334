"""A run read back from its directory, to be evaluated or to recommend."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mtcl_torchrec.config import FusionConfig, RunConfig, parse_run
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.popularity import Popularity
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import NoColumnError, Rows, read_rows
from mtcl_torchrec.evaluation.predict import compares_candidates
from mtcl_torchrec.models import MTCL
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.build import build_model, zero_tables
from mtcl_torchrec.training.calibration import build_calibration
from mtcl_torchrec.training.checkpoint.reader import load_unsharded
from mtcl_torchrec.training.checkpoint.store import best_checkpoint, read_about
from mtcl_torchrec.training.counted_items import counted_popularity
from mtcl_torchrec.training.directory import (
    CALIBRATION,
    CATALOGUE,
    CHECKPOINTS,
    PREPROCESSING,
    WEIGHTS_PREFIX,
    RunWarning,
    readable_folder,
)
from mtcl_torchrec.training.fitted import load_state
from mtcl_torchrec.training.fitted_fusion import edited_beneath, load_fusion
from mtcl_torchrec.training.fused import is_learned
from mtcl_torchrec.training.sharding import tables_of


def _edited_after_learning(folder: Path, fusion: FusionConfig | None, checkpoint: Path) -> str:
    """A line, where the weights of a fused score that learns were changed after it learnt others."""
    if fusion is None or not is_learned(fusion):
        return ""
    try:
        trained = parse_run(str(read_about(checkpoint)["run"])).fusion
    except (ConfigError, KeyError):
        return ""
    if trained is None or trained.model_dump(exclude={"train"}) == fusion.model_dump(exclude={"train"}):
        return ""
    by_hand = fusion.kind in ("stacking", "context_gated_mean")
    way = (
        f"`mtcl fuse {folder} --set ...` changes its weights without training"
        if by_hand
        else "only training changes it"
    )
    return (
        f"the fusion in {folder / 'run.yaml'} was changed after it was trained: what {fusion.kind} has learnt counts, "
        f"which {checkpoint} holds; {way}"
    )


def _with_items(catalogue: Catalogue | None, preprocessor: Preprocessor, items: Sequence[str | Path]) -> Catalogue:
    """The catalogue with the items of files."""
    if catalogue is None:
        raise ConfigError("this run has no catalogue that new items could join: score them as rows")
    columns = [str(column) for column in catalogue.items.columns]
    try:
        rows = read_rows([str(path) for path in items], columns)
    except NoColumnError as error:
        raise DataError(f"{error}; new items have the item columns {', '.join(columns)}") from None
    return catalogue.with_items(preprocessor.conform(rows))


@dataclass
class FinishedRun:
    """A run read back: the whole model in this process, without a process group.

    Args:
        config: as it was trained.
        preprocessor: fitted.
        model: in eval mode, on the CPU.
        catalogue: what it knows of users and items; None where the schema names no user or item.
        finished: False where training was interrupted; the model is that of its best epoch so far.
        popularity: how popular items are for each event; None where the schema names no item, or the run is from before
            that was kept.
        fusion: what it ranks by: fitted after training (``mtcl fuse``), or else as declared; None where neither is.
    """

    config: RunConfig
    preprocessor: Preprocessor
    model: MTCL
    catalogue: Catalogue | None
    finished: bool = True
    fusion: FusionConfig | None = None
    popularity: Popularity | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        contents: Mapping[str, str | Path] | None = None,
        items: Sequence[str | Path] = (),
    ) -> FinishedRun:
        """Read a run directory, also one whose training was interrupted after an epoch was kept.

        Its run.yaml may name a trunk or a fused score by its import path, which is then imported: trust the directory
        as you trust code.

        A fusion in run.yaml that was changed after training, or after another was fitted, and so does not count, is
        warned of (`RunWarning`).

        Args:
            folder: the run directory.
            contents: vector or semantic_id feature -> a newer file, with items that the run did not know; see
                `FeatureEncoder.with_contents`.
            items: Parquet or CSV files of items that the log does not have, with the item's columns: they join the
                catalogue, and are ranked by what is known of them.

        Raises:
            ConfigError: `contents` does not fit the run, or there is no catalogue that `items` could join.
            DataError: the folder holds no run that has kept an epoch, or one without the calibration that it says.
        """
        folder = Path(folder)
        if not (folder / "run.yaml").is_file():
            raise DataError(f"{folder}: no run here (run.yaml is missing)")
        checkpoint = best_checkpoint(folder / CHECKPOINTS)
        if checkpoint is None:
            raise DataError(f"{folder}: the run has kept no epoch yet (no complete checkpoint in {CHECKPOINTS}/)")
        config = parse_run((folder / "run.yaml").read_text(encoding="utf-8"), name=str(folder / "run.yaml"))
        try:
            preprocessor = Preprocessor.load(
                readable_folder(folder / PREPROCESSING),
                config.data_schema,
                config.statistics,
                config.histories,
                config.next_labels,
            )
            known = readable_folder(folder / CATALOGUE)
            catalogue = Catalogue.load(known) if known.is_dir() else None
            popularity = counted_popularity(folder) if catalogue is None else catalogue.rates
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: the run directory is damaged ({error})") from None
        if contents:
            preprocessor.encoder = preprocessor.encoder.with_contents(contents)
        if items:
            catalogue = _with_items(catalogue, preprocessor, items)
        model = build_model(
            config.model,
            preprocessor.encoder,
            config.fusion,
            table_device="cpu",
            precision="bf16" if config.training.precision == "bf16" else "fp32",  # auto: a run from before it was told
        )
        zeroed = zero_tables(config)
        for name, table in tables_of(model).items():
            if name.split(".")[-2] in zeroed:
                table.zero_()  # in it, rows of items that came after training stay so
        fused = model.output.fused_score
        if not is_learned(config.fusion):
            model.output.fused_score = None  # it is what run.yaml says, which may be edited without training
        load_unsharded(model, checkpoint, prefix=WEIGHTS_PREFIX)
        model.output.fused_score = fused
        finished = (folder / "metrics.json").is_file()
        if config.calibration is not None and readable_folder(folder / CALIBRATION).is_dir():
            model.output.calibration = build_calibration(config.calibration, preprocessor.encoder)
            load_state(folder / CALIBRATION, model.output.calibration)
        elif config.calibration is not None and finished:
            raise DataError(
                f"{folder}: run.yaml says calibration, and none was fitted ({CALIBRATION}/ is missing); go on with the "
                "run (mtcl train --resume), which fits it, or take the key away"
            )
        fitted = load_fusion(folder, model, preprocessor.encoder)
        if note := edited_beneath(folder) or (
            "" if fitted else _edited_after_learning(folder, config.fusion, checkpoint)
        ):
            warnings.warn(note, RunWarning, stacklevel=2)
        if compares_candidates(model):
            preprocessor.compare_rows()
        return cls(config, preprocessor, model.eval(), catalogue, finished, fitted or config.fusion, popularity)

    def encode(self, frame: pd.DataFrame) -> EncodedRows:
        """Encode rows to be scored."""
        return self.preprocessor.encode(Rows(frame), with_labels=False)
