"""The policy "fastest": no layer and no network is slower than in torch float32.

Drop-in layers take and give float tensors, so both conversions are theirs. Beside the layers that
choose stand those that stay native, and torch's own layer with float weights, which rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import adalayer_native as ada
from adalayer_native.nn import Conv2d, choices, set_policy
from bench.conftest import Bench
from bench.layers import MOBILENETV2, RESNET18, RESNET50, UNUSUAL, Layer
from bench.networks import NETWORKS, native_network, network
from bench.peers import torch_fp32
from bench.record import Target

BITS = (8, 4)
NEVER_SLOWER = 0.95
LAYERS = [*RESNET18, *RESNET50, *MOBILENETV2, *UNUSUAL]
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name.replace(" ", "_"))
def test_drop_in_layer(bench: Bench, turns: Any, layer: Layer, order: str) -> None:
    """One thread, float images in and out."""
    with bench.cores(1), torch.inference_mode():
        module = layer.torch_layer()
        torch.manual_seed(1)
        x = torch.randn(1, layer.inputs, layer.size, layer.size).clamp(-4, 4)
        x = x.contiguous(memory_format=FORMATS[order])
        want = module(x)
        runs: dict[str, Callable[[], Any]] = {}
        kernels = {}
        for bits in BITS:
            for policy in ("fastest", "native"):
                native = Conv2d.from_float(module, bits, input_range=(-4.0, 4.0))
                set_policy(native, policy)
                # Of random weights 4 bits are a coarse form.
                error = float((native(x) - want).norm() / want.norm())
                assert error < (0.02 if bits == 8 else 0.25), f"{layer.name}, {bits} bits: {error}"
                runs[f"ours {bits} bits, {policy}"] = partial(_run, native, x)
                for choice in choices(native).get("", {}).values():
                    kernels[bits] = choice.kernel
        runs["torch fp32"] = partial(_run, module, x)
        turns(
            f"drop-in layer/{layer.name}/{order}",
            runs,
            threads=1,
            seconds=1.5,
            targets=[
                Target(f"ours {bits} bits, fastest", ("torch fp32",), NEVER_SLOWER) for bits in BITS
            ],
            info={"kernels": kernels},
            least=15,
        )


def _run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = module(x)
    return result


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_engine(bench: Bench, turns: Any, name: str, bits: int) -> None:
    """The engine with this policy beside the float network, batch 1, one thread."""
    with bench.cores(1):
        x = network(name).images(1)
        engine = ada.compile(native_network(name, bits)[1], x, policy="fastest")
        turns(
            f"policy fastest/{name}, {bits} bits",
            {
                f"ours {bits} bits": partial(engine, x),
                "torch fp32": torch_fp32(network(name), x, 1),
            },
            threads=1,
            seconds=4.0,
            targets=[Target(f"ours {bits} bits", ("torch fp32",), NEVER_SLOWER)],
            info={"native share": engine.native_share},
            least=7,
        )
