"""Token ids through the server, with replicas in threads (no Ray)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_program import Builder, Grid, inverse
from helpers_serve import Running, running

import adalayer_native as ada
from adalayer_native.serve.settings import ModelSource

ROWS, LENGTH = 9, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of tokens by themselves, ids as int64."""
    b, grid = Builder(), Grid()
    ids = b.input((1, 1, LENGTH), "i32")
    table = b.constant(np.arange(ROWS * 3, dtype=np.uint8))
    x = b.node("embedding", [ids], b.value((3, 1, LENGTH), grid), constants=[table])
    assert inverse(grid) == 2.0
    y = b.node("dequantize", [x], b.value((3, 1, LENGTH)))
    program = b.finish([y])
    texts = {
        "inputs": [["ids", [LENGTH], "int64"]],
        "order": [0],
        "outputs": [[0, [3, LENGTH], None]],
        "leaves": [{"tensor": 0}],
        "structure": 0,
    }
    for key, value in texts.items():
        program.set_metadata(f"adalayer.{key}", json.dumps(value))
    path = tmp_path_factory.mktemp("serve") / "text.ada"
    program.save(str(path))
    return path


@pytest.fixture(scope="module")
def server(model: Path):
    with running([ModelSource("text", "1", model)], batch_wait_ms=100.0) as found:
        yield found


def asked(server: Running, data: Any, datatype: str = "INT64", **changes: Any) -> tuple[int, Any]:
    array = np.asarray(data)
    tensor: dict[str, Any] = {"name": "ids", "shape": list(array.shape), "datatype": datatype}
    if datatype.startswith("binary "):
        tensor["datatype"] = datatype.removeprefix("binary ")
        raw = array.astype({"INT64": "<i8", "INT32": "<i4"}[tensor["datatype"]]).tobytes()
        tensor["parameters"] = {"binary_data_size": len(raw)}
        text = json.dumps({"inputs": [tensor | changes]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        return server.request("POST", "/v2/models/text/infer", text + raw, headers)
    body = json.dumps({"inputs": [tensor | {"data": data} | changes]})
    return server.request("POST", "/v2/models/text/infer", body)


FORMS = ("INT64", "INT32", "binary INT64", "binary INT32")


@pytest.mark.parametrize("form", FORMS)
def test_ids_come_in_every_form(server: Running, model: Path, form: str):
    ids = [[0, 8, 3, 3], [1, 2, 3, 4]]
    status, answer = asked(server, ids, form)
    assert status == 200, answer
    (output,) = answer["outputs"]
    wanted = ada.load(model).run(np.array(ids))
    assert output["datatype"] == "FP32" and output["shape"] == [2, 3, LENGTH]
    np.testing.assert_array_equal(np.array(output["data"], np.float32), wanted.reshape(-1))


def test_metadata_says_what_comes(server: Running):
    _, answer = server.request("GET", "/v2/models/text")
    assert answer["inputs"] == [{"name": "ids", "datatype": "INT64", "shape": [-1, LENGTH]}]
    assert answer["outputs"][0]["datatype"] == "FP32"
    _, answer = server.request("GET", "/v2/models/text/config")
    assert answer["input"] == [{"name": "ids", "data_type": "TYPE_INT64", "dims": [LENGTH]}]


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_id_spoils_no_others_request(server: Running, form: str):
    good, bad = [[0, 1, 2, 3]], [[0, 1, 2, 3], [4, 5, ROWS, 7]]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ids: asked(server, ids, form), [good, bad, good, bad]))
    assert [status for status, _ in answers] == [200, 400, 200, 400]
    message = "input 'ids': expected ids of 0 to 8, got 9 in sample 1, position 2"
    assert answers[1][1]["error"] == message
    assert asked(server, [[0, 1, 2, -1]], form)[1]["error"].endswith(
        "got -1 in sample 0, position 3"
    )


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ([[0, 1, 2, 3]], {"datatype": "FP32"}, "expected datatype INT64 or INT32, got"),
        ([[0, 1, 2, 0.5]], {}, "expected whole numbers as data"),
        ([[True, False, True, True]], {}, "expected whole numbers as data"),
        ([["NaN", 0, 0, 0]], {}, "expected whole numbers as data"),
        ([["a", 0, 0, 0]], {}, "expected whole numbers as data"),
        ([[0, 0, 0, 2**62]], {}, "expected ids of 0 to 8, got 4611686018427387904"),
        ([[0, 0, 0, 2**70]], {}, "expected whole numbers as data"),
        ([[0, 0, 0]], {}, "expected shape [batch, 4], got [1, 3]"),
        ([[0, 0, 0]], {"shape": [1, 4]}, "expected 4 numbers, got 3"),
    ],
)
def test_what_is_no_id_is_a_bad_request(server: Running, data: Any, changes: dict, message: str):
    status, answer = asked(server, data, **changes)
    assert status == 400 and message in answer["error"], answer


def test_sizes_of_binary_ids(server: Running):
    wrong = {"parameters": {"binary_data_size": 16}}
    status, answer = asked(server, [[0, 1, 2, 3]], "binary INT64", **wrong)
    assert status == 400 and "expected binary_data_size 32" in answer["error"]


def test_a_picture_is_no_text(server: Running):
    status, answer = server.request("POST", "/v2/models/text/classify", b"not a picture")
    assert status == 400 and "takes floats" in answer["error"]
