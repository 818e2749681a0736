"""What an endpoint counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one endpoint."""

    def __init__(self) -> None:
        self.registry = given = CollectorRegistry()
        self.answers = Counter("s3t_answers", "Answers, by route and HTTP status", ["route", "status"], registry=given)
        self.deletions = Counter("s3t_deletions_seen", "Deletions that came since the endpoint began", registry=given)
        self.waits = Histogram(
            "s3t_queue_wait_seconds", "From a request to the beginning of its answer", buckets=SECONDS, registry=given
        )
        self.rows = Histogram("s3t_batch_rows", "Rows that were answered together", buckets=ROWS, registry=given)

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a value that is asked for when somebody looks."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def note_batch(self, waits: Sequence[float], rows: int) -> None:
        """Counts a batch that begins."""
        for seconds in waits:
            self.waits.observe(seconds)
        self.rows.observe(rows)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class Counting:
    """Counts answers by the route's own path and the status, when they begin. ASGI middleware."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.answers.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)
