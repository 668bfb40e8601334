"""Many runs of one configuration with other settings, judged on the validation split."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.status import Status

from mtcl_torchrec.config import RunConfig
from mtcl_torchrec.config.tuning import SpaceConfig, TuningConfig
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.directory import CATALOGUE, CHECKPOINTS, POPULARITY, PREPROCESSING
from mtcl_torchrec.training.history import TrainingHistory
from mtcl_torchrec.training.run import train_run
from mtcl_torchrec.training.run_data import RunData, load_data
from mtcl_torchrec.training.sharding import Device, Ranks, ranks
from mtcl_torchrec.training.tuning.objective import MEAN, Objective, said_of
from mtcl_torchrec.training.tuning.outcome import TRIALS, TuningResult, best_of, outcome, short, write_best
from mtcl_torchrec.training.tuning.space import Space, Value, complete, default_space, shown
from mtcl_torchrec.training.tuning.study import STUDY, Proposal, Pruner, Study, about, open_folder

LOGS = "logs"
# What of features and tasks no encoded row shows: runs that differ in it alone share their data.
_UNSEEN = {"features": ("embedding_dim", "pooling"),
           "tasks": ("weight", "pos_weight", "negative_rate", "focal_gamma", "loss", "huber_delta")}  # fmt: skip
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
Say = Callable[[str], None]
T = TypeVar("T")


class _GivenUpError(Exception):
    """The trial is pruned."""


def tune_run(
    run: RunConfig,
    folder: Path,
    *,
    trials: int = 20,
    space: SpaceConfig | None = None,
    objective: str | None = None,
    pruner: Pruner = "median",
    timeout: float | None = None,
    overwrite: bool = False,
    device: Device = "auto",
    console: Console | None = None,
) -> TuningResult:
    """Search for settings of a run that are better on its validation split; the test split is not looked at.

    The first trial is the run as it is.  All trials have the run's seed, and read the data once where they can.  What
    is found is kept after each trial: a search that was interrupted goes on when it is called again, within a trial
    after its newest checkpoint.  Called by one process, or by every process of ``torchrun``.

    `folder` then holds ``best.yaml`` (a run to train), ``tuning.json``, ``parallel.png``, ``study.db`` (optuna's), and
    YAML, metrics and log of each trial.

    Args:
        run: the configuration; its paths are taken as they are.
        folder: of this search; on several ranks, one that all of them share.
        trials: how many there are to be in all, those of earlier calls included.
        space: path -> values; the default is the run's ``tuning``, or else `default_space`.
        objective: see `Objective`; the default is that of the run's ``tuning``, or else ``mean_skill``.
        pruner: how trials that lag behind are given up after an epoch: below the median of the others at that epoch, by
            Hyperband (Li et al., JMLR 2018), or not.
        timeout: seconds after which no trial is begun.
        overwrite: forget an earlier search in `folder`.

    Raises:
        ConfigError: the space or the objective does not fit the run, `folder` holds another search or one of other
            data, no trial came to its end, or optuna is not installed.
        DataError: the data does not fit the schema, or the study cannot be read or written.
        FileExistsError: `folder` holds something else.
    """
    screen = console or Console()
    said = run.tuning or TuningConfig()
    searched = Space.of(run, space or said.space or default_space(run))
    judged_by = Objective.named(objective or said.objective or MEAN, run)
    with ranks(device) as where:
        search = _Search(folder, searched, judged_by, where, device, screen)
        try:
            search.open(pruner, overwrite)
            search.go_on(trials, timeout)
            return search.end()
        finally:
            search.close()


class _Search:
    """A search under way.  The first rank has the study; the others are told."""

    def __init__(
        self, folder: Path, space: Space, objective: Objective, where: Ranks, device: Device, console: Console
    ) -> None:
        self.folder, self.space, self.objective = folder, space, objective
        self.where, self.device, self.console = where, device, console
        self._study: Study | None = None
        self._data: tuple[str, RunData] | None = None

    @property
    def study(self) -> Study:
        """That of the first rank, which alone asks for it."""
        assert self._study is not None
        return self._study

    def say(self, text: str) -> None:
        if self.where.first:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def of_first(self, ask: Callable[[], T]) -> T:
        """The first rank's answer, or its error, on every rank: one that waited for it would wait for ever."""
        value: Any = None
        failure: Exception | None = None
        if self.where.first:
            try:
                value = ask()
            except (ConfigError, DataError, OSError) as error:
                failure = error
            except Exception as error:  # of the file that holds the study: damaged, or the disk is full
                if type(error).__module__.split(".")[0] not in ("optuna", "sqlalchemy", "sqlite3"):
                    raise
                why = str(error.__cause__ or error).splitlines()[0]
                failure = DataError(f"{self.folder / STUDY}: {why}; --overwrite begins anew")
        told: Any = self.where.broadcast((value, failure))
        if told[1] is not None:
            raise told[1]
        return told[0]

    def open(self, pruner: Pruner, overwrite: bool) -> None:
        """Open the study, or begin one."""
        run = self.space.run

        def begin() -> int:
            told = about(self.space, self.objective)
            lock = open_folder(self.folder, overwrite)
            self._study = Study(
                self.folder, lock, self.space, self.objective.direction, told, pruner=pruner,
                epochs=run.training.epochs, seed=run.training.seed,
            )  # fmt: skip
            for trial in self._study.finished():
                self._tidy(trial.number)
            return len(self._study.finished())

        over = self.of_first(begin)
        if over:
            self.say(f"going on in {self.folder}: {over} {'trial is' if over == 1 else 'trials are'} over")
        else:
            count = len(self.space.parameters)
            self.say(f"searching {count} settings for the best {self.objective.name}; trial 0 is the run as it is")

    def close(self) -> None:
        if self._study is not None:
            self._study.close()

    def go_on(self, trials: int, timeout: float | None) -> None:
        """Trials until there are enough, or time is over."""
        began, done = time.monotonic(), 0

        def next_of() -> Proposal | str | None:
            if timeout is not None and time.monotonic() - began > timeout:
                return f"{timeout:g} s are over: no trial is begun"
            return self.study.next(trials)

        while isinstance(proposal := self.of_first(next_of), Proposal):
            self._attempt(proposal, trials)
            done += 1
            left = trials - proposal.number - 1
            if self.where.first and left > 0:
                minutes = (time.monotonic() - began) / done * left / 60
                self.say(f"  {self._so_far()}; {left} to go, about {minutes:.1f} min")
        if proposal is not None:
            self.say(proposal)

    def _said(self, path: str, value: Value) -> str:
        factor = next(p.config.times for p in self.space.parameters if p.path == path) is not None
        return f"{short(path)} {'×' if factor else ''}{shown(value)}"

    def _so_far(self) -> str:
        best = best_of(self.study.finished(), self.objective)
        return "none so far" if best is None else f"best so far {best.value:.5f} (trial {best.number})"

    def _attempt(self, proposal: Proposal, trials: int) -> None:
        """Run a trial to its end, whatever that is, and enter it."""
        number, started = proposal.number, time.monotonic()
        settings = ", ".join(self._said(path, value) for path, value in proposal.values.items())
        self.say(f"trial {number} ({number + 1} of {trials}): {settings or 'the run as it is'}")
        reached: list[float] = []
        failure = ""
        try:
            history = self._train(proposal, reached)
        except _GivenUpError:
            history = None
        except KeyboardInterrupt:
            if self.where.first:
                self.study.excuse()
            raise
        except (FloatingPointError, ConfigError, DataError) as error:
            history, failure = None, str(error).splitlines()[0]
        except (RuntimeError, MemoryError) as error:
            # Of several ranks, one alone may have met it: then all of them end, and the next call goes on.
            if self.where.world_size > 1 or not _is_of_memory(error):
                raise
            history, failure = None, f"out of memory ({str(error).splitlines()[0][:200]})"
        gc.collect()  # the model of the trial lies in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        seconds = time.monotonic() - started

        def enter() -> str:
            if failure:
                self.study.fail(failure)
                return f"failed: {failure}"
            if history is None:
                self.study.prune(seconds)
                return f"given up after epoch {len(reached)} at {reached[-1]:.5f}, {seconds:.0f} s"
            kept = history.epochs[history.best_epoch - 1]
            value = self.objective.kept(history)
            left_out = self.objective.left_out(history)
            self.study.complete(value, kept, seconds, left_out)
            best = best_of(self.study.finished(), self.objective)
            if best is not None and best.number == number:
                write_best(self.folder, self.space, self.objective, self.study.finished())
            without = f", without {said_of(left_out)}" if left_out and not number else ""
            return f"{self.objective.name} {value:.5f}, {seconds:.0f} s{without}"

        self.say(f"  {self.of_first(enter)}")
        if self.where.first:
            self._tidy(number)

    def _train(self, proposal: Proposal, reached: list[float]) -> TrainingHistory:
        """The run of a trial; what it prints goes to a log.

        Args:
            reached: takes the objective of each epoch.
        """
        run = self.space.with_values(proposal.values)
        run.calibration = None  # of the weights that are kept, after all
        name = f"{proposal.number:04d}"
        with ExitStack() as open_things:
            log, status = Console(quiet=True), None
            if self.where.first:
                path = self.folder / LOGS / f"{name}.txt"
                path.parent.mkdir(exist_ok=True)
                log = Console(file=open_things.enter_context(path.open("a", encoding="utf-8")), width=110)
                if self.console.is_terminal:
                    status = open_things.enter_context(Status("reading the data …", console=self.console))

            def after_epoch(history: TrainingHistory) -> None:
                epoch = len(history.epochs)
                reached[:] = [self.objective.of_epoch(history, e) for e in range(1, epoch + 1)]
                if status is not None:
                    status.update(f"epoch {epoch} of {run.training.epochs}: {reached[-1]:.5f}")
                behind = self.of_first(lambda: self.study.should_prune(epoch, reached[-1]))
                if behind and epoch < run.training.epochs:
                    raise _GivenUpError

            data = self._data_of(run, lambda text: log.print(text, highlight=False, markup=False))
            result = train_run(
                run, self.folder / TRIALS / name, existing="resume", device=self.device, console=log, data=data,
                after_epoch=after_epoch,
            )  # fmt: skip
        return result.history

    def _data_of(self, run: RunConfig, say: Say) -> RunData:
        """What the run is trained on and judged by, without its test split; read anew only where it must be."""
        whole = complete(run)
        key = {part: whole[part] for part in ("data", "schema", "statistics", "histories", "next_labels")}
        for part, unseen in _UNSEEN.items():
            key["schema"][part] = [{k: v for k, v in of.items() if k not in unseen} for of in key["schema"][part]]
        asked = json.dumps([key, run.training.seed, run.training.id_dropout], sort_keys=True)
        if self._data is None or self._data[0] != asked:
            self._data = None
            without_test = run.model_copy(update={"data": run.data.model_copy(update={"test": None})})
            data = load_data(without_test, self.where, say=say)
            splits = replace(
                data.splits, raw={"val": data.splits.raw["val"]}, encoded={"val": data.splits.encoded["val"]}
            )
            self._data = asked, RunData(data.preprocessor, splits)
        data = self._data[1]
        return RunData(data.preprocessor.redeclared(run.data_schema), data.splits)

    def _tidy(self, number: int) -> None:
        """Of a trial that is over, metrics and YAML stay."""
        for part in (CHECKPOINTS, PREPROCESSING, CATALOGUE, POPULARITY):
            shutil.rmtree(self.folder / TRIALS / f"{number:04d}" / part, ignore_errors=True)

    def end(self) -> TuningResult:
        """What came of it, written and told."""
        return self.of_first(lambda: outcome(self.folder, self.space, self.objective, self.study, self.say))


def _is_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _NO_MEMORY)
