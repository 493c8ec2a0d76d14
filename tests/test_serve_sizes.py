"""Images of any size through the server, with replicas in threads (no Ray)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_engine import native_of
from helpers_serve import Running, running
from torch import nn

import adalayer_native as ada
from adalayer_native.serve.settings import ModelSource


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of scores, as large as half the image."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    native = native_of(layers, torch.rand(4, 3, 16, 16))
    engine = ada.compile(native, torch.rand(1, 3, 16, 16), policy="native", sizes=(8, 64, 2))
    path = tmp_path_factory.mktemp("serve") / "net.ada"
    engine.save(path)
    return path


@pytest.fixture(scope="module")
def server(model: Path):
    with running([ModelSource("net", "1", model)], batch_wait_ms=100.0) as found:
        yield found


def asked(server: Running, x: np.ndarray, binary: bool = False) -> tuple[int, Any]:
    tensor: dict[str, Any] = {"name": "input_1", "shape": list(x.shape), "datatype": "FP32"}
    if binary:
        tensor["parameters"] = {"binary_data_size": x.nbytes}
        text = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        return server.request("POST", "/v2/models/net/infer", text + x.tobytes(), headers)
    body = json.dumps({"inputs": [tensor | {"data": x.reshape(-1).tolist()}]})
    return server.request("POST", "/v2/models/net/infer", body)


def test_requests_of_several_sizes(server: Running, model: Path):
    """Equal sizes share batches; every answer is that of its own image, in its own shape."""
    engine = ada.load(model)
    rng = np.random.default_rng(0)
    shapes = [(16, 16), (8, 64), (16, 16), (30, 22), (8, 64), (16, 16), (30, 22), (64, 64)]
    images = [rng.random((1 + k % 2, 3, *shape), np.float32) for k, shape in enumerate(shapes)]
    with ThreadPoolExecutor(len(images)) as pool:
        answers = list(pool.map(lambda k: asked(server, images[k], k % 2 == 1), range(len(images))))
    for x, (status, answer) in zip(images, answers, strict=True):
        assert status == 200, answer
        (output,) = answer["outputs"]
        wanted = engine.run(x)
        assert output["shape"] == list(wanted.shape)
        got = np.array(output["data"], np.float32).reshape(wanted.shape)
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize("shape", [(9, 16), (16, 66), (6, 8)])
def test_other_sizes_are_refused(server: Running, shape: tuple[int, int]):
    status, answer = asked(server, np.zeros((1, 3, *shape), np.float32))
    assert status == 400
    assert "expected shape [batch, 3, 8..64 by 2, 8..64 by 2]" in answer["error"]


def test_metadata_say_which_sizes(server: Running):
    status, answer = server.request("GET", "/v2/models/net")
    assert status == 200
    assert answer["inputs"][0]["shape"] == [-1, 3, -1, -1]
    assert answer["outputs"][0]["shape"] == [-1, 2, -1, -1]
    ranges = {"min": 8, "max": 64, "multiple_of": 2}
    assert answer["parameters"]["sizes"] == {"height": ranges, "width": ranges}
    status, answer = server.request("GET", "/v2/models/net/config")
    assert status == 200 and answer["input"][0]["dims"] == [3, -1, -1]
