"""The start of a server: what is refused before Ray, one deployment at a time, Ray's failures."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_cli import run
from helpers_serve import ThreadDeployer, running
from helpers_serve_model import write_model

from adalayer_native import _ray
from adalayer_native.errors import AdaError, ClusterError
from adalayer_native.serve.checks import StartError, bind, check_start
from adalayer_native.serve.replica import WorkerSpec
from adalayer_native.serve.settings import ModelSource, Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "tiny.ada")


# -- before Ray -----------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch):
    """Whoever gets as far as Ray fails."""
    monkeypatch.setitem(sys.modules, "adalayer_native.serve.deploy", None)
    monkeypatch.setenv("COLUMNS", "200")


def test_what_is_checked_before_ray(model: Path, tmp_path: Path, monkeypatch, capsys, no_ray):
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.ada"
    damaged.write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["a=missing.ada"], "model 'a', version '1': missing.ada: No such file or directory"),
            ([f"a={model}", f"b:2={tmp_path}"], r"model 'b', version '2': \S+: Is a directory"),
            ([f"a={tmp_path}/pipe"], r"model 'a', version '1': \S+pipe is a named pipe; expected"),
            ([f"a={damaged}"], r"model 'a', version '1': \S+damaged.ada: .*checksum"),
            ([str(model), "--port", port], f"127.0.0.1:{port}: Address already in use; --port 0"),
            ([str(model), "--host", "192.0.2.1"], "192.0.2.1:8000: Cannot assign"),
            ([str(model), "--data-host", "192.0.2.1"], "data host 192.0.2.1:0: Cannot assign"),
            (["--repository", f"{tmp_path}/none"], "repository .*/none: there is no such folder"),
            ([str(model), "--runner", "nothing:here"], "runner 'nothing:here': No module named"),
            ([str(model), "--runner", "json:here"], "runner 'json:here': .* has no attribute"),
        ):
            begin = time.monotonic()
            port_option = [] if {"--port", "--host"} & set(arguments) else ["--port", "0"]
            assert run(monkeypatch, "serve", *arguments, *port_option) == 1
            text = capsys.readouterr().err
            assert re.search(message, text) and text.count("\n") == 1, text
            assert time.monotonic() - begin < 20


def test_files_of_other_runtimes_are_left_to_their_runner(tmp_path: Path):
    path = tmp_path / "net.json"
    path.write_text("{}")
    settings = Settings(runner="helpers_serve:EchoRunner")
    check_start(settings, [ModelSource("net", "1", path)])
    with pytest.raises(StartError, match="No such file"):
        check_start(settings, [ModelSource("net", "1", tmp_path / "none")])


def test_nobody_is_heard_before_the_start(model: Path):
    listener = bind(Settings(port=0))
    try:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname())
    finally:
        listener.close()


def test_replicas_that_cannot_be_started(model: Path, monkeypatch):
    async def fail(self: ThreadDeployer, app: str, spec: WorkerSpec) -> None:
        raise RuntimeError("the controller is gone")

    sources = [ModelSource("tiny", "1", model)]
    with running(sources) as server:
        monkeypatch.setattr(ThreadDeployer, "deploy", fail)
        status, answer = server.request("POST", "/v2/repository/models/tiny/load", b"")
        assert status == 500 and answer["error"].endswith(
            "its replicas cannot be started: RuntimeError: the controller is gone"
        )
        assert server.request("GET", "/v2/health/ready")[0] == 200  # the old one goes on
    with pytest.raises(StartError, match="'tiny', version '1': its replicas"), running(sources):
        pass


# -- Ray ------------------------------------------------------------------------------------------


class FakeServe:
    """``ray.serve``, which says how many calls run at a time."""

    RunTarget = SimpleNamespace

    def __init__(self) -> None:
        self.running = self.most = self.calls = 0

    def _call(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.02)
        self.running -= 1
        return SimpleNamespace(options=lambda **_: SimpleNamespace(bind=self._call))

    def start(self, **_: Any) -> None:
        pass

    deployment = run_many = delete = _call


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the import of ray.serve
def test_deployments_come_one_after_the_other(monkeypatch):
    pytest.importorskip("ray", reason="needs the extra [serve]")
    from adalayer_native.serve import deploy

    fake = FakeServe()
    monkeypatch.setattr(deploy, "serve", fake)
    monkeypatch.setattr(deploy, "connect", lambda *_: False)
    deployer = deploy.RayDeployer(Settings())
    spec = WorkerSpec("127.0.0.1", 1, "token", "key", "runner", 1, 1, 1)

    async def many() -> None:
        await asyncio.gather(
            *(deployer.deploy(f"app-{k}", spec) for k in range(4)),
            *(deployer.remove(f"old-{k}") for k in range(2)),
        )

    asyncio.run(many())
    assert fake.calls == 14 and fake.most == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_serve_that_does_not_start(monkeypatch):
    pytest.importorskip("ray", reason="needs the extra [serve]")
    from adalayer_native.serve import deploy

    ended = []
    fake = FakeServe()
    monkeypatch.setattr(deploy, "serve", fake)
    monkeypatch.setattr(deploy, "connect", lambda *_: True)
    monkeypatch.setattr(deploy.ray, "shutdown", lambda: ended.append(True))

    def start(**_: Any) -> None:
        raise TimeoutError("no controller\nand forty lines more")

    monkeypatch.setattr(fake, "start", start)
    with pytest.raises(ClusterError, match=r"^Ray Serve did not start: no controller; try"):
        deploy.RayDeployer(Settings())
    assert ended == [True]


class FakeRay:
    """``ray``, whose start fails."""

    def __init__(self, message: str) -> None:
        self.message, self.starts, self.ends = message, 0, 0

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        self.starts += 1
        raise Exception(self.message)

    def shutdown(self) -> None:
        self.ends += 1


@pytest.mark.parametrize(
    ("raised", "starts", "message"),
    [
        (
            "The current node timed out during startup. This could\nhappen",
            3,
            r"Ray did not start on this machine within \d+ s, in 3 attempts: try again when it is "
            r"less busy, or start Ray with `ray start --head` and give the address auto; its logs "
            r"are in \S+",
        ),
        ("no room\nfor 50 lines", 1, r"Ray cannot be started on this machine: no room; its .*"),
        ("", 1, r"Ray cannot be started on this machine: Exception; its logs .*"),
    ],
)
def test_ray_that_does_not_start(monkeypatch, raised: str, starts: int, message: str):
    fake = FakeRay(raised)
    monkeypatch.setattr(_ray, "import_ray", lambda: fake)
    with pytest.raises(AdaError) as found:
        _ray.connect(None, 1)
    assert re.fullmatch(message, str(found.value)) and isinstance(found.value, ClusterError)
    assert (fake.starts, fake.ends) == (starts, starts)


def test_a_cluster_that_is_not_there(monkeypatch):
    fake = FakeRay("Could not find any running Ray instance.")
    monkeypatch.setattr(_ray, "import_ray", lambda: fake)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    with pytest.raises(ClusterError, match=rf"'{address}': .*refused; start one with `ray start"):
        _ray.connect(address, 1)
    assert time.monotonic() - begin < 20 and not fake.starts  # Ray tries for minutes
    with pytest.raises(ClusterError, match="'auto': Could not find any running Ray instance"):
        _ray.connect("auto", 1)
    assert fake.starts == 1
