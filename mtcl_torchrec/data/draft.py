"""A first YAML for a person's own file, guessed from its columns and commented, so that it can be corrected."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from mtcl_torchrec.data.column_values import SEPARATORS, is_binary, is_list
from mtcl_torchrec.data.defaults import Defaults, defaults_for
from mtcl_torchrec.data.guesses import Guess, guess_column
from mtcl_torchrec.data.leakage import ALMOST, above_median, auc_alone, codes_of_column, some_rows
from mtcl_torchrec.data.roles import Roles, guess_roles, lengths_to_judge, request_sizes
from mtcl_torchrec.data.source import Rows, column_names, find_files, read_rows
from mtcl_torchrec.schema import RESERVED, DataError, nearest

SAMPLE_ROWS = 200_000
_FEWEST = 20  # events that are not by chance all among those of another kind
_MOST_KINDS = 50  # of items, that a user has met often enough to say what they think of one
UNWANTED_WORDS = (
    "hate",
    "hide",
    "report",
    "skip",
    "dislike",
    "block",
    "unfollow",
    "unsubscribe",
    "refund",
    "return",
    "flag",
)
_ROLES = {
    "user": "who it is about: GAUC, recommend --user",
    "item": "what is ranked",
    "time": "causal statistics, split by time",
    "request": "rows that were offered together; rankings are judged within it",
}


def draft_run(
    paths: Sequence[str],
    *,
    written_as: Sequence[str] | None = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    request: str | None = None,
    labels: Sequence[str] = (),
) -> str:
    """A commented run for a log of events.

    Args:
        paths: Parquet or CSV files, or a folder of them.
        written_as: the paths as they should stand in the YAML, where they differ.
        user, item, time, request, labels: column names where the guess is not right.

    Returns:
        YAML that `load_run` reads; what is uncertain stands there as a comment.

    Raises:
        DataError: a named column is missing, or no column can be a label.
    """
    names = column_names(find_files(paths)[0])
    for column in [user, item, time, request, *labels]:
        if column is not None and column not in names:
            raise DataError(f"{paths[0]}: no column {column!r}{nearest(column, names)}")
    rows = read_rows(paths)
    frame = rows.frame.head(SAMPLE_ROWS) if len(rows) > SAMPLE_ROWS else rows.frame
    # A named label is no user or item, whatever it is called.
    roles = guess_roles(frame.drop(columns=list(labels)), user=user, item=item, time=time, request=request)
    draft = _Draft(rows, frame, roles, written_as or paths)
    guesses = {name: guess_column(frame, name, roles) for name in names if name not in (roles.time, roles.request)}
    for told in (True, False):  # labels first: what tells one of them by itself is no feature
        for name, guess in guesses.items():
            if (_is_event(name, guess, labels) or guess.kind == "outcome") == told:
                draft.take(name, guess, labels)
    if not draft.events and not draft.outcomes:
        raise DataError(f"{rows.name}: found no 0/1 column that looks like an event; name them with --label")
    for label in labels:
        if frame[label].isna().all():
            raise DataError(f"{rows.name}: --label {label}: it has no value at all, there is nothing to learn")
        if not is_binary(frame[label]):
            what = f"{label!r} cannot be the label of a binary task, it is not 0 or 1 everywhere"
            raise DataError(f"{rows.name}: {what}{_if_number(frame[label], label)}")
    if not draft.features:
        beside = f" and what tells them by itself ({', '.join(draft.telling)})" if draft.telling else ""
        raise DataError(f"{rows.name}: found no input column beside the labels{beside}")
    return draft.text()


@dataclass
class _Draft:
    """What is known of a log, and the YAML that follows."""

    rows: Rows
    frame: pd.DataFrame
    roles: Roles
    paths: Sequence[str]
    events: list[str] = field(default_factory=list)
    outcomes: list[tuple[str, str]] = field(default_factory=list)
    features: list[str] = field(default_factory=list)
    kinds_of_item: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    telling: dict[str, str] = field(default_factory=dict)
    maybe_events: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def take(self, name: str, guess: Guess, labels: Sequence[str]) -> None:
        """Put a column where it belongs."""
        column = self.frame[name]
        if _is_event(name, guess, labels):
            self.events.append(name)
        elif guess.kind == "useless":
            self.left_out.append((name, guess.why))
        elif guess.kind == "outcome":
            self.outcomes.append((name, guess.why))
        elif told := self._tells(name, guess):
            line = _feature_line(column, name, guess, self._defaults().most_dims)
            self.telling[name] = f"{line}   # {told}"
        elif guess.kind == "feature":
            line = _feature_line(column, name, guess, self._defaults().most_dims)
            self.features.append(line)
            is_item = name == self.roles.item
            if guess.group == "item" and not is_item and "kind: id" in line and 2 < column.nunique() <= _MOST_KINDS:
                self.kinds_of_item.append(name)
        elif is_binary(column):
            self.maybe_events.append(name)
        elif guess.kind == "unsure":
            self.unsure.append(_feature_line(column, name, guess, self._defaults().most_dims))

    def _tells(self, name: str, guess: Guess) -> str:
        """Which label a column tells almost by itself; empty where it tells none, or who or what it is about."""
        if name in (self.roles.user, self.roles.item) or guess.kind not in ("feature", "unsure"):
            return ""
        if is_binary(self.frame[name]) and guess.kind == "unsure":
            return ""  # an event itself, perhaps
        codes, lengths = codes_of_column(self._looked_at[name], guess.separator)
        found = {label: auc_alone(event, codes, lengths) for label, event in self._labels.items()}
        most = max(found, key=lambda label: np.nan_to_num(found[label]), default=None)
        if most is None or not found[most] >= ALMOST:
            return ""
        return f"tells {task_name(most)} almost by itself (AUC {found[most]:.2f}): known only afterwards?"

    @cached_property
    def _looked_at(self) -> pd.DataFrame:
        """Some rows, in order of time."""
        frame = self.frame.iloc[some_rows(len(self.frame))]
        return frame if self.roles.time is None else frame.sort_values(self.roles.time, kind="stable")

    @cached_property
    def _labels(self) -> Mapping[str, np.ndarray]:
        """Label -> (N,) 0 or 1, NaN where not known; of a number, whether it is above its median."""
        numbers = {
            name: self._looked_at[name].to_numpy(dtype=np.float64, na_value=np.nan)
            for name in self.events or [name for name, _ in self.outcomes]
        }
        return numbers if self.events else {name: above_median(values) for name, values in numbers.items()}

    def text(self) -> str:
        """The YAML."""
        parts = [
            self._head(),
            self._data(),
            self._schema(),
            self._statistics(),
            _model(self._defaults()),
            self._training(),
            self._evaluation(),
            self._fusion(),
        ]
        return "\n".join(line for part in parts if part for line in [*part, ""]).rstrip("\n") + "\n"

    def _defaults(self) -> Defaults:
        return defaults_for(len(self.rows))

    def _head(self) -> list[str]:
        name = re.sub(r"[^\w-]+", "_", Path(self.paths[0]).stem).strip("_") or "run"
        return [
            f"# A first guess from {len(self.rows):,} rows of {', '.join(Path(p).name for p in self.paths)}; read it "
            "first:",
            "# `mtcl train` refuses keys it does not know, and names the row of any value that does not fit.",
            f"name: {plain(name)}",
        ]

    def _data(self) -> list[str]:
        log = f"[{', '.join(map(plain, self.paths))}]" if len(self.paths) > 1 else plain(self.paths[0])
        if self.roles.time is not None:
            lines = [
                "data:",
                f"  log: {log}",
                "  # The newest rows validate and test.  Or give files of your own: train: …, val: …, test: …",
                "  val_fraction: 0.1",
                "  test_fraction: 0.1",
            ]
        else:
            lines = [
                "# No time column was found: split the file yourself, or name the column under schema.time.",
                "data:",
                f"  train: {log}",
                f"  val: {log}   # CHANGE THIS: rows that the model was trained on prove nothing",
            ]
        if self.roles.item is None:
            lines += [
                "",
                "# No item column was found; `mtcl recommend` needs one: name it below, or call init with --item.",
            ]
        return lines

    def _schema(self) -> list[str]:
        lines = ["schema:"]
        for role, why in _ROLES.items():
            column = getattr(self.roles, role)
            doubt = f"; CHECK THIS, {self.roles.doubts[role]}" if role in self.roles.doubts else ""
            lines.append(f"  {role}: {plain(column)}   # {why}{doubt}" if column else f"  # {role}: …   # {why}")
        lines += [
            "  features:",
            "    # group: whose property it is (user, item, context).  kind: id, bag (a list) or dense (a number).",
            "    # Ids are numbered from the training split and an unknown one takes row 0;",
            "    # `encoding: hash, vocabulary_size: 100000` hashes them instead.",
        ]
        lines += [f"    - {line}" for line in self.features]
        if self.unsure:
            lines += [
                "    # These differ from row to row.  Take them in only if they are known BEFORE the event (a price),",
                "    # never if they are its outcome (watch time, amount paid):",
            ]
            lines += [f"    # - {line}" for line in self.unsure]
        if self.telling:
            lines.append("    # With these the model would look perfect, and know nothing before the event:")
            lines += [f"    # - {line}" for line in self.telling.values()]
        if self.left_out:
            lines.append("    # Left out:")
            lines += [f"    #   {name}: {why}" for name, why in self.left_out]
        return [*lines, *self._tasks()]

    def _tasks(self) -> list[str]:
        lines = [
            "  tasks:",
            "    # A mask makes a label count only where another event happened: mask: click.  What never comes",
            "    # without another event may follow it in a chain, predicted for all rows: after: click, chain: esmm",
        ]
        for event in self.events:
            rate = self.frame[event].mean()
            task = f"{{name: {plain(task_name(event))}, kind: binary, label: {plain(event)}}}"
            before = self._always_with(event)
            lines.append(
                f"    - {task}   # {rate:.2%} of rows"
                + (" where known" * self.frame[event].hasnans)
                + (f", never without {before}" if before else "")
            )
        active = "" if not self.events else "# "
        if self.outcomes and self.events:
            lines.append("    # Numbers that are known afterwards; each may be a task, too:")
        for name, why in self.outcomes:
            task = f"{{name: {plain(task_name(name))}, kind: regression, label: {plain(name)}}}"
            lines.append(f"    {active}- {task}   # {why}")
        if self.maybe_events:
            lines.append(
                "    # These are 0 or 1 and differ from row to row: an event (then a task), or known before it?"
            )
        for name in self.maybe_events:
            task = f"{{name: {plain(task_name(name))}, kind: binary, label: {plain(name)}}}"
            lines.append(f"    # - {task}   # {self.frame[name].mean():.2%} of rows")
        return lines

    def _always_with(self, event: str) -> str | None:
        """The rarest event without which this one never comes, as no order is without a click."""
        came = self.frame[event] == 1
        if came.sum() < _FEWEST:
            return None
        wider = {o: (self.frame[o] == 1) for o in self.events if o != event}
        found = {o: int(other.sum()) for o, other in wider.items() if other[came].all() and other.sum() > came.sum()}
        return min(found, key=found.__getitem__, default=None)

    def _statistics(self) -> list[str]:
        keys = [plain(key) for key in (self.roles.user, self.roles.item) if key]
        if self.roles.time is None or not keys or not self.events:
            return []
        if self.roles.user is not None and self.kinds_of_item:  # what a user thinks of an item's like
            keys.append(f"[{plain(self.roles.user)}, {plain(self.kinds_of_item[0])}]")
        return [
            "# Features from the log itself: counts and rates of these events, from strictly earlier rows only.",
            "statistics:",
            f"  keys: [{', '.join(keys)}]",
            f"  outcomes: [{', '.join(map(plain, self.events))}]",
            "  smoothing: 20",
        ]

    def _training(self) -> list[str]:
        suits = self._defaults()
        return [
            "training:",
            f"  epochs: {suits.epochs}",
            f"  batch_size: {suits.batch_size}   # rows per step and rank",
            f"  patience: {suits.patience}        # stop after so many epochs without a better mean validation AUC",
        ]

    def _evaluation(self) -> list[str]:
        sizes = request_sizes(self.rows.frame, self.roles)
        k = lengths_to_judge(sizes)
        if not len(sizes) or k == [5, 10]:
            return []
        of = "requests" if self.roles.request else "users"
        several = sizes[sizes > 1]
        if len(several):
            typical = f"half of the {of} with several rows have {int(pd.Series(several).median())} or fewer"
        else:
            typical = f"all {of} have one row, so that no order is better than another"
        return [
            f"# Among the newest rows, {typical}: where there are no more than k rows,",
            "# there is nothing to choose.",
            "evaluation:",
            f"  k: [{', '.join(map(str, k))}]",
        ]

    def _fusion(self) -> list[str]:
        weights = {event: _weight(event, self.frame[event].mean()) for event in self.events}
        weights = weights or {name: 1.0 for name, _ in self.outcomes}
        return [
            "# The score that ranks.  Here a task weighs the more the rarer its event; put your own values of an event "
            "in.",
            "# A negative weight lowers the score (a report, a skip).",
            "fusion:",
            f"  weights: {{{', '.join(f'{plain(task_name(name))}: {weight:g}' for name, weight in weights.items())}}}",
        ]


def _is_event(name: str, guess: Guess, labels: Sequence[str]) -> bool:
    return name in labels or (guess.kind == "event" and not labels)


def _if_number(column: pd.Series, label: str) -> str:
    """What to do with a label that is a number."""
    if not pd.api.types.is_numeric_dtype(column):
        return ""
    task = f"{{name: {plain(task_name(label))}, kind: regression, label: {plain(label)}}}"
    return f"; a number is a regression task: leave --label {label} out, and uncomment or add - {task} under tasks"


def _model(suits: Defaults) -> list[str]:
    return [
        "model:",
        "  # or kind: shared_bottom, ple, adatt, home, stem, single_task",
        f"  trunk: {{kind: mmoe, num_experts: 4, expert_layers: {list(suits.expert_layers)}, dropout: 0.1}}",
        "  tower_layers: [32]",
        f"  embedding_dropout: {suits.embedding_dropout}",
        "",
        "optimizers:",
        "  tables: {kind: rowwise_adagrad, lr: 0.02}",
        "  dense: {kind: adamw, lr: 0.003, weight_decay: 0.01}",
    ]


def _feature_line(column: pd.Series, name: str, guess: Guess, most_dims: int) -> str:
    start = f"{{name: {plain(name)}, group: {guess.group}, "
    if is_list(column):
        return start + f"kind: bag, embedding_dim: {most_dims}, min_count: 2}}"
    if guess.separator is not None:
        assert guess.separator in SEPARATORS
        return start + f'kind: bag, separator: "{guess.separator}", embedding_dim: {most_dims}, min_count: 2}}'
    distinct = column.nunique()
    named_id = re.search(r"(id|key|uuid)$", name.lower()) is not None
    is_float = pd.api.types.is_float_dtype(column) and not named_id
    many = pd.api.types.is_numeric_dtype(column) and distinct > 1000 and not named_id
    if is_float or many:
        skewed = column.min() >= 0 and column.max() > 20 * max(float(column.median()), 1e-9)
        return start + f"kind: dense{', transform: log' if skewed else ''}}}"
    dim = 4 if distinct < 20 else min(8 if distinct < 1000 else 16, most_dims)
    return start + f"kind: id, embedding_dim: {dim}}}"


def plain(text: str) -> str:
    """A text as YAML reads it back: quoted where it must be.

    Example:
        >>> plain("runs/log.parquet"), plain("yes"), plain("a: b")
        ('runs/log.parquet', '"yes"', '"a: b"')
    """
    harmless = re.fullmatch(r"[\w./][\w./-]*", text) is not None and yaml.safe_load(text) == text
    return text if harmless else json.dumps(text, ensure_ascii=False)


def task_name(column: str) -> str:
    """What the task of a label column is called: is_click is click.

    Example:
        >>> task_name("is_click"), task_name("score")
        ('click', 'score_label')
    """
    name = column.removeprefix("is_") or column
    return f"{name}_label" if name in RESERVED else name


def _weight(event: str, rate: float) -> float:
    """The rarer, the more; below 0 for what a user would rather not have seen."""
    sign = -1 if any(word in event.lower() for word in UNWANTED_WORDS) else 1
    return sign * float(f"{min(1 / max(rate, 1e-3), 100):.2g}")
