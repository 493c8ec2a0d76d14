"""Starting, running and ending a server."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..errors import AdaError
from .dispatch import Hub
from .errors import ServeError
from .http import Application
from .metrics import Metrics
from .models import Deployer, ModelTable, new_token
from .settings import ModelSource, Settings

__all__ = ["StartError", "run", "serve_until"]

_MAX_HEADER_BYTES = 64 << 10
_BACKLOG = 2048

logger = logging.getLogger(__name__)


class StartError(AdaError):
    """The server cannot start: its address is taken, or a model cannot be loaded."""


class _Uvicorn(uvicorn.Server):
    """Signals are ours: a drain is more than uvicorn's share of it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _guarded(settings: Settings) -> Any:
    """uvicorn's protocol with a limit on the time and bytes of a request's headers."""

    class Guarded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _received = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def _expect_headers(self) -> None:
            if self._timer is None:
                self._received = 0
                self._timer = self.loop.call_later(settings.header_timeout, self._too_late)

        def _too_late(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.close()

        def _have_headers(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def on_message_begin(self) -> None:
            self._expect_headers()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._have_headers()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._timer is not None:
                self._received += len(data)
                if self._received > _MAX_HEADER_BYTES and not self.transport.is_closing():
                    self.send_400_response("The headers are too long.")

        def connection_lost(self, error: Exception | None) -> None:
            self._have_headers()
            super().connection_lost(error)

    return Guarded


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise StartError(f"{settings.host}:{settings.port}: {error.strerror}") from error
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


async def serve_until(
    stop: asyncio.Event,
    settings: Settings,
    sources: Sequence[ModelSource],
    deployer: Deployer,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until ``stop`` is set, then answer what runs and remove the replicas.

    Args:
        sources: models to load before the server calls itself ready.
        on_ready: called with the server's address.

    Raises:
        StartError: see there.
    """
    listener = _listen(settings)
    address = _address(settings, listener)
    metrics = Metrics()
    hub = Hub(settings, new_token())
    await hub.start(deployer.data_host)
    table = ModelTable(settings, hub, deployer, metrics)
    application = Application(settings, table, metrics)
    config = uvicorn.Config(
        application,
        http=_guarded(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        limit_concurrency=settings.max_connections + 1,
        timeout_keep_alive=max(1, round(settings.keep_alive)),
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        backlog=_BACKLOG,
    )
    server = _Uvicorn(config)
    http = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    try:
        loads = asyncio.gather(
            *(table.load(source.name, source.version, path=source.path) for source in sources)
        )
        waiting: list[asyncio.Future[Any]] = [loads, stopping, http]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if loads.done():
            try:
                await loads
            except ServeError as error:
                raise StartError(error.message) from None
            application.started = True
            if on_ready is not None:
                on_ready(address)
            await asyncio.wait({stopping, http}, return_when=asyncio.FIRST_COMPLETED)
        else:
            loads.cancel()
            await asyncio.gather(loads, return_exceptions=True)
    finally:
        application.draining = True
        server.should_exit = True
        stopping.cancel()
        await asyncio.gather(http, return_exceptions=True)
        await table.close()
        hub.close()
        listener.close()


def _address(settings: Settings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


def run(
    settings: Settings, sources: Sequence[ModelSource], on_ready: Callable[[str], None]
) -> None:
    """Start Ray, serve until SIGTERM or SIGINT, and end what was started.

    A second signal ends the process without waiting.

    Raises:
        StartError: see there.
    """
    from .deploy import RayDeployer

    deployer = RayDeployer(settings)
    try:
        loop = _new_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(_main(settings, sources, deployer, on_ready))
        finally:
            loop.close()
    finally:
        deployer.close()


async def _main(
    settings: Settings,
    sources: Sequence[ModelSource],
    deployer: Deployer,
    on_ready: Callable[[str], None],
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def end(number: int) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        logger.warning("%s: draining", signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    await serve_until(stop, settings, sources, deployer, on_ready=on_ready)


def _new_loop() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
