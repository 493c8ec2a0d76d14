"""Native networks as QDQ ONNX: what other runtimes compute, what is in it, what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adalayer_native as ada
from adalayer_native.errors import CalibrationError, InputError, UnsupportedModelError
from adalayer_native.nn.layer import NativeLayer
from tests.helpers_onnx import by_openvino, by_runtime, converted, onnx


class Every(nn.Module):
    """Layers of every kind, with what stands between them in networks for images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.group_up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.slim = nn.Conv2d(24, 12, (1, 3), stride=2, padding=(0, 1), dilation=(1, 1))
        self.rows = nn.LayerNorm(12)
        self.mix = nn.Linear(12, 24)
        self.fc = nn.Linear(24, 7)
        with torch.no_grad():  # a negative factor turns the signs of a channel's integers
            self.norm.weight.copy_(torch.linspace(-1, 1.5, 16))

    def forward(self, x):
        x = F.relu(self.norm(self.stem(F.pad(x, (0, 1, 0, 1)))))[:, :, :16, :16]
        y = F.silu(self.deep(x)) + x
        y = F.hardswish(self.point(F.max_pool2d(y, 2)))
        a, b = self.up(y), self.group_up(y)
        c = F.interpolate(y, scale_factor=2, mode="nearest")[:, :8]
        z = torch.cat([a, F.relu6(b), c], 1)
        z = F.gelu(self.slim(F.avg_pool2d(z, 2)))
        z = self.rows(z.permute(0, 2, 3, 1))
        z = torch.sigmoid(self.mix(z)).mean((1, 2))
        return torch.softmax(self.fc(z), 1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    x = torch.randn(6, 3, 16, 16)
    bits = {"stem": 8, "deep": 5, "point": 4, "up": 3, "group_up": 4, "slim": 2, "mix": 6, "fc": 8}
    return converted(Every(), x, bits, sparsity=0.25), x, bits


@pytest.mark.parametrize("opset", [21, 25])
def test_what_others_compute(network, tmp_path, opset):
    native, x, _ = network
    path = tmp_path / "net.onnx"
    size = ada.to_onnx(native, path, opset=opset)
    assert size == path.stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    wanted = native(x).detach().numpy()
    got = by_runtime(str(path), x)[0]
    assert np.abs(got - wanted).max() < 0.02
    assert (got.argmax(1) == wanted.argmax(1)).all()
    if opset < 25:  # it knows no integers of 2 bits
        assert np.abs(by_openvino(path, x) - wanted).max() < 0.03


def test_types_and_metadata(network, tmp_path):
    native, _, bits = network
    ada.to_onnx(native, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    said = json.loads({p.key: p.value for p in model.metadata_props}["adalayer.layers"])
    assert {name: entry["bits"] for name, entry in said.items()} == bits
    stored = {name: entry["stored"] for name, entry in said.items()}
    assert stored == {name: "int4" if width <= 4 else "int8" for name, width in bits.items()}
    for name, entry in said.items():
        layer = native.get_submodule(name)
        zeros = float((layer.weight_int() == 0).float().mean())
        assert entry["sparsity"] == pytest.approx(zeros, abs=1e-5)
        assert entry["sparsity"] >= 0.2 and entry["input_bits"] == 8
    assert {node.domain for node in model.graph.node} == {""}
    assert model.opset_import[0].version == 21
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    widths = {t.name: t.data_type for t in model.graph.initializer}
    assert widths["slim.weight"] == onnx.TensorProto.INT4
    ada.to_onnx(native, tmp_path / "net.onnx", opset=25)
    widths = {t.name: t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert widths["slim.weight"] == onnx.TensorProto.INT2


def test_read_back_it_has_the_same_bits(tmp_path):
    """Convolutions and products: the same integers, scales, biases and grids, so the same sums."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(144, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    native = converted(net, x, {"0": 3, "3": 5, "5": 4, "8": 2})
    ada.to_onnx(native, tmp_path / "net.onnx")
    again = ada.from_onnx(tmp_path / "net.onnx")
    assert torch.equal(again(x), native(x))
    for name in ("0", "3", "5", "8"):
        one, two = native.get_submodule(name), again.get_submodule(name)
        assert type(one) is type(two) and one.bits == two.bits
    # And once more: from the file to a file.
    ada.to_onnx(again, tmp_path / "again.onnx")
    assert torch.equal(ada.from_onnx(tmp_path / "again.onnx")(x), native(x))
    engine = ada.compile(again, x[:2], policy="native", weights="resident", strict=True)
    assert torch.equal(engine(x), native(x))


def test_read_back_a_negative_scale_is_kept(tmp_path):
    """Of integers that reach -2^(b-1), which cannot be turned round."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[1].weight.copy_(torch.linspace(-1.5, -0.5, 8))
    x = torch.randn(4, 3, 8, 8)
    native = converted(net, x, {"0": 2, "3": 8})
    first = native.get_submodule("0")
    assert (first.weight_scale[first.weight_int().flatten(1).amin(1) == -2] < 0).any()
    ada.to_onnx(native, tmp_path / "net.onnx")
    again = ada.from_onnx(tmp_path / "net.onnx")
    assert again.meta["onnx"]["layers"] == {"0": 2, "3": 8}
    assert torch.equal(again(x), native(x))


def test_channels_that_training_has_switched_off(tmp_path):
    """Their bias is so many steps of the sums that int32 cannot hold it: their weights are 0."""
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight[[1, 2]] *= 1e-9
        net[0].bias[[1, 2]] = torch.tensor([0.73, -0.73])
        net[2].weight[:, 1] *= 4
    x = torch.randn(4, 3, 8, 8)
    native = converted(net, x)
    path = tmp_path / "net.onnx"
    ada.to_onnx(native, path)
    again = ada.from_onnx(path)
    assert torch.equal(again(x), native(x))
    zeros = again.get_submodule("0").weight_int().flatten(1).any(1)
    assert zeros.tolist() == [True, False, False, True, True, True, True, True]
    session = runtime.InferenceSession(str(path))  # with its own rewriting
    theirs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    wanted = native(x).detach().numpy()
    assert np.abs(theirs - wanted).max() < 0.02 * np.abs(wanted).max()


class Block(nn.Module):
    """Of a ConvNeXt: channels come last, so its linear layers are a product and a sum in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.wide, self.slim = nn.Linear(8, 16), nn.Linear(16, 8)
        self.layer_scale = nn.Parameter(0.5 + torch.rand(8, 1, 1))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.slim(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return self.last(x + self.layer_scale * y)


def test_read_back_and_compiled_norms_have_the_same_bits(tmp_path):
    torch.manual_seed(5)
    x = torch.randn(6, 8, 8, 8)
    native = converted(Block(), x)
    ada.to_onnx(native, tmp_path / "net.onnx")
    again = ada.from_onnx(tmp_path / "net.onnx")
    for name in ("wide", "slim"):
        assert torch.equal(again.get_submodule(name).bias, native.get_submodule(name).bias)
    engines = [ada.compile(m, x, policy="native", weights="resident") for m in (native, again)]
    assert torch.equal(engines[0](x), engines[1](x))


def test_inputs_of_fewer_bits_keep_their_ends(tmp_path):
    torch.manual_seed(2)
    x = torch.randn(4, 3, 8, 8)
    captured = ada.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    plan = ada.allocate(None, ada.Budget(bits=4), method="uniform", model=captured, calibration=[x])
    plan["2"].activation_bits = 4
    prepared = ada.prepare(captured, plan)
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    ada.to_onnx(native, tmp_path / "net.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node].count("Clip") == 1
    wanted = native(10 * x).detach().numpy()
    np.testing.assert_allclose(by_runtime(str(tmp_path / "net.onnx"), 10 * x)[0], wanted, atol=1e-4)


def test_layers_in_float(tmp_path):
    torch.manual_seed(3)
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    native = converted(net, x, {"0": 4, "2": None, "4": None})
    ada.to_onnx(native, tmp_path / "net.onnx")
    got = by_runtime(str(tmp_path / "net.onnx"), x)[0]
    np.testing.assert_allclose(got, native(x).detach().numpy(), rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """Ends with what no operator of ONNX's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        return torch.special.bessel_j0(y).sum((2, 3)) + torch.logcumsumexp(y, 1).sum((2, 3))


def test_what_cannot_be_written_is_named_at_once(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    native = converted(Odd(), x)
    with pytest.raises(UnsupportedModelError, match=r"(?s)bessel_j0.*logcumsumexp"):
        ada.to_onnx(native, tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_what_is_not_converted(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(UnsupportedModelError, match="no native layers"):
        ada.to_onnx(net, tmp_path / "a.onnx", x)
    captured = ada.capture(net, x)
    plan = ada.allocate(None, ada.Budget(bits=4), method="uniform", model=captured, calibration=[x])
    with pytest.raises(CalibrationError, match="prepared"):
        ada.to_onnx(ada.prepare(captured, plan), tmp_path / "a.onnx")
    with pytest.raises(InputError, match="opset must be 13 to 25"):
        ada.to_onnx(net, tmp_path / "a.onnx", opset=12)


def test_a_file_is_whole_or_absent(network, tmp_path, monkeypatch):
    native, _, _ = network
    path = tmp_path / "net.onnx"
    path.write_bytes(b"before")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match=r"net\.onnx"):
        ada.to_onnx(native, path)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["net.onnx"]


class Choices(nn.Module):
    """Comparisons, choices, orders and sums along axes behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        y = self.conv(x)
        y = torch.maximum(y, y.roll((1, -2), (2, 3)))
        y = torch.where(y > 0.1, y, torch.minimum(y.flip(3), y * 0.5))
        y = y.masked_fill((y >= 1.5) | (y != y), 0.25)
        rows, columns = y.mean(2), y.mean(3)
        mixed = torch.einsum("bcw, bdw -> bcd", rows, columns)
        mixed = torch.stack(mixed.unbind(1), 2).cumsum(2)
        most, place = mixed.max(2)
        z = self.fc(most + mixed.min(1).values)
        top, order = z.topk(3, 1)
        return z, z.argmax(1), z.argmin(1, keepdim=True), top, order, place, z.sort(1)[0]


@pytest.fixture(scope="module")
def choices():
    torch.manual_seed(1)
    x = torch.randn(5, 3, 6, 6)
    return converted(Choices(), x, {"conv": 8, "fc": 8}), x


def test_choices(choices, tmp_path):
    native, x = choices
    path = tmp_path / "net.onnx"
    ada.to_onnx(native, path)
    onnx.checker.check_model(str(path), full_check=True)
    wanted, got = [value.detach().numpy() for value in native(x)], by_runtime(str(path), x)
    assert [value.dtype for value in got] == [value.dtype for value in wanted]
    close = np.abs(got[0] - wanted[0]).max(1) < 1e-4  # else a level went another way
    assert close.mean() >= 0.6
    for ours, others in zip(wanted, got, strict=True):
        assert ours.shape == others.shape
        np.testing.assert_allclose(others[close], ours[close], atol=1e-3)


class OverTheBatch(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.fc(x))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda y: y.roll(1, 0), "a roll along the batch"),
        (lambda y: y.roll(3), "a roll over all axes together"),
        (lambda y: y.argmax(keepdim=True), "over all axes, which are kept"),
    ],
)
def test_choices_that_onnx_has_not(function, said, tmp_path):
    x = torch.randn(4, 4)
    native = converted(OverTheBatch(function), x, {"fc": 8})
    with pytest.raises(UnsupportedModelError, match=said):
        ada.to_onnx(native, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_what_onnx_runtime_rounds_otherwise(tmp_path):
    """Its integer kernels have biases in whole steps of the sums; nothing else differs."""
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
        nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    native = converted(net, x)
    ada.to_onnx(native, tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))  # with its own rewriting
    theirs = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    before = np.abs(native(x).detach().numpy() - theirs).max()
    *inner, _ = [m for m in native.modules() if isinstance(m, NativeLayer)]  # the last is in float
    with torch.no_grad():
        for layer in inner:
            step = layer.input_scale * layer.weight_scale
            layer.bias.copy_(torch.round(layer.bias / step) * step)
        after = np.abs(native(x).numpy() - theirs).max()
    assert after < 1e-5 * np.abs(theirs).max() < 0.1 * before
