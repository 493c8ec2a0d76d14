"""What can be set, with the defaults, and what values are accepted."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RUNNER", "ModelSource", "Settings", "parse_source", "valid_name", "valid_version"]

RUNNER = "adalayer_native.serve.runner:EngineRunner"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Settings:
    """Everything about one server.

    Attributes:
        host, port: where HTTP is served; port 0 takes a free one.
        replicas: processes per model version.
        threads: of one engine call; None shares the machine's CPUs among the replicas.
        max_batch: images that are put into one engine call at most. A request that holds more by
            itself runs alone, up to ``max_request_batch``.
        batch_wait_ms: how long a request waits for company while a replica is free; 0 batches only
            what came in while all were busy.
        timeout: seconds from a complete request to its answer.
        replica_timeout: seconds after which a silent replica is given up and its batch resent.
        max_body, max_upload: bytes of an inference request and of a model upload.
        max_queue: requests waiting per model version; above it the answer is 503.
        degrade: whether requests that ask for no level of quality get lower ones while many wait.
        max_connections: open connections; above it the answer is 503.
        header_timeout, body_timeout: seconds that a client may take to send each.
        keep_alive: seconds that an idle connection stays open.
        drain: seconds that running requests are given after SIGTERM.
        max_pixels: of an image sent to ``/classify``, before resizing.
        address: Ray cluster to join ("auto" or host:port); None starts a local one.
        data_host: address on which replicas reach this process; None: loopback without
            ``address``, else this machine's address in the cluster.
        repository: folder from which models are loaded by name, ``NAME/VERSION/model.ada``.
        control: whether clients may load and unload models.
        runner: ``module:callable`` that opens a model file in a replica.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    threads: int | None = None
    max_batch: int = 16
    batch_wait_ms: float = 0.0
    timeout: float = 30.0
    replica_timeout: float = 20.0
    start_timeout: float = 300.0
    max_body: int = 64 << 20
    max_upload: int = 1 << 30
    max_queue: int = 256
    degrade: bool = True
    max_connections: int = 4096
    max_request_batch: int = 256
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    keep_alive: float = 30.0
    drain: float = 30.0
    max_pixels: int = 50_000_000
    address: str | None = None
    data_host: str | None = None
    repository: Path | None = None
    control: bool = True
    runner: str = RUNNER

    def __post_init__(self) -> None:
        least = {
            "port": 0,
            "replicas": 1,
            "threads": 1,
            "max_batch": 1,
            "max_body": 1,
            "max_upload": 1,
            "max_queue": 1,
            "max_connections": 1,
            "max_request_batch": 1,
            "max_pixels": 1,
            "batch_wait_ms": 0,
            "drain": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        for name in ("timeout", "replica_timeout", "start_timeout", "header_timeout"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected seconds above 0, got {value}")
        for name in ("body_timeout", "keep_alive"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected seconds above 0, got {value}")

    @property
    def largest_request(self) -> int:
        """Samples of one request at most."""
        return max(self.max_request_batch, self.max_batch)

    @property
    def engine_threads(self) -> int:
        """Threads of one engine call on this machine."""
        if self.threads is not None:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // self.replicas)


@dataclass(frozen=True)
class ModelSource:
    """A model file with the name and version under which it is served."""

    name: str
    version: str
    path: Path


def valid_name(name: str) -> bool:
    """Letters, digits, ``_.-``, at most 128, the first a letter or digit."""
    return _NAME.fullmatch(name) is not None


def valid_version(version: str) -> bool:
    """A whole number from 1 on, in decimal."""
    return _VERSION.fullmatch(version) is not None


def parse_source(text: str, name: str | None = None) -> ModelSource:
    """``PATH``, ``NAME=PATH`` or ``NAME:VERSION=PATH``; the name is the file's by default.

    Raises:
        ValueError: a name or version that cannot be part of an address.
    """
    label, separator, path = text.rpartition("=")
    version = "1"
    if separator:
        if name is not None:
            raise ValueError(f"two names for one model: {name!r} and {label!r}")
        name, separator, given = label.partition(":")
        version = given if separator else version
    found = Path(path)
    name = found.stem if name is None else name
    if not valid_name(name):
        raise ValueError(
            f"model name {name!r}: expected letters, digits, '_', '.' and '-', at most 128, the "
            "first a letter or digit; give one with --name or NAME=PATH"
        )
    if not valid_version(version):
        raise ValueError(f"version {version!r} of model {name!r}: expected a whole number from 1")
    return ModelSource(name, version, found)
