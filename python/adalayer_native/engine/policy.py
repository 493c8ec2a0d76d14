"""Native or float, layer by layer, by the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native import ops
from adalayer_native.engine.export import Exported, layer_name
from adalayer_native.engine.segments import FloatLayer, is_layer

__all__ = ["seconds_of", "slower_than_float"]

# A layer must lose by this much before it leaves the engine: each exchange also splits the program
# in two, and timings of microseconds scatter.
_CLEARLY = 0.8
_ROUNDS = 5


def seconds_of(
    candidates: Mapping[str, Any], batch: int, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Median seconds per call of engines with the same inputs, in turn."""
    first = next(iter(candidates.values()))
    inputs = [port.sample(batch) for port in first.inputs]
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for position in range(rounds + 1):
        for name, engine in candidates.items():
            start = time.perf_counter()
            engine.flat(inputs)
            if position:  # the first round warms up
                samples[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in samples.items()}


def _median_us(run: Any) -> float:
    samples = []
    for position in range(_ROUNDS + 1):
        start = time.perf_counter()
        run()
        if position:
            samples.append(1e6 * (time.perf_counter() - start))
    return median(samples)


def _float_us(exported: Exported, node: fx.Node, batch: int) -> float:
    """Microseconds of the float layer, with its share of the conversions between the two worlds."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    layer = FloatLayer(exported, node, on_grid=True)
    layer.output_grid = None
    sizes = [exported.sizes(item) for item in (source, node)]
    x, y = (torch.rand(batch, *(size or ())) for size in sizes)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    q = ops.quantize(y, 1.0 / 255, 0, 8)

    def run() -> Tensor:
        ops.quantize(y, 1.0 / 255, 0, 8)  # of the result, for the native layer after it
        q.float()  # of the operand, from the native layer before it
        result: Tensor = layer(x)
        return result

    with torch.no_grad():
        return _median_us(run)


def slower_than_float(exported: Exported, engine: Any, batch: int) -> dict[fx.Node, str]:
    """Layers whose native kernel clearly loses to float on this machine, with the reason.

    Both sides have ``ops.get_num_threads()`` threads where torch uses as many.
    """
    rows = engine.coverage(batch, rounds=_ROUNDS)
    native = {row.name: row.microseconds for row in rows if row.kind != "torch"}
    found: dict[fx.Node, str] = {}
    counts: dict[str, int] = {}
    for node in exported.graph.nodes:
        if not is_layer(node):
            continue
        name = layer_name(node)
        counts[name] = counts.get(name, 0) + 1
        mine = native.get(name if counts[name] == 1 else f"{name}#{counts[name]}", 0.0)
        if mine <= 0.0:
            continue
        other = _float_us(exported, node, batch)
        if other < _CLEARLY * mine:
            found[node] = f"float takes {other:.0f} µs, native {mine:.0f} µs"
    return found
