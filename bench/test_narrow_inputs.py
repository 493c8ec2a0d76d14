"""What 7 and 6 bits in a layer's input bring: the forms that they unlock, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import adalayer_native as ada
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from bench.conftest import Bench

# Channels in and out, side, kernel, stride.
LAYERS = {
    "512-512 3x3 @28": (512, 28, 3, 1),
    "256-256 3x3 @28": (256, 28, 3, 1),
    "512-512 1x1 @28": (512, 28, 1, 1),
    "256-256 3x3 s2 @28": (256, 28, 3, 2),
}


def engine_of(model: nn.Module, x: torch.Tensor, activation_bits: int) -> Any:
    layers = {
        n: LayerPlan(n, layer_kind(layer), layer.weight.numel(), 8, activation_bits=activation_bits)
        for n, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(layers), x)
    ada.calibrate(prepared, [x], progress=False)
    native = ada.convert(prepared)
    engine = ada.compile(native, x, policy="native", strict=True)
    assert torch.equal(engine(x), native(x))
    return engine


@pytest.mark.parametrize("weights", ["normal", "uniform"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(bench: Bench, turns: Any, layer: str, weights: str) -> None:
    """8-bit weights, batch 1, one thread; a layer alone in its engine."""
    channels, side, kernel, stride = LAYERS[layer]
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2)
    with torch.no_grad():
        getattr(conv.weight, f"{weights}_")()
        conv.weight.sub_(conv.weight.mean())
    model, x = nn.Sequential(conv).eval(), torch.randn(1, channels, side, side)
    with bench.cores(1):
        engines = {bits: engine_of(model, x, bits) for bits in (8, 7, 6)}
        runs: dict[str, Callable[[], Any]] = {
            f"ours {bits}-bit input": partial(engine, x) for bits, engine in engines.items()
        }
        kernels = {
            bits: next(row.kernel for row in engine.coverage(rounds=0) if row.bits)
            for bits, engine in engines.items()
        }
        turns(
            f"narrow input/{layer}, {weights} weights/1T",
            runs,
            threads=1,
            seconds=4.0,
            info={"kernels": kernels},
            least=9,
        )
