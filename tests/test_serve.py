"""The server's protocol and limits, with replicas in threads (no Ray)."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

import orjson
from helpers_cli import run
from helpers_serve import Running, image_batch, outputs, running
from helpers_serve_model import CLASSES, write_model
from helpers_torchvision import torchvision_models
from PIL import Image

import adalayer_native as ada
from adalayer_native.serve.images import Preprocessing, probabilities
from adalayer_native.serve.settings import ModelSource, Settings, parse_source

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "tiny.ada")


@pytest.fixture(scope="module")
def server(model: Path):
    with running([ModelSource("tiny", "1", model)], max_body=1 << 20) as found:
        yield found


@pytest.fixture(scope="module")
def engine(model: Path) -> ada.Engine:
    return ada.load(model)


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
