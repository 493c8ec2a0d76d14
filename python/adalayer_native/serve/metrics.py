"""Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .statistics import Statistics

__all__ = ["Metrics", "ModelMetrics"]

_LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ModelMetrics:
    """Those of one model version."""

    def __init__(self, all_: Metrics, name: str, version: str) -> None:
        self.labels = (name, version)
        self._all = all_
        self.latency = all_.latency.labels(*self.labels)
        self.batch = all_.batch.labels(*self.labels)
        self.queue = all_.queue.labels(*self.labels)
        self.replicas = all_.replicas.labels(*self.labels)
        self.resent = all_.resent.labels(*self.labels)
        self.rejected = all_.rejected.labels(*self.labels)
        self.degraded = all_.degraded.labels(*self.labels)
        self.level = all_.level.labels(*self.labels)
        self.statistics = all_.statistics.setdefault(self.labels, Statistics())

    def error(self, status: int) -> None:
        """Count an answer that is an error."""
        self._all.errors.labels(*self.labels, str(status)).inc()

    def gone(self) -> None:
        """The version is not served any more: its gauges show nothing."""
        self.queue.set(0)
        self.level.set(0)
        self.replicas.set(0)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.statistics: dict[tuple[str, str], Statistics] = {}  # by name and version
        model = ("model", "version")
        self.latency = Histogram(
            "adalayer_request_seconds",
            "Time from a complete inference request to its answer.",
            model,
            buckets=_LATENCY,
            registry=self.registry,
        )
        self.batch = Histogram(
            "adalayer_batch_size",
            "Samples per engine call.",
            model,
            buckets=_BATCH,
            registry=self.registry,
        )
        self.queue = Gauge(
            "adalayer_queue_requests", "Requests waiting.", model, registry=self.registry
        )
        self.replicas = Gauge(
            "adalayer_replicas", "Replicas connected.", model, registry=self.registry
        )
        self.resent = Counter(
            "adalayer_resent_requests",
            "Requests sent again because a replica ended.",
            model,
            registry=self.registry,
        )
        self.rejected = Counter(
            "adalayer_rejected_requests",
            "Requests refused because the queue was full.",
            model,
            registry=self.registry,
        )
        self.degraded = Counter(
            "adalayer_degraded_requests",
            "Requests sent to a lower level of quality because many were waiting.",
            model,
            registry=self.registry,
        )
        self.level = Gauge(
            "adalayer_quality_level",
            "Level of quality that requests get which ask for none; 0 is the best.",
            model,
            registry=self.registry,
        )
        self.errors = Counter(
            "adalayer_request_errors",
            "Inference requests answered with an error, by HTTP status.",
            (*model, "status"),
            registry=self.registry,
        )

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
