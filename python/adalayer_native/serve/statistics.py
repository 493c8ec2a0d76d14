"""Triton's statistics of a model version: how many requests, and where their time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Duration", "Statistics"]


@dataclass
class Duration:
    """How often something was done, and the nanoseconds of all times together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Once more."""
        self.count += 1
        self.ns += ns

    def as_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return {"count": self.count, "ns": self.ns}


@dataclass
class Statistics:
    """Of one model version, since the server began.

    Attributes:
        success, fail: requests that were answered, and those that were not, from their last byte.
        queue: requests, until they were sent to the replica that answered.
        compute_input, compute_output: reading tensors out of a request and writing them into an
            answer. Images are read by the replica, in ``compute_infer``.
        compute_infer: requests, from when they were sent to a replica until its answer came.
        inferences: samples.
        batches: per number of samples, the time from sending to answer.
        last: milliseconds since 1970 of the last answer; 0 without.
    """

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    inferences: int = 0
    batches: dict[int, Duration] = field(default_factory=dict)
    last: int = 0

    def batch(self, samples: int, ns: int) -> None:
        """A batch was answered."""
        self.inferences += samples
        self.batches.setdefault(samples, Duration()).add(ns)
        self.last = time.time_ns() // 1_000_000

    def as_dict(self, name: str, version: str) -> dict[str, Any]:
        """A row of the statistics extension."""
        parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        return {
            "name": name,
            "version": version,
            "last_inference": self.last,
            "inference_count": self.inferences,
            "execution_count": sum(batch.count for batch in self.batches.values()),
            "inference_stats": {part: getattr(self, part).as_dict() for part in parts},
            "batch_stats": [
                {"batch_size": size, "compute_infer": batch.as_dict()}
                for size, batch in sorted(self.batches.items())
            ],
        }
