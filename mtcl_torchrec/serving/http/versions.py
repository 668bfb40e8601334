"""The model that is served, and how a newer one takes over: loaded beside it, tried, then put in its place."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.serving.http.bodies import Bodies
from mtcl_torchrec.serving.http.ranking import Ranker, answers, rank_together, score_together
from mtcl_torchrec.training.checkpoint.store import best_checkpoint
from mtcl_torchrec.training.directory import CHECKPOINTS, METRICS

Reload = Literal["unchanged", "swapped", "refused"]
Stamp = tuple[tuple[str, int, int, int], ...]
_NOT_MODEL = {"data", "tensorboard", CHECKPOINTS}  # in a run directory: what says nothing of the model, or too much
_UNDER_WAY = (".writing", ".old")
_WHOLE = 1 << 20  # bytes of a file that are read for the version's name: all, or so many at either end

log = logging.getLogger("mtcl_torchrec.serving.http")


@dataclass(frozen=True)
class Version:
    """A model as it was loaded.

    Args:
        ranker: scores.
        bodies: reads the requests that it can answer.
        name: follows from what the files hold, so that the same model is called the same everywhere.
        stamp: names, sizes and times of the files when it was loaded.
        examples: answers to the example requests.
    """

    ranker: Ranker
    bodies: Bodies
    name: str
    stamp: Stamp
    examples: dict[str, dict]
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.ranker.schema.tasks]


class Models:
    """Holds the version that is served, and replaces it.

    Args:
        path: a run directory, or what else `load` reads; it may be a symbolic link that is set to another.  Several
            are one model: a deep ensemble.
        load: makes a ranker of the path, or of all of them.
        max_candidates: see `Bodies`.
        beside: files that `load` reads besides: another one of them is another model.
        told: is called with the result of each reload, and with the version that is served.

    Raises:
        ConfigError: the model cannot recommend.
        DataError: there is no model.
    """

    def __init__(
        self,
        path: Path | Sequence[Path],
        load: Callable[[Any], Ranker],
        *,
        max_candidates: int,
        beside: Sequence[Path] = (),
        told: Callable[[Reload, Version], None] = lambda result, version: None,
    ) -> None:
        self.paths, self.told = (path,) if isinstance(path, Path) else tuple(path), told
        self._files = (*self.paths, *beside)
        self._load, self._max_candidates = load, max_candidates
        self._lock = asyncio.Lock()
        self._refused: Stamp | None = None
        self.problem: str | None = None  # why the newest was refused
        self.current = self._loaded(self._stamp())

    @property
    def shown(self) -> str:
        """The path or paths, for a person."""
        return ", ".join(map(str, self.paths))

    def _stamp(self) -> Stamp:
        return tuple(file for path in self._files for file in stamp_of(path))

    def _changed(self) -> list[Path]:
        """The models and the files beside them that are not as they were when the current version was loaded."""
        return [path for path in self._files if not set(stamp_of(path)) <= set(self.current.stamp)]

    async def reload(self, *, only_at: Stamp | None = None) -> Reload:
        """Load what the path holds now, if that has changed, and let it take over; else everything stays.

        Requests that were read before are answered by the version that read them.

        Args:
            only_at: do nothing unless the files are as they were then.
        """
        async with self._lock:
            stamp = await asyncio.to_thread(self._stamp)
            if stamp == self.current.stamp or (only_at is not None and stamp != only_at):
                return "unchanged"
            try:
                version = await asyncio.to_thread(self._loaded, stamp)
                if await asyncio.to_thread(self._stamp) != stamp:
                    raise DataError("it was written to while it was read")
            except Exception as error:
                self._refused, self.problem = stamp, f"{type(error).__name__}: {error}"
                where = ", ".join(map(str, self._changed())) or self.shown
                log.error("refused the new model in %s, %s goes on (%s)", where, self.current.name, self.problem)
                self.told("refused", self.current)
                return "refused"
            log.info("model %s takes over from %s", version.name, self.current.name)
            self.current, self._refused, self.problem = version, None, None
            self.told("swapped", version)
            return "swapped"

    async def watch(self, seconds: float) -> None:
        """Look every so often, for ever, whether there is a newer model, and let it take over.

        It is taken when its files have stayed as they are from one look to the next, and are not those of a run that
        is being trained; one that was refused, when they have changed again.
        """
        before = self.current.stamp
        while True:
            await asyncio.sleep(seconds)
            try:
                now = await asyncio.to_thread(self._stamp)
                settled = now == before and now not in (self.current.stamp, self._refused)
                if settled and not self.in_training():
                    await self.reload(only_at=now)
                before = now
            except OSError as error:
                log.warning("%s cannot be looked at (%s)", self.shown, error)

    def in_training(self) -> bool:
        """Whether a path is a run that is being trained; its metrics are written last."""
        return any((path / CHECKPOINTS).is_dir() and not (path / METRICS).is_file() for path in self.paths)

    def _loaded(self, stamp: Stamp) -> Version:
        ranker = self._load(self.paths[0] if len(self.paths) == 1 else self.paths)
        name = name_of(*self._files)
        bodies = Bodies(ranker.schema, ranker.catalogue, max_candidates=self._max_candidates)
        return Version(ranker, bodies, name, stamp, _tried(ranker, bodies, self.shown))


def _tried(ranker: Ranker, bodies: Bodies, path: str) -> dict[str, dict]:
    """Answers of a new model to a user, to a stranger, over all items, and to a row; what is computed at first use is
    computed now.

    Raises:
        ConfigError: there is an answer missing, or one that is no score.
    """
    example = bodies.example_ask(k=1)
    asks = [
        example,
        bodies.example_ask(user=bodies.stranger(), candidates=500, k=10),
        bodies.example_ask(user=bodies.stranger(), candidates=0, k=10),
    ]
    asks[-1] = type(example)(asks[-1].user, asks[-1].context, None, 10, True)
    row = pd.DataFrame({column: [value] for column, value in bodies.example_row().items()})
    results = [*rank_together(ranker, [asks[0], asks[1]]), *rank_together(ranker, asks[2:]),
               *score_together(ranker, [row])]  # fmt: skip
    for result in results:
        if isinstance(result, Exception):
            said = f"{type(result).__name__}: {result}"
            raise ConfigError(f"{path}: this model does not recommend ({said})") from result
        if "score" not in result:
            raise ConfigError(f"{path}: this model has no fused score (run.yaml: fusion)")
        scores = result["score"].to_numpy(dtype=np.float64)
        if not len(scores) or not ((scores >= 0) & (scores <= 1)).all():
            raise ConfigError(f"{path}: this model's scores are not in [0, 1]: {scores[:5].tolist()}")
    tasks = [task.name for task in ranker.schema.tasks]
    ranked, scored = results[0], results[-1]
    assert isinstance(ranked, pd.DataFrame)
    assert isinstance(scored, pd.DataFrame)
    items = answers(ranked, tasks, item=str(ranker.schema.item))
    return {
        "recommend": {"user": example.user, "known_user": True, "items": items},
        "score": {"rows": answers(scored, tasks)},
    }


def stamp_of(path: Path) -> Stamp:
    """Name, size, time and number of every file that a model consists of; another stamp may be another model.

    Of a run's checkpoints, only the best is looked at.
    """
    found = []
    for file in _files(path):
        try:
            about = file.stat()
        except FileNotFoundError:
            continue
        found.append((str(file.relative_to(path)), about.st_size, about.st_mtime_ns, about.st_ino))
    return tuple(found)


def name_of(*paths: Path) -> str:
    """Twelve hexadecimal digits that follow from the names and contents of a model's files."""
    digest = hashlib.sha256()
    for path, file in ((of, file) for of in paths for file in _files(of)):
        if file.name == METRICS and file.parent == path:
            continue  # tells what became of the model, not what it is
        with file.open("rb") as opened:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path)} {size}\n".encode())
            digest.update(opened.read(_WHOLE))
            if size > _WHOLE:
                opened.seek(max(size - _WHOLE, _WHOLE))
                digest.update(opened.read())
    return digest.hexdigest()[:12]


def _files(path: Path) -> Iterator[Path]:
    """The files of a model, in order."""
    if not path.is_dir():
        yield path
        return
    for entry in sorted(path.iterdir()):
        if entry.name in _NOT_MODEL or entry.name.endswith(_UNDER_WAY):
            continue
        yield from sorted(f for f in entry.rglob("*") if f.is_file()) if entry.is_dir() else [entry]
    try:
        best = best_checkpoint(path / CHECKPOINTS)
    except (DataError, KeyError, OSError):
        best = None  # half written; loading tells more
    if best is not None:
        yield best / "state.json"
