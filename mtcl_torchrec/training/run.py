"""From a configuration to a run directory: train what it describes or go on with it, evaluate, store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from mtcl_torchrec.config import RunConfig, dump_run, with_paths_from
from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.splits import Splits
from mtcl_torchrec.evaluation.report import Evaluation, user_groups
from mtcl_torchrec.models import MTCL, MTCLTrain
from mtcl_torchrec.modules.balance.surgery import LEAN_ON_SMALL
from mtcl_torchrec.modules.rare import uncalibrated_lines
from mtcl_torchrec.schema import DataError
from mtcl_torchrec.training.averaging import WeightAverage
from mtcl_torchrec.training.build import build_loss_weighting, build_model, build_surgery, for_modules, zero_tables
from mtcl_torchrec.training.calibration import CalibrationResult, calibrate_run
from mtcl_torchrec.training.checkpoint.state import TrainingState, load_weights
from mtcl_torchrec.training.checkpoint.store import (
    CheckpointStore,
    best_checkpoint,
)
from mtcl_torchrec.training.cost import cost_of, dense_parameters, runs_on
from mtcl_torchrec.training.counted_items import keep_popularity, totals_of
from mtcl_torchrec.training.diagnosis import diagnose
from mtcl_torchrec.training.directory import (
    CALIBRATION,
    CATALOGUE,
    CHECKPOINTS,
    FUSION,
    MARKER,
    POPULARITY,
    PREDICTIONS,
    PREPROCESSING,
    Existing,
    claim_run_directory,
    replace_file,
    replace_folder,
    sign_run_directory,
)
from mtcl_torchrec.training.doubts import too_good
from mtcl_torchrec.training.fitted_fusion import DECLARED, FORMER, reset_fusion
from mtcl_torchrec.training.fused import build_fused_loss, is_learned
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.judging import check_segments, evaluation_as_json, judge, shared_requests
from mtcl_torchrec.training.loop import AfterEpoch, Validation, fit, parallelise, plain_model, train_module_of
from mtcl_torchrec.training.memory import keep_freed_memory
from mtcl_torchrec.training.optimizers import build_schedule
from mtcl_torchrec.training.planning.planner import plan_as_json
from mtcl_torchrec.training.precision import resolve_precision, set_precision
from mtcl_torchrec.training.progress import TrainingProgress
from mtcl_torchrec.training.rec_metrics import build_training_metrics
from mtcl_torchrec.training.run_data import RunData, earlier_encoder, load_data
from mtcl_torchrec.training.sharding import Device, Ranks, ranks
from mtcl_torchrec.training.start import Start, begins_anew, precision_before, start_of

Say = Callable[[str], None]


@dataclass
class RunResult:
    """What a run reached.

    Args:
        folder: the run directory.
        history: validation metrics by epoch.
        evaluations: split -> evaluation of the kept epoch.
        diagnosis: what stands out, see `mtcl_torchrec.training.diagnosis`.
        calibration: what it came to, of a run that has one.
    """

    folder: Path
    history: TrainingHistory
    evaluations: dict[str, Evaluation]
    diagnosis: list[str]
    calibration: CalibrationResult | None = None


def train_run(
    run: RunConfig,
    folder: Path,
    *,
    existing: Existing = "refuse",
    device: Device = "auto",
    console: Console | None = None,
    data: RunData | None = None,
    after_epoch: AfterEpoch | None = None,
) -> RunResult:
    """Train what a configuration describes and write the run directory.

    Called by one process, or by every process of ``torchrun``.  The directory holds ``run.yaml``, ``preprocessing/``,
    ``checkpoints/`` (the newest few and the best epoch's), ``catalogue/`` (of rows in memory) or ``popularity/`` (of
    rows that go by), ``metrics.json`` and ``tensorboard/``, and ``calibration/`` where predictions are calibrated.

    Args:
        run: the configuration; its paths are taken as they are.
        folder: the run directory; on several ranks, one that all of them share.
        existing: what to do with an earlier run in `folder`: refuse to touch it, overwrite it, or resume it.  A run
            that is resumed on as many ranks and with the same configuration ends as if it had never been interrupted.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        data: what `load_data` read for this configuration, to read it once for several runs; None reads it.
        after_epoch: called with the history after each epoch, on every rank; what it raises ends the run.

    Raises:
        DataError: the data does not fit the schema, or the checkpoint does not fit the model.
        FileExistsError: `folder` holds a run and `existing` is "refuse", or something that is no run.
        FloatingPointError: the loss was not finite in too many batches.
    """
    console = console or Console()
    keep_freed_memory()
    with ranks(device) as where:
        resume = claim_run_directory(folder, where, existing=existing)
        if existing == "resume" and not resume and where.first:
            console.print(f"nothing to go on with in {folder}: beginning", highlight=False, markup=False)
        try:
            return _train(run, folder, where, console, resume, data, after_epoch)
        except BaseException:
            if where.first and folder.is_dir() and [p.name for p in folder.iterdir()] == [MARKER]:
                shutil.rmtree(folder)  # nothing came of it
            raise


def _train(
    run: RunConfig,
    folder: Path,
    where: Ranks,
    console: Console,
    resume: bool,
    data: RunData | None,
    after_epoch: AfterEpoch | None,
) -> RunResult:
    def say(text: str) -> None:
        if where.first:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    if data is None:
        data = load_data(run, where, grown_from=earlier_encoder(folder) if resume else None, say=say)
    preprocessor, splits = data.preprocessor, data.splits
    check_segments(run, splits)
    if said := shared_requests(run, splits):
        say(f"WARNING: {said}")
    tasks = [task.name for task in run.data_schema.tasks]  # of a network alone, fewer than were counted
    base_rates = {name: rate for name, rate in splits.base_rates.items() if name in tasks}
    model = build_model(run.model, preprocessor.encoder, run.fusion, seed=run.training.seed, base_rates=base_rates)
    start = start_of(folder, splits, say) if resume else Start()
    run = _with_precision(run, model, start, where)
    state = _state_at(start, run, model, splits, where)
    state.items = totals_of(folder, splits, preprocessor.encoder, model.tasks, start, resume=resume, say=say)
    say(_describe(run, model, preprocessor, where))
    calibrated = {} if run.calibration is None else run.calibration.pieces(model.tasks)
    for line in uncalibrated_lines([task for task in model.tasks if task.name not in calibrated]):
        say(line)
    _note_declared_weights(run, state, say)
    if (surgery := run.balance.surgery).kind in LEAN_ON_SMALL:
        held = f"its weights are held in [{surgery.min_weight:g}, {surgery.max_weight:g}]"
        say(f"balance.surgery.kind {surgery.kind} leans on tasks of small gradients and can collapse a run; {held}")
    if start.checkpoint is not None:
        anew = begins_anew(run, start.checkpoint)
        state.load(start.checkpoint, where, anew=anew)
        for part, before in anew.items():
            say(f"balance.{part} was {before} before: its state begins anew")
        left = splits.train.rows_left(state.position) / max(splits.train.rows_per_epoch, 1)
        say(f"going on after step {state.step:,}: epoch {state.position.epoch}, {1 - left:.0%} of it done")
        if state.position.epoch > run.training.epochs:
            say(f"all {run.training.epochs} epochs are done: nothing is trained; raise training.epochs to go on")
    if (folder / FUSION / DECLARED).is_file():
        goes = f"goes to {folder / FUSION / FORMER}" if resume else "goes, with all before it"
        say(f"{folder / FUSION} {goes}: it was fitted for the weights before; `mtcl fuse` fits it for the new ones")
    if is_learned(run.fusion) and run.calibration is not None:
        say("the fused score learns from predictions before calibration, and ranks by those after: see `mtcl fuse`")
    _open_directory(run, folder, preprocessor, splits.catalogue, where, keep=resume)
    history = _fit(run, folder, state, splits, where, console, say, after_epoch)
    best = best_checkpoint(folder / CHECKPOINTS)
    if best is None:
        raise DataError(f"{folder}: the best epoch's checkpoint is gone, and no epoch is left to train: raise epochs")
    load_weights(state.model, best)
    calibration = calibrate_run(run, folder, plain_model(state.model), preprocessor, splits, where, say)
    evaluations = judge(run, folder, plain_model(state.model), preprocessor, splits, calibration, where)
    kept = history.epochs[history.best_epoch - 1]
    doubts = [*data.doubts, *too_good(model.tasks, kept, preprocessor.encoder, splits.encoded["val"])]
    diagnosis = diagnose(
        history.balance, history.epochs, history.best_epoch, calibrated=calibrated, doubts=doubts,
        popular=evaluations["val"].against_popularity if "val" in evaluations else None,
    )  # fmt: skip
    say("\n".join(["diagnosis:", *(f"  - {line}" for line in diagnosis)]))
    if where.first:
        cost = cost_of(plain_model(state.model), history, run.training, where)
        write_metrics(folder / "metrics.json", history, evaluations, diagnosis, calibration, cost, doubts)
    where.barrier()
    return RunResult(folder, history, evaluations, diagnosis, calibration)


def _with_precision(run: RunConfig, model: MTCL, start: Start, where: Ranks) -> RunConfig:
    """The run with the precision that it is trained in, which the model is given."""
    before = None if start.checkpoint is None else precision_before(start.checkpoint)
    precision = resolve_precision(run.training.precision, model, where, before)
    set_precision(model, precision)
    return run.model_copy(update={"training": run.training.model_copy(update={"precision": precision})})


def _state_at(start: Start, run: RunConfig, model: MTCL, splits: Splits, where: Ranks) -> TrainingState:
    """Sharded model, optimizer and schedule, with all weights as they are before the first step."""
    config = run.training
    optimizers, sharding = for_modules(run)
    train_module = MTCLTrain(
        model,
        loss_weighting=build_loss_weighting(run.balance.weighting, len(model.tasks)),
        gradient_surgery=build_surgery(run.balance.surgery, seed=config.seed),
        regularisers=config.regularisers.model_dump(),
        fused_loss=build_fused_loss(run.fusion.train if run.fusion else None, run.data_schema),
        seed=config.seed,
    )
    sharded, optimizer = parallelise(
        train_module,
        where,
        optimizers,
        sharding=sharding,
        batch_size=config.batch_size,
        seed=config.seed,
        zero_tables=zero_tables(run),
    )
    # In steps of this many ranks and this batch size, which may have been others before: the schedule goes on where it
    # was in the data.
    total = _steps_left(Position(), splits, run, where)
    return TrainingState(
        model=sharded,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.warmup_steps, total, config.decay),
        average=WeightAverage(sharded, config.averaging) if config.averaging > 0 else None,
        position=start.position,
        step=start.step,
        scheduled=total - _steps_left(start.position, splits, run, where),
        averaged=start.averaged,
        history=start.history,
    )


def _steps_left(position: Position, splits: Splits, run: RunConfig, where: Ranks) -> int:
    """Steps from a position to the end of the last epoch."""
    cut = {"world_size": where.world_size, "batch_size": run.training.batch_size}
    later = run.training.epochs - position.epoch  # whole epochs, each of as many steps
    if later < 0:
        return 0
    return splits.train.steps(position, **cut) + later * splits.train.steps(Position(), **cut)


def _open_directory(
    run: RunConfig, folder: Path, preprocessor: Preprocessor, catalogue: Catalogue | None, where: Ranks, *, keep: bool
) -> None:
    """Write what is known before training.  Only now, with data and model found right, does an earlier run go."""
    if where.first:
        for part in () if keep else (CHECKPOINTS, "tensorboard", CATALOGUE, POPULARITY):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "metrics.json").unlink(missing_ok=True)
        shutil.rmtree(folder / PREDICTIONS, ignore_errors=True)
        if keep:
            reset_fusion(folder)  # fitted for weights that are going to change
        for part in (CALIBRATION,) if keep else (CALIBRATION, FUSION):
            for fitted in (folder / part, folder / f"{part}.old"):
                shutil.rmtree(fitted, ignore_errors=True)
        sign_run_directory(folder)
        replace_file(folder / "run.yaml", dump_run(with_paths_from(run, folder)))
        replace_folder(folder / PREPROCESSING, preprocessor.save)
        if catalogue is not None:
            replace_folder(folder / CATALOGUE, catalogue.save)
    where.barrier()


def _fit(
    run: RunConfig,
    folder: Path,
    state: TrainingState,
    splits: Splits,
    where: Ranks,
    console: Console,
    say: Say,
    after_epoch: AfterEpoch | None,
) -> TrainingHistory:
    store = CheckpointStore(folder / CHECKPOINTS, where, keep=run.training.checkpoint.keep)

    def save(state: TrainingState, *, on_the_way: bool) -> None:
        complain(store.failure(wait=True))
        background = on_the_way and run.training.checkpoint.asynchronous
        try:
            store.save(state.tensors(where, copy=background), _about(state, run, splits, where), background=background)
        except OSError as error:
            if not on_the_way:
                raise
            complain(str(error))

    def complain(failure: str | None) -> None:
        if failure is not None:
            say(f"WARNING: {failure}; training goes on")

    users = user_groups(run.data_schema, splits.raw["val"].frame)
    metrics = build_training_metrics(
        plain_model(state.model).tasks, run.data_schema, run.training.metrics, where, batch_size=run.training.batch_size
    )
    total = state.step + _steps_left(state.position, splits, run, where)
    try:
        with TrainingProgress(
            active=where.first, total_steps=total, log_dir=folder / "tensorboard", console=console, done=state.step
        ) as progress:
            history = fit(
                state,
                splits.train,
                Validation(splits.encoded["val"], users),
                run.training,
                where,
                save=save,
                progress=progress,
                metrics=metrics,
                keep_items=partial(keep_popularity, folder=folder, fingerprint=splits.train.fingerprint, where=where),
                after_epoch=after_epoch,
            )
        complain(store.failure(wait=True))
    finally:
        store.close()
    return history


def _about(state: TrainingState, run: RunConfig, splits: Splits, where: Ranks) -> dict[str, Any]:
    """What stands beside a checkpoint's tensors, as JSON."""
    return {
        "format": 1,
        "step": state.step,
        "averaged": 0 if state.average is None else state.average.steps,
        "position": state.position.to_json(),
        "history": state.history.to_json(),
        "rows": splits.train.fingerprint,
        "ranks": where.world_size,
        "batch_size": run.training.batch_size,
        "plan": plan_as_json(state.model.plan),
        "run": dump_run(run),
        "versions": {name: _version(name) for name in ("mtcl_torchrec", "torch", "torchrec", "fbgemm-gpu")},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _describe(run: RunConfig, model: MTCL, preprocessor: Preprocessor, where: Ranks) -> str:
    tables = run.model.tables(preprocessor.schema)
    rows = sum(preprocessor.encoder.num_embeddings(features[0].table_name) for features in tables.values())
    dense = dense_parameters(model)
    return (
        f"{len(tables)} embedding tables with {rows:,} rows, "
        f"{len(preprocessor.encoder.dense_groups)} dense inputs, {dense:,} dense parameters, {len(model.tasks)} tasks; "
        f"{runs_on(run.training, where)}"
    )


def _note_declared_weights(run: RunConfig, state: TrainingState, say: Say) -> None:
    """Some loss weightings make no difference between tasks that are declared with different weights."""
    weighting = train_module_of(state.model).loss.weighting
    weights = {task.weight for task in run.data_schema.tasks} - {0.0}
    if weighting is not None and weighting.scale_free and len(weights) > 1:
        say(f"balance.weighting.kind {run.balance.weighting.kind}: the weights of the tasks cancel out under it")


def write_metrics(
    path: Path,
    history: TrainingHistory,
    evaluations: dict[str, Evaluation],
    diagnosis: list[str],
    calibration: CalibrationResult | None = None,
    cost: dict[str, Any] | None = None,
    doubts: Sequence[str] = (),
) -> None:
    """Everything measured, as JSON; what is not defined is null."""
    of_history = history.to_json()
    content = {
        "history": of_history,
        "balance": of_history.pop("balance"),
        "diagnosis": diagnosis,
        "evaluations": {split: evaluation_as_json(evaluation) for split, evaluation in evaluations.items()},
    }
    if doubts:
        content["doubts"] = list(doubts)
    if cost is not None:
        content["cost"] = cost
    if calibration is not None:
        content["calibration"] = calibration.to_json()
    replace_file(path, json.dumps(content, indent=1))
