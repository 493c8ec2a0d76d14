"""Files of ONNX Runtime's quantizer with operators of its own domain (``QOperator``)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adalayer_native as ada
from adalayer_native.errors import UnsupportedModelError
from adalayer_native.nn.layer import NativeLayer
from tests.helpers_onnx import by_runtime, imported, model, onnx

T = onnx.TensorProto
RANDOM = np.random.default_rng(8)
X = ("x", "xs", "xz")


def ours(kind: str, inputs: Any, **attributes: Any) -> Any:
    """A node of ONNX Runtime's domain, whose result is q."""
    return onnx.helper.make_node(
        kind, inputs, ["q"], name="op", domain="com.microsoft", **attributes
    )


def single(node: Any, kind: int, shape: tuple[int, ...], **constants: Any) -> Any:
    """x → the node → q, both integers of a kind."""
    lowest = -128 if kind == T.INT8 else 0
    held = {
        "xs": np.float32(0.04), "xz": (np.array(117 + lowest), kind),
        "ys": np.float32(0.03), "yz": (np.array(90 + lowest), kind),
        **constants,
    }  # fmt: skip
    made = model([node], inputs={"x": shape}, outputs=["q"], constants=held, kind=kind, opset=13)
    made.graph.output[0].type.tensor_type.elem_type = kind
    made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return made


def integers(kind: int, *shape: int) -> np.ndarray:
    low = -128 if kind == T.INT8 else 0
    return RANDOM.integers(low, low + 256, shape).astype(np.int8 if low else np.uint8)


