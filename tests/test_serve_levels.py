"""Levels of quality through the server, with replicas in threads (no Ray)."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_models import batches, tiny
from helpers_serve import Gate, Running, running
from helpers_serve_model import CLASSES, PREPROCESSING
from PIL import Image

import adalayer_native as ada
from adalayer_native.serve.quality import Quality
from adalayer_native.serve.settings import ModelSource

INFER = "/v2/models/tiny/infer"
GATED = "helpers_serve:GatedRunner"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    levels = ada.compress_levels(tiny(), batches(2), [8, 4, 2], effort="low", progress=False)
    first, *others = levels.models
    engine = ada.compile(first, batches(1)[0][0][:1], policy="native", levels=others)
    path = tmp_path_factory.mktemp("serve") / "tiny.ada"
    engine.save(path, preprocessing=PREPROCESSING, class_names=CLASSES)
    return path


@pytest.fixture(scope="module")
def results(model: Path) -> list[np.ndarray]:
    """What every level makes of :func:`image`."""
    engine = ada.load(model)
    return [engine.at_quality(level).run(image()) for level in range(3)]


@pytest.fixture(scope="module")
def server(model: Path):
    with running([ModelSource("tiny", "1", model)]) as found:
        yield found


@pytest.fixture
def gate():
    Gate.close()
    yield Gate
    Gate.opened.set()


def image() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)


def outputs(answer: dict) -> np.ndarray:
    (output,) = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def with_parameter(server: Running, level: Any, **headers: str) -> tuple[int, Any]:
    x = image()
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    body = {"inputs": [tensor], "parameters": {"quality": level}}
    return server.request("POST", INFER, json.dumps(body), headers)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_request_asks_for_a_level(server: Running, results: list[np.ndarray], level: int):
    answers = [
        server.infer(image(), headers={"Quality": str(level)}),
        with_parameter(server, level),
        with_parameter(server, level, Quality=str(level)),
    ]
    for status, answer in answers:
        assert status == 200, answer
        np.testing.assert_array_equal(outputs(answer), results[level])
    assert server.qualities[-3:] == [str(level)] * 3


def test_without_one_it_is_the_best(server: Running, results: list[np.ndarray]):
    status, answer = server.infer(image())
    assert status == 200 and server.qualities[-1] == "0"
    np.testing.assert_array_equal(outputs(answer), results[0])
    assert server.request("GET", "/v2/models/tiny")[1]["parameters"]["quality_levels"] == 3


def test_images_at_a_level(server: Running):
    picture = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(picture, "PNG")
    found = []
    for level in ("0", "2"):
        status, answer = server.request(
            "POST", "/v2/models/tiny/classify", picture.getvalue(), {"Quality": level}
        )
        assert status == 200 and server.qualities[-1] == level
        found.append(sorted((c["index"], c["probability"]) for c in answer["classes"]))
    assert found[0] != found[1]
    path = "/v2/models/tiny/classify"
    status, answer = server.request("POST", path, picture.getvalue(), {"Quality": "3"})
    assert status == 400 and "level 3 does not exist" in answer["error"]


@pytest.mark.parametrize("text", ["3", "-1", "1.0", "best", "", "99999"])
def test_headers_that_are_no_level(server: Running, text: str):
    status, answer = server.infer(image(), headers={"Quality": text})
    assert status == 400
    assert "uality: " in answer["error"] and "0" in answer["error"]


@pytest.mark.parametrize("level", [3, -1, 1.0, "1", True])
def test_parameters_that_are_no_level(server: Running, level: Any):
    status, answer = with_parameter(server, level)
    assert status == 400 and answer["error"].startswith("quality: ")


def test_a_header_and_a_parameter_that_differ(server: Running):
    status, answer = with_parameter(server, 1, Quality="2")
    assert status == 400
    assert answer["error"] == "quality: the header says 2 and the parameters say 1"


def test_a_model_of_one_level(model: Path, tmp_path: Path):
    levels = ada.compress_levels(tiny(), batches(2), [8, 2], effort="low", progress=False)
    engine = ada.compile(levels.models[0], batches(1)[0][0][:1], policy="native")
    engine.save(tmp_path / "one.ada")
    with running([ModelSource("tiny", "1", tmp_path / "one.ada")]) as server:
        assert server.infer(image(), headers={"Quality": "0"})[0] == 200
        assert server.qualities == [None]
        status, answer = server.infer(image(), headers={"Quality": "1"})
        assert status == 400 and "expected 0, the only one" in answer["error"]


def metric(server: Running, name: str) -> float:
    text = server.request("GET", "/metrics")[1].decode()
    row = next(r for r in text.splitlines() if r.startswith(f'{name}{{model="tiny"'))
    return float(row.split()[-1])


def test_an_overloaded_server_lowers_the_level(model: Path, results: list[np.ndarray], gate):
    """Requests that wait are answered at lower levels, but for those that ask for one."""
    settings = {"runner": GATED, "max_batch": 1, "max_queue": 30}
    source = ModelSource("tiny", "1", model)
    with running([source], **settings) as server, ThreadPoolExecutor(32) as pool:
        first = [pool.submit(server.infer, image()) for _ in range(2)]
        for _ in first:  # one in the engine, and one behind it, at the best level
            if gate.entered.acquire(timeout=20):
                break
        time.sleep(0.5)
        strict = pool.submit(server.infer, image(), headers={"Quality": "0"})
        time.sleep(0.3)
        asked = [pool.submit(server.infer, image()) for _ in range(25)]
        deadline = time.monotonic() + 20
        while metric(server, "adalayer_queue_requests") < 26 and time.monotonic() < deadline:
            time.sleep(0.05)
        gate.opened.set()
        for future in (*first, strict):
            status, answer = future.result(timeout=30)
            assert status == 200
            np.testing.assert_array_equal(outputs(answer), results[0])
        counts = [0, 0, 0]
        for future in asked:
            status, answer = future.result(timeout=30)
            assert status == 200
            level = [np.array_equal(outputs(answer), each) for each in results].index(True)
            counts[level] += 1
        # From 26 waiting down: the lowest level until 10 wait, the next until 5 do.
        assert counts[2] > counts[1] > 0 and counts[0] > 0
        assert metric(server, "adalayer_degraded_requests_total") == counts[1] + counts[2]
        assert server.infer(image())[0] == 200 and server.qualities[-1] == "0"
        assert metric(server, "adalayer_quality_level") == 0


def test_a_server_that_must_not_degrade(model: Path, results: list[np.ndarray], gate):
    settings = {"runner": GATED, "max_batch": 1, "max_queue": 6, "degrade": False}
    source = ModelSource("tiny", "1", model)
    with running([source], **settings) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.infer, image()) for _ in range(8)]
        assert gate.entered.acquire(timeout=20)
        time.sleep(0.3)
        gate.opened.set()
        for future in asked:
            status, answer = future.result(timeout=30)
            assert status == 200
            np.testing.assert_array_equal(outputs(answer), results[0])


def test_batches_are_of_one_level(model: Path, results: list[np.ndarray], gate):
    source = ModelSource("tiny", "1", model)
    with running([source], runner=GATED, max_batch=8) as server, ThreadPoolExecutor(20) as pool:
        asked = [
            pool.submit(server.infer, image(), headers={"Quality": str(k % 3)}) for k in range(18)
        ]
        assert gate.entered.acquire(timeout=20)
        time.sleep(0.5)
        gate.opened.set()
        for k, future in enumerate(asked):
            status, answer = future.result(timeout=30)
            assert status == 200
            np.testing.assert_array_equal(outputs(answer), results[k % 3])
        text = server.request("GET", "/metrics")[1].decode()
        count = next(r for r in text.splitlines() if r.startswith("adalayer_batch_size_count"))
        assert float(count.split()[-1]) < 18


def test_levels_follow_the_queue_and_do_not_flicker():
    quality = Quality(3, 30)
    assert [quality.update(n) for n in (0, 9, 10, 9, 6, 5, 4)] == [0, 0, 1, 1, 1, 1, 0]
    assert [quality.update(n) for n in (20, 19, 10, 9, 5, 4)] == [2, 2, 2, 1, 1, 0]
    assert quality.update(30) == 2 and quality.update(0) == 0
    assert [Quality(1, 30).update(n) for n in (0, 30)] == [0, 0]
