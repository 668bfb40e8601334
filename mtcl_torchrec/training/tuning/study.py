"""The trials of a search, kept in a file: which settings come next, which trials are given up, which is best."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from mtcl_torchrec.config.commands import Pruner
from mtcl_torchrec.data.files import files_fingerprint, without_paths
from mtcl_torchrec.schema import ConfigError
from mtcl_torchrec.training.directory import locked
from mtcl_torchrec.training.tuning.objective import Direction, Objective
from mtcl_torchrec.training.tuning.space import Space, Value, plain

STUDY = "study.db"
_LOCK = "tuning.lock"
_NAME = "mtcl"
GIVEN_UP = 2  # interruptions of a trial without a new epoch, after which it counts as failed
MISSING = "mtcl tune needs optuna: pip install 'mtcl_torchrec[tune]'"


@dataclass(frozen=True)
class Proposal:
    """A trial to be run: its number, and its settings beyond the run's own."""

    number: int
    values: dict[str, Value]


@dataclass(frozen=True)
class Finished:
    """A trial that is over.

    Args:
        state: ``"complete"``, ``"pruned"`` or ``"failed"``.
        value: of the objective; None of a failed one.
        metrics: task -> validation metrics of the kept epoch.
        error: why it failed.
        seconds: what it took, without interruptions.
        left_out: tasks that did not count in the value -> why.
    """

    number: int
    values: dict[str, Value]
    state: Literal["complete", "pruned", "failed"]
    value: float | None
    metrics: dict[str, dict[str, float | None]]
    error: str
    seconds: float
    left_out: dict[str, str] = field(default_factory=dict)


