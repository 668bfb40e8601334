"""What Prometheus reads of the service."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from mtcl_torchrec.serving.http.versions import Reload, Version

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The service's counters, in a registry of their own.

    Args:
        waiting: tells how many requests wait to be scored.
    """

    def __init__(self, waiting: Callable[[], int] = lambda: 0) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("mtcl_requests", "Requests answered", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "mtcl_request_seconds", "From a request's first line to the end of its answer", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.rows = Counter("mtcl_candidates_scored", "Candidates and rows scored", registry=registry)
        self.batch_requests = Histogram(
            "mtcl_batch_requests", "Requests scored together", buckets=_REQUESTS, registry=registry
        )
        self.batch_rows = Histogram("mtcl_batch_rows", "Rows scored together", buckets=_ROWS, registry=registry)
        self.waiting = Gauge("mtcl_queue_length", "Requests that wait to be scored", registry=registry)
        self.waiting.set_function(waiting)
        self.open = Gauge("mtcl_open_requests", "Requests being read, waiting or being scored", registry=registry)
        self.model = Gauge("mtcl_model", "1 for the version that is served", ["version"], registry=registry)
        self.loaded = Gauge("mtcl_model_loaded_timestamp_seconds", "When it was loaded", registry=registry)
        self.reloads = Counter("mtcl_reloads", "Newer models found, by what became of them", ["result"],
                               registry=registry)  # fmt: skip
        for result in ("swapped", "refused"):
            self.reloads.labels(result)

    def serves(self, version: Version) -> None:
        """Note which version is served."""
        self.model.clear()
        self.model.labels(version.name).set(1)
        self.loaded.set(version.loaded_at.timestamp())

    def reloaded(self, result: Reload, version: Version) -> None:
        """Note what became of a reload."""
        self.reloads.labels(result).inc()
        self.serves(version)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Note an answer."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def scored(self, requests: int, rows: int) -> None:
        """Note a batch."""
        self.batch_requests.observe(requests)
        self.batch_rows.observe(rows)
        self.rows.inc(rows)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
