"""Where a run's training starts: at its beginning, or after the newest checkpoint in its directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter

from mtcl_torchrec.config import RunConfig, parse_run
from mtcl_torchrec.data.position import Position
from mtcl_torchrec.data.splits import Splits
from mtcl_torchrec.modules.towers import Precision
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.checkpoint.store import best_checkpoint, checkpoint_name, newest_checkpoint, read_about
from mtcl_torchrec.training.directory import CHECKPOINTS
from mtcl_torchrec.training.history import TrainingHistory

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where training starts: at its beginning, or after a checkpoint."""

    step: int = 0
    averaged: int = 0
    position: Position = field(default_factory=Position)
    history: TrainingHistory = field(default_factory=TrainingHistory)
    checkpoint: Path | None = None


def start_of(folder: Path, splits: Splits, say: Say) -> Start:
    """After the newest checkpoint in the folder.

    Raises:
        DataError: that checkpoint is damaged, or of other data.
    """
    newest = newest_checkpoint(folder / CHECKPOINTS)
    assert newest is not None
    about = read_about(newest)
    try:
        step, averaged = (_count(about[name]) for name in ("step", "averaged"))
        position, rows = Position.from_json(about["position"]), about["rows"]
        history = TrainingHistory.from_json(about["history"])
        if newest.name != checkpoint_name(step):
            raise ValueError(f"step is {step}")
    except (KeyError, ValueError) as error:
        raise DataError(f"{newest}: damaged checkpoint (state.json: {_first_line(error)}); remove it to go on with the "
                        "one before") from None  # fmt: skip
    if rows != splits.train.fingerprint and position.taken:
        say("the training data is not what it was: its epoch starts again")
        position = Position(position.epoch)
    if history.best_epoch and best_checkpoint(folder / CHECKPOINTS) is None:
        say(f"the checkpoint of epoch {history.best_epoch}, the best, is gone: of the epochs to come, one will be kept")
        history.best_epoch, history.best_step, history.best_auc = 0, 0, None
    _check_position(position, splits, newest)
    return Start(step, averaged, position, history, newest)


def begins_anew(run: RunConfig, checkpoint: Path) -> dict[str, str]:
    """See `BalanceConfig.begins_anew`; nothing where the checkpoint does not tell how it was trained."""
    try:
        before = parse_run(str(read_about(checkpoint)["run"]))
    except (ConfigError, KeyError):
        return {}
    return run.balance.begins_anew(before.balance)


def precision_before(checkpoint: Path) -> Precision | None:
    """The precision that a checkpoint was trained in; None where it does not tell."""
    try:
        told = parse_run(str(read_about(checkpoint)["run"])).training.precision
    except (ConfigError, KeyError):
        return None
    return "fp32" if told == "auto" else told  # of a run from before there was a choice, which said nothing


def _check_position(position: Position, splits: Splits, checkpoint: Path) -> None:
    """No more batches can have been taken than there were."""
    at = Position(position.epoch)
    for world_size, batch_size, batches in position.taken:
        if batches > splits.train.steps(at, world_size=world_size, batch_size=batch_size):
            raise DataError(f"{checkpoint}: damaged checkpoint (state.json: position beyond the epoch's rows)")
        at = at.after(batches, world_size=world_size, batch_size=batch_size)


def _count(value: object) -> int:
    return TypeAdapter(NonNegativeInt).validate_python(value, strict=True)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
