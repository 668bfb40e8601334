"""MovieLens-1M from a folder that a person gives: 1,000,209 ratings of 3,706 films by 6,040 users.

Harper and Konstan, *The MovieLens Datasets: History and Context*, ACM TiiS 5(4), 2015.  GroupLens allows research and
no redistribution, so the package ships none of it: https://grouplens.org/datasets/movielens/1m/ has the archive.

The folder holds ``movies.dat``, ``users.dat``, and either ``ratings.dat`` (``user::movie::rating::seconds``) or
``ratings_ordered.parquet`` (user_id, item_id, rating, and pos, the rating's place in the user's own order, without
times).  Where both are there, ``ratings.dat`` is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from mtcl_torchrec.config.commands import MOVIELENS as SOURCE
from mtcl_torchrec.data.cold_split import cold_split
from mtcl_torchrec.data.source import UNREADABLE
from mtcl_torchrec.schema import DataError, nearest

_YEAR = re.compile(r"\((\d{4})\)\s*$")


def load(folder: str | Path) -> pd.DataFrame:
    """All ratings, in time order.

    With times, rows are ordered by them (and by the file where they are equal); without, by `position`: everybody's
    first rating comes before anybody's second.  Either way a user's own rows are in their order.

    Args:
        folder: see the module.

    Returns:
        user_id, item_id, rating (1 … 5), position (from 0, within the user), ``timestamp`` (seconds, from
        ``ratings.dat`` alone); liked (rating ≥ 4), loved (5), disliked (≤ 2), each 0 or 1; title, genres (a list), year
        (missing where the title has none); gender, age, occupation.

    Raises:
        DataError: a file is missing, or a line is wrong, naming both.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold MovieLens-1M, see {SOURCE}")
    films, people = items(folder), users(folder)
    ratings, where = _ratings(folder)
    for column, known, file in (("item_id", films, "movies.dat"), ("user_id", people, "users.dat")):
        strange = ~ratings[column].isin(known[column])
        if strange.any():
            at = int(strange.to_numpy().argmax())
            raise DataError(f"{where(at)}: {column} {ratings[column].iloc[at]} is not in {file}")
    log = ratings.merge(films, on="item_id", how="left").merge(people, on="user_id", how="left")
    for name, label in (("liked", log.rating >= 4), ("loved", log.rating == 5), ("disliked", log.rating <= 2)):
        log[name] = label.astype("int8")
    order = ["timestamp"] if "timestamp" in log else ["position", "user_id"]
    return log.sort_values(order, kind="stable", ignore_index=True)


def items(folder: str | Path) -> pd.DataFrame:
    """The films: item_id, title (as MovieLens writes it), genres (a list), year (Int64, missing where there is none).

    Raises:
        DataError: ``movies.dat`` is missing, or a line is wrong.
    """
    path = Path(folder) / "movies.dat"
    films = pd.DataFrame(_fields(path, (_whole, str, str)), columns=["item_id", "title", "genres"])
    _once(films.item_id, path)
    films["year"] = pd.to_numeric(films.title.str.extract(_YEAR)[0]).astype("Int64")
    films["genres"] = [[genre for genre in text.split("|") if genre] for text in films.genres]
    return films


def users(folder: str | Path) -> pd.DataFrame:
    """The users: user_id, gender (``"F"`` or ``"M"``), age and occupation (MovieLens's codes).

    Raises:
        DataError: ``users.dat`` is missing, or a line is wrong.
    """
    path = Path(folder) / "users.dat"
    lines = _fields(path, (_whole, _gender, _whole, _whole, str))
    people = pd.DataFrame(lines, columns=["user_id", "gender", "age", "occupation", "zip"])
    _once(people.user_id, path)
    return people.drop(columns="zip")


