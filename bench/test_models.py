"""Whole networks with drop-in native layers against torch fp32 eager, both channels_last."""

from __future__ import annotations

import pytest
import torch

import adalayer_native as ada
from adalayer_native.models import get_model
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

NETWORKS = {"resnet18": 224, "resnet20": 32, "adalayernet": 32}
# Issue targets: two threads, 8 and 4 bits, batch 1 and 16.
MINIMUM = 2.0


def converted(name: str, bits: int) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """(float, prepared, native) of a randomly initialised network with ``bits`` everywhere."""
    torch.manual_seed(0)
    model = get_model(name).eval().to(memory_format=torch.channels_last)
    layers = {
        n: LayerPlan(n, layer_kind(layer), layer.weight.numel(), bits)
        for n, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(layers, "fixed", {}))
    size = NETWORKS[name]
    ada.calibrate(prepared, [torch.randn(4, 3, size, size)], progress=False)
    return model, prepared, ada.convert(prepared)


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(versus, name: str, bits: int, batch: int) -> None:
    model, prepared, native = converted(name, bits)
    size = NETWORKS[name]
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        got = native(x)
        # Random weights amplify single-step differences; the result must still be the same one.
        torch.testing.assert_close(got, prepared(x), rtol=0.05, atol=0.05 * float(got.abs().max()))
    rounds = 15 if (name, batch) == ("resnet18", 16) else 60
    speedup = versus(
        f"{name}, {bits} bits, batch {batch}", lambda: native(x), lambda: model(x), rounds
    )
    assert speedup >= MINIMUM
