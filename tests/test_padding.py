"""Zero padding that stands alone before a convolution becomes the convolution's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.capture import GraphModel
from adalayer_native.capture.vocabulary import op_name
from adalayer_native.padding import PaddedConv2d, four_paddings
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers


class Net(nn.Module):
    """A convolution, what a test pads it with, a second one, a head."""

    def __init__(self, forward: Any, second: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), second, nn.Conv2d(8, 4, 1)
        self.third = nn.Conv2d(8, 8, 1, stride=2)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.run(self, F.relu(self.first(x)))
        return self.head(y)


def pads(graph: GraphModel) -> int:
    return sum(
        node.op == "call_function"
        and op_name(node) in ("aten.pad.default", "aten.constant_pad_nd.default")
        for node in graph.graph.nodes
    )


def second(kernel: int = 3, stride: int = 1, groups: int = 1, padding: Any = 0) -> nn.Conv2d:
    torch.manual_seed(4)
    return nn.Conv2d(8, 8, kernel, stride, padding, groups=groups)


def padded(*amounts: int) -> Any:
    return lambda m, t: m.second(F.pad(t, amounts))


FOLDED = {
    # name: (forward, second layer, its padding as top, left, bottom, right)
    "module": (lambda m, t: m.second(nn.ZeroPad2d(1)(t)), second(), (1, 1, 1, 1)),
    "stride 2": (padded(0, 1, 0, 1), second(stride=2), (0, 0, 1, 1)),
    "depthwise, stride 2": (padded(1, 2, 1, 2), second(5, 2, 8), (1, 1, 2, 2)),
    "grouped": (padded(2, 0, 0, 1), second(3, 1, 2), (0, 2, 1, 0)),
    "every side another": (padded(1, 2, 3, 0), second(), (3, 1, 0, 2)),
    "beside the layer's own": (padded(0, 1, 0, 1), second(padding=1), (1, 1, 2, 2)),
    "beside the same": (padded(0, 1), second(4, padding="same"), (1, 1, 2, 3)),
    "one axis": (padded(1, 1), second(), (0, 1, 0, 1)),
    "twice": (lambda m, t: m.second(F.pad(F.pad(t, (1, 0)), (0, 1, 1, 1))), second(), (1, 1, 1, 1)),
    "more than the kernel": (padded(4, 5, 3, 6), second(), (3, 4, 6, 5)),
    "nothing": (padded(0, 0, 0, 0), second(), (0, 0, 0, 0)),
    "a pointwise layer": (padded(0, 1, 0, 1), second(1, 2), (0, 0, 1, 1)),
}  # fmt: skip

KEPT = {
    "another value": lambda m, t: m.second(F.pad(t, (0, 1, 0, 1), value=0.5)),
    "a crop": lambda m, t: m.second(F.pad(t, (0, -1, 0, 1))),
    "reflection": lambda m, t: m.second(F.pad(t, (1, 1, 1, 1), mode="reflect")),
    "channels": lambda m, t: m.second(F.pad(t, (0, 0, 0, 0, 0, 1))[:, :8]),
    "another reader": lambda m, t: m.second(y := F.pad(t, (1, 1, 1, 1))) + y[..., 1:-1, 1:-1],
}  # fmt: skip


def native_of(model: nn.Module, x: Tensor) -> GraphModel:
    """Captured, simulated, native and compiled: the same numbers where they are promised."""
    graph = ada.capture(model, x)
    plan = {
        name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), 4)
        for name, layer in supported_layers(graph).items()
    }
    prepared = ada.prepare(graph, Plan(plan))
    ada.calibrate(prepared, [x], observer="minmax", progress=False)
    native = ada.convert(prepared)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
        with ada.simulate(prepared) as exact:
            assert torch.equal(native(x), exact(x))
        engine = ada.compile(native, x, policy="native", weights="resident")
        assert torch.equal(engine(x), native(x))
    return native


@pytest.mark.parametrize("name", FOLDED)
def test_becomes_the_convolutions_own(name: str, tmp_path: Path) -> None:
    forward, layer, sides = FOLDED[name]
    model = Net(forward, layer).eval()
    x = torch.randn(2, 3, 13, 12)
    graph = ada.capture(model, x)
    assert pads(graph) == 0
    found = graph.get_submodule("second")
    assert four_paddings(found) == sides
    assert isinstance(found, PaddedConv2d) == any(sides)
    assert torch.equal(graph(x), model(x))  # it pads as the network did
    native = native_of(model, x)
    assert native.get_submodule("second").padding == sides
    with torch.no_grad():
        ada.save(native, tmp_path / "net.safetensors")
        assert torch.equal(ada.restore(model, tmp_path / "net.safetensors")(x), native(x))
        engine = ada.compile(native, x, policy="native", weights="streamed")
        assert not any("pad" in row.op for row in engine.coverage())
        engine.save(tmp_path / "net.ada")
        assert torch.equal(ada.load(tmp_path / "net.ada")(x), native(x))


@pytest.mark.parametrize("name", KEPT)
def test_stays_an_operation(name: str) -> None:
    model = Net(KEPT[name], second()).eval()
    x = torch.randn(2, 3, 12, 12)
    graph = ada.capture(model, x)
    assert pads(graph) == 1
    assert type(graph.get_submodule("second")) is nn.Conv2d
    native_of(model, x)


def test_only_the_padding_that_nobody_else_reads() -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        y = F.pad(t, (1, 0))
        return m.second(F.pad(y, (0, 1, 1, 1))) + y[..., 1:]

    model, x = Net(forward, second()).eval(), torch.randn(2, 3, 12, 12)
    graph = ada.capture(model, x)
    assert pads(graph) == 1
    assert four_paddings(graph.get_submodule("second")) == (1, 0, 1, 1)
    native_of(model, x)


def test_several_convolutions_take_the_same_padding() -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        y = F.pad(t, (0, 1, 0, 1))
        return m.second(y) + m.third(y)[..., :-1, :-1]

    model, x = Net(forward, second(3, 2)).eval(), torch.randn(2, 3, 14, 14)
    graph = ada.capture(model, x)
    assert pads(graph) == 0
    for name in ("second", "third"):
        assert four_paddings(graph.get_submodule(name)) == (0, 0, 1, 1)


def test_one_convolution_behind_two_paddings_is_two_layers() -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        return (
            m.second(F.pad(t, (0, 1, 0, 1)))[..., :8, :8] + m.second(F.pad(t, (1, 1)))[..., :8, :8]
        )

    model, x = Net(forward, second()).eval(), torch.randn(2, 3, 13, 13)
    graph = ada.capture(model, x)
    assert pads(graph) == 0
    layers = [layer for name, layer in supported_layers(graph).items() if name.startswith("second")]
    assert sorted(four_paddings(layer) for layer in layers) == [(0, 0, 1, 1), (0, 1, 0, 1)]


def test_sizes_that_the_input_decides_stay() -> None:
    def forward(m: Any, t: Tensor) -> Tensor:
        return m.second(F.pad(t, (0, t.shape[-1] % 2, 0, t.shape[-2] % 2)))

    model = Net(forward, second()).eval()
    graph = ada.capture(model, torch.randn(2, 3, 13, 12))
    for height in (13, 16):
        x = torch.randn(2, 3, height, 12)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_rows_are_padded_too() -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(8, 4, 3)
    )
    x = torch.randn(2, 3, 17)
    graph = ada.capture(model.eval(), x)
    assert pads(graph) == 0
    assert four_paddings(graph.get_submodule("3")) == (0, 2, 0, 0)
    native_of(model, x)


def test_padding_trains() -> None:
    model = Net(padded(0, 1, 0, 1), second(3, 2)).eval()
    x = torch.randn(2, 3, 14, 14)
    graph = ada.capture(model, x)
    graph(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(
        graph.get_submodule("second").weight.grad, model.second.weight.grad, rtol=1e-4, atol=1e-5
    )
