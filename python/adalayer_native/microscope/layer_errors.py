"""Errors of every layer and value, streamed over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native import ops
from adalayer_native.capture import GraphModel, Inputs
from adalayer_native.errors import CalibrationError
from adalayer_native.importance.batches import tokens_of
from adalayer_native.importance.outputs import LossFn, Pick, distance, loss_of
from adalayer_native.microscope.pairing import Layer, Pairs, scaled_channels
from adalayer_native.nn.layer import NativeLayer, QuantizedInput

__all__ = ["Grid", "Sums", "grid_of_input", "measure", "network_error", "outputs_of", "pieces"]

MEMORY = 1 << 29  # bytes of recorded values at a time


@dataclass(frozen=True)
class Grid:
    """The u8 grid of a value: ``(q - zero_point) * scale`` for q from 0 to ``2^bits - 1``."""

    scale: float
    zero_point: int
    bits: int

    @property
    def low(self) -> float:
        """Its lowest value."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """Its highest value."""
        return ((1 << self.bits) - 1 - self.zero_point) * self.scale

    def __call__(self, x: Tensor) -> Tensor:
        """A float32 tensor on the grid."""
        return ops.fake_quantize(x, self.scale, self.zero_point, self.bits)


def grid_of_input(module: QuantizedInput) -> Grid:
    """The grid that a native layer rounds its input to, or a quantizer its value."""
    return Grid(module.input_scale, module.input_zero_point, module.input_bits)


@dataclass
class Sums:
    """What is added up over all samples, for one layer or value; float64.

    Attributes:
        signal: squares of the float model's values.
        errors: squared differences from them, by kind: ``own`` (float inputs, weights and inputs
            rounded), ``weights``, ``activations`` (one of the two alone), ``accumulated`` (inputs
            as the native network has them).
        product, energy: of the accumulated values: their products with the float ones, their
            squares.
        clipped, count: float values of what the grid is of, those beyond its ends and all.
        beyond, rounding: squared errors of the grid: what is beyond its ends, and all.
        low, high: their range.
    """

    signal: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    product: float = 0.0
    energy: float = 0.0
    clipped: int = 0
    count: int = 0
    beyond: float = 0.0
    rounding: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def compare(self, wanted: Tensor, **found: Tensor) -> None:
        """Add the errors of some results."""
        reference = wanted.double()
        self.signal += _square(reference)
        for kind, value in found.items():
            error = _square(value.double() - reference)
            self.errors[kind] = self.errors.get(kind, 0.0) + error
        last = found["accumulated"].double()
        self.product += float((last * reference).sum())
        self.energy += _square(last)

    def observe(self, x: Tensor, grid: Grid | None) -> None:
        """Add what a grid was chosen for; clipped is what is over half a step beyond its ends."""
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.count += x.numel()
        if grid is not None:
            half = 0.5 * grid.scale
            self.clipped += int(((x < grid.low - half) | (x > grid.high + half)).sum())
            self.beyond += _square(x - x.clamp(grid.low, grid.high))
            self.rounding += _square(grid(x) - x)

    def error(self, kind: str) -> float:
        """Relative squared error; of a signal of zeros, infinite unless there is none."""
        error = self.errors[kind]
        return error / self.signal if self.signal > 0 else (math.inf if error > 0 else 0.0)

    @property
    def clipping(self) -> float:
        """Share of the grid's squared error that is of values beyond its ends."""
        return min(1.0, self.beyond / self.rounding) if self.rounding > 0 else 0.0

    @property
    def cosine(self) -> float:
        """Between float and accumulated values; 1 where both are zero."""
        if self.signal == 0 or self.energy == 0:
            return 1.0 if self.signal == self.energy else 0.0
        return self.product / math.sqrt(self.signal * self.energy)


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


class _Recording(fx.Interpreter):
    """Runs a captured or converted model and keeps some of its values."""

    def __init__(self, model: GraphModel, wanted: Iterable[fx.Node]) -> None:
        super().__init__(model)
        self.wanted = set(wanted)
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            # A copy, because what follows may work in place.
            self.found[n] = value.clone()
        return value

    def values(self, x: Inputs) -> dict[fx.Node, Tensor]:
        """What is wanted, of one batch."""
        model = self.module
        assert isinstance(model, GraphModel)
        self.found = {}
        self.run(*model.signature.leaves(x.args, x.kwargs), enable_io_processing=False)
        return self.found


@torch.no_grad()
def recorded(
    model: GraphModel, wanted: Iterable[fx.Node], batches: Iterable[Inputs]
) -> Iterator[dict[fx.Node, Tensor]]:
    """Some values of a model, batch by batch."""
    recording = _Recording(model, wanted)
    for x in batches:
        yield recording.values(x)


