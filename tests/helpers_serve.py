"""A server without Ray: its replicas are threads of the test process, to be ended at any time."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from adalayer_native.serve.checks import bind
from adalayer_native.serve.replica import Worker, WorkerSpec
from adalayer_native.serve.runner import Description, EngineRunner, TensorInfo
from adalayer_native.serve.server import serve_until
from adalayer_native.serve.settings import ModelSource, Settings


class Gate:
    """Holds every engine call of a :class:`GatedRunner` until it is opened."""

    opened = threading.Event()
    entered = threading.Semaphore(0)

    @classmethod
    def close(cls) -> None:
        cls.opened = threading.Event()
        cls.entered = threading.Semaphore(0)


class GatedRunner:
    """An engine whose calls wait for :class:`Gate`, so that tests decide what meets what."""

    def __init__(self, path: str, threads: int) -> None:
        self._engine = EngineRunner(path, threads)
        self.description = self._engine.description

    def run(self, inputs: Sequence[np.ndarray], level: int = 0) -> list[np.ndarray]:
        Gate.entered.release()
        assert Gate.opened.wait(30)
        return self._engine.run(inputs, level)


class FragileRunner:
    """An engine whose connections end at a certain input, as if the process had."""

    def __init__(self, path: str, threads: int) -> None:
        self._engine = EngineRunner(path, threads)
        self.description = self._engine.description

    def run(self, inputs: Sequence[np.ndarray], level: int = 0) -> list[np.ndarray]:
        if (inputs[0] == 1e9).any():
            raise ConnectionResetError("a request that ends processes")
        return self._engine.run(inputs, level)


class PairRunner:
    """Two inputs and two outputs: their sum, and the second one's square."""

    def __init__(self, path: str, threads: int) -> None:
        self.description = Description(
            (TensorInfo("a", (2, 3)), TensorInfo("b", (6,))),
            (TensorInfo("sum", (6,)), TensorInfo("square", (3, 2))),
        )

    def run(self, inputs: Sequence[np.ndarray], level: int = 0) -> list[np.ndarray]:
        a, b = inputs
        return [a.reshape(-1, 6) + b, (b * b).reshape(-1, 3, 2)]


class EchoRunner:
    """What came goes out: four numbers, whatever they are."""

    def __init__(self, path: str, threads: int) -> None:
        self.description = Description((TensorInfo("x", (2, 2)),), (TensorInfo("y", (4,)),))

    def run(self, inputs: Sequence[np.ndarray], level: int = 0) -> list[np.ndarray]:
        return [inputs[0].reshape(-1, 4).copy()]


class OverflowRunner:
    """Scores of an image that are no numbers any more."""

    def __init__(self, path: str, threads: int) -> None:
        self.description = Description((TensorInfo("x", (3, 8, 8)),), (TensorInfo("y", (3,)),))

    def run(self, inputs: Sequence[np.ndarray], level: int = 0) -> list[np.ndarray]:
        scores = np.array([1.0, np.inf, -np.inf], np.float32)
        return [np.tile(scores, (inputs[0].shape[0], 1))]


class ThreadDeployer:
    """Workers in threads instead of Ray Serve replicas."""

    data_host = "127.0.0.1"

    def __init__(self, replicas: int = 1) -> None:
        self.replicas = replicas
        self.workers: dict[str, list[Worker]] = {}

    async def deploy(self, app: str, spec: WorkerSpec) -> None:
        self.workers[app] = []
        self.spec = spec
        for _ in range(self.replicas):
            self.add(app, spec)

    def add(self, app: str, spec: WorkerSpec) -> None:
        worker = Worker(spec)
        self.workers[app].append(worker)

        def start() -> None:
            with suppress(Exception):  # the front has been told
                worker.start()

        threading.Thread(target=start, daemon=True).start()

    async def remove(self, app: str) -> None:
        workers = self.workers.pop(app, [])
        await asyncio.to_thread(lambda: [worker.stop() for worker in workers])


class Running:
    """A server in a thread of its own."""

    def __init__(self, url: str, deployer: ThreadDeployer, stop: Any) -> None:
        self.url = url
        self.host, self.port = url.removeprefix("http://").split(":")[0], int(url.split(":")[-1])
        self.deployer = deployer
        self.stop = stop
        self.qualities: list[str | None] = []  # header of the answers, in the order they came

    def request(
        self,
        method: str,
        path: str,
        body: bytes | str | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> tuple[int, Any]:
        """Status, and the answer, from JSON where it is JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            data = answer.read()
            self.qualities.append(answer.headers.get("quality"))
            if answer.headers.get("content-type") == "application/json":
                return answer.status, json.loads(data)
            return answer.status, data
        finally:
            connection.close()

    def infer(self, x: np.ndarray, model: str = "tiny", **options: Any) -> tuple[int, Any]:
        """A JSON request with one input ``x``."""
        request = {
            "inputs": [
                {
                    "name": "x",
                    "shape": list(x.shape),
                    "datatype": "FP32",
                    "data": x.ravel().tolist(),
                }
            ]
        }
        return self.request("POST", f"/v2/models/{model}/infer", json.dumps(request), **options)


@contextmanager
def running(
    models: Sequence[ModelSource] = (), *, workers: int = 1, **settings: Any
) -> Iterator[Running]:
    """A server on a free port, ended at the end; an error in it is the test's."""
    deployer = ThreadDeployer(workers)
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        found["stop"] = lambda: loop.call_soon_threadsafe(stop.set)

        def on_ready(url: str) -> None:
            found["url"] = url
            ready.set()

        chosen = Settings(**{"port": 0, "threads": 1, "drain": 5.0, **settings})
        await serve_until(stop, chosen, models, deployer, bind(chosen), on_ready=on_ready)

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            found["error"] = error
        finally:
            ready.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        if "url" in found:
            yield Running(found["url"], deployer, found["stop"])
    finally:
        if thread.is_alive():
            found["stop"]()
        thread.join(30)
        assert not thread.is_alive()
    if "error" in found:
        raise found["error"]
    assert "url" in found


def image_batch(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)


def outputs(answer: dict) -> np.ndarray:
    (output,) = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def load(server: Running, name: str, version: str, data: bytes) -> tuple[int, dict]:
    text = base64.b64encode(data).decode()
    body = {"parameters": {"config": "{}", f"file:{version}/model.ada": text}}
    return server.request("POST", f"/v2/repository/models/{name}/load", json.dumps(body))
