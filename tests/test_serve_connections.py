"""HTTP connections: what is malformed is refused in JSON, bounded, and logged within limits."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_serve import Running, running
from helpers_serve_model import write_model

from adalayer_native.serve import log as log_module
from adalayer_native.serve import server as server_module
from adalayer_native.serve.connection import MAX_HEADERS
from adalayer_native.serve.log import StrangersLog
from adalayer_native.serve.settings import ModelSource

GET = b"GET /v2 HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "tiny.ada")


@pytest.fixture(scope="module")
def server(model: Path):
    with running([ModelSource("tiny", "1", model)], header_timeout=1.0) as found:
        yield found


def answers(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each answer."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *rows = head.decode().split("\r\n")
        headers = dict(row.split(": ", 1) for row in rows)
        size = int(headers["content-length"])
        found.append((int(first.split()[1]), headers, data[:size]))
        data = data[size:]
    return found


def exchange(server: Running, *pieces: bytes, pause: float = 0.05) -> list:
    """All answers until the server closes."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(pause)
            connection.sendall(piece)
        received = b""
        while part := connection.recv(65536):
            received += part
        return answers(received)


def refused(found: list, status: int, message: str) -> None:
    assert [row[0] for row in found] == [status]
    ((_, headers, body),) = found
    assert headers["content-type"] == "application/json" and headers["connection"] == "close"
    assert message in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x00\x01\x02\r\n\r\n", "Invalid method"),
        (b"GET / HTTP/9.9\r\n\r\n", "Invalid HTTP version"),
        (b"GET /v2 HTTP/1.1\r\nno colon\r\n\r\n", "Invalid header token"),
        (b"GET /v2 HTTP/1.1\r\nContent-Length: two\r\n\r\n", "Content-Length"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", "address cannot be read"),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", "Invalid char in url"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "an HTTP request"),
        (GET + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}", "Upgrade"),
    ],
)
def test_malformed_requests_are_answered_in_json(server: Running, data: bytes, message: str):
    refused(exchange(server, data), 400, message)


@pytest.mark.parametrize("form", [b"a: b\r\n", b"X-%d: y\r\n"])
def test_headers_are_counted(server: Running, form: bytes):
    def asked(number: int) -> bytes:
        rows = (form % k if b"%" in form else form for k in range(number - 2))
        return GET + b"Connection: close\r\n" + b"".join(rows) + b"\r\n"

    assert [row[0] for row in exchange(server, asked(MAX_HEADERS))] == [200]
    refused(exchange(server, asked(MAX_HEADERS + 1)), 431, "at most 100 headers")
    refused(exchange(server, asked(5000)), 431, "at most 100 headers")


def test_the_bytes_of_complete_headers_are_counted(server: Running):
    rows = b"".join(b"X-%d: %s\r\n" % (k, b"a" * 1500) for k in range(50))
    refused(exchange(server, GET + rows + b"\r\n"), 431, "at most 65,536 bytes")


def test_headers_of_the_next_request_behind_a_large_body(server: Running):
    # The end of a body and the beginning of headers come in one piece, which is no long header.
    body = b" " * 200_000
    head = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n"
    found = exchange(server, head + body + GET, b"Connection: close\r\n\r\n")
    assert [row[0] for row in found] == [400, 200]  # spaces are no JSON


def test_slow_headers_are_told_so(server: Running):
    refused(exchange(server, b"GET /v2 HTTP/1.1\r\nHo"), 408, "not complete after 1 s")


def test_nothing_keeps_a_connection_open_for_ever(server: Running):
    # After the answer: an empty line, or a piece of a body that nobody reads.
    begin = time.monotonic()
    assert [row[0] for row in exchange(server, GET + b"\r\n", b"\r\n")] == [200]
    head = b"POST /v2/models/none/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n"
    assert [row[0] for row in exchange(server, head, b"x")] == [404]
    assert time.monotonic() - begin < 15


def test_an_upgrade_is_not_taken(server: Running):
    data = GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
    found = exchange(server, data + b"\x81\x05hello")
    assert [row[0] for row in found] == [200] and found[0][1]["connection"] == "close"


def test_what_was_asked_before_is_answered_before(server: Running):
    found = exchange(server, GET + b"\r\n" + GET + b"\r\n" + b"\x00rubbish\r\n\r\n")
    assert [row[0] for row in found] == [200, 200]
    assert found[1][1]["connection"] == "close"


def test_a_damaged_body_is_answered(server: Running):
    head = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    refused(exchange(server, head + b"5\r\nhello\r\nzz\r\n"), 400, "chunk")
    refused(exchange(server, head, b"5\r\nhello\r\n", b"zz\r\n"), 400, "chunk")


def test_too_many_connections_are_told_so(model: Path):
    with running([ModelSource("tiny", "1", model)], max_connections=2) as server:
        held = [socket.create_connection((server.host, server.port)) for _ in range(2)]
        try:
            time.sleep(0.1)
            found = exchange(server, GET + b"\r\n")
            refused(found, 503, "more than 2 connections are open")
            assert found[0][1]["retry-after"] == "1"
        finally:
            for connection in held:
                connection.close()
        time.sleep(0.1)
        assert server.request("GET", "/v2")[0] == 200


def test_the_log_of_bad_requests(model: Path, caplog, monkeypatch):
    few = partial(StrangersLog, lines=4, seconds=2.0)
    monkeypatch.setattr(server_module, "StrangersLog", few)
    with caplog.at_level(logging.WARNING), running([ModelSource("tiny", "1", model)]) as server:
        for _ in range(5):
            exchange(server, b"rubbish\r\n\r\n")
            server.request("GET", "/nothing%0A%1B[31mhere")
        deadline = time.monotonic() + 20
        while "not listed" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    lines = [record.getMessage() for record in caplog.records if "draining" not in record.message]
    assert len(lines) == 5 and lines[-1] == "6 more bad requests in 2 s, not listed"
    assert re.fullmatch(r"127\.0\.0\.1:\d+ 400 expected an HTTP request: .*", lines[0])
    assert re.fullmatch(
        r"127\.0\.0\.1:\d+ GET /nothing\\n\\x1b\[31mhere: 404 there is nothing at .*", lines[1]
    )
    assert not any("\n" in line or "\x1b" in line for line in lines)


def test_lines_of_the_log_carry_the_time(capsys):
    names = ("adalayer_native", "uvicorn.error")
    before = [(logging.getLogger(n).handlers[:], logging.getLogger(n).level) for n in names]
    try:
        log_module.log_to_stderr()

        async def warn() -> None:
            logger = logging.getLogger("adalayer_native.serve.server")
            StrangersLog(logger).warning(("::1", 7, 0, 0), "x" * 1000)

        asyncio.run(warn())
    finally:
        for name, (handlers, level) in zip(names, before, strict=True):
            logger = logging.getLogger(name)
            logger.handlers[:], logger.propagate = handlers, True
            logger.setLevel(level)
    text = capsys.readouterr().err
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} WARNING \[::1\]:7 x{300}…\n", text
    )
