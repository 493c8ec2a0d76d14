"""What rounding alone costs a float network: the yardstick of the cosines.

A cosine to the float network says how well a network is quantized only where the network itself
does not let errors grow. So the same network runs once more, still in float, with noise as large
as the rounding of an ideal grid of 8 bits: uniform over a step of (largest - smallest) / 255, on
every value that a layer reads or that is combined with another, and over a step of the weights'
grid on every weight. Largest and smallest are those of the calibration data, and values beyond
them are clipped: one input of random convolutions may have ten times the values of all others.
No rounding depends on another. What that leaves of the result, nobody's quantization at these
widths can be expected to exceed by much; where it is well below 1, the network's activations are
not sane for a comparison with float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native.capture import GraphModel
from adalayer_native.plan import supported_layers
from bench.zoo.entry import Example, arguments

LEVELS = 255  # steps of an activation's grid
SEED = 0x5EED  # not one that weights or inputs are drawn with: the noise would follow their signs
COMBINING = ("add", "sub", "mul", "div", "cat")


def rounded(
    captured: GraphModel, example: Example, bits: int, calibration: Sequence[Example]
) -> Any:
    """The result of a captured network with the noise of rounding.

    Args:
        captured: left as it was.
        example: its inputs.
        bits: of the weights, per output channel; activations have 8.
        calibration: inputs whose values give the ranges.
    """
    generator = torch.Generator().manual_seed(SEED)
    layers = supported_layers(captured)
    found = [layer.weight for layer in layers.values()]
    weights = dict.fromkeys(w for w in found if isinstance(w, nn.Parameter))
    with torch.no_grad():
        ranges = _Ranges(captured, set(layers))
        for batch in calibration:
            ranges.run(*_leaves(captured, batch))
        with _rounded_weights(weights, bits, generator):
            return _Noisy(captured, ranges.found, generator).run(*_leaves(captured, example))


def _leaves(captured: GraphModel, example: Example) -> list[Any]:
    args, kwargs = arguments(example)
    return captured.signature.leaves(args, kwargs)


class _Ranges(fx.Interpreter):
    """Notes smallest and largest of every value that rounding would store."""

    def __init__(self, captured: GraphModel, layers: set[str]) -> None:
        super().__init__(captured)
        self.found: dict[fx.Node, tuple[float, float]] = {}
        self.stored = {
            operand
            for node in captured.graph.nodes
            if (node.op == "call_module" and node.target in layers)
            or (node.op == "call_function" and _combines(node))
            for operand in node.all_input_nodes
            if operand.op != "get_attr"
        }

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.stored and isinstance(value, Tensor) and value.is_floating_point():
            low, high = map(float, torch.aminmax(value))
            before = self.found.get(n, (low, high))
            self.found[n] = min(low, before[0]), max(high, before[1])
        return value


class _Noisy(fx.Interpreter):
    """Clips and shakes what was stored."""

    def __init__(
        self,
        captured: GraphModel,
        ranges: Mapping[fx.Node, tuple[float, float]],
        generator: torch.Generator,
    ) -> None:
        super().__init__(captured)
        self.ranges = ranges
        self.generator = generator

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.ranges:
            low, high = self.ranges[n]
            step = (high - low) / LEVELS
            value = value.clamp(low, high) + step * _noise(value, self.generator)
        return value


def _combines(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0].rstrip("_")
    return name in COMBINING and len(node.all_input_nodes) > 1


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator) - 0.5


@contextmanager
def _rounded_weights(
    weights: Iterable[nn.Parameter], bits: int, generator: torch.Generator
) -> Iterator[None]:
    kept = [(weight, weight.data) for weight in weights]
    try:
        for weight, values in kept:
            largest = values.abs().amax(tuple(range(1, values.dim())), keepdim=True)
            step = largest / (2 ** (bits - 1) - 1)
            weight.data = values + step * _noise(values, generator)
        yield
    finally:
        for weight, values in kept:
            weight.data = values
