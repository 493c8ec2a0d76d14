"""The engine around its kernels: cost of a call, memory of the weights, time per node."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adalayer_native as ada
from adalayer_native import _C
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from bench import engines
from bench.conftest import Bench
from bench.networks import native_network, network

CALL_MICROSECONDS = 20.0
MEMORY = 1.1


def test_call_overhead(bench: Bench, turns: Any) -> None:
    """A direct call of an engine that has next to nothing to compute."""
    with bench.cores(1):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1)).eval()
        x = torch.randn(1, 8, 1, 1)
        layers = {
            n: LayerPlan(n, layer_kind(layer), layer.weight.numel(), 8)
            for n, layer in supported_layers(model).items()
        }
        prepared = ada.prepare(model, Plan(layers, "fixed", {}))
        ada.calibrate(prepared, [x], progress=False)
        engine = engines.compiled(ada.convert(prepared), x, 1)
        torch.testing.assert_close(engine(x), prepared(x))
        comparison = turns(
            "call/8-8 1x1 @1/1T", {"ours": lambda: engine(x)}, threads=1, seconds=1.0, least=30
        )
    table = bench.results.table(comparison.name)["ours"]
    spread = table.get("fast", table["all"])
    bench.figure(
        "whole call of an engine of one 8-8 1x1 layer",
        1e6 * spread.median,
        "us",
        at_most=CALL_MICROSECONDS,
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weight_memory(bench: Bench, name: str, bits: int) -> None:
    """What the engine keeps for its weights over the packed bytes of the file."""
    _, native = native_network(name, bits)
    packed = sum(v.numel() for k, v in native.state_dict().items() if k.endswith("weight_packed"))
    images = network(name).images(1)
    _C.clear_cache()
    with bench.cores(1):
        engine = engines.compiled(native, images, 1)
        engine(images)
    kept = engines.weight_bytes(engine)
    bench.figure(
        f"weight memory over packed bytes, {name}, {bits} bits", kept / packed, "x", at_most=MEMORY
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_coverage(bench: Bench, name: str, bits: int) -> None:
    """Time of every node inside a running network, for the table per layer."""
    images = network(name).images(1)
    with bench.cores(1):
        engine = engines.compiled(native_network(name, bits)[1], images, 1)
        if not hasattr(engine, "coverage"):
            pytest.skip("this build has no engine")
        for _ in range(20):
            engine(images)
        rows = [
            {key: getattr(row, key) for key in engines.COVERAGE_FIELDS} for row in engine.coverage()
        ]
    total = sum(row["microseconds"] for row in rows)
    bench.figure(f"nodes of {name}, {bits} bits, 1 thread", total, "us", rows=rows)
