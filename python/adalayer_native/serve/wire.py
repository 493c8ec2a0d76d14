"""Frames between the front process and its replicas.

A Ray call costs milliseconds of processor time and copies of an image on either side. A frame is 24
bytes and the tensors themselves, received where the engine reads them.

    offset  type  field
    0       4s    magic "ADA1"
    4       u16   kind, see Kind
    6       u16   0
    8       u32   count: samples of the batch
    12      u32   bytes of meta, JSON
    16      u64   bytes of payload
    24            meta, then payload

Replicas connect to the front, prove with a token that they belong to it, and then answer one frame
after the other on that connection. Numbers are little-endian.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = [
    "HEADER",
    "MAX_META",
    "FrameError",
    "Header",
    "Kind",
    "frame_head",
    "receive_header",
    "receive_into",
    "receive_meta",
    "send_frame",
]

HEADER = struct.Struct("<4sHHIIQ")
MAGIC = b"ADA1"
MAX_META = 16 << 20  # class names of a large model; everything else is far smaller


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1  # replica: {token, key, replica, pid, fetch}
    MODEL = 2  # front: the model file, answer to a HELLO with fetch
    READY = 3  # replica: the model is loaded; {inputs, outputs, ...}
    FAILED = 4  # replica: it cannot be loaded; {message}
    TENSORS = 5  # front: a batch; per input [count, ...] float32, or int32 token ids
    IMAGES = 6  # front: count encoded images; {sizes}
    RESULT = 7  # replica: per output [count, ...] float32; {errors: {index: message}}
    ERROR = 8  # replica: nothing of this batch could be computed; {message, input}


class FrameError(ConnectionError):
    """Bytes that are no frame, or one that may not come here."""


@dataclass(frozen=True)
class Header:
    """The fixed part of a frame."""

    kind: Kind
    count: int
    meta: int
    payload: int

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Header:
        """From 24 bytes.

        Raises:
            FrameError: another magic, an unknown kind, or meta above the limit.
        """
        magic, kind, zero, count, meta, payload = HEADER.unpack_from(data)
        if magic != MAGIC or zero != 0 or meta > MAX_META:
            raise FrameError("expected a frame, got other bytes")
        try:
            return cls(Kind(kind), count, meta, payload)
        except ValueError:
            raise FrameError(f"expected a known kind of frame, got {kind}") from None


def frame_head(kind: Kind, *, count: int = 0, meta: Any = None, payload: int = 0) -> bytes:
    """Header and meta of a frame whose payload follows."""
    text = b"" if meta is None else json.dumps(meta).encode()
    return HEADER.pack(MAGIC, kind, 0, count, len(text), payload) + text


def send_frame(
    connection: socket.socket,
    kind: Kind,
    parts: Sequence[memoryview] = (),
    *,
    count: int = 0,
    meta: Any = None,
) -> None:
    """Send a frame with one system call where the socket takes it whole; parts are byte views."""
    size = sum(len(part) for part in parts)
    rest = [memoryview(frame_head(kind, count=count, meta=meta, payload=size)), *parts]
    while rest:
        sent = connection.sendmsg(rest)
        while rest and sent >= len(rest[0]):
            sent -= len(rest[0])
            rest.pop(0)
        if rest and sent:
            rest[0] = rest[0][sent:]


def receive_into(connection: socket.socket, view: memoryview) -> None:
    """Fill a view of bytes.

    Raises:
        ConnectionError: the other side closed before it was full.
    """
    while len(view):
        got = connection.recv_into(view)
        if got == 0:
            raise ConnectionResetError("the other side closed the connection")
        view = view[got:]


def receive_header(connection: socket.socket) -> Header:
    """The next frame's header."""
    data = bytearray(HEADER.size)
    receive_into(connection, memoryview(data))
    return Header.parse(data)


def receive_meta(connection: socket.socket, header: Header) -> dict[str, Any]:
    """The meta that follows a header; {} if there is none."""
    if header.meta == 0:
        return {}
    data = bytearray(header.meta)
    receive_into(connection, memoryview(data))
    meta = json.loads(data)
    if not isinstance(meta, dict):
        raise FrameError("expected an object as meta")
    return meta
