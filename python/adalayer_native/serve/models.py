"""Which models are served: loading, replacing and removing them while requests run."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .._files import write_atomic
from .errors import ServeError
from .metrics import Metrics, ModelMetrics
from .queues import Dispatcher, Hub
from .replica import WorkerSpec
from .settings import Settings, valid_name, valid_version

__all__ = ["Deployer", "Entry", "ModelTable", "new_token"]

MAX_NAMES = 1000

logger = logging.getLogger(__name__)


class Deployer(Protocol):
    """Starts and removes the replicas of a model."""

    data_host: str

    async def deploy(self, app: str, spec: WorkerSpec) -> None:
        """Ask for the replicas; they report to the data port when they are ready."""
        ...

    async def remove(self, app: str) -> None:
        """End the replicas."""
        ...


@dataclass
class Entry:
    """A version of a model.

    Attributes:
        state: "LOADING", "READY", "UNLOADING" or "UNAVAILABLE".
        reason: why it is not available, else empty.
        dispatcher: what answers; None while nothing does.
        source: the file that it came from, for a load without a file.
    """

    name: str
    version: str
    state: str
    reason: str = ""
    dispatcher: Dispatcher | None = None
    source: Path | None = None


class ModelTable:
    """All versions of all models.

    A version that is loaded again keeps serving until its successor is ready; where that cannot be
    loaded, it goes on. Files are copied first, so that a replica that starts later reads what the
    others read.
    """

    def __init__(self, settings: Settings, hub: Hub, deployer: Deployer, metrics: Metrics) -> None:
        self._settings = settings
        self._hub = hub
        self._deployer = deployer
        self._metrics = metrics
        self._entries: dict[str, dict[str, Entry]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="adalayer-serve-")
        self._files: dict[str, Path] = {}  # copy of the model per key
        self._tasks: set[asyncio.Task[None]] = set()

    # -- looking up -------------------------------------------------------------------------------

    def find(self, name: str, version: str | None = None) -> Entry:
        """A version that can be asked; without one, the highest.

        Raises:
            ServeError: 404.
        """
        versions = self._entries.get(name, {})
        if version is None:
            found = max(
                (e for e in versions.values() if e.dispatcher is not None),
                key=lambda e: int(e.version),
                default=None,
            )
        else:
            found = versions.get(version)
        if found is None or found.dispatcher is None:
            asked = f"model {name[:80]!r}"
            asked += f", version {version[:80]!r}," if version is not None else ""
            why = f": {found.reason}" if found is not None and found.reason else ""
            raise ServeError(404, f"{asked} is not loaded{why}")
        return found

    def versions(self, name: str) -> list[str]:
        """Versions that can be asked, ascending."""
        rows = self._entries.get(name, {}).values()
        return sorted((e.version for e in rows if e.dispatcher is not None), key=int)

    def entries(self) -> list[Entry]:
        """Every version that was ever named, by name and version."""
        rows = [e for versions in self._entries.values() for e in versions.values()]
        return sorted(rows, key=lambda e: (e.name, int(e.version)))

    def ready(self) -> bool:
        """Whether every model that is loaded has a replica."""
        dispatchers = [e.dispatcher for e in self.entries() if e.dispatcher is not None]
        return bool(dispatchers) and all(d.replicas for d in dispatchers)

    # -- changing ---------------------------------------------------------------------------------

    async def load(
        self, name: str, version: str, data: bytes | None = None, path: Path | None = None
    ) -> Entry:
        """Load a version from bytes or a file, or again from where it came.

        Raises:
            ServeError: 400, the file cannot be loaded; a version that served before goes on.
        """
        if not valid_name(name) or not valid_version(version):
            raise ServeError(
                400,
                f"model {name[:80]!r}, version {version[:80]!r}: expected letters, digits, '_', "
                "'.', '-' as a name, and a whole number from 1 as a version",
            )
        if name not in self._entries and len(self._entries) >= MAX_NAMES:
            raise ServeError(400, f"this server knows {MAX_NAMES} names of models already")
        async with self._locks.setdefault(name, asyncio.Lock()):
            known = self._entries.setdefault(name, {})
            entry = known.setdefault(version, Entry(name, version, "UNAVAILABLE"))
            if data is None:
                data = await self._read(entry, path)
            try:
                await self._replace(entry, data)
            except ServeError as failure:
                error = ServeError(
                    failure.status, f"model {name!r}, version {version!r}: {failure.message}"
                )
                if entry.dispatcher is None:
                    entry.state, entry.reason = "UNAVAILABLE", error.message
                else:
                    entry.state = "READY"
                    entry.reason = f"the last load failed: {error.message}"
                raise error from failure
            if path is not None:
                entry.source = path
            return entry

    async def _read(self, entry: Entry, path: Path | None) -> bytes:
        if path is None:
            path = entry.source
        if path is None and self._settings.repository is not None:
            path = self._settings.repository / entry.name / entry.version / "model.ada"
        if path is None:
            self._forget(entry)
            raise ServeError(
                404,
                f"model {entry.name!r}, version {entry.version!r}: no file was sent, and the "
                "server has none",
            )
        try:
            return await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            self._forget(entry)
            raise ServeError(
                404, f"model {entry.name!r}, version {entry.version!r}: {error.strerror}"
            ) from error

    def _forget(self, entry: Entry) -> None:
        """A name of which there never was a model is not kept: clients could fill the memory."""
        if entry.dispatcher is None and entry.source is None and not entry.reason:
            self._entries[entry.name].pop(entry.version, None)
            if not self._entries[entry.name]:
                del self._entries[entry.name]

    async def _replace(self, entry: Entry, data: bytes) -> None:
        entry.state = "LOADING"
        key = uuid.uuid4().hex
        app = f"adalayer-{entry.name}-{entry.version}-{key[:8]}"
        copy = Path(self._folder.name) / f"{key}-{hashlib.sha256(data).hexdigest()[:16]}.ada"
        await asyncio.to_thread(write_atomic, copy, data)
        del data
        self._files[key] = copy
        metrics = ModelMetrics(self._metrics, entry.name, entry.version)
        successor = Dispatcher(key, app, self._settings, metrics, copy.read_bytes)
        self._hub.dispatchers[key] = successor
        spec = WorkerSpec(
            host=self._deployer.data_host,
            port=self._hub.port,
            token=self._hub.token,
            key=key,
            runner=self._settings.runner,
            threads=self._settings.engine_threads,
            max_samples=self._settings.largest_request,
            max_pixels=self._settings.max_pixels,
            stuck_after=3 * self._settings.replica_timeout,
        )
        try:
            try:
                await self._deploy(app, spec)
                await asyncio.wait_for(
                    asyncio.shield(successor.ready), self._settings.start_timeout
                )
            except asyncio.TimeoutError:
                seconds = self._settings.start_timeout
                raise ServeError(500, f"no replica came up within {seconds:g} s") from None
        except BaseException:
            await asyncio.shield(self._retire(successor, 0.0))
            raise
        previous, entry.dispatcher = entry.dispatcher, successor
        entry.state, entry.reason = "READY", ""
        if previous is not None:
            self._background(previous)

    async def _deploy(self, app: str, spec: WorkerSpec) -> None:
        try:
            await self._deployer.deploy(app, spec)
        except Exception as error:  # Ray's errors
            logger.warning("deploying %s", app, exc_info=error)
            raise ServeError(
                500, f"its replicas cannot be started: {type(error).__name__}: {error}"
            ) from error

    async def unload(self, name: str, version: str | None = None) -> None:
        """Remove a version, or all; what they are answering is still answered.

        Raises:
            ServeError: 404, nothing of that name is loaded.
        """
        self.find(name, version)
        async with self._locks.setdefault(name, asyncio.Lock()):
            versions = self._entries.get(name, {})
            for entry in [e for e in versions.values() if version in (None, e.version)]:
                dispatcher, entry.dispatcher = entry.dispatcher, None
                if dispatcher is None:
                    continue
                entry.state, entry.reason = "UNAVAILABLE", "unloaded"
                await self._retire(dispatcher, self._settings.drain)

    def _background(self, dispatcher: Dispatcher) -> None:
        task = asyncio.create_task(self._retire(dispatcher, self._settings.drain))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, dispatcher: Dispatcher, seconds: float) -> None:
        """Let a deployment finish what it has, then remove it."""
        await dispatcher.drain(seconds)
        self._hub.dispatchers.pop(dispatcher.key, None)
        try:
            await self._deployer.remove(dispatcher.app)
        except Exception as error:  # Ray's errors; the server goes on without this deployment
            logger.warning("removing %s: %s", dispatcher.app, error)
        copy = self._files.pop(dispatcher.key, None)
        if copy is not None:
            copy.unlink(missing_ok=True)

    async def close(self) -> None:
        """Remove everything."""
        dispatchers = [e.dispatcher for e in self.entries() if e.dispatcher is not None]
        for entry in self.entries():
            entry.dispatcher = None
        await asyncio.gather(*self._tasks, *(self._retire(d, 1.0) for d in dispatchers))
        self._folder.cleanup()


def new_token() -> str:
    """What replicas must know to be let in."""
    return secrets.token_hex(32)
