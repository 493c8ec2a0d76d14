"""What Winograd brings: networks beside the same ones with direct products only, and the search."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import adalayer_native as ada
from adalayer_native import ops
from bench.conftest import Bench
from bench.networks import native_network, network

SEARCH_SECONDS = 20.0
NETWORKS = ["resnet18", "vgg16_mean", "unet", "adalayernet", "resnet20"]


def engine_of(name: str, bits: int, policy: str) -> Any:
    ops.set_winograd_policy(policy)
    try:
        native = native_network(name, bits)[1]
        return ada.compile(native, network(name).images(1), policy="native", strict=True)
    finally:
        ops.set_winograd_policy("auto")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(bench: Bench, turns: Any, name: str, bits: int, threads: int) -> None:
    """Equal in every bit, batch 1."""
    with bench.cores(threads):
        x = network(name).images(1)
        runs: dict[str, Callable[[], Any]] = {}
        results, kernels = [], []
        for label, policy in (("winograd allowed", "auto"), ("direct products", "off")):
            engine = engine_of(name, bits, policy)
            results.append(engine(x))
            kernels.append([row.kernel for row in engine.coverage() if row.bits])
            runs[label] = partial(engine, x)
        assert torch.equal(*results)
        assert not any("winograd" in kernel for kernel in kernels[1])
        turns(
            f"winograd/{name}, {bits} bits/{threads}T",
            runs,
            threads=threads,
            seconds=6.0,
            info={"kernels": kernels[0]},
            least=15,
        )


@pytest.mark.parametrize("bits", [8, 4])
def test_search(bench: Bench, bits: int) -> None:
    """Compiling a ResNet-50 with the clock's choices among all forms."""
    native, x = native_network("resnet50", bits)[1], network("resnet50").images(1)
    with bench.cores(1):
        start = time.perf_counter()
        ada.compile(native, x, policy="native", strict=True)
        seconds = time.perf_counter() - start
    bench.figure(
        f"compiling ResNet-50 with plan search, {bits} bits", seconds, "s", at_most=SEARCH_SECONDS
    )
