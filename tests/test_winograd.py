"""Winograd in engines and single layers: the same bits, what coverage says, and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

POLICIES = ["auto", "off", "4x4", "2x2"]


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    yield
    ops.set_winograd_policy("auto")
    ops.force_isa("auto")


class Network(nn.Module):
    """Three layers that suit, one with a residual and one with floats behind it, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.middle = nn.Conv2d(32, 40, 3, padding=(0, 2))
        self.block = nn.Conv2d(40, 40, 3, padding=1)
        self.down = nn.Conv2d(40, 16, 3, stride=2)
        self.last = nn.Conv2d(16, 20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        x = torch.relu(self.block(x) + x)
        return self.last(torch.relu(self.down(x)))


def native_of(x: Tensor, bits: int) -> nn.Module:
    torch.manual_seed(0)
    model = Network().eval()
    layers = {
        name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits)
        for name, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(layers, "fixed", {}), x)
    ada.calibrate(prepared, [x], progress=False)
    return ada.convert(prepared)


def kernels_of(engine: ada.Engine) -> dict[str, str]:
    return {row.name: row.kernel for row in engine.coverage() if row.bits}


@pytest.mark.parametrize("isa", ops.isas())
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_policy_gives_the_same_bits(bits: int, isa: str) -> None:
    ops.force_isa(isa)
    x = torch.rand(3, 3, 22, 17)
    native = native_of(x, bits)
    layers, engines = [], []
    for policy in POLICIES:
        ops.set_winograd_policy(policy)
        layers.append(native(x))
        engines.append(ada.compile(native, x, policy="native", strict=True)(x))
    assert all(torch.equal(layers[0], other) for other in layers[1:])
    assert all(torch.equal(engines[0], other) for other in engines[1:])


def test_coverage_shows_the_algorithm() -> None:
    if ops.active_isa() == "scalar":
        pytest.skip("the scalar reference has one form")
    x = torch.rand(1, 3, 22, 17)
    native = native_of(x, 4)
    ops.set_winograd_policy("4x4")
    kernels = kernels_of(ada.compile(native, x, policy="native", strict=True))
    for name in ("middle", "block", "last"):
        assert " winograd 4x4, " in kernels[name] and kernels[name].endswith(" taps s8")
    assert not any("winograd" in kernels[name] for name in ("first", "down"))
    ops.set_winograd_policy("off")
    kernels = kernels_of(ada.compile(native, x, policy="native", strict=True))
    assert not any("winograd" in kernel for kernel in kernels.values())


def test_memory_decides_first(tmp_path: Path) -> None:
    x = torch.rand(1, 3, 22, 17)
    ops.set_winograd_policy("4x4")
    large = ada.compile(native_of(x, 4), x, policy="native", strict=True)
    path = tmp_path / "model.ada"
    large.save(path)
    streamed = ada.load(path, weights="streamed")
    found = [kernel for kernel in kernels_of(streamed).values() if "winograd" in kernel]
    assert all("from packed weights" in kernel for kernel in found)
    if ops.active_isa() != "scalar":
        assert len(found) == 3
        assert streamed.weight_bytes < large.weight_bytes
    # The least memory that is enough has no room for taps.
    refused, enough = path.stat().st_size, 1 << 30
    while enough - refused > 1:
        middle = (refused + enough) // 2
        try:
            small = ada.load(path, max_memory=middle)
        except ada.FileFormatError:
            refused = middle
        else:
            enough = middle
    small = ada.load(path, max_memory=enough)
    assert not any("winograd" in kernel for kernel in kernels_of(small).values())
    assert torch.equal(small(x), large(x)) and torch.equal(streamed(x), large(x))


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="auto, off, 4x4 or 2x2, got 'fast'"):
        ops.set_winograd_policy("fast")
