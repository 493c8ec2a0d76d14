"""Hundreds of hostile requests to one server: each has its status, and the server stays right."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_serve import Running, running
from helpers_serve_hostile import GROUPS, MAX_BODY, Hostile
from helpers_serve_model import write_model

import adalayer_native as ada
from adalayer_native.serve.settings import ModelSource

SECONDS = 10.0  # for the longest of them, on a machine that is busy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("serve") / "tiny.ada", preprocessing={"resize": 10, "size": 8}
    )


@pytest.fixture(scope="module")
def server(model: Path):
    limits = {"max_body": MAX_BODY, "max_upload": MAX_BODY, "max_pixels": 10_000_000}
    times = {"header_timeout": 0.5, "body_timeout": 0.5}
    with running([ModelSource("tiny", "1", model)], **limits, **times) as found:
        yield found


def ask(server: Running, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """The first answer; a server that closes without one has not kept its promise."""
    received = b""
    with socket.create_connection((server.host, server.port), timeout=SECONDS) as connection:
        # It may answer, and stop reading, before everything is sent.
        with suppress(ConnectionError):
            connection.sendall(data)
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
    head, separator, rest = received.partition(b"\r\n\r\n")
    assert separator, f"no answer: {received[:100]!r}"
    first, *rows = head.decode().split("\r\n")
    found = dict(row.lower().split(": ", 1) for row in rows)
    return int(first.split()[1]), found, rest[: int(found["content-length"])]


def fault(server: Running, hostile: Hostile) -> str | None:
    """What is wrong with the answer."""
    name, data, statuses = hostile
    begin = time.monotonic()
    status, headers, body = ask(server, data)
    if status not in statuses:
        return f"{name}: {status}, expected {statuses}: {body[:200]!r}"
    if time.monotonic() - begin > SECONDS:
        return f"{name}: {time.monotonic() - begin:.1f} s"
    if "x-injected" in headers:
        return f"{name}: a header of the client's"
    if status >= 400:
        if headers["content-type"] != "application/json":
            return f"{name}: {headers['content-type']}"
        message = json.loads(body)["error"]
        if not 0 < len(message) <= 2000:
            return f"{name}: {message[:100]!r}"
    return None


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_requests(server: Running, model: Path, group: str):
    faults = [found for hostile in GROUPS[group]() if (found := fault(server, hostile))]
    assert not faults, "\n".join(faults)
    # It is alive, and as right as before.
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    status, answer = server.infer(x)
    assert status == 200
    found = np.array(answer["outputs"][0]["data"], np.float32).reshape(2, -1)
    np.testing.assert_array_equal(found, ada.load(model).run(x))
    assert server.request("GET", "/v2/health/ready") == (200, {"ready": True})


def test_there_are_hundreds():
    names = [(name, row[0]) for name, group in GROUPS.items() for row in group()]
    assert len(names) == len(set(names)) >= 200