def apart(made: Any, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """Levels between our result and ONNX Runtime's."""
    x = torch.from_numpy(integers(kind, *shape))
    wanted = by_runtime(made.SerializeToString(), x)[0]
    got = imported(made)(x)
    assert got.shape == wanted.shape and got.numpy().dtype == wanted.dtype
    return np.abs(got.numpy().astype(int) - wanted.astype(int))


WINDOW = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
Y = ("ys", "yz")
# Operator, attributes, operands, shape of x, and how many levels ONNX Runtime may be away.
CASES = {
    "add": ("QLinearAdd", {}, [*X, "b", "bs", "bz", *Y], (2, 3, 4, 4), 0),
    "mul": ("QLinearMul", {}, [*X, "b", "bs", "bz", *Y], (2, 3, 4, 4), 0),
    "sigmoid": ("QLinearSigmoid", {}, [*X, *Y], (2, 7), 0),
    "leaky": ("QLinearLeakyRelu", {"alpha": 0.2}, [*X, *Y], (2, 7), 0),
    "average": ("QLinearAveragePool", WINDOW, [*X, *Y], (2, 3, 7, 7), 0),
    "average, all": (
        "QLinearAveragePool", {**WINDOW, "count_include_pad": 1}, [*X, *Y], (2, 3, 7, 7), 0,
    ),
    "global": ("QLinearGlobalAveragePool", {}, [*X, *Y], (2, 3, 5, 5), 0),
    # (Its exponentials are a table of integers there.)
    "softmax": ("QLinearSoftmax", {"axis": 1, "opset": 13}, [*X, "ps", "pz"], (4, 9), 1),
    "softmax, flat": ("QLinearSoftmax", {"axis": 1, "opset": 11}, [*X, "ps", "pz"], (4, 3, 5), 1),
    "where": ("QLinearWhere", {}, ["m", *X, "b", "bs", "bz", *Y], (2, 3, 4, 4), 0),
    "concat": ("QLinearConcat", {"axis": 1}, [*Y, *X, "c", "bs", "bz", *X], (1, 3, 4, 4), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", [T.UINT8, T.INT8], ids=["uint8", "int8"])
@pytest.mark.parametrize("case", list(CASES))
def test_operator(case: str, kind: int) -> None:
    name, attributes, operands, shape, most = CASES[case]
    lowest = -128 if kind == T.INT8 else 0
    constants = {
        "m": np.array([True, False, True, True]),
        "b": (RANDOM.integers(lowest, lowest + 256, (3, 1, 1)), kind),
        "c": (RANDOM.integers(lowest, lowest + 256, (1, 2, 4, 4)), kind),
        "bs": np.float32(0.02), "bz": (np.array(130 + lowest), kind),
        "ps": np.float32(1 / 256), "pz": (np.array(lowest), kind),
    }  # fmt: skip
    used = {key: value for key, value in constants.items() if key in operands}
    found = apart(single(ours(name, operands, **attributes), kind, shape, **used), kind, shape)
    # Both compute in float32; where a product lies half-way between levels they may part.
    assert found.max() <= max(1, most) and (most or (found != 0).mean() <= 0.02)


def test_zero_points_that_are_left_out_are_0() -> None:
    """(ONNX Runtime aborts there.)"""
    x = torch.from_numpy(integers(T.UINT8, 4, 7))
    found = [
        imported(single(ours("QLinearSigmoid", operands), T.UINT8, (4, 7), xz=zero, yz=zero))(x)
        for operands, zero in (
            (["x", "xs", "", "ys"], np.uint8(9)), ([*X, *Y], np.uint8(0)),
        )
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_product(alpha: float, turned: int, per_channel: bool) -> None:
    weight = RANDOM.integers(-127, 128, (5, 12) if turned else (12, 5)).astype(np.int8)
    zero = np.zeros(5, np.int8) if per_channel else np.int8(0)
    scale = np.linspace(0.01, 0.02, 5) if per_channel else np.float32(0.012)
    node = ours("QGemm", [*X, "w", "ws", "wz", "bias", "zs", "zz"], transB=turned, alpha=alpha)
    constants = {
        "w": weight, "ws": scale.astype(np.float32), "wz": zero,
        "bias": RANDOM.integers(-3000, 3000, 5).astype(np.int32),
        "zs": np.float32(0.1), "zz": np.uint8(120),
    }  # fmt: skip
    made = single(node, T.UINT8, (6, 12), **constants)
    net = imported(made)
    layer = net.get_submodule("op")
    assert isinstance(layer, ada.nn.Linear)
    assert torch.equal(layer.weight_int(), torch.from_numpy(weight if turned else weight.T))
    found = apart(made, T.UINT8, (6, 12))
    assert found.max() <= 1 and (found != 0).mean() <= 0.05


def test_product_in_real_numbers() -> None:
    """Without a scale of the result it is a float tensor."""
    node = ours("QGemm", [*X, "w", "ws", "wz"], transB=1)
    constants = {"w": integers(T.INT8, 5, 12), "ws": np.float32(0.01), "wz": np.int8(0)}
    made = single(node, T.UINT8, (6, 12), **constants)
    made.graph.output[0].type.tensor_type.elem_type = T.FLOAT
    x = torch.from_numpy(integers(T.UINT8, 6, 12))
    wanted = by_runtime(made.SerializeToString(), x)[0]
    np.testing.assert_allclose(imported(made)(x).numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_channels_last_and_incomplete_operands_are_refused() -> None:
    node = ours("QLinearGlobalAveragePool", [*X, *Y], channels_last=1)
    with pytest.raises(UnsupportedModelError, match=r"QLinearGlobalAveragePool op: .*NCHW"):
        imported(single(node, T.UINT8, (1, 3, 4, 4)))
    node = ours("QLinearConcat", [*Y, *X, "x"], axis=1)
    with pytest.raises(UnsupportedModelError, match="QLinearConcat op: 4 operands; expected three"):
        imported(single(node, T.UINT8, (1, 3, 4, 4)))


# -- whole networks -------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = (x + self.second(x)).relu()
        x = F.pad(F.avg_pool2d(x, 2), (1, 0, 1, 0))
        x = F.adaptive_avg_pool2d(self.third(x).relu(), 1)
        return self.head(x.flatten(1)).softmax(1)


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.joined = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8 * 8 * 8, 5)

    def forward(self, x):
        x = F.relu6(self.first(x))
        y = F.silu(self.point(F.leaky_relu(self.depthwise(x), 0.1)))
        y = y * self.excite(self.squeeze(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
        y = F.interpolate(self.joined(torch.cat([y, x], 1)), scale_factor=2, mode="nearest")
        left, right = y.split(4, 1)
        y = F.avg_pool2d(torch.cat([right, left], 1), 2)
        return self.head(y.flatten(1))


def quantized(net: nn.Module, path: Any, activations: str) -> None:
    """Write what ONNX Runtime's quantizer makes of a network of images [N, 3, 16, 16]."""
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": images(8).numpy()} for _ in range(4)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    source = str(path.with_suffix(".float.onnx"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporters
        torch.onnx.export(
            net, (images(1),), source, opset_version=13, dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "N"}},
        )  # fmt: skip
        quantization.quantize_static(
            source, str(path), Reader(), quant_format=quantization.QuantFormat.QOperator,
            per_channel=True, activation_type=quantization.QuantType[activations],
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip


def images(count: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.standard_normal((count, 3, 16, 16)).astype(np.float32))


@pytest.mark.parametrize(("network", "activations"), [(Residual, "QUInt8"), (Mobile, "QInt8")])
def test_network(network: type[nn.Module], activations: str, tmp_path: Any) -> None:
    torch.manual_seed(1)
    net = network().eval()
    quantized(net, tmp_path / "net.onnx", activations)
    file = onnx.load(tmp_path / "net.onnx")
    foreign = {n.op_type for n in file.graph.node if n.domain == "com.microsoft"}
    assert {"QLinearGlobalAveragePool", "QLinearAveragePool"} < foreign
    read = ada.from_onnx(tmp_path / "net.onnx")
    layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(read.meta["onnx"]["layers"]) == len(layers)
    assert all(bits == 8 for bits in read.meta["onnx"]["layers"].values())
    assert sum(isinstance(m, NativeLayer) for m in read.modules()) == len(layers)
    held = {
        item.name: onnx.numpy_helper.to_array(item)
        for item in file.graph.initializer if item.name.endswith("weight_quantized")
    }  # fmt: skip
    own = [m.weight_int() for m in read.modules() if isinstance(m, NativeLayer)]
    for name, weight in held.items():
        assert any(torch.equal(w, torch.tensor(weight)) for w in own), name

    x = images(32)
    with torch.no_grad():
        got = read(x)
    wanted = by_runtime(str(tmp_path / "net.onnx"), x)[0]
    last = next(n for n in reversed(file.graph.node) if n.op_type == "DequantizeLinear")
    (step,) = [
        float(onnx.numpy_helper.to_array(item))
        for item in file.graph.initializer if item.name == last.input[1]
    ]  # fmt: skip
    levels = np.rint(np.abs(got.numpy() - wanted) / step)
    assert levels.max() <= 2 and (levels != 0).mean() <= 0.05
    ada.to_onnx(read, tmp_path / "again.onnx")  # as QDQ, of standard operators
    with torch.no_grad():
        assert torch.equal(ada.from_onnx(tmp_path / "again.onnx")(x), got)
    # (The engine has no softmax between two grids: that part of it runs in torch.)
    whole = network is Mobile
    engine = ada.compile(read, x[:2], policy="native", weights="resident", strict=whole)
    assert torch.equal(engine(x), got)
