"""Single layers: shapes x bits x instruction set x threads, beside torch float32.

The native side is the u8 kernel with the cost of its operator. Before a timed call the second-level
cache is filled with other data and the input is read again: in a network weights come cold and
activations warm.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch

import adalayer_native as ada
from adalayer_native import ops
from bench.conftest import Bench
from bench.interleave import Comparison
from bench.layers import (
    MOBILENETV2,
    RESNET18,
    RESNET50,
    UNUSUAL,
    Candidates,
    Layer,
    reader,
)
from bench.record import Target

BITS = (8, 4, 3, 2)
# Fewer bits may cost this much, and so may a layer beside torch float32: it is noise.
NEVER_SLOWER = 0.95
L2_MEGABYTES = 8
SWEEP = [
    *(1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80),
    *(95, 96, 97, 112, 127, 128, 129, 144, 160, 176, 191, 192, 193, 208, 224, 240, 255, 256, 257),
]


def cold_weights(x: torch.Tensor) -> Callable[[], Any]:
    """Fills the second-level cache, then reads ``x``."""
    read, levels = reader(L2_MEGABYTES), x.permute(0, 2, 3, 1).numpy()

    def run() -> None:
        read()
        levels.max()

    return run


def compare_layer(
    turns: Any,
    bench: Bench,
    name: str,
    layer: Layer,
    *,
    bits: tuple[int, ...] = BITS,
    threads: int = 1,
    seconds: float = 1.5,
    targets: tuple[Target, ...] = (),
    **info: Any,
) -> Comparison:
    with bench.cores(threads):
        both = Candidates(layer, bits)
        moved = {f"ours {b} bits": layer.bytes(b) for b in bits}
        return turns(
            name,
            both.runs,
            threads=threads,
            seconds=seconds,
            targets=targets,
            cold=cold_weights(both.levels),
            info={"layer": asdict(layer), "operations": layer.operations, "bytes": moved, **info},
            least=15,
        )


def by_name(layers: list[Layer]) -> Any:
    return pytest.mark.parametrize("layer", layers, ids=lambda layer: layer.name.replace(" ", "_"))


def never_slower(bits: tuple[int, ...]) -> tuple[Target, ...]:
    """No width is slower than a larger one, or than torch float32."""
    names = [f"ours {b} bits" for b in bits]
    fewer = [Target(name, tuple(names[:k]), NEVER_SLOWER) for k, name in enumerate(names) if k]
    return (*fewer, *(Target(name, ("torch fp32",), NEVER_SLOWER) for name in names))


@by_name(RESNET18 + RESNET50)
def test_resnet_layer(bench: Bench, turns: Any, layer: Layer) -> None:
    network = "resnet18" if layer in RESNET18 else "resnet50"
    name = f"layer/{network}/{layer.name}"
    compare_layer(turns, bench, name, layer, targets=never_slower(BITS), network=network)


@by_name(MOBILENETV2)
def test_mobilenet_layer(bench: Bench, turns: Any, layer: Layer) -> None:
    name = f"layer/mobilenet_v2/{layer.name}"
    targets = never_slower((8, 4))
    compare_layer(turns, bench, name, layer, bits=(8, 4), targets=targets, network="mobilenet_v2")


@by_name([RESNET18[0], RESNET18[1], RESNET18[7], RESNET18[10], RESNET50[1], MOBILENETV2[6]])
def test_two_threads(bench: Bench, turns: Any, layer: Layer) -> None:
    name = f"layer, 2 threads/{layer.name}"
    compare_layer(turns, bench, name, layer, threads=2, targets=never_slower(BITS))


@pytest.mark.parametrize("isa", [i for i in ops.isas() if i != "scalar"])
@by_name([RESNET18[1], RESNET18[10], RESNET50[1], MOBILENETV2[6]])
def test_instruction_set(bench: Bench, turns: Any, layer: Layer, isa: str) -> None:
    ops.force_isa(isa)
    name = f"layer per instruction set/{isa}/{layer.name}"
    compare_layer(turns, bench, name, layer, targets=never_slower(BITS), isa=isa)


@pytest.mark.parametrize("threads", [1, 2])
@by_name(UNUSUAL)
def test_grouped_dilated_depthwise(bench: Bench, turns: Any, layer: Layer, threads: int) -> None:
    compare_layer(
        turns,
        bench,
        f"unusual layer/{layer.name}/{threads}T",
        layer,
        bits=(8, 4),
        threads=threads,
        targets=(Target("ours 8 bits", ("torch fp32",), 2.0), *never_slower((8, 4))),
    )


@pytest.mark.parametrize("kind", ["dense 3x3 @14", "depthwise 3x3 @28", "1x1 @14"])
def test_channel_sweep(bench: Bench, turns: Any, kind: str) -> None:
    """No channel count costs much more than a larger one."""

    def layer(channels: int) -> Layer:
        if kind.startswith("depthwise"):
            return Layer(channels, channels, 3, 1, 28, channels)
        return Layer(channels, channels, 1 if kind.startswith("1x1") else 3, 1, 14)

    with bench.cores(1):
        runs: dict[str, Callable[[], Any]] = {}
        for channels in SWEEP:
            both = Candidates(layer(channels), (8,))
            runs[f"ours {channels}"] = both.runs["ours 8 bits"]
            runs[f"torch fp32 {channels}"] = both.runs["torch fp32"]
        name = f"channels/{kind}"
        turns(name, runs, threads=1, seconds=6.0, info={"channels": SWEEP, "many": True}, least=9)
    table = bench.results.table(name)
    state = best_state(table)
    ours = {c: table[f"ours {c}"][state].median for c in SWEEP}
    torch_fp32 = {c: table[f"torch fp32 {c}"][state].median for c in SWEEP}
    cliff = {c: ours[c] / min(ours[d] for d in SWEEP if d >= c) for c in SWEEP}
    worst = max(cliff, key=lambda c: cliff[c])
    bench.figure(
        f"cliff over channels 1 to 257, {kind}", cliff[worst], "x", at_most=1.3, channels=worst
    )
    slowest = min(SWEEP, key=lambda c: torch_fp32[c] / ours[c])
    bench.figure(
        f"least speed over torch fp32 over channels 1 to 257, {kind}",
        torch_fp32[slowest] / ours[slowest],
        "x",
        channels=slowest,
    )


def best_state(table: Any) -> str:
    """The state in which every candidate has samples, fast cores first."""
    for state in ("fast", "contended"):
        if all(row.get(state) is not None and row[state].count >= 3 for row in table.values()):
            return state
    return "all"


# Copies of a layer whose weights together are this large are never found in a cache.
TURN_BYTES = 192 << 20


def test_linear_cold(bench: Bench, turns: Any) -> None:
    """4096 x 4096 at batch 1 with weights in main memory: packed bits are what counts.

    As many layers as overflow the caches take turns, as in a network of many layers; the code that
    runs them stays where it is. (Emptying the caches would evict the interpreter, too: then a call
    of the smallest layer takes a quarter of a millisecond.)
    """
    with bench.cores(1):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4096, 4096).requires_grad_(False)
        x = torch.randn(1, 4096).clamp(-4, 4)
        runs: dict[str, Callable[[], Any]] = {}
        for bits in BITS:
            layers = []
            for k in range(TURN_BYTES * 8 // (layer.weight.numel() * bits)):
                layer.weight[0, k].neg_()  # equal weights would share their memory
                layers.append(ada.nn.Linear.from_float(layer, bits, input_range=(-4.0, 4.0)))
            native = layers[-1]
            step = native.weight_scale.reshape(-1, 1)
            want = torch.nn.functional.linear(x, native.weight_int() * step, layer.bias)
            # The input is rounded to 8 bits, which 4096 products average out.
            torch.testing.assert_close(native(x), want, rtol=0, atol=0.03 * float(want.abs().max()))
            runs[f"ours {bits} bits"] = in_turn(layers, x)
        for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
            count = -(-TURN_BYTES // (layer.weight.numel() * dtype.itemsize))
            copies = [copy.deepcopy(layer).to(dtype) for _ in range(count)]
            runs[name] = in_turn(copies, x.to(dtype))
        turns(
            "linear/4096-4096, batch 1, cold/1T",
            runs,
            threads=1,
            seconds=8.0,
            targets=[
                Target(f"ours {bits} bits", ("torch fp32",), minimum)
                for bits, minimum in ((8, 3.2), (4, 6.0), (2, 11.0))
            ],
            least=15,
        )


def in_turn(layers: Sequence[torch.nn.Module], x: torch.Tensor) -> Callable[[], Any]:
    with torch.inference_mode():
        for layer in layers:
            layer(x)  # derives the weights that the machine wants
    following = itertools.cycle(layers)

    def run() -> torch.Tensor:
        layer = next(following)
        with torch.inference_mode():
            return layer(x)

    return run


def test_peaks(bench: Bench) -> None:
    """The roofs: int8 operations of one core and bytes from main memory.

    The probe multiplies tiles; without a tile unit it does not know the peak.
    """
    import time

    from adalayer_native import _C

    with bench.cores(1):
        best = math.inf
        for _ in range(300):
            seconds, operations = _C.probe_cores(1)
            best = min(best, seconds / operations)
        megabytes = 600
        read = reader(megabytes)
        read()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
    if "amx" in ops.isas():
        bench.figure("int8 peak of one core", 1e-9 / best, "GOPS")
    bench.figure("memory bandwidth of one core", megabytes / 1024 / min(times), "GiB/s")