class Study:
    """Trials of optuna in a SQLite file.  Of several ranks, the first alone has one.

    A trial that was interrupted is the next one again.  What is proposed follows from the seed and the trials before,
    so that a search that was interrupted finds what it would have found.

    Args:
        folder: holds the file.
        lock: from `open_folder`; closed with the study.
        direction: ``"maximize"`` or ``"minimize"``.
        about: what the trials have in common; a study of something else is refused.
        epochs: of a trial, at most.

    Raises:
        ConfigError: the folder holds a study of something else, or optuna is missing.
    """

    def __init__(
        self,
        folder: Path,
        lock: IO[str],
        space: Space,
        direction: Direction,
        about: str,
        *,
        pruner: Pruner,
        epochs: int,
        seed: int,
    ) -> None:
        self._lock = lock
        try:
            import optuna
        except ImportError:
            raise ConfigError(MISSING) from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module=r"optuna.*")
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.folder, self.space, self.seed, self._optuna = folder, space, seed, optuna
        storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY).resolve()}")
        warm = 1 if epochs > 2 else 0
        pruners: dict[Pruner, Any] = {
            "median": optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=warm),
            "hyperband": optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3),
            "none": optuna.pruners.NopPruner(),
        }
        self._study = optuna.create_study(
            storage=storage, study_name=_NAME, direction=direction, pruner=pruners[pruner],
            load_if_exists=True,
        )  # fmt: skip
        before = self._study.user_attrs.get("about")
        if before is None:
            self._study.set_user_attr("about", about)
        elif before != about:
            raise ConfigError(
                f"{folder} holds a search of another run, space or objective, or one of other data: --overwrite it, or "
                "choose another --out"
            )
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(space.own())
        self._trial: Any = None

    def close(self) -> None:
        """Give the folder free."""
        self._lock.close()

    def next(self, trials: int) -> Proposal | None:
        """The next trial, or None where so many are over."""
        states = self._optuna.trial.TrialState
        while True:
            known = self._study.get_trials(deepcopy=False)
            running = next((t for t in known if t.state == states.RUNNING), None)
            if sum(t.state.is_finished() for t in known) >= trials:
                return None
            number = running.number if running is not None else next(
                (t.number for t in known if t.state == states.WAITING), len(known)
            )  # fmt: skip
            # A sampler of its own for each trial: it draws the same whether or not there was an interruption.
            self._study.sampler = self._optuna.samplers.TPESampler(
                seed=(self.seed * 1_000_003 + number) % 2**32, multivariate=True, group=True, n_startup_trials=8
            )
            if running is None:
                self._trial = self._study.ask()
            else:
                self._trial = self._optuna.trial.Trial(self._study, running._trial_id)
                if self._interrupted_for_good():
                    self.fail("interrupted twice without a new epoch, such as for want of memory")
                    continue
            try:
                values = self.space.suggest(self._trial, own=number == 0)
            except ConfigError as error:
                self.fail(str(error))
                continue
            return Proposal(number, values if number else {})

    def excuse(self) -> None:
        """A person ended the trial under way: that interruption does not count."""
        if self._trial is not None:
            self._trial.set_user_attr("excused", True)

    def _interrupted_for_good(self) -> bool:
        """Whether the trial would only be interrupted once more; counts this interruption."""
        if self._trial.user_attrs.get("excused"):
            self._trial.set_user_attr("excused", False)
            return False
        reached = len(self._study.trials[self._trial.number].intermediate_values)
        starts, before = self._trial.user_attrs.get("interrupted", (0, reached))
        starts = 1 if reached > before else starts + 1
        self._trial.set_user_attr("interrupted", (starts, reached))
        return starts > GIVEN_UP

    def should_prune(self, epoch: int, value: float) -> bool:
        """Tell the trial's number after an epoch; whether to give it up.  The run's own settings never are."""
        if not math.isfinite(value):
            return False
        if epoch not in self._study.trials[self._trial.number].intermediate_values:
            self._trial.report(value, epoch)
        return self._trial.number > 0 and bool(self._trial.should_prune())

    def complete(
        self,
        value: float,
        metrics: dict[str, dict[str, float | None]],
        seconds: float,
        left_out: dict[str, str],
    ) -> None:
        """The trial came to its end."""
        if not math.isfinite(value):
            self.fail("the objective is not defined on the validation split")
            return
        self._trial.set_user_attr("seconds", self._trial.user_attrs.get("seconds", 0.0) + seconds)
        self._trial.set_user_attr("metrics", metrics)
        self._trial.set_user_attr("left_out", left_out)
        self._study.tell(self._trial, value)

    def prune(self, seconds: float) -> None:
        """The trial was given up."""
        self._trial.set_user_attr("seconds", seconds)
        self._study.tell(self._trial, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, error: str) -> None:
        """The trial failed; the search goes on."""
        self._trial.set_user_attr("error", error)
        self._study.tell(self._trial, state=self._optuna.trial.TrialState.FAIL)

    def finished(self) -> list[Finished]:
        """All trials that are over, in their order."""
        names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        return [
            Finished(
                number=trial.number,
                values=dict(trial.params),
                state=names[trial.state.name],  # type: ignore[arg-type]
                value=trial.value,
                metrics=trial.user_attrs.get("metrics", {}),
                error=trial.user_attrs.get("error", ""),
                seconds=trial.user_attrs.get("seconds", 0.0),
                left_out=trial.user_attrs.get("left_out", {}),
            )
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.is_finished()
        ]

    def importances(self) -> dict[str, float]:
        """Path -> its share of what the objective varies by (functional ANOVA, Hutter et al., ICML 2014), of the
        parameters that all completed trials have; empty where there are too few of them."""
        try:
            evaluator = self._optuna.importance.FanovaImportanceEvaluator(seed=self.seed)
            found = self._optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        except (ValueError, RuntimeError, ImportError):
            return {}
        return {name: share for name, share in found.items() if math.isfinite(share)}


def open_folder(folder: Path, overwrite: bool) -> IO[str]:
    """A folder for a study, locked until the file that is returned is closed, or this process ends, however it ends.

    Args:
        overwrite: forget the study that is there.

    Raises:
        ConfigError: another process is at work in it.
        FileExistsError: it holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _LOCK).is_file():
        raise FileExistsError(f"{folder} is not empty and no folder of mtcl tune; choose a new one")
    lock = locked(folder, "mtcl tune", name=_LOCK)
    for path in folder.iterdir() if overwrite else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    return lock


def about(space: Space, objective: Objective) -> str:
    """What the trials of a study have in common, from whatever folder they are started.

    Raises:
        DataError: a file of the run is missing.
    """
    return json.dumps(
        {
            "run": without_paths(plain(space.run)),
            "files": files_fingerprint(space.run),
            "space": space.as_json(),
            "objective": objective.name,
            # Trials of before, when the mean was of all tasks, cannot be compared with others.
            "mean_of": "sure tasks" if objective.metric is None and not objective.watched else "named tasks",
        },
        sort_keys=True,
    )
