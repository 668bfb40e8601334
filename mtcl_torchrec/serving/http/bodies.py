"""What a request may say, from a model's own schema and catalogue: the columns, their kinds, their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, NotRequired, cast

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.json_schema import models_json_schema
from typing_extensions import TypedDict

from mtcl_torchrec.data.catalogue import Catalogue
from mtcl_torchrec.data.columns import canonical
from mtcl_torchrec.schema import Feature, Schema, nearest
from mtcl_torchrec.serving.http.ranking import Ask

MAX_BAG = 1000  # values of one bag column in one row
MAX_TOLD = 20  # mistakes told of one request
MAX_FOUND = 1000  # mistakes of one request that are looked at: millions would keep everybody waiting
MAX_TEXT = 200  # characters of what a request said that are sent back
_CLOSED = ConfigDict(extra="forbid")
_TEXT = Annotated[str, Field(strict=True)]
_WHOLE = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
_NUMBER = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_FLAG = Annotated[bool, Field(strict=True)]
_ANY = _TEXT | _WHOLE | _NUMBER | _FLAG


class BodyError(ValueError):
    """A body that does not fit.

    Args:
        errors: what is wrong, each with ``type``, ``loc``, ``msg`` and where it is short ``input``, as FastAPI says it.
    """

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors))
        self.errors = errors


@dataclass(frozen=True)
class Rows:
    """The rows of a ``/score`` request."""

    frame: pd.DataFrame


class Bodies:
    """Reads the bodies of requests for one model.

    Args:
        schema: the model's features and tasks.
        catalogue: its users and items, from which the kinds of values follow.
        max_candidates: largest number of candidates, of items wanted, and of rows in one request.
    """

    def __init__(self, schema: Schema, catalogue: Catalogue, *, max_candidates: int) -> None:
        self.schema, self.catalogue = schema, catalogue
        self._users, self._items = (dict.fromkeys(f.iloc[:, 0].tolist()) for f in (catalogue.users, catalogue.items))
        self.columns = _column_types(schema, catalogue)
        # Keys are looked up, not encoded: one outside its feature's table is unknown, and said to be.
        user, item = (_scalar_type(frame.iloc[:1000, 0]) for frame in (catalogue.users, catalogue.items))
        context = _typed_dict("Context", {c: NotRequired[self.columns[c]] for c in catalogue.context})
        if catalogue.end is not None and schema.time not in {f.rows_from for f in schema.features}:
            self.columns.pop(str(schema.time), None)  # of a request, by which ages are reckoned: rows have their ages
        row = _typed_dict("Row", {c: kind | None for c, kind in self.columns.items()})
        self._recommend = create_model(
            "RecommendRequest",
            __config__=_CLOSED,
            user=(user, Field(description="The user's key, as in the log; one that is not there has no history.")),
            context=(
                context,
                Field(default_factory=dict, description="What is left out takes its usual value.",
                      examples=[catalogue.context]),
            ),
            candidates=(
                Annotated[list[item], Field(min_length=1, max_length=max_candidates, fail_fast=True)] | None,  # type: ignore[valid-type]
                Field(default=None, description="The items to rank; all items where there are none.",
                      examples=[list(islice(self._items, 2))]),
            ),
            k=(Annotated[int, Field(strict=True, ge=1, le=max_candidates)],
               Field(default=10, description="How many items.")),
            seen=(_FLAG, Field(default=False, description="Whether items that the user has met are offered, too.")),
        )  # fmt: skip
        self._score = create_model(
            "ScoreRequest",
            __config__=_CLOSED,
            rows=(
                Annotated[list[row], Field(min_length=1, max_length=max_candidates, fail_fast=True)],  # type: ignore[valid-type]
                Field(description="Rows of every input column; null where a value is missing.",
                      examples=[[self.example_row()]]),
            ),
        )  # fmt: skip

    # ------------------------------------------------------------------ reading

    def recommend(self, body: bytes) -> Ask:
        """The request in a body of ``/recommend``; a candidate that is named twice is ranked once.

        Raises:
            BodyError: no JSON, an unknown or missing field, a value of the wrong kind, an unknown candidate.
        """
        read: Any = self._read(self._recommend, body)
        candidates = None
        if read.candidates is not None:
            candidates = tuple(dict.fromkeys(read.candidates))
            self._refuse_unknown(read.candidates)
        return Ask(read.user, read.context, candidates, read.k, read.seen)

    def score(self, body: bytes) -> Rows:
        """The rows in a body of ``/score``.

        Raises:
            BodyError: as `recommend`; a row lacks a column.
        """
        rows = cast(Any, self._read(self._score, body)).rows
        # As they were sent: beside a missing value, pandas would make floats of whole numbers, which round large ids.
        return Rows(pd.DataFrame({column: [row[column] for row in rows] for column in self.columns}, dtype=object))

    def knows(self, user: str | int) -> bool:
        """Whether the catalogue has the user."""
        return user in self._users

    def _read(self, model: type[BaseModel], body: bytes) -> BaseModel:
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            if error.error_count() > MAX_FOUND:
                said = f"{error.error_count():,} mistakes: more than are told"
                raise BodyError([{"type": "too_many_mistakes", "loc": ["body"], "msg": said}]) from None
            raise BodyError([self._told(e) for e in error.errors(include_url=False)[:MAX_TOLD]]) from None

    def _told(self, error: Any) -> dict[str, Any]:
        """An error of pydantic as FastAPI says it, with the nearest right name of a column."""
        told = {"type": error["type"], "loc": ["body", *map(_short, error["loc"])], "msg": _short(error["msg"])}
        if error["type"] == "extra_forbidden" and len(error["loc"]) > 1:
            there = self.catalogue.context if error["loc"][0] == "context" else self.columns
            kind = "context column" if error["loc"][0] == "context" else "input column"
            name = str(error["loc"][-1])
            hint = nearest(name, there) if len(name) <= MAX_TEXT else ""
            told["msg"] = f"no {kind} {_short(name)!r}{hint}"
        given = error["input"]
        # What JSON has no word for (NaN), and what is long, is not sent back.
        if given is None or isinstance(given, (bool, int)) or (isinstance(given, str) and len(given) <= MAX_TEXT):
            told["input"] = given
        return told

    def _refuse_unknown(self, candidates: Sequence[Any]) -> None:
        unknown = [i for i, candidate in enumerate(candidates) if candidate not in self._items]
        if unknown:
            raise BodyError([
                {"type": "unknown_item", "loc": ["body", "candidates", i], "input": _short(candidates[i]),
                 "msg": f"no item {_short(candidates[i])!r} in the catalogue"}
                for i in unknown[:MAX_TOLD]
            ])  # fmt: skip

    # ------------------------------------------------------------------ describing

    def example_ask(self, *, user: Any = None, candidates: int = 2, k: int = 2) -> Ask:
        """A request that the model can answer, for its first user unless one is given."""
        asking = next(iter(self._users)) if user is None else user
        return Ask(asking, dict(self.catalogue.context), tuple(islice(self._items, candidates)), k, seen=True)

    def stranger(self) -> str | int:
        """A user whom the catalogue does not have."""
        if all(isinstance(user, (int, float)) for user in self._users):
            return int(max(self._users)) + 1
        name = "stranger"
        while self.knows(name):
            name += "'"
        return name

    def example_row(self) -> dict[str, Any]:
        """A row of every input column: the first user, the first item, the usual context."""
        known = {
            column: _plain(frame[column].iloc[0])
            for frame in (self.catalogue.users, self.catalogue.items)
            for column in frame.columns
        }
        known |= self.catalogue.context
        return {column: known.get(column) for column in self.columns}

    def json_schemas(self) -> dict[str, Any]:
        """Name -> JSON schema of the bodies, for OpenAPI's components."""
        wanted: Any = [(self._recommend, "validation"), (self._score, "validation")]
        return models_json_schema(wanted, ref_template="#/components/schemas/{model}")[1]["$defs"]


