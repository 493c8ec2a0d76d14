"""A replica: one process that holds one model and answers batches.

Ray Serve places it, watches it and starts it again; the data goes over connections that the
replica opens to the front (``wire.py``). Each has a thread, which receives a batch where the engine
reads it, while another thread's batch may be running.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import AdaError, InputError
from . import wire
from .images import Placing, Preprocessing
from .runner import Input, Runner, open_runner
from .wire import Header, Kind

__all__ = ["Worker", "WorkerSpec"]

LANES = 2  # one batch runs while the next one is received
ORPHANED = 60.0  # seconds without a front after which a replica gives up
_RETRY = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """What a replica is told.

    Attributes:
        host, port: of the front's data port.
        token: proves that the replica belongs to the front.
        key: which deployment of which model it serves.
        runner, threads: see :class:`~adalayer_native.serve.settings.Settings`.
        max_samples: of one batch.
        max_pixels: of an encoded image.
        stuck_after: seconds after which a running engine call is a sign of ill health.
    """

    host: str
    port: int
    token: str
    key: str
    runner: str
    threads: int
    max_samples: int
    max_pixels: int
    stuck_after: float = 60.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, which Ray carries to the replica."""
        return asdict(self)


class Worker:
    """Loads the model that the front sends, then serves batches until :meth:`stop`.

    Args:
        spec: what to serve.
        on_orphaned: called once when the front has been away for a minute.
    """

    def __init__(self, spec: WorkerSpec, on_orphaned: Callable[[], None] | None = None) -> None:
        self._spec = spec
        self._on_orphaned = on_orphaned
        self._name = uuid.uuid4().hex
        self._stopping = False
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()  # of _connections
        # One call at a time: an engine call uses all threads that the replica may use.
        self._engine_lock = threading.Lock()
        self._busy_since: float | None = None
        self._seen = time.monotonic()
        self._threads: list[threading.Thread] = []
        self._runner: Runner
        self._preprocessing: Preprocessing | None = None
        self._no_images = ""

    def start(self) -> None:
        """Load the model and begin to serve.

        Raises:
            ConnectionError: no front.
            AdaError, ValueError: the model cannot be loaded; the front has been told why.
        """
        connection = self._connect(fetch=True)
        try:
            try:
                self._load(connection)
            except ConnectionError:
                raise
            except Exception as error:
                known = isinstance(error, AdaError)
                text = str(error) if known else f"{type(error).__name__}: {error}"
                wire.send_frame(connection, Kind.FAILED, meta={"message": text})
                raise
            wire.send_frame(connection, Kind.READY, meta=self._runner.description.as_dict())
        except BaseException:
            connection.close()
            raise
        for number in range(LANES):
            first = connection if number == 0 else None
            thread = threading.Thread(
                target=self._serve, args=(first,), name=f"lane-{number}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def healthy(self) -> bool:
        """Whether all its threads are alive and no engine call hangs."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > self._spec.stuck_after:
            return False
        return all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Close all connections and wait for the threads, at most a few seconds."""
        self._stopping = True
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=5)

    # -- connections ------------------------------------------------------------------------------

    def _connect(self, *, fetch: bool = False) -> socket.socket:
        spec = self._spec
        connection = socket.create_connection((spec.host, spec.port), timeout=10)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        hello = {
            "token": spec.token,
            "key": spec.key,
            "replica": self._name,
            "pid": os.getpid(),
            "fetch": fetch,
        }
        try:
            wire.send_frame(connection, Kind.HELLO, meta=hello)
        except OSError:
            connection.close()
            raise
        return connection

    def _load(self, connection: socket.socket) -> None:
        header = wire.receive_header(connection)
        if header.kind != Kind.MODEL:
            raise wire.FrameError(f"expected a model, got {header.kind.name}")
        wire.receive_meta(connection, header)
        with tempfile.NamedTemporaryFile(suffix=".ada") as file:
            left = header.payload
            chunk = memoryview(bytearray(min(max(left, 1), 1 << 20)))
            while left:
                part = chunk[: min(left, len(chunk))]
                wire.receive_into(connection, part)
                file.write(part)
                left -= len(part)
            file.flush()
            try:
                self._runner = open_runner(self._spec.runner)(file.name, self._spec.threads)
            except AdaError as error:  # our copy's name says nothing to the caller
                text = str(error).replace(f"{file.name}: ", "").replace(f"'{file.name}': ", "")
                raise type(error)(text) from error
        description = self._runner.description
        try:
            if len(description.inputs) != 1 or description.inputs[0].is_ids:
                raise InputError("images need a model with one input, which takes floats")
            self._preprocessing = Preprocessing(
                description.preprocessing, description.inputs[0].shape
            )
        except AdaError as error:  # tensors work all the same
            self._no_images = str(error)

    def _serve(self, connection: socket.socket | None) -> None:
        """A lane's thread: one connection after the other."""
        while not self._stopping:
            try:
                if connection is None:
                    connection = self._connect()
                self._serve_connection(connection)
            except OSError as error:
                if not self._stopping:
                    logger.info("connection to the front: %s", error)
            connection = None
            if not self._stopping:
                self._check_orphaned()
                time.sleep(_RETRY)
        if connection is not None:  # stopped before it began
            connection.close()

    def _serve_connection(self, connection: socket.socket) -> None:
        buffer = _Buffer()
        with self._lock:
            self._connections.add(connection)
        try:
            while not self._stopping:
                self._answer(connection, buffer)
                self._seen = time.monotonic()
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _check_orphaned(self) -> None:
        with self._lock:
            alone = not self._connections and time.monotonic() - self._seen > ORPHANED
            callback = self._on_orphaned if alone else None
            if alone:
                self._on_orphaned = None
        if callback is not None:
            callback()

    # -- batches ----------------------------------------------------------------------------------

    def _answer(self, connection: socket.socket, buffer: _Buffer) -> None:
        """Receive one batch and send its result."""
        header = wire.receive_header(connection)
        meta = wire.receive_meta(connection, header)
        if not 0 < header.count <= self._spec.max_samples:
            raise wire.FrameError(f"a batch of {header.count} samples")
        errors: dict[str, str] = {}
        placings: list[Placing] = []
        level = int(meta.get("level", 0))
        if not 0 <= level < self._runner.description.levels:
            raise wire.FrameError(f"a batch at quality level {level}")
        try:
            if header.kind == Kind.TENSORS:
                inputs = self._tensors(connection, header, meta, buffer)
            elif header.kind == Kind.IMAGES:
                inputs, errors, placings = self._images(connection, header, meta, buffer)
            else:
                raise wire.FrameError(f"expected a batch, got {header.kind.name}")
            outputs: list[npt.NDArray[np.float32]] = []
            if len(inputs[0]):
                with self._engine_lock:
                    self._busy_since = time.monotonic()
                    try:
                        # Runners without levels need no argument for them.
                        outputs = self._runner.run(inputs, *([level] if level else ()))
                    finally:
                        self._busy_since = None
        except OSError:
            raise
        except Exception as error:
            logger.warning("a batch of %d: %s: %s", header.count, type(error).__name__, error)
            reply = {
                "message": f"{type(error).__name__}: {error}"[:1000],
                "input": isinstance(error, InputError),
            }
            wire.send_frame(connection, Kind.ERROR, meta=reply)
            return
        parts = [output.reshape(-1).view(np.uint8).data for output in outputs]
        found: dict[str, Any] = {"errors": errors} if errors else {}
        if placings and self._runner.description.detection is not None:
            found["placings"] = placings
        if "shapes" in meta:
            found["shapes"] = [output.shape[1:] for output in outputs]
        wire.send_frame(connection, Kind.RESULT, parts, count=header.count, meta=found or None)

    def _tensors(
        self,
        connection: socket.socket,
        header: Header,
        meta: Mapping[str, Any],
        buffer: _Buffer,
    ) -> list[Input]:
        infos = self._runner.description.inputs
        if "shapes" in meta:
            infos = tuple(info.at(shape) for info, shape in zip(infos, meta["shapes"], strict=True))
        expected = header.count * sum(info.bytes for info in infos)
        if header.payload != expected:
            raise wire.FrameError(f"a batch of {header.payload} bytes, expected {expected}")
        memory = buffer.take(expected)
        wire.receive_into(connection, memory.data)
        inputs, start = [], 0
        for info in infos:
            end = start + header.count * info.bytes
            inputs.append(memory[start:end].view(info.dtype).reshape(header.count, *info.shape))
            start = end
        return inputs

    def _images(
        self,
        connection: socket.socket,
        header: Header,
        meta: Mapping[str, Any],
        buffer: _Buffer,
    ) -> tuple[list[npt.NDArray[np.float32]], dict[str, str], list[Placing]]:
        sizes: Sequence[int] = meta.get("sizes", [])
        if len(sizes) != header.count or sum(sizes) != header.payload or min(sizes) < 0:
            raise wire.FrameError("sizes of images that do not add up")
        memory = buffer.take(header.payload).data
        wire.receive_into(connection, memory)
        if self._preprocessing is None:
            raise InputError(self._no_images)
        arrays, placings, errors, start = [], [], {}, 0
        for number, size in enumerate(sizes):
            try:
                array, placing = self._preprocessing.placed(
                    memory[start : start + size], self._spec.max_pixels
                )
                arrays.append(array)
                placings.append(placing)
            except InputError as error:
                errors[str(number)] = str(error)
            start += size
        shape = self._runner.description.inputs[0].shape
        batch = np.stack(arrays) if arrays else np.empty((0, *shape), np.float32)
        return [batch], errors, placings


class _Buffer:
    """Memory of one lane, kept from batch to batch."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """The first ``size`` bytes; what they held before is gone."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]
