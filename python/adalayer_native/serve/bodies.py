"""Reading requests with limits on size, time and decompression."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .errors import ServeError
from .protocol import Body

__all__ = ["Deadline", "read_body"]

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

# A client that is still sending reads no answer; so much is taken and dropped before one is given.
_DISCARD = 32 << 20
_DISCARD_SECONDS = 5.0


class Deadline:
    """``asyncio.timeout`` for Python 3.10 too: TimeoutError where its block takes too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    def __enter__(self) -> Deadline:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)
        return self

    def _end(self) -> None:
        self._over = True
        self._task.cancel()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._timer.cancel()
        if self._over:
            if hasattr(self._task, "uncancel"):
                self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise TimeoutError from None


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, limit: int, seconds: float
) -> Body:
    """The whole body, decompressed where the request says so.

    Args:
        limit: bytes, before and after decompression.
        seconds: for all of it.

    Raises:
        ServeError: 413 above the limit, 408 where it takes too long, 415 for an unknown encoding,
            400 where the client went away or the compressed data are damaged.
    """
    encoding = headers.get(b"content-encoding", b"identity").lower()
    if encoding not in (b"identity", b"", b"gzip", b"deflate"):
        await _discard(headers, receive)
        raise ServeError(
            415, f"Content-Encoding: expected gzip or deflate, got {encoding!r}", close=True
        )
    declared = headers.get(b"content-length", b"")
    # The parser has checked that it is a number.
    if declared and int(declared) > limit:
        await _discard(headers, receive)
        raise ServeError(
            413, f"expected a body of at most {limit:,} bytes, got {int(declared):,}", close=True
        )
    pieces: list[bytes] = []
    size, more = 0, True
    try:
        with Deadline(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ServeError(400, "the client went away", close=True)
                piece = message.get("body", b"")
                more = message.get("more_body", False)
                size += len(piece)
                if size > limit:
                    pieces.clear()
                    await _discard(headers, receive)
                    raise ServeError(413, f"expected a body of at most {limit:,} bytes", close=True)
                if piece:
                    pieces.append(piece)
    except TimeoutError:
        raise ServeError(
            408, f"the body was not complete after {seconds:g} s ({size:,} bytes came)", close=True
        ) from None
    if encoding in (b"gzip", b"deflate"):
        return Body([_decompressed(b"".join(pieces), limit)])
    return Body(pieces)


def _decompressed(data: bytes, limit: int) -> bytes:
    decoder = zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
    try:
        found = decoder.decompress(data, limit + 1)
    except zlib.error as error:
        raise ServeError(400, f"the compressed body is damaged: {error}") from None
    if len(found) > limit:
        raise ServeError(413, f"expected a body of at most {limit:,} bytes when decompressed")
    if not decoder.eof or decoder.unused_data:
        raise ServeError(400, "the compressed body is damaged: it does not end where it should")
    return found


async def _discard(headers: Mapping[bytes, bytes], receive: Receive) -> None:
    """Take what the client is sending already, within limits."""
    if headers.get(b"expect", b"").lower() == b"100-continue":
        return
    size, more = 0, True
    try:
        with Deadline(_DISCARD_SECONDS):
            while more and size < _DISCARD:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        return