def _short(value: Any) -> Any:
    """Long texts cut, and all else as it is."""
    return f"{value[: MAX_TEXT - 1]}…" if isinstance(value, str) and len(value) > MAX_TEXT else value


def _typed_dict(name: str, fields: dict[str, Any]) -> Any:
    # Of a TypedDict, keys may be any text, as names of columns are.
    made = cast(Any, TypedDict)(name, fields)
    made.__pydantic_config__ = _CLOSED
    TypeAdapter(made)  # an error in a field is told here
    return made


def _column_types(schema: Schema, catalogue: Catalogue) -> dict[str, Any]:
    """Input column -> what a value of it may be in a request."""
    features: dict[str, Feature] = {
        # Of a column with an item's id, its vector and its code, the id tells what it holds.
        feature.rows_from: feature
        for feature in sorted(schema.features, key=lambda f: not f.has_content)
    }
    known = {c: frame[c] for frame in (catalogue.users, catalogue.items) for c in frame.columns}
    known |= {c: pd.Series([tuple(v) if isinstance(v, list) else v]) for c, v in catalogue.context.items()}
    return {c: _value_type(features.get(c), known.get(c)) for c in dict.fromkeys([*known, *features])}


def _value_type(feature: Feature | None, values: pd.Series | None) -> Any:
    """What a value may be: as the log has it, within the feature's bounds."""
    if feature is not None and feature.kind == "dense":
        return _NUMBER
    if feature is not None and feature.encoding == "log_bucket":
        return Annotated[list[_NUMBER | None], Field(max_length=MAX_BAG)]
    present = pd.Series([], dtype=object) if values is None else values.dropna().head(1000)
    first = present.iloc[0] if len(present) else None
    index_size = feature.vocabulary_size if feature is not None and feature.encoding == "index" else None
    if isinstance(first, (list, tuple, np.ndarray)):
        members = pd.Series([v for some in present for v in some])
        return Annotated[list[_scalar_type(members, index_size)], Field(max_length=MAX_BAG, fail_fast=True)]  # type: ignore[misc]
    if first is None and feature is not None and feature.kind in ("bag", "history"):
        return Annotated[list[_ANY], Field(max_length=MAX_BAG, fail_fast=True)] | _TEXT
    return _scalar_type(present, index_size)


def _scalar_type(values: pd.Series, index_size: int | None = None) -> Any:
    if index_size is not None:
        return Annotated[int, Field(strict=True, ge=0, lt=index_size)]
    if values.empty:
        return _ANY
    values = canonical(values)  # whole numbers again, where missing values made them floats
    if pd.api.types.is_bool_dtype(values):
        return _FLAG
    if pd.api.types.is_integer_dtype(values):
        return _WHOLE
    if pd.api.types.is_numeric_dtype(values):
        return _NUMBER
    return _TEXT if all(isinstance(v, str) for v in values) else _ANY


def _plain(value: Any) -> Any:
    """A value as JSON holds it; None where it is missing."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    if value is None or value is pd.NA or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value
