"""What a run, or a baseline, predicts for the rows of a split, with their labels and keys: whatever compares, judges or
draws reads this, and nothing else of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mtcl_torchrec.schema import DataError, Task, nearest

KEYS = ("user", "item", "request")
AMOUNT, POPULAR = "amount.", "popular."  # before a task: its column


@dataclass(frozen=True)
class PredictionsTable:
    """Predictions, labels and keys of N rows.

    Args:
        frame: a row a row of the split, in its order, with columns

            - ``user``, ``item``, ``request``: keys as in the data, missing where not known; each where there is one,
            - ``time``: likewise,
            - ``label.TASK``: float32, NaN where missing or masked out,
            - ``weight.TASK``: float32, of a task whose loss weighs its rows (`Task.sample_weight`),
            - ``p.TASK``: float32 probability or value, and ``p.buy|click`` of a chain; not of multiclass tasks,
            - ``uncalibrated.TASK``: the same before calibration, where that changes it,
            - ``part.TASK``: float32 in [0, 1], what a task that is not binary gives the fused score: the probability of
              the item's own class, or a value mapped to [0, 1],
            - ``amount.TASK``: float32, the number of the item, such as its price, that value@k multiplies the task by,
            - ``score``: float32, the fused score, or whatever else ranks,
            - ``popular.TASK``: float32, how popular the item is for the event of a binary task, or its mean label of a
              regression, see `mtcl_torchrec.data.popularity`,
            - ``popular``: float32, those fused as the run fuses its predictions,
            - ``popularity``: float32, how often the first binary task's event happened with the item in the training
              split, NaN where it is not in it,
            - ``item_seen``, ``user_seen``: bool, whether it is in the training split,
            - ``segment.COLUMN``: further columns of the data that rows can be told apart by.

            Only labels are always there.
        tasks: with labels; of a multiclass task, with `num_classes`.
        split: such as ``"test"``.
        classes: ``p.TASK`` and ``uncalibrated.TASK`` of multiclass tasks -> (N, C) float32.
        thresholds: binary task, or conditional prediction -> what its probability must reach to count as a yes,
            chosen on the validation split.
        values: task -> what its event is worth, in value@k.
        fused: the tasks that the score is made of; empty where that is not known.

    Raises:
        DataError: no labels of a task, labels or predictions that are none of its kind, or class probabilities of
            another length.

    Example:
        >>> table = PredictionsTable(
        ...     pd.DataFrame({"user": ["a", "a", "b"], "label.click": [1.0, 0.0, np.nan], "p.click": [0.7, 0.2, 0.1]}),
        ...     (Task.binary("click"),),
        ... )
        >>> table.labels("click"), table.users, table.score is None
        (array([ 1.,  0., nan]), array([0., 0., 1.]), True)
    """

    frame: pd.DataFrame
    tasks: tuple[Task, ...]
    split: str = "test"
    classes: Mapping[str, np.ndarray] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    fused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for task in self.tasks:
            if f"label.{task.name}" not in self.frame:
                raise DataError(f"predictions: no column label.{task.name}")
        for name, values in self.classes.items():
            if len(values) != len(self.frame) or values.ndim != 2:
                raise DataError(f"predictions: {name} has the shape {values.shape}, and there are {len(self):,} rows")
        for task in self.tasks:
            self._check_labels(task)
        for name in self.predicted_names:
            self._check_predicted(name)
        for column in ("score", "popular", *(POPULAR + task.name for task in self.tasks)):
            if (ranks := self._numbers(column)) is not None:
                _refuse(column, np.isnan(ranks), "NaN ranks nowhere")

    def _check_labels(self, task: Task) -> None:
        labels = self.frame[f"label.{task.name}"].to_numpy(np.float64)
        known = ~np.isnan(labels)
        classes = 2 if task.kind == "binary" else max((p.shape[1] for p in self._class_columns(task)), default=np.inf)
        wrong, rule = known & ~np.isfinite(labels), "a regression label is finite"
        if task.kind != "regression":
            wrong = known & ((labels != np.floor(labels)) | (labels < 0) | (labels >= classes))
            rule = f"a label of {task.kind} task {task.name!r} is a whole number from 0 to {classes - 1}"
        _refuse(f"label.{task.name}", wrong, rule)

    def _class_columns(self, task: Task) -> list[np.ndarray]:
        return [self.classes[f"p.{task.name}"]] if f"p.{task.name}" in self.classes else []

    def _check_predicted(self, name: str) -> None:
        predicted, kind = self.predicted(name), self.task(name).kind
        if (predicted.ndim == 2) != (kind == "multiclass"):
            raise DataError(f"predictions: {name!r} is {kind}, and its predictions have the shape {predicted.shape}")
        wrong, rule = ~np.isfinite(predicted), "a prediction is finite"
        if kind != "regression" and not wrong.any():
            wrong, rule = (predicted < 0) | (predicted > 1 + 1e-6), "a probability is from 0 to 1"
        if kind == "multiclass" and not wrong.any():
            wrong, rule = predicted.sum(1) <= 0, "the probabilities of the classes add up to 1"
        _refuse(f"p.{name}", wrong if wrong.ndim == 1 else wrong.any(1), rule)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """The tasks, and conditional predictions of chains, that there are predictions of."""
        names = [name for task in self.tasks for name in (task.name, task.conditional_name) if name is not None]
        return tuple(name for name in names if f"p.{name}" in self.frame or f"p.{name}" in self.classes)

    def task(self, name: str) -> Task:
        """The task of a name; of ``"buy|click"``, that of ``buy``.

        Raises:
            DataError: there is none.
        """
        names = {n: task for task in self.tasks for n in (task.conditional_name, task.name) if n is not None}
        if name not in names:
            raise DataError(f"predictions: no task {name!r}{nearest(name, names)}")
        return names[name]

    def labels(self, name: str) -> np.ndarray:
        """(N,) float64, NaN where missing; of ``"buy|click"``, the labels of ``buy`` where ``click`` happened."""
        task = self.task(name)
        labels = self.frame[f"label.{task.name}"].to_numpy(np.float64)
        if name == task.conditional_name:
            labels = np.where(self.labels(str(task.after)) == 1, labels, np.nan)
        return labels

    def weights(self, name: str) -> np.ndarray | None:
        """(N,) float64 sample weights of a task's rows; None where all count alike."""
        return self._numbers(f"weight.{self.task(name).name}")

    def predicted(self, name: str, *, calibrated: bool = True) -> np.ndarray:
        """(N,) float64, or (N, C) float32 class probabilities.

        Args:
            calibrated: False: as it was before calibration, where that changed it.

        Raises:
            DataError: there is no such prediction.
        """
        columns = [] if calibrated else [f"uncalibrated.{name}"]
        for column in (*columns, f"p.{name}"):
            if column in self.classes:
                return self.classes[column]
            if column in self.frame:
                return self.frame[column].to_numpy(np.float64)
        raise DataError(f"predictions: none of {name!r}{nearest(name, self.predicted_names)}")

    def part(self, name: str) -> np.ndarray | None:
        """(N,) float64: what ranks like the part of the fused score that a task is; None where it is not known."""
        if f"part.{name}" in self.frame:
            return self._numbers(f"part.{name}")
        there = name in self.predicted_names and self.task(name).kind != "multiclass"
        return self.predicted(name) if there else None

    def amounts(self, name: str) -> np.ndarray | float:
        """(N,) float64: what a task's value is multiplied by in value@k; 1 where that is nothing of the item."""
        found = self._numbers(AMOUNT + name)
        return 1.0 if found is None else found

    @property
    def score(self) -> np.ndarray | None:
        """(N,) float64: what the rows are ranked by."""
        return self._numbers("score")

    @property
    def popularity(self) -> np.ndarray | None:
        """(N,) float64: how often the first event happened with each row's item in the training split, NaN where it was
        not in it: what novelty is reckoned of, and no ranking."""
        return self._numbers("popularity")

    @property
    def popular(self) -> np.ndarray | None:
        """(N,) float64: the fused popularity, which the fused score is held against as a whole."""
        return self._numbers("popular")

    @property
    def popular_for(self) -> dict[str, np.ndarray]:
        """Task -> (N,) float64: the popularity that rankings are held against for its event."""
        names = [task.name for task in self.tasks if POPULAR + task.name in self.frame]
        return {name: self.frame[POPULAR + name].to_numpy(np.float64) for name in names}

    @cached_property
    def users(self) -> np.ndarray | None:
        """(N,) float64: a number from 0 on for each user, NaN where the user is not known; None where none is."""
        return self._codes("user")

    @cached_property
    def items(self) -> np.ndarray | None:
        """(N,) float64: a number for each item, as `users`."""
        return self._codes("item")

    @cached_property
    def requests(self) -> np.ndarray | None:
        """(N,) float64: a number for each request, the rows that are ranked against each other; the user's, where no
        request is named."""
        return self._codes("request") if "request" in self.frame else self.users

    @cached_property
    def fingerprint(self) -> str:
        """Names the rows: keys and labels, in their order.  Equal for two runs on the same rows."""
        columns = [c for c in KEYS if c in self.frame] + sorted(f"label.{task.name}" for task in self.tasks)
        of = hashlib.blake2b(digest_size=16)
        for column in columns:
            of.update(column.encode())
            is_label = column.startswith("label.")
            values = self.frame[column].to_numpy(np.float32) if is_label else self.key_texts(column)
            of.update(pd.util.hash_array(values).tobytes())
        return of.hexdigest()

    def key_texts(self, key: str) -> np.ndarray:
        """(N,) a column of keys as text, ``""`` where missing: the same for 5, 5.0 and "5", as files of several kinds
        hold one key."""
        codes, once = pd.factorize(self.frame[key])
        return np.array([*map(_text, once), ""], dtype=object)[codes]

    def _numbers(self, column: str) -> np.ndarray | None:
        return self.frame[column].to_numpy(np.float64) if column in self.frame else None

    def _codes(self, column: str) -> np.ndarray | None:
        if column not in self.frame:
            return None
        codes = pd.factorize(self.frame[column])[0].astype(np.float64)
        codes[codes < 0] = np.nan
        return codes


