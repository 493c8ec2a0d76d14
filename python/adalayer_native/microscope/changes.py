"""Changes of a converted model that may undo what rounding cost, each applied to a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adalayer_native import ops
from adalayer_native.capture import GraphModel
from adalayer_native.errors import CalibrationError
from adalayer_native.microscope.layer_errors import Grid, grid_of_input
from adalayer_native.microscope.pairing import Layer, Pairs
from adalayer_native.microscope.result import interval
from adalayer_native.nn import Conv2d, ConvTranspose2d, FakeQuantize
from adalayer_native.nn.float_layer import FloatLayer
from adalayer_native.nn.layer import NativeLayer, checked_qparams
from adalayer_native.plan import MAX_BITS
from adalayer_native.quantization.chains import ACT_ROOT
from adalayer_native.quantization.graph import insert_behind, set_submodule
from adalayer_native.quantization.observers import OBSERVERS, make_observer
from adalayer_native.rounding import activation_grid, group_size_of, quantize_weight

__all__ = ["Change", "float_layer", "more_bits", "regrids"]

# Ranges that differ by less than this share of their width are the same.
_SAME = 0.01


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        name: of the layer or value.
        kind, text, value: as in :class:`~adalayer_native.microscope.result.Suggestion`.
        key: what it changes and to what; equal for the same change of two rows.
        bytes: by which packed weights grow.
        make: changes a copy in place.
    """

    name: str
    kind: str
    text: str
    value: int | tuple[float, float] | None
    key: tuple[Any, ...]
    bytes: int
    make: Callable[[nn.Module], None]

    def apply(self, native: nn.Module) -> nn.Module:
        """A copy with the change."""
        other = copy.deepcopy(native)
        self.make(other)
        return other


# -- weights --------------------------------------------------------------------------------------


def more_bits(pairs: Pairs, layer: Layer) -> list[Change]:
    """One bit more in a layer's weights, two, and 8: the float weights rounded anew."""
    module = layer.native
    assert isinstance(module, NativeLayer)
    return [
        _bits(pairs, layer, bits)
        for bits in sorted({module.bits + 1, module.bits + 2, MAX_BITS})
        if module.bits < bits <= MAX_BITS
    ]


def _bits(pairs: Pairs, layer: Layer, bits: int) -> Change:
    module = layer.native
    assert isinstance(module, NativeLayer)
    assert layer.weight is not None
    pruned = pairs.native.meta["layers"].get(layer.name, {}).get("sparsity")
    mask = None
    if pruned or ops.packed_info(module.weight_packed)["encoding"] != "dense":
        mask = (module.weight_int() != 0).reshape(layer.weight.shape)
    size = None
    if module.weight_scale.dim() == 2:
        size = group_size_of(layer.weight.shape[1], module.weight_scale.shape[1])
    weight, scale = quantize_weight(layer.weight, bits, mask, group_size=size)
    packed = ops.pack_weight(weight, bits)

    def make(native: nn.Module) -> None:
        other = native.get_submodule(layer.name)
        assert isinstance(other, NativeLayer)
        other.weight_packed = packed.clone()
        other.weight_scale = scale.clone()
        assert layer.bias is not None
        other.bias = layer.bias.clone()

    return Change(
        layer.name,
        "bits",
        f"{bits} bits in the weights instead of {module.bits}",
        bits,
        ("bits", layer.name, bits),
        packed.numel() - module.weight_packed.numel(),
        make,
    )


def float_layer(layer: Layer) -> Change | None:
    """A layer in float: neither its weights nor its input are rounded; None where that cannot be
    said (a transposed convolution whose calls choose their size)."""
    module = layer.native
    assert isinstance(module, NativeLayer)
    sized = any(len(there.args) > 1 or there.kwargs for _, there in layer.calls)
    if isinstance(module, ConvTranspose2d) and sized:
        return None
    reference = layer.reference
    assert isinstance(reference, FloatLayer)
    weight, bias = reference.weight, reference.bias

    def make(native: nn.Module) -> None:
        other = native.get_submodule(layer.name)
        assert isinstance(other, NativeLayer)
        assert isinstance(native, GraphModel)
        operator, arguments = other.operator()
        plain = FloatLayer(operator, {**arguments, "output_bits": 0}, True)
        plain.weight, plain.bias = weight.clone(), bias.clone()
        set_submodule(native, layer.name, plain)
        grid = getattr(other, "output_grid", None)
        if grid is not None:  # what the layer did on its way out stands by itself again
            target = next(name for name, found in native.named_modules() if found is grid)
            for node in list(native.graph.nodes):
                if node.op == "call_module" and node.target == layer.name:
                    insert_behind(native.graph, node, target)
            native.recompile()

    held = module.weight_packed.numel()
    return Change(
        layer.name,
        "float",
        f"in float (exclude={[layer.name]})",
        None,
        ("float", layer.name),
        4 * weight.numel() - held,
        make,
    )


