"""Single convolutions and linear layers over widths and instruction sets against torch fp32."""

from __future__ import annotations

import pytest
import torch

import adalayer_native as ada
from adalayer_native import ops

# (in, out, kernel, stride, map, groups): one of each kind of ResNet and MobileNet layer.
LAYERS = {
    "stem 7x7/2 3-64 @224": (3, 64, 7, 2, 224, 1),
    "3x3 64-64 @56": (64, 64, 3, 1, 56, 1),
    "3x3/2 64-128 @56": (64, 128, 3, 2, 56, 1),
    "3x3 256-256 @14": (256, 256, 3, 1, 14, 1),
    "3x3 512-512 @7": (512, 512, 3, 1, 7, 1),
    "1x1 64-256 @56": (64, 256, 1, 1, 56, 1),
    "3x3 depthwise 96 @56": (96, 96, 3, 1, 56, 96),
}


def compare(versus, title: str, native, layer, x: torch.Tensor) -> None:
    with torch.inference_mode():
        want = layer(x)
        got = native(x)
        # 8-bit input grid over +-4 and b-bit weights: the mean error is a few percent at 4 bits.
        error = (got - want).abs().mean() / want.abs().mean()
    assert error < (0.03 if native.bits == 8 else 1.0)
    versus(title, lambda: native(x), lambda: layer(x), 40)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_conv(versus, name: str, bits: int) -> None:
    inputs, outputs, kernel, stride, size, groups = LAYERS[name]
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    layer = layer.to(memory_format=torch.channels_last)
    native = ada.nn.Conv2d.from_float(layer, bits, input_range=(-4.0, 4.0))
    x = torch.randn(1, inputs, size, size).clamp(-4, 4)
    compare(versus, f"{name}, {bits} bits", native, layer, x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("isa", [i for i in ops.isas() if i != "scalar"])
def test_conv_per_isa(versus, isa: str) -> None:
    layer = torch.nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    native = ada.nn.Conv2d.from_float(layer, 8, input_range=(-4.0, 4.0))
    x = torch.randn(1, 128, 28, 28).clamp(-4, 4).to(memory_format=torch.channels_last)
    ops.force_isa(isa)
    compare(versus, f"3x3 128-128 @28, 8 bits, {isa}", native, layer, x)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_linear(versus, bits: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4096, 4096)
    native = ada.nn.Linear.from_float(layer, bits, input_range=(-4.0, 4.0))
    compare(
        versus, f"linear 4096-4096, {bits} bits", native, layer, torch.randn(1, 4096).clamp(-4, 4)
    )
