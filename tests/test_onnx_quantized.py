"""Quantized networks from ONNX files keep their integers, or it is said why not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.nn.layer import NativeLayer
from tests.helpers_onnx import by_runtime, imported, model, node, onnx

RANDOM = np.random.default_rng(2)
T = onnx.TensorProto
# ONNX type: lowest and highest integer.
KINDS = {"INT8": (-128, 127), "INT4": (-8, 7), "INT2": (-2, 1)}


def quantized_conv(weight, zero, scale, axis=0, kind="UINT8", a_zero=110, opset=25):
    """x → Q → DQ → Conv(DQ(w)) → Relu → Q → DQ → y."""
    number = getattr(T, kind)
    a_lowest = 0 if kind.startswith("U") else -128
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=axis),
        onnx.helper.make_node("Conv", ["d", "wf", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "ys", "yz"], ["p"]),
        node("DequantizeLinear", ["p", "ys", "yz"], ["y"]),
    ]
    constants = {
        "w": weight, "wz": zero, "ws": np.asarray(scale, np.float32),
        "xs": np.float32(0.03), "xz": (np.array(a_zero + a_lowest), number),
        "ys": np.float32(0.05), "yz": (np.array(a_lowest), number),
        "b": np.linspace(-0.5, 0.5, 8).astype(np.float32),
    }  # fmt: skip
    return model(
        nodes, inputs={"x": ["N", 3, 6, 6]}, outputs=["y"], constants=constants, opset=opset
    )


def weights(low, high, kind, shape=(8, 3, 3, 3)):
    values = RANDOM.integers(low, high + 1, shape)
    values.flat[:2] = low, high
    return values, getattr(T, kind)


def steps_apart(net, made, scale=0.05):
    """Largest difference to ONNX Runtime in steps, and the share of values that differ."""
    x = torch.from_numpy(RANDOM.standard_normal((4, 3, 6, 6)).astype(np.float32))
    wanted = by_runtime(made.SerializeToString(), x)[0]
    apart = np.rint((net(x).detach().numpy() - wanted) / scale)
    return np.abs(apart).max(), (apart != 0).mean()


@pytest.mark.parametrize("act", ["UINT8", "INT8"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("channels", [1, 8])
def test_convolution(kind, act, channels):
    low, high = KINDS[kind]
    weight = weights(low, high, kind)
    zero = (np.zeros(channels) if channels > 1 else np.array(0), weight[1])
    scale = np.linspace(0.01, 0.02, channels) if channels > 1 else np.float32(0.01)
    made = quantized_conv(weight, zero, scale, kind=act)
    net = imported(made)
    layer = net.get_submodule("conv")
    assert isinstance(layer, ada.nn.Conv2d)
    assert layer.bits == {"INT8": 8, "INT4": 4, "INT2": 2}[kind]
    assert torch.equal(layer.weight_int(), torch.from_numpy(weight[0]).to(torch.int8))
    assert torch.equal(layer.weight_scale, torch.tensor(np.float32(scale)).expand(8))
    assert (layer.input_scale, layer.input_zero_point) == (pytest.approx(0.03), 110)
    assert net.meta["onnx"]["layers"] == {"conv": layer.bits}
    worst, share = steps_apart(net, made)
    assert worst <= 1 and share < 0.01


@pytest.mark.parametrize(
    ("kind", "low", "high", "zero", "bits"),
    [
        ("UINT8", 0, 255, 128, 8),
        ("UINT8", 3, 130, 128, 8),
        ("UINT4", 0, 15, 8, 4),
        ("UINT4", 0, 15, 0, 5),
        ("UINT2", 0, 3, 2, 2),
        ("INT8", -16, 15, 0, 5),
    ],
)
def test_zero_points_and_widths(kind, low, high, zero, bits):
    weight = weights(low, high, kind)
    made = quantized_conv(weight, (np.array(zero), weight[1]), 0.02)
    layer = imported(made).get_submodule("conv")
    assert layer.bits == bits
    assert torch.equal(layer.weight_int().int(), torch.from_numpy(weight[0] - zero).int())


def said(made, **options):
    """The module and its one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = imported(made, **options)
    assert len(caught) == 1
    return net, str(caught[0].message)


def test_integers_of_nine_bits_stay_in_float():
    weight = weights(0, 255, "UINT8")
    net, why = said(quantized_conv(weight, (np.array(7), weight[1]), 0.02))
    assert "'conv': its integers less the zero point go from -7 to 248" in why
    layer = net.get_submodule("conv")
    assert type(layer) is nn.Conv2d
    exact = torch.from_numpy(((weight[0] - 7) * np.float32(0.02)).astype(np.float32))
    assert torch.equal(layer.weight, exact)
    assert net.meta["onnx"]["layers"]["conv"] in why


