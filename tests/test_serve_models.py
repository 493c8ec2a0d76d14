"""Models of a server that come and go, with replicas in threads (no Ray)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("prometheus_client", reason="needs the extra [serve]")
pytest.importorskip("orjson", reason="needs the extra [serve]")

from helpers_serve import image_batch, load, outputs, running
from helpers_serve_model import write_model

import adalayer_native as ada
from adalayer_native.serve.settings import ModelSource


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "tiny.ada")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "other.ada", seed=5)


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


def test_names_are_limited(model: Path, monkeypatch):
    from adalayer_native.serve import models

    monkeypatch.setattr(models, "MAX_NAMES", 2)
    with running([ModelSource("tiny", "1", model)]) as server:
        assert load(server, "second", "1", b"rubbish")[0] == 400
        status, answer = load(server, "third", "1", b"rubbish")
        assert status == 400 and "2 names" in answer["error"]
        assert load(server, "tiny", "2", model.read_bytes())[0] == 200
