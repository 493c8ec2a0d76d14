"""``adalayer info`` of an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adalayer_native.report.onnx_file import describe
from tests.helpers_cli import run
from tests.helpers_onnx import model, node, onnx

RANDOM = np.random.default_rng(4)
T = onnx.TensorProto


def written(made: Any, path: Path) -> Path:
    path.write_bytes(made.SerializeToString())
    return path


def mixed(height: Any = 8) -> Any:
    """A convolution of integers, one in float, one whose integers do not fit, and a product."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w1", "s", "z1"], ["w1f"]),
        onnx.helper.make_node("Conv", ["d", "w1f"], ["c1"], name="first", pads=[1] * 4),
        onnx.helper.make_node("Conv", ["c1", "w2"], ["c2"], name="second", pads=[1] * 4),
        node("DequantizeLinear", ["w3", "s", "z1"], ["w3f"]),
        onnx.helper.make_node("Conv", ["c2", "w3f"], ["c3"], name="third", pads=[1] * 4),
        node("Transpose", ["c3"], ["t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["c3", "t"], ["m"]),
        node("ReduceMean", ["m", "axes"], ["y"], keepdims=0),
    ]
    shape = (4, 4, 3, 3)
    constants = {
        "s": np.float32(0.02), "z": np.uint8(128), "z1": np.int8(0),
        "w1": RANDOM.integers(-8, 8, (4, 3, 3, 3)).astype(np.int8),
        "w2": RANDOM.standard_normal(shape).astype(np.float32),
        "w3": RANDOM.integers(-128, 128, shape).astype(np.int8), "axes": np.array([2, 3]),
    }  # fmt: skip
    return model(nodes, inputs={"x": ["N", 3, height, 8]}, outputs=["y"], constants=constants)


def test_what_a_file_holds(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    path = written(mixed(), tmp_path / "net.onnx")
    assert run(monkeypatch, "info", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bytes"] == path.stat().st_size and shown["opset"] == 21
    assert shown["inputs"] == [{"name": "x", "type": "float", "sizes": ["N", 3, 8, 8]}]
    assert shown["operators"]["Conv"] == 3 and shown["unsupported"] == []
    assert shown["parameters"] == 108 + 144 + 144 + 3  # the scale and two zero points
    layers = {layer["name"]: layer for layer in shown["layers"]}
    assert list(layers) == ["first", "second", "third"]
    assert [layer["bits"] for layer in layers.values()] == [4, None, None]
    assert layers["second"]["why_float"] == ""
    assert "its input is not quantized" in layers["third"]["why_float"]
    assert not any(layer["why_never"] for layer in layers.values())
    (part,) = shown["in_float"].values()
    products = 4 * 8 * 8 * 8
    assert shown["macs"] == (108 + 2 * 144) * 64 + products
    assert part["share"] == pytest.approx(products / shown["macs"])
    assert run(monkeypatch, "info", path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("native, 4 bits", "input x: float [N, 3, 8, 8]", "3 Conv", "whatever a plan says"):
        assert text in printed


def test_free_sizes(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    path = written(mixed("height"), tmp_path / "net.onnx")
    found = describe(path)
    assert not found.layers and "numbers or ranges, for x.2 (height)" in found.problem
    assert run(monkeypatch, "info", path, "--image-size", 8, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["layers"]) == 3 and not shown["problem"]
    assert run(monkeypatch, "info", "--image-size", 8) == 2
    assert "--image-size is for ONNX files" in capsys.readouterr().err


def test_what_cannot_be_followed_is_shown_all_the_same(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    made = model(
        [
            node("NonZero", ["x"], ["a"]),
            onnx.helper.make_node("Magic", ["x"], ["y"], name="wand", domain="com.example"),
        ],
        inputs={"x": [1, 3]},
        outputs=["a", "y"],
    )
    path = written(made, tmp_path / "net.onnx")
    found = describe(path)
    assert found.unsupported == ("NonZero", "com.example.Magic")
    assert found.problem.startswith("operators that are not supported: NonZero (first")
    assert run(monkeypatch, "info", path) == 0
    assert "cannot be followed: operators" in capsys.readouterr().out


def test_bad_files(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(mixed().SerializeToString()[:200])
    assert run(monkeypatch, "info", path) == 1
    assert "cut.onnx: not an ONNX model, or one cut short" in capsys.readouterr().err
    made = mixed()
    made.opset_import[0].version = 6
    assert run(monkeypatch, "info", written(made, tmp_path / "old.onnx")) == 1
    assert "old.onnx: opset 6 is not supported" in capsys.readouterr().err
    assert run(monkeypatch, "info", tmp_path / "none.onnx") == 1
    assert "none.onnx: does not exist" in capsys.readouterr().err