def _refuse(column: str, wrong: np.ndarray, rule: str) -> None:
    if wrong.any():
        raise DataError(f"predictions: {column}, row {int(wrong.argmax()):,}: {rule}")


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def predictions_table(
    tasks: Sequence[Task],
    predictions: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    keys: Mapping[str, pd.Series | np.ndarray],
    uncalibrated: Mapping[str, np.ndarray] | None = None,
    weights: np.ndarray | None = None,
    split: str = "test",
    thresholds: Mapping[str, float] | None = None,
    values: Mapping[str, float] | None = None,
    fused: Sequence[str] = (),
) -> PredictionsTable:
    """A table of what `mtcl_torchrec.evaluation.predict.predict` returned.

    Args:
        tasks: in the order of the labels.
        predictions: by task and by conditional name, and ``"score"``.
        labels: (N, T).
        keys: further columns: ``user``, ``item``, ``request``, ``time``, ``popular``, ``popular.click``,
            ``popularity``, ``part.stars``, ``amount.buy``, ``segment.hour``, ...
        uncalibrated: as `predictions`; those that calibration did not change are left out.
        weights: (N, T) of the rows in the losses; kept of the tasks that declare one.
        split, thresholds, values, fused: see `PredictionsTable`.

    Example:
        >>> table = predictions_table(
        ...     [Task.binary("click")], {"click": np.array([0.5])}, np.array([[1.0]]), keys={"user": np.array(["a"])}
        ... )
        >>> list(table.frame)
        ['user', 'label.click', 'p.click']
    """
    columns: dict[str, Any] = {
        name: values.reset_index(drop=True) if isinstance(values, pd.Series) else values
        for name, values in keys.items()
    }
    columns |= {f"label.{task.name}": labels[:, i].astype(np.float32) for i, task in enumerate(tasks)}
    for i, task in enumerate(tasks if weights is not None else ()):
        if task.sample_weight is not None:
            columns[f"weight.{task.name}"] = weights[:, i].astype(np.float32)  # type: ignore[index]
    classes: dict[str, np.ndarray] = {}

    def add(column: str, values: np.ndarray) -> None:
        (classes if values.ndim == 2 else columns)[column] = values.astype(np.float32, copy=False)

    names = [name for task in tasks for name in (task.name, task.conditional_name) if name in predictions]
    for name in names:
        add(f"p.{name}", predictions[str(name)])
    for name in names if uncalibrated is not None else ():
        before = uncalibrated[str(name)]  # type: ignore[index]
        if not np.array_equal(before, predictions[str(name)], equal_nan=True):
            add(f"uncalibrated.{name}", before)
    if "score" in predictions:
        add("score", predictions["score"])
    sized = [
        task.model_copy(update={"num_classes": classes[f"p.{task.name}"].shape[1]})
        if f"p.{task.name}" in classes
        else task
        for task in tasks
    ]
    return PredictionsTable(
        pd.DataFrame(columns), tuple(sized), split, classes, dict(thresholds or {}), dict(values or {}), tuple(fused)
    )
