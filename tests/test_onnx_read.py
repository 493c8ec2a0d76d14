"""Networks from ONNX files: what they compute, their layers' names, batches, sizes, options."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.errors import InputError, UnsupportedModelError
from tests.helpers_onnx import by_runtime, imported, model, node, onnx

RANDOM = np.random.default_rng(1)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def classifier(batch=1, opset=17):
    """Convolution, batch norm, relu, pool, residual, flatten by a shape, linear."""
    nodes = [
        node("Conv", ["x", "stem.conv.weight"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], epsilon=1e-3),
        node("Relu", ["n"], ["r"]),
        onnx.helper.make_node(
            "Conv", ["r", "w2", "b2"], ["d"], name="/block/block.0/conv/Conv", group=2,
            pads=[0, 0, 1, 1], kernel_shape=[2, 2],
        ),
        node("Add", ["d", "r"], ["s"]),
        node("MaxPool", ["s"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["p", "shape"], ["f"]),
        node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]  # fmt: skip
    constants = {
        "stem.conv.weight": normal(8, 3, 3, 3), "g": normal(8), "b": normal(8), "m": normal(8),
        "v": np.abs(normal(8)) + 0.5, "w2": normal(8, 4, 2, 2), "b2": normal(8),
        "shape": np.array([batch if isinstance(batch, int) else 0, -1]),
        "fc.weight": normal(5, 128), "fc.bias": normal(5),
    }  # fmt: skip
    return model(
        nodes, inputs={"x": [batch, 3, 8, 8]}, outputs=["y"], constants=constants, opset=opset
    )


@pytest.mark.parametrize("batch", [1, 4, "N"])
def test_classifier_for_any_batch(batch):
    made = classifier(batch)
    net = imported(made)
    x = torch.from_numpy(normal(4, 3, 8, 8))
    count = 1 if batch == 1 else 4
    wanted = [by_runtime(made.SerializeToString(), part)[0] for part in x.split(count)]
    np.testing.assert_allclose(net(x).detach(), np.concatenate(wanted), rtol=1e-4, atol=1e-4)
    assert net(x[:3]).shape == (3, 5)


def test_layers_have_the_names_of_the_file():
    net = imported(classifier())
    assert type(net.get_submodule("stem.conv")) is nn.Conv2d
    assert isinstance(net.get_submodule("block.0.conv"), nn.Conv2d)
    assert type(net.get_submodule("fc")) is nn.Linear
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    x = torch.from_numpy(normal(2, 3, 8, 8))
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    with pytest.raises(TypeError, match="capture makes of it can"):
        pickle.dumps(net)


def test_names_within_names_of_layers():
    names = ("stem", "stem.inner", "stem.inner.most", "a.b", "a")
    constants = {f"{name}.weight": normal(3, 3, 1, 1) for name in names}
    nodes = [
        node("Conv", ["x" if k == 0 else f"v{k}", f"{name}.weight"], [f"v{k + 1}"])
        for k, name in enumerate(names)
    ]
    net = imported(model(nodes, inputs={"x": [1, 3, 4, 4]}, outputs=["v5"], constants=constants))
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert layers == ["stem", "stem_inner", "stem_inner_most", "a.b", "a_2"]


def test_every_step_takes_it():
    net = imported(classifier())
    x = torch.from_numpy(normal(16, 3, 8, 8))
    captured = ada.capture(net)  # the file says what it is called with
    assert captured.signature.describe().startswith("(x [batch, 3, 8, 8]")
    with pytest.raises(InputError):
        captured(x[:, :, :7])
    assert torch.equal(pickle.loads(pickle.dumps(captured))(x), captured(x))
    layers = [n for n, m in captured.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert layers == ["stem.conv", "block.0.conv", "fc"]
    result = ada.compress(net, [x], 8, repair=False, progress=False)
    engine = ada.compile(result.model, x[:2], policy="native", weights="resident", strict=True)
    assert torch.equal(engine(x), result.model(x))
    with torch.no_grad():
        wanted = net(x)
    assert float((engine(x) - wanted).abs().max()) < 0.1 * float(wanted.abs().max())


def test_shape_arithmetic_of_exporters():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Gather", ["s", "three"], ["w"]),
        node("Mul", ["w", "three"], ["w3"]),
        node("Unsqueeze", ["n", "axes"], ["n1"]),
        node("Unsqueeze", ["w3", "axes"], ["w1"]),
        node("Concat", ["n1", "w1", "rest"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"], ["y"]),
    ]
    constants = {
        "zero": np.int64(0), "three": np.int64(3), "axes": np.array([0]), "rest": np.array([-1]),
    }  # fmt: skip
    made = model(nodes, inputs={"x": ["N", 2, 6, 5]}, outputs=["y"], constants=constants, opset=13)
    net = imported(made)
    x = torch.from_numpy(normal(7, 2, 6, 5))
    assert torch.equal(net(x), x.reshape(7, 15, -1))
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert torch.equal(program.module()(x[:3]), net(x[:3]))


def test_sizes_are_checked():
    net = imported(classifier())
    with pytest.raises(InputError, match=r"input 'x': expected sizes \[any, 3, 8, 8\], got"):
        net(torch.zeros(1, 3, 9, 8))


def test_bias_behind_a_product_is_the_layers():
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])]
    constants = {"w": normal(6, 4), "b": normal(4)}
    made = model(nodes, inputs={"x": ["N", 3, 6]}, outputs=["y"], constants=constants)
    net = imported(made)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 1 and layers[0].bias is not None
    assert not any("add" in str(n.target) for n in net.graph.nodes)
    x = torch.from_numpy(normal(2, 3, 6))
    np.testing.assert_allclose(
        net(x).detach(), by_runtime(made.SerializeToString(), x)[0], rtol=1e-5, atol=1e-5
    )


def test_one_layer_called_twice():
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    made = model(
        nodes, inputs={"x": [1, 3, 5, 5]}, outputs=["y"], constants={"w": normal(3, 3, 3, 3)}
    )
    net = imported(made)
    assert len([m for m in net.modules() if isinstance(m, nn.Conv2d)]) == 1


def test_strided_view_of_the_exporter():
    nodes = [node("Reshape", ["x", "flat"], ["f"]), node("Gather", ["f", "places"], ["y"])]
    constants = {"flat": np.array([-1]), "places": np.arange(6).reshape(1, 6, 1)}
    made = model(nodes, inputs={"x": [1, 2, 3]}, outputs=["y"], constants=constants)
    x = torch.from_numpy(normal(4, 2, 3))
    assert torch.equal(imported(made)(x), x.reshape(4, 6, 1))


def test_several_inputs_and_results():
    nodes = [node("Add", ["a", "b"], ["s"]), node("Mul", ["a", "b"], ["p"])]
    made = model(nodes, inputs={"a": ["N", 3], "b": ["N", 3]}, outputs=["s", "p"])
    a, b = torch.from_numpy(normal(2, 3)), torch.from_numpy(normal(2, 3))
    total, product = imported(made)(a, b)
    assert torch.equal(total, a + b) and torch.equal(product, a * b)


def test_functions_of_the_file_are_inlined():
    made = model([node("Relu", ["x"], ["h"])], inputs={"x": [1, 4]}, outputs=["y"])
    body = [onnx.helper.make_node("Neg", ["i"], ["o"])]
    imports = [onnx.helper.make_opsetid("", 21)]
    made.functions.append(onnx.helper.make_function("own", "Twist", ["i"], ["o"], body, imports))
    made.graph.node.append(onnx.helper.make_node("Twist", ["h"], ["y"], domain="own"))
    made.opset_import.append(onnx.helper.make_opsetid("own", 1))
    x = torch.from_numpy(normal(3, 4))
    assert torch.equal(imported(made)(x), -x.relu())


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
def test_opsets(opset):
    made = classifier(opset=opset)
    x = torch.from_numpy(normal(1, 3, 8, 8))
    np.testing.assert_allclose(
        imported(made)(x).detach(), by_runtime(made.SerializeToString(), x)[0], rtol=1e-4, atol=1e-4
    )


def test_same_padding_with_stride():
    nodes = [node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])]
    made = model(
        nodes, inputs={"x": [1, 3, 8, 7]}, outputs=["y"], constants={"w": normal(4, 3, 3, 3)}
    )
    net = imported(made)
    x = torch.from_numpy(normal(2, 3, 8, 7))
    wanted = np.concatenate([by_runtime(made.SerializeToString(), part)[0] for part in x.split(1)])
    np.testing.assert_allclose(net(x).detach(), wanted, rtol=1e-4, atol=1e-4)
    captured = ada.capture(net)
    assert [n.op for n in captured.graph.nodes] == ["placeholder", "call_module", "output"]


def test_module_names_in_errors():
    made = model(
        [node("Dropout", ["x", "ratio", "training"], ["y"])],
        inputs={"x": [1, 3]},
        outputs=["y"],
        constants={"ratio": np.float32(0.5), "training": np.array(True)},
    )
    with pytest.raises(UnsupportedModelError, match="Dropout y_node: it drops values"):
        imported(made)


def test_command_line(tmp_path, monkeypatch, capsys):
    """`adalayer compress net.onnx`: the file brings its weights along."""
    from adalayer_native.cli import main

    monkeypatch.chdir(tmp_path)
    nodes = [
        node("Conv", ["x", "conv.weight"], ["c"], strides=[4, 4]),
        node("Relu", ["c"], ["r"]),
        node("Flatten", ["r"], ["f"]),
        node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
    ]
    constants = {"conv.weight": normal(4, 3, 4, 4), "fc.weight": normal(10, 256)}
    shape = ["N", 3, "H", "W"]
    made = model(nodes, inputs={"x": shape}, outputs=["y"], constants=constants)
    onnx.save(made, "net.onnx")

    def told(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["adalayer", *arguments, "--json"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None)
        return json.loads(capsys.readouterr().out)

    report = told(
        "compress", "net.onnx", "--data", "digits", "--bits", "8", "--method", "uniform",
        "--epochs", "0", "--calibration", "64", "--out", "out", "--quiet",
    )  # fmt: skip
    assert report["model"] == "net.onnx"
    assert (tmp_path / "out" / "model.ada").is_file()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [entry["name"] for entry in plan["layers"]] == ["conv", "fc"]
    # What comes after it needs no weights either.
    compared = told("compare", "out", "--samples", "32", "--no-suggest")
    assert {row["name"] for row in compared["rows"]} >= {"conv", "fc"}
    assert told("compile", "out")["bytes"] == (tmp_path / "out" / "model.ada").stat().st_size


def test_command_line_needs_weights_elsewhere(monkeypatch, capsys):
    from adalayer_native.cli import main

    monkeypatch.setattr(
        "sys.argv", ["adalayer", "compress", "resnet20", "--data", "digits", "--bits", "8"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "give --weights" in capsys.readouterr().err
