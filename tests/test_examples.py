"""The examples, as a reader would run them."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_models import batches, tiny
from helpers_serve_model import CLASSES, write_model
from PIL import Image

import adalayer_native as ada

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(path: str) -> Any:
    """An example's module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_example", EXAMPLES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("examples") / "model.ada")


@pytest.fixture(scope="module")
def engine(model: Path) -> ada.Engine:
    return ada.load(model)


def asgi(app: Any, path: str, pieces: list[bytes]) -> tuple[int, Any]:
    """One POST request to an ASGI application, with its start and its end around it."""

    async def run() -> tuple[int, Any]:
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        state: dict[str, Any] = {}
        versions = {"version": "3.0", "spec_version": "2.3"}
        lifespan = {"type": "lifespan", "asgi": versions, "state": state}
        living = asyncio.create_task(app(lifespan, inbox.get, outbox.put))
        await inbox.put({"type": "lifespan.startup"})
        assert (await outbox.get())["type"] == "lifespan.startup.complete"
        name, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": versions,
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": name,
            "raw_path": name.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": state,
        }
        messages = [
            {"type": "http.request", "body": piece, "more_body": k + 1 < len(pieces)}
            for k, piece in enumerate(pieces)
        ]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        await inbox.put({"type": "lifespan.shutdown"})
        await living
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], json.loads(body)

    return asyncio.run(run())


def test_fastapi(model: Path, engine: ada.Engine, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("fastapi", reason="needs FastAPI, which comes with the extra [serve]")
    monkeypatch.setenv("MODEL", str(model))
    app = example("fastapi/app.py").app
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    data = stream.getvalue()
    status, found = asgi(app, "/classify?top=2", [data[:50], data[50:]])
    assert status == 200 and len(found) == 2
    from adalayer_native.serve.images import Preprocessing

    x = Preprocessing(engine.preprocessing, (3, 8, 8))(data, 1000)
    best = int(engine.run(x[None]).argmax())
    assert found[0]["class"] == CLASSES[best]
    assert found[0]["probability"] >= found[1]["probability"] > 0
    assert asgi(app, "/classify", [b"no image"])[0] == 400
    assert asgi(app, "/classify", [bytes(1 << 20)] * 17)[0] == 413


@pytest.fixture
def triton_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """What the example uses of the module that Triton gives its Python models."""
    module = types.ModuleType("triton_python_backend_utils")

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self._array = name, array

        def as_numpy(self) -> np.ndarray:
            return self._array

    class InferenceResponse:
        def __init__(self, output_tensors: list[Tensor], error: Any = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    module.Tensor = Tensor  # type: ignore[attr-defined]
    module.InferenceResponse = InferenceResponse  # type: ignore[attr-defined]
    module.TritonError = Exception  # type: ignore[attr-defined]
    module.get_input_tensor_by_name = lambda request, name: request[name]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_triton(model: Path, engine: ada.Engine, tmp_path: Path, triton_module: Any):
    folder = tmp_path / "net" / "7"
    folder.mkdir(parents=True)
    (folder / "model.ada").write_bytes(model.read_bytes())
    instance = example("triton/net/1/model.py").TritonPythonModel()
    instance.initialize({"model_repository": str(tmp_path / "net"), "model_version": "7"})
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 3, 8, 8)).astype(np.float32) for n in (1, 3, 2)]
    wrong = np.zeros((1, 3, 8, 9), np.float32)
    requests = [{"x": triton_module.Tensor("x", x)} for x in [*arrays[:2], wrong, arrays[2]]]
    responses = instance.execute(requests)
    assert len(responses) == 4 and "expected (3, 8, 8)" in str(responses[2].error)
    for x, response in zip(arrays, [responses[0], responses[1], responses[3]], strict=True):
        (tensor,) = response.output_tensors
        assert tensor.name == "output"
        np.testing.assert_array_equal(tensor.as_numpy(), engine.run(x))
    (only,) = instance.execute(requests[2:3])
    assert only.error is not None


def test_pipeline():
    module = example("pipeline/pipeline.py")
    names = ["ant", "bee", "cat", "dog"]
    pipeline = module.Pipeline(tiny(), names, lambda x: x.float() / 127.5 - 1, size=8)
    rng = torch.Generator().manual_seed(0)
    small = module.compressed(pipeline, batches(labels=False), bits=8)
    assert any(isinstance(layer, ada.nn.Conv2d) for layer in small.modules())
    images = torch.randint(0, 256, (200, 3, 12, 10), generator=rng, dtype=torch.uint8)
    with torch.inference_mode():
        wanted, got = pipeline(images), small(images)
    assert set(got) <= set(names)
    assert sum(map(str.__eq__, wanted, got)) >= 180


def test_litserve(model: Path, engine: ada.Engine, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("litserve", reason="needs LitServe")
    monkeypatch.setenv("MODEL", str(model))
    api = example("litserve/server.py").EngineAPI(max_batch_size=8)
    api.setup("cpu")
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    decoded = [api.decode_request({"pixels": image.tolist()}) for image in x]
    parts = api.unbatch(api.predict(api.batch(decoded)))
    found = [api.encode_response(part)["scores"] for part in parts]
    np.testing.assert_array_equal(np.array(found, np.float32), engine.run(x))


def test_mlserver(model: Path, engine: ada.Engine):
    pytest.importorskip("mlserver", reason="needs MLServer")
    from mlserver.codecs import NumpyCodec
    from mlserver.settings import ModelParameters, ModelSettings
    from mlserver.types import InferenceRequest

    runtime_class = example("mlserver/adalayer_runtime.py").AdaRuntime
    settings = ModelSettings(
        name="net",
        implementation=runtime_class,
        parameters=ModelParameters(uri=str(model), version="3"),
    )
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)

    async def run() -> Any:
        runtime = runtime_class(settings)
        assert await runtime.load()
        return await runtime.predict(InferenceRequest(inputs=[NumpyCodec.encode_input("x", x)]))

    answer = asyncio.run(run())
    assert (answer.model_name, answer.model_version) == ("net", "3")
    np.testing.assert_array_equal(NumpyCodec.decode_output(answer.outputs[0]), engine.run(x))
