"""LSTM, GRU and RNN operators of ONNX files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.errors import UnsupportedModelError
from tests.helpers_onnx import by_runtime, converted, imported, model, node

RANDOM = np.random.default_rng(3)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN, INPUTS, STEPS = 6, 5, 7


def normal(*shape):
    return (0.5 * RANDOM.standard_normal(shape)).astype(np.float32)


def network(kind, direction="forward", bias=True, begin=False, outputs=("y",), **attributes):
    """[N, T, I] to the operator's results, the batch first in all of them."""
    count = 2 if direction == "bidirectional" else 1
    rows = GATES[kind] * HIDDEN
    constants = {"w": normal(count, rows, INPUTS), "r": normal(count, rows, HIDDEN)}
    names = ["t", "w", "r", "b" if bias else "", ""]
    if bias:
        constants["b"] = normal(count, 2 * rows)
    nodes = [node("Transpose", ["x"], ["t"], perm=[1, 0, 2])]
    if begin:
        for name in ("h", "c")[: 1 + (kind == "LSTM")]:
            constants[name] = normal(count, 1, HIDDEN)
            names.append(name)
    if kind == "GRU":
        attributes.setdefault("linear_before_reset", 1)
    made = ["steps", "last", "cells"][: 3 if kind == "LSTM" else 2]
    nodes.append(node(kind, names, made, hidden_size=HIDDEN, direction=direction, **attributes))
    nodes += [
        node("Transpose", ["steps"], ["y"], perm=[2, 0, 1, 3]),
        node("Transpose", ["last"], ["z"], perm=[1, 0, 2]),
        *([node("Transpose", ["cells"], ["v"], perm=[1, 0, 2])] if kind == "LSTM" else []),
    ]
    size = 1 if begin else "N"
    return model(
        nodes, inputs={"x": [size, STEPS, INPUTS]}, outputs=outputs, constants=constants, opset=21
    )


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_as_the_runtime_has_them(kind, direction):
    outputs = ("y", "z", "v")[: 3 if kind == "LSTM" else 2]
    for options in ({}, {"bias": False}, {"begin": True}):
        made = network(kind, direction, outputs=outputs, **options)
        net = imported(made)
        x = torch.from_numpy(normal(1 if "begin" in options else 3, STEPS, INPUTS))
        wanted = by_runtime(made.SerializeToString(), x)
        got = net(x)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one.detach(), other, rtol=1e-4, atol=1e-5)


def test_activations_of_a_plain_one():
    made = network("RNN", activations=["Relu"])
    net = imported(made)
    assert any(isinstance(m, nn.RNN) and m.nonlinearity == "relu" for m in net.modules())
    x = torch.from_numpy(normal(2, STEPS, INPUTS))
    wanted = by_runtime(made.SerializeToString(), x)[0]
    np.testing.assert_allclose(net(x).detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "attributes", "text"),
    [
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, "activations Sigmoid, Relu, Tanh"),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}, "activations HardSigmoid, Tanh"),
        ("RNN", {"activations": ["Softsign"]}, "activations Softsign; expected Tanh or Relu"),
        ("GRU", {"linear_before_reset": 0}, "linear_before_reset 0"),
        ("LSTM", {"clip": 3.0}, "clip 3.0"),
        ("LSTM", {"input_forget": 1}, "input_forget"),
        ("RNN", {"direction": "sideways"}, "direction 'sideways'"),
        ("LSTM", {"layout": 1}, "W of sizes|expected"),
    ],
)
def test_what_torch_does_not_have_is_named(kind, attributes, text):
    if "layout" in attributes:
        made = network(kind)
        made.graph.initializer[1].CopyFrom(made.graph.initializer[0])
        made.graph.initializer[1].name = "r"
    else:
        made = network(kind, **attributes)
    with pytest.raises(UnsupportedModelError, match=f"{kind}.*({text})"):
        imported(made)


def test_in_the_engine(tmp_path):
    made = network("LSTM", "bidirectional")
    flat = node("Reshape", ["y", "shape"], ["rows"])
    last = node("MatMul", ["rows", "m"], ["logits"])
    held = model(
        [*made.graph.node[:3], flat, last],
        inputs={"x": ["N", STEPS, INPUTS]},
        outputs=["logits"],
        constants={
            **{n.name: onnx_array(n) for n in made.graph.initializer},
            "shape": np.array([0, -1]), "m": normal(STEPS * 2 * HIDDEN, 3),
        },
    )  # fmt: skip
    x = torch.from_numpy(normal(4, STEPS, INPUTS))
    net = imported(held)
    native = converted(net, x)
    engine = ada.compile(native, x, policy="native", strict=True)
    assert torch.equal(engine(x), native(x))
    wanted = net(x).detach()
    assert float((native(x).detach() - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
    engine.save(tmp_path / "net.ada")
    assert torch.equal(ada.load(tmp_path / "net.ada")(x), engine(x))


def onnx_array(tensor):
    onnx = pytest.importorskip("onnx")
    return onnx.numpy_helper.to_array(tensor)
