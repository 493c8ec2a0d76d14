"""Queues, batches and replicas that fail, with replicas in threads (no Ray)."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_serve import Gate, image_batch, outputs, running
from helpers_serve_model import write_model

import adalayer_native as ada
from adalayer_native.serve.settings import ModelSource


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "tiny.ada")


@pytest.fixture(scope="module")
def engine(model: Path) -> ada.Engine:
    return ada.load(model)


@pytest.fixture
def gate():
    Gate.close()
    yield Gate
    Gate.opened.set()


GATED = "helpers_serve:GatedRunner"


def test_batching_keeps_requests_apart(model: Path, engine: ada.Engine, gate):
    source = ModelSource("tiny", "1", model)
    with running([source], runner=GATED, max_batch=8) as server, ThreadPoolExecutor(20) as pool:
        arrays = [image_batch(1 + k % 3, k) for k in range(20)]
        asked = [pool.submit(server.infer, x) for x in arrays]
        assert gate.entered.acquire(timeout=20)
        time.sleep(0.5)  # both lanes hold one batch, the others wait
        gate.opened.set()
        for x, future in zip(arrays, asked, strict=True):
            status, answer = future.result(timeout=30)
            assert status == 200
            np.testing.assert_array_equal(outputs(answer), engine.run(x))
        text = server.request("GET", "/metrics")[1].decode()
        count = next(r for r in text.splitlines() if r.startswith("adalayer_batch_size_count"))
        assert float(count.split()[-1]) < 20


def test_a_full_queue_and_lost_time(model: Path, gate):
    source = ModelSource("tiny", "1", model)
    settings = {"runner": GATED, "max_batch": 1, "max_queue": 3, "timeout": 1.0}
    with running([source], **settings) as server, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(server.infer, image_batch(1)) for _ in range(12)]
        found = [future.result(timeout=20) for future in asked]
        statuses = sorted(status for status, _ in found)
        # Two in the lanes and three in the queue wait in vain; the rest is sent away at once.
        assert statuses == [503] * 7 + [504] * 5
        gate.opened.set()
        assert server.infer(image_batch(1))[0] == 200
        text = server.request("GET", "/metrics")[1].decode()
        labels = 'model="tiny",version="1"'
        assert f"adalayer_rejected_requests_total{{{labels}}} 7.0" in text
        assert 'adalayer_request_errors_total{model="tiny",status="504",version="1"} 5.0' in text
        assert f"adalayer_queue_requests{{{labels}}} 0.0" in text
        assert f"adalayer_request_seconds_count{{{labels}}}" in text


def test_what_dies_with_a_replica_is_sent_again(model: Path, engine: ada.Engine, gate):
    source = ModelSource("tiny", "1", model)
    with (
        running([source], workers=2, runner=GATED, max_batch=2) as server,
        ThreadPoolExecutor(12) as pool,
    ):
        deadline = time.monotonic() + 20
        while b'replicas{model="tiny",version="1"} 2.0' not in server.request("GET", "/metrics")[1]:
            assert time.monotonic() < deadline
        arrays = [image_batch(1, k) for k in range(12)]
        asked = [pool.submit(server.infer, x) for x in arrays]
        assert gate.entered.acquire(timeout=20) and gate.entered.acquire(timeout=20)
        time.sleep(0.3)
        (workers,) = server.deployer.workers.values()
        victim = workers[0]
        victim._stopping = True
        with victim._lock:
            for connection in victim._connections:
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(0.3)
        gate.opened.set()
        for x, future in zip(arrays, asked, strict=True):
            status, answer = future.result(timeout=30)
            assert status == 200, answer
            np.testing.assert_array_equal(outputs(answer), engine.run(x))
        text = server.request("GET", "/metrics")[1].decode()
        row = next(r for r in text.splitlines() if r.startswith("adalayer_resent_requests_total"))
        assert float(row.split()[-1]) > 0
        assert 'adalayer_replicas{model="tiny",version="1"} 1.0' in text


def test_requests_wait_for_a_new_replica(model: Path, engine: ada.Engine):
    x = image_batch(1)
    with running([ModelSource("tiny", "1", model)]) as server, ThreadPoolExecutor(1) as pool:
        ((app, workers),) = server.deployer.workers.items()
        workers[0].stop()
        deadline = time.monotonic() + 20
        while server.request("GET", "/v2/models/tiny/ready")[0] == 200:
            assert time.monotonic() < deadline
        assert server.request("GET", "/v2/health/ready")[0] == 503
        asked = pool.submit(server.infer, x)
        time.sleep(0.2)
        server.deployer.add(app, server.deployer.spec)
        status, answer = asked.result(timeout=30)
        assert status == 200
        np.testing.assert_array_equal(outputs(answer), engine.run(x))


def test_a_silent_replica_is_given_up(model: Path, engine: ada.Engine, gate):
    source = ModelSource("tiny", "1", model)
    x = image_batch(1)
    settings = {"runner": GATED, "replica_timeout": 0.3, "timeout": 10.0}
    with running([source], **settings) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.infer, x)
        assert gate.entered.acquire(timeout=20)
        (workers,) = server.deployer.workers.values()
        deadline = time.monotonic() + 20
        while workers[0].healthy():  # Ray Serve would replace it
            assert time.monotonic() < deadline
            time.sleep(0.05)
        gate.opened.set()
        status, answer = asked.result(timeout=20)
        assert status == 200
        np.testing.assert_array_equal(outputs(answer), engine.run(x))


def test_a_request_that_ends_every_replica(model: Path):
    source = ModelSource("tiny", "1", model)
    settings = {"runner": "helpers_serve:FragileRunner", "replica_timeout": 0.5}
    with running([source], workers=3, **settings) as server, ThreadPoolExecutor(8) as pool:
        bad = image_batch(1)
        bad[0, 0, 0, 0] = 1e9
        good = [image_batch(1, k) for k in range(7)]
        asked = [pool.submit(server.infer, x) for x in [bad, *good]]
        status, answer = asked[0].result(timeout=20)
        assert status == 500 and "3 replicas" in answer["error"]
        assert [future.result(timeout=20)[0] for future in asked[1:]] == [200] * 7


def test_drain_answers_what_runs(model: Path, engine: ada.Engine, gate):
    source = ModelSource("tiny", "1", model)
    x = image_batch(1)
    with running([source], runner=GATED) as server, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.infer, x) for _ in range(3)]
        assert gate.entered.acquire(timeout=20)
        time.sleep(0.3)
        server.stop()
        time.sleep(0.5)
        with pytest.raises(OSError):  # nothing new is taken
            server.infer(x)
        gate.opened.set()
        for future in asked:
            status, answer = future.result(timeout=20)
            assert status == 200
            np.testing.assert_array_equal(outputs(answer), engine.run(x))


def test_strangers_at_the_data_port(model: Path, engine: ada.Engine):
    from adalayer_native.serve import wire

    x = image_batch(1)
    with running([ModelSource("tiny", "1", model)]) as server:
        spec = server.deployer.spec
        hello = {"token": "wrong", "key": spec.key, "replica": "r", "pid": 1, "fetch": True}
        for stranger in (
            b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100,
            wire.frame_head(wire.Kind.HELLO, meta=hello),
            wire.frame_head(wire.Kind.HELLO, payload=1 << 40),
            wire.frame_head(wire.Kind.RESULT, count=1, payload=16),
            wire.frame_head(wire.Kind.HELLO, meta={"token": spec.token}),
        ):
            with socket.create_connection((spec.host, spec.port), timeout=20) as connection:
                connection.sendall(stranger)
                with suppress(ConnectionResetError):
                    assert connection.recv(1000) == b""
        np.testing.assert_array_equal(outputs(server.infer(x)[1]), engine.run(x))


def test_a_waiting_worker_reports_that_it_is_alone(model: Path, monkeypatch):
    from adalayer_native.serve import replica

    monkeypatch.setattr(replica, "ORPHANED", 0.3)
    alone = threading.Event()
    with running([ModelSource("tiny", "1", model)]) as server:
        worker = replica.Worker(server.deployer.spec, alone.set)
        worker.start()
        assert not alone.wait(0.5)
    try:
        assert alone.wait(20)
    finally:
        worker.stop()
