"""A first YAML for a person's own file, guessed from its columns and commented, so that it can be corrected."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from mtcl_torchrec.data.source import Rows, column_names, find_files, read_rows
from mtcl_torchrec.schema import DataError, nearest

SAMPLE_ROWS = 200_000
USER_NAMES = (
    "user_id", "userid", "uid", "user", "customer_id", "member_id", "visitor_id", "reader_id", "viewer_id",
    "listener_id", "customer", "member", "visitor", "reader", "viewer", "listener", "session_id",
)  # fmt: skip
ITEM_NAMES = (
    "item_id", "itemid", "iid", "item", "video_id", "product_id", "movie_id", "article_id", "news_id", "ad_id",
    "song_id", "track_id", "book_id", "course_id", "post_id", "sku",
    "song", "track", "video", "product", "movie", "article", "book", "course", "post",
)  # fmt: skip
TIME_NAMES = ("time", "timestamp", "ts", "time_ms", "event_time", "datetime", "date", "created_at", "unix_time")
EVENT_WORDS = (
    "click", "like", "view", "buy", "purchase", "order", "cart", "pay", "follow", "share", "forward", "comment", "hate",
    "hide", "report", "finish", "enrol", "book", "install", "convert", "conversion", "label", "save", "favorite",
    "skip", "enter", "target", "rated", "play", "listen", "watch", "complete", "subscribe", "dislike", "block",
)  # fmt: skip


UNWANTED_WORDS = ("hate", "hide", "report", "skip", "dislike", "block", "unfollow", "unsubscribe", "refund", "return")


def draft_run(
    paths: Sequence[str],
    *,
    written_as: Sequence[str] | None = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    labels: Sequence[str] = (),
) -> str:
    """A commented run for a log of events.

    Args:
        paths: Parquet or CSV files, or a folder of them.
        written_as: the paths as they should stand in the YAML, where they differ.
        user, item, time, labels: column names where the guess is not right.

    Returns:
        YAML that `load_run` reads; what is uncertain stands there as a comment.

    Raises:
        DataError: a named column is missing, or no 0/1 column can be a label.
    """
    names = column_names(find_files(paths)[0])
    for column in [user, item, time, *labels]:
        if column is not None and column not in names:
            raise DataError(f"{paths[0]}: no column {column!r}{nearest(column, names)}")
    rows = read_rows(paths)
    frame = rows.frame.head(SAMPLE_ROWS) if len(rows) > SAMPLE_ROWS else rows.frame
    user = user or _named(names, USER_NAMES)
    item = item or _named(names, ITEM_NAMES)
    time = time or _named(names, TIME_NAMES) or _first_timestamp(frame)
    events = list(labels) or [c for c in names if c not in (user, item, time) and _is_event(frame[c], c)]
    if not events:
        raise DataError(f"{rows.name}: found no 0/1 column that looks like an event; name them with --label")
    for label in events:
        if not _is_binary(frame[label]):
            raise DataError(f"{rows.name}: {label!r} cannot be the label of a binary task, it is not 0 or 1 everywhere")
    features: list[str] = []
    doubtful: list[str] = []
    left_out: list[str] = []
    for column in names:
        if column in (time, *events):
            continue
        if _is_timestamp(frame[column]) or frame[column].isna().all():
            left_out.append(column)  # a second time, or nothing at all
            continue
        group = "user" if column == user else "item" if column == item else _group(frame, column, user, item)
        line = _feature_line(frame[column], column, group)
        # A 0/1 column that differs from row to row may be an outcome under any name, and what is known of some rows
        # only may be known because of one (stars where something was bought).
        varies = group == "context" and not column.lower().startswith("context")
        outcome = (
            group is None
            or _sounds_later(column)
            or (varies and (_is_binary(frame[column]) or _often_missing(frame[column])))
        )
        (doubtful if outcome else features).append(line)
    if not features:
        raise DataError(f"{rows.name}: found no input column beside the labels")
    return _text(written_as or paths, rows, user, item, time, events, frame, features, doubtful, left_out)


def _named(names: Sequence[str], usual: Sequence[str]) -> str | None:
    lower = {n.lower(): n for n in names}
    return next((lower[u] for u in usual if u in lower), None)


def _first_timestamp(frame: pd.DataFrame) -> str | None:
    return next((str(c) for c in frame if _is_timestamp(frame[c])), None)


def _is_timestamp(column: pd.Series) -> bool:
    """Whether it holds times, also as ISO text."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    sample = column.dropna().head(100)
    if sample.empty or not sample.map(lambda v: isinstance(v, str) and re.match(r"\d{4}-\d{2}-\d{2}", v)).all():
        return False
    return bool(pd.to_datetime(sample, errors="coerce", format="ISO8601", utc=True).notna().all())