def test_scales_along_inputs_stay_in_float():
    weight = weights(-8, 7, "INT4")
    made = quantized_conv(weight, (np.zeros(3), weight[1]), [0.01, 0.02, 0.03], axis=1)
    net, why = said(made)
    assert "its scales lie along axis 1; expected one per output channel" in why
    assert steps_apart(net, made)[0] <= 1


def test_blocks_stay_in_float():
    weight = RANDOM.integers(-8, 8, (6, 4))
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws"], ["wf"], axis=0, block_size=3),
        onnx.helper.make_node("MatMul", ["d", "wf"], ["y"], name="product"),
    ]
    constants = {
        "s": np.float32(0.1), "z": np.uint8(128), "w": (weight, T.INT4),
        "ws": np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32),
    }  # fmt: skip
    made = model(nodes, inputs={"x": ["N", 6]}, outputs=["y"], constants=constants)
    net, why = said(made)
    assert "'product': it has a scale for every block" in why
    scale = np.repeat(constants["ws"], 3, 0)
    assert torch.equal(
        net.get_submodule("product").weight, torch.from_numpy(weight * scale).T.float()
    )


def test_weights_alone_stay_in_float():
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["wf"]),
        onnx.helper.make_node("MatMul", ["x", "wf"], ["y"], name="product"),
    ]
    weight = RANDOM.integers(-128, 128, (6, 4))
    constants = {"w": (weight, T.INT8), "s": np.float32(0.5)}
    net, why = said(model(nodes, inputs={"x": ["N", 6]}, outputs=["y"], constants=constants))
    assert "'product': its input is not quantized" in why
    assert torch.equal(
        net.get_submodule("product").weight, torch.from_numpy(weight * 0.5).T.float()
    )


def test_float_weight_with_both_nodes_is_integers():
    """As some tools write them: the weight in float, rounded in the graph."""
    weight = RANDOM.standard_normal((4, 6)).astype(np.float32)
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("QuantizeLinear", ["fc.weight", "ws", "wz"], ["wq"], axis=0),
        node("DequantizeLinear", ["wq", "ws", "wz"], ["wf"], axis=0),
        node("Gemm", ["d", "wf"], ["y"], transB=1),
    ]
    scale = np.abs(weight).max(1) / 127
    constants = {
        "s": np.float32(0.1), "z": np.uint8(128), "fc.weight": weight, "ws": scale,
        "wz": (np.zeros(4), T.INT8),
    }  # fmt: skip
    net = imported(model(nodes, inputs={"x": ["N", 6]}, outputs=["y"], constants=constants))
    layer = net.get_submodule("fc")
    assert isinstance(layer, ada.nn.Linear)
    expected = np.rint(weight / scale[:, None]).astype(np.int8)
    assert torch.equal(layer.weight_int(), torch.from_numpy(expected))


def test_moves_between_the_two_nodes():
    """Pooling and reshapes on the integers themselves, as QOperator files have them."""
    weight = weights(-8, 7, "INT4", (4, 12))
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("MaxPool", ["q"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", ["m"], ["f"]),
        node("DequantizeLinear", ["f", "s", "z"], ["d"]),
        node("DequantizeLinear", ["w", "ws"], ["wf"]),
        onnx.helper.make_node("Gemm", ["d", "wf"], ["y"], transB=1, name="fc"),
    ]
    constants = {"s": np.float32(0.1), "z": np.uint8(100), "w": weight, "ws": np.float32(0.3)}
    made = model(nodes, inputs={"x": [1, 3, 4, 4]}, outputs=["y"], constants=constants)
    net = imported(made)
    assert isinstance(net.get_submodule("fc"), ada.nn.Linear)
    x = torch.from_numpy(RANDOM.standard_normal((1, 3, 4, 4)).astype(np.float32))
    np.testing.assert_allclose(
        net(x).numpy(), by_runtime(made.SerializeToString(), x)[0], rtol=1e-5, atol=1e-5
    )


def qlinear_conv(dtype=np.uint8):
    """QLinearConv of a uint8 input, with a bias."""
    weight = RANDOM.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8)
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(120), "w": weight,
        "ws": np.linspace(0.005, 0.01, 4).astype(np.float32), "wz": np.zeros(4, np.int8),
        "ys": np.float32(0.05), "yz": np.uint8(130),
        "b": np.array([1000, -2000, 3, 0], np.int32),
    }  # fmt: skip
    operands = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"]
    made = model(
        [onnx.helper.make_node("QLinearConv", operands, ["y"], name="conv", pads=[1] * 4)],
        inputs={"x": [1, 3, 6, 6]}, outputs=["y"], constants=constants, kind=T.UINT8,
    )  # fmt: skip
    made.graph.output[0].type.tensor_type.elem_type = T.UINT8
    return made


