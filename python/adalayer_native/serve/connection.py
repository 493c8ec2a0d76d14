"""One HTTP connection: uvicorn's, with limits on headers and time, and with all errors in JSON."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .log import StrangersLog
from .settings import Settings

__all__ = ["BROKEN", "MAX_HEADERS", "MAX_HEADER_BYTES", "connections"]

MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 100
# In a request's scope: why its body cannot be read to the end.
BROKEN = "adalayer.broken"
_BODY = {b"content-length", b"transfer-encoding"}
# A client that is still sending when it is refused would lose the answer if the connection ended.
_LINGER_SECONDS = 2.0


class _Refused(Exception):
    """A request that is answered before the application sees it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def connections(settings: Settings, log: StrangersLog, overloaded: Any) -> type[HttpToolsProtocol]:
    """The class of connections, to which uvicorn gives arguments of its own.

    Args:
        overloaded: the application that answers where there are too many connections.
    """
    own = {"_settings": settings, "_log": log, "_overloaded": staticmethod(overloaded)}
    return type("Connection", (_Connection,), own)


_TOO_LONG = (431, f"expected headers of at most {MAX_HEADER_BYTES:,} bytes")


class _Connection(HttpToolsProtocol):
    _settings: Settings
    _log: StrangersLog
    _overloaded: Any  # the application that answers where there are too many connections
    _timer: asyncio.TimerHandle | None = None  # until the headers are complete
    _ended = False  # what comes now is dropped
    _begun = False  # some of a request's headers have come
    _steps = 0  # how often the parser got past headers
    _bytes = _count = _pending = 0  # of the headers; and of chunks that lie within them

    # -- time -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def _expect_headers(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._settings.header_timeout, self._too_late)

    def _too_late(self) -> None:
        self._timer = None
        if self._begun:
            seconds = self._settings.header_timeout
            self._refuse(408, f"the headers were not complete after {seconds:g} s")
        elif not self.transport.is_closing():
            self.transport.close()

    def _have_headers(self) -> None:
        self._begun = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, error: Exception | None) -> None:
        self._have_headers()
        self._ended = True
        super().connection_lost(error)

    # -- the parser's callbacks -------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._unset_keepalive_if_required()
        steps = self._steps
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered as if it had not asked for another protocol; what follows may be one.
            self._end()
        except httptools.HttpParserError as error:
            self._refuse(*_reason(error))
        if self._ended or self.transport.is_closing():
            return
        if self._begun:
            self._pending += len(data) if self._steps == steps else 0
            if self._pending > MAX_HEADER_BYTES:
                self._refuse(*_TOO_LONG)
        elif self.cycle is None or self.cycle.response_complete:
            # Empty lines, or the rest of a body that nobody waits for: not for ever.
            self._expect_headers()

    def on_message_begin(self) -> None:
        self._begun = True
        self._bytes = self._count = self._pending = 0
        self._expect_headers()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._add(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count += 1
        if self._count > MAX_HEADERS:
            raise _Refused(431, f"expected at most {MAX_HEADERS} headers")
        self._add(len(name) + len(value))
        super().on_header(name, value)

    def _add(self, size: int) -> None:
        self._bytes += size
        if self._bytes > MAX_HEADER_BYTES:
            raise _Refused(*_TOO_LONG)

    def on_headers_complete(self) -> None:
        self._steps += 1
        self._have_headers()
        if self.parser.should_upgrade() and _BODY & {name for name, _ in self.headers}:
            raise _Refused(
                400, "expected a request with a body to ask for no other protocol (Upgrade)"
            )
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
                raise _Refused(400, f"Transfer-Encoding: expected chunked, got {value[:40]!r}")
        many = len(self.connections) > self._settings.max_connections
        self.app = self._overloaded if many else self.config.loaded_app
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._steps += 1
        super().on_body(body)

    # -- the end ----------------------------------------------------------------------------

    def _end(self) -> None:
        """Answer what was asked, then close."""
        self._ended = True
        self._have_headers()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def _refuse(self, status: int, message: str) -> None:
        if self._ended or self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # Answers come in the order of their requests, and this one's are before.
            if cycle.more_body:
                scope: MutableMapping[str, Any] = cycle.scope
                scope[BROKEN] = message
                cycle.more_body = False
                cycle.message_event.set()
            else:
                self._log.warning(self.client, f"{status} {message}")
            self._end()
            return
        self._log.warning(self.client, f"{status} {message}")
        self._ended = True
        self._have_headers()
        text = orjson.dumps({"error": message})
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(text)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + text)
        self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)


def _reason(error: Exception) -> tuple[int, str]:
    """Status and message for what the parser raised."""
    cause = error.__context__
    if isinstance(cause, _Refused):
        return cause.status, str(cause)
    if isinstance(error, httptools.HttpParserCallbackError):  # uvicorn's reading of the address
        return 400, "expected an HTTP request: its address cannot be read"
    return 400, f"expected an HTTP request: {error}"
