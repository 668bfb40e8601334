"""From a configuration to a run directory: read, prepare, train, evaluate, store."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from mtcl_torchrec.config import OptimizersConfig, RunConfig, dump_run, parse_run
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, read_splits
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.report import Evaluation, evaluate_predictions, user_groups
from mtcl_torchrec.models import MTCL, MTCLTrain
from mtcl_torchrec.modules.embeddings import table_module_name
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.checkpoint import load_unsharded, load_weights, save_weights
from mtcl_torchrec.training.loop import TrainingHistory, fit, parallelise, plain_model
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.sharding import Ranks, ranks

CHECKPOINT = "checkpoint"
WEIGHTS_PREFIX = "model."  # of MTCL inside MTCLTrain


@dataclass
class RunResult:
    """What a run reached.

    Args:
        folder: the run directory.
        history: validation metrics by epoch.
        evaluations: split -> evaluation of the kept epoch.
    """

    folder: Path
    history: TrainingHistory
    evaluations: dict[str, Evaluation]


def train_run(
    run: RunConfig, folder: Path, *, overwrite: bool = False, device: str = "auto", console: Console | None = None
) -> RunResult:
    """Train what a configuration describes and write the run directory.

    Called by one process, or by every process of ``torchrun``.  The directory holds ``run.yaml``, ``preprocessing/``,
    ``checkpoint/`` (weights of the best epoch), ``catalogue/``, ``metrics.json`` and ``tensorboard/``.

    Args:
        run: the configuration; its paths are taken as they are.
        folder: the run directory; on several ranks, one that all of them share.
        overwrite: whether an earlier run in `folder` may be replaced.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        DataError: the data does not fit the schema.
        FileExistsError: `folder` holds a run and `overwrite` is False.
    """
    console = console or Console()
    with ranks(device) as where:
        if where.broadcast((folder / CHECKPOINT).exists()) and not overwrite:
            raise FileExistsError(f"{folder} holds a run already; choose another folder or overwrite it")
        return _train(run, folder, where, console)


def _train(run: RunConfig, folder: Path, where: Ranks, console: Console) -> RunResult:
    def say(text: str) -> None:
        if where.first:
            console.print(text, highlight=False, soft_wrap=True)

    preprocessor = Preprocessor(run.data_schema, run.statistics)
    splits = read_splits(run.data, preprocessor.columns(), run.data_schema.time)
    say("read " + ", ".join(f"{len(rows):,} rows of {name}" for name, rows in splits.items()))
    keys = sum(len(block.keys) for block in run.statistics if block.prepared is None)
    if keys:
        say(f"counting what came before each row, by {keys} keys")
    encoded = {"train": preprocessor.fit(splits["train"])}
    encoded |= {name: preprocessor.encode(rows) for name, rows in splits.items() if name != "train"}
    catalogue = _catalogue(run, preprocessor, splits)
    if where.first:
        # Only now, with the data read and found right, does an earlier run go.
        for part in (CHECKPOINT, "preprocessing", "catalogue", "tensorboard"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "metrics.json").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(dump_run(run), encoding="utf-8")
        preprocessor.save(folder / "preprocessing")
        if catalogue is not None:
            catalogue.save(folder / "catalogue")
    where.barrier()

    config = run.training
    model = build_model(run.model, preprocessor.encoder, run.fusion, seed=config.seed)
    steps = -(-len(encoded["train"]) // (config.batch_size * where.world_size)) * config.epochs
    train_module = MTCLTrain(model, l2_embedding=config.l2_embedding)
    sharded, optimizer = parallelise(train_module, where, config, _for_modules(run.optimizers))
    say(_describe(model, preprocessor, where))
    with TrainingProgress(
        active=where.first, total_steps=steps, log_dir=folder / "tensorboard", console=console
    ) as progress:
        history = fit(
            sharded,
            optimizer,
            encoded["train"],
            encoded["val"],
            config,
            where,
            val_users=user_groups(run.data_schema, splits["val"].frame),
            keep=lambda: save_weights(sharded, folder / CHECKPOINT, where),
            progress=progress,
        )
    load_weights(sharded, folder / CHECKPOINT)
    evaluations: dict[str, Evaluation] = {}
    for name in ("val", "test"):
        if name in encoded:
            evaluations[name] = evaluate_rows(
                plain_model(sharded),
                preprocessor,
                splits[name],
                encoded[name],
                catalogue,
                where,
                config.eval_batch_size,
            )
    if where.first:
        write_metrics(folder / "metrics.json", history, evaluations)
    where.barrier()
    return RunResult(folder, history, evaluations)


def _for_modules(optimizers: OptimizersConfig) -> OptimizersConfig:
    """The optimizers with tables named as in the model."""
    lr_of = {table_module_name(table): lr for table, lr in optimizers.tables.lr_of.items()}
    return optimizers.model_copy(update={"tables": optimizers.tables.model_copy(update={"lr_of": lr_of})})


def _catalogue(run: RunConfig, preprocessor: Preprocessor, splits: dict[str, Rows]) -> Catalogue | None:
    if run.data_schema.user is None or run.data_schema.item is None:
        return None
    return Catalogue.build(run.data_schema, preprocessor.groups, splits["train"].frame, splits["val"].frame)


def _describe(model: MTCL, preprocessor: Preprocessor, where: Ranks) -> str:
    tables = {t: preprocessor.encoder.num_embeddings(t) for t in preprocessor.schema.tables()}
    dense = sum(p.numel() for p in model.tower.parameters())
    return (
        f"{len(tables)} embedding tables with {sum(tables.values()):,} rows, "
        f"{len(preprocessor.encoder.dense_groups)} dense inputs, {dense:,} dense parameters, {len(model.tasks)} tasks; "
        f"{where.world_size} rank{'s' if where.world_size > 1 else ''} on {where.device.type}"
    )


def evaluate_rows(
    model: MTCL,
    preprocessor: Preprocessor,
    raw: Rows,
    rows: EncodedRows,
    catalogue: Catalogue | None,
    where: Ranks | None = None,
    batch_size: int = 8192,
) -> Evaluation:
    """Evaluate a model on encoded rows; on several ranks, all of them take part and get the result.

    Args:
        raw: the same rows with the user and item columns.
        catalogue: for the popularity baseline, or None.
    """
    predictions = predict(model, rows, batch_size=batch_size, device=where.device if where else None)
    schema = preprocessor.declared
    popularity = None
    if catalogue is not None and schema.item is not None:
        popularity = raw.frame[schema.item].map(catalogue.popularity).fillna(0.0).to_numpy(dtype=np.float64)
    fused = getattr(model.output.fused_score, "tasks", ())
    return evaluate_predictions(
        schema, model.tasks, predictions, rows.labels.numpy(), user_groups(schema, raw.frame), popularity, fused
    )


def write_metrics(path: Path, history: TrainingHistory, evaluations: dict[str, Evaluation]) -> None:
    """Everything measured, as JSON; what is not defined is null."""
    content = {"history": asdict(history), "evaluations": {k: asdict(v) for k, v in evaluations.items()}}
    path.write_text(json.dumps(_finite(content), indent=1))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclass
class FinishedRun:
    """A run read back: the whole model in this process, without a process group.

    Args:
        config: as it was trained.
        preprocessor: fitted.
        model: in eval mode, on the CPU.
        catalogue: what it knows of users and items; None where the schema names no user or item.
    """

    config: RunConfig
    preprocessor: Preprocessor
    model: MTCL
    catalogue: Catalogue | None

    @classmethod
    def load(cls, folder: str | Path) -> FinishedRun:
        """Read a run directory.

        Raises:
            DataError: the folder holds no finished run.
        """
        folder = Path(folder)
        if not (folder / "run.yaml").is_file():
            raise DataError(f"{folder}: no run here (run.yaml is missing)")
        if not (folder / CHECKPOINT).is_dir():
            raise DataError(f"{folder}: the run has kept no epoch yet (no {CHECKPOINT}/)")
        config = parse_run((folder / "run.yaml").read_text(encoding="utf-8"), name=str(folder / "run.yaml"))
        preprocessor = Preprocessor.load(folder / "preprocessing", config.data_schema, config.statistics)
        model = build_model(config.model, preprocessor.encoder, config.fusion, table_device="cpu")
        load_unsharded(model, folder / CHECKPOINT, prefix=WEIGHTS_PREFIX)
        catalogue = Catalogue.load(folder / "catalogue") if (folder / "catalogue").is_dir() else None
        return cls(config, preprocessor, model.eval(), catalogue)

    def encode(self, frame: pd.DataFrame) -> EncodedRows:
        """Encode rows to be scored."""
        return self.preprocessor.encode(Rows(frame), with_labels=False)
