"""Rows of a file that a run was not trained on, as far as it can be judged by them: what they lack, and what of them
the run knows nothing of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mtcl_torchrec.data.batch import EncodedRows
from mtcl_torchrec.data.preprocessing import Preprocessor
from mtcl_torchrec.data.source import Rows, read_rows
from mtcl_torchrec.evaluation.predictions_table import PredictionsTable
from mtcl_torchrec.schema import DataError, Feature, Task

_LOOKED_AT = 2000  # rows, spread over all


@dataclass(frozen=True)
class OtherRows:
    """Rows to be judged by.

    Args:
        rows: as they conform to the training split; a label that the file lacks is missing in every row.
        lacking: tasks without labels.
        lines: what there is to say of them, a line each.
    """

    rows: Rows
    lacking: tuple[Task, ...]
    lines: tuple[str, ...]

    def judged(self, table: PredictionsTable) -> PredictionsTable:
        """A table of predictions for these rows, without the tasks that cannot be judged."""
        names = {task.name for task in self.lacking}
        tasks = tuple(task for task in table.tasks if task.name not in names and task.after not in names)
        kept = {task.name for task in tasks}
        return replace(
            table, tasks=tasks, values={n: v for n, v in table.values.items() if n in kept},
            fused=tuple(n for n in table.fused if n in kept),
        )  # fmt: skip


def other_rows(
    preprocessor: Preprocessor, paths: Sequence[str], there: Collection[str], more: Sequence[str] = ()
) -> OtherRows:
    """Read rows, and find what they lack.

    Args:
        preprocessor: of the run.
        there: the columns that all files have.
        more: further columns to be read, which are there.

    Raises:
        DataError: an input is missing, or the labels of every task.
    """
    schema = preprocessor.declared
    made = {block.column for block in preprocessor.next_labels}
    of_task = {task: [c for c in (task.label_column, task.mask) if c and c not in made] for task in schema.tasks}
    lacking = tuple(task for task, columns in of_task.items() if not set(columns) <= set(there))
    missing = list(dict.fromkeys(c for task in lacking for c in of_task[task] if c not in there))
    if len(lacking) == len(schema.tasks):
        raise DataError(f"{', '.join(paths)}: no column {', '.join(map(repr, missing))}: there is nothing to judge by")
    columns = [c for c in preprocessor.columns(statistics=False) if c not in missing]
    rows = read_rows(paths, list(dict.fromkeys([*columns, *more])))
    rows = preprocessor.conform(rows.with_frame(rows.frame.assign(**dict.fromkeys(missing, np.nan))))
    lines = []
    if lacking:
        names = ", ".join(task.name for task in lacking)
        lines.append(f"no column {', '.join(missing)}: {names} cannot be judged, and value@k counts without")
    if schema.time is not None and schema.time not in there:
        lines.append(f"no column {schema.time} (schema.time): what depends on when a row was is not known")
    lines += [
        f"no value of {feature.rows_from} is one that the run knows: is it written as in the training split?  "
        "Every row counts as one without it"
        for feature in unknown_features(preprocessor, rows)
    ]
    return OtherRows(rows, lacking, tuple(lines))


def unknown_features(preprocessor: Preprocessor, rows: Rows) -> list[Feature]:
    """The features of which no row has a value that the run knows, such as lists that were written as text: every row
    is taken for one without it, and nothing fails.

    Histories are left out: of new users, they are rightly empty.
    """
    at = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _LOOKED_AT)).astype(np.int64))
    looked_at = np.zeros(len(rows), bool)
    looked_at[at] = True
    sample = rows.take(looked_at)
    encoded = preprocessor.encode(sample, with_labels=False)
    found = []
    for feature in preprocessor.declared.features:
        if feature.kind == "dense":
            known = feature.rows_from not in sample.frame or _any_number(sample.frame[feature.rows_from])
        elif feature.kind == "history" or feature.rows_from not in sample.frame:
            continue
        else:
            known = _any_known(encoded, feature)
        if not known:
            found.append(feature)
    return found


def _any_number(column: pd.Series) -> bool:
    return bool(pd.to_numeric(column, errors="coerce").notna().any())


def _any_known(rows: EncodedRows, feature: Feature) -> bool:
    if feature.name in rows.bags:
        values, _ = rows.bags[feature.name].all()
        return bool((values > 0).any()) if not feature.has_content else len(values) > 0
    single = [key for key in rows.keys if key not in rows.bags]
    return feature.name not in single or bool((rows.ids[:, single.index(feature.name)] > 0).any())
