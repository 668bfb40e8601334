"""The routes of the service."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from typing import Any

import pandas as pd
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from mtcl_torchrec.schema import DataError
from mtcl_torchrec.serving.http.batching import Batcher
from mtcl_torchrec.serving.http.bodies import BodyError, Rows
from mtcl_torchrec.serving.http.description import ABOUT, described
from mtcl_torchrec.serving.http.metrics import Metrics
from mtcl_torchrec.serving.http.ranking import Ask, answers, rank_together, score_together
from mtcl_torchrec.serving.http.versions import Models, Version

log = logging.getLogger("mtcl_torchrec.serving.http")
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Limits:
    """What the service takes on.

    Args:
        max_batch: rows that are scored together.
        gather_ms: how long a request waits for others to be scored with; 0: each is scored by itself.
        max_open: requests that are read, wait or are scored at the same time; a further one is answered 503.
        max_body: bytes of a body.
        body_seconds: in which a body must have arrived.
    """

    max_batch: int = 2000
    gather_ms: float = 2.0
    max_open: int = 64
    max_body: int = 4 << 20
    body_seconds: float = 10.0


class RefusedError(Exception):
    """A request that is answered without being scored."""

    def __init__(self, status: int, detail: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.detail, self.headers = status, detail, headers


@dataclass(frozen=True)
class _Job:
    version: Version
    asked: Ask | Rows


class Service:
    """Reads, gathers and answers requests.

    Args:
        models: what is served.
        limits: what is taken on.
        metrics: where it is counted.
    """

    def __init__(self, models: Models, limits: Limits, metrics: Metrics) -> None:
        self.models, self.limits, self.metrics = models, limits, metrics
        self.batcher: Batcher[_Job, pd.DataFrame] = Batcher(
            self._work, wait_s=limits.gather_ms / 1000, max_rows=limits.max_batch
        )
        self._open = 0
        metrics.waiting.set_function(lambda: len(self.batcher))
        metrics.open.set_function(lambda: self._open)
        metrics.serves(models.current)

    async def recommend(self, request: Request) -> dict[str, Any]:
        """The answer to ``/recommend``."""
        with self._admitted():
            body = await self._body(request)
            version = self.models.current
            ask = version.bodies.recommend(body)
            rows = len(version.ranker.catalogue.items) if ask.candidates is None else len(ask.candidates)
            log.debug("recommend for user %s: %d candidates, k=%d", ask.user, rows, ask.k)
            ranked = await self.batcher.submit(_Job(version, ask), rows=rows)
            items = answers(ranked, version.tasks, item=str(version.ranker.schema.item))
            known = version.bodies.knows(ask.user)
            return {"user": ask.user, "known_user": known, "model": version.name, "items": items}

    async def score(self, request: Request) -> dict[str, Any]:
        """The answer to ``/score``."""
        with self._admitted():
            body = await self._body(request)
            version = self.models.current
            rows = version.bodies.score(body)
            log.debug("score: %d rows", len(rows.frame))
            scored = await self.batcher.submit(_Job(version, rows), rows=len(rows.frame))
            return {"model": version.name, "rows": answers(scored, version.tasks)}

    @contextlib.contextmanager
    def _admitted(self) -> Any:
        if self._open >= self.limits.max_open:
            raise RefusedError(503, "too many requests at a time", {"Retry-After": str(RETRY_AFTER_S)})
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _body(self, request: Request) -> bytes:
        """The whole body, of which no more is read than is allowed, whatever its headers say."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(415, f"the body must be application/json, not {kind or 'of no content type'}")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(415, "the body must not be compressed")
        too_large = RefusedError(413, f"the body is larger than {self.limits.max_body:,} bytes")
        if int(request.headers.get("content-length", 0)) > self.limits.max_body:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.max_body:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {self.limits.body_seconds:g} seconds") from None
        return b"".join(parts)

    def _work(self, jobs: Sequence[_Job]) -> list[pd.DataFrame | Exception]:
        """Results of jobs, each by the version that read it; runs in the scoring thread."""
        results: list[pd.DataFrame | Exception | None] = [None] * len(jobs)
        for version in {id(job.version): job.version for job in jobs}.values():
            own = [i for i, job in enumerate(jobs) if job.version is version]
            asks = {i: job.asked for i in own if isinstance((job := jobs[i]).asked, Ask)}
            rows = {i: job.asked.frame for i in own if isinstance((job := jobs[i]).asked, Rows)}
            for some, found in ((asks, rank_together(version.ranker, list(asks.values()))),
                                (rows, score_together(version.ranker, list(rows.values())))):  # fmt: skip
                for i, result in zip(some, found, strict=True):
                    results[i] = result
            sizes = [len(ask.candidates or version.ranker.catalogue.items) for ask in asks.values()]
            self.metrics.scored(len(own), sum(sizes) + sum(map(len, rows.values())))
        assert all(result is not None for result in results)
        return results  # type: ignore[return-value]

    def health(self) -> dict[str, Any]:
        """What is served."""
        version = self.models.current
        schema, catalogue = version.ranker.schema, version.ranker.catalogue
        return {
            "status": "ok",
            "model": {"version": version.name, "loaded_at": version.loaded_at.isoformat(timespec="seconds"),
                      "path": ", ".join(path.name for path in self.models.paths)},
            "refused_reload": self.models.problem,
            "schema": {
                "user": schema.user, "item": schema.item, "users": len(catalogue.users),
                "items": len(catalogue.items), "context": list(catalogue.context), "features": len(schema.features),
                "tasks": [{"name": task.name, "kind": task.kind} for task in schema.tasks],
            },
        }  # fmt: skip


