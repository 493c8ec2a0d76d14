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

from .checks import StartError, bind, check_start
from .connection import connections
from .errors import ServeError
from .http import Application
from .log import StrangersLog, log_to_stderr
from .metrics import Metrics
from .models import Deployer, ModelTable, new_token
from .queues import Hub
from .settings import ModelSource, Settings

__all__ = ["StartError", "run", "serve_until"]

_BACKLOG = 2048

logger = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """Signals are ours: a drain is more than uvicorn's share of it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until(
    stop: asyncio.Event,
    settings: Settings,
    sources: Sequence[ModelSource],
    deployer: Deployer,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until ``stop`` is set, then answer what runs and remove the replicas.

    Args:
        listener: bound to the server's address; closed at the end.
        sources: models to load before the server calls itself ready.
        on_ready: called with the server's address.

    Raises:
        StartError: see there.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:  # another process was faster
        listener.close()
        raise StartError(f"{settings.host}:{settings.port}: {error.strerror}") from error
    address = _address(settings, listener)
    metrics = Metrics()
    strangers = StrangersLog(logger)
    hub = Hub(settings, new_token(), strangers)
    await hub.start(deployer.data_host)
    table = ModelTable(settings, hub, deployer, metrics)
    application = Application(settings, table, metrics, strangers)
    config = uvicorn.Config(
        application,
        http=connections(settings, strangers, application.overloaded),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
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

    What can be checked without Ray is checked before. A second signal ends the process without
    waiting.

    Raises:
        StartError: see there.
        ClusterError: Ray does not come up.
    """
    listener = bind(settings)
    try:
        check_start(settings, sources)
        log_to_stderr()
        logger.info("%s", "starting Ray" if settings.address is None else "joining Ray's cluster")
        from .deploy import RayDeployer

        deployer = RayDeployer(settings)
    except BaseException:
        listener.close()
        raise
    try:
        loop = _new_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(_main(settings, sources, deployer, listener, on_ready))
        finally:
            loop.close()
    finally:
        deployer.close()


async def _main(
    settings: Settings,
    sources: Sequence[ModelSource],
    deployer: Deployer,
    listener: socket.socket,
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
    await serve_until(stop, settings, sources, deployer, listener, on_ready=on_ready)


def _new_loop() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
