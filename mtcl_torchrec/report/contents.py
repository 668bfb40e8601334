"""What a run directory holds for a report; what is missing is a sentence, never an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from mtcl_torchrec.baselines.keys import of_other_runs
from mtcl_torchrec.config import parse_run
from mtcl_torchrec.evaluation.estimates import clusters_of
from mtcl_torchrec.evaluation.naming import parts_of
from mtcl_torchrec.evaluation.predictions_file import read_predictions
from mtcl_torchrec.evaluation.predictions_table import KEYS, PredictionsTable
from mtcl_torchrec.evaluation.report import same_events
from mtcl_torchrec.schema import ConfigError, DataError
from mtcl_torchrec.training.checkpoint.store import best_checkpoint, newest_checkpoint, read_about
from mtcl_torchrec.training.directory import CHECKPOINTS, FUSION, METRICS, PREDICTIONS, readable_folder
from mtcl_torchrec.training.fitted import REPORT
from mtcl_torchrec.training.fitted_fusion import DECLARED, fusion_fingerprint
from mtcl_torchrec.training.rejudging import JUDGED_BY
from mtcl_torchrec.training.unfinished import is_begun, lacking

BASELINES = "baselines"
_Read = TypeVar("_Read")


@dataclass
class RunContents:
    """What was found.

    Args:
        folder: the run directory.
        run_yaml: its text.
        metrics: metrics.json; empty where training did not finish.
        about: what stands beside the best checkpoint; empty where there is none.
        history: of training, from either.
        predictions: split -> its rows.
        fusion: fusion/fusion.yaml, or else the ``fusion`` of run.yaml; empty without a fused score.
        fitted: fusion/report.json; empty where nothing was fitted.
        fused_anew: whether the fused score was fitted, set or reset after metrics.json was written.
        baselines: name -> what baselines.json says.
        of_baselines: name -> split -> its predictions.
        missing: sentences about what was not found.
    """

    folder: Path
    run_yaml: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, PredictionsTable] = field(default_factory=dict)
    fusion: dict[str, Any] = field(default_factory=dict)
    fitted: dict[str, Any] = field(default_factory=dict)
    fused_anew: bool = False
    baselines: dict[str, Any] = field(default_factory=dict)
    of_baselines: dict[str, dict[str, PredictionsTable]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As run.yaml says it, or the folder's."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """run.yaml as it is read."""
        try:
            found = yaml.safe_load(self.run_yaml)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def tasks(self) -> list[str]:
        """Names, in the order of the schema."""
        declared = (self.config.get("schema") or {}).get("tasks") or []
        return [str(task["name"]) for task in declared if isinstance(task, dict) and "name" in task]

    @property
    def doubts(self) -> list[str]:
        """What training found that puts its figures in doubt, as sentences."""
        return [f"{line}." if line[-1:] not in (".", "?") else line for line in self.metrics.get("doubts") or []]

    @property
    def split(self) -> str:
        """The split that the report judges by: test, or else validation; empty where none was evaluated."""
        return next((s for s in ("test", "val") if s in self.metrics.get("evaluations", {})), "")

    @property
    def lengths(self) -> list[int]:
        """Of what is shown, that the run was judged by."""
        found = [parts_of(key) for of in (self.evaluation.get("ranking") or {}).values() for key in of or {}]
        return sorted({int(parts.k) for parts in found if parts.measure == "choice"})

    @property
    def evaluation(self) -> dict[str, Any]:
        """Of that split."""
        return self.metrics.get("evaluations", {}).get(self.split, {})

    @property
    def intervals(self) -> dict[str, dict[str, Any]]:
        """Task or ``"ranking"`` -> metric -> its interval by bootstrap on that split, as metrics.json has it."""
        return self.evaluation.get("intervals") or {}

    @property
    def kinds(self) -> dict[str, str]:
        """Task, or ``"buy|click"``, -> binary, multiclass or regression."""
        declared = {
            str(t["name"]): str(t.get("kind", "binary")) for t in (self.config.get("schema") or {}).get("tasks") or []
        }
        return self.evaluation.get("kinds") or declared

    @property
    def of_tasks(self) -> dict[str, dict[str, Any]]:
        """Task, or ``"buy|click"``, -> its metrics on that split; where training did not finish, of the best epoch's
        validation."""
        if self.evaluation:
            return self.evaluation.get("tasks", {})
        epochs, best = self.history.get("epochs") or [], self.history.get("best_epoch") or 0
        return epochs[best - 1] if 0 < best <= len(epochs) else {}

    @property
    def table(self) -> PredictionsTable | None:
        """The predictions of that split."""
        return self.predictions.get(self.split)

    @cached_property
    def same_event(self) -> dict[str, str]:
        """Task -> the task before it that has the same labels: as events to rank by, the two are one."""
        return self.evaluation.get("same_event") or ({} if self.table is None else same_events(self.table.tasks))

    @property
    def fused_tasks(self) -> list[str]:
        """Tasks that enter the fused score, as far as its declaration names them."""
        found: dict[str, Any] = {}
        for key in ("weights", "signs", "bases", "exponents", "thresholds"):
            found |= self.fusion.get(key) or {}
        return [task for task in self.tasks if task in found] or list(found)

    @property
    def numbers(self) -> dict[str, str]:
        """Task -> the feature of the item that its value is multiplied by, as
        `mtcl_torchrec.training.fused.item_numbers` has it."""
        for declared in (self.config.get("fusion") or {}, self.fusion):
            if declared.get("kind") == "expected_value":
                return dict(declared.get("numbers") or {})
        return {}

    @cached_property
    def clusters(self) -> tuple[np.ndarray, int]:
        """(N,) which user each row of `table` is of, for standard errors; and how many there are."""
        assert self.table is not None
        clusters = clusters_of(self.table.users, len(self.table.frame))
        return clusters, int(clusters.max(initial=-1)) + 1


def read_contents(folder: str | Path, *, baselines: Path | None = None) -> RunContents:
    """Read what a run directory holds.

    Args:
        folder: the run directory.
        baselines: where baselines.json is, if it is not there.

    Raises:
        DataError: the folder holds no run, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "run.yaml").is_file():
        begun = is_begun(folder)
        what = "a run was begun here and has written nothing yet" if begun else "no run here"
        raise DataError(f"{folder}: {what} (run.yaml is missing)")
    found = RunContents(folder, (folder / "run.yaml").read_text(encoding="utf-8"))
    _read_metrics(found)
    for split in ("val", "test"):
        path = folder / PREDICTIONS / f"{split}.parquet"
        if path.is_file():
            found.predictions[split] = _whole(path, read_predictions)
    if found.table is None:
        found.missing.append(
            f"{PREDICTIONS}/{found.split or 'test'}.parquet is not there: no ROC, precision-recall and reliability "
            "curves, no standard errors, no segments. Training writes it; of an older run, `mtcl train --resume` does."
        )
    _leave_out_former_popularity(found)
    _read_fusion(found)
    _read_baselines(found, baselines)
    return found