def _is_binary(column: pd.Series) -> bool:
    if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
        return False
    return set(column.dropna().unique()) <= {0, 1}


def _sounds_later(name: str) -> bool:
    """Whether a column's name says that it tells what came afterwards."""
    return re.match(r"(next|after|later|future|outcome|label|target)(_|$)", name.lower()) is not None


def _often_missing(column: pd.Series) -> bool:
    return bool(column.isna().mean() > 0.05)


def _is_event(column: pd.Series, name: str) -> bool:
    return _is_binary(column) and column.nunique() == 2 and any(word in name.lower() for word in EVENT_WORDS)


def _group(frame: pd.DataFrame, column: str, user: str | None, item: str | None) -> str | None:
    """The group a column belongs to; None where it differs from row to row like an outcome."""
    for prefix in ("user", "item", "context"):
        if column.lower().startswith(prefix):
            return prefix
    values = frame[column].map(str) if _is_list(frame[column]) else frame[column]
    for key, group in ((item, "item"), (user, "user")):
        if key is not None and _constant_within(values, frame[key]):
            return group
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 200:
        return None
    return "context"


def _constant_within(values: pd.Series, key: pd.Series) -> bool:
    by_key = values.groupby(key)
    several = by_key.size() > 1
    return bool(several.any()) and bool((by_key.nunique()[several] <= 1).mean() > 0.98)


def _is_list(column: pd.Series) -> bool:
    first = column.dropna().head(1)
    return len(first) == 1 and not isinstance(first.iloc[0], str) and hasattr(first.iloc[0], "__len__")


def _feature_line(column: pd.Series, name: str, group: str | None) -> str:
    start = f"{{name: {_plain(name)}, group: {group or 'context'}, "
    if _is_list(column):
        return start + "kind: bag, embedding_dim: 16, min_count: 2}"
    if not pd.api.types.is_numeric_dtype(column):
        sample = column.dropna().head(1000)
        if len(sample) and sample.map(lambda v: isinstance(v, str) and "|" in v).mean() > 0.2:
            return start + 'kind: bag, separator: "|", embedding_dim: 16, min_count: 2}'
    distinct = column.nunique()
    named_id = name.lower().endswith("id")
    is_float = pd.api.types.is_float_dtype(column) and not named_id
    many = pd.api.types.is_numeric_dtype(column) and distinct > 1000 and not named_id
    if is_float or many:
        skewed = column.min() >= 0 and column.max() > 20 * max(float(column.median()), 1e-9)
        return start + f"kind: dense{', transform: log' if skewed else ''}}}"
    dim = 4 if distinct < 20 else 8 if distinct < 1000 else 16
    return start + f"kind: id, embedding_dim: {dim}}}"