# -- grids ----------------------------------------------------------------------------------------


def regrids(pairs: Pairs, name: str, site: str, seen: Iterable[Tensor]) -> list[Change]:
    """Other grids of a value: ranges as the observers choose them, and 8 bits where it has fewer.

    Args:
        pairs: what is compared.
        name: of the row.
        site: of the grid.
        seen: the float model's values, as the native model has them; read once.
    """
    present = _grids_at(pairs, site)
    now = present.get(name) or next(iter(present.values()))
    wanted = [(kind, now.bits) for kind in OBSERVERS]
    if now.bits < MAX_BITS:
        wanted.append(("mse", MAX_BITS))
    found: list[Change] = []
    tried: list[Grid] = []
    for (kind, bits), new in _observed(wanted, site, seen).items():
        if bits != now.bits:
            text = f"{bits} bits in the input instead of {now.bits}"
            found.append(_regrid(pairs, name, site, new, "input_bits", text, bits))
            continue
        same = all(_alike(new, other) for other in present.values())
        if same or any(_alike(new, other) for other in tried):
            continue
        tried.append(new)
        before, after = (interval((g.low, g.high)) for g in (now, new))
        text = f"range {after} ({kind}) instead of {before}"
        found.append(_regrid(pairs, name, site, new, "range", text, (new.low, new.high)))
    return found


def _observed(
    wanted: list[tuple[str, int]], site: str, seen: Iterable[Tensor]
) -> dict[tuple[str, int], Grid]:
    """The grids that observers choose, by kind and bits; none where no grid holds the values."""
    observers = {(kind, bits): make_observer(kind, bits, site) for kind, bits in wanted}
    try:
        for x in seen:
            for observer in observers.values():
                observer.observe(x)
        return {
            key: Grid(*activation_grid(*observer.range(), key[1]), key[1])
            for key, observer in observers.items()
        }
    except CalibrationError:
        return {}


def _alike(a: Grid, b: Grid) -> bool:
    near = _SAME * max(a.high - a.low, b.high - b.low)
    return abs(a.low - b.low) <= near and abs(a.high - b.high) <= near


def _grids_at(pairs: Pairs, site: str) -> dict[str, Grid]:
    """The grid of a site wherever the native model has it, by layer or quantizer; all alike,
    unless somebody has changed one."""
    found = {}
    if site in pairs.values:
        found[pairs.values[site].name] = grid_of_input(pairs.values[site].grid)
    for name in pairs.readers(site):
        module = pairs.layers[name].native
        assert isinstance(module, NativeLayer)
        found[name] = grid_of_input(module)
    return found


class _Regrid:
    """Gives a value another grid wherever it is read or written."""

    def __init__(self, new: Grid, readers: list[str], writers: list[str], target: str) -> None:
        self.grid, self.readers, self.writers, self.target = new, readers, writers, target

    def __call__(self, native: nn.Module) -> None:
        qparams = checked_qparams(self.grid.scale, self.grid.zero_point, self.grid.bits)
        for name in self.readers:
            reader = native.get_submodule(name)
            if isinstance(reader, NativeLayer):  # else another change has put it in float
                reader._set_grid(qparams.clone())
        for name in self.writers:
            writer: Any = native.get_submodule(name)
            writer.output_grid._set_grid(qparams.clone())
        for name, module in native.named_modules():
            if name == self.target and isinstance(module, FakeQuantize):
                module._set_grid(qparams.clone())


def _regrid(
    pairs: Pairs,
    name: str,
    site: str,
    new: Grid,
    kind: str,
    text: str,
    value: int | tuple[float, float],
) -> Change:
    target = f"{ACT_ROOT}.{site}"
    held = pairs.values[site].grid if site in pairs.values else None
    writers = [
        layer
        for layer, module in pairs.native.named_modules()
        if held is not None
        and isinstance(module, (Conv2d, ConvTranspose2d))
        and module.output_grid is held
    ]
    make = _Regrid(new, pairs.readers(site), writers, target)
    key = ("grid", site, round(new.low, 9), round(new.high, 9), new.bits)
    return Change(name, kind, text, value, key, 0, make)
