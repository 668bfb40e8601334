"""Rankers whose answers are known, and a client that asks a service in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pandas as pd

from mtcl_torchrec.data.catalogue import Catalogue, NothingLeftError
from mtcl_torchrec.schema import DataError, Feature, Schema, Task
from mtcl_torchrec.serving.http.app import Limits, create_app
from mtcl_torchrec.serving.http.versions import Models

SCHEMA = Schema(
    features=[
        Feature(name="who", group="user"),
        Feature(name="sku", group="item"),
        Feature(name="price of it", group="item", kind="dense"),
        Feature(name="topics", group="item", kind="bag"),
        Feature(name="slot", group="context", encoding="index", vocabulary_size=4),
        Feature(name="affinity", group=["user", "item"], kind="dense"),
    ],
    tasks=[Task.binary("click"), Task.binary("buy")],
    user="who",
    item="sku",
)


def catalogue() -> Catalogue:
    """Three users and six items; user 1 has seen all of them, user 2 the first."""
    items = [f"p{i}" for i in range(6)]
    return Catalogue(
        users=pd.DataFrame({"who": [1, 2, 3]}),
        items=pd.DataFrame({"sku": items, "price of it": [1.0, None, 3, 4, 5, 6], "topics": [["a"], ["b", "c"]] * 3}),
        context={"slot": 1},
        seen=pd.DataFrame({"who": [1] * 6 + [2], "sku": [*items, "p0"]}),
        popularity=pd.Series(dtype=float),
    )


class KnownRanker:
    """Scores item p<i> as scale · i / 10, and knows how it was called.

    Args:
        scale: tells two of them apart.
        fails_for: a user for whom it raises.
        gate: scoring waits for it.
    """

    def __init__(self, scale: float = 1.0, fails_for: Any = None, gate: threading.Event | None = None) -> None:
        self.scale, self.fails_for, self.gate = scale, fails_for, gate
        self.schema, self.catalogue = SCHEMA, catalogue()
        self.rows_alone = True
        self.calls: list[tuple] = []
        self.frames: list[int] = []

    def recommend(self, users, contexts=None, *, candidates=None, k=10, seen=False):
        """See `Ranker.recommend`."""
        self.calls.append((tuple(users), k, seen))
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.fails_for in users:
            raise DataError(f"user {self.fails_for} is not to be scored")
        rows = []
        for i, user in enumerate(users):
            items = (candidates[i] if candidates else None) or self.catalogue.items["sku"].tolist()
            met = set(self.catalogue.seen.loc[self.catalogue.seen["who"] == user, "sku"])
            left = sorted((item for item in items if seen or item not in met), reverse=True)[:k]
            rows += [(user, item, self.scale * int(item[1:]) / 10) for item in left]
        if not rows:
            raise NothingLeftError("nothing is left")
        frame = pd.DataFrame(rows, columns=["who", "sku", "score"])
        return frame.assign(click=frame["score"] / 2, buy=0.25, **{"part:click": frame["score"]})

    def score(self, frame):
        """See `Ranker.score`."""
        self.frames.append(len(frame))
        if (frame["price of it"] == 666).any():
            raise DataError("price of it = 666 is not to be scored")
        score = self.scale * np.nan_to_num(frame["price of it"].to_numpy(dtype=float)) / 10
        return pd.DataFrame({"score": score, "click": 0.5, "buy": 0.25})


def asked(
    models: Models,
    conversation: Callable[[httpx.AsyncClient], Awaitable[Any]],
    limits: Limits | None = None,
    *,
    watch: float = 0,
    client: str = "127.0.0.1",
) -> Any:
    """What a conversation with the service returns."""

    async def talk() -> Any:
        app = create_app(models, limits, watch=watch)
        transport = httpx.ASGITransport(app=app, client=(client, 5000))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://service", timeout=20) as http,
        ):
            return await conversation(http)

    return asyncio.run(talk())
