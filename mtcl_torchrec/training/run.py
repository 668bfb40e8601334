"""From a configuration to a run directory: read, prepare, train, evaluate, store."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from mtcl_torchrec.config import DataConfig, OptimizersConfig, RunConfig, ShardingConfig, dump_run, parse_run
from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, read_splits
from mtcl_torchrec.evaluation.predict import predict
from mtcl_torchrec.evaluation.report import Evaluation, evaluate_predictions, user_groups
from mtcl_torchrec.models import MTCL, MTCLTrain
from mtcl_torchrec.modules.embeddings import table_module_name
from mtcl_torchrec.modules.fusion import WeightedMean
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.build import build_model
from mtcl_torchrec.training.checkpoint import complete_checkpoint, load_unsharded, load_weights, save_weights
from mtcl_torchrec.training.loop import TrainingHistory, fit, parallelise, plain_model
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.sharding import Device, Ranks, ranks

CHECKPOINT = "checkpoint"
MARKER = ".mtcl-run"  # this folder is a run directory, whatever else it holds yet
QUIET_SECONDS = 20.0  # counting that takes longer says which keys are done
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
    run: RunConfig, folder: Path, *, overwrite: bool = False, device: Device = "auto", console: Console | None = None
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
        FileExistsError: `folder` holds a run and `overwrite` is False, or something that is no run.
    """
    console = console or Console()
    with ranks(device) as where:
        claim_run_directory(folder, where, overwrite=overwrite)
        try:
            return _train(run, folder, where, console)
        except BaseException:
            if where.first and [p.name for p in folder.iterdir()] == [MARKER]:
                shutil.rmtree(folder)  # nothing came of it
            raise


def claim_run_directory(folder: Path, where: Ranks, *, overwrite: bool = False) -> None:
    """Make sure that a run may be written to `folder`; nothing in it is touched yet.

    Raises:
        FileExistsError: it holds a run and `overwrite` is False, or it is a folder of something else.
    """
    state = where.broadcast(_state_of(folder) if where.first else None)
    if state == "run" and not overwrite:
        raise FileExistsError(f"{folder} holds a run already; choose another folder or overwrite it")
    if state == "other":
        raise FileExistsError(f"{folder} is not empty and no run directory; choose a new folder")
    if where.first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
    where.barrier()


def fresh_run_directory(name: str, where: Ranks) -> Path:
    """runs/NAME, or runs/NAME-2 and so on where that one exists; claimed, and the same on every rank."""
    folder, number = Path("runs") / name, 1
    while where.first:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            folder = Path("runs") / f"{name}-{number}"
    folder = Path(str(where.broadcast(str(folder))))
    claim_run_directory(folder, where)
    return folder


def _state_of(folder: Path) -> str:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "free"
    if not (folder / MARKER).is_file():
        return "other"
    return "run" if complete_checkpoint(folder / CHECKPOINT) else "free"


def _train(run: RunConfig, folder: Path, where: Ranks, console: Console) -> RunResult:
    def say(text: str) -> None:
        if where.first:
            console.print(text, highlight=False, soft_wrap=True)

    preprocessor = Preprocessor(run.data_schema, run.statistics)
    splits = read_splits(run.data, preprocessor.columns(), run.data_schema.time)
    say("read " + ", ".join(f"{len(rows):,} rows of {name}" for name, rows in splits.items()))
    keys = sum(len(block.keys) for block in run.statistics if block.prepared is None)
    if keys:
        say(f"counting what came before each row, by {keys} key{'s' if keys > 1 else ''}")
    started = time.monotonic()
    encoded = {
        "train": preprocessor.fit(
            splits["train"], lambda key: say(f"  {key}") if time.monotonic() - started > QUIET_SECONDS else None
        )
    }
    splits = {name: rows if name == "train" else preprocessor.conform(rows) for name, rows in splits.items()}
    encoded |= {name: preprocessor.encode(rows) for name, rows in splits.items() if name != "train"}
    catalogue = _catalogue(run, preprocessor, splits)
    config = run.training
    model = build_model(run.model, preprocessor.encoder, run.fusion, seed=config.seed, precision=config.precision)
    steps = -(-len(encoded["train"]) // (config.batch_size * where.world_size)) * config.epochs
    train_module = MTCLTrain(model, l2_embedding=config.l2_embedding)
    optimizers, sharding = _for_modules(run)
    sharded, optimizer = parallelise(train_module, where, optimizers, sharding=sharding, seed=config.seed)
    say(_describe(model, preprocessor, where))
    if where.first:
        # Only now, with data and model found right, does an earlier run go.
        for part in (CHECKPOINT, f"{CHECKPOINT}.old", "preprocessing", "catalogue", "tensorboard"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "metrics.json").unlink(missing_ok=True)
        (folder / "run.yaml").write_text(dump_run(_with_paths_from(run, folder)), encoding="utf-8")
        preprocessor.save(folder / "preprocessing")
        if catalogue is not None:
            catalogue.save(folder / "catalogue")
    where.barrier()
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


def _with_paths_from(run: RunConfig, folder: Path) -> RunConfig:
    """The run with its paths written as seen from `folder`, where its YAML will stand."""
    seen = run.model_copy(deep=True)
    for split in ("train", "val", "test", "log"):
        paths = getattr(seen.data, split)
        if paths is not None:
            setattr(seen.data, split, [os.path.relpath(path, folder) for path in paths])
    for block in seen.statistics:
        if block.prepared is not None:
            block.prepared = os.path.relpath(block.prepared, folder)
    return seen


def _for_modules(run: RunConfig) -> tuple[OptimizersConfig, ShardingConfig]:
    """Optimizers and sharding with tables named as in the model."""
    lr_of = {table_module_name(table): lr for table, lr in run.optimizers.tables.lr_of.items()}
    tables = {table_module_name(table): of for table, of in run.sharding.tables.items()}
    return (
        run.optimizers.model_copy(update={"tables": run.optimizers.tables.model_copy(update={"lr_of": lr_of})}),
        run.sharding.model_copy(update={"tables": tables}),
    )


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
        model.tasks, predictions, rows.labels.numpy(), user_groups(schema, raw.frame), popularity, fused
    )


