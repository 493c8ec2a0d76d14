"""What zeros save: pruned layers and networks beside the same ones on dense panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native import ops
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from bench.conftest import Bench
from bench.networks import network
from bench.record import Target
from bench.test_kernels import TURN_BYTES, in_turn

# Share of zeros -> how much faster than dense panels.
BLOCKS = {50: 1.6, 75: 2.6}
NETWORK = 1.4
BITMASK = 1.25
CONVOLUTIONS = 4


def engine_of(
    model: nn.Module, x: Tensor, bits: int, zeros: Mapping[str, tuple[float, str]], policy: str
) -> Any:
    """The compiled engine of a model; ``zeros`` holds (share, pattern) of the layers with any."""
    layers = {}
    for name, layer in supported_layers(model).items():
        share, pattern = zeros.get(name, (0.0, "unstructured"))
        kind = layer_kind(layer)
        layers[name] = LayerPlan(name, kind, layer.weight.numel(), bits, share, pattern)
    prepared = ada.prepare(model, Plan(layers, "fixed", {}), x)
    ada.calibrate(prepared, [x], progress=False)
    ops.set_sparse_policy(policy)
    try:
        return ada.compile(ada.convert(prepared), x, policy="native", strict=True)
    finally:
        ops.set_sparse_policy("auto")


def both(
    model: nn.Module, x: Tensor, bits: int, zeros: Mapping[str, tuple[float, str]]
) -> dict[str, Callable[[], Any]]:
    """The engine with zeros left out, and the same on dense panels; equal in every bit."""
    runs: dict[str, Callable[[], Any]] = {}
    results = []
    for name, policy in (("zeros left out", "auto"), ("dense panels", "dense")):
        engine = engine_of(model, x, bits, zeros, policy)
        results.append(engine(x))
        runs[name] = partial(engine, x)
    assert torch.equal(*results)
    return runs


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("pattern", ["block32x64", "block16x64"])
@pytest.mark.parametrize("percent", sorted(BLOCKS))
def test_block_sparse_convolution(
    bench: Bench, turns: Any, percent: int, pattern: str, bits: int
) -> None:
    """3x3 256-256 @14, several in a row so that the ends of the engine do not count."""
    with bench.cores(1):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(CONVOLUTIONS):
            layers += [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers).eval()
        x = torch.randn(1, 256, 14, 14)
        zeros = dict.fromkeys(supported_layers(model), (percent / 100, pattern))
        # The target is about what the kernels are made for; smaller blocks are shown beside it.
        targets = [Target("zeros left out", ("dense panels",), BLOCKS[percent])]
        turns(
            f"zeros/{CONVOLUTIONS} x 3x3 256-256 @14, {bits} bits, {percent} % in {pattern}/1T",
            both(model, x, bits, zeros),
            threads=1,
            seconds=3.0,
            targets=targets if pattern == "block32x64" else [],
            least=15,
        )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_block_sparse_network(bench: Bench, turns: Any, bits: int, threads: int) -> None:
    """A ResNet-18 with three quarters of its two last stages in blocks of zeros."""
    with bench.cores(threads):
        source = network("resnet18")
        zeros = {
            name: (0.75, "block32x64")
            for name in supported_layers(source.model)
            if name.startswith(("layer3.", "layer4."))
        }
        assert zeros
        turns(
            f"zeros/resnet18, {bits} bits, 75 % of layer3 and layer4 in block32x64/{threads}T",
            both(source.model, source.images(1), bits, zeros),
            threads=threads,
            seconds=6.0,
            targets=[Target("zeros left out", ("dense panels",), NETWORK)],
            least=15,
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_bitmask_linear(bench: Bench, turns: Any, threads: int) -> None:
    """4096 x 4096 at batch 1, half of it zeros: weights come from main memory."""
    with bench.cores(threads):
        generator = torch.Generator().manual_seed(0)
        shape = (4096, 4096)
        sign = 2 * torch.randint(0, 2, shape, generator=generator) - 1
        dense = (sign * torch.randint(1, 8, shape, generator=generator)).to(torch.int8)
        keep = torch.rand(shape, generator=generator).argsort(dim=1) < shape[1] // 2
        x = torch.randn(1, 4096, generator=generator).clamp(-4, 4)
        runs: dict[str, Callable[[], Any]] = {}
        for name, weight in (("half zeros", dense * keep), ("no zeros", dense)):
            layers = []
            for k in range(TURN_BYTES * 2 // weight.numel()):
                weight[k] = -weight[k]  # equal weights would share their memory
                layers.append(
                    ada.nn.Linear.from_quantized(
                        weight,
                        4,
                        torch.full((4096,), 0.01),
                        None,
                        input_scale=8 / 255,
                        input_zero_point=128,
                    )
                )
            want = nn.functional.linear(x, weight.float() * 0.01)
            torch.testing.assert_close(
                layers[-1](x), want, rtol=0, atol=0.03 * float(want.abs().max())
            )
            runs[name] = in_turn(layers, x)
        turns(
            f"zeros/linear 4096-4096, batch 1, 4 bits, cold/{threads}T",
            runs,
            threads=threads,
            seconds=8.0,
            targets=[Target("half zeros", ("no zeros",), BITMASK)],
            least=15,
        )