def test_qlinear_conv():
    made = qlinear_conv()
    net = imported(made)
    assert isinstance(net.get_submodule("conv"), ada.nn.Conv2d)
    x = torch.from_numpy(RANDOM.integers(0, 256, (1, 3, 6, 6)).astype(np.uint8))
    wanted = by_runtime(made.SerializeToString(), x)[0]
    got = net(x)
    assert got.dtype == torch.uint8
    apart = np.abs(got.numpy().astype(int) - wanted.astype(int))
    assert apart.max() <= 1 and (apart != 0).mean() < 0.02


@pytest.mark.parametrize("zeros", [(0, 0), (3, 5)])
def test_integer_convolution_is_exact(zeros):
    weight = RANDOM.integers(0, 100, (4, 3, 3, 3)).astype(np.uint8)
    constants = {"w": weight, "xz": np.uint8(zeros[0]), "wz": np.uint8(zeros[1])}
    made = model(
        [node("ConvInteger", ["x", "w", "xz", "wz"], ["y"])],
        inputs={"x": [1, 3, 6, 6]}, outputs=["y"], constants=constants, kind=T.UINT8,
    )  # fmt: skip
    made.graph.output[0].type.tensor_type.elem_type = T.INT32
    x = torch.from_numpy(RANDOM.integers(0, 256, (2, 3, 6, 6)).astype(np.uint8))
    net = imported(made)
    assert any(isinstance(m, NativeLayer) for m in net.modules())
    wanted = torch.nn.functional.conv2d(
        x.double() - zeros[0], torch.from_numpy(weight).double() - zeros[1]
    )
    assert torch.equal(net(x), wanted.int())


def test_integer_product_of_many_terms_is_exact():
    """Sums that float32 does not hold."""
    weight = RANDOM.integers(-128, 128, (4096, 3)).astype(np.int8)
    made = model(
        [node("MatMulInteger", ["x", "w"], ["y"])],
        inputs={"x": ["N", 4096]}, outputs=["y"], constants={"w": weight}, kind=T.UINT8,
    )  # fmt: skip
    made.graph.output[0].type.tensor_type.elem_type = T.INT32
    x = torch.full((2, 4096), 255, dtype=torch.uint8)
    wanted = x.long() @ torch.from_numpy(weight).long()
    assert torch.equal(imported(made)(x).long(), wanted)


def test_dynamic_quantization_is_followed():
    weight = RANDOM.integers(-128, 128, (8, 3)).astype(np.int8)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("MatMulInteger", ["q", "w", "z"], ["i"]),
        node("Cast", ["i"], ["f"], to=T.FLOAT),
        node("Mul", ["s", "ws"], ["t"]),
        node("Mul", ["f", "t"], ["y"]),
    ]
    constants = {"w": weight, "ws": np.float32(0.01)}
    made = model(nodes, inputs={"x": ["N", 8]}, outputs=["y"], constants=constants)
    x = torch.from_numpy(RANDOM.standard_normal((3, 8)).astype(np.float32))
    np.testing.assert_allclose(
        imported(made)(x).numpy(), by_runtime(made.SerializeToString(), x)[0], rtol=1e-5, atol=1e-6
    )


def test_engine_runs_it_whole():
    weight = weights(-8, 7, "INT4")
    made = quantized_conv(weight, (np.zeros(8), weight[1]), np.linspace(0.01, 0.02, 8))
    net = imported(made)
    x = torch.from_numpy(RANDOM.standard_normal((4, 3, 6, 6)).astype(np.float32))
    engine = ada.compile(net, x[:2], policy="native", weights="resident", strict=True)
    assert torch.equal(engine(x), net(x))


def test_without_integers_it_can_be_compressed_anew():
    weight = weights(-8, 7, "INT4")
    made = quantized_conv(weight, (np.zeros(8), weight[1]), 0.02)
    net = imported(made, integers=False)
    layer = net.get_submodule("conv")
    assert type(layer) is nn.Conv2d
    assert torch.equal(layer.weight, torch.from_numpy((weight[0] * np.float32(0.02)).astype("f")))
    x = torch.from_numpy(RANDOM.standard_normal((4, 3, 6, 6)).astype(np.float32))
    # The ends of the grids are still there, and what lies between them is not rounded.
    assert torch.equal(net(100 * x.sign()), net(1000 * x.sign()))
    assert not torch.equal(net(x), imported(made)(x))
    result = ada.compress(net, [x], 4, repair=False, progress=False)
    assert isinstance(result.model.get_submodule("conv"), ada.nn.Conv2d)