def _text(
    paths: Sequence[str],
    rows: Rows,
    user: str | None,
    item: str | None,
    time: str | None,
    events: Sequence[str],
    frame: pd.DataFrame,
    features: Sequence[str],
    doubtful: Sequence[str],
    left_out: Sequence[str],
) -> str:
    name = re.sub(r"[^\w-]+", "_", Path(paths[0]).stem).strip("_") or "run"
    log = f"[{', '.join(map(_plain, paths))}]" if len(paths) > 1 else _plain(paths[0])
    lines = [
        f"# A first guess from {len(rows):,} rows of {', '.join(Path(p).name for p in paths)}; read it first:",
        "# `mtcl train` refuses keys it does not know, and names the row of any value that does not fit.",
        f"name: {_plain(name)}",
        "",
    ]
    if time is not None:
        lines += [
            "data:",
            f"  log: {log}",
            "  # The newest rows validate and test.  Or give files of your own: train: …, val: …, test: …",
            "  val_fraction: 0.1",
            "  test_fraction: 0.1",
        ]
    else:
        lines += [
            "# No time column was found: split the file yourself, or name the column under schema.time.",
            "data:",
            f"  train: {log}",
            f"  val: {log}   # CHANGE THIS: rows that the model was trained on prove nothing",
        ]
    if item is None:
        lines += [
            "",
            "# No item column was found; `mtcl recommend` needs one: name it below, or call init with --item.",
        ]
    lines += ["", "schema:"]
    for name, column, why in (
        ("user", user, "who it is about: GAUC, recommend --user"),
        ("item", item, "what is ranked"),
        ("time", time, "causal statistics, split by time"),
    ):
        lines.append(f"  {name}: {_plain(column)}   # {why}" if column else f"  # {name}: …   # {why}")
    lines += [
        "  features:",
        "    # group: whose property it is (user, item, context).  kind: id, bag (a list) or dense (a number).",
        "    # Ids are numbered from the training split and an unknown one takes row 0;",
        "    # `encoding: hash, vocabulary_size: 100000` hashes them instead.",
    ]
    lines += [f"    - {line}" for line in features]
    if doubtful:
        lines += [
            "    # These differ from row to row.  Take them in only if they are known BEFORE the event (a price),",
            "    # never if they are its outcome (watch time, amount paid):",
        ]
        lines += [f"    # - {line}" for line in doubtful]
    if left_out:
        lines.append(f"    # Left out, a second time or no value at all: {', '.join(left_out)}")
    lines += ["  tasks:", "    # A mask makes a label count only where another event happened: mask: click"]
    for event in events:
        rate = frame[event].mean()
        lines.append(
            f"    - {{name: {_plain(_task_name(event))}, kind: binary, label: {_plain(event)}}}   # {rate:.2%} of rows"
        )
    if time is not None and (user or item):
        keys = [k for k in (user, item) if k]
        lines += [
            "",
            "# Features from the log itself: counts and rates of these events, from strictly earlier rows only.",
            "statistics:",
            f"  keys: [{', '.join(map(_plain, keys))}]",
            f"  outcomes: [{', '.join(map(_plain, events))}]",
            "  smoothing: 20",
        ]
    weights = ", ".join(f"{_plain(_task_name(e))}: {_weight(e, frame[e].mean())}" for e in events)
    lines += [
        "",
        "model:",
        "  # or kind: shared_bottom, ple, adatt, home, stem, single_task",
        "  trunk: {kind: mmoe, num_experts: 4, expert_layers: [128, 64], dropout: 0.1}",
        "  tower_layers: [32]",
        "  embedding_dropout: 0.1",
        "",
        "optimizers:",
        "  tables: {kind: rowwise_adagrad, lr: 0.01}",
        "  dense: {kind: adamw, lr: 0.001, weight_decay: 0.01}",
        "",
        "training:",
        "  epochs: 10",
        "  batch_size: 1024   # rows per step and rank",
        "  patience: 2        # stop after so many epochs without a better mean validation AUC",
        "",
        "# The score that ranks.  Here a task weighs the more the rarer its event; put your own values of an event in.",
        "# A negative weight lowers the score (a report, a skip).",
        "fusion:",
        f"  weights: {{{weights}}}",
    ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A text as YAML reads it back: quoted where it must be."""
    harmless = re.fullmatch(r"[\w./][\w./-]*", text) is not None and yaml.safe_load(text) == text
    return text if harmless else json.dumps(text, ensure_ascii=False)


def _task_name(column: str) -> str:
    return column.removeprefix("is_") or column


def _weight(event: str, rate: float) -> float:
    """The rarer, the more; below 0 for what a user would rather not have seen."""
    sign = -1 if any(word in event.lower() for word in UNWANTED_WORDS) else 1
    return sign * float(f"{min(1 / max(rate, 1e-3), 100):.2g}")