def _leave_out_former_popularity(found: RunContents) -> None:
    """What metrics.json of an older run calls popularity is that of the first event, whatever the event."""
    table, ranking = found.table, found.evaluation.get("ranking") or {}
    if table is None or table.popular_for or all(task.kind == "multiclass" for task in table.tasks):
        return
    if ranking.pop("popular", None):
        found.missing.append(
            "The run was judged before it knew how popular items are for each event, so it is held against no "
            "popularity: train it again for that."
        )


def _read_metrics(found: RunContents) -> None:
    folder = found.folder
    if (folder / METRICS).is_file():
        found.metrics = _whole(folder / METRICS, _json)
    checkpoint = best_checkpoint(folder / CHECKPOINTS) or newest_checkpoint(folder / CHECKPOINTS)
    if checkpoint is not None:
        found.about = read_about(checkpoint)
    else:
        found.missing.append("There is no complete checkpoint: versions, table sizes and data fingerprint are unknown.")
    found.history = found.metrics.get("history") or {}
    if not found.metrics:
        newest = newest_checkpoint(folder / CHECKPOINTS)
        found.history = read_about(newest).get("history", {}) if newest else {}
        found.metrics = {"balance": found.history.get("balance") or {}}
        found.missing.append(
            f"Training did not finish ({', '.join(lacking(folder))} missing): this is what its newest checkpoint "
            "knows. `mtcl train --resume` goes on with it."
        )