def write(folder: str | Path, target: str | Path, **split: Any) -> None:
    """Write ``train.parquet``, ``val.parquet``, ``test.parquet`` and ``items.parquet`` for runs on this machine.

    All have a further column ``genre``, the first that is listed, missing where none is.  What is written is
    MovieLens's data and not to be passed on.

    Args:
        folder: see the module.
        target: is made if it is not there.
        split: options of `mtcl_torchrec.data.cold_split.cold_split`.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in (*cold_split(load(folder), **split).items(), ("items", items(folder))):
        rows.assign(genre=rows.genres.str[0]).to_parquet(target / f"{name}.parquet", index=False)


def example_run() -> str:
    """The YAML of ``mtcl demo --text``, for files that `write` and ``mtcl embed`` wrote beside it."""
    return (resources.files("mtcl_torchrec.data") / "movielens.yaml").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- ratings


def _ratings(folder: Path) -> tuple[pd.DataFrame, Callable[[int], str]]:
    """user_id, item_id, rating, position, maybe timestamp; and where a row stands, for a message."""
    lines, ordered = folder / "ratings.dat", folder / "ratings_ordered.parquet"
    if not lines.exists() and not ordered.exists():
        raise DataError(f"{folder}: neither {lines.name} nor {ordered.name} is there; see {SOURCE}")
    if not lines.exists():
        return _ordered(ordered), lambda row: f"{ordered}, row {row}"
    found = _fields(lines, (_whole, _whole, _stars, _whole))
    ratings = pd.DataFrame(found, columns=["user_id", "item_id", "rating", "timestamp"])
    in_time = ratings.sort_values("timestamp", kind="stable")
    ratings["position"] = in_time.groupby("user_id").cumcount()
    return ratings, lambda row: f"{lines}, line {row + 1}"


def _ordered(path: Path) -> pd.DataFrame:
    columns = ["user_id", "item_id", "rating", "pos"]
    try:
        there = pq.read_schema(path).names
        for column in columns:
            if column not in there:
                raise DataError(f"{path}: no column {column!r}{nearest(column, there)}")
        ratings = pq.read_table(path, columns=columns).to_pandas()
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:150]})") from None
    for column in columns:
        if not pd.api.types.is_integer_dtype(ratings[column]):
            raise DataError(f"{path}: column {column!r} holds {ratings[column].dtype}, no whole numbers")
    wrong = ~ratings.rating.between(1, 5)
    if wrong.any():
        at = int(wrong.to_numpy().argmax())
        raise DataError(f"{path}, row {at}: rating = {ratings.rating.iloc[at]}; a rating is 1, 2, 3, 4 or 5")
    twice = ratings.duplicated(["user_id", "pos"])
    if twice.any():
        at = int(twice.to_numpy().argmax())
        user, place = ratings.user_id.iloc[at], ratings.pos.iloc[at]
        raise DataError(f"{path}, row {at}: user {user} has two ratings at place {place}")
    return ratings.rename(columns={"pos": "position"})


# ---------------------------------------------------------------------- lines of fields


def _fields(path: Path, kinds: Sequence[Callable[[str], Any]]) -> list[list[Any]]:
    """The fields of each line, checked; a DataError names file and line."""
    lines = _text(path).splitlines() if path.exists() else []
    if not path.exists():
        raise DataError(f"{path}: no such file; MovieLens-1M has it, see {SOURCE}")
    if not lines:
        raise DataError(f"{path}: empty")
    found = []
    for number, line in enumerate(lines, 1):
        fields = line.split("::")
        if len(fields) != len(kinds):
            raise DataError(f"{path}, line {number}: {len(fields)} fields between '::', expected {len(kinds)}")
        try:
            found.append([kind(field) for kind, field in zip(kinds, fields, strict=True)])
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return found


def _text(path: Path) -> str:
    """What a file says: MovieLens writes Latin-1, and somebody may have made UTF-8 of it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: a zero byte; the file is neither Latin-1 nor UTF-8 text (UTF-16?)")
    try:
        return raw.decode("utf-8-sig")  # Latin-1 with an accent in it is hardly ever valid UTF-8
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _whole(field: str) -> int:
    if not (field.isascii() and field.isdigit()):
        raise ValueError(f"{field!r} is no whole number")
    return int(field)


def _stars(field: str) -> int:
    if field not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"{field!r}; a rating is 1, 2, 3, 4 or 5")
    return int(field)


def _gender(field: str) -> str:
    if field not in ("F", "M"):
        raise ValueError(f"{field!r}; MovieLens writes F or M")
    return field


def _once(ids: pd.Series, path: Path) -> None:
    twice = ids.duplicated()
    if twice.any():
        at = int(twice.to_numpy().argmax())
        raise DataError(f"{path}, line {at + 1}: {ids.name} {ids.iloc[at]} stands there twice")
