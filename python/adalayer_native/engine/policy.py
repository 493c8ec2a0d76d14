"""Native or float, layer by layer, by the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native import ops
from adalayer_native.engine.export import Exported, layer_name
from adalayer_native.engine.segments import float_layer, is_layer

__all__ = ["fastest_of", "float_choices", "layer_times", "seconds_of"]

# A layer must lose by this much before an engine with it in float is timed: conversions surround
# it, and timings of microseconds scatter.
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
    layer = float_layer(exported, node, on_grid=True)
    layer.output_grid = None
    x, y = (torch.rand(exported.shape(item, batch)) for item in (source, node))
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


@dataclass
class Times:
    """Microseconds.

    Attributes:
        layers: of the native kernel, and of the float one, of each layer that runs natively.
        engine: of all that the engine does.
    """

    layers: dict[fx.Node, tuple[float, float]]
    engine: float


def layer_times(exported: Exported, engine: Any, batch: int) -> Times:
    """What the engine takes, and its layers there and in float.

    Both sides have ``ops.get_num_threads()`` threads where torch uses as many.
    """
    rows = engine.coverage(batch, rounds=_ROUNDS)
    native = {row.name: row.microseconds for row in rows if row.kind != "torch"}
    found: dict[fx.Node, tuple[float, float]] = {}
    counts: dict[str, int] = {}
    for node in exported.graph.nodes:
        if not is_layer(node):
            continue
        name = layer_name(node)
        counts[name] = counts.get(name, 0) + 1
        mine = native.get(name if counts[name] == 1 else f"{name}#{counts[name]}", 0.0)
        if mine > 0.0:
            found[node] = mine, _float_us(exported, node, batch)
    return Times(found, rows.microseconds)


def float_choices(times: Times) -> list[list[fx.Node]]:
    """Sets of layers that may be faster in float; the clock has to say.

    Those whose native kernel clearly loses; and all of them, where that leaves no conversion
    between layers, and they take less in float than the whole engine.
    """
    layers = times.layers
    clearly = [node for node, (mine, other) in layers.items() if other < _CLEARLY * mine]
    found = [clearly] if clearly else []
    in_float = sum(other for _, other in layers.values())
    if len(clearly) < len(layers) and in_float < times.engine:
        found.append(list(layers))
    return found


def fastest_of(engines: list[Any], batch: int) -> Any:
    """The engine that takes the least time for a whole batch; the first one wins ties."""
    times = seconds_of({str(k): engine for k, engine in enumerate(engines)}, batch)
    return engines[min(range(len(engines)), key=lambda k: times[str(k)])]
