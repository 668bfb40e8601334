"""The OpenAPI description of the routes, in the words of the model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from mtcl_torchrec.serving.http.versions import Version

ABOUT = (
    "Ranks items for a user by one fused score of many predicted events. Fields, kinds and examples are those of the "
    "model that is served."
)


class ScoredRow(BaseModel):
    """What the model says of one row."""

    score: float = Field(ge=0, le=1, description="The fused score.")
    score_std: float = Field(0.0, ge=0, description="Of an ensemble: how far its members are apart; else not there.")
    predictions: dict[str, float] = Field(description="By task: a probability, or a value in the label's unit.")
    parts: dict[str, float] = Field(description="By task: what it adds to the score, where that is a sum of parts.")


class RankedItem(ScoredRow):
    """One item of a ranking."""

    item: str | int


class RecommendResponse(BaseModel):
    """A ranking, best first."""

    user: str | int
    known_user: bool = Field(description="False: the user is ranked for without history.")
    model: str = Field(description="The version that answered.")
    items: list[RankedItem] = Field(description="As many as were asked for, or as there are that the user has not met.")


class ScoreResponse(BaseModel):
    """Scores, in the order of the rows."""

    model: str = Field(description="The version that answered.")
    rows: list[ScoredRow]


def described(app: FastAPI, version: Version) -> dict[str, Any]:
    """The description of the routes, with the bodies and examples of a version."""
    api = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    told: Any = [(RecommendResponse, "serialization"), (ScoreResponse, "serialization")]
    answers = models_json_schema(told, ref_template="#/components/schemas/{model}")[1]["$defs"]
    api.setdefault("components", {}).setdefault("schemas", {}).update(version.bodies.json_schemas() | answers)
    ask = version.bodies.example_ask()
    requests = {
        "Recommend": {"user": ask.user, "context": dict(ask.context), "candidates": list(ask.candidates or ()),
                      "k": ask.k, "seen": ask.seen},
        "Score": {"rows": [version.bodies.example_row()]},
    }  # fmt: skip
    for name, request in requests.items():
        operation = api["paths"][f"/{name.lower()}"]["post"]
        answer = version.examples[name.lower()] | {"model": version.name}
        operation["requestBody"] = {"required": True} | _content(f"{name}Request", request)
        operation["responses"] = {
            "200": {"description": "Scored"} | _content(f"{name}Response", answer),
            "408": {"description": "The body did not arrive in time"},
            "413": {"description": "The body is too large"},
            "415": {"description": "The body is no JSON"},
            "422": {"description": "The body does not fit the schema; `detail` names the field"},
            "503": {"description": "Too many requests at a time; Retry-After says when to ask again"},
        }
    return api


def _content(schema: str, example: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example}}}