def _read_fusion(found: RunContents) -> None:
    there = readable_folder(found.folder / FUSION)
    declared = found.config.get("fusion")
    found.fusion = declared if isinstance(declared, dict) else {}
    found.fused_anew = found.metrics.get(JUDGED_BY, "") != fusion_fingerprint(found.folder)
    if (there / DECLARED).is_file():
        found.fusion = (_whole(there / DECLARED, _yaml) or {}).get("fusion") or found.fusion
        if (there / REPORT).is_file():
            found.fitted = _whole(there / REPORT, _json)


def _read_baselines(found: RunContents, elsewhere: Path | None) -> None:
    near = [elsewhere, *((elsewhere / BASELINES,) if elsewhere else ()), found.folder, found.folder / BASELINES]
    where = next((p for p in near if p is not None and (p / f"{BASELINES}.json").is_file()), None)
    if where is None:
        if elsewhere is not None:
            raise DataError(f"{elsewhere}: no {BASELINES}.json here")
        return
    found.baselines = _whole(where / f"{BASELINES}.json", _json)
    for name in found.baselines:
        for folder in (where / BASELINES / name, where / name):
            paths = {split: folder / PREDICTIONS / f"{split}.parquet" for split in ("val", "test")}
            try:
                there = {split: _whole(path, read_predictions) for split, path in paths.items() if path.is_file()}
            except DataError as error:
                found.missing.append(
                    f"Of {name}, nothing is compared: {error}. `mtcl baselines RUN_DIR` makes it anew."
                )
                break
            if there:
                found.of_baselines[name] = there
                break
    others = _of_other_runs(found)
    old = [name for name, of in found.of_baselines.items() if any(_other_rows(found.predictions, of, s) for s in of)]
    old = [name for name in old if name not in others]
    for names, why in (
        (old, "were judged by other rows than this run"),
        (others, "are not of this run's configuration and training rows, as far as known"),
    ):
        for name in names:
            found.baselines.pop(name)
            found.of_baselines.pop(name, None)
        if names:
            found.missing.append(
                f"Left out, since they {why}: {', '.join(names)}. `mtcl baselines RUN_DIR` trains them anew."
            )


def _of_other_runs(found: RunContents) -> list[str]:
    """Baselines of a run that stood here before, or of a YAML that has changed since."""
    entries = {name: entry for name, entry in found.baselines.items() if isinstance(entry, dict)}
    try:
        run = parse_run(found.run_yaml, name="run.yaml", folder=found.folder)
    except (ConfigError, DataError):
        return []  # of a YAML that this version does not read, nothing can be said
    return of_other_runs(entries, run, train_rows=str(found.about.get("rows") or ""))


def _other_rows(run: Mapping[str, PredictionsTable], baseline: Mapping[str, PredictionsTable], split: str) -> bool:
    """Whether a baseline's rows of a split are not those of the run, as where the data have changed since."""
    if split not in run:
        return False
    one, other = run[split], baseline[split]
    if len(one) != len(other):
        return True
    keys = [key for key in KEYS if key in one.frame and key in other.frame]
    if any((one.key_texts(key) != other.key_texts(key)).any() for key in keys):
        return True
    tasks = {task.name for task in one.tasks} & {task.name for task in other.tasks}
    return not all(np.array_equal(one.labels(task), other.labels(task), equal_nan=True) for task in tasks)


def _whole(path: Path, read: Callable[[Path], _Read]) -> _Read:
    try:
        return read(path)
    except DataError:
        raise  # it names the file
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:150]})") from None


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError("an object is expected")
    return found


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