def prepare_files(run: RunConfig, out: Path, say: Callable[[str], None]) -> None:
    """Compute a run's statistics once: its splits with their columns, the statistics, and a YAML that uses both.

    Args:
        out: a new or empty folder.
        say: called with a line for each key and each file.

    Raises:
        ConfigError: there is nothing to prepare, or `out` is not empty.
    """
    if not run.statistics:
        raise ConfigError("nothing to prepare, the run has no statistics")
    if any(block.prepared is not None for block in run.statistics):
        raise ConfigError("the data of this run is prepared already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    preprocessor = Preprocessor(run.data_schema, run.statistics)
    splits = read_splits(run.data, preprocessor.columns(), run.data_schema.time)
    prepared = {"train": preprocessor.fit_statistics(splits["train"], lambda key: say(f"  counted per {key}"))}
    prepared |= {name: preprocessor.with_statistics(rows) for name, rows in splits.items() if name != "train"}
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in prepared.items():
        rows.frame.to_parquet(out / f"{name}.parquet", index=False)
        say(f"{name}: {len(rows):,} rows, {rows.frame.shape[1]} columns")
    ready = run.model_copy(deep=True)
    ready.data = DataConfig(**{name: [f"{name}.parquet"] for name in prepared})
    for i, (block, config) in enumerate(zip(preprocessor.statistics, ready.statistics, strict=True)):
        block.save(out / f"statistics_{i}")
        config.prepared = f"statistics_{i}"
    (out / "run.yaml").write_text(dump_run(ready), encoding="utf-8")


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
        finished: False where training was interrupted; the model is that of its best epoch so far.
    """

    config: RunConfig
    preprocessor: Preprocessor
    model: MTCL
    catalogue: Catalogue | None
    finished: bool = True

    @classmethod
    def load(cls, folder: str | Path) -> FinishedRun:
        """Read a run directory, also one whose training was interrupted after an epoch was kept.

        Raises:
            DataError: the folder holds no run that has kept an epoch.
        """
        folder = Path(folder)
        if not (folder / "run.yaml").is_file():
            raise DataError(f"{folder}: no run here (run.yaml is missing)")
        checkpoint = complete_checkpoint(folder / CHECKPOINT)
        if checkpoint is None:
            raise DataError(f"{folder}: the run has kept no epoch yet (no {CHECKPOINT}/)")
        config = parse_run((folder / "run.yaml").read_text(encoding="utf-8"), name=str(folder / "run.yaml"))
        try:
            preprocessor = Preprocessor.load(folder / "preprocessing", config.data_schema, config.statistics)
            catalogue = Catalogue.load(folder / "catalogue") if (folder / "catalogue").is_dir() else None
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: the run directory is damaged ({error})") from None
        model = build_model(
            config.model,
            preprocessor.encoder,
            config.fusion,
            table_device="cpu",
            precision=config.training.precision,
        )
        load_unsharded(model, checkpoint, prefix=WEIGHTS_PREFIX)
        fused = model.output.fused_score
        if config.fusion is not None and isinstance(fused, WeightedMean):
            fused.set_weights(config.fusion.weights)  # those of run.yaml, which may be edited without training
        return cls(config, preprocessor, model.eval(), catalogue, finished=(folder / "metrics.json").is_file())

    def encode(self, frame: pd.DataFrame) -> EncodedRows:
        """Encode rows to be scored."""
        return self.preprocessor.encode(Rows(frame), with_labels=False)
