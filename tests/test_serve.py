"""The server's protocol, limits and faults, with replicas in threads (no Ray)."""

from __future__ import annotations

import base64
import errno
import gzip
import http.client
import io
import json
import math
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

import orjson
from helpers_cli import run
from helpers_serve import Gate, Running, running
from helpers_serve_model import CLASSES, write_model
from helpers_torchvision import torchvision_models
from PIL import Image

import adalayer_native as ada
from adalayer_native.serve import models
from adalayer_native.serve.images import Preprocessing, probabilities
from adalayer_native.serve.settings import ModelSource, Settings, parse_source

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "tiny.ada")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "other.ada", seed=5)


@pytest.fixture(scope="module")
def server(model: Path):
    with running([ModelSource("tiny", "1", model)], max_body=1 << 20) as found:
        yield found


@pytest.fixture(scope="module")
def engine(model: Path) -> ada.Engine:
    return ada.load(model)


def image_batch(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)


def outputs(answer: dict) -> np.ndarray:
    (output,) = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


# -- the protocol ---------------------------------------------------------------------------------


def test_metadata_and_health(server: Running):
    status, answer = server.request("GET", "/v2")
    assert status == 200 and "binary_tensor_data" in answer["extensions"]
    assert server.request("GET", "/v2/health/live") == (200, {"live": True})
    assert server.request("GET", "/v2/health/ready") == (200, {"ready": True})
    assert server.request("GET", "/v2/models/tiny/ready")[0] == 200
    status, answer = server.request("GET", "/v2/models/tiny")
    assert status == 200
    assert answer["versions"] == ["1"]
    assert answer["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
    assert answer["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 4]}]
    assert answer["parameters"]["classes"] == CLASSES
    assert server.request("GET", "/v2/models/tiny/versions/1")[1] == answer
    assert server.request("GET", "/v2/models/tiny/versions/2")[0] == 404
    assert server.request("GET", "/v2/models/nothing")[0] == 404
    assert server.request("GET", "/somewhere")[0] == 404
    assert server.request("DELETE", INFER)[0] == 405


def test_json_has_the_engines_bits(server: Running, engine: ada.Engine):
    for n in (1, 3):
        x = image_batch(n, n)
        status, answer = server.infer(x)
        assert status == 200
        assert (answer["model_name"], answer["model_version"]) == ("tiny", "1")
        np.testing.assert_array_equal(outputs(answer), engine.run(x))


def test_nested_data_id_and_chosen_output(server: Running, engine: ada.Engine):
    x = image_batch(2)
    tensor = {"name": "x", "shape": [2, 3, 8, 8], "datatype": "FP32", "data": x.tolist()}
    request = {"id": "one", "inputs": [tensor], "outputs": [{"name": "output"}]}
    status, answer = server.request("POST", INFER, json.dumps(request))
    assert status == 200 and answer["id"] == "one"
    np.testing.assert_array_equal(outputs(answer), engine.run(x))


def test_tritonclient(server: Running, engine: ada.Engine):
    client_module = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    client = client_module.InferenceServerClient(f"{server.host}:{server.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.get_server_metadata()["name"] == "adalayer_native"
    assert client.get_model_metadata("tiny")["inputs"][0]["name"] == "x"
    assert client.get_model_repository_index()[0]["state"] == "READY"
    assert client.get_model_config("tiny")["max_batch_size"] == 256
    assert client.get_inference_statistics("tiny")["model_stats"][0]["version"] == "1"
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "tiny"
    x = image_batch(5)
    wanted = engine.run(x)
    for binary_in, binary_out, compression in (
        (True, True, None),
        (True, False, "gzip"),
        (False, True, "deflate"),
        (False, False, None),
    ):
        tensor = client_module.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x, binary_data=binary_in)
        output = client_module.InferRequestedOutput("output", binary_data=binary_out)
        answer = client.infer(
            "tiny",
            [tensor],
            outputs=[output],
            request_id="7",
            request_compression_algorithm=compression,
        )
        np.testing.assert_array_equal(answer.as_numpy("output"), wanted)
        assert answer.get_response()["id"] == "7"
    half = x.astype(np.float16)
    tensor = client_module.InferInput("x", list(x.shape), "FP16")
    tensor.set_data_from_numpy(half)
    answer = client.infer("tiny", [tensor], model_version="1")  # without outputs: all, as bytes
    np.testing.assert_array_equal(answer.as_numpy("output"), engine.run(half.astype(np.float32)))
    wrong = client_module.InferInput("x", [1, 3, 4, 16], "FP32")
    wrong.set_data_from_numpy(x[:1].reshape(1, 3, 4, 16))
    with pytest.raises(client_module.InferenceServerException, match="expected shape"):
        client.infer("tiny", [wrong])
    client.close()


def test_configuration_and_statistics(model: Path):
    settings = {"max_batch": 8, "batch_wait_ms": 2.5, "max_queue": 7}
    with running([ModelSource("tiny", "1", model)], **settings) as server:
        status, found = server.request("GET", "/v2/models/tiny/config")
        assert status == 200
        assert found["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}]
        assert found["output"] == [{"name": "output", "data_type": "TYPE_FP32", "dims": [4]}]
        assert (found["name"], found["max_batch_size"]) == ("tiny", 256)
        assert found["dynamic_batching"] == {
            "preferred_batch_size": [8],
            "max_queue_delay_microseconds": 2500,
            "default_queue_policy": {"max_queue_size": 7},
        }
        assert server.request("GET", "/v2/models/tiny/versions/1/config")[1] == found
        before = 1000 * time.time()
        for n in (1, 1, 3):
            assert server.infer(image_batch(n))[0] == 200
        assert server.request("POST", "/v2/models/tiny/classify", b"no image")[0] == 400
        ((row,),) = server.request("GET", "/v2/models/tiny/stats")[1].values()
        assert (row["name"], row["version"]) == ("tiny", "1")
        assert (row["inference_count"], row["execution_count"]) == (5, 3)
        assert before <= row["last_inference"] + 1 and row["last_inference"] <= 1000 * time.time()
        parts = row["inference_stats"]
        assert {key: part["count"] for key, part in parts.items()} == {
            "success": 3,
            "fail": 1,
            "queue": 3,
            "compute_input": 3,
            "compute_infer": 3,
            "compute_output": 3,
        }
        assert all(part["ns"] > 0 for part in parts.values())
        assert parts["queue"]["ns"] + parts["compute_infer"]["ns"] <= parts["success"]["ns"]
        assert [(b["batch_size"], b["compute_infer"]["count"]) for b in row["batch_stats"]] == [
            (1, 2),
            (3, 1),
        ]
        for path in ("models/stats", "models/tiny/versions/1/stats"):
            assert server.request("GET", f"/v2/{path}")[1] == {"model_stats": [row]}
        # Loaded again, a version goes on counting.
        assert server.request("POST", "/v2/repository/models/tiny/load", b"")[0] == 200
        assert server.request("GET", "/v2/models/stats")[1] == {"model_stats": [row]}
        assert server.request("GET", "/v2/models/none/stats")[0] == 404
        assert server.request("GET", "/v2/models/none/config")[0] == 404
        assert server.request("POST", "/v2/models/tiny/config", b"")[0] == 405


def test_several_inputs_and_outputs(model: Path):
    source = ModelSource("pair", "1", model)
    with running([source], runner="helpers_serve:PairRunner", batch_wait_ms=200.0) as server:

        def ask(n: int) -> tuple[np.ndarray, np.ndarray, dict, dict]:
            rng = np.random.default_rng(n)
            a = rng.normal(size=(n, 2, 3)).astype(np.float32)
            b = rng.normal(size=(n, 6)).astype(np.float32)
            head = {
                "inputs": [  # in another order than the model's
                    {
                        "name": "b",
                        "shape": [n, 6],
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": b.nbytes},
                    },
                    {"name": "a", "shape": [n, 2, 3], "datatype": "FP32", "data": a.tolist()},
                ]
            }
            text = json.dumps(head).encode()
            headers = {"Inference-Header-Content-Length": str(len(text))}
            status, answer = server.request(
                "POST", "/v2/models/pair/infer", text + b.tobytes(), headers
            )
            assert status == 200, answer
            first, second = answer["outputs"]
            return a, b, first, second

        # Three requests of different sizes, in one batch.
        with ThreadPoolExecutor(3) as pool:
            for a, b, first, second in pool.map(ask, (1, 2, 3)):
                got = np.array(first["data"], np.float32).reshape(first["shape"])
                np.testing.assert_array_equal(got, a.reshape(-1, 6) + b)
                got = np.array(second["data"], np.float32).reshape(second["shape"])
                np.testing.assert_array_equal(got, (b * b).reshape(-1, 3, 2))
        text = server.request("GET", "/metrics")[1].decode()
        assert 'adalayer_batch_size_sum{model="pair",version="1"} 6.0' in text
        assert 'adalayer_batch_size_count{model="pair",version="1"} 1.0' in text


# What JSON has no numbers for, beside some that it shortens.
ODD = np.array([[np.nan, np.inf, -np.inf, 0.1], [-0.0, 1e-45, 3.4e38, 2.5]], np.float32)


@pytest.fixture(scope="module")
def echo(model: Path):
    with running([ModelSource("echo", "1", model)], runner="helpers_serve:EchoRunner") as found:
        yield found


def echoed(server: Running, body: bytes) -> bytes:
    """The answer as it came."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    try:
        connection.request("POST", "/v2/models/echo/infer", body)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return answer.read()
    finally:
        connection.close()


def odd_request(data: Any, **changes: Any) -> dict:
    tensor = {"name": "x", "shape": [2, 2, 2], "datatype": "FP32", "data": data}
    return {"inputs": [tensor], **changes}


def same_bits(got: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(got, np.float32).reshape(2, 4), ODD)
    assert np.array_equal(np.signbit(got).reshape(2, 4)[1:], np.signbit(ODD)[1:])


@pytest.mark.parametrize("parse", [json.loads, orjson.loads])
def test_numbers_that_json_does_not_have(echo: Running, parse: Any):
    for data in (
        ODD.ravel().tolist(),  # NaN and Infinity, as Python's json writes them
        ["NaN", "Infinity", "-Infinity", *ODD.ravel().tolist()[3:]],
        [[["NaN", "Infinity"], ["-Infinity", 0.1]], ODD[1].reshape(2, 2).tolist()],
    ):
        answer = parse(echoed(echo, json.dumps(odd_request(data)).encode()))
        assert answer["outputs"][0]["data"][:4] == ["NaN", "Infinity", "-Infinity", 0.1]
        same_bits(np.array(answer["outputs"][0]["data"], np.float32))
        same_bits(np.array([float(value) for value in answer["outputs"][0]["data"]]))


def test_tritonclient_gets_what_was_computed(echo: Running):
    module = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    client = module.InferenceServerClient(f"{echo.host}:{echo.port}")
    for binary_in in (True, False):
        for binary_out in (True, False):
            tensor = module.InferInput("x", [2, 2, 2], "FP32")
            tensor.set_data_from_numpy(ODD.reshape(2, 2, 2), binary_data=binary_in)
            output = module.InferRequestedOutput("y", binary_data=binary_out)
            same_bits(client.infer("echo", [tensor], outputs=[output]).as_numpy("y"))
    client.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (odd_request(["nan", *[0] * 7]), "expected numbers as data, or NaN, Infinity, -Infinity"),
        (odd_request(["1.5", *[0] * 7]), "expected numbers as data, or"),
        (odd_request("NaN"), "expected 8 numbers, got 1"),
        (odd_request(["NaN", None, *[0] * 6]), "expected numbers as data"),
        (odd_request(["NaN", True, [0] * 6]), "inhomogeneous"),
        ({"inputs": float("inf")}, "a list of tensors"),
        (b'{"inputs": NaN', "in JSON"),
        (b'{"inputs": ' + b"[" * 100_000 + b"NaN", "in JSON"),
        (b'{"id": "\\ud800", "inputs": [NaN]}', "id: expected a string"),
        (b'\xff\xfe{"inputs": [NaN]}', "in JSON"),
    ],
)
def test_names_that_are_no_numbers(echo: Running, body: Any, message: str):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = echo.request("POST", "/v2/models/echo/infer", text)
    assert status == 400 and message in answer["error"]


def test_only_requests_for_tensors_take_bare_names(server: Running):
    status, answer = server.request("POST", "/v2/repository/index", b'{"ready": NaN}')
    assert status == 400 and "in JSON" in answer["error"]


# -- images ---------------------------------------------------------------------------------------


def test_probabilities_that_are_no_numbers(model: Path):
    source = ModelSource("odd", "1", model)
    with running([source], runner="helpers_serve:OverflowRunner") as server:
        image = encoded(np.zeros((8, 8, 3), np.uint8))
        status, answer = server.request("POST", "/v2/models/odd/classify", image)
    assert status == 200
    assert [row["probability"] for row in answer["classes"]] == ["NaN"] * 3


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def test_classify(server: Running, engine: ada.Engine):
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    status, answer = server.request(
        "POST", "/v2/models/tiny/versions/1/classify?top=4", encoded(pixels)
    )
    assert status == 200
    mean = np.array([0.5, 0.4, 0.3], np.float32).reshape(3, 1, 1)
    std = np.array([0.2, 0.3, 0.25], np.float32).reshape(3, 1, 1)
    x = (pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std
    wanted = probabilities(engine.run(x[None]))[0]
    rows = answer["classes"]
    assert [row["index"] for row in rows] == np.argsort(-wanted).tolist()
    assert [row["probability"] for row in rows] == sorted(wanted, reverse=True)
    assert all(row["name"] == CLASSES[row["index"]] for row in rows)
    assert sum(row["probability"] for row in rows) == pytest.approx(1)
    status, answer = server.request("POST", "/v2/models/tiny/classify", encoded(pixels, "JPEG"))
    assert status == 200 and len(answer["classes"]) == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got nothing"),
        (b"no image", "cannot decode the image (as JPEG or PNG)"),
        (encoded(np.zeros((9, 9, 3), np.uint8))[:-30], "cannot decode the image"),
        (encoded(np.zeros((9, 9, 3), np.uint8), "GIF"), "cannot decode the image"),
    ],
)
def test_bad_images(server: Running, data: bytes, message: str):
    status, answer = server.request("POST", "/v2/models/tiny/classify", data)
    assert status == 400 and message in answer["error"]


def test_a_bad_image_spoils_no_other(model: Path):
    source = ModelSource("tiny", "1", model)
    good = encoded(np.full((8, 8, 3), 7, np.uint8))
    with (
        running([source], batch_wait_ms=300.0, max_pixels=100) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        huge = encoded(np.zeros((11, 11, 3), np.uint8))
        bodies = [good, b"\x89PNG rubbish", huge, good]
        path = "/v2/models/tiny/classify"
        answers = list(pool.map(lambda body: server.request("POST", path, body), bodies))
        assert [status for status, _ in answers] == [200, 400, 400, 200]
        assert "at most 100 pixels" in answers[2][1]["error"]
        assert answers[0][1]["classes"] == answers[3][1]["classes"]


def line_of_pixels(width: int, height: int) -> bytes:
    """A picture of a few hundred bytes; its middle is 200, the rest 0."""
    pixels = np.zeros((max(width, height), 3), np.uint8)
    pixels[len(pixels) // 4 : -(len(pixels) // 4)] = 200
    return encoded(pixels.reshape(height, width, 3))


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_of_a_long_picture_only_the_shown_part_is_scaled(size, monkeypatch):
    made: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, *arguments: Any) -> Image.Image:
        made.append(math.prod(image.size))
        scaled = resize(image, *arguments)
        made.append(math.prod(scaled.size))
        return scaled

    monkeypatch.setattr(Image.Image, "resize", watched)
    data = line_of_pixels(*size)
    found = Preprocessing({"resize": 8}, (3, 8, 8))(data, 10_000_000)
    np.testing.assert_array_equal(found, np.full((3, 8, 8), np.float32(200) / np.float32(255)))
    assert len(data) < 1000 and made and max(made) < 1000


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_a_long_picture_that_would_be_too_large(size, model: Path, tmp_path: Path):
    path = write_model(tmp_path / "long.ada", preprocessing={"resize": 256})
    with running([ModelSource("long", "1", path)]) as server:
        begin = time.monotonic()
        ask = "/v2/models/long/classify"
        status, answer = server.request("POST", ask, line_of_pixels(*size))
        scaled = "25600000x256" if size[0] > size[1] else "256x25600000"
        assert status == 400 and f"with its shorter side at 256 {scaled}" in answer["error"]
        assert time.monotonic() - begin < 20  # it was minutes, and 19 GB
        assert server.request("POST", ask, encoded(np.zeros((10, 30, 3), np.uint8)))[0] == 200


def test_preprocessing_as_torchvision_does_it():
    torchvision_models()  # registers what the import of torchvision needs
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=np.uint8)
    spec = {"resize": 32, "size": 28, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    steps = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize(spec["mean"], spec["std"]),
        ]
    )
    found = Preprocessing(spec, (3, 28, 28))(encoded(pixels), 10_000)
    np.testing.assert_allclose(found, steps(Image.fromarray(pixels)).numpy(), rtol=1e-6, atol=1e-6)
    swapped = Preprocessing({**spec, "channels": "BGR", "mean": 0.5, "std": 1}, (3, 28, 28))
    plain = Preprocessing({"resize": 32, "mean": 0.5, "std": 1}, (3, 28, 28))
    data = encoded(pixels)
    np.testing.assert_array_equal(swapped(data, 10_000), plain(data, 10_000)[::-1])
    gray = Preprocessing(None, (1, 8, 8))(encoded(pixels[:8, :8, 0]), 100)
    np.testing.assert_array_equal(gray[0], pixels[:8, :8, 0].astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ({"sise": 8}, (3, 8, 8)),
        ({"size": [9, 8]}, (3, 8, 8)),
        ({"mean": [1, 2]}, (3, 8, 8)),
        ({"std": [0, 1, 1]}, (3, 8, 8)),
        ({"std": ["a", 1, 1]}, (3, 8, 8)),
        ({"resize": 4}, (3, 8, 8)),
        ({"interpolation": "lanczos9"}, (3, 8, 8)),
        ({"channels": "L"}, (3, 8, 8)),
        (None, (2, 8, 8)),
        (None, (12,)),
    ],
)
def test_preprocessing_that_does_not_fit(spec, shape):
    with pytest.raises(ada.FileFormatError):
        Preprocessing(spec, shape)


# -- bad requests ---------------------------------------------------------------------------------


def tensor(**changes):
    base = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [0] * 192}
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


ONE = {"binary_data": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{not json", "in JSON"),
        (b"[1, 2]", "a JSON object, got list"),
        (b"\xff\xfe", "in JSON"),
        ({"inputs": 3}, "a list of tensors"),
        ({}, "a list of tensors"),
        ({"inputs": []}, "'x' is missing"),
        ({"inputs": [tensor(name="y")]}, "expected 'x', got \"y\""),
        ({"inputs": [tensor(), tensor()]}, "comes twice"),
        ({"inputs": [tensor(shape=[1, 3, 8, 9])]}, "expected shape [batch, 3, 8, 8]"),
        ({"inputs": [tensor(shape=[0, 3, 8, 8])]}, "expected shape"),
        ({"inputs": [tensor(shape=[True, 3, 8, 8])]}, "expected shape"),
        ({"inputs": [tensor(shape=[-1, 3, 8, 8])]}, "expected shape"),
        ({"inputs": [tensor(shape="large")]}, "expected shape"),
        ({"inputs": [tensor(shape=json.loads("[" * 900 + "]" * 900))]}, "expected shape"),
        ({"inputs": [tensor(shape=[257, 3, 8, 8])]}, "at most 256"),
        ({"inputs": [tensor(datatype="INT8")]}, 'FP32 or FP16, got "INT8"'),
        ({"inputs": [tensor(data=[0] * 191)]}, "expected 192 numbers, got 191"),
        ({"inputs": [tensor(data=["a"] * 192)]}, "expected numbers"),
        ({"inputs": [tensor(data=[[1], [2, 3]])]}, "inhomogeneous"),
        ({"inputs": [tensor(data=None)]}, "neither data nor"),
        ({"inputs": [tensor(parameters=3)]}, "expected an object"),
        ({"inputs": [tensor(parameters={"shared_memory_region": "r"})]}, "not supported"),
        (
            {"inputs": [tensor(data=None, parameters={"binary_data_size": 768})]},
            "needs the header Inference-Header-Content-Length",
        ),
        (
            {"inputs": [tensor()], "parameters": {"binary_data_output": "yes"}},
            'binary_data_output of the request: expected true or false, got "yes"',
        ),
        (
            {
                "inputs": [tensor()],
                "outputs": [{"name": "output", "parameters": {"binary_data": 1}}],
            },
            "binary_data of output 'output': expected true or false, got 1",
        ),
        ({"inputs": [tensor()], "outputs": [{"name": "z"}]}, "expected 'output', got \"z\""),
        ({"inputs": [tensor()], "outputs": "all"}, "expected a list"),
        ({"inputs": [tensor()], "id": 7}, "expected a string"),
    ],
)
def test_bad_requests(server: Running, body, message):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = server.request("POST", INFER, text)
    assert status == 400 and message in answer["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "expected 768 bytes behind the JSON and the inputs before it, the body ends after 3"),
        ({"parameters": {"binary_data_size": 767}}, "(192 values of shape [1, 3, 8, 8], 4 bytes"),
        ({"datatype": "FP16"}, "expected binary_data_size 384 (192 values"),
        ({"parameters": {"binary_data_size": -1}}, "FP32 each), got -1"),
        ({"parameters": {"binary_data_size": "768"}}, 'as a whole number (768), got "768"'),
        ({"parameters": {"binary_data_size": True}}, "as a whole number (768), got true"),
        ({"parameters": {"binary_data_size": 768.0}}, "as a whole number (768), got 768.0"),
        ({"data": [0] * 192}, "has both data and binary_data_size"),
        ({"parameters": None, "data": [0] * 192}, "3 bytes of the body belong to no input"),
    ],
)
def test_bad_sizes_of_binary_data(server: Running, changes: dict, message: str):
    row = {**tensor(data=None, parameters={"binary_data_size": 768}), **changes}
    text = json.dumps({"inputs": [row]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    status, answer = server.request("POST", INFER, text + b"123", headers)
    assert status == 400 and message in answer["error"]


def test_a_null_is_as_good_as_nothing(server: Running, engine: ada.Engine):
    x = image_batch(1)
    row = tensor(data=x.ravel().tolist())
    nulls = {"binary_data_size": None, "shared_memory_region": None, "classification": None}
    for request in (
        {"id": None, "parameters": None, "inputs": [row], "outputs": None},
        {"inputs": [{**row, "parameters": None}], "parameters": {"binary_data_output": None}},
        {"inputs": [{**row, "parameters": nulls}]},
        {"inputs": [row], "outputs": [{"name": "output", "parameters": None}]},
        {"inputs": [row], "outputs": [{"name": "output", "parameters": {"binary_data": None}}]},
    ):
        status, answer = server.request("POST", INFER, json.dumps(request))
        assert status == 200, answer
        np.testing.assert_array_equal(outputs(answer), engine.run(x))
    # Bytes are the default of all outputs, and a null leaves one at that.
    request = {
        "inputs": [row],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "output", "parameters": {"binary_data": None}}],
    }
    status, answer = server.request("POST", INFER, json.dumps(request))
    assert status == 200 and answer.endswith(engine.run(x).tobytes())
    for path in ("/v2/repository/index", "/v2/repository/models/none/unload"):
        status, answer = server.request("POST", path, b'{"parameters": null}')
        assert status in (200, 404), answer


def test_bad_headers(server: Running):
    good = json.dumps({"inputs": [tensor()]}).encode()
    digits = "9" * 5000
    for value, message in (
        ("99999", "the JSON has 99999 bytes, the body"),
        ("-3", "expected the number of bytes of the JSON, got '-3'"),
        ("many", "got 'many'"),
        (digits, "expected the number of bytes"),
    ):
        headers = {"Inference-Header-Content-Length": value}
        status, answer = server.request("POST", INFER, good, headers)
        assert status == 400 and message in answer["error"]
    status, answer = server.request("POST", f"/v2/models/tiny/classify?top={digits}", b"")
    assert status == 400 and "a number of classes" in answer["error"]
    headers = {"Inference-Header-Content-Length": str(len(good))}
    status, answer = server.request("POST", INFER, good + b"rest", headers)
    assert status == 400 and "4 bytes of the body belong to no input" in answer["error"]
    status, answer = server.request("POST", INFER, good, {"Content-Encoding": "br"})
    assert status == 415
    status, answer = server.request("POST", INFER, b"rubbish", {"Content-Encoding": "gzip"})
    assert status == 400 and "damaged" in answer["error"]


def test_large_bodies(server: Running):
    status, answer = server.request("POST", INFER, b" " * ((1 << 20) + 1))
    assert status == 413 and "1,048,576" in answer["error"]
    chunks = (b" " * 65536 for _ in range(17))  # without a Content-Length
    status, answer = server.request("POST", INFER, chunks)  # type: ignore[arg-type]
    assert status == 413
    bomb = gzip.compress(b" " * (8 << 20))
    status, answer = server.request("POST", INFER, bomb, {"Content-Encoding": "gzip"})
    assert status == 413 and "decompressed" in answer["error"]


def exchange(server: Running, data: bytes) -> bytes:
    """Everything that comes back for some bytes, until the server closes."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def test_slow_bodies(model: Path, engine: ada.Engine):
    x = image_batch(1)
    with running([ModelSource("tiny", "1", model)], body_timeout=0.5) as server:
        head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{{"
        assert exchange(server, head.encode()).startswith(b"HTTP/1.1 408")
        np.testing.assert_array_equal(outputs(server.infer(x)[1]), engine.run(x))


def test_long_headers(server: Running):
    text = b"POST / HTTP/1.1\r\n" + b"X-Filler: " + b"a" * 100_000
    assert exchange(server, text).startswith(b"HTTP/1.1 431")


def test_slow_headers(model: Path):
    with running([ModelSource("tiny", "1", model)], header_timeout=0.3) as server:
        with socket.create_connection((server.host, server.port), timeout=20) as connection:
            connection.sendall(b"POST /v2 HTTP/1.1\r\nHost:")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection((server.host, server.port), timeout=20) as connection:
            assert connection.recv(100) == b""  # nothing was asked
        assert server.request("GET", "/v2/health/ready")[0] == 200


# -- models that come and go ----------------------------------------------------------------------


def load(server: Running, name: str, version: str, data: bytes) -> tuple[int, dict]:
    text = base64.b64encode(data).decode()
    body = {"parameters": {"config": "{}", f"file:{version}/model.ada": text}}
    return server.request("POST", f"/v2/repository/models/{name}/load", json.dumps(body))


def test_models_and_versions(model: Path, other: Path):
    x = image_batch(2)
    one, two = ada.load(model).run(x), ada.load(other).run(x)
    assert not np.array_equal(one, two)
    with running([ModelSource("tiny", "1", model)]) as server:
        assert load(server, "tiny", "3", other.read_bytes()) == (200, {})
        assert load(server, "second", "1", other.read_bytes()) == (200, {})
        # The highest version answers where none is named.
        np.testing.assert_array_equal(outputs(server.infer(x)[1]), two)
        np.testing.assert_array_equal(outputs(server.infer(x, "tiny/versions/1")[1]), one)
        np.testing.assert_array_equal(outputs(server.infer(x, "second")[1]), two)
        assert server.request("GET", "/v2/models/tiny")[1]["versions"] == ["1", "3"]
        unload = "/v2/repository/models/tiny/unload"
        body = json.dumps({"parameters": {"version": "3"}})
        assert server.request("POST", unload, body) == (200, {})
        np.testing.assert_array_equal(outputs(server.infer(x)[1]), one)
        # In the place of one that runs.
        assert load(server, "tiny", "1", other.read_bytes()) == (200, {})
        np.testing.assert_array_equal(outputs(server.infer(x)[1]), two)
        # Without a file: again from where it came.
        assert server.request("POST", "/v2/repository/models/tiny/load", "{}") == (200, {})
        np.testing.assert_array_equal(outputs(server.infer(x)[1]), one)
        assert server.request("POST", unload, "") == (200, {})
        assert server.infer(x)[0] == 404
        assert server.request("POST", unload, "")[0] == 404
        rows = server.request("POST", "/v2/repository/index", b"")[1]
        assert [(r["name"], r["version"], r["state"]) for r in rows] == [
            ("second", "1", "READY"),
            ("tiny", "1", "UNAVAILABLE"),
            ("tiny", "3", "UNAVAILABLE"),
        ]
        ready = server.request("POST", "/v2/repository/index", b'{"ready": true}')[1]
        assert [row["name"] for row in ready] == ["second"]


def test_a_corrupt_upload_changes_nothing(model: Path):
    x = image_batch(1)
    data = model.read_bytes()
    wanted = ada.load(model).run(x)
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    with running([ModelSource("tiny", "1", model)]) as server:
        for bad in (bytes(damaged), data[:-100], b"", b"rubbish"):
            status, answer = load(server, "tiny", "1", bad)
            assert status == 400, answer
            np.testing.assert_array_equal(outputs(server.infer(x)[1]), wanted)
        (row,) = server.request("POST", "/v2/repository/index", b"")[1]
        assert row["state"] == "READY" and "last load failed" in row["reason"]
        body = {"parameters": {"file:1/model.ada": "%%%"}}
        path = "/v2/repository/models/tiny/load"
        status, answer = server.request("POST", path, json.dumps(body))
        assert status == 400 and "base64" in answer["error"]
        body = {"parameters": {"file:../../x": ""}}
        assert server.request("POST", path, json.dumps(body))[0] == 400
        assert load(server, "-x", "1", data)[0] == 400
        assert load(server, "..%2Fx", "1", data)[0] == 404
        assert server.request("POST", "/v2/repository/models/new/load", "{}")[0] == 404


def test_a_disk_without_room_for_an_upload(model: Path, monkeypatch):
    x = image_batch(1)
    wanted = ada.load(model).run(x)
    data = model.read_bytes()

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with running([ModelSource("tiny", "1", model)]) as server:
        with monkeypatch.context() as patch:
            patch.setattr(models, "write_atomic", full)
            for name in ("tiny", "other"):
                status, answer = load(server, name, "1", data)
                assert status == 507 and "No space left on device" in answer["error"]
        np.testing.assert_array_equal(outputs(server.infer(x)[1]), wanted)
        rows = server.request("POST", "/v2/repository/index", b"")[1]
        assert {row["name"]: row["state"] for row in rows} == {
            "tiny": "READY",
            "other": "UNAVAILABLE",
        }
        for name in ("tiny", "other"):
            assert load(server, name, "1", data)[0] == 200
            np.testing.assert_array_equal(outputs(server.infer(x, name)[1]), wanted)


def test_repository_folder_and_no_control(model: Path, tmp_path: Path):
    target = tmp_path / "boxed" / "2"
    target.mkdir(parents=True)
    (target / "model.ada").write_bytes(model.read_bytes())
    with running(repository=tmp_path) as server:
        assert server.request("GET", "/v2/health/ready")[0] == 503
        body = json.dumps({"parameters": {"version": "2"}})
        assert server.request("POST", "/v2/repository/models/boxed/load", body) == (200, {})
        assert server.infer(image_batch(1), "boxed")[0] == 200
        assert server.request("GET", "/v2/health/ready")[0] == 200
    with running([ModelSource("tiny", "1", model)], control=False) as server:
        assert load(server, "tiny", "1", model.read_bytes())[0] == 403
        assert server.request("POST", "/v2/repository/models/tiny/unload", "")[0] == 403


def test_a_model_that_cannot_be_loaded_at_the_start(tmp_path: Path):
    (tmp_path / "bad.ada").write_bytes(b"nothing")
    from adalayer_native.serve.checks import StartError

    with (
        pytest.raises(
            StartError,
            match=r"model 'bad', version '1': ada file, header: expected at least 64 bytes",
        ),
        running([ModelSource("bad", "1", tmp_path / "bad.ada")]),
    ):
        pass
    with (
        pytest.raises(StartError, match="No such file"),
        running([ModelSource("bad", "1", tmp_path / "missing.ada")]),
    ):
        pass


# -- queues and faults ----------------------------------------------------------------------------


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


def test_many_connections(server: Running, engine: ada.Engine):
    x = image_batch(1)
    wanted = engine.run(x)
    text = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": x.tolist()}]}
    ).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(text)}\r\n\r\n".encode()
    connections = [socket.create_connection((server.host, server.port)) for _ in range(200)]
    try:
        for connection in connections:
            connection.settimeout(30)
            connection.sendall(head + text)
        for connection in connections:
            data = b""
            while b"\r\n\r\n" not in data or not data.rstrip().endswith(b"}"):
                data += connection.recv(65536)
            assert data.startswith(b"HTTP/1.1 200")
            np.testing.assert_array_equal(
                outputs(json.loads(data.split(b"\r\n\r\n", 1)[1])), wanted
            )
    finally:
        for connection in connections:
            connection.close()


# -- small parts ----------------------------------------------------------------------------------


def test_sources():
    assert parse_source("a/net.ada") == ModelSource("net", "1", Path("a/net.ada"))
    assert parse_source("a/net.ada", "x") == ModelSource("x", "1", Path("a/net.ada"))
    assert parse_source("x=a.ada") == ModelSource("x", "1", Path("a.ada"))
    assert parse_source("x:7=a.ada") == ModelSource("x", "7", Path("a.ada"))
    for text in ("x:0=a", "x:b=a", "a b=c", "/=c", "..=c", "x:=c"):
        with pytest.raises(ValueError, match="expected"):
            parse_source(text)


@pytest.mark.parametrize(
    "change", [{"replicas": 0}, {"timeout": 0.0}, {"batch_wait_ms": -1.0}, {"max_batch": 0}]
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings(**change)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a.ada", "b.ada", "--name", "x"],
            "it is the name of one MODEL, got 2; give each its own, as NAME=model.ada",
        ),
        (["--name", "x"], "it is the name of one MODEL, got 0"),
        (["a b.ada"], "model name 'a b'"),
        (["x=a.ada", "x:1=b.ada"], "two models have one name and version"),
        (["--no-control"], "MODELS are needed"),
        (["a.ada", "--replicas", "0"], "replicas"),
        (["a.ada", "--timeout", "0"], "expected seconds above 0"),
    ],
)
def test_arguments_of_the_command(monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "serve", *arguments) == 2
    assert message in capsys.readouterr().err


def test_names_are_limited(model: Path, monkeypatch):
    from adalayer_native.serve import models

    monkeypatch.setattr(models, "MAX_NAMES", 2)
    with running([ModelSource("tiny", "1", model)]) as server:
        assert load(server, "second", "1", b"rubbish")[0] == 400
        status, answer = load(server, "third", "1", b"rubbish")
        assert status == 400 and "2 names" in answer["error"]
        assert load(server, "tiny", "2", model.read_bytes())[0] == 200