def pieces(batches: Iterable[Inputs], model: GraphModel, wanted: list[fx.Node]) -> list[Inputs]:
    """The batches cut so that the wanted values of one fit into memory, several times."""
    fewest = 1 if model.signature.single else 2
    found = []
    size: int | None = None
    for x in batches:
        if size is None:
            (values,) = recorded(model, wanted, [x[:fewest]])
            held = 4 * sum(value.numel() for value in values.values())
            size = max(fewest, fewest * MEMORY // max(1, held))
        start, count = 0, x.count
        while start < count:
            stop = start + size if count - start - size >= fewest else count
            found.append(x if (start, stop) == (0, count) else x[slice(start, stop)])
            start = stop
    return found


@torch.no_grad()
def measure(
    pairs: Pairs, batches: list[Inputs], advance: Callable[[], None]
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Sums of all layers and of all values between them.

    Args:
        pairs: what is compared.
        batches: of any size; larger ones are cut.
        advance: called for every piece.

    Raises:
        CalibrationError: the float model has NaN or infinity somewhere; names the layer.
    """
    here = {a for item in pairs.layers.values() for a, _ in item.inputs}
    there = {b for item in pairs.layers.values() for _, b in item.inputs}
    here |= {a for value in pairs.values.values() for a, _ in value.nodes}
    there |= {b for value in pairs.values.values() for _, b in value.nodes}
    layers = {name: Sums() for name in pairs.layers}
    values = {name: Sums() for name in pairs.values}
    cut = pieces(batches, pairs.model, list(here))
    floats, natives = recorded(pairs.model, here, cut), recorded(pairs.native, there, cut)
    for real, got in zip(floats, natives, strict=True):
        for name, layer in pairs.layers.items():
            for a, b in layer.inputs:
                _compare_layer(layers[name], layer, scaled_channels(real[a], layer.factor), got[b])
        for name, value in pairs.values.items():
            grid = grid_of_input(value.grid)
            for a, b in value.nodes:
                x = scaled_channels(real[a], value.factor)
                values[name].observe(x, grid)
                own = grid(x)
                values[name].compare(x, own=own, activations=own, accumulated=got[b])
        for name, sums in (*layers.items(), *values.items()):
            if sums.count and not math.isfinite(sums.signal + sums.low + sums.high):
                raise CalibrationError(
                    f"{name!r}: the float model has NaN or infinity there on this data; expected "
                    "finite numbers"
                )
        advance()
    return layers, values


def _compare_layer(sums: Sums, layer: Layer, x: Tensor, native_x: Tensor) -> None:
    wanted = layer.reference(x)
    if not isinstance(layer.native, NativeLayer):
        sums.observe(x, None)
        sums.compare(wanted, own=layer.native(x), accumulated=layer.native(native_x))
        return
    assert layer.weights_only is not None
    grid = grid_of_input(layer.native)
    sums.observe(x, grid)
    run = bare(layer.native)
    sums.compare(
        wanted,
        own=run(x),
        weights=layer.weights_only(x),
        activations=layer.reference(grid(x)),
        accumulated=run(native_x),
    )


def bare(layer: NativeLayer) -> Callable[[Tensor], Tensor]:
    """The native layer's own operator without residual, clamp and output grid."""
    name, arguments = layer.operator()
    arguments = {**arguments, "lo": None, "hi": None}
    if "output_bits" in arguments:
        arguments |= {"output_scale": 0.0, "output_zero_point": 0, "output_bits": 0}
    operator = getattr(ops, name)
    return lambda x: operator(x, **arguments)


@torch.no_grad()
def outputs_of(model: nn.Module, batches: Iterable[Inputs]) -> list[Any]:
    """What a model returns."""
    return [x(model) for x in batches]


@torch.no_grad()
def network_error(
    model: Any,
    batches: list[Inputs],
    wanted: list[Any],
    *,
    output: Pick = None,
    loss_fn: LossFn | None = None,
) -> float:
    """How far a model's results are from the float model's, a mean over samples.

    See :func:`~adalayer_native.importance.outputs.distance`; with a ``loss_fn`` of results and
    the float model's results it is that, less what it says of the latter alone.

    Raises:
        CalibrationError: the loss is no number.
    """
    total = 0.0
    for x, reference in zip(batches, wanted, strict=True):
        if loss_fn is None:
            found = float(distance(reference, x(model), output, tokens_of(x)))
        else:
            found = loss_of(x(model), reference, None, loss_fn, pick=output)
            found -= loss_of(reference, reference, None, loss_fn, pick=output)
            if not math.isfinite(found):
                raise CalibrationError(f"loss_fn gives {found} for {x.count} samples")
        total += x.count * found
    return total / sum(x.count for x in batches)
