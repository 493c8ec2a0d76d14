"""The engine around its kernels: cost of a call, memory of the weights, time per node."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

import adalayer_native as ada
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from bench import engines
from bench.conftest import Bench
from bench.networks import native_network

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
        prepared = ada.prepare(model, Plan(layers, "fixed", {}), x)
        ada.calibrate(prepared, [x], progress=False)
        engine = ada.compile(ada.convert(prepared), x, policy="native", strict=True)
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
    """What the engine keeps for its weights over the packed bytes of the file: streamed, and as the
    clock has it."""
    native = native_network(name, bits)[1]
    packed = sum(v.numel() for k, v in native.state_dict().items() if k.endswith("weight_packed"))
    kept = engines.engine(name, bits, "streamed").weight_bytes
    measured = engines.engine(name, bits).weight_bytes
    bench.figure(
        f"weight memory over packed bytes as measured, {name}, {bits} bits", measured / packed, "x"
    )
    bench.figure(
        f"weight memory over packed bytes, {name}, {bits} bits", kept / packed, "x", at_most=MEMORY
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_coverage(bench: Bench, name: str, bits: int) -> None:
    """Time of every node inside a running network, for the table per layer."""
    with bench.cores(1):
        coverage = engines.engine(name, bits).coverage(rounds=30)
    rows = [asdict(row) for row in coverage]
    bench.figure(f"nodes of {name}, {bits} bits, 1 thread", coverage.microseconds, "us", rows=rows)