def create_app(
    models: Models, limits: Limits | None = None, *, watch: float = 0, metrics: Metrics | None = None
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        models: what is served.
        limits: what is taken on.
        watch: seconds between two looks at whether there is a newer model; 0: none.
        metrics: a registry of its own by default.
    """
    metrics = metrics or Metrics()
    service = Service(models, limits or Limits(), metrics)
    models.told = metrics.reloaded

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.batcher:
            watching = asyncio.create_task(models.watch(watch)) if watch > 0 else None
            yield
            if watching is not None:
                watching.cancel()

    app = FastAPIOffline(title="mtcl", version=installed("mtcl_torchrec"), description=ABOUT, lifespan=lifespan,
                         redoc_url=None, static_url="/static")  # fmt: skip

    @app.post("/recommend", summary="Rank items for a user")
    async def recommend(request: Request) -> Response:
        return await _answered(service.recommend, request)

    @app.post("/score", summary="Score rows of every input column")
    async def score(request: Request) -> Response:
        return await _answered(service.score, request)

    @app.get("/healthz", summary="Which model is served")
    async def healthz() -> dict[str, Any]:
        return service.health()

    @app.get("/metrics", summary="What Prometheus reads", response_class=Response)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/reload", summary="Load a newer model now; from this machine only")
    async def reload(request: Request) -> Response:
        if not _from_here(request):
            return JSONResponse({"detail": "/reload is for this machine only"}, 403)
        result = await models.reload()
        content = {"result": result, "model": models.current.name, "problem": models.problem}
        return JSONResponse(content, 409 if result == "refused" else 200)

    app.openapi = lambda: described(app, models.current)  # type: ignore[method-assign]
    app.add_middleware(_Observed, metrics=metrics, routes={getattr(route, "path", "") for route in app.routes})
    return app


async def _answered(answer: Callable[[Request], Awaitable[dict[str, Any]]], request: Request) -> Response:
    try:
        return JSONResponse(await answer(request))
    except RefusedError as refused:
        return JSONResponse({"detail": refused.detail}, refused.status, refused.headers)
    except BodyError as error:
        return JSONResponse({"detail": error.errors}, 422)
    except DataError as error:  # what only shows in scoring; the message names the column
        return JSONResponse({"detail": [{"type": "data_error", "loc": ["body"], "msg": str(error)}]}, 422)
    except ClientDisconnect:  # in the middle of its body; there is nobody to tell
        return JSONResponse({"detail": "the client went away"}, 400)
    except Exception:
        log.exception("a request failed")
        return JSONResponse({"detail": "internal error"}, 500)


def _from_here(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


class _Observed:
    """Counts every answer and writes one line for it, without what the request says."""

    def __init__(self, app: Any, metrics: Metrics, routes: set[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - started
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.answered(route, status, seconds)
            log.info("%s %s %d %.1f ms", scope["method"], route, status, 1000 * seconds)
